"""Weights of random codes."""

from __future__ import annotations

import torch

from bench.on_gpu.clock import Bench
from quant.affine import ZeroKind
from quant.tensors.affine import AffineTensor
from quant.tensors.binary import BinaryTensor
from quant.tensors.codebook import CodebookTensor
from quant.tensors.row_codebook import RowCodebookTensor

GROUP = 128
"""Columns that share a scale."""


def affine(b: Bench, n: int, k: int, bits: int) -> AffineTensor:
    g = torch.Generator(b.device).manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8, device=b.device)
    scale = ((torch.rand(n, k // GROUP, generator=g, device=b.device) + 0.5) / 2**bits).half()
    zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8, device=b.device)
    return AffineTensor(codes, scale, zero, bits, ZeroKind.CODE)


def codebook(b: Bench, n: int, k: int, bits: int) -> CodebookTensor:
    g = torch.Generator(b.device).manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8, device=b.device)
    return CodebookTensor(codes, torch.full((k,), bits, device=b.device), b.random(k, 2**bits).half(), bits)


def row_codebook(b: Bench, n: int, k: int, bits: int) -> RowCodebookTensor:
    g = torch.Generator(b.device).manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8, device=b.device)
    return RowCodebookTensor(codes, b.random(n, 2**bits).half(), bits)


def signs(b: Bench, n: int, k: int) -> BinaryTensor:
    flags = [b.random(n, k + i)[:, :k] > 0 for i in range(3)]
    salient = b.random(k) > 1.6
    scale, mean = (b.random(n, k // GROUP, values).half() for values in (4, 3))
    return BinaryTensor(flags[0], flags[1] & salient, flags[2] & ~salient, salient, scale, mean, GROUP)
