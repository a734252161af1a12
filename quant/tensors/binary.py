"""The stored format `binary`: signs with a few scales per row and block of columns, a second sign where columns are salient.

A weight of a plain column is ±scale of its half (low or high, told by the split flag) plus that half's mean; a weight of a
salient column is ±scale ±second scale plus mean. B = ceil(K / block) blocks; the last one may be narrower.
Payload (short name: type, shape)
  columns: uint8 bit stream of K flags, 1 = salient · signs: bit stream of N·K, row-major, 1 = plus
  second: bit stream of the N·S second signs of the S salient columns · split: bit stream of the N·(K - S) flags of the
  others, 1 = high · scale: float16 or float32 `[N, B, 4]` (low, high, salient, second)
  mean: like scale `[N, B, 3]` (low, high, salient); absent without means · input_scale: as in `affine`
Invariant: `dequantize` is computed from what is stored, so it is the same bits in every process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quant.accounting import SCALE_BITS, size_bytes
from quant.tensors.base import Stored
from quant.tensors.packing import pack_bits, unpack_bits

LOW, HIGH, SALIENT, SECOND = range(4)
VALUES = 2**24
"""That a GPU decodes at once; some 20 bytes each."""


def decode(signs: Tensor, second: Tensor, split: Tensor, salient: Tensor, scale: Tensor, mean: Tensor | None) -> Tensor:
    """Weights `[N, C]` of one block: flags bool `[N, C]`, salient bool `[C]`, scale `[N, 4]`, mean `[N, 3]`; or of some: `[N, B, C]`,
    `[B, C]`, `[N, B, 4]`, `[N, B, 3]`.

    The second sign counts in salient columns only, the split flag in the others."""
    part = torch.where(salient, SALIENT, split.long())
    first = scale.gather(-1, part)
    value = torch.where(signs, first, -first)
    other = scale[..., SECOND : SECOND + 1]
    value = torch.where(salient, value + torch.where(second, other, -other), value)
    return value if mean is None else value + mean.gather(-1, part)


@dataclass(frozen=True)
class BinaryTensor(Stored):
    format: ClassVar[str] = "binary"

    signs: Tensor
    """bool `[N, K]`."""
    second: Tensor
    """bool `[N, K]`, False in columns that are not salient."""
    split: Tensor
    """bool `[N, K]`, False in salient columns."""
    salient: Tensor
    """bool `[K]`."""
    scale: Tensor
    """float16 or float32 `[N, B, 4]`."""
    mean: Tensor | None
    """Like scale `[N, B, 3]`."""
    block_size: int

    def __post_init__(self) -> None:
        n, k = self.signs.shape
        blocks = -(-k // self.block_size)
        means = (n, blocks, 3) if self.mean is None else tuple(self.mean.shape)
        if self.salient.shape != (k,) or self.scale.shape != (n, blocks, 4) or means != (n, blocks, 3):
            raise ValueError(f"{n} x {k} signs in blocks of {self.block_size} and scales {tuple(self.scale.shape)} do not belong together")

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.signs.shape
        return n, k

    @property
    def salient_share(self) -> float:
        """Salient columns / K."""
        return float(self.salient.double().mean())

    @property
    def bits_nominal(self) -> float:
        """BiLLM's N_param = 1 + share of salient weights: flags, scales and means are left out."""
        return 1 + self.salient_share

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.scale.dtype

    def dequantize(self) -> Tensor:
        """float32 `[N, K]`."""
        weight, (n, k) = torch.empty(self.shape, dtype=torch.float32, device=self.signs.device), self.shape
        # A CPU's cache has room for one block; a GPU takes some at once.
        step = max(1, VALUES // max(1, n * self.block_size)) if weight.is_cuda else 1
        whole = k // self.block_size
        spans = [(b, min(b + step, whole)) for b in range(0, whole, step)] + [(whole, whole + 1)] * (whole * self.block_size < k)
        for b, e in spans:
            c = slice(b * self.block_size, min(e * self.block_size, k))
            signs, second, split = (t[:, c].view(n, e - b, -1) for t in (self.signs, self.second, self.split))
            mean = None if self.mean is None else self.mean[:, b:e].float()
            weight[:, c] = decode(signs, second, split, self.salient[c].view(e - b, -1), self.scale[:, b:e].float(), mean).flatten(1)
        return self.unscaled(weight)

    @property
    def bits_stored(self) -> float:
        """Of what `pack` gives, without packing."""
        n, k = self.shape
        s = int(self.salient.sum())
        streams = sum(-(-flags // 8) for flags in (k, n * k, n * s, n * (k - s)))
        values = size_bytes(self.scale, self.mean, self.input_scale)
        return 8 * (streams + values) / (n * k)

    def pack(self) -> dict[str, Tensor]:
        payload = {
            "columns": pack_bits(self.salient, 1),
            "signs": pack_bits(self.signs, 1),
            "second": pack_bits(self.second[:, self.salient], 1),
            "split": pack_bits(self.split[:, ~self.salient], 1),
            "scale": self.scale,
        }
        if self.mean is not None:
            payload["mean"] = self.mean
        return self.with_scale(payload)

    def meta(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "block_size": self.block_size}

    @staticmethod
    def unpack(payload: Mapping[str, Tensor], meta: Mapping[str, Any]) -> BinaryTensor:
        """Inverse of `pack` and `meta`; raises ValueError when they do not belong together."""
        n, k = meta["shape"]
        salient = unpack_bits(payload["columns"], 1, k).bool()
        s = int(salient.sum())
        signs = unpack_bits(payload["signs"], 1, n * k).view(n, k).bool()
        second, split = torch.zeros_like(signs), torch.zeros_like(signs)
        second[:, salient] = unpack_bits(payload["second"], 1, n * s).view(n, s).bool()
        split[:, ~salient] = unpack_bits(payload["split"], 1, n * (k - s)).view(n, k - s).bool()
        parts = (signs, second, split, salient, payload["scale"], payload.get("mean"))
        return BinaryTensor(*parts, int(meta["block_size"]), input_scale=payload.get("input_scale"))


def bits_formula(shape: tuple[int, int], block_size: int, scale_dtype: str, *, means: bool) -> float:
    """Stored bits of the format: a sign and a flag or second sign per weight, a flag per column, 7 (or, without means, 4) values
    per row and block. Blocks of 128, float16 and many rows: 2.875, and 2.5 without means; the salient share does not matter."""
    n, k = shape
    values = 7 if means else 4
    return 2 + 1 / n + values * SCALE_BITS[scale_dtype] * -(-k // block_size) / k
