"""AWQ: each search starts from doing nothing and never ends above it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from quant.grids import GRIDS, round_weight
from quant.methods.awq import Awq, _relative_magnitude, candidate_scale
from quant.methods.base import ScaleGroup
from quant.scheme import Granularity, WeightScheme
from quant.statistics import Statistics, collect

CHANNEL = WeightScheme(3, scale_dtype="float32")
GROUP = WeightScheme(3, granularity=Granularity.GROUP, group_size=16, scale_dtype="float32")
NEEDS = frozenset({"absmean", "samples"})


def data(n: int = 12, k: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weight and samples `[3, 40, K]` with four salient channels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 40, k, generator=g)
    x[..., ::16] *= 12
    return torch.randn(n, k, generator=g), x


def group_of(weights: Mapping[str, Tensor], x: Tensor) -> ScaleGroup:
    """A feed-forward-like module: tanh of one linear times the other."""

    def forward(w: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        return torch.tanh(inputs @ w["up"].T) * (inputs @ w["gate"].T)

    return ScaleGroup("mlp", "norm", weights, collect(x, NEEDS), forward)


def loss(group: ScaleGroup, s: Tensor, scheme: WeightScheme) -> float:
    x = group.statistics.samples
    assert x is not None
    rounded = {name: round_weight(GRIDS["awq_asym"], w * s, scheme) / s for name, w in group.consumers.items()}
    return float((group.forward(rounded, x) - group.forward(group.consumers, x)).square().mean())


@pytest.mark.parametrize("scheme", [CHANNEL, GROUP], ids=["channel", "group"])
@pytest.mark.parametrize("duo", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_chosen_scale_has_the_least_loss_of_all_candidates(scheme: WeightScheme, duo: bool, seed: int) -> None:
    w, x = data(seed=seed)
    group = group_of({"up": w[:6], "gate": w[6:]}, x)
    before = {name: v.clone() for name, v in group.consumers.items()}
    s = Awq(duo_scaling=duo).scale(group, scheme)
    assert s is not None
    assert all(torch.equal(before[name], group.consumers[name]) for name in before)
    assert group.statistics.absmean is not None
    # AutoAWQ's: the mean over all rows of |w| beside the largest of its group.
    groups = w.abs().view(12, -1, scheme.group_size or 64)
    magnitude = (groups / (groups.amax(-1, keepdim=True) + 1e-6)).view(12, 64).mean(0) if duo else None
    candidates = [loss(group, candidate_scale(group.statistics.absmean, i / 20, magnitude), scheme) for i in range(20)]
    assert loss(group, s, scheme) == pytest.approx(min(candidates), rel=1e-5)
    if not duo:
        assert min(candidates) < candidates[0] == pytest.approx(loss(group, torch.ones(64), scheme), rel=1e-6)


def test_candidates_start_at_one_and_are_centred() -> None:
    salience = torch.tensor([0.0, 0.5, 2.0, 8.0])
    assert torch.equal(candidate_scale(salience, 0.0), torch.ones(4))
    s = candidate_scale(salience, 0.5)
    assert float(s.max() * s.min()) == pytest.approx(1.0, rel=1e-5)
    assert float(s[3] / s[2]) == pytest.approx(2.0, rel=1e-5)
    # With weights of a mean relative magnitude: x^r / (m^(1 - r) + 1e-4), centred likewise.
    m = torch.tensor([0.3, 0.1, 0.4, 0.2])
    plain = [1e-4, *(float(x) ** 0.25 / (float(y) ** 0.75 + 1e-4) for x, y in zip(salience[1:], m[1:], strict=True))]
    centred = [p / math.sqrt(max(plain) * min(plain)) for p in plain]
    assert candidate_scale(salience, 0.25, m).tolist() == pytest.approx(centred, rel=1e-5)


def test_magnitudes_are_relative_to_the_groups_of_each_consumers_own_scheme() -> None:
    w, _ = data()
    found = _relative_magnitude({"up": w[:4], "gate": w[4:]}, {"up": GROUP, "gate": CHANNEL})
    relative = [v.abs().view(len(v), -1, width) for v, width in ((w[:4], 16), (w[4:], 64))]
    want = torch.cat([(v / v.amax(-1, keepdim=True)).view(-1, 64) for v in relative]).mean(0)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)  # beside 1e-6 of a largest weight near 3


def group_errors(w: Tensor, changed: Tensor, x: Tensor, scheme: WeightScheme) -> Tensor:
    """Independent of the search: summed squared error of every row's and group's partial output, `[N, G]`."""
    width = scheme.group_size or w.shape[1]
    d = (round_weight(GRIDS["awq_asym"], changed, scheme) - w).view(w.shape[0], -1, width)
    return torch.einsum("tgi,ngi->tng", x.reshape(-1, d.shape[1], width), d).square().sum(0)


@pytest.mark.parametrize("scheme", [CHANNEL, GROUP], ids=["channel", "group"])
@pytest.mark.parametrize("tokens", [10, 120], ids=["fewer tokens than inputs", "more"])
def test_clip_search_is_the_best_bound_of_every_row_and_group(scheme: WeightScheme, tokens: int) -> None:
    w, samples = data()
    x = samples.reshape(-1, 64)[:tokens]
    clipped = Awq().clip(w, x, scheme)
    width = scheme.group_size or 64
    widest = w.view(12, -1, width).abs().amax(-1, keepdim=True)
    bounds = [widest * (1 - i / 20) for i in range(10)]
    errors = torch.stack([group_errors(w, w.view(12, -1, width).clamp(-b, b).view(12, 64), x, scheme) for b in bounds])
    found = group_errors(w, clipped, x, scheme)
    torch.testing.assert_close(found, errors.amin(0), rtol=1e-3, atol=1e-4)
    assert torch.all(found <= errors[0] * (1 + 1e-4))
    assert float(found.sum()) < float(errors[0].sum())


def test_tokens_of_the_clip_error_are_taken_at_equal_distances() -> None:
    w, x = data()
    assert torch.equal(Awq(clip_tokens=30).clip(w, x, GROUP), Awq().clip(w, x.reshape(-1, 64)[::4], GROUP))
    assert not torch.equal(Awq(clip_tokens=30).clip(w, x, GROUP), Awq().clip(w, x, GROUP))


def test_rows_are_searched_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = data()
    whole = Awq().clip(w, x, GROUP)
    monkeypatch.setattr("quant.methods.awq.CLIP_VALUES", 5 * 4 * 16)
    torch.testing.assert_close(Awq().clip(w, x, GROUP), whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "clipped"),
    [
        ("model.layers.0.self_attn.q_proj", False),
        ("model.layers.0.self_attn.k_proj", False),
        ("gpt_neox.layers.0.attention.query_key_value", False),
        ("model.layers.0.self_attn.v_proj", True),
        ("model.layers.0.block_sparse_moe.experts.0.w1", True),
        ("model.layers.0.mlp.down_proj", True),
    ],
)
def test_queries_and_keys_are_not_clipped(name: str, clipped: bool) -> None:
    w, x = data()
    found = Awq().rewrite(name, w, Statistics(samples=x), GROUP)
    assert (found is not None) == clipped
    assert Awq(clip_search=False).rewrite(name, w, Statistics(samples=x), GROUP) is None


def test_wrong_input_is_named() -> None:
    w, x = data()
    group = group_of({"up": w[:6], "gate": w[6:]}, x)
    group.statistics.samples = None
    with pytest.raises(ValueError, match="awq needs the statistic samples"):
        Awq().scale(group, GROUP)
    with pytest.raises(ValueError, match="works per group or channel"):
        Awq().clip(w, x, WeightScheme(4, granularity=Granularity.TENSOR))
    with pytest.raises(ValueError, match="scale_grid=0"):
        Awq(scale_grid=0)


def exhaustive(forward: Callable[[Tensor], Tensor], w: Tensor, x: Tensor, bits: int, width: int) -> tuple[int, list[float]]:
    """The paper's search written plainly, in float64, all candidates on all tokens: (best exponent's index, losses)."""
    w, x = w.double(), x.double()
    salience = x.abs().mean((0, 1))
    losses = []
    for i in range(20):
        s = salience.pow(i / 20).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        groups = (w * s).view(len(w), -1, width)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = (high - low).clamp(min=1e-5) / (2**bits - 1)
        zero = (-low / step).round().clamp(0, 2**bits - 1)
        rounded = (((groups / step).round() + zero).clamp(0, 2**bits - 1) - zero) * step
        losses.append(float((forward(rounded.view(w.shape) / s) - forward(w)).square().mean()))
    return losses.index(min(losses)), losses


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tokens", [5, 40, 700], ids=["fewer tokens than inputs", "more", "several parts"])
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "module"])
def test_shortcuts_choose_as_the_exhaustive_search(linear: bool, tokens: int, bits: int) -> None:
    chosen = set()
    for seed in range(4):
        w, _ = data(seed=seed)
        g = torch.Generator().manual_seed(100 + seed)
        x = torch.randn(3, tokens, 64, generator=g) * torch.rand(64, generator=g).mul(3).exp()
        scheme = WeightScheme(bits, granularity=Granularity.GROUP, group_size=16, scale_dtype="float32")
        if linear:
            group = ScaleGroup("down", "linear", {"down": w}, collect(x, NEEDS), lambda _w, _x: torch.full((1,), math.nan), linear=True)
            best, losses = exhaustive(lambda v, x=x: x.double() @ v.T, w, x, bits, 16)
        else:
            group = group_of({"up": w[:6], "gate": w[6:]}, x)
            best, losses = exhaustive(lambda v, x=x: torch.tanh(x.double() @ v[:6].T) * (x.double() @ v[6:].T), w, x, bits, 16)
        second = sorted(losses)[1]
        assert second > min(losses) * (1 + 1e-4), "the case does not separate the candidates"
        s = Awq().scale(group, scheme)
        assert s is not None
        assert group.statistics.absmean is not None
        torch.testing.assert_close(s, candidate_scale(group.statistics.absmean, best / 20), rtol=1e-6, atol=0)
        chosen.add(best)
    assert len(chosen) > 1


def test_losing_candidates_are_given_up_early(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = data()
    seen = []
    group = group_of({"up": w[:6], "gate": w[6:]}, x)
    plain = group.forward
    group.forward = lambda weights, inputs: seen.append(inputs.shape[0]) or plain(weights, inputs)  # type: ignore[func-returns-value]
    whole = Awq().scale(group, GROUP)
    calls = sum(seen)
    assert calls == 21 * 3
    seen.clear()
    monkeypatch.setattr("quant.methods.awq.LOSS_TOKENS", 40)
    assert torch.equal(Awq().scale(group, GROUP), whole)
    assert sum(seen) < calls
