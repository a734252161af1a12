"""Moments of a model's tensors equal brute force, and show the channel where an outlier was planted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.planted import Planted
from tests.tiny_models import tiny_model
from tests.workers.stage_runs import calibrated, calibration_text, context, model_with_a_dead_expert, plain_inputs, tiny_context
from workers import families
from workers.blocks import linear_view
from workers.errors import NumericalError
from workers.site_moments import FILE

Rows = dict[tuple[str, str], dict[str, Any]]
NUMBERS = ("mean", "std", "kurtosis", "absmax", "absmax_sigma")


def rows_of(artifact: Path) -> Rows:
    """(kind, module) ▸ row."""
    return {(r["kind"], r["module"]): r for r in pq.read_table(artifact / "payload" / FILE).to_pylist()}


def plain_cache(family: str, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every block in transformers' own cache."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family)).eval()
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


def brute_force(x: Tensor) -> list[float]:
    v = x.double().flatten()
    d = v - v.mean()
    std = (d**2).mean().sqrt()
    return [float(n) for n in (v.mean(), std, (d**4).mean() / std**4, v.abs().max(), v.abs().max() / std)]


def check(row: dict[str, Any], x: Tensor) -> None:
    assert row["count"] == x.numel()
    # The model runs in float32, batched otherwise than the reference: some 1e-5 of each value, four times that in a fourth power.
    assert [row[n] for n in NUMBERS] == pytest.approx(brute_force(x), rel=1e-4, abs=1e-5 * row["std"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_old", "rwkv"])
def test_moments_equal_brute_force(family: str, tmp_path: Path) -> None:
    ctx = tiny_context(family, tmp_path)
    artifact = calibrated(ctx, tmp_path, "moments")["moments"]
    rows, tokens = rows_of(artifact), calibration_text(ctx, family)
    index = json.loads((artifact / "payload" / "sites.json").read_text())
    inputs = plain_inputs(family, tokens)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family))
    shapes = families.linear_shapes(model.config.to_dict())
    for shape in shapes:
        check(rows["input", index["linears"][shape.name]], inputs[shape.name])
        check(rows["weight", shape.name], linear_view(model, shape.name).weight())
    cached = [] if family == "rwkv" else plain_cache(family, tokens)
    structure = families.structure(model.config.to_dict())
    for b, (keys, values) in enumerate(cached):
        check(rows["keys", structure.path(b, "keys")], keys)
        check(rows["values", structure.path(b, "values")], values)
    assert len(rows) == len({s.site for s in shapes}) + len(shapes) + 2 * len(cached)
    assert {p for block in index["blocks"] for p in block["sites"]} == {m for k, m in rows if k == "input"}
    for (kind, _), row in rows.items():
        site = next((s for s in structure.sites if s.linears[0] == row["site"]), None)
        assert row["linears"] == (", ".join(site.linears) if kind == "input" and site else "")


def test_batching_changes_no_more_than_rounding(tmp_path: Path) -> None:
    one, all_ = (
        rows_of(calibrated(tiny_context("llama", tmp_path, batch_tokens=n), tmp_path / str(n), "moments")["moments"]) for n in (12, 4096)
    )
    assert one.keys() == all_.keys()
    for place, row in one.items():
        assert [row[n] for n in NUMBERS] == pytest.approx([all_[place][n] for n in NUMBERS], rel=1e-4, abs=1e-5 * row["std"])


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_one_forward_pass_serves_all_kinds_and_changes_none(family: str, tmp_path: Path) -> None:
    kinds = ("hessian", "absmax", "kv", "moments")
    together = calibrated(tiny_context(family, tmp_path), tmp_path / "together", *kinds)
    for kind in kinds:
        alone = calibrated(tiny_context(family, tmp_path), tmp_path / "alone", kind)[kind]
        for file in sorted((alone / "payload").iterdir()):
            assert file.read_bytes() == (together[kind] / "payload" / file.name).read_bytes(), (kind, file.name)


def test_an_expert_that_no_token_reaches_has_no_kurtosis(tmp_path: Path) -> None:
    folder = model_with_a_dead_expert(tmp_path / "m")
    rows = rows_of(calibrated(context(folder, tmp_path), tmp_path, "moments")["moments"])
    dead = rows["input", "model.layers.1.mlp.experts.down_proj.2"]
    assert (dead["count"], dead["kurtosis"], dead["absmax_sigma"]) == (0, None, None)
    assert rows["input", "model.layers.1.mlp.gate"]["linears"] == "mlp.gate"


PLANTS = {
    "activations": ("input", {"self_attn.q_proj", "mlp.gate_proj"}),
    "inner": ("input", {"mlp.down_proj"}),
    "values": ("values", {"values"}),
}
"""Method of `Planted` ▸ kind and sites of the tensors that hold the channel."""


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_channel_is_the_largest_absmax_over_sigma_and_nothing_else_changes(plant: str, tmp_path: Path) -> None:
    made = Planted.of(tiny_model("llama"))
    getattr(made, plant)([3], 8)
    folder = made.save(tiny_model("llama"), tmp_path / "planted")
    plain = rows_of(calibrated(tiny_context("llama", tmp_path), tmp_path / "a", "moments")["moments"])
    rows = rows_of(calibrated(context(folder, tmp_path), tmp_path / "b", "moments")["moments"])
    kind, sites = PLANTS[plant]
    same_kind = [r for r in rows.values() if r["kind"] == kind]
    planted = [r for r in same_kind if r["site"] in sites]
    assert len(planted) == made.blocks * len(sites)
    # One of 32 channels bounds absmax / σ by √32 x the channel's own, so in so small a model not all planted sites lead.
    assert max(same_kind, key=lambda r: r["absmax_sigma"]) in planted
    reads = {"values": "self_attn.o_proj"}.get(plant)  # attention hands the channel on
    for place, row in rows.items():
        if row in planted:
            assert row["absmax_sigma"] > plain[place]["absmax_sigma"]
            assert row["kurtosis"] > 2 * plain[place]["kurtosis"]
        elif row["kind"] in ("input", "keys") and row["site"] != reads:
            assert row == plain[place]


def test_keys_that_overflow_are_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"] *= 3e4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericalError, match=r"(values of model\.layers\.1|inputs of \S+) are not finite during calibration"):
        calibrated(context(folder, tmp_path), tmp_path, "moments", dtype="float16")
