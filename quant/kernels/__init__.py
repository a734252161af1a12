"""Kernels: each operation has a plain reference and faster twins; this table is the only place that chooses.

backend: auto takes the first of the operation's row that works on the device; a name of the row insists on that one. `preferring` insists
on a name for all operations that have it, wherever auto is asked for.
Each twin is a module with the operation's functions. One that does not work everywhere has `unavailable(device)` too, and one that does not
take all that its operation is for `refuses(...)`: None, or the reason; a caller says what it has. Where one hands a call over nevertheless,
it asks `kernel` for the other, so that records name both.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from threading import Lock
from typing import Any

import torch

from quant.during import during
from quant.errors import BackendError

TABLE: dict[str, dict[str, str]] = {
    "gptq_block": {
        "cpu": "quant.kernels.gptq_block.cpu",
        "cuda": "quant.kernels.gptq_block.cuda",
        "triton": "quant.kernels.gptq_block.triton",
        "torch": "quant.kernels.gptq_block.eager",
        "reference": "quant.kernels.gptq_block.reference",
    },
    "lazy_update": {
        "triton": "quant.kernels.lazy_update.triton",
        "torch": "quant.kernels.lazy_update.eager",
    },
    "turned": {
        "triton": "quant.kernels.turned.triton",
        "torch": "quant.kernels.turned.eager",
    },
    "row_sums": {
        "triton": "quant.kernels.row_sums.triton",
        "torch": "quant.kernels.row_sums.eager",
    },
    "kmeans_columns": {
        "cuda": "quant.kernels.kmeans_columns.cuda",
        "cpu": "quant.kernels.kmeans_columns.cpu",
        "torch": "quant.kernels.kmeans_columns.batched",
        "reference": "quant.kernels.kmeans_columns.reference",
    },
    "claq_block": {
        "cuda": "quant.kernels.claq_block.cuda",
        "cpu": "quant.kernels.claq_block.cpu",
        "torch": "quant.kernels.claq_block.eager",
    },
    "braq_search": {
        "cuda": "quant.kernels.braq_search.cuda",
        "cpu": "quant.kernels.braq_search.cpu",
        "torch": "quant.kernels.braq_search.batched",
    },
    "braq_block": {
        "cuda": "quant.kernels.braq_block.cuda",
        "torch": "quant.kernels.braq_block.eager",
    },
    "wq_gemv": {
        "cpu": "quant.kernels.wq_gemv.cpu",
        "cuda": "quant.kernels.wq_gemv.cuda",
        "triton": "quant.kernels.wq_gemv.triton",
        "reference": "quant.kernels.wq_gemv.reference",
    },
    "wq_gemm": {
        "triton": "quant.kernels.wq_gemm.triton",
        "reference": "quant.kernels.wq_gemm.reference",
    },
    "lut_gemv": {
        "cpu": "quant.kernels.lut_gemv.cpu",
        "cuda": "quant.kernels.lut_gemv.cuda",
        "triton": "quant.kernels.lut_gemv.triton",
        "reference": "quant.kernels.lut_gemv.reference",
    },
    "row_lut_gemv": {
        "cpu": "quant.kernels.row_lut_gemv.cpu",
        "cuda": "quant.kernels.row_lut_gemv.cuda",
        "triton": "quant.kernels.row_lut_gemv.triton",
        "reference": "quant.kernels.row_lut_gemv.reference",
    },
    "binary_gemv": {
        "cpu": "quant.kernels.binary_gemv.cpu",
        "cuda": "quant.kernels.binary_gemv.cuda",
        "triton": "quant.kernels.binary_gemv.triton",
        "reference": "quant.kernels.binary_gemv.reference",
    },
    "hessian_syrk": {
        "triton": "quant.kernels.hessian_syrk.triton",
        "torch": "quant.kernels.hessian_syrk.panels",
        "reference": "quant.kernels.hessian_syrk.reference",
    },
    "hadamard": {
        "triton": "quant.kernels.hadamard.triton",
        "reference": "quant.kernels.hadamard.reference",
    },
    "fake_quantize": {
        "cpu": "quant.kernels.fake_quantize.cpu",
        "triton": "quant.kernels.fake_quantize.triton",
        "reference": "quant.kernels.fake_quantize.reference",
    },
    "rtn_pack": {
        "cpu": "quant.kernels.rtn_pack.cpu",
        "triton": "quant.kernels.rtn_pack.triton",
        "reference": "quant.kernels.rtn_pack.reference",
    },
    "hqq_pack": {
        "cpu": "quant.kernels.hqq_pack.cpu",
        "triton": "quant.kernels.hqq_pack.triton",
        "reference": "quant.kernels.hqq_pack.reference",
    },
    "int8_linear": {
        "triton": "quant.kernels.int8_linear.triton",
        "torch": "quant.kernels.int8_linear.eager",
        "cpu": "quant.kernels.int8_linear.cpu",
        "reference": "quant.kernels.int8_linear.reference",
    },
    "kv_attention": {
        "triton": "quant.kernels.kv_attention.triton",
        "reference": "quant.kernels.kv_attention.reference",
    },
    "token_log_probs": {
        "triton": "quant.kernels.token_log_probs.triton",
        "reference": "quant.kernels.token_log_probs.reference",
    },
}
"""Operation ▸ backend ▸ module, the fastest first."""

DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}
"""Backend ▸ the type of device it is for. The others serve all."""

_chosen: ContextVar[dict[str, list[str]] | None] = ContextVar("chosen", default=None)
_noted: ContextVar[list[str] | None] = ContextVar("noted", default=None)
_telling = Lock()
_preferred: ContextVar[tuple[str, str]] = ContextVar("preferred", default=("auto", "backend"))
"""What auto means, and the setting that said so."""


def preferring(backend: str, setting: str = "backend") -> AbstractContextManager[tuple[str, str]]:
    """While it lasts, in this thread, this is what auto means to operations that have it. setting: its name where the user sets it, for
    errors."""
    return during(_preferred, (backend, setting))


def recorded() -> AbstractContextManager[dict[str, list[str]]]:
    """Operation ▸ backends of all kernels that are chosen while the context lasts, in this thread and in those that run in copies of its
    context."""
    return during(_chosen, dict[str, list[str]]())


def noted() -> AbstractContextManager[list[str]]:
    """What `Kernel.notes` say of all kernels that are chosen while the context lasts, each once; in the threads of `recorded`."""
    return during(_noted, list[str]())


def ran(operation: str, backend: str) -> None:
    """Adds to the record: what `kernel` chooses, and what does a part of an operation that its kernels leave to others."""
    found = _chosen.get()
    if found is not None:
        with _telling:
            if backend not in found.setdefault(operation, []):
                found[operation].append(backend)


@dataclass(frozen=True)
class Kernel:
    """What was chosen: `run` is the module with the operation's functions."""

    run: Any
    backend: str
    notes: list[str]
    """Why a faster twin for this device was passed over."""


def unavailable(operation: str, backend: str, device: torch.device | str = "cpu") -> str | None:
    """None, or why a backend of an operation does not work on the device."""
    twin: Any = import_module(TABLE[operation][backend])
    reason: str | None = twin.unavailable(torch.device(device)) if hasattr(twin, "unavailable") else None
    return reason


def kernel(operation: str, backend: str = "auto", device: torch.device | str = "cpu", **given: Any) -> Kernel:
    """given: what it is for, as the operation's twins with `refuses` have it.

    Raises ValueError for an unknown operation or backend, BackendError where the backend asked for does not work."""
    if operation not in TABLE:
        raise ValueError(f"kernel {operation!r} is unknown; choose one of {', '.join(TABLE)}")
    row = TABLE[operation]
    if backend != "auto" and backend not in row:
        raise ValueError(f"backend {backend!r} of {operation} is unknown; choose one of auto, {', '.join(row)}")
    setting, (preferred, its_name) = "backend", _preferred.get()
    if backend == "auto" and preferred in row:
        backend, setting = preferred, its_name
    place = torch.device(device)
    reasons: list[str] = []
    for name in [b for b in row if DEVICES.get(b, place.type) == place.type] if backend == "auto" else [backend]:
        module = import_module(row[name])
        reason = module.unavailable(place) if hasattr(module, "unavailable") else None
        if reason is None and given and hasattr(module, "refuses"):
            reason = module.refuses(**given)
        if reason is None:
            ran(operation, name)
            notes = [f"{operation} runs slower: {why}" for why in reasons]
            found = _noted.get()
            if found is not None:
                with _telling:
                    found += [note for note in notes if note not in found]
            return Kernel(module, name, notes)
        reasons.append(reason)
    others = [b for b in row if b != backend and DEVICES.get(b, place.type) == place.type]
    asked = "" if setting == "backend" else f"{setting}={backend}: "
    raise BackendError(
        f"{asked}backend {backend} of {operation} does not work on {place}: {'; '.join(reasons)}; "
        f"choose {setting}={' or '.join(['auto', *others])}"
    )
