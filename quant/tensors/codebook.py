"""The stored format `codebook`: one table of values per input column, columns of different widths, and single weights kept aside.

A column of b bits has a table of 2^b values and N codes into it; a weight kept aside (an outlier) replaces what its code says.
Payload (short name: type, shape), for each width b that occurs, with K_b columns of that width in column order
  codes_b: uint8 bit stream of N K_b codes, row-major `[N, K_b]` · table_b: float16 or float32 `[K_b, 2^b]`
  widths: bit stream of K indices into the widths of the meta; only where more than one occurs
  outliers: float16 or float32 `[M]`, column after column, rows ascending · outlier_counts: `[K]`, uint8, int16 or int32
  outlier_rows: uint8, M row numbers of ceil(log2 N) bits: one bit stream of their lowest 8 bits, then one of the next, and so on
  (these three only where there are outliers)
  input_scale: float16 or float32 `[K]`; only when the weight was multiplied by it and nothing before divides by it
Codes are in the plain column order, so that act-order needs no permutation.
Invariant: `dequantize` is computed from what is stored, so it is the same bits in every process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quant.tensors.base import Coded
from quant.tensors.packing import narrowest, pack_bits, unpack_bits


@dataclass(frozen=True)
class Outliers:
    """Weights kept aside, column after column, rows ascending inside a column."""

    counts: Tensor
    """int64 `[K]`: how many of each column."""
    rows: Tensor
    """int64 `[M]`."""
    values: Tensor
    """float16 or float32 `[M]`."""


@dataclass(frozen=True)
class CodebookTensor(Coded):
    format: ClassVar[str] = "codebook"

    widths: Tensor
    """Bits of each column, int64 `[K]`, 1 to 8."""
    tables: Tensor
    """float16 or float32 `[K, 2^widest]`; zero beyond a column's own 2^width values."""
    label: float
    """The paper's bits per weight."""
    outliers: Outliers | None = None

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        if self.widths.shape != (k,) or self.tables.shape != (k, 2 ** int(self.widths.max())):
            raise ValueError(
                f"codes {(n, k)}, widths {tuple(self.widths.shape)} and tables {tuple(self.tables.shape)} do not belong together"
            )
        o = self.outliers
        if o is not None and (o.counts.shape != (k,) or not int(o.counts.sum()) == o.rows.numel() == o.values.numel()):
            raise ValueError(f"{o.values.numel()} outliers at {o.rows.numel()} rows do not belong to counts of {tuple(o.counts.shape)}")

    @property
    def bits_nominal(self) -> float:
        return self.label

    @property
    def bits_formula(self) -> float:
        """What CLAQ's storage takes, see `bits_formula`."""
        kept = 0 if self.outliers is None else self.outliers.values.numel()
        return bits_formula(self.widths.tolist(), self.shape[0], 8 * self.tables.element_size(), kept)

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.tables.dtype

    def dequantize(self) -> Tensor:
        """float32 `[N, K]`."""
        columns = self.tables.float().gather(1, self.codes.T.long())
        if self.outliers is not None:
            o = self.outliers
            column = torch.repeat_interleave(torch.arange(len(o.counts), device=o.counts.device), o.counts)
            columns[column, o.rows] = o.values.float()
        weight = columns.T.contiguous()
        return self.unscaled(weight)

    def pack(self) -> dict[str, Tensor]:
        n = self.shape[0]
        payload: dict[str, Tensor] = {}
        kinds = _kinds(self.widths)
        for b in kinds:
            mine = self.widths == b
            payload[f"codes_{b}"] = pack_bits(self.codes[:, mine], b)
            payload[f"table_{b}"] = self.tables[mine, : 2**b].contiguous()
        if len(kinds) > 1:
            payload["widths"] = pack_bits(torch.searchsorted(torch.tensor(kinds).to(self.widths), self.widths), _index_bits(len(kinds)))
        if self.outliers is not None:
            payload["outliers"] = self.outliers.values
            payload["outlier_counts"] = self.outliers.counts.to(narrowest(n))
            payload["outlier_rows"] = _pack_wide(self.outliers.rows, _index_bits(n))
        return self.with_scale(payload)

    def meta(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "widths": _kinds(self.widths), "label": self.label}

    @staticmethod
    def unpack(payload: Mapping[str, Tensor], meta: Mapping[str, Any]) -> CodebookTensor:
        """Inverse of `pack` and `meta`; raises ValueError when they do not belong together."""
        (n, k), kinds = meta["shape"], [int(b) for b in meta["widths"]]
        some = payload[f"table_{kinds[0]}"]
        index = torch.zeros(k, dtype=torch.uint8, device=some.device)
        if len(kinds) > 1:
            index = unpack_bits(payload["widths"], _index_bits(len(kinds)), k)
        widths = torch.tensor(kinds, device=some.device)[index.long()]
        codes = torch.empty(n, k, dtype=torch.uint8, device=some.device)
        tables = torch.zeros(k, 2 ** kinds[-1], dtype=some.dtype, device=some.device)
        for b in kinds:
            mine = widths == b
            count = int(mine.sum())
            codes[:, mine] = unpack_bits(payload[f"codes_{b}"], b, n * count).view(n, count)
            tables[mine, : 2**b] = payload[f"table_{b}"]
        outliers = None
        if "outliers" in payload:
            values = payload["outliers"]
            rows = _unpack_wide(payload["outlier_rows"], _index_bits(n), values.numel())
            outliers = Outliers(payload["outlier_counts"].long(), rows, values)
        return CodebookTensor(codes, widths, tables, float(meta["label"]), outliers, input_scale=payload.get("input_scale"))


def bits_formula(widths: Sequence[int], n: int, value_bits: int, outliers: int = 0) -> float:
    """mean b_j + sum_j 2^(b_j) s / (N K) + outliers (s + ceil(log2 N)) / (N K), with s = 16 for float16.

    CLAQ's "2.12" (2.05 bits of codes, 0.5 % of the weights kept at each end) at 4096 x 4096: 2.35. Beside it a column stores its width's
    index and its number of outliers: less than one machine word."""
    weights = n * len(widths)
    tables = sum(1 << b for b in widths) * value_bits
    return sum(widths) / len(widths) + (tables + outliers * (value_bits + (n - 1).bit_length())) / weights


def _kinds(widths: Tensor) -> list[int]:
    return [int(b) for b in torch.unique(widths)]


def _index_bits(count: int) -> int:
    return max(1, (count - 1).bit_length())


def _pack_wide(values: Tensor, bits: int) -> Tensor:
    """One bit stream after the other: of the lowest 8 bits of all values, of the next 8, and so on."""
    parts = [pack_bits(values >> at & 255, min(8, bits - at)) for at in range(0, bits, 8)]
    return torch.cat(parts)


def _unpack_wide(stream: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `_pack_wide`: int64 `[count]`."""
    values = torch.zeros(count, dtype=torch.int64, device=stream.device)
    start = 0
    for at in range(0, bits, 8):
        width = min(8, bits - at)
        length = (count * width + 7) // 8
        values |= unpack_bits(stream[start : start + length], width, count).long() << at
        start += length
    return values
