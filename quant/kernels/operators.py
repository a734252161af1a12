"""How a kernel becomes an operator of torch, `torch.ops.bitgrid.*`; `quant.kernels.library` has them all.

Registered by `Library` itself: the decorator `custom_op` adds several microseconds to each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("bitgrid", "DEF")  # type: ignore[no-untyped-call]


def define(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any], check: Callable[..., None] | None = None, whole: bool = False
) -> None:
    """fake: what `run` returns, in shape, type and layout. check: raises for what kernels do not take, which read by address. whole: they
    read tensors that are contiguous."""
    name = schema.partition("(")[0]

    def checked(*given: Any, **named: Any) -> Any:
        if check is not None:
            check(*given, **named)
        return run(*map(_contiguous, given), **named) if whole else run(*given, **named)

    LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, checked, "CPU")  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, on_its_gpu(checked), "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"bitgrid::{name}", fake, lib=LIBRARY)


def _contiguous(given: Any) -> Any:
    if isinstance(given, list):
        return list(map(_contiguous, given))
    return given.contiguous() if isinstance(given, Tensor) else given


def on_its_gpu(run: Callable[..., Any]) -> Callable[..., Any]:
    """With the first tensor's GPU as the current one, on which Triton launches wherever tensors are."""

    def there(first: Tensor, *given: Any, **named: Any) -> Any:
        if first.device.index == torch.cuda.current_device():
            return run(first, *given, **named)
        with torch.cuda.device(first.device):
            return run(first, *given, **named)

    return there
