"""ZeroQuant: rounding in groups, and what distillation teaches which block on which input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from quant import quantize_linear
from quant.methods.rtn import Rtn
from quant.methods.single import single_linear
from quant.methods.zeroquant import ZeroQuant
from quant.scheme import Granularity, WeightScheme
from quant.statistics import Statistics
from tests.quant.test_tuners import G8, ROW, norm_block, random


def nearest(w: Tensor, bits: int) -> Tensor:
    """The paper's rounding written out: groups are the last axis."""
    top = 2 ** (bits - 1) - 1
    step = w.abs().amax(-1, keepdim=True) / top
    return (w / step).round().clamp(-top - 1, top) * step


@pytest.mark.parametrize("scheme", [G8, ROW, WeightScheme(8, True), WeightScheme(4, granularity=Granularity.TENSOR)])
def test_without_distillation_it_stores_what_rtn_stores_on_the_symmetric_grid(scheme: WeightScheme) -> None:
    w = random(5, 16, dtype=torch.float32)
    got = ZeroQuant(iters=0).tune(single_linear(w, random(2, 4, 16), scheme)).tensors["weight"].tensor.pack()
    want = Rtn("q_sym").quantize(w, Statistics(), scheme).tensor.pack()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k]) and got[k].dtype is want[k].dtype for k in want)


def test_groups_are_rounded_symmetrically() -> None:
    w = random(5, 32, dtype=torch.float32)
    got = quantize_linear(w, method="zeroquant", bits=4, group_size=8, inputs=random(1, 4, 32), iters=0).dequantize()
    torch.testing.assert_close(got, nearest(w.view(5, 4, 8), 4).view(5, 32))


def test_distillation_is_adam_on_master_weights_with_rounding_passed_through() -> None:
    """Reference: the loop written out, in which the gradient of the rounded weight moves the weight itself, the largest of
    its row too."""
    w0, x = random(3, 8), random(4, 6, 8, seed=1) + 2 * random(4, 6, 1, seed=2)
    scheme = WeightScheme(2, scale_dtype="float32")
    w, mean, square = w0.clone(), torch.zeros_like(w0), torch.zeros_like(w0)
    losses = []
    for step in range(1, 21):
        error = x @ (nearest(w, 2) - w0).T
        gradient = 2 * torch.einsum("stn,stk->nk", error, x) / error.numel()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        w = w - 0.02 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        losses.append(float(error.square().mean()))
    tuned = ZeroQuant(iters=20, lr=0.02, checks=1).tune(single_linear(w0, x, scheme))
    assert tuned.iterate == "step 20"
    assert tuned.start == pytest.approx(losses[0], rel=1e-6)  # scales are stored in float32
    assert tuned.loss < 0.9 * tuned.start
    torch.testing.assert_close(tuned.changed()["weight.weight"].double(), nearest(w, 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("stream", ["quantized", "original"])
def test_the_teacher_is_the_unquantized_block_on_the_same_input(stream: str) -> None:
    blocks = norm_block()
    blocks.own_targets = blocks.forward({}, blocks.quantized)
    tuned = ZeroQuant(iters=10, lr=0.003, checks=2, stream=stream).tune(blocks)
    x = blocks.quantized if stream == "quantized" else blocks.inputs
    rounded = {
        f"{n}.weight": nearest(linear.weight.view(-1, 2 + (n == "down"), 8), 3).view(linear.weight.shape)
        for n, linear in blocks.linears.items()
    }
    for changed, loss in ((tuned.changed(), tuned.loss), (rounded, tuned.start)):
        assert loss == pytest.approx(float((blocks.forward(changed, x) - blocks.forward({}, x)).square().mean()), rel=1e-5)
    assert tuned.loss < tuned.start
    assert ZeroQuant(stream=stream).wants_own_targets is (stream == "quantized")


def test_what_is_trained_is_what_is_stored() -> None:
    """Scales of both stored types; one that float16 cannot hold; gradients pass unchanged."""
    for scale_dtype, size in (("float32", 1.0), ("float16", 1.0), ("float16", 1e-9)):
        blocks = single_linear(size * random(5, 16), random(1, 4, 16), WeightScheme(4, scale_dtype=scale_dtype))
        master = blocks.linears["weight"].weight.clone().requires_grad_()
        soft = ZeroQuant()._soft(master, blocks, "weight")
        stored: Any = ZeroQuant(iters=0).tune(blocks).tensors["weight"]
        assert torch.equal(soft.detach().float(), stored.tensor.dequantize())
        assert bool(stored.notes) is (size < 1)
        soft.backward(random(5, 16, seed=3))
        assert master.grad is not None
        assert torch.equal(master.grad, random(5, 16, seed=3))


def test_training_ends_where_weights_are_not_finite() -> None:
    blocks = norm_block()
    plain = blocks.forward

    def steep(changed: Mapping[str, Tensor], x: Tensor) -> Tensor:
        out = plain(changed, x)
        if out.requires_grad:
            out.register_hook(lambda g: g * float("inf"))
        return out

    blocks.forward = steep
    tuned = ZeroQuant(iters=2).tune(blocks)
    assert tuned.notes == ["weights were not finite after step 1: training ended there"]
    assert tuned.iterate == "start"


def test_wrong_parameters_and_missing_inputs_say_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"checks=0 is not .* from 1"):
        ZeroQuant(checks=0)
    with pytest.raises(ValueError, match=r"method zeroquant needs data \(samples\); give inputs"):
        quantize_linear(random(5, 16), method="zeroquant", bits=4)
