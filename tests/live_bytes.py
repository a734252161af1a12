"""Bytes of live tensors, exactly: what the peak of a stage is measured with where its models are too small for the process's memory
to show them."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Within, sums the storages that operations have read or made, each from its first use until it is freed. Views count once.

    Values made by other threads or libraries (a checkpoint's weights) are seen as soon as an operation reads them. What one
    operation needs and frees inside itself is not seen; it cannot outlast the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._see(args)
        if kwargs:
            self._see(tuple(kwargs.values()))
        self._see(out)
        return out

    def _see(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._add(value)
        elif isinstance(value, (tuple, list)):
            for v in value:
                self._see(v)

    def _add(self, tensor: Tensor) -> None:
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        # A storage has one Python object for as long as it lives, whoever holds it.
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
