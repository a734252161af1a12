"""In Triton: torch's copy reads lines of memory for single numbers of them."""

from __future__ import annotations

from torch import Tensor

from quant.kernels.on_triton import unavailable

__all__ = ["turned", "unavailable"]

ROWS, COLUMNS, WARPS = 128, 64, 8


def turned(source: Tensor, out: Tensor) -> None:
    from quant.kernels.turned.program import turn

    r, c = source.shape
    if out.shape != (c, r) or (out.numel() and out.stride(1) != 1):
        raise ValueError(f"out has shape {tuple(out.shape)} and strides {out.stride()}; it is to be {(c, r)} with contiguous rows")
    if source.numel():
        given = source if source.stride(1) == 1 else source.contiguous()
        turn[(-(-r // ROWS), -(-c // COLUMNS))](
            given, out, r, c, given.stride(0), out.stride(0), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
        )  # fmt: skip
