"""The GPU that a request names: Triton and events go by a thread's current device, not by where tensors are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.workers.test_run_stage import EVALUATE, FakeRunners, outcomes, request
from workers import environment, run_stage
from workers.errors import InputError
from workers.process import pick_device
from workers.request import Hints


def test_a_stage_has_its_gpu_as_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, seen = ["cuda:0"], []

    @contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        now.append(str(device))
        yield
        now.pop()

    monkeypatch.setattr(run_stage, "pick_device", lambda hints: torch.device(hints.device))
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(environment, "_fixed", lambda device: {})
    fake = FakeRunners(act=lambda: seen.append(now[-1]))
    for device in ("cuda:1", "cpu"):
        outcomes(request(tmp_path / device, {"a": EVALUATE}, device=device), fake)
    assert seen == ["cuda:1", "cuda:0"]
    assert now == ["cuda:0"]


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(Hints(device="cuda:1")) == torch.device("cuda:1")
    with pytest.raises(InputError, match=r"hints\.device=cuda:2, but torch sees cuda:0, cuda:1 here; use one of these, or auto"):
        pick_device(Hints(device="cuda:2"))
