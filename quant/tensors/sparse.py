"""The stored format `sparse`: dense codes with two-level statistics, and single weights kept as they are (SpQR).

w ≈ (code - zero) · scale per row and group of columns; scales and zeros are themselves codes, of groups of `stat_rows` consecutive
rows; outliers stand for themselves.
Payload (short name: type, shape; G groups of columns, R = ceil(N / stat_rows) groups of rows, M outliers; s is the statistics' type,
float16 or float32)
  codes: uint8 bit stream of N·K codes, row-major
  scale_codes, zero_codes: bit streams of N·G codes · scale_step, scale_low, zero_step, zero_low: s `[R, G]`; a zero that is a code itself
  (round_zero) has `zero` instead: a bit stream of N·G codes
  outlier_values: s `[M]`, by row, then column · outlier_columns: int16 `[M]` (column - 2^15; int32, plain, above 2^16 columns) ·
  outlier_counts: int32 `[N]`, of each row; absent without outliers
  g_idx: group of each column `[K]`; only when groups are not consecutive columns · input_scale: float16 or float32 `[K]`
Invariant: `dequantize` is computed from what is stored, so it is the same bits in every process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quant.errors import ScaleDtypeError
from quant.tensors.base import Coded
from quant.tensors.packing import pack_bits, unpack_bits


@dataclass(frozen=True)
class TwoLevel:
    """Values `[N, G]` as codes of `bits` bits on a grid per `rows` consecutive rows: low + code · step."""

    codes: Tensor
    """uint8 `[N, G]`."""
    step: Tensor
    """float16 or float32 `[R, G]`."""
    low: Tensor
    """Like `step`."""
    bits: int
    rows: int

    @staticmethod
    def fit(values: Tensor, bits: int, rows: int, dtype: torch.dtype) -> TwoLevel:
        """Least to greatest value in 2^bits - 1 steps; the last group of rows may be smaller. A positive value stays positive.

        Raises ScaleDtypeError where `dtype` holds the ends worse than to 2^-9 of the greatest magnitude."""
        n, g = values.shape
        groups = torch.cat([values, values[-1:].expand(-n % rows, g)]).view(-1, rows, g)
        low, high = groups.amin(1), groups.amax(1)
        top = 2**bits - 1
        step = (high - low) / top
        kept_low, kept_step = (x.to(dtype).to(values) for x in (low, step))
        off = (kept_low - low).abs() + top * (kept_step - step).abs()
        fits = off <= 2.0**-9 * torch.maximum(low.abs(), high.abs())
        if not bool(fits.all()):
            raise ScaleDtypeError(f"{int((~fits).sum())} of {fits.numel()} grids of scales or zeros do not fit {str(dtype).split('.')[1]}")
        spread = kept_step.repeat_interleave(rows, 0)[:n]
        base = kept_low.repeat_interleave(rows, 0)[:n]
        codes = torch.where(spread == 0, 0.0, (values - base) / torch.where(spread == 0, 1.0, spread)).round().clamp(0, top)
        # Beside an empty group (scale 0) small scales must not become 0: their weights would be lost.
        codes = torch.where((codes == 0) & (base == 0) & (values > 0) & (spread > 0), 1.0, codes)
        return TwoLevel(codes.to(torch.uint8), kept_step.to(dtype), kept_low.to(dtype), bits, rows)

    def values(self, dtype: torch.dtype) -> Tensor:
        """`[N, G]`."""
        n = self.codes.shape[0]
        step, low = (x.to(dtype).repeat_interleave(self.rows, 0)[:n] for x in (self.step, self.low))
        return self.codes.to(dtype) * step + low


def joined(parts: list[TwoLevel]) -> TwoLevel:
    """Of groups side by side."""
    codes, step, low = (torch.cat([getattr(p, name) for p in parts], dim=1) for name in ("codes", "step", "low"))
    return TwoLevel(codes.contiguous(), step.contiguous(), low.contiguous(), parts[0].bits, parts[0].rows)


@dataclass(frozen=True)
class SparseTensor(Coded):
    format: ClassVar[str] = "sparse"

    bits: int
    scale: TwoLevel
    """Of `[N, G]`."""
    zero: TwoLevel | Tensor
    """Of `[N, G]`, in units of codes; or uint8 `[N, G]`."""
    outlier_rows: Tensor
    """int64 `[M]`, ascending, then by column."""
    outlier_columns: Tensor
    """int64 `[M]`."""
    outlier_values: Tensor
    """float16 or float32 `[M]`."""
    g_idx: Tensor | None = None
    """Integers `[K]`."""

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        groups = self.scale.codes.shape[1]
        if self.scale.codes.shape[0] != n or (self.g_idx is None and k % groups):
            raise ValueError(f"codes {(n, k)} and scales {tuple(self.scale.codes.shape)} do not belong together")

    @property
    def group_size(self) -> int:
        """Columns per group."""
        return self.shape[1] // self.scale.codes.shape[1]

    @property
    def outlier_share(self) -> float:
        return self.outlier_values.numel() / self.codes.numel()

    @property
    def bits_nominal(self) -> float:
        """The paper's average: of codes, statistics of 16 bits, and 32 bits per outlier."""
        return bits_formula(
            self.bits,
            self.group_size,
            self.scale.rows,
            self.scale.bits,
            self.zero.bits if isinstance(self.zero, TwoLevel) else None,
            self.outlier_share,
        )

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.scale.step.dtype

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`[N, K]` in a float type of your choice; float64 shows what a float64 solver worked with."""
        scale, zero = self.scale.values(dtype), self.zero.values(dtype) if isinstance(self.zero, TwoLevel) else self.zero.to(dtype)
        if self.g_idx is None:
            scale, zero = (x.repeat_interleave(self.group_size, 1) for x in (scale, zero))
        else:
            scale, zero = (x[:, self.g_idx.long()] for x in (scale, zero))
        weight = (self.codes.to(dtype) - zero) * scale
        weight[self.outlier_rows, self.outlier_columns] = self.outlier_values.to(dtype)
        return self.unscaled(weight)

    def dequantize(self) -> Tensor:
        """float32 `[N, K]`."""
        return self.values()

    def pack(self) -> dict[str, Tensor]:
        n, k = self.shape
        payload = {"codes": pack_bits(self.codes, self.bits), **_packed("scale", self.scale)}
        payload |= _packed("zero", self.zero) if isinstance(self.zero, TwoLevel) else {"zero": pack_bits(self.zero, self.bits)}
        if self.outlier_values.numel():
            narrow = k <= 2**16
            payload["outlier_values"] = self.outlier_values
            payload["outlier_columns"] = (self.outlier_columns - 2**15).to(torch.int16) if narrow else self.outlier_columns.to(torch.int32)
            payload["outlier_counts"] = torch.bincount(self.outlier_rows, minlength=n).to(torch.int32)
        if self.g_idx is not None:
            payload["g_idx"] = self.g_idx
        return self.with_scale(payload)

    def meta(self) -> dict[str, Any]:
        zero_bits = self.zero.bits if isinstance(self.zero, TwoLevel) else None
        return {
            "shape": list(self.shape),
            "bits": self.bits,
            "groups": self.scale.codes.shape[1],
            "stat_rows": self.scale.rows,
            "scale_bits": self.scale.bits,
            "zero_bits": zero_bits,
        }

    @staticmethod
    def unpack(payload: Mapping[str, Tensor], meta: Mapping[str, Any]) -> SparseTensor:
        """Inverse of `pack` and `meta`; raises ValueError when they do not belong together."""
        (n, k), bits, g, rows = meta["shape"], int(meta["bits"]), int(meta["groups"]), int(meta["stat_rows"])
        scale = _unpacked("scale", payload, (n, g), int(meta["scale_bits"]), rows)
        zero: TwoLevel | Tensor
        if meta["zero_bits"] is None:
            zero = unpack_bits(payload["zero"], bits, n * g).view(n, g)
        else:
            zero = _unpacked("zero", payload, (n, g), int(meta["zero_bits"]), rows)
        codes = unpack_bits(payload["codes"], bits, n * k).view(n, k)
        values = payload.get("outlier_values", scale.step.new_zeros(0))
        columns, at = values.new_zeros(0, dtype=torch.int64), values.new_zeros(0, dtype=torch.int64)
        if values.numel():
            stored = payload["outlier_columns"]
            columns = stored.long() + 2**15 if stored.dtype is torch.int16 else stored.long()
            at = torch.arange(n, device=values.device).repeat_interleave(payload["outlier_counts"].long())
        return SparseTensor(codes, bits, scale, zero, at, columns, values, payload.get("g_idx"), input_scale=payload.get("input_scale"))


def bits_formula(
    bits: int, group_size: int, stat_rows: int, scale_bits: int, zero_bits: int | None, share: float, stat_bits: int = 16
) -> float:
    """b + (qs + qz) / g + 2 (s + s) / (g r) + (s + 16) share: r rows per group of statistics of s bits, outliers of value and column.

    A zero that is a code itself (zero_bits None): b + (qs + b) / g + 2 s / (g r) + (s + 16) share."""
    second = (2 if zero_bits is None else 4) * stat_bits / (group_size * stat_rows)
    return bits + (scale_bits + (bits if zero_bits is None else zero_bits)) / group_size + second + (stat_bits + 16) * share


def _packed(name: str, part: TwoLevel) -> dict[str, Tensor]:
    return {f"{name}_codes": pack_bits(part.codes, part.bits), f"{name}_step": part.step, f"{name}_low": part.low}


def _unpacked(name: str, payload: Mapping[str, Tensor], shape: tuple[int, int], bits: int, rows: int) -> TwoLevel:
    codes = unpack_bits(payload[f"{name}_codes"], bits, shape[0] * shape[1]).view(shape)
    return TwoLevel(codes, payload[f"{name}_step"], payload[f"{name}_low"], bits, rows)
