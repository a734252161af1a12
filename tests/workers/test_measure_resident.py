"""What a measurement times is the variant alone, whole and on its device, however stages of the sweep are run."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.scheme import KVScheme
from tests.workers.stage_runs import quantize_spec, quantized, tiny_context
from workers import comparison, measure
from workers.errors import InputError, NumericalError
from workers.generation import Generation, generate
from workers.machine import cpu_model
from workers.nvml import EnergyMeter
from workers.rebuild import rebuild_packed
from workers.residency import Residency
from workers.specs import MeasureSpec, ModelSpec, Workload
from workers.stream import BlockModel

MODEL = ModelSpec("model")
SPEC = MeasureSpec(MODEL, Workload(batch=2, prompt=6, tokens=3, threads=1), cpu_model())


@pytest.fixture(autouse=True)
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few as there may be."""
    monkeypatch.setattr("workers.measure.LONGEST_S", 0.0)


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_is_timed_whole_where_other_stages_stream_it(packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a stage ran out of memory: hints are no part of the key under which the times are kept."""
    read, tensors_of = [], BlockModel._tensors_of
    monkeypatch.setattr(BlockModel, "_tensors_of", lambda self, i: read.append(i) or tensors_of(self, i))
    artifact, _ = quantized(tiny_context("llama", tmp_path), tmp_path / "q", quantize_spec(), {})
    inputs = {"quantize": artifact} if packed else {}
    found, contexts = [], [tiny_context("llama", tmp_path, streamed=s) for s in (False, True)]
    for context in contexts:
        read.clear()
        found.append(measure.run_measure(SPEC, inputs, tmp_path, context, Residency()))
    for name in ("weights_bytes", "packed_bytes", "check_error", "backends", "products"):
        assert found[0][name] == found[1][name], name
    streamed = [n for n in contexts[1].notes if n.startswith("streamed block by block")]
    assert len(streamed) == packed  # the simulated model, with which packed weights are compared
    assert sorted(read) == sorted([0, 1] * (1 + packed))  # in one pass for all tokens


def test_a_streamed_model_without_a_cache_is_compared_token_by_token(tmp_path: Path) -> None:
    artifact, _ = quantized(tiny_context("rwkv", tmp_path), tmp_path / "q", quantize_spec(), {})
    errors, contexts = [], [tiny_context("rwkv", tmp_path, streamed=s) for s in (False, True)]
    alone = replace(SPEC, workload=replace(SPEC.workload, batch=1))
    for context in contexts:
        errors.append(measure.run_measure(alone, {"quantize": artifact}, tmp_path, context, Residency())["check_error"])
    assert errors[0] == errors[1]
    assert [sum("read once for every token" in n for n in c.notes) for c in contexts] == [0, 1]


@pytest.mark.parametrize("quantized_weights", [False, True])
def test_dense_weights_that_must_be_streamed_are_not_timed(quantized_weights: bool, tmp_path: Path) -> None:
    artifact, _ = quantized(tiny_context("llama", tmp_path), tmp_path / "q", quantize_spec(), {})
    context = tiny_context("llama", tmp_path, memory_bytes=60_000)
    spec = replace(SPEC, workload=replace(SPEC.workload, backend="dense"))
    with pytest.raises(InputError, match=r"do not fit hints.memory_bytes=60000.*would be the disk's"):
        measure.run_measure(spec, {"quantize": artifact} if quantized_weights else {}, tmp_path, context, Residency())


@pytest.mark.parametrize("kv", [None, KVScheme(4)])
def test_the_unquantized_model_is_timed_alone(kv: KVScheme | None, tmp_path: Path) -> None:
    """Variants that were evaluated before would count as its memory."""
    context, residency = tiny_context("gemma", tmp_path), Residency()
    artifact, _ = quantized(context, tmp_path / "q", quantize_spec(), {})
    model = residency.unquantized(context, MODEL)
    residency.variant(context, MODEL, artifact)
    measure.run_measure(replace(SPEC, kv=kv), {}, tmp_path, context, residency)
    assert residency.holds() == ["model"]
    assert residency.unquantized(context, MODEL) is model


def test_nothing_of_checking_is_in_memory_while_it_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither logits nor the simulated model."""
    context, residency = tiny_context("llama", tmp_path), Residency()
    artifact, _ = quantized(context, tmp_path / "q", quantize_spec(), {})
    kept: list[int] = []
    timed = measure._repeat

    def repeat(run: Any, meter: Any) -> Any:
        gc.collect()
        kept.append(sum(type(x) is Generation for x in gc.get_objects()) + len(residency.holds()))
        return timed(run, meter)

    lengths: list[int] = []

    def generated(*args: Any, **kwargs: Any) -> Generation:
        made = generate(*args, **kwargs)
        lengths.append(made.logits.shape[1])
        return made

    monkeypatch.setattr(measure, "_repeat", repeat)
    for module in (comparison, measure):
        monkeypatch.setattr(module, "generate", generated)
    measure.run_measure(SPEC, {"quantize": artifact}, tmp_path, context, residency)
    assert kept == [0]
    assert lengths[:2] == [SPEC.workload.tokens + 1] * 2
    assert set(lengths[2:]) == {1}


def test_a_packed_model_that_departs_from_the_evaluated_one_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def built(*given: Any) -> Any:
        model, packed = rebuild_packed(*given)
        with torch.no_grad():
            model.model.norm.weight.mul_(1.01)
        return model, packed

    context = tiny_context("llama", tmp_path)
    artifact, _ = quantized(context, tmp_path / "q", quantize_spec(), {})
    monkeypatch.setattr(measure, "rebuild_packed", built)
    monkeypatch.setattr(measure, "_repeat", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(NumericalError, match=r"differ from the simulated ones by 0\.01 of their norm"):
        measure.run_measure(SPEC, {"quantize": artifact}, tmp_path, context, Residency())


def test_threads_are_those_of_the_workload_and_clocks_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "clocks_mhz", lambda device: {device: 7.0})
    before, seen, timed = torch.get_num_threads(), list[int](), measure._repeat
    monkeypatch.setattr(measure, "_repeat", lambda *given: seen.append(torch.get_num_threads()) or timed(*given))
    for threads in (1, 2):
        spec = replace(SPEC, workload=replace(SPEC.workload, threads=threads))
        found = measure.run_measure(spec, {}, tmp_path, tiny_context("llama", tmp_path), Residency())
        assert (found["threads"], found["clocks_mhz"]) == (threads, {"cpu": 7.0})
    assert seen == [1, 2]
    assert torch.get_num_threads() == before


def test_the_first_generation_is_not_counted() -> None:
    """It compiles, allocates and reads what later ones find."""
    times = iter([[9.0, 9.0], *[[1.0, 1.0]] * measure.FEWEST])
    assert measure._repeat(lambda: next(times), EnergyMeter(torch.device("cpu"))) == [[1.0, 1.0]] * measure.FEWEST


def test_the_last_logits_are_those_of_all() -> None:
    class Table:
        def prompt(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.step(tokens)

        def step(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.randn(11, 11, generator=torch.Generator().manual_seed(0))[tokens[:, -1]]

    prompt = torch.tensor([[1, 2], [3, 4]])
    every, last = generate(Table(), prompt, 5), generate(Table(), prompt, 5, last_only=True)
    assert torch.equal(last.tokens, every.tokens)
    assert torch.equal(last.logits, every.logits[:, -1:])
