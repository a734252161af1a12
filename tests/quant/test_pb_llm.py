"""PB-LLM: replayed column by column from what is stored, and what its variants differ in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quant import quantize_linear
from quant.affine import Affine, ZeroKind
from quant.factors import inverse_factor
from quant.grids import GRIDS, fit
from quant.methods.base import Rounded
from quant.methods.pb_llm import PbLlm
from quant.scheme import Granularity, WeightScheme
from quant.statistics import Statistics
from quant.tensors.partially_binary import PartiallyBinaryTensor
from tests.quant.slow_binary import layer, output_error


def pb_llm(w: Tensor, statistics: Statistics, group: int | None = None, dtype: str = "float32", **params: Any) -> PartiallyBinaryTensor:
    return made(w, statistics, group, dtype, **params)[0]


def made(
    w: Tensor, statistics: Statistics, group: int | None = None, dtype: str = "float32", **params: Any
) -> tuple[PartiallyBinaryTensor, Rounded]:
    granularity = Granularity.CHANNEL if group is None else Granularity.GROUP
    rounded = PbLlm(**params).quantize(w, statistics, WeightScheme(1, False, granularity, group, dtype))
    assert isinstance(rounded.tensor, PartiallyBinaryTensor)
    return rounded.tensor, rounded


def slow_mask(w: Tensor, upper: Tensor, fraction: float, metric: str, corrected: bool) -> Tensor:
    """True where a weight of `[N, g]` is binarized."""
    inverse = upper.T @ upper if corrected else upper.diagonal().square().diag()
    saliency = w.abs() if metric == "magnitude" else w.square() / inverse.diagonal()
    flat = saliency.flatten().tolist()
    ordered = sorted(range(len(flat)), key=lambda i: (flat[i], i))
    count = int(len(flat) * fraction)
    low = torch.zeros(len(flat), dtype=torch.bool)
    if corrected:
        low[ordered[:count]] = True
    else:
        low = torch.tensor([v <= flat[ordered[count]] for v in flat])
    return low.view(w.shape)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("group", [None, 9])
@pytest.mark.parametrize(
    "params",
    [
        {"metric": "magnitude"},
        {"metric": "hessian", "low_fraction": 0.6, "high_bits": 4},
        {"metric": "hessian", "masked_stats": True},
        {"metric": "hessian", "variant": "corrected"},
    ],
    ids=str,
)
def test_every_column_is_rounded_by_the_rules(params: dict[str, Any], group: int | None, dtype: str) -> None:
    n, k = 5, 31
    w, statistics = layer(n, k, 3)
    assert statistics.hessian is not None
    h = statistics.hessian.double()
    tensor, rounded = made(w, statistics, group, dtype, **params)
    upper, _ = inverse_factor(h, 0.01)
    masked = params.get("masked_stats", False) or params.get("variant") == "corrected"
    bits, width = params.get("high_bits", 8), group or k

    high = fit(GRIDS["g_asym"], w, bits, tensor.high_scale.dtype)
    assert torch.equal(high.scale, tensor.high_scale.double())
    step = 2.0**-10 if dtype == "float16" else 1e-6
    for g, start in enumerate(range(0, k, width)):
        c = slice(start, min(start + width, k))
        part = slow_mask(
            w[:, c],
            upper[:, c][c] if params.get("variant") != "corrected" else upper[:, c],
            params.get("low_fraction", 0.9),
            params["metric"],
            params.get("variant") == "corrected",
        )
        assert torch.equal(~tensor.mask[:, c], part)
        for i in range(n):
            values = w[i, c][part[i]] if masked else w[i, c] * part[i]
            mean = values.mean() if values.numel() else torch.tensor(0.0)
            scale = (values - mean).abs().mean() if values.numel() else torch.tensor(0.0)
            assert float(tensor.mean[i, g]) == pytest.approx(float(mean), abs=step * float(scale + mean.abs()))
            assert float(tensor.scale[i, g]) == pytest.approx(float(scale), abs=step * float(scale + mean.abs()))

    q, left = tensor.values(torch.float64), w.clone()
    grid = Affine(tensor.high_scale.double()[:, 0], tensor.high_zero.double()[:, 0], bits, ZeroKind.CODE)
    for j in range(k):
        low, centred = ~tensor.mask[:, j], left[:, j] - tensor.mean[:, j // width].double()
        sure = low & (centred.abs() > 1e-4)
        assert torch.equal((tensor.codes[:, j] == 1)[sure], (centred > 0)[sure])
        off = (left[:, j] / grid.scale + 0.5) % 1
        sure = ~low & (off > 1e-3) & (off < 1 - 1e-3)
        assert torch.equal(tensor.codes[:, j].double()[sure], grid.encode(left[:, j])[sure])
        left[:, j:] -= torch.outer((left[:, j] - q[:, j]) / upper[j, j], upper[j, j:])
    # What the solver summed up, e² of what it rounded itself, is the output error of what is stored.
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(rounded.details["solver_loss"], float(((w - q) @ damped * (w - q)).sum()), rtol=1e-10, atol=0)


def test_block_size_changes_nothing() -> None:
    w, statistics = layer(4, 40, 1)
    a, b = (pb_llm(w, statistics, block_size=size) for size in (7, 128))
    assert torch.equal(a.codes, b.codes)


def test_the_reference_dilutes_its_means_and_counts_one_weight_more() -> None:
    w, statistics = layer(8, 50, 2)
    reference, corrected = pb_llm(w, statistics), pb_llm(w, statistics, variant="corrected")
    assert int((~corrected.mask).sum()) == 360
    assert int((~reference.mask).sum()) == 361
    # Nine in ten weights are binarized: over all places α is about a tenth smaller.
    assert 0.85 < float(reference.scale.mean() / corrected.scale.mean()) < 1.0


def test_saliency_by_the_hessian_and_more_codes_lower_the_output_error() -> None:
    w, statistics = layer(32, 128, 4, torch.float32)
    errors = [
        output_error(w, pb_llm(w, statistics, metric="hessian", low_fraction=f).dequantize(), statistics) for f in (0.95, 0.9, 0.8, 0.5)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < output_error(w, pb_llm(w, statistics).dequantize(), statistics)


def test_fractions_at_the_end_binarize_all() -> None:
    w, statistics = layer(3, 20, 4)
    for variant in ("reference", "corrected"):
        tensor = pb_llm(w, statistics, low_fraction=1.0, variant=variant)
        assert not tensor.mask.any()
        assert tensor.bits_nominal == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["reference", "corrected"])
def test_awkward_weights_and_hessians_work(variant: str, dtype: torch.dtype) -> None:
    w, statistics = layer(5, 30, 4, torch.float32)
    w = w.to(dtype)
    w[0], w[1], w[:, 4:9] = 0, 0.5, 1
    before = w.clone()
    assert statistics.hessian is not None
    dead = statistics.hessian.clone()
    dead[3], dead[:, 3] = 0, 0
    for h in (statistics.hessian, torch.ones(30, 30), dead, torch.zeros(30, 30)):
        for metric in ("magnitude", "hessian"):
            for part in (w, w[:1]):
                tensor, _ = made(part, Statistics(hessian=h), 16, "float16", variant=variant, metric=metric)
                assert torch.isfinite(tensor.dequantize()).all()
    assert torch.equal(w, before)
    _, rounded = made(w, Statistics(hessian=dead), variant=variant)
    assert rounded.notes == ["1 of 30 inputs are always 0 on the calibration text: their weights are set to 0"]
    assert rounded.details["low_share"] == pytest.approx(0.9, abs=0.1)
    assert pb_llm(w[:, :1], Statistics(hessian=torch.ones(1, 1)), variant=variant).shape == (5, 1)


@pytest.mark.parametrize("variant", ["reference", "corrected"])
def test_a_dead_input_widens_the_high_grid_of_the_reference_alone(variant: str) -> None:
    w, statistics = layer(5, 30, 4)
    assert statistics.hessian is not None
    h = statistics.hessian.clone()
    h[3], h[:, 3], w[:, 3] = 0, 0, 50
    tensor, _ = made(w, Statistics(hessian=h), variant=variant)
    ranged = w if variant == "reference" else w.index_fill(1, torch.tensor(3), 0)
    assert torch.equal(tensor.high_scale.double(), fit(GRIDS["g_asym"], ranged, 8, tensor.high_scale.dtype).scale)


def test_an_indefinite_hessian_climbs_the_ladder() -> None:
    w, _ = layer(4, 12, 2)
    h = torch.diag(torch.arange(1.0, 13.0))
    h[0, 1] = h[1, 0] = 1.9  # indefinite: 1 · 2 < 1.9²; the mean of the diagonal is 6.5
    _, rounded = made(w, Statistics(hessian=h), damp=0.001)
    assert rounded.damp == pytest.approx(0.1)
    assert "0.1 was used" in rounded.notes[0]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"low_fraction": 0.0}, "low_fraction=0.0 is not .* a number above 0 up to 1; gptq rounds"),
        ({"high_bits": 9}, "high_bits=9 is not .* a whole number from 2 to 8"),
        ({"metric": "l2"}, "metric='l2' is not .* one of magnitude, hessian"),
        ({"variant": "paper"}, "variant='paper' is not .* one of reference, corrected"),
        ({"block_size": 0}, "block_size=0 is not .* from 1"),
        ({"damp": -1.0}, "damp=-1.0 is not .* from 0"),
        ({"bits": 4}, "pb_llm does not make weight.bits=4; it makes 1"),
    ],
)
def test_wrong_parameters_say_what_is_allowed(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_linear(torch.ones(2, 24), method="pb_llm", **{"bits": 1, "hessian": torch.eye(24), **params})
