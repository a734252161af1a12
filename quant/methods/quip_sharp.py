"""QuIP# (Tseng et al. 2024, arXiv 2402.04396): randomized Hadamard transform, E8 lattice codebooks, block LDLQ. From its description
alone.

Objective: min tr((W - Q) H (W - Q)ᵀ) over codewords of eight weights. Shapes: weight `[N, K]`, K a multiple of 8, Hessian `[K, K]`.
1. H ▸ H / mean(diag H) + ridge. 2. W ▸ Hadamard(S_V W S_U), H ▸ Hadamard(S_U H S_U) with random signs. 3. W ▸ W / scale, scale = RMS
/ opt_scale of the codebook (2 bits 1.03, 3 bits 0.98, 4 bits 1.03). 4. Block LDLQ, eight columns at a time, last to first. 5.
`tune_iters` sweeps of block coordinate descent, each block to the codeword nearest to its real optimum, where that costs less than the
one that it has. Bits: 2, 3 or 4, plus a bit a row and a column for signs, plus one scale.
Departures: nearest is Euclidean and the error is not, so that a step can raise it, and sweeps raised it more and more: such steps are
left out (the reference takes all); every linear alone (the reference fuses q, k, v and gate, up by rows and keeps a scale for each); no
fine-tuning of signs and norms; no diagonal rescaling, which is off there by default; no low-rank correction; sizes without a Hadamard
matrix are transformed in blocks of their largest power of two, noted; the order of the 1-bit residual codebook; weights of dead inputs
are zeroed as in GPTQ (they would widen the one scale); a failed factorization climbs the ladder of damping.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.hadamard import hadamard_block
from quant.lattice import CODEBOOKS, DIMENSION
from quant.ldlq import coordinate_pass, feedback, solve_from_last
from quant.methods.base import ANY, Linear, Rounded, working_dtype
from quant.methods.feedback import ALL_ZERO, checked_hessian, without_dead
from quant.methods.quip import normalized, one_scale_note, require_held
from quant.parameters import Checked
from quant.scheme import Supports, WeightScheme
from quant.statistics import Statistics
from quant.tensors.lattice import LatticeTensor, hadamard_rows


@dataclass(frozen=True)
class QuipSharp(Checked):
    name: ClassVar[str] = "quip_sharp"
    version: ClassVar[int] = 3
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = True
    supports: ClassVar[Supports] = Supports(bits=(2, 3, 4), granularity=("tensor", "channel"), inputs_together=DIMENSION)

    ridge: float = 0.01
    """Added to the diagonal of H after its mean is made 1."""
    tune_iters: int = 10
    """Sweeps of block coordinate descent after block LDLQ."""
    scale_override: float | None = None
    """RMS at which weights are rounded, instead of the codebook's; 0.9 is the advice for 2 bits."""

    def quantize(self, weight: Tensor, statistics: Statistics, scheme: WeightScheme, linear: Linear = ANY) -> Rounded:
        """`[N, K]` ▸ lattice codes. Raises NonFiniteError, SingularHessianError, and ValueError for widths not divisible by 8."""
        n, k = weight.shape
        if k % DIMENSION:
            raise ValueError(
                f"in_features={k} is not a multiple of {DIMENSION}: quip_sharp codes eight weights together; use another method here"
            )
        reason = self.supports.refuses(self.name, scheme)
        if reason is not None:
            raise ValueError(reason)
        hessian = checked_hessian(self.name, weight, statistics)
        notes = one_scale_note(self.name, scheme)
        for what, size in (("outputs", n), ("inputs", k)):
            if hadamard_block(size) != size:
                notes.append(
                    f"no Hadamard matrix of order {size} is known here: the {what} are transformed in blocks of {hadamard_block(size)}"
                )

        w = weight.detach().to(working_dtype(weight))
        dead = hessian.diagonal() == 0
        w, zeros = without_dead(w, dead.to(w.device), int(dead.sum()))
        notes += [n for n in zeros if n != ALL_ZERO]
        h, zero_notes = normalized(hessian.to(w), self.ridge)
        generator = linear.generator()
        signs = [torch.randint(2, (size,), generator=generator, dtype=torch.uint8).to(w.device) for size in (n, k)]
        out, into = (1 - 2 * s.to(w) for s in signs)
        w = hadamard_rows(hadamard_rows(w * out[:, None] * into).T.contiguous()).T
        h = hadamard_rows(hadamard_rows(h * into[:, None] * into).T.contiguous())
        h = (h + h.T) / 2

        codebook = CODEBOOKS[scheme.bits]
        scale = (w.double().square().mean().sqrt() / (self.scale_override or codebook.opt_scale)).float()
        require_held(self.name, "the transformed weight, or its scale,", scale, weight, "divide the weight by a number")
        w = w / torch.where(scale == 0, 1.0, scale).to(w)
        codes = [torch.zeros(n, k // DIMENSION, dtype=torch.long, device=w.device) for _ in codebook.parts]

        def round_block(first: int, target: Tensor) -> Tensor:
            found = codebook.encode(target.contiguous())
            for kept, new in zip(codes, found, strict=True):
                kept[:, first // DIMENSION] = new
            return codebook.decode(found).to(target)

        def improve_block(first: int, optimum: Tensor) -> Tensor:
            """As `round_block`, but rows keep the codeword that they have unless the new one costs less."""
            own = slice(first, first + DIMENSION)
            given = codebook.decode([kept[:, first // DIMENSION] for kept in codes]).to(optimum)
            found = codebook.encode(optimum.contiguous())
            made = codebook.decode(found).to(optimum)
            cost, before = (((d @ h[own, own]) * d).sum(1) for d in (made - optimum, given - optimum))
            better = cost < before
            for kept, new in zip(codes, found, strict=True):
                kept[better, first // DIMENSION] = new[better]
            return torch.where(better[:, None], made, given)

        fed = feedback(h, 0.0, DIMENSION)
        if fed.damp:
            notes.append(f"the Hessian was not positive definite: damping {fed.damp:g} was used")
            h.diagonal().add_(fed.damp * h.diagonal().mean())
        values, loss = solve_from_last(w, fed, round_block)
        unit = float(scale.double() ** 2)
        details = {"proxy_loss": unit * float(loss.sum(dtype=torch.float64))}
        for _ in range(self.tune_iters):
            values = coordinate_pass(w, values, h, improve_block, DIMENSION)
        error = (w - values).double()
        details["proxy_loss_tuned"] = unit * float(((error @ h.double()) * error).sum())
        tensor = LatticeTensor(tuple(codes), signs[0], signs[1], scale.view(1), scheme.bits)
        return Rounded(tensor, damp=fed.damp, notes=notes + zero_notes, details=details)
