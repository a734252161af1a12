"""The block in Triton, float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.affine import Affine
from quant.kernels.gptq_block import KINDS, SolvedBlock
from quant.kernels.on_triton import unavailable

__all__ = ["solve_block", "unavailable"]

ROWS = 32
"""Of a program: with 128 columns 32 registers of each of its 128 threads."""


def solve_block(block: Tensor, upper: Tensor, affine: Affine, group: list[int], out: SolvedBlock | None = None) -> SolvedBlock:
    from quant.kernels.gptq_block.program import solve

    w = block.contiguous()
    tops = affine.scale if affine.tops is None else affine.tops
    u, scale, zero, tops = (t.to(w).contiguous() for t in (upper, affine.scale, affine.zero, tops))
    out = SolvedBlock.like(w) if out is None else out
    b, n = w.shape
    rows = torch.tensor(group, dtype=torch.int32, device=w.device)
    columns = max(16, 1 << (b - 1).bit_length())
    grid = (-(-n // ROWS),)
    solve[grid](
        w, u, scale, zero, tops, rows, out.codes, out.values, out.errors, n, b, float(affine.top),
        EACH=affine.tops is not None, KIND=KINDS.get(affine.kind, 0), ROWS=ROWS, COLUMNS=columns, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
