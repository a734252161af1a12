"""`lut_gemv`: a few rows of activations times a weight with a table of values for each input column (CLAQ's codebooks).

What holds for every product with a packed weight: `quant.kernels.products`. The weight is a `CodebookTensor`; columns of 1 to 4 bits, all
of one width or not. `reference` takes any codebook tensor; `cuda` lays codes out in a way of its own (`fragments`).

On a CPU x folds into the tables: with T_k[c] = x_k · table_k[c] a row of the result is Σ_k T_k[code], which multiplies nothing by a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.accounting import size_bytes
from quant.tensors.codebook import CodebookTensor

MOST_BITS = 4
ROWS = 32
"""Whose words are neighbours in memory."""


@dataclass(frozen=True)
class Part:
    """The columns of one width."""

    words: Tensor
    """int32 `[T, W, 32]`: tiles of 32 rows, padded with zeros. A word has 32 // bits codes of as many columns of one row, the first
    lowest. Of `cuda`: `fragments.prepare`."""
    values: Tensor
    """float32 `[C, 2^bits]`. Of `cuda`: `fragments.LanesPart`."""
    columns: Tensor
    """int64 `[C]`: of x."""
    bits: int

    @property
    def bytes(self) -> int:
        return size_bytes(self.words, self.values, self.columns)

    @property
    def read(self) -> int:
        """Bytes that a call reads."""
        return self.bytes


@dataclass(frozen=True)
class Apart:
    """Weights kept aside, as differences from what their codes say, row after row."""

    starts: Tensor
    """int64 `[N + 1]`."""
    columns: Tensor
    """int32 `[count]`."""
    differences: Tensor
    """float32 `[count]`."""


@dataclass(frozen=True)
class Packed:
    parts: tuple[Part, ...]
    apart: Apart | None
    input_scale: Tensor | None
    """float32 `[K]`."""
    shape: tuple[int, int]
    """(N, K)."""

    @property
    def bytes(self) -> int:
        kept = () if self.apart is None else (self.apart.starts, self.apart.columns, self.apart.differences)
        return sum(p.bytes for p in self.parts) + size_bytes(*kept, self.input_scale)

    @property
    def read(self) -> int:
        """Bytes of the weight that a call reads."""
        return self.bytes - sum(p.bytes - p.read for p in self.parts)

    def values(self, dtype: torch.dtype) -> Tensor:
        """`[N, K]` before the input scale."""
        n, k = self.shape
        weight = torch.zeros(n, k, dtype=dtype, device=self.parts[0].words.device)
        for part in self.parts:
            per_word = 32 // part.bits
            at = torch.arange(per_word, device=part.words.device) * part.bits
            codes = (part.words[..., None] >> at) & (2**part.bits - 1)  # [T, W, 32, codes]
            codes = codes.permute(0, 2, 1, 3).reshape(-1, part.words.shape[1] * per_word)[:n, : len(part.columns)]
            weight[:, part.columns] = part.values.to(dtype).gather(1, codes.T.long()).T
        return self.with_apart(weight)

    def with_apart(self, weight: Tensor) -> Tensor:
        """`weight` `[N, K]` of the codes alone, with the weights kept aside put right in place."""
        if self.apart is not None:
            row = torch.repeat_interleave(torch.arange(len(weight), device=weight.device), self.apart.starts.diff())
            weight[row, self.apart.columns.long()] += self.apart.differences.to(weight)
        return weight


def laid_out_as(packed: Packed, side: int, of_each_bit: bool) -> tuple[Part, ...]:
    """Parts whose words lie by `side` together, or by as many for each bit. Raises ValueError where they are laid out for others."""
    for part in packed.parts:
        if part.words.dim() != 3 or part.words.shape[2] != side * (part.bits if of_each_bit else 1):
            raise ValueError(f"words are {tuple(part.words.shape)}, laid out for other backends; use what this one's prepare returns")
    return packed.parts


def side_by_side(packed: Packed) -> tuple[Part, ...]:
    """Parts, as `prepare` lays them out. Raises ValueError for others."""
    return laid_out_as(packed, ROWS, False)


def prepare(tensor: CodebookTensor) -> Packed:
    """The same codes, laid out anew. Raises ValueError for wider columns."""
    widest = int(tensor.widths.max())
    if widest > MOST_BITS:
        raise ValueError(f"columns of {widest} bits; the packed layout has 1 to {MOST_BITS}: use backend=reference")
    parts = tuple(_part(tensor, int(b)) for b in torch.unique(tensor.widths))
    return Packed(parts, apart_of(tensor), None if tensor.input_scale is None else tensor.input_scale.float(), tensor.shape)


def _part(tensor: CodebookTensor, bits: int) -> Part:
    columns = (tensor.widths == bits).nonzero()[:, 0]
    n, per_word = tensor.shape[0], 32 // bits
    codes = pad(tensor.codes[:, columns].to(torch.int32), (0, -len(columns) % per_word, 0, -n % ROWS))
    codes = codes.reshape(-(-n // ROWS), ROWS, -1, per_word)
    words = torch.zeros(codes.shape[:3], dtype=torch.int32, device=codes.device)
    for i in range(per_word):
        words |= codes[..., i] << i * bits
    return Part(words.transpose(1, 2).contiguous(), tensor.tables[columns, : 2**bits].float().contiguous(), columns, bits)


def apart_of(tensor: CodebookTensor) -> Apart | None:
    """The weights of a tensor that are kept aside, where there are any."""
    outliers = tensor.outliers
    if outliers is None:
        return None
    n, k = tensor.shape
    column = torch.repeat_interleave(torch.arange(k, device=outliers.rows.device), outliers.counts)
    instead = tensor.tables[column].gather(1, tensor.codes[outliers.rows, column][:, None].long())[:, 0]
    differences = outliers.values.float() - instead.float()
    order = torch.argsort(outliers.rows, stable=True)
    starts = pad(torch.bincount(outliers.rows, minlength=n).cumsum(0), (1, 0))
    return Apart(starts, column[order].to(torch.int32), differences[order].contiguous())
