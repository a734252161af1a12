"""The stored format `row_codebook`: one table of values per output row.

Payload (short name: type, shape)
  codes: uint8 bit stream of N K codes of `bits` bits, row-major `[N, K]` · tables: float16 or float32 `[N, 2^bits]`
  input_scale: float16 or float32 `[K]`; only when the weight was multiplied by it and nothing before divides by it
Invariant: `dequantize` is computed from what is stored, so it is the same bits in every process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quant.tensors.base import Coded
from quant.tensors.packing import pack_bits, unpack_bits

BITS = (2, 3, 4)


@dataclass(frozen=True)
class RowCodebookTensor(Coded):
    format: ClassVar[str] = "row_codebook"

    tables: Tensor
    """float16 or float32 `[N, 2^bits]`."""
    bits: int
    """2 to 4."""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"codes of {self.bits} bits; tables of rows are for {', '.join(map(str, BITS))}")
        n, k = self.codes.shape
        if self.tables.shape != (n, 2**self.bits):
            raise ValueError(f"codes {(n, k)} of {self.bits} bits and tables {tuple(self.tables.shape)} do not belong together")

    @property
    def bits_nominal(self) -> float:
        return float(self.bits)

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.tables.dtype

    def dequantize(self) -> Tensor:
        """float32 `[N, K]`."""
        return self.unscaled(self.tables.float().gather(1, self.codes.long()))

    def pack(self) -> dict[str, Tensor]:
        return self.with_scale({"codes": pack_bits(self.codes, self.bits), "tables": self.tables})

    def meta(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "bits": self.bits}

    @staticmethod
    def unpack(payload: Mapping[str, Tensor], meta: Mapping[str, Any]) -> RowCodebookTensor:
        """Inverse of `pack` and `meta`; raises ValueError when they do not belong together."""
        (n, k), bits = meta["shape"], int(meta["bits"])
        codes = unpack_bits(payload["codes"], bits, n * k).view(n, k)
        return RowCodebookTensor(codes, payload["tables"], bits, input_scale=payload.get("input_scale"))


def bits_formula(bits: int, k: int, value_bits: int = 16) -> float:
    """b + 2^b s / K: 3 bits and 4096 inputs have 3.031 with float16 tables."""
    return bits + (value_bits << bits) / k
