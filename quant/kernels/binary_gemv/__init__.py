"""`binary_gemv`: a few rows of activations times a weight of signs with second signs in salient columns (BiLLM).

What holds for every product with a packed weight: `quant.kernels.products`. The weight is a `BinaryTensor`, in blocks of columns that are
a multiple of 8. `reference` takes any binary tensor.

A row has eight values in a block: ±scale + mean of its lower and its upper half in plain columns, and ±scale ±second scale + mean in
salient ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.accounting import size_bytes
from quant.kernels.wq_gemv import LANES, laid_out, read_out
from quant.tensors.binary import BinaryTensor, decode

BITS, UNIT = 2, 128
"""Of a weight; columns whose bits lie in one word of each of eight lanes."""
PLAIN, SALIENT = 0, 4
"""Where a row's values for the two kinds of columns begin."""


@dataclass(frozen=True)
class Packed:
    """As `prepare` below lays it out; `quant.kernels.binary_gemv.digits` has its own tables and salient columns."""

    words: Tensor
    """int32 `[T, U, 1, 8, 8]`, laid out as codes of 2 bits in `quant.kernels.wq_gemv`: the sign, and above it the second sign or the
    half."""
    tables: Tensor
    """float32 `[T, B, 8, 8]`: of a tile's rows, the values of codes 0 to 3 in plain columns of the block, then in salient ones."""
    salient: Tensor
    """int32 `[U · 128]`: 4 for a salient column, 0 for another."""
    largest: Tensor
    """float32 `[T, 8]`: of the magnitudes of a row's values in all blocks, the largest."""
    input_scale: Tensor | None
    """float32 `[K]`."""
    shape: tuple[int, int]
    """(N, K)."""
    block: int
    """Columns."""

    @property
    def has_digits(self) -> bool:
        return self.tables.dim() == 5

    @property
    def bytes(self) -> int:
        return size_bytes(self.words, self.tables, self.salient, self.largest, self.input_scale)

    @property
    def read(self) -> int:
        """Bytes of the weight that a call reads; of tables of digits the half that one with bfloat16 inputs reads."""
        return self.bytes - (self.tables[1].nbytes if self.has_digits else 0)

    def values(self, dtype: torch.dtype) -> Tensor:
        """`[N, K]` before the input scale."""
        n, k = self.shape
        tables, salient = self.tables, self.salient
        if self.has_digits:
            from quant.kernels.binary_gemv.digits import salient_of, values_of

            tables, salient = values_of(tables, self.largest), salient_of(salient)
        entry = read_out(self.words, BITS, self.shape).long() + salient[:k]
        block = torch.arange(k, device=entry.device) // self.block
        rows = tables.permute(0, 2, 1, 3).reshape(-1, tables.shape[1], 8)[:n]
        return rows[torch.arange(n, device=entry.device)[:, None], block, entry].to(dtype)


def check(packed: Packed) -> None:
    """Raises ValueError for what `prepare` has not laid out: tables of digits."""
    if packed.has_digits:
        raise ValueError("tables are laid out for other backends; this one takes those of quant.kernels.binary_gemv")


def prepare(tensor: BinaryTensor) -> Packed:
    """The same flags, laid out anew. Raises ValueError for blocks that are no multiple of 8 columns."""
    n, k = tensor.shape
    if tensor.block_size % LANES:
        raise ValueError(f"blocks of {tensor.block_size} columns; the packed layout takes multiples of {LANES}: use backend=reference")
    codes = tensor.signs.to(torch.uint8) | (tensor.second | tensor.split).to(torch.uint8) << 1
    tables = pad(
        torch.stack([_value(tensor, code, kind) for kind in (PLAIN, SALIENT) for code in range(4)], dim=2), (0, 0, 0, 0, 0, -n % LANES)
    )
    tables = tables.view(-1, LANES, tables.shape[1], 8).transpose(1, 2).contiguous()
    salient = pad(tensor.salient.to(torch.int32) * SALIENT, (0, -k % UNIT))
    scale = None if tensor.input_scale is None else tensor.input_scale.float()
    return Packed(laid_out(codes, BITS), tables, salient, tables.abs().amax(dim=(1, 3)), scale, (n, k), tensor.block_size)


def _value(tensor: BinaryTensor, code: int, kind: int) -> Tensor:
    """float32 `[N, B]`: what `dequantize` makes of a code."""
    n, blocks = tensor.scale.shape[:2]
    rows = n * blocks
    sign, upper = (torch.full((rows, 1), bool(code >> i & 1), device=tensor.scale.device) for i in range(2))
    salient = torch.full((1,), kind == SALIENT, device=tensor.scale.device)
    mean = None if tensor.mean is None else tensor.mean.float().view(rows, 3)
    return decode(sign, upper & salient, upper & ~salient, salient, tensor.scale.float().view(rows, 4), mean).view(n, blocks)
