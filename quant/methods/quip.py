"""QuIP (Chee et al. 2023, arXiv 2307.13304): incoherence processing, then LDLQ.

Objective: min tr((W - Q) H (W - Q)ᵀ) over codes of one scale, after W ▸ U W Vᵀ, H ▸ V H Vᵀ with random orthogonal U, V, which makes
the entries of W about equally large. Shapes: weight `[N, K]`, Hessian `[K, K]`.
Reference behaviour (`--incoh_processing`) kept: columns are rescaled by (diag H / diag WᵀW)^(1/4); H is normalized to a mean
diagonal of 1 and 1e-2 added; the grid is ±2.4 RMS for the whole matrix, and weights are clamped to it before rounding starts, so
that what is cut off is not fed back. With incoherence=false LDLQ works on min-max grids (g_asym or g_sym, per row, tensor or static
groups) in the space of W. Weights of dead inputs are zeroed as in GPTQ: they would widen a grid that all weights share.
Departures: codes, scale, seed and column scales are stored, where the reference keeps a float16 weight; column scales are rounded to
their stored type before use, and are 1 where a column or its input is always zero; the transforms work in float64 and are orthogonal
to 1e-7; a failed factorization climbs the ladder of damping. A scale for the whole matrix serves every granularity; the notes say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.affine import Affine, grouped
from quant.butterfly import butterflies
from quant.errors import NonFiniteError
from quant.factors import revive_dead
from quant.grids import DTYPES, choose_grid, fit, with_stored_scales
from quant.ldlq import Feedback, RoundBlock, coordinate_pass, feedback, solve_from_last
from quant.methods.base import ANY, Linear, Rounded
from quant.methods.feedback import ALL_ZERO, checked, damping_notes, without_dead
from quant.parameters import Checked
from quant.scheme import Granularity, Supports, WeightScheme
from quant.statistics import Statistics
from quant.tensors.affine import AffineTensor
from quant.tensors.incoherent import IncoherentTensor

RIDGE = 1e-2
"""Added to the diagonal of the normalized Hessian."""


def normalized(hessian: Tensor, ridge: float) -> tuple[Tensor, list[str]]:
    """H with a mean diagonal of 1, plus the ridge; and a note where H is zero and the identity takes its place."""
    mean = hessian.diagonal().mean()
    eye = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    if float(mean) == 0:
        return eye, [ALL_ZERO]
    return hessian / mean + ridge * eye, []


def require_held(name: str, what: str, found: Tensor, weight: Tensor, instead: str) -> None:
    """Raises NonFiniteError where what was made of a finite weight is not."""
    if not bool(torch.isfinite(found).all()):
        most, peak = torch.finfo(found.dtype).max, float(weight.abs().max())
        kind = str(found.dtype).removeprefix("torch.")
        raise NonFiniteError(f"{name}: {what} would exceed {most:.2g}, the most that {kind} holds: weights reach {peak:.2g}; {instead}")


def one_scale_note(name: str, scheme: WeightScheme) -> list[str]:
    """Where the scheme asks for more scales than there are."""
    if scheme.granularity is Granularity.TENSOR:
        return []
    return [f"{name} has one scale for the whole matrix: granularity {scheme.granularity.value} is not used"]


@dataclass(frozen=True)
class Quip(Checked):
    name: ClassVar[str] = "quip"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = True
    supports: ClassVar[Supports] = Supports()

    incoherence: bool = True
    """Random orthogonal transforms and one scale; False is LDLQ alone on min-max grids."""
    rescale: bool = True
    """Columns times (diag H / diag WᵀW)^(1/4) first; only with incoherence."""
    width: float = 2.4
    """Half-width of the grid in units of the RMS of the transformed weight; only with incoherence."""
    sort: bool = False
    """Columns by ascending diagonal of H, so that the largest is rounded first (the reference's ldlqRG)."""
    npasses: int = 0
    """Sweeps of greedy coordinate descent after LDLQ."""
    damp: float = 0.01
    """Fraction of mean(diag H) added to the diagonal."""

    def quantize(self, weight: Tensor, statistics: Statistics, scheme: WeightScheme, linear: Linear = ANY) -> Rounded:
        """`[N, K]` ▸ codes. Raises NonFiniteError, SingularHessianError, and ValueError for shapes that do not fit."""
        w, hessian = checked("quip", weight, statistics)
        return self._incoherent(w, hessian, scheme, linear) if self.incoherence else self._plain(w, hessian, scheme)

    def _incoherent(self, w: Tensor, h: Tensor, scheme: WeightScheme, linear: Linear) -> Rounded:
        dead = h.diagonal() == 0
        w, zeros = without_dead(w, dead, int(dead.sum()))
        notes = one_scale_note("quip", scheme) + [n for n in zeros if n != ALL_ZERO]
        given, column_scale = w, None
        if self.rescale:
            column_scale, scale_notes = _column_scale(w, h, scheme)
            notes += scale_notes
            w, h = w * column_scale.to(w), h / column_scale.to(w) / column_scale.to(w)[:, None]
            require_held("quip", "the Hessian of rescaled columns", h, given, "use rescale=false, or divide the weight by a number")
        h, zero_notes = normalized(h, RIDGE)
        seed = int(torch.randint(2**62, (1,), generator=linear.generator()))
        u, v = butterflies(w.shape[0], w.shape[1], seed)
        device, dtype = w.device, w.dtype
        w = u.apply(v.apply(w.cpu().double()).T).T.to(device, dtype)
        h = v.apply(v.apply(h.cpu().double()).T)
        h = ((h + h.T) / 2).to(device, dtype)
        scale = (self.width * w.double().square().mean().sqrt()).float()
        require_held("quip", "the transformed weight, or its scale,", scale, given, "divide the weight by a number")
        top = 2**scheme.bits - 1
        steps = (w / torch.where(scale == 0, 1.0, scale).to(w) + 1) / 2 * top
        values, fed = self._solve(steps.clamp(0, top), h, lambda _, x: x.round().clamp(0, top))
        codes, seeds = values.to(torch.uint8), torch.tensor([seed], device=device)
        tensor = IncoherentTensor(codes, scale.view(1), seeds, scheme.bits, input_scale=column_scale)
        return Rounded(tensor, damp=fed.damp, notes=notes + zero_notes + damping_notes(self.damp, fed.damp))

    def _plain(self, w: Tensor, h: Tensor, scheme: WeightScheme) -> Rounded:
        chosen, notes = choose_grid(None, scheme)
        groups = grouped(w, scheme)
        h, dead = revive_dead(h)
        w, zeros = without_dead(w, dead, int(dead.sum()))
        notes += zeros
        fed: list[Feedback] = []

        def run(scale_dtype: torch.dtype) -> AffineTensor:
            affine = fit(chosen, groups, scheme.bits, scale_dtype).per_group()
            width = w.shape[1] // affine.scale.shape[1]

            def column(j: int) -> Affine:
                return Affine(affine.scale[:, j // width, None], affine.zero[:, j // width, None], scheme.bits, chosen.zero)

            values, found = self._solve(w, h, lambda j, x: column(j).round(x))
            fed[:] = [found]
            codes = torch.empty_like(values)
            for j in range(w.shape[1]):
                codes[:, j : j + 1] = column(j).encode(values[:, j : j + 1])
            return AffineTensor.build(codes, affine, scale_dtype)

        tensor, dtype_notes = with_stored_scales(scheme, run)
        return Rounded(tensor, damp=fed[0].damp, notes=notes + dtype_notes + damping_notes(self.damp, fed[0].damp))

    def _solve(self, w: Tensor, h: Tensor, round_column: RoundBlock) -> tuple[Tensor, Feedback]:
        """Values `[N, K]` in the given column order, and the factors."""
        k = w.shape[1]
        order = torch.argsort(h.diagonal(), stable=True) if self.sort else torch.arange(k, device=w.device)
        plan = order.tolist()
        ordered = h[order][:, order]
        fed = feedback(ordered, self.damp)
        ordered.diagonal().add_(fed.damp * ordered.diagonal().mean())

        def round_ordered(j: int, x: Tensor) -> Tensor:
            return round_column(plan[j], x)

        values, _ = solve_from_last(w[:, order], fed, round_ordered)
        for _ in range(self.npasses):
            values = coordinate_pass(w[:, order], values, ordered, round_ordered)
        out = torch.empty_like(values)
        out[:, order] = values
        return out, fed


def _column_scale(w: Tensor, h: Tensor, scheme: WeightScheme) -> tuple[Tensor, list[str]]:
    """(diag H / diag WᵀW)^(1/4) `[K]` in the stored type, H taken relative to its largest entry."""
    peak = h.abs().amax()
    diagonal, square = h.diagonal().double() / torch.where(peak == 0, 1.0, peak), w.double().square().sum(0)
    known = (diagonal > 0) & (square > 0)
    exact = torch.where(known, diagonal / torch.where(known, square, 1.0), 1.0).pow(0.25)
    stored = exact.to(DTYPES[scheme.scale_dtype])
    # Normal numbers only: a subnormal one would have lost bits.
    if bool((torch.isfinite(stored) & (stored >= torch.finfo(stored.dtype).tiny)).all()):
        return stored, []
    return exact.float(), ["some column scales do not fit float16; column scales are stored in float32"]
