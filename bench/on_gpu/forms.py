"""The two forms of the GPTQ solver, each with its factor: errors of finished blocks pushed onto later columns, by U, or pulled a span at a
time, by P (`quant.factors`). Ranges are known, and a loop's launches are replayed, as in a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.on_gpu.clock import Bench, Row, known
from bench.on_gpu.further import ROWS, SHARE, Site, clocked, correlated, made_blocks, plain_codes
from quant.affine import Affine
from quant.factors import inverse_factor, pull_factor
from quant.grids import GRIDS, fit
from quant.replay import replaying
from quant.scheme import Granularity, WeightScheme
from quant.solver import by_columns, solve_affine

DAMP, TURNS = 0.01, 5
FACTORS_AGREE = 1e-3
"""What P takes off may differ from what U does, as a share: both come from one float32 triangle of a damped matrix."""


def forms(b: Bench) -> Iterator[Row]:
    hidden, inner, large = b.size(4096, 32), b.size(11008, 64), b.size(28672, 96)
    [sites] = made_blocks(b, hidden, inner, 1)
    for site in sites:
        if site.name != "qkv":  # as o, with more rows
            yield from _compared(b, site, plain=True, times_factors=site.name != "up")  # of which o has as many inputs
    del sites
    g = torch.Generator(b.device).manual_seed(1)
    weight = (torch.randn(b.size(8192, 24), large, generator=g, device=b.device) / 50).bfloat16()
    yield from _compared(b, Site("down of 70B's shape", [weight], correlated(b, large, large)), plain=False, times_factors=True)


def _compared(b: Bench, site: Site, plain: bool, times_factors: bool) -> Iterator[Row]:
    """plain: codes are compared with the published loop's, else with those of pushing: that loop would take minutes."""
    block, span, group = b.size(128, 16), b.size(1024, 16), b.size(128, 16)
    hessian, weights, k = site.hessian, site.weights, len(site.hessian)
    rows = [len(w) for w in weights]
    scheme = WeightScheme(4, granularity=Granularity.GROUP, group_size=group)
    found = fit(GRIDS["g_asym"], torch.cat(weights).float().view(sum(rows), -1, group), 4, torch.float16).per_group()
    affine = Affine(found.scale.T.contiguous(), found.zero.T.contiguous(), 4, found.kind)
    of = [j // group for j in range(k)]

    def solved(upper: Tensor, span: int | None) -> Tensor:
        made = solve_affine(
            by_columns(weights),
            upper,
            block,
            lambda start, end, _: (affine, of[start:end]),
            stack=rows,
            spends=True,
            looks_ahead=False,
            span=span,
        )
        return made.codes

    factors: dict[str, Callable[[], Tensor]] = {
        "push": lambda: inverse_factor(hessian, DAMP)[0],
        "pull": lambda: pull_factor(hessian, DAMP, span)[0],
    }
    upper, pulls = (make() for make in factors.values())
    if times_factors:
        start = (k - 1) // span * span
        missed = b.random(16, start)
        by_push = torch.linalg.solve_triangular(upper[:start, :start], missed, upper=True, left=False) @ upper[:start, start:]
        error = float((missed @ pulls[:start, start:] + by_push).norm() / by_push.norm())
        took = {name: clocked(b, make, TURNS) for name, make in factors.items()}
        yield Row(f"factor of {k} inputs, to pull", error, FACTORS_AGREE, took["pull"], known(to_push=took["push"]))

    times, codes = dict[str, float | None](), dict[str, Tensor]()
    for name, own, width in (("push", upper, None), ("pull", pulls, span)):
        with replaying():
            for _ in range(1 if b.dry else 3):  # queued, captured, replayed
                codes[name] = solved(own, width)[:, :ROWS].T
            times[name] = None if b.dry else clocked(b, lambda: solved(own, width), TURNS)  # noqa: B023
    want = plain_codes(weights[0][:ROWS], hessian, scheme, DAMP) if plain else codes["push"]
    wrong = float((codes["pull"] != want).double().mean())
    name = f"gptq of {site.name}, {k} inputs, {sum(rows)} rows, pulled"
    yield Row(name, wrong, SHARE, times["pull"], known(pushed=times["push"]))
