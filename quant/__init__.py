"""Quantization: tensors in, tensors out. Imports torch and nothing else of this project.

`quant.quantize_linear` is the public entry for notebooks. Names are loaded on first use, so that
`quant.scheme` (standard library only) can be imported by planning code without torch.
"""

from typing import Any

__all__ = ["quantize_linear"]


def __getattr__(name: str) -> Any:
    if name == "quantize_linear":
        from quant.linear import quantize_linear

        return quantize_linear
    raise AttributeError(f"module 'quant' has no attribute {name!r}")
