"""NVML's answers in our units, and that a missing library or device is a reason and no failure."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from tests.workers.fake_devices import FakeNvml
from workers import environment, memory, nvml


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sees a device; nothing is remembered from before, or for later."""
    for remembered in (nvml.gpu, environment._fixed):
        monkeypatch.setattr(sys.modules[remembered.__module__], remembered.__name__, remembered.__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(nvml, "LEAST_S", 0.0)


def with_library(monkeypatch: pytest.MonkeyPatch, library: FakeNvml | None) -> None:
    monkeypatch.setitem(sys.modules, nvml.MODULE, library)


def test_a_record_tells_driver_and_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    with_library(monkeypatch, FakeNvml())
    found = environment.environment("cuda:0")
    assert (found["driver"], found["highest_clocks_mhz"]) == ("580.1", {"sm": 1980, "memory": 3201})
    assert environment.clocks_mhz("cuda:0") == {"sm": 1200, "memory": 2000}
    assert "nvml" not in found


def test_without_the_library_a_record_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with_library(monkeypatch, None)
    found = environment.environment("cuda:0")
    assert (found["driver"], found["highest_clocks_mhz"], environment.clocks_mhz("cuda:0")) == (None, {}, {})
    assert "pip install 'bitgrid[gpu]'" in found["nvml"]


def test_joules_are_those_between_start_and_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    with_library(monkeypatch, FakeNvml())
    meter = nvml.EnergyMeter(torch.device("cuda:0"))
    meter.start()
    meter.stop()
    assert (meter.joules, meter.reason) == (12.0, None)


@pytest.mark.parametrize(
    ("library", "device", "reason"),
    [
        (None, "cuda:0", "nvidia-ml-py is not installed"),
        (FakeNvml("nvmlInit"), "cuda:0", "nvmlInit: Not Supported"),
        (FakeNvml("nvmlDeviceGetTotalEnergyConsumption"), "cuda:0", "nvmlDeviceGetTotalEnergyConsumption: Not Supported"),
        (FakeNvml(divided=1), "cuda:0", "divided"),
        (FakeNvml(), "cpu", "this is a CPU"),
    ],
)
def test_energy_that_nobody_counts_has_a_reason(
    library: FakeNvml | None, device: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_library(monkeypatch, library)
    meter = nvml.EnergyMeter(torch.device(device))
    meter.start()
    meter.stop()
    assert meter.joules is None
    assert meter.reason is not None
    assert reason in meter.reason
    assert meter.least_s == 0


def test_a_device_that_cannot_be_divided_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    with_library(monkeypatch, FakeNvml("nvmlDeviceGetMigMode"))
    assert nvml.gpu("cuda:0").energy_j() > 0


def test_a_counter_that_ran_too_short_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with_library(monkeypatch, FakeNvml())
    monkeypatch.setattr(nvml, "LEAST_S", 60.0)
    meter = nvml.EnergyMeter(torch.device("cuda:0"))
    meter.start()
    meter.stop()
    assert meter.joules is None
    assert "counter of energy" in str(meter.reason)


def test_peaks_of_a_gpu_are_its_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Used, and held for use; a CPU has the first alone."""
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 8)
    peak = memory.PeakMemory(torch.device("cuda:0"))
    assert (peak.bytes(), peak.reserved(), reset) == (5, 8, [torch.device("cuda:0")])
    assert memory.PeakMemory(torch.device("cpu")).reserved() is None
