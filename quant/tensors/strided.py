"""The stored format `strided`: integer codes whose groups take every s-th weight of the flattened matrix (HQQ's axis 0).

With G groups of g = N K / G weights, weight i of the row-major order belongs to group i mod G. Where g divides N these are g rows, N
/ g apart, of one input column.

Payload (short name: type, shape)
  codes: uint8 bit stream of N·K codes, row-major · scale, zero: float16 or float32 `[G]`
  input_scale: float16 or float32 `[K]`; only when the weight was multiplied by it and nothing before divides by it
Invariant: `dequantize` is computed from what is stored, so it is the same bits in every process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind
from quant.tensors.base import Coded
from quant.tensors.packing import pack_bits, unpack_bits


@dataclass(frozen=True)
class StridedTensor(Coded):
    format: ClassVar[str] = "strided"

    scale: Tensor
    """float16 or float32 `[G]`."""
    zero: Tensor
    """In units of codes, like the scale: w ≈ (codes - zero) · scale."""
    bits: int

    def __post_init__(self) -> None:
        groups = self.scale.numel()
        if self.scale.dim() != 1 or groups == 0 or self.codes.numel() % groups or self.zero.shape != self.scale.shape:
            shapes = f"codes {tuple(self.codes.shape)}, scale {tuple(self.scale.shape)} and zero {tuple(self.zero.shape)}"
            raise ValueError(f"{shapes} do not belong together; scale and zero are [G], with G a divisor of the number of codes")

    @property
    def bits_nominal(self) -> float:
        return float(self.bits)

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.scale.dtype

    def dequantize(self) -> Tensor:
        """float32 `[N, K]`."""
        affine = Affine(self.scale.float(), self.zero.float(), self.bits, ZeroKind.FLOAT)
        weight = affine.decode(self.codes.view(-1, self.scale.numel()).float()).view(self.codes.shape)
        return self.unscaled(weight)

    def pack(self) -> dict[str, Tensor]:
        payload = {"codes": pack_bits(self.codes, self.bits), "scale": self.scale, "zero": self.zero}
        return self.with_scale(payload)

    def meta(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "bits": self.bits}

    @staticmethod
    def unpack(payload: Mapping[str, Tensor], meta: Mapping[str, Any]) -> StridedTensor:
        """Inverse of `pack` and `meta`; raises ValueError when they do not belong together."""
        (n, k), bits = meta["shape"], int(meta["bits"])
        codes = unpack_bits(payload["codes"], bits, n * k).view(n, k)
        return StridedTensor(codes, payload["scale"], payload["zero"], bits, input_scale=payload.get("input_scale"))
