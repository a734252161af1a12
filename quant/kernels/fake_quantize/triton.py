"""The rows in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.fake_quantize import RowCodes
from quant.kernels.on_triton import early, interpreted, leave_shared_memory, starts_early, unavailable

__all__ = ["encode", "fake_quantize", "unavailable"]

BLOCK, EACH = 16384, 16
"""Values of a row that are in registers at once, at most, and how many of them a thread has: more where warps would be more than 16."""
EARLY = True
"""Start before what is in front is over, where the device can, and wait for that."""


def fake_quantize(x: Tensor, bits: int, symmetric: bool, clip: float = 1.0) -> Tensor:
    values = _given(x)
    out = torch.empty_like(values)
    none = torch.empty(0, device=x.device)
    _run(values, out, none, none, none, bits, symmetric, clip)
    return out.to(x.dtype)


def encode(x: Tensor, bits: int, symmetric: bool, clip: float = 1.0) -> RowCodes:
    values = _given(x)
    scale, zero = (torch.empty(len(values), 1, device=x.device) for _ in range(2))
    codes = torch.empty(values.shape, dtype=torch.int8, device=x.device)
    sums = torch.empty(len(values), dtype=torch.int32, device=x.device)
    _run(values, codes, scale, zero, sums, bits, symmetric, clip)
    return RowCodes(codes, scale, zero, sums)


def _given(x: Tensor) -> Tensor:
    # As in the reference, float64 is rounded to float32 first.
    given = x.detach().contiguous()
    return given.float() if x.dtype is torch.float64 else given


def _run(values: Tensor, out: Tensor, scale: Tensor, zero: Tensor, sums: Tensor, bits: int, symmetric: bool, clip: float) -> None:
    from quant.kernels.fake_quantize.program import round_rows

    rows, n = values.shape
    if not values.numel():
        return
    block = min(BLOCK, max(16, 1 << (n - 1).bit_length()))
    codes = out.dtype is torch.int8
    made = round_rows[(rows,)](
        values, out, scale, zero, sums, n, clip, float(2**bits - 1), float(2 ** (bits - 1)),
        SYMMETRIC=symmetric, CODES=codes, BLOCK=block, ONCE=block >= n, WHOLE=n % block == 0, FMA=not interpreted(),
        num_warps=warps_for(block), enable_fp_fusion=False, **(early(values.device) if EARLY else {"EARLY": False}),
    )  # fmt: skip
    if codes and starts_early(values.device):
        leave_shared_memory(made.function)


def warps_for(block: int) -> int:
    return min(16, max(1, block // (32 * EACH)))
