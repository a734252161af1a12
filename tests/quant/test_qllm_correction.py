"""QLLM's low-rank correction: the quantizer it lives in, the best iterate, schedules and switches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant import quantize_linear
from quant.adam import Adam
from quant.methods.qllm_correction import QllmCorrection, _Corrected
from quant.methods.tuner import blocks_loss
from quant.scheme import ActivationScheme, WeightScheme
from tests.quant.test_tuners import linear_blocks, norm_block, random

W3 = WeightScheme(3, scale_dtype="float32")
FAST = QllmCorrection(epochs=6, lr=0.02)


def test_the_start_is_rounding_to_nearest() -> None:
    w, x = random(6, 16).float(), random(4, 10, 16, seed=1).float()
    start = quantize_linear(w, method="qllm_correction", bits=3, inputs=x, epochs=0)
    plain = quantize_linear(w, method="rtn", bits=3, grid="omni")
    assert torch.equal(start.dequantize(), plain.dequantize())


def test_the_correction_is_of_low_rank_inside_the_quantizer() -> None:
    blocks = linear_blocks(W3)
    (linear,) = blocks.linears.values()
    part = _Corrected("w", linear, QllmCorrection(rank=2, alpha=3.0), torch.Generator().manual_seed(0))
    assert part.a.shape == (2, 16)
    assert float(part.a.detach().abs().max()) <= 1 / 4
    with torch.no_grad():
        part.b.copy_(random(5, 2, seed=3).float())
        corrected = linear.weight + 1.5 * (part.b @ part.a)
        want = quantize_linear(corrected, method="rtn", bits=3, grid="omni").dequantize()
        assert torch.equal(part.soft(), want)
        assert torch.equal(part.hard().tensor.dequantize(), want)
    part.soft().sum().backward()  # type: ignore[no-untyped-call]
    assert part.a.grad is not None
    assert float(part.a.grad.abs().sum()) > 0


@pytest.mark.parametrize("activation", [None, ActivationScheme(4, symmetric=False)])
@pytest.mark.parametrize("norms", [True, False])
def test_the_best_iterate_is_kept_and_is_better_than_the_start(activation: ActivationScheme | None, norms: bool) -> None:
    blocks = norm_block(W3, activation)
    tuned = replace(FAST, norms=norms).tune(blocks)
    assert tuned.loss == blocks_loss(blocks, tuned.changed())
    assert tuned.loss < tuned.start
    assert set(tuned.parameters) == ({"norm.weight", "norm.bias"} if norms else set())


@pytest.mark.parametrize("lr", [1e-9, 1e3])
def test_steps_that_do_not_help_leave_the_start(lr: float) -> None:
    blocks = norm_block(W3)
    tuned = QllmCorrection(epochs=2, lr=lr, norms=False).tune(blocks)
    assert tuned.loss <= tuned.start
    assert tuned.loss == blocks_loss(blocks, tuned.changed())
    if tuned.iterate == "start":
        assert not tuned.parameters


def test_a_remainder_of_blocks_is_tuned_unless_the_reference_is_followed() -> None:
    rest = replace(norm_block(W3), count=3)
    assert FAST.tune(rest).iterate != "start"
    left = replace(FAST, remainder=False).tune(rest)
    assert left.iterate == "start"
    assert left.notes == ["rounded only: 3 of 4 blocks are left, and remainder=false"]
    assert replace(FAST, remainder=False).tune(replace(rest, count=4)).iterate != "start"


def test_the_same_seed_gives_the_same_codes() -> None:
    first, again, other = (FAST.tune(replace(norm_block(W3), seed=s)) for s in (1, 1, 2))
    same = [
        torch.equal(a.tensor.dequantize(), b.tensor.dequantize())
        for a, b in zip(first.tensors.values(), again.tensors.values(), strict=True)
    ]
    assert all(same)
    assert first.loss != other.loss


def test_the_learning_rate_falls_linearly() -> None:
    p, q = (torch.ones(3, requires_grad=True) for _ in range(2))
    ours = Adam([([p], 0.1)])
    theirs = torch.optim.AdamW([q], lr=0.1, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(theirs, 1.0, 0.0, total_iters=5)
    for step in range(5):
        for x, optimizer in ((p, ours), (q, theirs)):
            optimizer.zero_grad()
            (x * torch.tensor([1.0, -2.0, 3.0]) * x).sum().backward()  # type: ignore[no-untyped-call]
        ours.step(1 - step / 5)
        theirs.step()
        schedule.step()
    assert torch.allclose(p, q, atol=1e-6)


@pytest.mark.parametrize("params", [{"rank": 0}, {"blocks": 0}, {"epochs": -1}, {"lr": 0.0}, {"alpha": 0.0}])
def test_wrong_parameters_are_refused(params: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(params))):
        QllmCorrection(**params)  # type: ignore[arg-type]
