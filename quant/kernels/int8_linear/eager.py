"""The sums by the library that torch has for the device: cuBLASLt, and oneDNN on CPUs that add up products of 8 bits (AVX-512 VNNI)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.kernels import int8_linear as operation
from quant.kernels.fake_quantize import RowCodes
from quant.kernels.int8_linear import Packed, rounded, scaled
from quant.scheme import ActivationScheme
from quant.tensors.affine import AffineTensor

__all__ = ["int8_linear", "multiply", "prepare", "rounded", "unavailable"]

FEWEST_ROWS = 32
"""Of x on a GPU, which multiplies no fewer than 17."""
STEP = 8
"""Rows and columns of a weight on a GPU come in multiples of it."""


def unavailable(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None
    if device.type != "cpu":
        return f"torch multiplies integers on a CPU or a CUDA GPU, not on {device}"
    found = getattr(torch.cpu, "_is_vnni_supported", None)
    if found is not None and found():
        return None
    return "this CPU has no instruction for products of 8 bits (AVX-512 VNNI), and torch then multiplies them one by one"


def prepare(tensor: AffineTensor, activation: ActivationScheme) -> Packed:
    n, k = tensor.shape
    if tensor.codes.is_cuda and (n % STEP or k % STEP):
        raise ValueError(f"{n} x {k}; on a GPU rows and columns must be multiples of {STEP}: use backend=reference")
    return operation.prepare(tensor, activation)


def multiply(rows: RowCodes, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    m = rows.codes.shape[0]
    missing = max(0, FEWEST_ROWS - m) if rows.codes.is_cuda else 0
    codes = pad(rows.codes, (0, 0, 0, missing)) if missing else rows.codes
    return scaled(torch._int_mm(codes, packed.codes.T)[:m], rows, packed, dtype)


def int8_linear(x: Tensor, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    return multiply(rounded(x, packed), packed, dtype)
