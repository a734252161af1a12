"""What a worker keeps of calibrate artifacts: results do not change, further stages factor nothing, the budget holds, and memory that a
stage needs is given back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from quant import factors
from quant.kernels.row_sums import eager
from quant.scheme import Granularity, WeightScheme
from tests.workers.stage_runs import calibrated, quantize_spec, quantized, tiny_context
from tests.workers.test_run_stage import EVALUATE, FakeRunners, outcomes, request
from workers import feeding, kept, memory
from workers.feeding import FedStatistics
from workers.kept import HOST_SHARE, Kept, matrix_digest, row_sums
from workers.memory import PeakMemory
from workers.rebuild import load_model
from workers.request import ErrorClass
from workers.specs import ModelSpec

CPU = torch.device("cpu")
NONE = {**asdict(kept.Counts()), "bytes": 0, "host_bytes": 0}
Stage = tuple[int, list[tuple[str, int]]]
"""Budget, and what is asked for: name and bytes."""


def ample(budget: int | None = None) -> Kept:
    found = Kept(free=lambda device: 2**30)
    found.begin(CPU, budget)
    return found


def entry(holder: Kept, name: str, size: int, loaded: list[str] | None = None) -> None:
    def read() -> Mapping[str, Tensor]:
        if loaded is not None:
            loaded.append(name)
        return {"x": torch.zeros(size, dtype=torch.uint8)}

    holder.statistics(name, read)


# --- results and counts ---------------------------------------------------------------------------------------------


def stored(artifact: Path) -> dict[str, str]:
    """Digest of every file but the table of times."""
    files = json.loads((artifact / "record.json").read_text())["files"]
    return {name: f["sha256"] for name, f in files.items() if name != "layers.parquet"}


@pytest.mark.parametrize("rounding", ["gptq", "claq", "spqr", "slim_llm"])
def test_a_further_stage_reads_all_and_gives_the_same_bits(rounding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_context("llama", tmp_path)
    more = {"slim_llm": ["samples"], "claq": ["absmax"]}
    inputs = calibrated(plain, tmp_path, "hessian", *more.get(rounding, []))
    transforms = ["smoothquant"] if rounding == "claq" else []  # whose scales are the same for all bits
    grouped = rounding in ("spqr", "slim_llm")
    parts = {"granularity": Granularity.GROUP, "group_size": 8} if grouped else {}
    pattern, sites = ("*.1.self_attn.o_proj", 1) if rounding == "slim_llm" else ("*.1.self_attn.*", 2)  # its searches are long
    first, further = (quantize_spec(rounding, *transforms, weight=WeightScheme(bits, **parts), pattern=pattern) for bits in (2, 3))
    want, _ = quantized(plain, tmp_path / "plain", further, inputs)

    made: list[int] = []
    triangle = factors._triangle
    monkeypatch.setattr(factors, "_triangle", lambda h: made.append(len(h)) or triangle(h))
    holder = ample()
    context = replace(plain, kept=holder)
    quantized(context, tmp_path / "first", first, inputs)
    each = 2 if rounding == "slim_llm" else 1  # the bits are chosen with another damping
    blocks = 2
    files = len(inputs) * blocks
    assert len(made) == each * sites
    assert holder.told() == {
        **NONE, "statistics_loaded": files, "factors_made": each * sites, "bytes": holder.bytes
    }  # fmt: skip

    holder.begin(CPU, None)
    got, _ = quantized(context, tmp_path / "got", further, inputs)
    assert len(made) == each * sites, "nothing more was factored"
    assert holder.told() == {
        **NONE, "statistics_read": files, "factors_read": each * sites, "bytes": holder.bytes
    }  # fmt: skip
    assert stored(got) == stored(want)
    for folder in inputs.values():
        for path in (folder / "payload").glob("*.safetensors"):
            held = holder.statistics(feeding.payload_digest(folder, path.name), dict)
            assert all(torch.equal(held[name], t) for name, t in load_file(path).items()), "nobody wrote into what is kept"


def test_statistics_of_quantized_blocks_are_not_kept(tmp_path: Path) -> None:
    context = replace(tiny_context("llama", tmp_path), kept=ample())
    quantized(context, tmp_path / "q", quantize_spec("gptq", propagation="quantized"), {})
    assert context.kept is not None
    assert (context.kept.told(), context.kept.bytes) == ({}, 0)


def test_a_budget_of_zero_keeps_nothing_and_counts_all_the_same(tmp_path: Path) -> None:
    context = tiny_context("llama", tmp_path)
    inputs = calibrated(context, tmp_path, "hessian")
    off = replace(context, kept=ample(0))
    quantized(off, tmp_path / "q", quantize_spec("gptq"), inputs)
    assert off.kept is not None
    assert off.kept.told() == {**NONE, "statistics_loaded": 2, "factors_made": 8}


def test_another_matrix_damping_site_or_file_is_another_factor() -> None:
    holder, h = ample(), torch.eye(3)
    results = iter(range(100))

    def ask(file: str = "f", site: str = "s", form: str = "inverse", matrix: Tensor = h, damp: float = 0.01) -> float:
        return holder.factor((file, site), form, matrix, damp, lambda: (torch.zeros(3, 3), float(next(results))))[1]

    others: list[Callable[[], float]] = [
        ask,
        lambda: ask(file="g"),
        lambda: ask(site="t"),
        lambda: ask(form="lower"),
        lambda: ask(matrix=2 * h),
        lambda: ask(matrix=h.double()),
        lambda: ask(damp=0.1),
    ]
    first = [other() for other in others]
    assert first == list(range(len(others)))
    assert [other() for other in others] == first


def summed(h: Tensor) -> bytes:
    return row_sums(h).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("told", [matrix_digest, summed])
def test_the_digest_of_a_matrix_tells_one_bit_and_one_order_from_another(
    told: Callable[[Tensor], bytes], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = torch.randn(9, 9, generator=torch.Generator().manual_seed(0), dtype=dtype)
    h = h + h.T
    order = torch.tensor([1, 0, *range(2, 9)])
    whole = told(h)
    assert told(h.T.contiguous().T) == whole, "strides do not matter"
    assert told(h[order][:, order]) != whole
    for i in (0, 8):
        bits = h.clone().view(torch.int32)
        bits[i, i] ^= 1
        assert told(bits.view(dtype)) != whole
    monkeypatch.setattr(eager, "AT_ONCE", 20)
    assert told(h) == whole, "nor does how many rows are read at a time"


# --- the budget -----------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 12)), max_size=8)), max_size=6))
def test_the_budget_holds_and_the_least_recently_used_goes_first(stages: list[Stage]) -> None:
    """Against a list of (name, bytes, stage), least recently used first."""
    holder, expected = Kept(free=lambda device: 0), list[tuple[str, int, int]]()
    for number, (budget, asked) in enumerate(stages):
        holder.begin(CPU, budget)
        while sum(size for _, size, _ in expected) > budget:
            expected.pop(0)
        for name, size in asked:
            loaded: list[str] = []
            entry(holder, name, size, loaded)
            known = [e for e in expected if e[0] == name]
            assert loaded == ([] if known else [name])
            if known:
                expected.remove(known[0])
                expected.append((name, known[0][1], number))
            elif size + sum(s for _, s, used in expected if used == number) <= budget:
                while size + sum(s for _, s, _ in expected) > budget:
                    assert expected.pop(0)[2] < number
                expected.append((name, size, number))
            assert holder.bytes == sum(s for _, s, _ in expected) <= budget


def test_a_walk_over_more_than_fits_reads_a_part_again_every_time() -> None:
    """Where the oldest made room for the newest, each would be gone when its turn comes: nothing would ever be read."""
    holder = ample(30)
    for stage in range(3):
        holder.begin(CPU, 30)
        for name in "abcde":
            entry(holder, name, 10)
        assert holder.counts.statistics_read == (3 if stage else 0)


def test_without_a_given_budget_it_is_a_share_of_what_is_free() -> None:
    total, others = 1000, [0]
    holder = Kept(free=lambda device: total - others[0] - holder.bytes)
    holder.begin(CPU, None)
    for name in "abc":
        entry(holder, name, 100)
    assert holder.bytes == 200 <= total // HOST_SHARE
    others[0] = 400
    holder.begin(CPU, None)
    assert holder.bytes == 100 <= (total - 400) // HOST_SHARE


# --- memory that stages need ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/job/step", {"memory.max": "1000", "memory.current": "400", "memory.stat": "anon 320\nactive_file 50\ninactive_file 30"}),
        (
            "5:devices:/\n4:cpu,memory:/job/step",
            {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "400", "memory.stat": "active_file 1\ntotal_active_file 80"},
        ),
        ("0::/", {"memory.max": "1000", "memory.current": "320", "memory.stat": "anon 320"}),
    ],
    ids=["v2", "v1", "container"],
)
def test_a_job_or_container_has_no_more_free_than_it_is_given(
    own: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's own figure would have a worker keep what ends it."""
    limited = tmp_path / ("memory" if "cpu" in own else "") / ("job" if "job" in own else "")
    (limited / "step").mkdir(parents=True)
    (limited / "step" / "memory.max").write_text("max\n")
    for name, text in files.items():
        (limited / name).write_text(text + "\n")
    (tmp_path / "own").write_text(own + "\n")
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN", tmp_path / "own")
    assert memory.free_bytes(CPU) == 680
    monkeypatch.setattr(memory, "OWN", tmp_path / "none")
    assert memory.free_bytes(CPU) > 680


def test_what_is_kept_makes_room_for_waiting_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    total = 1000
    holder = Kept(free=lambda device: total - holder.bytes)
    holder.begin(CPU, total)
    for name in "abcd":
        entry(holder, name, 200)
    monkeypatch.setattr(feeding, "free_bytes", holder._free)
    monkeypatch.setattr(feeding, "waiting_bytes", lambda *_: 300)

    class Model:
        structure = None

    source = FedStatistics(Model(), [], [torch.zeros(1, 1, 1)], frozenset({"hessian"}), 0, [], None, holder)  # type: ignore[arg-type]
    assert source.can_pause(static=False)
    assert (holder.bytes, source.notes) == (400, []), "no more than was needed, and no fallback"


def test_what_is_kept_makes_room_for_a_model(tmp_path: Path) -> None:
    size = sum(p.numel() * p.element_size() for p in load_model(tiny_context("llama", tmp_path), ModelSpec("model")).parameters())
    total = 3 * size
    holder = Kept(free=lambda device: total - holder.bytes)
    holder.begin(CPU, total)
    for name in "ab":
        entry(holder, name, size)
    load_model(replace(tiny_context("llama", tmp_path), kept=holder), ModelSpec("model"))
    assert holder.bytes == size, "the weights, and as much again to run"


def test_a_stage_that_lacks_memory_runs_again_without_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_process", ample(100))
    held: list[int] = []

    def act() -> None:
        entry(kept.process_kept(), "a", 60)
        held.append(kept.process_kept().bytes)
        if held[-1]:
            raise MemoryError

    fake = FakeRunners(act=act)
    record = outcomes(request(tmp_path, {"e": EVALUATE}, kept_bytes=100), fake)["e"].record
    assert held == [60, 0], "nor is anything kept anew, which would take the memory again"
    assert record is not None
    assert any("60 bytes that the worker kept" in note for note in record["notes"])

    fake = FakeRunners(raises={"f": MemoryError()})
    failure = outcomes(request(tmp_path, {"f": EVALUATE}), fake)["f"].failure
    assert failure is not None
    assert failure.error_class is ErrorClass.MEMORY
    assert fake.calls == ["f"], "there was nothing to give back"


def test_a_record_tells_what_its_stage_read_and_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_process", None)
    fake = FakeRunners(act=lambda: entry(kept.process_kept(), "a", 60))
    found = [outcomes(request(tmp_path, {key: EVALUATE}, kept_bytes=100), fake)[key].record for key in ("e", "f")]
    assert [r and r["kept"]["statistics_read"] for r in found] == [0, 1]
    assert [r and r["kept"]["bytes"] for r in found] == [60, 60]
    silent = outcomes(request(tmp_path, {"g": EVALUATE}), FakeRunners())["g"].record
    assert silent is not None
    assert "kept" not in silent


class Gauge:
    """A device's memory: what tensors take now, and the most since the last reset."""

    counts_tensors = True

    def __init__(self) -> None:
        self.now = self.most = 0

    def use(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)

    def peak(self) -> int:
        return self.most

    def reset(self) -> None:
        self.most = self.now


def test_the_peak_of_a_stage_leaves_out_what_is_kept() -> None:
    gauge, holder = Gauge(), ample(1000)

    def keep(name: str, size: int) -> None:
        gauge.use(size)
        entry(holder, name, size)

    def give_back(count: int) -> None:
        with holder.changing():
            holder._near.take("before")
            gauge.use(-count)

    keep("before", 100)
    holder.begin(CPU, 1000)
    peak = PeakMemory(CPU, holder, gauge)
    gauge.use(50)
    gauge.use(-50)
    assert peak.bytes() == 50
    keep("made", 70)
    assert peak.bytes() == 70, "while it was being made it was the stage's"
    gauge.use(60)
    gauge.use(-60)
    assert peak.bytes() == 70
    give_back(100)
    gauge.use(75)
    assert peak.bytes() == 75
