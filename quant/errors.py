"""Exceptions of the quantization code that a caller must tell apart.

ValueError
├── NonFiniteError        NaN or infinity in a weight, statistic or input
└── SingularHessianError  no damping of the ladder makes the Hessian positive definite
RuntimeError
└── BackendError          the kernel that was asked for by name does not work on the device, or with what it is given
QuantizationWarning       a fallback or departure that `quantize_linear` took
"""

from __future__ import annotations

import torch
from torch import Tensor


class NonFiniteError(ValueError):
    """Names how many values are not finite and where the first one is."""


class BackendError(RuntimeError):
    """Names the setting that asked for it, the reason, and what to choose instead."""


class QuantizationWarning(UserWarning):
    """A note of a method, where there is no record to hold it (`quant.quantize_linear`)."""


class SingularHessianError(ValueError):
    """Names the damping values that were tried."""


def require_finite(what: str, x: Tensor) -> None:
    """Raises NonFiniteError when `x` holds NaN or infinity."""
    if bool(torch.isfinite(x.sum(dtype=torch.float64))):
        return
    bad = ~torch.isfinite(x)
    count = int(bad.sum())
    if count:
        position = tuple(int(i) for i in bad.nonzero()[0])
        raise NonFiniteError(
            f"{what} of shape {tuple(x.shape)} has {count} NaN or infinite values, the first at {position}; "
            "check the checkpoint, or the data type it was run in"
        )
