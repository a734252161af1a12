"""Work beside the forward, on a stream of its own."""

from __future__ import annotations

import pytest
import torch

from workers import aside


def test_a_device_has_one_stream_however_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what is found aside would not be waited for by those who name the device otherwise."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(aside, "_numbered", lambda number: number)
    assert [aside._stream(torch.device(name)) for name in ("cuda", "cuda:1", "cuda:0")] == [1, 1, 0]


def test_a_cpu_does_it_at_once() -> None:
    device, x = torch.device("cpu"), torch.ones(3)
    done = aside.moment(device)
    with aside.aside(device, x, after=done):
        y = x.sum()
    aside.join(device)
    assert done is None
    assert aside.number(y) == 3.0


@pytest.mark.gpu("stages")
def test_it_waits_for_what_came_before_and_is_waited_for() -> None:
    """Long products in front and behind; what is read aside is given up before it is over."""
    device = torch.device("cuda")
    x, found = torch.full((4096, 4096), 1.0 / 4096, device=device), []
    y = x
    for _ in range(20):
        y = y @ x  # every number stays 1 / 4096
        z = y * 4096
        with aside.aside(device, z):
            found.append((z @ z).sum() / 4096)
        del z
        y.mul_(1.0)
    kept = torch.empty_like(y)
    with aside.aside(device):
        kept.copy_(y)
    aside.join(device)
    y.zero_()
    assert [aside.number(f) for f in found] == [pytest.approx(4096.0**2, rel=1e-5)] * 20
    assert float(kept.sum()) == pytest.approx(4096.0, rel=1e-5)
