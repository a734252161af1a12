"""Number formats besides integers: their codes, their values, and the scales that blocks of values share.

name       code                                    scale                                                     sources
fp8_e4m3   1-4-3, bias 7, ±448, no infinity        max |w| / 448, stored as the scheme says                  OFP8 (OCP 2023)
fp8_e5m2   1-5-2, bias 15, ±57344                  max |w| / 57344, likewise                                 OFP8
mxfp8      fp8_e4m3                                2^(⌊log2 max |w|⌋ - 8) per 32, E8M0                       OCP MX 1.0, 6.3
mxfp4      1-2-1, bias 1, ±6 (E2M1)                2^(⌊log2 max |w|⌋ - 2) per 32, E8M0                       OCP MX 1.0
nvfp4      E2M1                                    E4M3 of (max |w| / 6) / t per 16, t = max |W| / (6 · 448)  NVIDIA
                                                   in float32, one per tensor
nf4        the 16 values of `normal_values`        max |w| per group, as the scheme says                     QLoRA, 2305.14314
nf4_dq     likewise                                likewise, stored in 8 bits (`DYNAMIC`) about its mean,    QLoRA, section 3
                                                   with a float32 scale per 256

Rounding is to the nearest value, half to the even code; magnitudes above the largest value become the largest (saturation: no
infinity or NaN is made of finite values). NF4 takes the smaller value at a tie, as bitsandbytes does. A block of zeros decodes to zeros.
E8M0 exponents are held in -127 .. 127; an NVFP4 scale is at least 2⁻⁹ (the smallest E4M3), so that no block divides by zero.
The value of a code is (value of the element) · scale, in float32. Codes are chosen for the stored scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Protocol

import torch
from torch import Tensor

from quant.errors import ScaleDtypeError

SCALE_BLOCK = 256
"""Scales of nf4_dq that share a scale of their own."""


def power_of_two(exponent: Tensor) -> Tensor:
    """2^e exactly, float32, for integers -127 .. 127."""
    normal = ((exponent.clamp(min=-126).to(torch.int32) + 127) << 23).view(torch.float32)
    return torch.where(exponent < -126, 2.0**-127, normal)


class Element(Protocol):
    """The codes of one value, without its scale."""

    @property
    def bits(self) -> int: ...

    @property
    def top(self) -> float:
        """The largest value."""

    def encode(self, x: Tensor) -> Tensor:
        """Codes (int64) of the nearest values; x is finite, float32 or float64."""

    def values(self) -> Tensor:
        """float32 `[2^bits]`: the value of every code."""


@dataclass(frozen=True)
class MiniFloat:
    """Sign, exponent, mantissa; codes of magnitudes rise with the value."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    largest: int
    """Code of the largest finite magnitude; those above are infinity or NaN."""

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def top(self) -> float:
        return self._magnitude(self.largest)

    @property
    def top_exponent(self) -> int:
        """⌊log2 top⌋."""
        return (self.largest >> self.mantissa_bits) - self.bias

    def _magnitude(self, code: int) -> float:
        exponent, fraction = code >> self.mantissa_bits, code & ((1 << self.mantissa_bits) - 1)
        units = fraction if exponent == 0 else fraction + (1 << self.mantissa_bits)
        return float(units * 2.0 ** (max(exponent, 1) - self.bias - self.mantissa_bits))

    def encode(self, x: Tensor) -> Tensor:
        """The magnitude in units of its last mantissa bit, rounded half to even: an even number of units is an even code."""
        magnitude = x.abs().clamp(max=self.top)
        least = 1 - self.bias
        exponent = torch.where(magnitude == 0, least, torch.frexp(magnitude).exponent - 1)  # frexp calls zero's 0
        unit = exponent.clamp(min=least) - self.mantissa_bits
        units = (magnitude * power_of_two(-unit).to(x.dtype)).round().long()
        code = ((unit.long() + self.mantissa_bits + self.bias) << self.mantissa_bits) + units - (1 << self.mantissa_bits)
        return code + (torch.signbit(x).long() << (self.bits - 1))

    def values(self) -> Tensor:
        half = 1 << (self.bits - 1)
        positive = torch.tensor([self._magnitude(c) if c <= self.largest else float("nan") for c in range(half)], dtype=torch.float32)
        return torch.cat([positive, -positive])


@dataclass(frozen=True)
class Table:
    """Any rising values; at a tie the smaller one."""

    bits: int
    table: tuple[float, ...]

    @property
    def top(self) -> float:
        return self.table[-1]

    def encode(self, x: Tensor) -> Tensor:
        values = self.values().to(x)
        return torch.searchsorted((values[1:] + values[:-1]) / 2, x.contiguous())

    def values(self) -> Tensor:
        return torch.tensor(self.table, dtype=torch.float32)


@cache
def normal_values() -> tuple[float, ...]:
    """NF4: quantiles of the normal distribution at equal distances from ½ to p and from 1 - p to ½, over the largest one; eight
    positive, zero, seven negative. p = 1 - (1/32 + 1/30)/2, with the seven digits that QLoRA's code keeps of it."""
    p, quantile = 0.9677083, NormalDist().inv_cdf

    def quantiles(count: int) -> list[float]:
        return [quantile(p + (0.5 - p) * i / count) for i in range(count)]

    positive, negative = quantiles(8), quantiles(7)
    return tuple(sorted(v / positive[0] for v in [*positive, 0.0, *(-q for q in negative)]))


@cache
def dynamic_values() -> tuple[float, ...]:
    """Dynamic tree quantization (8-bit optimizers, Dettmers et al. 2021, arXiv 2110.02861): 10^-e for e = 0 .. 6, each with 2^(6-e)
    centres of equal parts of 0.1 .. 1, both signs; and 0 and 1."""
    values = [0.0, 1.0]
    for e in range(7):
        parts = 2 ** (6 - e)
        for i in range(parts):
            value = 10.0**-e * (0.1 + 0.9 * (i + 0.5) / parts)
            values += [value, -value]
    return tuple(sorted(values))


E4M3 = MiniFloat(4, 3, 7, 0x7E)
E5M2 = MiniFloat(5, 2, 15, 0x7B)
E2M1 = MiniFloat(2, 1, 1, 0x7)
NF4 = Table(4, normal_values())
DYNAMIC = Table(8, dynamic_values())

Scales = dict[str, Tensor]
"""Payload tensors of the scales by short name; `scale` is `[R, G]`."""


@dataclass(frozen=True)
class NumberFormat:
    """A row of the table above: R rows, G groups of each."""

    name: str
    element: Element
    fit: Callable[[Tensor, torch.dtype], Scales]
    """(max |w| of every group `[R, G]`, stored type) ▸ stored scales. Raises ScaleDtypeError."""
    read: Callable[[Mapping[str, Tensor]], Tensor]
    """Stored scales ▸ float32 `[R, G]`."""


def _fit_float(element: Element, precision: int) -> Callable[[Tensor, torch.dtype], Scales]:
    def fit(peak: Tensor, scale_dtype: torch.dtype) -> Scales:
        scale = torch.where(peak == 0, 1.0, peak / element.top).to(scale_dtype)
        if scale_dtype is torch.float16:
            # Subnormal float16 values are 2^-24 apart: the largest value may be cut by half a unit of its last place.
            wrong = ~(torch.isfinite(scale) & (scale >= 2.0 ** (precision - 22)))
            if bool(wrong.any()):
                raise ScaleDtypeError(f"{int(wrong.sum())} of {wrong.numel()} scales do not fit float16")
        return {"scale": scale}

    return fit


def _read_float(scales: Mapping[str, Tensor]) -> Tensor:
    return scales["scale"].float()


def _fit_shared_exponent(element: MiniFloat) -> Callable[[Tensor, torch.dtype], Scales]:
    def fit(peak: Tensor, scale_dtype: torch.dtype) -> Scales:
        exponent = torch.frexp(peak).exponent - 1 - element.top_exponent
        return {"scale": (torch.where(peak == 0, -127, exponent).clamp(-127, 127) + 127).to(torch.uint8)}

    return fit


def _read_shared_exponent(scales: Mapping[str, Tensor]) -> Tensor:
    return power_of_two(scales["scale"].to(torch.int32) - 127)


def _fit_two_levels(peak: Tensor, scale_dtype: torch.dtype) -> Scales:
    whole = _whole(peak.amax())
    return {"scale": _block_codes(peak, whole).to(torch.uint8), "tensor_scale": whole.reshape(1)}


def _read_two_levels(scales: Mapping[str, Tensor]) -> Tensor:
    return E4M3.values().to(scales["scale"].device)[scales["scale"].long()] * scales["tensor_scale"]


def _fit_double(peak: Tensor, scale_dtype: torch.dtype) -> Scales:
    offset = peak.float().mean()
    flat = peak.float().reshape(-1) - offset
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    spread = padded.abs().amax(1)
    codes = DYNAMIC.encode(padded / torch.where(spread == 0, 1.0, spread)[:, None])
    codes = codes.reshape(-1)[: flat.numel()].view(peak.shape)
    return {"scale": codes.to(torch.uint8), "scale_scale": spread, "scale_offset": offset.reshape(1)}


def _read_double(scales: Mapping[str, Tensor]) -> Tensor:
    codes = scales["scale"]
    spread = scales["scale_scale"].repeat_interleave(SCALE_BLOCK)[: codes.numel()].view(codes.shape)
    return DYNAMIC.values().to(codes.device)[codes.long()] * spread + scales["scale_offset"]


FORMATS: dict[str, NumberFormat] = {
    f.name: f
    for f in (
        NumberFormat("fp8_e4m3", E4M3, _fit_float(E4M3, 3), _read_float),
        NumberFormat("fp8_e5m2", E5M2, _fit_float(E5M2, 2), _read_float),
        NumberFormat("mxfp8", E4M3, _fit_shared_exponent(E4M3), _read_shared_exponent),
        NumberFormat("mxfp4", E2M1, _fit_shared_exponent(E2M1), _read_shared_exponent),
        NumberFormat("nvfp4", E2M1, _fit_two_levels, _read_two_levels),
        NumberFormat("nf4", NF4, _fit_float(NF4, 4), _read_float),
        NumberFormat("nf4_dq", NF4, _fit_double, _read_double),
    )
}


def number_format(name: str) -> NumberFormat:
    """By name. Raises ValueError for integers and unknown names."""
    if name not in FORMATS:
        raise ValueError(f"number={name} is not a floating-point format; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def encode(format: NumberFormat, groups: Tensor, scale: Tensor) -> Tensor:
    """Codes of values `[..., g]` with scales `[..., 1]`. A scale of zero (double quantization can make one) gives the code of 0."""
    steps = groups / torch.where(scale == 0, 1.0, scale).to(groups.dtype)
    return format.element.encode(torch.where(scale == 0, 0.0, steps))


def fake_per_row(name: str, rows: Tensor) -> Tensor:
    """float32 `[R, G, g]` rounded to the format, every row as a tensor of its own with float32 scales. A row with a NaN or an infinity,
    which has no scale and no codes, becomes NaN."""
    format = number_format(name)
    peak = rows.abs().amax(-1)
    finite = peak.isfinite().all(-1, keepdim=True)
    rows, peak = torch.where(finite[..., None], rows, 0.0), torch.where(finite, peak, 0.0)
    scale = format.read(format.fit(peak, torch.float32)) if name != "nvfp4" else _two_levels_per_row(peak)
    values = format.element.values().to(rows.device)[encode(format, rows, scale[..., None])] * scale[..., None]
    return torch.where(finite[..., None], values, torch.nan)


def _two_levels_per_row(peak: Tensor) -> Tensor:
    whole = _whole(peak.amax(-1, keepdim=True))
    return E4M3.values().to(peak.device)[_block_codes(peak, whole)] * whole


def _whole(peak: Tensor) -> Tensor:
    whole = (peak / (E2M1.top * E4M3.top)).float()
    return torch.where(whole == 0, 1.0, whole)  # of zeros, or of less than float32 holds


def _block_codes(peak: Tensor, whole: Tensor) -> Tensor:
    return E4M3.encode((peak.float() / E2M1.top / whole).clamp(min=2.0**-9))
