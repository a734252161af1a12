"""The update by halves, on the host's side: three products of float16 each, for products over many columns, which pay for splitting the
operands once, in memory.

A power of two brings the largest number of each row of `left` and of each column of `right` to 2^14 or more, less than 2^15; it is the sum
of two of float16, but for 2^-23 of it, and the product of the two smaller parts, 2^-22 of |left| |right| at most, is left out: 8 u, u =
2^-24, with which B sums of float32 are within (B + 8) u Σ |left| |right|. Float16 ends at 2^-24: numbers below 2^-17 of the largest one of
their row or column are taken to within 2^-39 of that, which adds Σ (|left| max |right| + max |left| |right|) 2^-39 to the error. Numbers
that are not finite make their row or column not finite.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from quant.kernels.lazy_update import Tile

WIDE, WARPS = 32, 8
"""Numbers of a row of the factor, or of errors, that a program splits."""
MOST = 1024
"""Columns: a program holds that many times WIDE numbers."""


def lazy_update(later: Tensor, left: Tensor, right: Tensor, tile: Tile) -> None:
    """As the package has it; rows of later and right are contiguous."""
    from quant.kernels.lazy_update.program_halves import split, update_by_halves

    (r, n), b = later.shape, left.shape[1]
    if b > MOST:
        raise ValueError(f"by halves a product is over at most {MOST} columns, not {b}; Tile(halves=False) takes more")
    padded = -(-b // tile.step) * tile.step
    # Rows that the copy engine reads begin at multiples of 16 bytes.
    lefts, rights = (later.new_empty(2 * padded, -(-size // 8) * 8, dtype=torch.float16) for size in (r, n))
    back = later.new_empty(r + n)
    left_back, right_back = back[n:], back[:n]
    of_right, of_left = -(-n // WIDE), -(-r // WIDE)
    split[(of_right + of_left,)](
        left, right, lefts, rights, left_back, right_back, r, n,
        left.stride(0), left.stride(1), right.stride(0), lefts.stride(0), rights.stride(0), of_right,
        B=b, PADDED=padded, TALL=max(16, 1 << (padded - 1).bit_length()), WIDE=WIDE, num_warps=WARPS,
    )  # fmt: skip
    tops, asides = -(-r // tile.rows), -(-n // tile.columns)
    shape = {"PADDED": padded, "ROWS": tile.rows, "COLUMNS": tile.columns, "STEP": tile.step, "num_warps": tile.warps}
    if not tile.gluon:
        update_by_halves[(tops, asides)](
            later, lefts, rights, left_back, right_back, r, n, later.stride(0), lefts.stride(0), rights.stride(0), **shape,
            num_stages=tile.stages,
        )  # fmt: skip
        return
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from quant.kernels.lazy_update.hopper_halves import update_by_halves as on_hopper

    described = [
        TensorDescriptor.from_tensor(parts, [tile.step, wide], _layout()) for parts, wide in ((lefts, tile.rows), (rights, tile.columns))
    ]
    on_hopper[(tops, asides)](
        later, *described, left_back, right_back, r, n, later.stride(0), **shape, STAGES=tile.stages, WARPS=tile.warps
    )


@cache
def _layout() -> Any:
    """Of a descriptor's blocks in shared memory."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
