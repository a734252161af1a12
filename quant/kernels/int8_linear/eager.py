"""The sums by the library that torch has for the device (`torch._int_mm`: cuBLASLt, oneDNN)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant import kernels
from quant.kernels import int8_linear as operation
from quant.kernels.fake_quantize import RowCodes
from quant.kernels.int8_linear import Packed
from quant.scheme import ActivationScheme
from quant.tensors.affine import AffineTensor

FEWEST_ROWS = 32
"""Of x on a GPU, which multiplies no fewer than 17."""
STEP = 8
"""Rows and columns of a weight on a GPU come in multiples of it."""


def unavailable(device: torch.device) -> str | None:
    return None if device.type in ("cpu", "cuda") else f"torch multiplies integers on a CPU or a CUDA GPU, not on {device}"


def prepare(tensor: AffineTensor, activation: ActivationScheme) -> Packed:
    n, k = tensor.shape
    if tensor.codes.is_cuda and (n % STEP or k % STEP):
        raise ValueError(f"{n} x {k}; on a GPU rows and columns must be multiples of {STEP}: use backend=reference")
    return operation.prepare(tensor, activation)


def rounded(x: Tensor, packed: Packed) -> RowCodes:
    run = kernels.kernel("fake_quantize", device=x.device).run
    made: RowCodes = run.encode(x, packed.bits, packed.symmetric, packed.clip)
    return made


def multiply(rows: RowCodes, packed: Packed) -> Tensor:
    m = rows.codes.shape[0]
    missing = max(0, FEWEST_ROWS - m) if rows.codes.is_cuda else 0
    sums = torch._int_mm(pad(rows.codes, (0, 0, 0, missing)) if missing else rows.codes, packed.codes.T)[:m].float()
    if packed.zero is not None:
        sums.addr_(rows.codes.sum(1, dtype=torch.int32).float(), packed.zero, alpha=-1)
    if not packed.symmetric:
        sums.addr_(rows.zero[:, 0], packed.sums, alpha=-1)
    return sums.mul_(rows.scale).mul_(packed.scale)


def int8_linear(x: Tensor, packed: Packed) -> Tensor:
    return multiply(rounded(x, packed), packed)
