"""Linears of one input that are rounded in one call leave the artifact that they leave one by one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from quant import methods
from quant.kernels import kernel
from quant.methods.gptq import Gptq
from quant.statistics import Statistics
from tests.quant.test_gptq_stacked import G16, given
from tests.workers.stage_runs import W4G16, calibrated, component, quantized, tiny_context
from workers.errors import NumericalError
from workers.rounding import translated
from workers.specs import MethodSpec, ModelSpec, QuantizeSpec, Rule
from workers.together import round_together


def test_artifacts_equal_those_of_linears_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values with bits of their own; gate and up alike."""
    run = kernel("gptq_block").run
    solve, rows = run.solve_block, list[int]()
    monkeypatch.setattr(run, "solve_block", lambda block, *more: (rows.append(block.shape[1]), solve(block, *more))[1])
    method = MethodSpec(component("gptq", block_size=16))
    rules = tuple(Rule(pattern, method, replace(W4G16, bits=bits)) for pattern, bits in (("*", 4), ("*.k_proj", 2), ("*.v_proj", 8)))
    spec, ctx = QuantizeSpec(ModelSpec("model"), rules), tiny_context("llama", tmp_path)
    inputs = calibrated(ctx, tmp_path, "hessian")
    together, _ = quantized(ctx, tmp_path / "together", spec, inputs)
    assert rows == 2 * [*(2 * [64]), *(2 * [32]), *(2 * [96]), *(3 * [32])], "q, k and v; o; gate and up; down: two blocks of the model"
    monkeypatch.setattr(Gptq, "stacks", lambda *_: False)
    apart, _ = quantized(ctx, tmp_path / "apart", spec, inputs)
    files = sorted(p.name for p in (apart / "payload").glob("*.safetensors"))
    assert files
    for name in files:
        a, b = (load_file(folder / "payload" / name) for folder in (together, apart))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert (together / "payload" / "recipe.json").read_bytes() == (apart / "payload" / "recipe.json").read_bytes()
    tables = [pq.read_table(folder / "payload" / "layers.parquet") for folder in (together, apart)]
    assert tables[0].drop_columns(["seconds"]).equals(tables[1].drop_columns(["seconds"]))
    assert all(s > 0 for s in tables[0]["seconds"].to_pylist())


class Worker:
    """As much of a BlockQuantizer as is asked."""

    def __init__(self, weights: dict[str, torch.Tensor], statistics: Statistics, rounding: Any) -> None:
        self.weights = SimpleNamespace(current=weights)
        self.methods = {n: SimpleNamespace(rounding=rounding, scheme=G16) for n in weights}
        self.statistics = statistics

    def path(self, name: str) -> str:
        return f"block.{name}"

    def statistics_to_round(self, name: str) -> tuple[Statistics, bool]:
        return self.statistics, False

    def round(self, name: str, rounded: Any = None, seconds: float = 0.0) -> Any:
        with translated(self.path(name)):
            alone = self.methods[name].rounding.quantize(self.weights.current[name], self.statistics, G16)
        return SimpleNamespace(name=name, rounded=rounded or alone, stacked=rounded is not None)


def test_a_linear_that_needs_wider_scales_notes_it_alone() -> None:
    weights, statistics = given()
    worker = Worker(dict(zip("qkv", [weights[0], 1e7 * weights[1], weights[2]], strict=True)), statistics, Gptq())
    results = round_together(worker, "qkv")  # type: ignore[arg-type]
    assert [("float32" in " ".join(r.rounded.notes)) for r in results] == [False, True, False]


def test_an_error_names_the_linear_that_has_it() -> None:
    weights, statistics = given()
    weights[1][3, 4] = math.nan
    with pytest.raises(NumericalError, match=r"block\.k: weight"):
        round_together(Worker(dict(zip("qkv", weights, strict=True)), statistics, Gptq()), "qkv")  # type: ignore[arg-type]


def test_others_are_rounded_one_by_one_between_them() -> None:
    """In the order asked for, whatever was rounded together."""
    weights, statistics = given()
    worker = Worker(dict(zip("qkv", weights, strict=True)), statistics, Gptq())
    worker.methods["k"].rounding = methods.rounding("rtn", {}, version=1)
    assert [(r.name, r.stacked) for r in round_together(worker, "qkv")] == [("q", True), ("k", False), ("v", True)]  # type: ignore[arg-type]
