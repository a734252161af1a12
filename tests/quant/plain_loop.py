"""The plain loop of the GPTQ block where it takes errors off by one operation, rounded once: what twins that fuse give, bit for bit."""

from __future__ import annotations

import ctypes
import ctypes.util

import torch
from torch import Tensor

from quant.affine import Affine
from quant.kernels.gptq_block import SolvedBlock

FMA = ctypes.CDLL(ctypes.util.find_library("m")).fma
"""C's, of three doubles."""
FMA.restype, FMA.argtypes = ctypes.c_double, [ctypes.c_double] * 3


def less(x: Tensor, e: Tensor, u: Tensor) -> Tensor:
    """x - e · u, rounded once. Of float32 in float64, where products are exact; a difference that is not is moved to the neighbour whose
    last bit is 1 ("round to odd"), after which rounding to half as many bits gives what one rounding gives (Boldo and Melquiond 2008).
    Of float64 by the C library, number by number."""
    if x.dtype is torch.float64:
        x, e, u = torch.broadcast_tensors(x, e, u)
        numbers = zip(x.flatten().tolist(), e.flatten().tolist(), u.flatten().tolist(), strict=True)
        return torch.tensor([FMA(-b, c, a) for a, b, c in numbers], dtype=torch.float64).view(x.shape)
    p, x = e.double() * u.double(), x.double()
    s = x - p
    q = s - x
    rest = (x - (s - q)) - (p + q)
    toward = torch.where(rest > 0, torch.inf, -torch.inf).double()
    even = torch.isfinite(rest) & (rest != 0) & (s.view(torch.int64) & 1 == 0)
    return torch.where(even, torch.nextafter(s, toward), s).float()


def plain_loop(block: Tensor, upper: Tensor, affine: Affine, group: list[int]) -> SolvedBlock:
    w = block.clone()
    out = SolvedBlock.like(w)
    for j in range(len(w)):
        own = Affine(affine.scale[group[j]], affine.zero[group[j]], affine.bits, affine.kind, affine.tops)
        out.codes[j] = own.encode(w[j])
        out.values[j] = own.decode(out.codes[j])
        out.errors[j] = (w[j] - out.values[j]) / upper[j, j]
        w[j + 1 :] = less(w[j + 1 :], out.errors[j], upper[j, j + 1 :, None])
    return out


def same(got: SolvedBlock, want: SolvedBlock) -> None:
    """Bit for bit, but for which NaN and which zero."""
    for name in ("codes", "values", "errors"):
        ours, theirs = getattr(got, name), getattr(want, name)
        assert torch.equal(ours.nan_to_num(12345.0), theirs.nan_to_num(12345.0)), name
