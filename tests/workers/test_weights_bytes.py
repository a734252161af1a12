"""Bytes that are told of a variant are those that its packed model keeps, in memory and on disk."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.scheme import ActivationScheme, Granularity, WeightScheme
from tests.tiny_models import tiny_model
from tests.workers.stage_runs import (
    W4,
    W4G16,
    calibrated,
    commit,
    component,
    context,
    quantize_spec,
    quantized,
    tiny_context,
    with_calibration,
)
from workers.context import Context
from workers.packed import OPERATIONS, weights_bytes
from workers.rebuild import rebuild, rebuild_packed
from workers.recipe import Recipe
from workers.specs import ModelSpec, QuantizeSpec

MODEL = ModelSpec("model")
KINDS = ("hessian", "absmax", "absmean", "samples")
TOKENS = torch.arange(2, 14)[None]
A4, A8 = ActivationScheme(4, symmetric=False), ActivationScheme(8)
STATIC = ActivationScheme(8, symmetric=False, granularity=Granularity.TENSOR, dynamic=False)
W2G8 = WeightScheme(2, granularity=Granularity.GROUP, group_size=8)
REASSEMBLY = component("qllm_reassembly", ratio=0.4)
SPECS: dict[str, QuantizeSpec] = {
    "rtn": quantize_spec(),
    "rtn_awq": quantize_spec("rtn", "awq", weight=W4G16),
    "gptq_order": quantize_spec("gptq", weight=W4G16, act_order=True),
    "gptq_smoothquant": quantize_spec("gptq", "smoothquant", weight=WeightScheme(8), activation=A8),
    "quik": quantize_spec("gptq", weight=W4, outlier_columns=2, outlier_metric="quik", activation=A8),
    "quik_static": quantize_spec("gptq", weight=W4, outlier_columns=2, outlier_metric="quik", activation=STATIC),
    "owq": quantize_spec("gptq", weight=W4G16, outlier_columns=3, outlier_metric="owq"),
    "claq": quantize_spec("claq", weight=WeightScheme(2), adaptive_bits=2.5, outlier_reservation=True),
    "squeezellm": quantize_spec("squeezellm", weight=WeightScheme(3)),
    "billm": quantize_spec("billm", weight=WeightScheme(1), block_size=24),
    "pb_llm": quantize_spec("pb_llm", weight=WeightScheme(1)),
    "hqq_strided": quantize_spec("hqq", weight=W4G16, axis=0),
    "quip": quantize_spec("quip", weight=W4),
    "quip_sharp": quantize_spec("quip_sharp", weight=W4, tune_iters=1),
    "slim_llm": quantize_spec("slim_llm", weight=W2G8),
    "spqr": quantize_spec("spqr", weight=W4G16),
    "omniquant": quantize_spec("omniquant", weight=W4, activation=ActivationScheme(6, symmetric=False), epochs=1, let=True),
    "llm_int8": quantize_spec("llm_int8", weight=WeightScheme(8, True), activation=A8),
    "nf4": quantize_spec("nf4", weight=WeightScheme(4, True, Granularity.GROUP, 16, number="nf4")),
    "quarot": with_calibration(quantize_spec("gptq", "quarot", weight=W4)),
    "quarot_partly": with_calibration(quantize_spec("rtn", "quarot", weight=W4, pattern="*.q_proj")),
    "qllm": quantize_spec("rtn", REASSEMBLY, weight=W4, activation=A4, grid="omni"),
    "partly": quantize_spec(pattern="*.1.*"),
}
OF_FAMILIES = [
    *(("llama", name) for name in SPECS),
    *((family, name) for family in ("opt", "gpt2", "mixtral") for name in ("gptq_order", "gptq_smoothquant", "partly")),
    ("opt", "quarot"),
    ("qwen2", "quarot"),
    ("qwen2", "qllm"),
    ("gemma", "qllm"),
]


@pytest.fixture(scope="module")
def calibrations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Context, dict[str, Path]]]:
    found = {}
    for family in dict.fromkeys(f for f, _ in OF_FAMILIES):
        folder = tmp_path_factory.mktemp(family)
        ctx = tiny_context(family, folder)
        found[family] = ctx, calibrated(ctx, folder, *KINDS)
    return found


@contextmanager
def new_storages() -> Iterator[Callable[[], int]]:
    """Bytes of plain dense tensors made within; those of other tests in the process may be sparse or fake."""

    def held() -> int:
        gc.collect()
        plain = (o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))
        found = (t.untyped_storage() for t in plain if t.layout is torch.strided and t.device.type == "cpu")
        return sum({s.data_ptr(): s.nbytes() for s in found}.values())

    gc.freeze()  # what was there before is not seen, nor looked through
    try:
        yield held
    finally:
        gc.unfreeze()


def check_memory(ctx: Context, artifact: Path, backend: str, activation: ActivationScheme | None) -> int:
    """Also once it has run, but for the last inputs, which grow with the tokens. Returns the bytes."""
    with torch.no_grad():
        rebuild(ctx, MODEL, artifact)(TOKENS, use_cache=False)  # what a process keeps: small Hadamard matrices
    with new_storages() as held:
        model, made = rebuild_packed(ctx, MODEL, artifact, backend, activation)
        told = weights_bytes(model, made)
        assert held() == told
        after = []
        for sequences in (1, 2):
            with torch.no_grad():
                model(TOKENS.repeat(sequences, 1), use_cache=False)
            after.append(held())
        assert 2 * after[0] - after[1] == told == weights_bytes(model, made)
    return told


@pytest.mark.parametrize(("family", "name"), OF_FAMILIES)
def test_what_is_told_is_held_and_stored(
    family: str, name: str, calibrations: dict[str, tuple[Context, dict[str, Path]]], tmp_path: Path
) -> None:
    """References read codes of a byte each. An order of inputs that several linears share is there once."""
    ctx, statistics = calibrations[family]
    spec = SPECS[name]
    artifact, summary = quantized(ctx, tmp_path / "q", spec, statistics)
    taken = all(type(Recipe(artifact).stored(op)) in OPERATIONS for op in Recipe(artifact).replaced())
    for backend in ("auto", "dense", *(("reference",) if taken else ())):
        check_memory(ctx, artifact, backend, None)
    if spec.activation is not None:
        check_memory(ctx, artifact, "auto", spec.activation)
    assert summary["model_bytes"] == stored(family, artifact, tmp_path)


def stored(family: str, artifact: Path, folder: Path) -> int:
    """Bytes of the artifact's tensors, and of those of the checkpoint that change the rebuilt model where they change."""
    file = folder / "model" / "model.safetensors"
    shutil.copytree(tiny_model(family), file.parent)
    checkpoint = load_file(file)
    want = state(file.parent, folder, artifact)
    out = sum(t.nbytes for part in artifact.glob("payload/*.safetensors") for t in load_file(part).values())
    for name, tensor in checkpoint.items():
        file.unlink()
        save_file({**checkpoint, name: 2 * tensor + 1}, file, {"format": "pt"})
        found = state(file.parent, folder, artifact)
        out += 0 if all(torch.equal(found[n], t) for n, t in want.items()) else tensor.nbytes
    return out


def state(model: Path, folder: Path, artifact: Path) -> Mapping[str, Tensor]:
    found: Mapping[str, Tensor] = rebuild(context(model, folder), MODEL, artifact).state_dict()
    return found


@pytest.mark.parametrize("backend", ["auto", "dense"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "rwkv"])
def test_steps_on_inputs_count(family: str, backend: str, tmp_path: Path) -> None:
    """Of all kinds, on every linear that may have them; no method gathers, scales or rotates so far."""
    ctx = tiny_context(family, tmp_path)
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec(), {})
    plain = check_memory(ctx, artifact, backend, None)
    path = artifact / "payload" / "recipe.json"
    recipe: Any = json.loads(path.read_text())
    files: dict[str, dict[str, Tensor]] = {}
    added = 0
    for op in Recipe(artifact).replaced():
        if "experts" in op["module"]:
            continue
        k = Recipe(artifact).stored(op).shape[1]
        made = {"i": torch.randperm(k, dtype=torch.int32), "s": torch.rand(k), "t": torch.rand(k).half(), "m": torch.eye(k)}
        files.setdefault(op["file"], {}).update({f"{op['module']}.{n}": t for n, t in made.items()})
        names = {n: f"{op['module']}.{n}" for n in made}
        (there,) = (o for o in recipe["operations"] if o["module"] == op["module"])
        there["input"] = [
            {"op": "gather", "index": names["i"], "scale": names["s"]},
            {"op": "scale", "scale": names["t"]},
            {"op": "rotation", "matrix": names["m"]},
        ]
        added += 8 * k + sum(made[n].nbytes for n in "stm")  # indices as torch reads them
    for name, tensors in files.items():
        save_file({**load_file(path.parent / name), **tensors}, path.parent / name)
    path.write_text(json.dumps(recipe))
    commit(artifact)
    assert check_memory(ctx, artifact, backend, None) == plain + added
