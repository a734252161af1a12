"""The plain loop of the GPTQ block where it takes errors off by one operation, rounded once: what the twin in C++ gives, bit for bit; and
what holds of each row in whatever order its errors are added up."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind
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


def poisoned(block: Tensor) -> SolvedBlock:
    """What a twin is to write over: no code of less than 8 bits, and no number."""
    return SolvedBlock(torch.full_like(block, 255, dtype=torch.uint8), torch.full_like(block, torch.nan), torch.full_like(block, torch.nan))


def plain_loop(block: Tensor, upper: Tensor, affine: Affine, group: list[int]) -> SolvedBlock:
    w = block.clone()
    out = SolvedBlock.like(w)
    for j in range(len(w)):
        own = affine.of_group(group[j])
        code = own.encode(w[j])
        out.codes[j], out.values[j] = code, own.decode(code)
        out.errors[j] = (w[j] - out.values[j]) / upper[j, j]
        w[j + 1 :] = less(w[j + 1 :], out.errors[j], upper[j, j + 1 :, None])
    return out


def same(got: SolvedBlock, want: SolvedBlock) -> None:
    """Bit for bit, but for which NaN and which zero."""
    for name, ours, theirs in _pairs(got, want):
        assert torch.equal(ours, theirs), name


def follows(got: SolvedBlock, block: Tensor, upper: Tensor, affine: Affine, group: list[int], roundings: int) -> Tensor:
    """Of each row `[N]`, whether every column is what the errors before it, as they are in `got`, leave of it: in float64, but for
    `roundings` of float32 of the numbers that are added up. Values are those of the codes bit for bit; errors are rounded twice more."""
    good = torch.isfinite(torch.cat([got.values, got.errors])).all(0)
    unit = 2.0**-24
    for j in range(len(block)):
        own = affine.of_group(group[j])
        fine = replace(own, scale=own.scale.double(), zero=own.zero.double())
        x, made, size = _left(got, block, upper, j)
        off = roundings * unit * size
        code, value = got.codes[j].double(), got.values[j].double()
        good &= got.values[j] == own.decode(got.codes[j])
        good &= (made - x).abs() <= off + 2 * unit * (x - value).abs()
        # Steps are a quotient and a sum, each rounded.
        off += 2 * unit * (x.abs() + (fine.zero if own.kind is ZeroKind.MINIMUM else fine.zero * fine.scale).abs())
        ends = torch.stack([fine.encode(x - off), fine.encode(x + off)])
        good &= (ends.amin(0) <= code) & (code <= ends.amax(0))
    return good


def off_by(got: SolvedBlock, block: Tensor, upper: Tensor) -> float:
    """Root mean square of what columns are off by, in roundings as `follows` counts them."""
    columns = (_left(got, block, upper, j) for j in range(len(block)))
    return float(torch.stack([(made - x) / (2.0**-24 * size) for x, made, size in columns]).square().mean().sqrt())


def _left(got: SolvedBlock, block: Tensor, upper: Tensor, j: int) -> tuple[Tensor, Tensor, Tensor]:
    """In float64 `[N]`: what the errors before column j leave of it; what it was when it was rounded, by its value and its error; and the
    size of the numbers that are added up."""
    u, e, w = upper[: j + 1, j].double(), got.errors[: j + 1].double(), block[j].double()
    terms = e[:j] * u[:j, None]
    return w - terms.sum(0), got.values[j].double() + e[j] * u[j], w.abs() + terms.abs().sum(0)


def alike(got: SolvedBlock, want: SolvedBlock) -> Tensor:
    """Of each row `[N]`, whether all is the same bit for bit, but for which NaN and which zero."""
    return torch.stack([(ours == theirs).all(0) for _, ours, theirs in _pairs(got, want)]).all(0)


def _pairs(got: SolvedBlock, want: SolvedBlock) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Names and both; all NaN are one, and have no code."""
    yield "codes", *(torch.where(solved.values.isnan(), 0, solved.codes) for solved in (got, want))
    for name in ("values", "errors"):
        yield name, getattr(got, name).nan_to_num(12345.0), getattr(want, name).nan_to_num(12345.0)
