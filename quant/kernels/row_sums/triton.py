"""In Triton: one pass over the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.on_triton import unavailable

__all__ = ["row_sums", "unavailable"]

ROWS, COLUMNS, WARPS = 4, 512, 4


def row_sums(bits: Tensor, odd: Tensor) -> Tensor:
    from quant.kernels.row_sums.program import sum_rows

    r, c = bits.shape
    out = torch.empty(r, dtype=torch.int64, device=bits.device)
    if r:
        sum_rows[(-(-r // ROWS),)](bits, odd, out, r, c, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS)
    return out
