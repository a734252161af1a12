"""The block in Triton, float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.affine import Affine
from quant.kernels.gptq_block import GRID_NUMBERS, KINDS, Fits, SolvedBlock
from quant.kernels.on_triton import unavailable

__all__ = ["solve_block", "unavailable"]

ROWS = 32
"""Of a program: with 128 columns 32 registers of each of its 128 threads."""


def solve_block(
    block: Tensor, upper: Tensor, affine: Affine, group: list[int], out: SolvedBlock | None = None, fits: Fits | None = None
) -> SolvedBlock:
    from quant.kernels.gptq_block.program import solve

    if fits is not None:
        fits.check(block, affine)
    w = block.contiguous()
    tops = affine.scale if affine.tops is None else affine.tops
    u, scale, zero, tops = (t.to(w).contiguous() for t in (upper, affine.scale, affine.zero, tops))
    out = SolvedBlock.like(w) if out is None else out
    b, n = w.shape
    rows = torch.tensor(group, dtype=torch.int32, device=w.device)
    words, odd, grids = (rows, rows, 0) if fits is None else (fits.words, fits.odd, _grids(fits))
    columns = max(16, 1 << (b - 1).bit_length())
    grid = (-(-n // ROWS),)
    solve[grid](
        w, u, scale, zero, tops, rows, words, odd, out.codes, out.values, out.errors, n, b, float(affine.top),
        EACH=affine.tops is not None, KIND=KINDS.get(affine.kind, 0), GRIDS=grids, ROWS=ROWS, COLUMNS=columns, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _grids(fits: Fits) -> int:
    """Two bits for each grid: found in float32, found in float16."""
    grids = 0
    for part in fits.parts:
        if part.width:
            grids |= 1 << 2 * GRID_NUMBERS.index(part.grid) + part.half
    return grids
