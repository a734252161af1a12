"""The stored format `columns`: affine codes, with some whole columns kept in floating point (OWQ, QUIK).

With `exact_inputs` the inputs of kept columns stay in full precision too where activations are quantized (QUIK): the product is
split in two, and neither half's range sees the other's columns.

Payload: that of `affine` (whose codes of kept columns are 0 and stand for nothing, so that groups stay where they are), and
  kept: int16 `[r]`, ascending (int32 above 2^15 columns) · kept_values: float16 `[N, r]`, float32 where float16 cannot hold them
Invariant: `dequantize` is computed from what is stored, so it is the same bits in every process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from quant.accounting import bits_stored
from quant.tensors.affine import AffineTensor


@dataclass(frozen=True)
class ColumnsTensor:
    format: ClassVar[str] = "columns"

    rest: AffineTensor
    """Of all columns."""
    kept: Tensor
    """int64 `[r]`, ascending."""
    kept_values: Tensor
    """float16 or float32 `[N, r]`."""
    exact_inputs: bool = False

    def __post_init__(self) -> None:
        n, k = self.rest.shape
        if self.kept_values.shape != (n, self.kept.numel()) or (
            self.kept.numel() and not 0 <= int(self.kept.min()) <= int(self.kept.max()) < k
        ):
            raise ValueError(
                f"{self.kept.numel()} kept columns with values {tuple(self.kept_values.shape)} do not belong to {(n, k)} weights"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.rest.shape

    @property
    def bits_nominal(self) -> float:
        """Of the codes and the kept values."""
        return self.rest.bits_nominal + 8 * self.kept_values.element_size() * self.kept.numel() / self.shape[1]

    @property
    def bits_stored(self) -> float:
        return bits_stored(self.pack(), self.rest.codes.numel())

    def with_input_scale(self, scale: Tensor) -> ColumnsTensor:
        """The same codes and values standing for the weight before its columns were multiplied by `scale` `[K]`."""
        return replace(self, rest=self.rest.with_input_scale(scale))

    def dequantize(self) -> Tensor:
        """float32 `[N, K]`."""
        weight, values = self.rest.dequantize(), self.kept_values.float()
        scale = self.rest.input_scale
        weight[:, self.kept] = values if scale is None else values / scale.float()[self.kept]
        return weight

    def pack(self) -> dict[str, Tensor]:
        narrow = self.shape[1] <= 2**15
        return {**self.rest.pack(), "kept": self.kept.to(torch.int16 if narrow else torch.int32), "kept_values": self.kept_values}

    def meta(self) -> dict[str, Any]:
        return {**self.rest.meta(), **({"exact_inputs": True} if self.exact_inputs else {})}

    @staticmethod
    def unpack(payload: Mapping[str, Tensor], meta: Mapping[str, Any]) -> ColumnsTensor:
        """Inverse of `pack` and `meta`; raises ValueError when they do not belong together."""
        exact = bool(meta.get("exact_inputs", False))
        return ColumnsTensor(AffineTensor.unpack(payload, meta), payload["kept"].long(), payload["kept_values"], exact)


def bits_formula(affine: float, kept: int, shape: tuple[int, int]) -> float:
    """Bits of the affine part, plus 16 r / K for the values and 16 r / (N K) for their columns' numbers."""
    n, k = shape
    return affine + 16 * kept / k + 16 * kept / (n * k)
