"""The groups in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.grids import GRIDS
from quant.kernels import kernel
from quant.kernels.on_triton import interpreted, unavailable
from quant.kernels.rtn_pack import Packed, shape_of
from quant.tensors.packing import pack_bits

__all__ = ["rtn_pack", "unavailable"]

LONGEST, AT_ONCE = 512, 4096
"""A group up to this is held in registers; of a longer one so many weights at a time."""
WARPS, WARPS_OF_LONG = 4, 8
WHOLE = 32
"""Codes whose bits are whole words, whatever their number."""
HELD, HELD_WITH_CODES = 32, 64
"""Weights of one group that a thread holds at most."""


def rtn_pack(
    weight: Tensor,
    grid: str,
    bits: int,
    width: int,
    scale_dtype: torch.dtype,
    codes: bool = True,
    stream: bool = True,
    mse: bool = False,
    error: bool = False,
) -> Packed:
    if mse:
        # Torch searches: the record says so.
        plain: Packed = kernel("rtn_pack", "reference", weight.device).run.rtn_pack(
            weight, grid, bits, width, scale_dtype, codes, stream, mse, error
        )
        return plain
    from quant.kernels.rtn_pack.program import long_groups, whole_groups

    shape = shape_of(weight, width)
    given = weight.detach().contiguous()
    given = given.float() if weight.dtype is torch.float64 else given
    scale = given.new_empty(shape, dtype=scale_dtype)
    zero = given.new_empty(shape, dtype=GRIDS[grid].zero.dtype(scale_dtype))
    told = torch.zeros(2, dtype=torch.int32, device=given.device)
    off = torch.zeros(shape if error else 0, device=given.device)
    # The program packs whole words only. Codes of 8 bits are their own stream.
    packs = stream and bits < 8 and width % WHOLE == 0
    apart = stream and not packs
    made = torch.empty(given.shape, dtype=torch.uint8, device=given.device) if codes or apart else given.new_empty(0, dtype=torch.uint8)
    streamed = torch.empty(given.numel() * bits // 8 if packs else 0, dtype=torch.uint8, device=given.device)
    if given.numel():
        half = scale_dtype is torch.float16
        steps = 2 ** (bits - 1) - 1 if grid in ("q_sym", "absmax") else 2**bits - 1
        same = {"GRID": grid, "BITS": bits, "WIDTH": width, "HALF": half, "CODES": codes or apart, "STREAM": packs}
        same |= {"FAST": half and given.dtype is not torch.float32, "FMA": not interpreted(), "ERROR": error}
        groups = scale.numel()
        arguments = (given, made, streamed, scale, zero, told, off)
        # What the compiler gives a thread side by side: 16 bytes of the weight, or of the codes.
        each, held = (16, HELD_WITH_CODES) if codes or apart else (16 // given.element_size(), HELD)
        if width <= LONGEST:
            wide = 1 << (width - 1).bit_length()
            part = max(WHOLE, wide * each // held)
            rows = WARPS * 32 * each // part
            whole_groups[(-(-groups // rows),)](
                *arguments, groups, float(2**bits - 1), float(steps), **same, PARTS=max(1, wide // part), PART=part, ROWS=rows,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        else:
            long_groups[(groups,)](
                *arguments, float(2**bits - 1), float(steps), **same, PART=AT_ONCE, num_warps=WARPS_OF_LONG, enable_fp_fusion=False
            )
    whole = made if codes or apart else None
    if apart and whole is not None:
        streamed = whole.view(-1) if bits == 8 else pack_bits(whole, bits)
    return Packed(whole if codes else None, streamed if stream else None, scale, zero, told, off.double() if error else None)
