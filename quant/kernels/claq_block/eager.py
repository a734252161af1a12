"""Column by column in torch operations, with k-means by whichever twin works best; any device and float type."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.errors import ScaleDtypeError
from quant.kernels import kernel
from quant.kernels.claq_block import REASONS, Found, SolvedBlock, Wanted
from quant.kernels.kmeans_columns import unfit


def solve_block(block: Tensor, upper: Tensor, wanted: Wanted, out: SolvedBlock) -> Found:
    """Raises ScaleDtypeError on a CPU."""
    run = _Block(block, wanted)
    for j in range(len(block)):
        out.codes[j], out.values[j] = run.round_column(j, block[j])
        torch.sub(block[j], out.values[j], out=out.errors[j]).div_(upper[j, j])
        # A product, then a difference, each rounded: what fuses them on a CPU does so in some places only, depending on its vectors.
        block[j + 1 :].sub_(torch.outer(upper[j, j + 1 :], out.errors[j]))
    kept = None if wanted.tails is None else torch.stack(run.kept)
    return Found(run.tables, kept, None if block.device.type == "cpu" else run.wrong)


class _Block:
    def __init__(self, block: Tensor, wanted: Wanted) -> None:
        self.wanted = wanted
        self.kmeans = kernel("kmeans_columns", device=block.device).run
        self.tables = torch.zeros(len(block), 2 ** max(wanted.widths), dtype=wanted.dtype, device=block.device)
        self.kept: list[Tensor] = []
        self.wrong = torch.zeros(2, dtype=torch.bool, device=block.device)

    def round_column(self, j: int, column: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values `[N]`."""
        k = 2 ** self.wanted.widths[j]
        given = self.wanted.centres
        centres = self.kmeans.kmeans(column[None], k, self.wanted.start) if given is None else given[j : j + 1, :k]
        table = centres.to(self.wanted.dtype)
        self._check(centres, table)
        stored = table.to(column)
        codes = self.kmeans.nearest(column[None], stored)[0]
        values = stored[0][codes.long()]
        self.tables[j, :k] = table[0]
        return codes, values if self.wanted.tails is None else self._with_kept(column, values, *self.wanted.tails[j])

    def _with_kept(self, column: Tensor, values: Tensor, top: int, bottom: int) -> Tensor:
        """The values, those at both ends as they are, in the stored type."""
        mask = column >= column.topk(top).values[-1]
        if bottom:
            mask |= column <= column.topk(bottom, largest=False).values[-1]
        exact = column.to(self.wanted.dtype).to(values)
        self._refuse(1, ~torch.isfinite(exact).all())
        same = exact == values
        # Equal weights, or as few as the table holds, need no reserving.
        mask &= ~(same & (same.all() | (mask.sum() > top + bottom)))
        self.kept.append(mask)
        return torch.where(mask, exact, values)

    def _check(self, centres: Tensor, table: Tensor) -> None:
        if self.wanted.dtype is not torch.float32:
            self._refuse(0, unfit(centres, table)[0])

    def _refuse(self, reason: int, wrong: Tensor) -> None:
        """At once on a CPU; on a GPU at the end, since asking waits for all that was started."""
        if wrong.device.type != "cpu":
            self.wrong[reason] |= wrong
        elif bool(wrong):
            raise ScaleDtypeError(REASONS[reason])
