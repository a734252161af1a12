"""KV-cache quantizers: tensors only. `make` gives the quantizer that a scheme describes."""

from __future__ import annotations

from collections.abc import Callable

from quant.kv.base import KVQuantizer, KVState
from quant.kv.kivi import Kivi
from quant.kv.kvquant import KVQuant
from quant.kv.per_token import PerToken
from quant.scheme import KVScheme

__all__ = ["KVQuant", "KVQuantizer", "KVState", "Kivi", "PerToken", "make"]


def _per_token(s: KVScheme) -> KVQuantizer:
    return PerToken(s.bits, s.symmetric, s.group_size, s.clip)


def _kivi(s: KVScheme) -> KVQuantizer:
    assert s.group_size is not None
    assert s.residual_length is not None
    return Kivi(s.bits, s.value_bits or s.bits, s.group_size, s.residual_length)


def _kvquant(s: KVScheme) -> KVQuantizer:
    return KVQuant(s.bits, s.outliers, s.codebook, s.first_few_fp16)


MAKERS: dict[str, tuple[type[KVQuantizer], Callable[[KVScheme], KVQuantizer]]] = {
    "per_token": (PerToken, _per_token),
    "kivi": (Kivi, _kivi),
    "kvquant": (KVQuant, _kvquant),
}


def make(scheme: KVScheme) -> KVQuantizer:
    """Raises ValueError for a version that is not here."""
    cls, maker = MAKERS[scheme.kind]
    if scheme.version != cls.version:
        raise ValueError(f"KV quantizer {scheme.kind} has version {cls.version} here; version {scheme.version} was asked for")
    return maker(scheme)
