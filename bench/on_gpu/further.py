"""A further configuration of GPTQ: weights, Hessians and factors of a model's blocks are on the device already, as a worker keeps them
(`workers.kept`), and only the rounding is left. Errors of the linears, packing and writing come apart.

Times are from the first block's start to the last one's end, with what the device waits for the host, the blocks that are queued one by one
before there are graphs of them, and the captures of those; `kernels_alone`, by torch's profiler, is what the goal is of, and less."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile
from torch.torch_version import TorchVersion

from bench.on_gpu.clock import Bench, Goal, Row, elapsed_us, known
from quant.factors import shared_factors
from quant.methods.gptq import Gptq
from quant.replay import replaying
from quant.scheme import Granularity, WeightScheme
from quant.statistics import Statistics
from quant.tensors.affine import AffineTensor
from workers.kept import Kept, matrix_digest
from workers.memory import free_bytes

LAYERS = 32
TURNS = 3
ROWS = 64
"""Of a linear that are compared with the plain loop; a row's codes do not depend on the others."""
SHARE = 1e-2
"""Codes that may differ from the plain loop's: it works in float64, where a few values fall on the other side of a step, and a code that
differs changes what the later columns of its row see."""


@dataclass
class Site:
    """Linears that read one input."""

    name: str
    weights: list[Tensor]
    """Each `[N, K]` bfloat16."""
    hessian: Tensor
    """`[K, K]` float32."""


def further(b: Bench) -> Iterator[Row]:
    """As many blocks of a 7B-shaped model as fit; times are scaled to all where they do not."""
    hidden, inner = b.size(4096, 32), b.size(11008, 64)
    groups = (128, 128, 64) if not b.dry else (16, 16, 8)
    schemes = [WeightScheme(bits, granularity=Granularity.GROUP, group_size=g) for bits, g in zip((4, 3, 2), groups, strict=True)]
    block_bytes = 2 * (4 * hidden**2 + 3 * hidden * inner) + 2 * 4 * (3 * hidden**2 + inner**2)
    layers = 2 if b.dry else min(LAYERS, int(0.8 * free_bytes(b.device)) // block_bytes)
    blocks = list(made_blocks(b, hidden, inner, layers))
    method, holder = Gptq(static_groups=True), Kept()
    scale = LAYERS / layers
    said = f"{LAYERS} blocks" if layers == LAYERS or b.dry else f"{LAYERS} blocks (scaled from {layers})"

    def rounded(site: Site, number: int, scheme: WeightScheme, rows: slice = slice(None)) -> list[AffineTensor]:
        statistics = Statistics(hessian=site.hessian)
        weights = [w[rows] for w in site.weights]
        with holder.factors(str(number), site.name), shared_factors():
            made = method.quantize_stacked(weights, statistics, [scheme] * len(weights))
        return [cast(AffineTensor, m.tensor) for m in made]

    def walk(scheme: WeightScheme) -> None:
        with replaying():  # as a stage does
            for number, sites in enumerate(blocks):
                for site in sites:
                    rounded(site, number, scheme)

    holder.begin(b.device, 2**60)
    first = clocked(b, lambda: walk(schemes[0]), turns=1)
    factors = holder.counts.factors_made
    digests = clocked(b, lambda: [matrix_digest(site.hessian) for sites in blocks for site in sites], TURNS)
    for scheme in schemes:
        wrong = 0.0
        for site in blocks[0]:
            with replaying():  # queued, captured, replayed
                got = [rounded(site, 0, scheme)[0].codes[:ROWS] for _ in range(1 if b.dry else 3)][-1]
            wrong = max(wrong, float((got != plain_codes(site.weights[0][:ROWS], site.hessian, scheme, method.damp)).double().mean()))
        holder.begin(b.device, 2**60)
        clock = clocked(b, lambda: walk(scheme), TURNS)  # noqa: B023
        took = busy(b, lambda: walk(scheme))  # noqa: B023
        if (holder.counts.factors_made, holder.counts.factors_read) != (0, factors * (2 if b.dry else TURNS + 1)):
            raise RuntimeError(f"a further configuration factored: {holder.counts}, of {factors} factors")
        name = f"gptq W{scheme.bits} g{scheme.group_size}, static groups, weights, Hessians and factors kept, {said}"
        peers = known(kernels_alone=took, first_with_factors=first, finding_the_factors_alone=digests)
        scaled = {k: scale * us for k, us in peers.items()}
        yield Row(name, wrong, SHARE, None if clock is None else scale * clock, scaled, goal=Goal(1e6))


def made_blocks(b: Bench, hidden: int, inner: int, layers: int) -> Iterator[list[Site]]:
    """Hessians of random inputs that are correlated, and in every block scaled otherwise."""
    base = {k: correlated(b, 2 * k, k) for k in (hidden, inner)}
    for layer in range(layers):
        sites: list[Site] = []
        for name, k, rows in (
            ("qkv", hidden, (hidden,) * 3),
            ("o", hidden, (hidden,)),
            ("up", hidden, (inner,) * 2),
            ("down", inner, (hidden,)),
        ):
            g = torch.Generator(b.device).manual_seed(100 * layer + len(sites))
            size = 0.5 + torch.rand(k, generator=g, device=b.device)
            weights = [(torch.randn(n, k, generator=g, device=b.device) / 50).bfloat16() for n in rows]
            sites.append(Site(name, weights, base[k] * size[:, None] * size))
        yield sites


def correlated(b: Bench, tokens: int, k: int) -> Tensor:
    """Hessian `[K, K]` of random inputs, each correlated with the one before it."""
    x = b.random(tokens, k)
    x[:, 1:] += x[:, :-1].clone()
    return x.T @ x / k


def plain_codes(weight: Tensor, hessian: Tensor, scheme: WeightScheme, damp: float) -> Tensor:
    """`[N, K]`: the published loop, a column at a time, with the inverse as it is written there, in float64; asymmetric ranges of the
    weight's own groups, their scales as they are stored."""
    h, w = hessian.double(), weight.double().clone()
    (n, k), size = w.shape, scheme.group_size or w.shape[1]
    h.diagonal().add_(damp * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    groups, top = w.view(n, k // size, size), 2**scheme.bits - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    # Ranges are taken in float32, and scales kept in float16. By a Python number a GPU would multiply with its inverse.
    width = high.float() - low.float()
    step = (width / width.new_full((), top)).half().float()
    zero, step = (-low.float() / step).round().clamp(0, top).double(), step.double()
    codes = torch.empty(n, k, dtype=torch.uint8, device=w.device)
    for j in range(k):
        s, z = step[:, j // size], zero[:, j // size]
        q = ((w[:, j] / s).round() + z).clamp(0, top)
        codes[:, j] = q.to(torch.uint8)
        error = (w[:, j] - (q - z) * s) / upper[j, j]
        w[:, j + 1 :].addr_(error, upper[j, j + 1 :], alpha=-1)
    return codes


def clocked(b: Bench, work: Callable[[], object], turns: int) -> float | None:
    """Microseconds on the device, waits for the host counted; the least of some turns."""
    if b.dry:
        work()
        return None
    took = []
    for _ in range(turns):
        torch.cuda.synchronize()
        took.append(elapsed_us(work))
    return min(took)


def busy(b: Bench, work: Callable[[], object]) -> float | None:
    """Microseconds that the device's kernels, copies and fills take together; None, and a line, where nothing tells."""
    if b.dry:
        work()
        return None
    if TorchVersion(torch.version.cuda or "0") < "12.6":  # there CUPTI is not to begin again where CUDA graphs are, as torch itself has it
        os.environ.update(DISABLE_CUPTI_LAZY_REINIT="1", TEARDOWN_CUPTI="0")
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as told:
        work()
        torch.cuda.synchronize()
    took = [e.time_range.elapsed_us() for e in told.events() if e.device_type is DeviceType.CUDA]
    if not took:
        print("   time of the device's own kernels not known: torch's profiler saw none, so CUPTI does not work here", flush=True)
        return None
    return float(sum(took))
