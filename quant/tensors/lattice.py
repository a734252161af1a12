"""The stored format `lattice`: codes of eight weights of the matrix Hadamard(S_V W S_U), one scale (QuIP#).

Payload (short name: type, shape)
  codes0: int16 `[N, K / 8]`, 16-bit codes of E8P · codes1: int16 or uint8 `[N, K / 8]`, the residual's (3 bits: uint8, 4 bits: int16)
  signs_out, signs_in: bit streams of N and K signs, 1 is minus · scale: float32 `[1]`
  input_scale: float16 or float32 `[K]`; only when the weight was multiplied by it and nothing before divides by it
Codewords are multiples of 1/4, so that their transform without its factor 1 / √n is exact in float64 in whatever order it is summed:
`dequantize` gives the same bits on every processor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quant.hadamard import apply_hadamard, hadamard_block
from quant.lattice import CODEBOOKS, DIMENSION, Codebook
from quant.tensors.base import Stored
from quant.tensors.packing import pack_bits, unpack_bits


def hadamard_rows(x: Tensor, *, transpose: bool = False, normalize: bool = True) -> Tensor:
    """`[..., n]` ▸ x H, in blocks of `hadamard_block(n)` where there is no Hadamard matrix of order n."""
    n = x.shape[-1]
    blocks = x.reshape(-1, hadamard_block(n))
    return apply_hadamard(blocks, transpose=transpose, normalize=normalize).view(x.shape)


def bits_formula(bits: int, n: int, k: int) -> float:
    """bits + (N + K) / (N K), a bit for every sign, and 32 for the scale."""
    return bits + (n + k + 32) / (n * k)


@dataclass(frozen=True)
class LatticeTensor(Stored):
    format: ClassVar[str] = "lattice"

    codes: tuple[Tensor, ...]
    """int64 `[N, K / 8]` per part of the codebook."""
    signs_out: Tensor
    """uint8 `[N]`, 1 is minus."""
    signs_in: Tensor
    """uint8 `[K]`."""
    scale: Tensor
    """float32 `[1]`; 0 for an all-zero matrix."""
    bits: int

    @property
    def codebook(self) -> Codebook:
        return CODEBOOKS[self.bits]

    @property
    def shape(self) -> tuple[int, int]:
        return self.signs_out.numel(), self.signs_in.numel()

    @property
    def bits_nominal(self) -> float:
        return float(self.bits)

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float16

    def dequantize(self) -> Tensor:
        """float32 `[N, K]`."""
        n, k = self.shape
        total = torch.zeros(n, k, dtype=torch.float64, device=self.scale.device)
        for i, codes in enumerate(self.codes):
            words = self.codebook.words(i).to(codes.device).double()[codes].view(n, k)
            exact = hadamard_rows(hadamard_rows(words, transpose=True, normalize=False).T.contiguous(), transpose=True, normalize=False).T
            total = total + (exact if i == 0 else exact / self.codebook.residual_scale)
        total = total * (self.scale.double() / math.sqrt(hadamard_block(n) * hadamard_block(k)))
        weight = (total * (1 - 2 * self.signs_out.double())[:, None] * (1 - 2 * self.signs_in.double())).float()
        return self.unscaled(weight)

    def pack(self) -> dict[str, Tensor]:
        # 16 bits as int16: the bit pattern of the unsigned code.
        kept = {"e8p": torch.int16, "e81b": torch.uint8}
        payload = {f"codes{i}": c.to(kept[part]) for i, (c, part) in enumerate(zip(self.codes, self.codebook.parts, strict=True))}
        payload |= {"signs_out": pack_bits(self.signs_out, 1), "signs_in": pack_bits(self.signs_in, 1), "scale": self.scale}
        return self.with_scale(payload)

    def meta(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "bits": self.bits}

    @staticmethod
    def unpack(payload: Mapping[str, Tensor], meta: Mapping[str, Any]) -> LatticeTensor:
        """Inverse of `pack` and `meta`; raises ValueError when they do not belong together."""
        (n, k), bits = meta["shape"], int(meta["bits"])
        codes = tuple(payload[f"codes{i}"].long() & 0xFFFF for i in range(len(CODEBOOKS[bits].parts)))
        if any(c.shape != (n, k // DIMENSION) for c in codes):
            raise ValueError(f"codes of shapes {[tuple(c.shape) for c in codes]} do not belong to a weight of shape {(n, k)}")
        signs = (unpack_bits(payload["signs_out"], 1, n), unpack_bits(payload["signs_in"], 1, k))
        return LatticeTensor(codes, *signs, payload["scale"], bits, input_scale=payload.get("input_scale"))
