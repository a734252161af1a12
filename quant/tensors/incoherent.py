"""The stored format `incoherent`: codes of one scale for the matrix U W Vᵀ, U and V random butterflies (QuIP).

Payload (short name: type, shape)
  codes: uint8 bit stream of N·K codes, row-major · scale: float32 `[1]`, the half-width of the grid · seed: int64 `[1]`
  input_scale: float16 or float32 `[K]`; only when columns were multiplied by it
W = Uᵀ ((2 codes / (2^bits - 1) - 1) · scale) V / input_scale, computed in float64 on the CPU and rounded to float32: the same bits
in every process. Between processors that sum in another order a value may differ in its last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quant.butterfly import butterflies
from quant.tensors.base import Coded
from quant.tensors.packing import pack_bits, unpack_bits


@dataclass(frozen=True)
class IncoherentTensor(Coded):
    format: ClassVar[str] = "incoherent"

    scale: Tensor
    """float32 `[1]`; 0 for an all-zero matrix."""
    seed: Tensor
    """int64 `[1]`."""
    bits: int

    @property
    def bits_nominal(self) -> float:
        return float(self.bits)

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float32

    def dequantize(self) -> Tensor:
        """float32 `[N, K]`."""
        u, v = butterflies(*self.shape, int(self.seed))
        grid = (2 * self.codes.cpu().double() / (2**self.bits - 1) - 1) * self.scale.cpu().double()
        weight = u.undo(v.undo(grid).T).T
        if self.input_scale is not None:
            weight = weight / self.input_scale.cpu().double()
        return weight.float().contiguous().to(self.codes.device)

    def pack(self) -> dict[str, Tensor]:
        payload = {"codes": pack_bits(self.codes, self.bits), "scale": self.scale, "seed": self.seed}
        return self.with_scale(payload)

    def meta(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "bits": self.bits}

    @staticmethod
    def unpack(payload: Mapping[str, Tensor], meta: Mapping[str, Any]) -> IncoherentTensor:
        """Inverse of `pack` and `meta`; raises ValueError when they do not belong together."""
        (n, k), bits = meta["shape"], int(meta["bits"])
        codes = unpack_bits(payload["codes"], bits, n * k).view(n, k)
        return IncoherentTensor(codes, payload["scale"], payload["seed"], bits, input_scale=payload.get("input_scale"))
