"""Linears of a block's inputs at the same time leave the artifact that they leave one after another."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.workers.stage_runs import calibrated, quantize_spec, quantized, tiny_context
from tests.workers.test_on_cuda import spec_of
from workers import sites
from workers.errors import NumericalError
from workers.side_by_side import STREAMS, fit, needed, side_by_side

CPU = torch.device("cpu")
KINDS = ("hessian", "absmax", "absmean", "minmax", "samples")
said: ContextVar[str] = ContextVar("said", default="nothing")


def test_works_return_and_raise_in_their_order() -> None:
    def fails() -> str:
        raise ValueError("no")

    token = said.set("the caller's")
    try:
        with torch.no_grad():
            works: dict[str, Any] = {f"w{i}": lambda i=i: f"{i} {said.get()} {torch.is_grad_enabled()}" for i in range(3 * STREAMS)}
            found = side_by_side(CPU, works | {"wrong": fails})
    finally:
        said.reset(token)
    assert list(found) == [*works, "wrong"]
    assert [found[n] for n in works] == [f"{i} the caller's False" for i in range(3 * STREAMS)]
    assert isinstance(found["wrong"], ValueError)


@pytest.mark.parametrize("name", ["gptq", "claq", "billm", "spqr", "rtn"])
def test_artifacts_are_those_of_one_after_another(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = tiny_context("llama", tmp_path)
    inputs = calibrated(ctx, tmp_path, *KINDS)
    alone, summary = quantized(ctx, tmp_path / "alone", spec_of(name), inputs)
    asked: list[int] = []
    monkeypatch.setattr(sites, "fit", lambda worker, own: asked.append(len(own)) or True)
    together, same = quantized(ctx, tmp_path / "together", spec_of(name), inputs)
    assert asked == [4, 4], "inputs of each of two blocks"
    equal(alone, together)
    assert {k: v for k, v in same.items() if k != "peak_memory_bytes"} == {k: v for k, v in summary.items() if k != "peak_memory_bytes"}


def equal(one: Path, other: Path) -> None:
    files = sorted(p.name for p in (one / "payload").glob("*.safetensors"))
    assert files
    for name in files:
        a, b = (load_file(folder / "payload" / name) for folder in (one, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert (one / "payload" / "recipe.json").read_bytes() == (other / "payload" / "recipe.json").read_bytes()


def test_what_fails_says_so_in_its_linears_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = tiny_context("llama", tmp_path)
    inputs = calibrated(ctx, tmp_path, "hessian")
    monkeypatch.setattr(sites, "fit", lambda worker, own: True)

    def poisoned(worker: Any, names: list[str]) -> Any:
        if names[0].endswith("down_proj"):
            worker.weights.current[names[0]][0, 0] = torch.nan
        return make(worker, names)

    make = sites.make
    monkeypatch.setattr(sites, "make", poisoned)
    with pytest.raises(NumericalError, match=r"down_proj.*NaN"):
        quantized(ctx, tmp_path / "q", quantize_spec("gptq"), inputs)


def test_what_fails_beside_others_alone_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = tiny_context("llama", tmp_path)
    inputs = calibrated(ctx, tmp_path, "hessian")
    alone, _ = quantized(ctx, tmp_path / "alone", quantize_spec("gptq"), inputs)
    monkeypatch.setattr(sites, "fit", lambda worker, own: True)

    def fails(worker: Any, names: list[str]) -> Any:
        if names[0].endswith("o_proj"):
            raise RuntimeError("no luck")
        return make(worker, names)

    make, before = sites.make, len(ctx.notes)
    monkeypatch.setattr(sites, "make", fails)
    together, _ = quantized(ctx, tmp_path / "together", quantize_spec("gptq"), inputs)
    equal(alone, together)
    told = [n for n in ctx.notes[before:] if "no luck" in n]
    assert [n.partition(":")[0] for n in told] == [f"model.layers.{b}.self_attn.o_proj" for b in (0, 1)]


def worker(shapes: dict[str, tuple[int, int]], device: str = "cuda", seeded: bool = False) -> Any:
    """As much of a BlockQuantizer as is asked, on a device that need not be there."""
    current = {n: SimpleNamespace(shape=s, numel=lambda s=s: s[0] * s[1], device=torch.device(device)) for n, s in shapes.items()}
    methods = {n: SimpleNamespace(rounding=SimpleNamespace(uses_seed=seeded)) for n in shapes}
    return SimpleNamespace(weights=SimpleNamespace(current=current), methods=methods)


def test_where_they_are_rounded_side_by_side() -> None:
    shapes = {"q": (8, 4), "k": (4, 4), "o": (4, 8)}
    own = [["q", "k"], ["o"]]
    size = needed(worker(shapes), own)
    assert size > 4 * (8 * 4 + 4 * 4 + 4 * 8 + 4 * 4 + 8 * 8), "weights and Hessians at least"
    plenty = lambda device: 2 * size  # noqa: E731
    assert fit(worker(shapes), own, plenty)
    assert not fit(worker(shapes), own, lambda device: 2 * size - 2)
    assert not fit(worker(shapes), own[:1], plenty), "one input alone"
    assert not fit(worker(shapes), [], plenty)
    assert not fit(worker(shapes, "cpu"), own, plenty)
    assert not fit(worker(shapes, seeded=True), own, plenty)


@pytest.mark.gpu("stages")
@pytest.mark.parametrize("name", ["gptq", "claq", "billm"])
def test_on_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = replace(tiny_context("llama", tmp_path, device="cuda"), device=torch.device("cuda"))
    inputs = calibrated(ctx, tmp_path, *KINDS)
    together = [quantized(ctx, tmp_path / f"together{i}", spec_of(name), inputs)[0] for i in range(3)]
    monkeypatch.setattr(sites, "fit", lambda worker, own: False)
    alone, _ = quantized(ctx, tmp_path / "alone", spec_of(name), inputs)
    for artifact in together:
        equal(alone, artifact)
