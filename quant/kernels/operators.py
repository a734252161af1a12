"""How a kernel becomes an operator of torch, `torch.ops.bitgrid.*`; `quant.kernels.library` has them all.

Registered by `Library` itself: the decorator `custom_op` adds several microseconds to each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("bitgrid", "DEF")  # type: ignore[no-untyped-call]


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """fake: what `run` returns, in shape, type and layout."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"bitgrid::{name}", fake, lib=LIBRARY)
