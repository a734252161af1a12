"""Stored formats, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quant.methods.base import StoredTensor
from quant.tensors.affine import AffineTensor
from quant.tensors.incoherent import IncoherentTensor
from quant.tensors.lattice import LatticeTensor
from quant.tensors.strided import StridedTensor

FORMATS: dict[str, type[AffineTensor] | type[StridedTensor] | type[IncoherentTensor] | type[LatticeTensor]] = {
    AffineTensor.format: AffineTensor,
    StridedTensor.format: StridedTensor,
    IncoherentTensor.format: IncoherentTensor,
    LatticeTensor.format: LatticeTensor,
}


def unpack(format: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> StoredTensor:
    """The stored tensor whose `pack()` and `meta()` these are. Raises ValueError for an unknown format."""
    if format not in FORMATS:
        raise ValueError(f"stored format {format!r} is unknown; this version reads {', '.join(FORMATS)}")
    return FORMATS[format].unpack(tensors, meta)
