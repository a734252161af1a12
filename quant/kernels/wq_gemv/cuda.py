"""The product in CUDA C++ (`quant/csrc/wq_gemv.cu`), on tensor cores: one launch, that no host waits for.

Up to 16 rows of bfloat16 go through the codes at once; a row of float32, or one that an input scale divides, counts as three, and up to 4
go at once where there are more than 8, else 2. A row of out is the same bit for bit however many rows x has."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor

from quant.kernels import on_cuda
from quant.kernels.products import written_to
from quant.kernels.wq_gemv import Packed
from quant.kernels.wq_gemv.fragments import prepare

__all__ = ["MOST_ROWS", "prepare", "unavailable", "values", "wq_gemv"]

MOST_ROWS = 16
"""Of x, in a call."""
EARLY = True
"""Let a product begin while the kernel before it still runs, where the device can: it fetches codes, and waits for the rest."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

unavailable = partial(on_cuda.unavailable, "wq_gemv")


def wq_gemv(x: Tensor, packed: Packed, out: Tensor | None = None) -> Tensor:
    """`[M, N]` in the type of x; products are added up in float32."""
    made = written_to(x, packed.shape, out, MOST_ROWS)
    given = x.detach().contiguous()
    if given.data_ptr() % 16:
        given = given.clone()
    words, ranges, half = _read(packed)
    scale = 0 if packed.input_scale is None else packed.input_scale.contiguous()
    n, k = packed.shape
    numbers = (n, k, packed.groups, packed.bits, x.shape[0], half, int(x.dtype is torch.bfloat16), _early(x.device))
    on_cuda.call("wq_gemv", "bitgrid_wq_gemv", words, ranges, given, scale, made, *numbers)
    return made


def values(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.empty(packed.shape, dtype=dtype if dtype in KINDS else torch.float32, device=packed.words.device)
    words, ranges, half = _read(packed)
    n, k = packed.shape
    on_cuda.call("wq_gemv", "bitgrid_wq_values", words, ranges, made, n, k, packed.groups, packed.bits, half, KINDS[made.dtype])
    return made.to(dtype)


def _read(packed: Packed) -> tuple[Tensor, Tensor, int]:
    """Words, ranges, and 1 where those are float16. Raises ValueError for the layout of other twins."""
    if packed.words.dim() != 3:
        raise ValueError(f"words are {tuple(packed.words.shape)}, laid out for other backends; use what this one's prepare returns")
    return packed.words.contiguous(), packed.ranges.contiguous(), int(packed.ranges.dtype is torch.float16)


@cache
def _early(device: torch.device) -> int:
    return int(EARLY and torch.cuda.get_device_capability(device) >= (9, 0))
