"""The clock of benchmarks on a GPU, before a device that is slow at first."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.on_gpu import clock
from bench.on_gpu.clock import LONG_US, MOST_CALLS, REPLAYS, WARM_US, Bench

START_US = 15.0
"""What a replay takes besides its calls."""


class Device:
    """Three times too slow until it has worked for a while, and every other time by half."""

    def __init__(self, call_us: float) -> None:
        self.call_us, self.busy, self.times = call_us, 0.0, 0
        self.captures: list[tuple[int, int]] = []

    def captured(self, work: Callable[[int], object], copies: int, calls: int) -> Callable[[], float]:
        self.captures.append((copies, calls))
        return lambda: START_US + self.call_us * calls

    def elapsed_us(self, replay: Callable[[], float]) -> float:
        self.times += 1
        took = replay() * (1.0 if self.busy >= WARM_US else 3.0) * (1.0 if self.times % 2 else 1.5)
        self.busy += took
        return took


@pytest.fixture
def bench() -> Bench:
    made = Bench(dry=True)
    made.dry = False
    return made


@pytest.mark.parametrize(("call_us", "copies"), [(1.0, 1), (4.0, 90), (33.0, 5), (70_000.0, 1)])
def test_neither_a_replays_start_nor_a_slow_device_counts(
    bench: Bench, call_us: float, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(call_us)
    monkeypatch.setattr(clock, "captured", device.captured)
    monkeypatch.setattr(clock, "elapsed_us", device.elapsed_us)
    took = bench.time(lambda i: None, copies)
    assert took is not None
    assert call_us <= took <= call_us * (1 + START_US / (LONG_US - START_US)) * (1 + 1e-9)
    # Each input as often as all others, so that none comes again early.
    assert all((given, calls % copies) == (copies, 0) and calls >= 8 for given, calls in device.captures)


def test_work_that_takes_no_time_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(0.0)
    monkeypatch.setattr(clock, "captured", device.captured)
    monkeypatch.setattr(clock, "elapsed_us", device.elapsed_us)
    bench.time(lambda i: None)
    assert MOST_CALLS <= device.captures[-1][1] <= MOST_CALLS * LONG_US


def test_the_first_call_is_not_timed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    took = iter([9e9, *[WARM_US] * 100])  # the first compiles
    monkeypatch.setattr(clock, "elapsed_us", lambda work: work())
    assert bench.once(lambda: next(took)) == WARM_US
    assert len(list(took)) == 100 - REPLAYS - 1
