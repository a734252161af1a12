"""`row_lut_gemv`: a few rows of activations times a weight with a table of values for each output row (SqueezeLLM's codebooks).

What holds for every product with a packed weight: `quant.kernels.products`. The weight is a `RowCodebookTensor`: 2 to 4 bits, tables in
float16 or float32. All twins take all of them.

`lut_gemv` has tables of columns, into which x folds, the same for all rows. Here a table is a row's own: a lane that has a row has a table
too, and a lookup gives a weight (in CUDA two of them), which is then multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.accounting import size_bytes
from quant.tensors.row_codebook import RowCodebookTensor

ROWS = 32
"""Whose words, and values of one code, are neighbours in memory."""
UNIT = 32
"""Columns whose codes fill whole words."""


@dataclass(frozen=True)
class Packed:
    words: Tensor
    """int32 `[T, U, bits, 32]`: tiles of 32 rows and units of 32 columns, padded with zeros. The words of a row's unit are the bit stream
    of its codes, lowest bit first: code j has the bits from j · bits on."""
    tables: Tensor
    """float16 or float32 `[T, 2^bits, 32]`; zeros for rows that there are not."""
    input_scale: Tensor | None
    """float32 `[K]`."""
    shape: tuple[int, int]
    """(N, K)."""
    bits: int

    @property
    def bytes(self) -> int:
        """What a call reads of the weight."""
        return size_bytes(self.words, self.tables, self.input_scale)

    def codes(self) -> Tensor:
        """int64 `[T, U · 32, 32]`: columns, then rows of a tile."""
        parts = []
        for j in range(UNIT):
            word, at = divmod(j * self.bits, 32)
            code = (self.words[:, :, word].long() & 0xFFFFFFFF) >> at
            if at + self.bits > 32:
                code = code | (self.words[:, :, word + 1].long() << 32 - at)
            parts.append(code & 2**self.bits - 1)
        return torch.stack(parts, dim=2).flatten(1, 2)

    def values(self, dtype: torch.dtype) -> Tensor:
        """`[N, K]` before the input scale."""
        n, k = self.shape
        return self.tables.to(dtype).gather(1, self.codes()).transpose(1, 2).flatten(0, 1)[:n, :k].contiguous()


def prepare(tensor: RowCodebookTensor) -> Packed:
    """The same codes and tables, laid out anew."""
    (n, k), bits = tensor.shape, tensor.bits
    codes = pad(tensor.codes, (0, -k % UNIT, 0, -n % ROWS)).to(torch.int32)
    codes = codes.view(-1, ROWS, (k + UNIT - 1) // UNIT, UNIT).permute(0, 2, 3, 1)  # [T, U, columns, rows]
    words = codes.new_zeros(*codes.shape[:2], bits, ROWS)
    for j in range(UNIT):
        word, at = divmod(j * bits, 32)
        words[:, :, word] |= codes[:, :, j] << at
        if at + bits > 32:
            words[:, :, word + 1] |= codes[:, :, j] >> 32 - at
    tables = pad(tensor.tables, (0, 0, 0, -n % ROWS)).view(-1, ROWS, 2**bits).transpose(1, 2).contiguous()
    return Packed(words, tables, None if tensor.input_scale is None else tensor.input_scale.float(), tensor.shape, bits)
