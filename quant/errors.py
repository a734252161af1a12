"""Exceptions of the quantization code that a caller must tell apart.

ValueError
├── NonFiniteError        NaN or infinity in a weight, statistic or input
├── ScaleDtypeError       a scale, zero or table that the stored type cannot hold closely enough
└── SingularHessianError  no damping of the ladder makes the Hessian positive definite
RuntimeError
└── BackendError          the kernel that was asked for by name does not work on the device, or with what it is given
QuantizationWarning       a fallback or departure that `quantize_linear` took
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NonFiniteError(ValueError):
    """Names how many values are not finite and where the first one is."""


class ScaleDtypeError(ValueError):
    """Says how many scales, zeros or tables the stored type cannot hold closely enough for the codes to be right, and which type."""


class BackendError(RuntimeError):
    """Names the setting that asked for it, the reason, and what to choose instead."""


class QuantizationWarning(UserWarning):
    """A note of a method, where there is no record to hold it (`quant.quantize_linear`)."""


class SingularHessianError(ValueError):
    """Names the damping values that were tried."""


def require_all_finite(given: Sequence[tuple[str, Tensor]]) -> None:
    """As `require_finite` of each (what, tensor); waits for a device once where all are finite."""
    sums = [_total(x).to(given[0][1].device, torch.float64) for _, x in given]
    if not bool(torch.isfinite(torch.stack(sums)).all()):
        for what, x in given:
            require_finite(what, x)


def require_finite(what: str, x: Tensor) -> None:
    """Raises NonFiniteError when `x` holds NaN or infinity."""
    if bool(torch.isfinite(_total(x))):
        return
    bad = ~torch.isfinite(x)
    count = int(bad.sum())
    if count:
        position = tuple(int(i) for i in bad.nonzero()[0])
        raise NonFiniteError(
            f"{what} of shape {tuple(x.shape)} has {count} NaN or infinite values, the first at {position}; "
            "check the checkpoint, or the data type it was run in"
        )


def _total(x: Tensor) -> Tensor:
    """Finite only where all of x is. In float32, where that holds what x may: for a sum in float64 a GPU writes x out in it. Where a sum of
    finite numbers is too large, they are looked at one by one."""
    return x.sum(dtype=torch.float32 if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float64)
