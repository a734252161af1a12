"""`rtn_pack`: every group of a weight `[N, K]` rounded to a grid fitted to it, in one pass over memory.

A group is `width` neighbours of the row-major order: so many columns, a row, or the whole weight. Grids, their scales and zeros rounded to
the stored type, and the codes are those of `quant.grids` and `quant.affine` in float32 arithmetic. Every twin has, with the same results
bit for bit,

    rtn_pack(weight, grid, bits, width, scale_dtype, codes=True, stream=True, mse=False, error=False) ▸ Packed

weight: any float type (float64 is rounded to float32 first). `width` divides N K, and K unless it is N K. `codes`, `stream` and `error` say
what is wanted of them. With `mse` ranges are those of least error (`quant.grids`). Nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """What `quant.tensors.affine.AffineTensor` is made of."""

    codes: Tensor | None
    """uint8 `[N, K]`."""
    stream: Tensor | None
    """uint8 `[ceil(N K bits / 8)]`: the codes as they are stored (`quant.tensors.packing`)."""
    scale: Tensor
    """float16 or float32 `[R, G]`; R = 1 for one group in all."""
    zero: Tensor
    """`[R, G]`: uint8 (constant, code), int16 (integer) or like the scale (float, minimum)."""
    told: Tensor
    """int32 `[2]`, on the weight's device: groups whose sum is not finite, which NaN and infinities make so; and groups whose scale or zero
    float16 cannot hold closely enough, counted with float16 only. Codes, scales and zeros of those groups mean nothing."""
    error: Tensor | None = None
    """float64 `[R, G]`: Σ (w − ŵ)² of a group, by what is stored; twins differ by rounding, of float32 at most."""


def shape_of(weight: Tensor, width: int) -> tuple[int, int]:
    """(R, G) of the groups. Raises ValueError for a width that does not fit."""
    n, k = weight.shape
    if width == n * k:
        return 1, 1
    if width < 1 or k % width:
        raise ValueError(f"groups of {width} do not fit a weight of shape {(n, k)}")
    return n, k // width
