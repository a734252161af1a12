"""SliM-LLM+ (Huang et al. 2024, arXiv 2405.14917): SliM-LLM's bits per group, with ranges learned as OmniQuant learns them.

Objective: min over clips of MSE(block(x_q; Q(W)), block(x; W)), x the block's inputs in the unquantized model, x_q those behind
quantized blocks; Q has SliM-LLM's width in every group (`slim_llm`, the same list). Groups of 2 bits and more: range
[sigmoid(lower) · min w, sigmoid(upper) · max w] (`quant.methods.clipping`). Groups of 1 bit: mean ± scale · (sigmoid(upper) + 0.5), scale =
mean |w - mean|; the start is 1.482 times it. Shapes: weights `[N, K]`, streams `[S, T, K]`, clips `[N, G, 1]`.
Departures: the reference loses the mean of 1-bit groups, and takes mean |w| for their scale; the grid is g_asym, whose zeros are
codes and stored as such, instead of Omni's; the iterate of least loss is returned. All else is OmniQuant's, without its
equivalent transform.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quant.affine import group_width
from quant.errors import ScaleDtypeError, require_finite
from quant.grids import DTYPES, GRIDS, affine_of, check_stored
from quant.methods.base import Rounded
from quant.methods.clipping import START
from quant.methods.omniquant import train
from quant.methods.slim_bits import binary, check_binary
from quant.methods.slim_llm import Allocation, SlimLlm
from quant.methods.tuner import TunableLinear, Tuned, TuningBlocks
from quant.parameters import Checked
from quant.scheme import Supports
from quant.straight_through import affine_through, round_through, scaled_limits, through
from quant.tensors.mixed import MixedTensor


@dataclass(frozen=True)
class SlimLlmPlus(Checked):
    name: ClassVar[str] = "slim_llm_plus"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "samples"})
    reads: ClassVar[frozenset[str]] = frozenset({"activation"})
    uses_seed: ClassVar[bool] = False
    supports: ClassVar[Supports] = SlimLlm.supports
    feeds_text: ClassVar[bool] = True
    working_set: ClassVar[str] = "block"
    blocks: ClassVar[int] = 1

    epochs: int = 50
    """Passes over the calibration text."""
    lwc_lr: float = 1e-2
    aug_loss: bool = False
    """Also against the unquantized block on the same inputs; the paper does so for LLaMA."""
    objective: str = "kl"
    """Of the bit allocation, as in slim_llm: kl or mse."""
    variant: str = "reference"
    """Of the bit allocation, as in slim_llm: reference or corrected."""
    damp: float = 0.01
    """Fraction of mean(diag H) added to the diagonal, for the allocation."""
    bit_lists: tuple[tuple[str, Any], ...] | None = None
    """Module ▸ bits of each group (`group_bits` of an earlier run), in place of the allocation; null searches."""

    def _slim(self) -> SlimLlm:
        return SlimLlm(objective=self.objective, variant=self.variant, damp=self.damp, bit_lists=self.bit_lists)

    @property
    def wants_own_targets(self) -> bool:
        return self.aug_loss

    def tune(self, blocks: TuningBlocks) -> Tuned:
        """The best of the start and the state after each epoch. Raises NonFiniteError, SingularHessianError, and ValueError for schemes
        or bit lists that do not fit."""
        slim = self._slim()
        clips = {n: MixedClipping(n, x, slim.allocate(x.weight, x.statistics, x.scheme, x.about)) for n, x in blocks.linears.items()}
        return train(blocks, clips, None, self.epochs, self.lwc_lr, self.lwc_lr, [])


class MixedClipping:
    """Learned ranges of groups with widths of their own, of one linear."""

    def __init__(self, name: str, linear: TunableLinear, allocation: Allocation) -> None:
        w, widths = linear.weight, allocation.widths
        require_finite(f"weight {name}", w)
        self._scheme = linear.scheme
        self._size = group_width(linear.scheme, *w.shape)
        self._widths = widths
        self._of = {b: torch.tensor([i for i, x in enumerate(widths) if x == b], device=w.device) for b in sorted(set(widths))}
        order = torch.cat(list(self._of.values()))
        self._back = torch.argsort(order)
        self._upper = {b: w.new_full((w.shape[0], of.numel(), 1), START).requires_grad_(True) for b, of in self._of.items()}
        self._lower = {b: w.new_full((w.shape[0], of.numel(), 1), START).requires_grad_(True) for b, of in self._of.items() if b > 1}
        self._grid = GRIDS["g_sym" if linear.scheme.symmetric else "g_asym"]
        self._dtype = DTYPES[linear.scheme.scale_dtype]
        self._allocation = allocation
        self._notes = list(allocation.notes)

    def parameters(self) -> list[Tensor]:
        return [*self._upper.values(), *self._lower.values()]

    def _groups(self, weight: Tensor, bits: int) -> Tensor:
        return weight.view(weight.shape[0], -1, self._size)[:, self._of[bits]]

    def _limits(self, groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        return scaled_limits(self._grid, groups, torch.sigmoid(self._lower[bits]), torch.sigmoid(self._upper[bits]))

    def _binary(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and mean `[N, G_1, 1]` as stored. The weight is not learned here, so that its sign needs no gradient."""
        scale, mean = (t[..., None] for t in binary(groups, centred=True))
        learned = scale * (torch.sigmoid(self._upper[1]) + 0.5)
        return through(learned, learned.to(self._dtype).to(learned)), mean.to(self._dtype).to(mean)

    def soft(self, weight: Tensor) -> Tensor:
        """`[N, K]` with gradients for the parameters; the values of `hard`."""
        parts = []
        for bits in self._of:
            g = self._groups(weight, bits)
            if bits == 1:
                scale, mean = self._binary(g)
                parts.append((2 * (g >= mean).to(g) - 1) * scale + mean)
            else:
                parts.append(round_through(affine_through(self._grid, *self._limits(g, bits), bits, self._dtype), g))
        return torch.cat(parts, 1)[:, self._back].reshape(weight.shape)

    @torch.no_grad()
    def hard(self, weight: Tensor) -> Rounded:
        """What is stored. Scales that do not fit their type are kept in float32 from then on, noted."""
        try:
            tensor = self._tensor(weight)
        except ScaleDtypeError as e:
            self._dtype = torch.float32
            self._notes.append(f"{e}; scales are stored in float32")
            tensor = self._tensor(weight)
        return Rounded(tensor, damp=self._allocation.damp, notes=list(self._notes), details=dict(self._allocation.details))

    def _tensor(self, weight: Tensor) -> MixedTensor:
        codes, scales, zeros = [], [], []
        means = weight.new_zeros(weight.shape[0], 0)
        for bits in self._of:
            g = self._groups(weight, bits)
            if bits == 1:
                scale, mean = self._binary(g)
                exact, middle = (t[..., None] for t in binary(g, centred=True))
                check_binary(exact * (torch.sigmoid(self._upper[1]) + 0.5), middle, scale, mean)
                codes.append((g >= mean).to(g))
                scales.append(scale)
                zeros.append(torch.zeros_like(scale))
                means = mean[..., 0]
                continue
            a = affine_of(self._grid, *self._limits(g, bits), bits, self._dtype)
            check_stored(a, g, self._dtype)
            codes.append(a.encode(g))
            scales.append(a.scale)
            zeros.append(a.zero)
        back = [torch.cat(t, 1)[:, self._back] for t in (codes, scales, zeros)]
        return MixedTensor(
            codes=back[0].reshape(weight.shape).to(torch.uint8),
            scale=back[1][..., 0].to(self._dtype).contiguous(),
            zero=back[2][..., 0].to(torch.uint8).contiguous(),
            mean=means.to(self._dtype).contiguous(),
            widths=self._widths,
            base=self._scheme.bits,
        )
