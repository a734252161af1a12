"""The clock of benchmarks on a GPU, before a device whose clock rises while it works."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from bench.on_gpu import clock
from bench.on_gpu.clock import LONG_US, WARM_US, Bench

START_US = 15.0
"""What a replay takes besides its calls."""


class Device:
    def __init__(self, call_us: float) -> None:
        self.call_us, self.busy = call_us, 0.0

    def captured(self, work: Callable[[int], object], copies: int, calls: int) -> Callable[[], float]:
        for i in range(calls):
            work(i % copies)
        return lambda: START_US + self.call_us * calls

    def elapsed_us(self, replay: Callable[[], float]) -> float:
        took = replay() * (1.0 if self.busy >= WARM_US else 3.0)
        self.busy += took
        return took


@pytest.mark.parametrize(("call_us", "copies"), [(1.0, 1), (4.0, 90), (33.0, 5), (70_000.0, 1)])
def test_neither_a_replays_start_nor_a_slow_clock_counts(call_us: float, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device, bench, turns = Device(call_us), Bench(dry=True), Counter[int]()
    bench.dry = False
    monkeypatch.setattr(clock, "captured", device.captured)
    monkeypatch.setattr(clock, "elapsed_us", device.elapsed_us)
    took = bench.time(lambda i: turns.update([i]), copies)
    # What says how many calls take LONG_US is up to three times too slow.
    assert took is not None
    assert call_us <= took <= call_us * (1 + 3 * START_US / LONG_US)
    assert set(turns) == set(range(copies))
