"""SliM-LLM+: SliM-LLM's widths, learned ranges, 1-bit groups with their mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quant.methods.single import single_linear
from quant.methods.slim_llm import Allocation, SlimLlm
from quant.methods.slim_llm_plus import MixedClipping, SlimLlmPlus
from quant.methods.tuner import TunableLinear, TuningBlocks, blocks_loss
from quant.scheme import Granularity, WeightScheme
from quant.statistics import collect

G8 = WeightScheme(2, granularity=Granularity.GROUP, group_size=8)
EXACT = WeightScheme(2, False, Granularity.GROUP, 8, "float32")
WIDTHS = (1, 2, 3, 2, 1, 3)
GIVEN = Allocation(WIDTHS, torch.empty(0), torch.empty(0), 0.01, ["as given"], {"group_bits": list(WIDTHS)})


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def blocks(scheme: WeightScheme = G8) -> TuningBlocks:
    x = random(6, 20, 48, seed=1) * torch.linspace(0.1, 3, 48) + random(6, 20, 1, seed=2)
    return single_linear(random(10, 48), x, scheme, statistics=collect(x, frozenset({"hessian", "samples"})))


def test_the_widths_are_slim_llms() -> None:
    b = blocks()
    rounded = SlimLlmPlus(epochs=1).tune(b).tensors["weight"]
    tensor: Any = rounded.tensor
    linear = b.linears["weight"]
    slim = SlimLlm().quantize(linear.weight, linear.statistics, G8)
    want: Any = slim.tensor
    assert (rounded.damp, rounded.notes, rounded.details["p"]) == (slim.damp, slim.notes, slim.details["p"])
    assert tensor.widths == want.widths
    assert tensor.bits_stored == want.bits_stored


@pytest.mark.parametrize("how", [{"objective": "mse"}, {"variant": "corrected"}, {"damp": 0.5}], ids=lambda h: next(iter(h)))
def test_what_is_said_of_the_allocation_goes_to_it(how: dict[str, Any]) -> None:
    linear = blocks().linears["weight"]
    methods = (SlimLlmPlus(**how)._slim(), SlimLlm(**how), SlimLlm())
    got, want, usual = (m.allocate(linear.weight, linear.statistics, G8, linear.about) for m in methods)
    assert (got.widths, got.damp, got.details) == (want.widths, want.damp, want.details)
    assert (got.widths, got.damp, got.details) != (usual.widths, usual.damp, usual.details)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_are_those_of_the_scheme(symmetric: bool) -> None:
    """In the middle of the codes, or the code of 0 where all weights are above it: the least."""
    scheme, widths = WeightScheme(2, symmetric, Granularity.GROUP, 8), (2, 3, 3, 2)
    w = random(5, 32).abs() + 0.1
    given = Allocation(widths, torch.empty(0), torch.empty(0), 0.01, [], {})
    tensor: Any = MixedClipping("w", TunableLinear(w, scheme), given).hard(w).tensor
    assert torch.equal(tensor.zero.long(), torch.tensor([2 ** (b - 1) if symmetric else 0 for b in widths]).expand(5, -1))


def test_scales_that_float16_does_not_hold_are_kept_in_float32() -> None:
    w = 1e-9 * random(5, 32)
    given = Allocation((2, 3, 3, 2), torch.empty(0), torch.empty(0), 0.01, [], {})
    clip = MixedClipping("w", TunableLinear(w, G8), given)
    rounded = clip.hard(w)
    assert rounded.tensor.scale.dtype is torch.float32  # type: ignore[attr-defined]
    assert [n for n in rounded.notes if n.endswith("scales are stored in float32")] == rounded.notes != []
    # Of 2 bits on a range below 8e-9 a step is below 2.7e-9; half of one to round, half as zeros are whole, and 1.8 % of 4e-9 clipped.
    assert float((rounded.tensor.dequantize() - w).abs().max()) < 3e-9
    assert torch.equal(clip.soft(w).detach(), rounded.tensor.dequantize())


@pytest.mark.parametrize(
    "scheme", [G8, WeightScheme(2, True, Granularity.GROUP, 8), WeightScheme(2, False, Granularity.GROUP, 8, "float32")]
)
def test_what_is_trained_is_what_is_stored(scheme: WeightScheme) -> None:
    clip = MixedClipping("w", TunableLinear(random(5, 48) + 0.3, scheme), GIVEN)
    with torch.no_grad():
        for i, p in enumerate(clip.parameters()):
            p.add_(random(*p.shape, seed=i) - 3)
    tensor = clip.hard(random(5, 48) + 0.3).tensor
    assert torch.equal(clip.soft(random(5, 48) + 0.3).detach(), tensor.dequantize())
    again = type(tensor).unpack(tensor.pack(), tensor.meta())  # type: ignore[attr-defined]
    assert torch.equal(again.dequantize(), tensor.dequantize())


def test_one_bit_groups_keep_their_mean_and_start_at_the_papers_scale() -> None:
    w = random(5, 48) + 2
    tensor: Any = MixedClipping("w", TunableLinear(w, EXACT), GIVEN).hard(w).tensor
    group = w[:, :8]
    mean = group.mean(1)
    torch.testing.assert_close(tensor.mean[:, 0], mean)
    torch.testing.assert_close(tensor.scale[:, 0], (group - mean[:, None]).abs().mean(1) * (0.5 + torch.sigmoid(torch.tensor(4.0))))


def test_gradients_of_one_bit_scales_against_finite_differences() -> None:
    w = random(3, 48, dtype=torch.float64)
    clip = MixedClipping("w", TunableLinear(w, EXACT), GIVEN)
    clip._dtype = torch.float64
    target = random(3, 48, seed=5, dtype=torch.float64)
    (clip.soft(w) - target).square().sum().backward()
    upper = clip._upper[1]
    assert upper.grad is not None
    flat = upper.detach().view(-1)
    for i in range(flat.numel()):
        ends = []
        for sign in (1, -1):
            before = float(flat[i])
            flat[i] += sign * 1e-6
            ends.append(float((clip.soft(w) - target).detach().square().sum()))
            flat[i] = before
        assert float(upper.grad.view(-1)[i]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-7)


def test_the_best_iterate_is_kept_and_learning_helps() -> None:
    b = blocks()
    tuned = SlimLlmPlus(epochs=10, lwc_lr=0.05).tune(b)
    assert blocks_loss(b, tuned.changed()) == tuned.loss < 0.97 * tuned.start
    ruined = SlimLlmPlus(epochs=2, lwc_lr=50.0).tune(b)
    assert ruined.loss <= ruined.start == tuned.start


def test_given_bit_lists_are_used() -> None:
    tensor: Any = SlimLlmPlus(epochs=0, bit_lists={"weight": list(WIDTHS)}).tune(blocks()).tensors["weight"].tensor
    assert tensor.widths == WIDTHS


def test_wrong_parameters_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"objective='kld' is not .* one of kl, mse"):
        SlimLlmPlus(objective="kld")
    with pytest.raises(ValueError, match=r"lwc_lr=0 is not .* above 0"):
        SlimLlmPlus(lwc_lr=0)
