"""What a measurement makes of its times: how often it repeats, and medians, intervals and speeds by other libraries and by hand."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch
from scipy.stats import binom

from tests.workers.fake_devices import FakeNvml
from tests.workers.stage_runs import tiny_context
from workers import nvml
from workers.measure import FEWEST, MOST, _repeat, _speeds, interval
from workers.specs import Workload


def repeated(monkeypatch: pytest.MonkeyPatch, *times: list[float], longest: float = 1e9) -> int:
    """How many generations were timed, which take these times by turns."""
    monkeypatch.setattr("workers.measure.LONGEST_S", longest)
    each = itertools.cycle(times)
    return len(_repeat(lambda: next(each), nvml.EnergyMeter(torch.device("cpu"))))


@pytest.mark.parametrize(("low", "high", "runs"), [(1.0, 1.0, FEWEST), (0.951, 1.049, FEWEST), (0.945, 1.055, MOST)])
def test_generations_are_timed_until_their_medians_are_known(low: float, high: float, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 5 % of them, half of the interval from one value to the other: of the prompt, and of steps, however long the other takes. And
    no more often than MOST, or once the time is up."""
    of_prompts, of_steps = ([[low, 1.0], [high, 1.0]], [[1.0, low], [1.0, high]])
    for times in (of_prompts, of_steps, [[1.0, low / 100, low / 100], [1.0, high / 100, high / 100]]):
        assert repeated(monkeypatch, *times) == runs
        assert repeated(monkeypatch, *times, longest=0.0) == FEWEST
    # One step that takes longer than the others, in turn, moves no median.
    assert repeated(monkeypatch, [low, 1.0, 1.0, 5.0], [high, 5.0, 1.0, 1.0]) == runs


def test_generations_are_timed_until_energy_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which moves in steps: not before the meter has run as long as it should, though medians are known."""
    monkeypatch.setattr(nvml, "gpu", lambda device: nvml.Gpu(FakeNvml(), "1234"))
    monkeypatch.setattr(nvml, "LEAST_S", 0.03)
    meter = nvml.EnergyMeter(torch.device("cpu"))

    def run() -> list[float]:
        time.sleep(0.001)
        return [1.0, 1.0]

    _repeat(run, meter)
    assert (meter.joules, meter.reason) == (12.0, None)


def test_tokens_per_second_count_all_steps(tmp_path: Path) -> None:
    """One of four takes longer, as where keys of a cache age: 2 x 4 tokens in 8 s."""
    found = _speeds([[1.0, 1.0, 1.0, 5.0, 1.0]] * FEWEST, Workload(batch=2, prompt=6, tokens=4), tiny_context("llama", tmp_path))
    assert (found["decode_p50_s"], found["decode_tokens_per_s"], found["prefill_tokens_per_s"]) == (1.0, 1.0, 12.0)


@pytest.mark.parametrize(("slow", "noted"), [(1.0, False), (1.09, False), (1.3, True)])
def test_times_that_vary_are_noted(slow: float, noted: bool, tmp_path: Path) -> None:
    """Half of the interval from 1 to 1.09 is below 5 % of the median between them, of 1 to 1.3 above."""
    context = tiny_context("llama", tmp_path)
    _speeds([[1.0, 1.0], [slow, slow]] * 4, Workload(batch=1, prompt=6, tokens=1), context)
    assert context.notes == (["times vary: after 8 generations a median is known to no better than 5%"] if noted else [])


def test_the_interval_is_of_the_median_beside_it(tmp_path: Path) -> None:
    """Of all 14 steps together the median is 1, which no generation's is."""
    runs = [[1.0, 1.0, 3.0], *[[1.0, 1.0, 2.0]] * 6]
    found = _speeds(runs, Workload(batch=2, prompt=6, tokens=2), tiny_context("llama", tmp_path))
    assert (found["decode_low_s"], found["decode_p50_s"], found["decode_high_s"]) == (1.5, 1.5, 2.0)


@pytest.mark.parametrize("count", range(FEWEST, 101))
def test_the_interval_covers_a_median_95_times_in_100_and_no_narrower_one_does(count: int) -> None:
    values = [float((7 * i) % 101) for i in range(count)]  # each once, in no order
    at = [sorted(values).index(end) for end in interval(values)]
    assert at[0] + at[1] == count - 1

    def covers(first: int, last: int) -> float:
        # The median lies between two order statistics: at least first + 1 and at most `last` of `count` values are below it.
        return float(binom.cdf(last, count, 0.5) - binom.cdf(first, count, 0.5))

    assert covers(*at) >= 0.95 > covers(at[0] + 1, at[1] - 1)
