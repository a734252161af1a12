"""One file per method. `base.py` has the protocols; `registry.py` names them, `make.py` makes them.

Importing this package loads no method, so that planning code may read facts from yaml without torch.
"""

from __future__ import annotations

from typing import Any

__all__ = ["model_transform", "rounding", "rounding_or_tuner", "toolkit_method", "transform"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from quant.methods import make

        return getattr(make, name)
    raise AttributeError(f"module 'quant.methods' has no attribute {name!r}")
