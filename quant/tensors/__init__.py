"""Stored formats, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quant.methods.base import StoredTensor
from quant.tensors.affine import AffineTensor
from quant.tensors.binary import BinaryTensor
from quant.tensors.codebook import CodebookTensor
from quant.tensors.columns import ColumnsTensor
from quant.tensors.floating import FloatingTensor
from quant.tensors.incoherent import IncoherentTensor
from quant.tensors.lattice import LatticeTensor
from quant.tensors.mixed import MixedTensor
from quant.tensors.partially_binary import PartiallyBinaryTensor
from quant.tensors.row_codebook import RowCodebookTensor
from quant.tensors.sparse import SparseTensor
from quant.tensors.strided import StridedTensor

FORMATS: dict[str, type[Any]] = {
    t.format: t
    for t in (
        AffineTensor,
        FloatingTensor,
        StridedTensor,
        BinaryTensor,
        CodebookTensor,
        ColumnsTensor,
        MixedTensor,
        SparseTensor,
        PartiallyBinaryTensor,
        IncoherentTensor,
        LatticeTensor,
        RowCodebookTensor,
    )
}


def unpack(format: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> StoredTensor:
    """The stored tensor whose `pack()` and `meta()` these are. Raises ValueError for an unknown format."""
    if format not in FORMATS:
        raise ValueError(f"stored format {format!r} is unknown; this version reads {', '.join(FORMATS)}")
    stored: StoredTensor = FORMATS[format].unpack(tensors, meta)
    return stored
