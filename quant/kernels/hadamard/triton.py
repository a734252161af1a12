"""The transform in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels import kernel
from quant.kernels.fake_quantize import RowCodes
from quant.kernels.hadamard.matrices import factors, small
from quant.kernels.on_triton import interpreted, unavailable

__all__ = ["encode", "held", "shape", "transform", "unavailable"]

MOST, MOST_PRODUCT = 16384, 32768
"""Values a program holds in registers, m rounded up to a power of two: of Sylvester's and of codes; of products with a small factor. Longer
rows are transformed in parts, and the parts then with each other."""
FEW = 2048
"""Values of rows that a program takes together."""
STEP = 16


def held(m: int, width: int, codes: bool) -> bool:
    """Whether a program holds a row of m · width values."""
    return _up(m) * width <= (MOST if codes or m == 1 else MOST_PRODUCT)


def shape(m: int, width: int, codes: bool) -> dict[str, int]:
    """Constants of the program for such rows, and its warps."""
    high = _up(m)
    # A product of matrices has 16 columns at least.
    rows = max(1, min(FEW // (high * width), 64), -(-16 // width) if m > 1 else 1)
    warps = max(1, min(16, high * width * rows // (256 if codes else 512)))
    return {"M": high, "W": width, "LOG": width.bit_length() - 1, "ROWS": rows, "STEP": STEP, "num_warps": warps}


def _up(m: int) -> int:
    return 1 << (m - 1).bit_length()


def transform(x: Tensor, factor: float = 1.0, transpose: bool = False) -> Tensor:
    rows, n = x.shape
    m, width = factors(n)
    wide = x.dtype is torch.float64
    if m > 1 and wide:
        # Tensor cores for float64 are not everywhere: torch multiplies by the small factor, and the record says so.
        made: Tensor = kernel("hadamard", "reference", x.device).run.transform(x, factor, transpose)
        return made
    if held(m, width, False):
        out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
        none = torch.empty(0, device=x.device)
        # Triton takes numbers as float32.
        _run(x, out, (none, none, none), 1.0 if wide else factor, transpose)
        return out.mul_(factor) if wide else out
    # In float32 between the two: 16 bits would round twice, and unscaled sums leave float16.
    given = x if wide else x.float()
    within = width if m > 1 and width <= MOST else MOST
    parts = transform(given.reshape(-1, within)).view(rows, -1, within).transpose(1, 2)
    across = transform(parts.reshape(rows * within, -1), factor, transpose)
    return across.view(rows, within, -1).transpose(1, 2).reshape(rows, n).to(x.dtype)


def encode(x: Tensor, bits: int, symmetric: bool, clip: float = 1.0, factor: float = 1.0, transpose: bool = False) -> RowCodes:
    rows, n = x.shape
    if not held(*factors(n), True) or x.dtype is torch.float64:
        # A row is in no program as a whole, or is rounded to float32 first: a second kernel makes its codes.
        made: RowCodes = kernel("fake_quantize", device=x.device).run.encode(transform(x, factor, transpose), bits, symmetric, clip)
        return made
    scale, zero = (torch.empty(rows, 1, device=x.device) for _ in range(2))
    sums = torch.empty(rows, dtype=torch.int32, device=x.device)
    codes = torch.empty(rows, n, dtype=torch.int8, device=x.device)
    _run(x, codes, (scale, zero, sums), factor, transpose, clip, bits, symmetric)
    return RowCodes(codes, scale, zero, sums)


def _run(
    x: Tensor, out: Tensor, told: tuple[Tensor, Tensor, Tensor], factor: float, transpose: bool,
    clip: float = 1.0, bits: int = 8, symmetric: bool = True,
) -> None:  # fmt: skip
    from quant.kernels.hadamard.program import transform as program

    rows, n = x.shape
    if not rows:
        return
    m, width = factors(n)
    # The interpreter multiplies no bfloat16.
    kind = torch.float32 if x.dtype is torch.bfloat16 and interpreted() else x.dtype
    by = small(m, transpose, kind, x.device).contiguous() if m > 1 else told[0]
    constants = shape(m, width, out.dtype is torch.int8)
    grid = (-(-rows // constants["ROWS"]),)
    program[grid](
        x.contiguous(), out, by, *told, rows, m, factor, clip, float(2**bits - 1), float(2 ** (bits - 1)),
        **constants, CODES=out.dtype is torch.int8, SYMMETRIC=symmetric, FMA=not interpreted(), enable_fp_fusion=False,
    )  # fmt: skip
