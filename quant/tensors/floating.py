"""The stored format `floating`: codes of a number format (`quant.number_formats`) with a scale per group.

Payload (short name: type, shape)
  codes: uint8 bit stream of N·K codes, row-major · input_scale: as in `affine`
  scale `[R, G]`, R = N (1 for one scale per tensor): float16 or float32 (fp8, nf4), uint8 E8M0 (mxfp4, mxfp8), uint8 E4M3 (nvfp4),
  uint8 code of the dynamic table (nf4_dq)
  tensor_scale: float32 `[1]` (nvfp4) · scale_scale: float32 `[⌈R G / 256⌉]` and scale_offset: float32 `[1]` (nf4_dq)
Invariant: `dequantize` is computed from what is stored, so it is the same bits in every process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quant.number_formats import NumberFormat, Scales, number_format
from quant.tensors.base import Coded
from quant.tensors.packing import pack_bits, unpack_bits

SCALES = ("scale", "tensor_scale", "scale_scale", "scale_offset")


@dataclass(frozen=True)
class FloatingTensor(Coded):
    format: ClassVar[str] = "floating"

    scales: Scales
    number: str

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        r, g = self.scales["scale"].shape
        if r not in (1, n) or k % g:
            raise ValueError(f"codes {(n, k)} and scale {(r, g)} do not belong together")

    @property
    def _format(self) -> NumberFormat:
        return number_format(self.number)

    @property
    def bits_nominal(self) -> float:
        return float(self._format.element.bits)

    @property
    def scale_dtype(self) -> torch.dtype:
        dtype = self.scales["scale"].dtype
        return dtype if dtype.is_floating_point else torch.float32

    def dequantize(self) -> Tensor:
        """float32 `[N, K]`."""
        scale = self._format.read(self.scales)
        values = self._format.element.values().to(self.codes.device)[self.codes.long()]
        weight = values * scale.repeat_interleave(self.shape[1] // scale.shape[1], dim=1)
        return self.unscaled(weight)

    def pack(self) -> dict[str, Tensor]:
        payload = {"codes": pack_bits(self.codes, self._format.element.bits), **self.scales}
        return self.with_scale(payload)

    def meta(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "number": self.number}

    @staticmethod
    def unpack(payload: Mapping[str, Tensor], meta: Mapping[str, Any]) -> FloatingTensor:
        """Inverse of `pack` and `meta`; raises ValueError when they do not belong together."""
        (n, k), number = meta["shape"], str(meta["number"])
        codes = unpack_bits(payload["codes"], number_format(number).element.bits, n * k).view(n, k)
        scales = {name: payload[name] for name in SCALES if name in payload}
        return FloatingTensor(codes, scales, number, input_scale=payload.get("input_scale"))
