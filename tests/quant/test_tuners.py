"""Block tuners on small blocks of their own: gradients, the best iterate, function-preserving transforms, determinism."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quant import methods, quantize_linear
from quant.adam import Adam
from quant.affine import grouped
from quant.errors import NonFiniteError
from quant.methods.clipping import LearnedClipping
from quant.methods.equivalent import LEAST, EquivalentTransform
from quant.methods.learned_rounding import LearnedRounding, _Offsets
from quant.methods.omniquant import OmniQuant
from quant.methods.single import single_linear
from quant.methods.tuner import Place, TunableLinear, TuningBlocks, blocks_loss
from quant.methods.zeroquant import ZeroQuant
from quant.scheme import ActivationScheme, Granularity, WeightScheme

G8 = WeightScheme(3, granularity=Granularity.GROUP, group_size=8, scale_dtype="float32")
ROW = WeightScheme(2)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear_blocks(scheme: WeightScheme = G8, seed: int = 0, dtype: torch.dtype = torch.float32) -> TuningBlocks:
    x = random(6, 10, 16, seed=seed + 1, dtype=dtype) * torch.linspace(0.1, 3, 16, dtype=dtype)
    return single_linear(random(5, 16, seed=seed, dtype=dtype), x, scheme)


def norm_block(scheme: WeightScheme = G8, activation: ActivationScheme | None = None) -> TuningBlocks:
    """y = x + down(relu(up(norm(x)))) with biases; float64."""
    w: dict[str, Tensor] = {
        "norm.weight": 1 + 0.3 * random(16, seed=2),
        "norm.bias": 0.3 * random(16, seed=3),
        "up.weight": random(24, 16, seed=4) / 4,
        "up.bias": random(24, seed=5),
        "down.weight": random(16, 24, seed=6) / 5,
        "down.bias": random(16, seed=7),
    }

    def steps(changed: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        p = {**w, **{k: v.to(x) for k, v in changed.items()}}
        inner = F.layer_norm(x, (16,)) * p["norm.weight"] + p["norm.bias"]
        return inner, x + F.linear(F.relu(F.linear(inner, p["up.weight"], p["up.bias"])), p["down.weight"], p["down.bias"])

    x = random(4, 6, 16, seed=8)
    return TuningBlocks(
        "block",
        {n: TunableLinear(w[f"{n}.weight"], scheme, w[f"{n}.bias"]) for n in ("up", "down")},
        x,
        x + 0.05 * random(4, 6, 16, seed=9),
        steps({}, x)[1],
        lambda changed, x: steps(changed, x)[1],
        norms={"norm.weight": w["norm.weight"], "norm.bias": w["norm.bias"]},
        places=(Place("qkv", "norm", "norm", ("up",)),),
        observe=lambda tap: [tap("up", s) for s in steps({}, x)[0]] and None,
        activation=activation,
    )


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [G8, WeightScheme(3, scale_dtype="float32"), WeightScheme(2, granularity=Granularity.TENSOR)])
def test_clipping_gradients_against_finite_differences(scheme: WeightScheme) -> None:
    """Reference: OmniQuant's quantizer written out, its two roundings (and the cast of the scale) held at their values."""
    w, target = random(5, 16, seed=1), random(5, 16, seed=2)
    clip = LearnedClipping("w", w, scheme, "omni")
    with torch.no_grad():
        clip.upper.copy_(random(*clip.upper.shape, seed=3))
        clip.lower.copy_(random(*clip.lower.shape, seed=4))
    g, top = grouped(w, scheme), 2**scheme.bits - 1

    def parts(upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
        high, low = torch.sigmoid(upper) * g.amax(-1, keepdim=True), torch.sigmoid(lower) * g.amin(-1, keepdim=True)
        return (high - low) / top, low

    exact, low0 = parts(clip.upper.detach(), clip.lower.detach())
    s0 = exact.to(getattr(torch, scheme.scale_dtype)).double()
    cast = s0 - exact
    r, z = (g / s0).round() - g / s0, (-low0 / s0).round() - (-low0 / s0)
    codes0 = (g / s0).round() + (-low0 / s0).round()
    inside = (codes0 >= 0) & (codes0 <= top)

    def frozen(upper: Tensor, lower: Tensor) -> Tensor:
        exact, low = parts(upper, lower)
        s = exact + cast
        zero = -low / s + z
        values = (torch.where(inside, g / s + r + zero, codes0.clamp(0, top)) - zero) * s
        return (values.view(w.shape) - target).square().sum()

    loss = (clip.soft(w) - target).square().sum()
    assert float(loss.detach()) == pytest.approx(float(frozen(clip.upper.detach(), clip.lower.detach())), rel=1e-12)
    loss.backward()
    h = 1e-6
    for which, parameter in enumerate((clip.upper, clip.lower)):
        assert parameter.grad is not None
        for i in range(min(10, parameter.numel())):
            pair = [clip.upper.detach().clone(), clip.lower.detach().clone()]
            ends = []
            for sign in (1, -1):
                moved = [p.clone() for p in pair]
                moved[which].view(-1)[i] += sign * h
                ends.append(float(frozen(*moved)))
            assert float(parameter.grad.view(-1)[i]) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5, abs=1e-7)


def test_transform_gradients_against_finite_differences() -> None:
    """Without rounding the whole block is smooth in scales and shifts."""
    blocks = norm_block()
    let = EquivalentTransform(blocks, blocks.places, 0.5, shift=True)
    noise = {n: 0.1 * random(*x.weight.shape, seed=11) for n, x in blocks.linears.items()}

    def loss() -> Tensor:
        t = let.apply()
        out = blocks.forward({**{f"{n}.weight": w + noise[n] for n, w in t.weights.items()}, **t.parameters}, blocks.quantized)
        return (out - blocks.targets).square().mean()

    loss().backward()
    assert [p.numel() for p in let.parameters()] == [16, 16]
    for p in let.parameters():
        assert p.grad is not None
        for i in range(16):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    before = float(p[i])
                    p[i] += sign * 1e-6
                    ends.append(float(loss()))
                    p[i] = before
            assert float(p.grad[i]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-9)


def test_adaround_gradients_against_finite_differences() -> None:
    offsets = _Offsets("w", TunableLinear(random(4, 16), G8), LearnedRounding(rule="adaround"))
    target = random(4, 16, seed=5)
    (v,) = offsets.parameters()
    ((offsets.soft() - target).square().sum() + (1 - (2 * offsets.choice() - 1).abs().pow(3)).sum()).backward()
    assert v.grad is not None
    flat, grad = v.detach().view(-1), v.grad.view(-1)
    for i in range(0, flat.numel(), 3):
        ends = []
        for sign in (1, -1):
            before = float(flat[i])
            flat[i] += sign * 1e-6
            with torch.no_grad():
                ends.append(float((offsets.soft() - target).square().sum() + (1 - (2 * offsets.choice() - 1).abs().pow(3)).sum()))
            flat[i] = before
        assert float(grad[i]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-7)


def test_offsets_have_the_gradient_of_the_rounded_weight_times_the_scale() -> None:
    """dQ / dv = s inside the codes and 0 outside: the sign that SignRound steps by."""
    offsets = _Offsets("w", TunableLinear(random(4, 16), G8), LearnedRounding(tune_range=False))
    (v,) = offsets.parameters()
    pull = random(4, 16, seed=5)
    (offsets.soft() * pull).sum().backward()
    tensor: Any = offsets.hard().tensor
    want = (pull.view(4, 2, 8) * tensor.scale.double()[..., None]).where(
        (grouped(random(4, 16), G8) / tensor.scale[..., None]).round() + tensor.zero[..., None] <= 7, torch.zeros(())
    )
    torch.testing.assert_close(v.grad, want, rtol=1e-6, atol=1e-9)


def test_adam_is_torchs_adamw_without_decay() -> None:
    ours = [random(7).requires_grad_(True), random(3, 2, seed=1).requires_grad_(True)]
    theirs = [p.detach().clone().requires_grad_(True) for p in ours]
    optimizer = torch.optim.AdamW([{"params": theirs[:1], "lr": 0.1}, {"params": theirs[1:], "lr": 0.01}], weight_decay=0.0)
    adam = Adam([(ours[:1], 0.1), (ours[1:], 0.01)])
    for _ in range(20):
        for o, parameters in ((adam, ours), (optimizer, theirs)):
            o.zero_grad()
            sum((p - 1).pow(4).sum() for p in parameters).backward()  # type: ignore[union-attr]
            o.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# --- transforms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_scales_and_shifts_keep_the_function(seed: int) -> None:
    blocks = norm_block()
    let = EquivalentTransform(blocks, blocks.places, 0.5, shift=True)
    with torch.no_grad():
        for i, p in enumerate(let.parameters()):
            p.copy_(random(*p.shape, seed=seed + 7 * i))
        let.hold()
        t = let.apply()
        out = blocks.forward({**{f"{n}.weight": w for n, w in t.weights.items()}, **t.parameters}, blocks.quantized)
    assert min(float(s.detach().abs().min()) for s in let.scales.values()) >= LEAST
    torch.testing.assert_close(out, blocks.forward({}, blocks.quantized), rtol=0, atol=1e-10)


def test_a_place_is_not_shifted_where_a_bias_is_missing() -> None:
    blocks = norm_block()
    blocks.linears["up"].bias = None
    assert not EquivalentTransform(blocks, blocks.places, 0.5, shift=True).shifts


def test_scores_share_a_scale_between_rotated_channels_and_grouped_heads() -> None:
    linears = {"q": TunableLinear(random(32, 8), ROW), "k": TunableLinear(random(16, 8), ROW)}
    x = random(1, 3, 8)
    blocks = TuningBlocks("b", linears, x, x, x, lambda changed, h: h)
    let = EquivalentTransform(blocks, (Place("s", "scores", "q", ("k",), heads=4, kv_heads=2, rotary=True),), 0.5, shift=True)
    assert let.scales["s"].shape == (2, 4)  # key heads x pairs of a head of 8
    with torch.no_grad():
        let.scales["s"].copy_(random(2, 4, seed=3).abs() + 0.5)
    rows = let.apply().rows
    q, k = rows["q"].view(4, 2, 4), rows["k"].view(2, 2, 4)  # head, half, channel
    assert torch.equal(q[:, 0], q[:, 1])
    assert torch.equal(k[:, 0], k[:, 1])
    for head in range(4):
        torch.testing.assert_close(q[head] * k[head // 2], torch.ones(2, 4, dtype=torch.float64))


def test_the_first_scales_are_omniquants() -> None:
    blocks = norm_block()
    let = EquivalentTransform(blocks, blocks.places, 0.75, shift=True)
    inner: list[Tensor] = []
    blocks.observe(lambda name, x: inner.append(x))
    peak, widest = torch.cat(inner).abs().amax(0), blocks.linears["up"].weight.abs().amax(0)
    torch.testing.assert_close(let.scales["qkv"].detach(), peak**0.75 / widest**0.25)
    middle = (inner[0].amax(0) + inner[0].amin(0)) / 2
    for x in inner[1:]:
        middle = 0.99 * middle + 0.01 * (x.amax(0) + x.amin(0)) / 2
    torch.testing.assert_close(let.shifts["qkv"].detach(), middle)


def test_the_transform_is_left_out_where_it_cannot_help() -> None:
    blocks = linear_blocks()
    tuned = OmniQuant(let=True, epochs=1).tune(blocks)
    assert "let is left out: activations are not quantized, and no norm has a bias" in tuned.notes


# --- clipping -------------------------------------------------------------------------------------------------------


def test_the_first_range_clips_as_the_paper_says() -> None:
    w = random(5, 16, dtype=torch.float32)
    tensor: Any = LearnedClipping("w", w, G8, "omni").hard(w).tensor
    g = grouped(w, G8)
    share = 1 / (1 + torch.exp(torch.tensor(-4.0)))
    torch.testing.assert_close(tensor.scale, share * (g.amax(-1) - g.amin(-1)) / 7)
    assert float(share) == pytest.approx(0.982, abs=1e-4)


@pytest.mark.parametrize("scheme", [G8, ROW, WeightScheme(4, symmetric=True), WeightScheme(4, granularity=Granularity.TENSOR)])
def test_what_is_trained_is_what_is_stored(scheme: WeightScheme) -> None:
    w = random(5, 16, dtype=torch.float32)
    clip = LearnedClipping("w", w, scheme, "omni")
    assert torch.equal(clip.soft(w).detach(), clip.hard(w).tensor.dequantize())
    offsets = _Offsets("w", TunableLinear(w, scheme), LearnedRounding())
    with torch.no_grad():
        for p in offsets.parameters():
            p.add_(0.3 * random(*p.shape, dtype=torch.float32))
        offsets.hold()
    assert torch.equal(offsets.soft().detach(), offsets.hard().tensor.dequantize())


def test_zeros_among_the_codes_are_stored_in_their_bits() -> None:
    """Omni's zeros may lie elsewhere, where a group is on one side of 0: only then they take 16 bits."""
    w = random(16, 128, dtype=torch.float32)
    inside = quantize_linear(w, method="omniquant", bits=2, group_size=64, inputs=random(1, 4, 128), epochs=0, scale_dtype="float16")
    outside = quantize_linear(w + 9, method="omniquant", bits=2, group_size=64, inputs=random(1, 4, 128), epochs=0, scale_dtype="float16")
    assert (inside.bits_stored, outside.bits_stored) == (2 + 18 / 64, 2 + 32 / 64)


def test_scales_beyond_float16_are_kept_in_float32() -> None:
    w = 1e-9 * random(5, 16, dtype=torch.float32)
    for tuner in (OmniQuant(epochs=1, grid="g_asym"), LearnedRounding(iters=1)):
        tuned = tuner.tune(single_linear(w, 1e9 * random(2, 4, 16), WeightScheme(4)))
        ((_, rounded),) = tuned.tensors.items()
        assert any("stored in float32" in n for n in rounded.notes)
        assert float((rounded.tensor.dequantize() - w).norm() / w.norm()) < 0.2


# --- iterates -------------------------------------------------------------------------------------------------------

TUNERS = [
    OmniQuant(epochs=3),
    OmniQuant(epochs=3, lwc_lr=30.0),
    OmniQuant(epochs=2, let=True),
    OmniQuant(lwc=False),
    LearnedRounding(iters=12, checks=4),
    LearnedRounding(iters=12, lr=0.7),
    LearnedRounding(rule="adaround", iters=12),
    ZeroQuant(iters=6, lr=0.02, checks=3, stream="quantized"),
    ZeroQuant(iters=3, lr=9.0, checks=3, stream="quantized"),
]


@pytest.mark.parametrize("activation", [None, ActivationScheme(4, symmetric=False)])
@pytest.mark.parametrize("tuner", TUNERS, ids=str)
def test_the_returned_block_is_never_worse_than_the_start(tuner: Any, activation: ActivationScheme | None) -> None:
    """Also with learning rates that ruin it. Losses are measured anew on what is returned."""
    for blocks in (linear_blocks(), norm_block(activation=activation)):
        start = type(tuner)(**{**tuner.__dict__, **({"epochs": 0} if isinstance(tuner, OmniQuant) else {"iters": 0})}).tune(blocks)
        tuned = tuner.tune(blocks)
        assert start.iterate == "start"
        assert blocks_loss(blocks, tuned.changed()) == tuned.loss <= tuned.start == start.loss == blocks_loss(blocks, start.changed())
        assert list(tuned.tensors) == list(blocks.linears)
        assert all(r.details == {"iterate": tuned.iterate, "loss": tuned.loss, "start_loss": tuned.start} for r in tuned.tensors.values())


@pytest.mark.parametrize(
    "tuner", [OmniQuant(epochs=8, lwc_lr=0.1), LearnedRounding(iters=60), LearnedRounding(rule="adaround", iters=200, lr=0.05)], ids=str
)
def test_learning_lowers_the_loss(tuner: Any) -> None:
    """On inputs that share a direction, so that the errors of one row's weights can cancel."""
    x = random(6, 10, 16, seed=1) + 2 * random(6, 10, 1, seed=2)
    blocks = single_linear(random(5, 16, dtype=torch.float32), x, ROW)
    tuned = tuner.tune(blocks)
    assert tuned.loss < 0.97 * tuned.start
    assert tuned.iterate != "start"


def test_a_seed_decides_the_draws() -> None:
    def codes(seed: int) -> Tensor:
        blocks = linear_blocks(ROW)
        blocks.seed = seed
        tensor: Any = LearnedRounding(iters=40, batch_size=1).tune(blocks).tensors["weight"].tensor
        return tensor.codes

    assert torch.equal(codes(1), codes(1))
    assert not torch.equal(codes(1), codes(2))


def test_own_targets_count_as_much_again() -> None:
    blocks = norm_block()
    plain = blocks_loss(blocks, {})
    blocks.own_targets = blocks.forward({}, blocks.quantized)
    assert blocks_loss(blocks, {}) == pytest.approx(plain)
    blocks.own_targets = blocks.targets
    assert blocks_loss(blocks, {}) == pytest.approx(2 * plain)


def test_weights_are_not_changed() -> None:
    blocks = norm_block()
    before = {n: x.weight.clone() for n, x in blocks.linears.items()}
    norm = blocks.norms["norm.weight"].clone()
    for tuner in (OmniQuant(epochs=1, let=True), LearnedRounding(iters=3)):
        tuner.tune(blocks)
    assert all(torch.equal(before[n], x.weight) for n, x in blocks.linears.items())
    assert torch.equal(norm, blocks.norms["norm.weight"])


def test_a_start_that_is_not_finite_is_refused() -> None:
    blocks = linear_blocks()
    blocks.targets[0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="weight: the loss before tuning is nan"):
        OmniQuant().tune(blocks)


def test_training_ends_where_the_loss_is_not_finite() -> None:
    blocks = linear_blocks()
    plain = blocks.forward
    calls = [0]

    def overflowing(changed: Mapping[str, Tensor], x: Tensor) -> Tensor:
        calls[0] += torch.is_grad_enabled()
        return plain(changed, x) * (float("inf") if calls[0] > 2 else 1)

    blocks.forward = overflowing
    tuned = OmniQuant(epochs=2).tune(blocks)
    assert tuned.notes == ["the loss was not finite in epoch 1: training ended there"]
    assert tuned.iterate == "start"


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("learned_rounding", {"rule": "autround"}, "rule='autround' is not .* one of autoround, adaround; did you mean autoround"),
        ("learned_rounding", {"grid": "hqq"}, "grid='hqq' is not a value for learned_rounding; give one of g_asym"),
        ("learned_rounding", {"checks": 0}, "checks=0 is not .* from 1"),
        ("omniquant", {"alpha": 2.0}, r"alpha=2.0 is not .* from 0 to 1"),
        ("omniquant", {"grid": "omny"}, "grid='omny' is not .* did you mean omni"),
    ],
)
def test_wrong_parameters_say_what_is_allowed(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.rounding_or_tuner(name, params)
