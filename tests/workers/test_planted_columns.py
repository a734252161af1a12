"""In a real model, planted columns are found exactly, and planted key channels ask for ranges per channel."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from quant.methods.base import StoredTensor
from quant.scheme import Granularity, KVScheme, WeightScheme
from quant.tensors.codebook import CodebookTensor
from quant.tensors.columns import ColumnsTensor
from quant.tensors.sparse import SparseTensor
from tests.planted import Planted
from tests.workers.stage_runs import commit, component
from tests.workers.test_planted import MODEL, Case, planted
from workers import kv_runs
from workers.quantize import run_quantize
from workers.rebuild import attach_runtime, load_model
from workers.recipe import Recipe
from workers.specs import Component, MethodSpec, ModelSpec, QuantizeSpec, Rule
from workers.tasks.base import log_probs
from workers.tasks.divergence import compare

COLUMNS = [3, 97, 200]
FIRST = "model.layers.0."
READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
"""Linears whose inputs the norms put out."""


def first_block(case: Case, rounding: Component, weight: WeightScheme) -> dict[str, StoredTensor]:
    """What is stored of `READERS`."""
    folder = case.work / rounding.name
    (folder / "payload").mkdir(parents=True)
    rules = tuple(Rule(FIRST + name, MethodSpec(rounding), weight) for name in READERS)
    run_quantize(QuantizeSpec(ModelSpec("model"), rules), case.statistics, folder / "payload", case.context)
    recipe = Recipe(commit(folder))
    return {op["module"].removeprefix(FIRST): recipe.stored(op) for op in recipe.replaced()}


def case_of(work: Path, made: Planted) -> Case:
    return Case(made.save(MODEL, work / "model"), work)


@pytest.fixture(scope="module")
def large_weights(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Columns 32 times as large, inputs as much smaller."""
    made = Planted.of(MODEL)
    made.activations(COLUMNS, -5)
    return case_of(tmp_path_factory.mktemp("columns"), made)


@pytest.fixture(scope="module")
def large_inputs(tmp_path_factory: pytest.TempPathFactory) -> Case:
    made = Planted.of(MODEL)
    made.activations(COLUMNS, 5)
    return case_of(tmp_path_factory.mktemp("inputs"), made)


def test_spqr_keeps_the_large_columns(large_weights: Case) -> None:
    weight = WeightScheme(3, granularity=Granularity.GROUP, group_size=16)
    stored = first_block(large_weights, Component("spqr", 1), weight)
    assert set(stored) == set(READERS)
    for name, tensor in stored.items():
        assert isinstance(tensor, SparseTensor)
        found = torch.bincount(tensor.outlier_columns.long(), minlength=256)
        assert sorted(found.topk(3).indices.tolist()) == COLUMNS, name


def test_claq_gives_the_large_columns_bits_and_reserve(large_weights: Case) -> None:
    params = {"adaptive_bits": 2 + 2 * 3 / 256, "outlier_reservation": True, "variant": "corrected"}
    for name, tensor in first_block(large_weights, Component("claq", 2, tuple(sorted(params.items()))), WeightScheme(2)).items():
        assert isinstance(tensor, CodebookTensor)
        assert (tensor.widths == 4).nonzero()[:, 0].tolist() == COLUMNS, name
        assert tensor.outliers is not None
        counts = tensor.outliers.counts
        assert int(counts[COLUMNS].min()) > int(counts.median()), name


def test_owq_keeps_the_columns_of_large_inputs(large_inputs: Case) -> None:
    """Their rounding errors, which no row's range sees, weigh a thousand times the others'."""
    gptq = component("gptq", outlier_columns=3, outlier_metric="owq")
    for name, tensor in first_block(large_inputs, gptq, WeightScheme(6)).items():
        assert isinstance(tensor, ColumnsTensor)
        assert tensor.kept.tolist() == COLUMNS, name


def kv_kl(case: Case, kv: KVScheme) -> float:
    model, tokens = load_model(case.context, ModelSpec("model")), case.tokens[:4]
    if kv_runs.through_cache(kv):
        out = torch.cat(list(kv_runs.logits(model, kv, {}, case.context, nullcontext)([tokens])))
    else:
        attach_runtime(model, None, None, kv)
        with torch.no_grad():
            out = model(tokens, use_cache=False).logits
    return float(compare(log_probs(case.reference[:4, :-1]), out, tokens).kl.mean())


def test_planted_key_channels_hurt_ranges_per_token_and_not_per_channel(tmp_path_factory: pytest.TempPathFactory) -> None:
    plain = case_of(tmp_path_factory.mktemp("plain"), Planted.of(MODEL))
    folder = tmp_path_factory.mktemp("keys")
    keys = Case(planted("keys", folder / "model"), folder)
    per_token, kivi = KVScheme(2, group_size=32), KVScheme(2, group_size=32, kind="kivi", residual_length=32)
    # A power of two on a channel moves its range and nothing else.
    assert kv_kl(keys, kivi) == pytest.approx(kv_kl(plain, kivi), rel=1e-4)
    assert kv_kl(keys, per_token) > 1.5 * kv_kl(plain, per_token)
    assert kv_kl(keys, per_token) > 2 * kv_kl(keys, kivi)
