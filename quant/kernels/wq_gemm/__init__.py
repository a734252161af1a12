"""`wq_gemm`: 9 to some hundred rows of activations times a weight of integer codes, without making the weight in memory.

out `[M, N]` = x `[M, K]` · weightᵀ with tensor cores and float32 sums. x: float16 or bfloat16; where the stored weight has an input scale,
x is divided by that first. Every backend has
- `prepare(tensor) ▸ packed`, once per weight (an `AffineTensor`). Raises ValueError for what it does not take
- `wq_gemm(x, packed, out=None) ▸ out` in the type of x; `out` is written to and returned

A group's columns give scale · Σ (code - zero) · x; where a zero is no code, scale · Σ (code - middle) · x + offset · Σ x, with the offset
that the middle code 2^(bits - 1) stands for. Codes less their zero are exact in the operands; `triton` says when scales are rounded too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.accounting import size_bytes
from quant.affine import ZeroKind
from quant.tensors.affine import AffineTensor

BITS = (2, 3, 4, 8)
PANEL, LANES = 16, 4
"""Rows that are neighbours in memory; lanes of a tensor core's fragment that share a row."""
UNIT = {2: 256, 3: 256, 4: 128, 8: 64}
"""Bits ▸ columns that a row's 16 neighbouring words hold; of 3 bits, the lower two."""
STEP = 32
"""Columns: the fewest that share a scale."""
TYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Packed:
    """An affine weight as tensor cores read it: `P` panels of 16 rows, `U` units of columns, padded with zeros.

    A row's 16 words of a unit are those of lane 0, 1, 2 and 3. With b bits a lane's word j has the pairs of columns number
    p = j · 16/b + q, q = 0 to 16/b - 1: columns 8 p + 2 lane and the one after it, from bits b · q and b · q + 16 on. The third bit of 3
    is a code of 1 bit of the same kind, in words of its own.
    """

    low: Tensor
    """int32 `[P, U, 16, 16]`: rows, then words."""
    high: Tensor | None
    """int32 `[P, U, 4, 16, 2]`: lanes, rows, words; for 3 bits."""
    scale: Tensor
    """float16 or float32 `[G, 16 P]`."""
    zero: Tensor | None
    """`[G, 16 P]`: the codes that stand for 0, uint8; or float32, what the middle code stands for. None: the middle codes stand for 0."""
    input_scale: Tensor | None
    """float32 `[K]`."""
    shape: tuple[int, int]
    """(N, K)."""
    bits: int

    @property
    def bytes(self) -> int:
        """What a call reads of the weight."""
        return size_bytes(self.low, self.high, self.scale, self.zero, self.input_scale)

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.scale.shape[0]

    @property
    def offsets(self) -> bool:
        return self.zero is not None and self.zero.dtype is torch.float32

    def codes(self) -> Tensor:
        """uint8 `[N, K]`, as they were before `prepare`."""
        width = 2 if self.bits == 3 else self.bits
        codes = read_out(self.low, width, self.shape)
        if self.high is not None:
            codes = codes | read_out(self.high.transpose(2, 3).flatten(3), 1, self.shape) << 2
        return codes

    def values(self, dtype: torch.dtype) -> Tensor:
        """`[N, K]` as codes and ranges have it, before the input scale."""
        n, _ = self.shape
        middle = 2 ** (self.bits - 1)
        zero = torch.full_like(self.scale, middle) if self.zero is None else self.zero
        scale, other = (t[:, :n].T.to(dtype).repeat_interleave(self.group, 1) for t in (self.scale, zero))
        codes = self.codes().to(dtype)
        made: Tensor = (codes - middle) * scale + other if self.offsets else (codes - other) * scale
        return made


def prepare(tensor: AffineTensor) -> Packed:
    """The same codes, laid out anew. Raises ValueError for what the layout does not hold."""
    n, k = tensor.shape
    bits = tensor.bits
    if bits not in BITS:
        raise ValueError(f"codes of {bits} bits; the packed layout has {', '.join(map(str, BITS))}: use backend=reference")
    if tensor.g_idx is not None:
        raise ValueError("groups are given by g_idx (act-order), so that columns of one group lie apart: use backend=reference")
    if tensor.group_size % STEP and tensor.group_size != k:
        raise ValueError(
            f"groups of {tensor.group_size} columns of {k}; the packed layout takes multiples of {STEP}: use backend=reference"
        )
    low = laid_out(tensor.codes & (3 if bits == 3 else 255), 2 if bits == 3 else bits, UNIT[bits])
    high = None
    if bits == 3:
        words = laid_out(tensor.codes >> 2, 1, UNIT[bits])
        high = words.view(*words.shape[:3], LANES, -1).transpose(2, 3).contiguous()
    inputs = None if tensor.input_scale is None else tensor.input_scale.float()
    return Packed(low, high, _by_group(tensor.scale, n), _zero(tensor), inputs, (n, k), bits)


def laid_out(codes: Tensor, width: int, unit: int) -> Tensor:
    """Codes of `width` bits, uint8 `[N, K]` ▸ int32 `[P, U, 16, words]`."""
    n, k = codes.shape
    each = 16 // width
    count = unit // 8 // each
    # [P, rows, U, words of a lane, pairs of a word, lanes, 2].
    parts = pad(codes, (0, -k % unit, 0, -n % PANEL)).reshape(-(-n // PANEL), PANEL, -(-k // unit), count, each, LANES, 2)
    words = torch.zeros(*parts.shape[:4], LANES, dtype=torch.int32, device=codes.device)
    for q in range(each):
        for half in range(2):
            words |= parts[:, :, :, :, q, :, half].to(torch.int32) << (width * q + 16 * half)
    return words.permute(0, 2, 1, 4, 3).flatten(3).contiguous()


def read_out(words: Tensor, width: int, shape: tuple[int, int]) -> Tensor:
    """Inverse of `laid_out`: codes uint8 `[N, K]`."""
    n, k = shape
    lanes = words.reshape(*words.shape[:3], LANES, -1)
    mask = 2**width - 1
    pairs = [torch.stack([(lanes >> (width * q + 16 * h) & mask).to(torch.uint8) for h in range(2)], -1) for q in range(16 // width)]
    # [P, U, rows, lanes, words of a lane, pairs of a word, 2].
    codes = torch.stack(pairs, -2).permute(0, 2, 1, 4, 5, 3, 6)
    return codes.reshape(words.shape[0] * PANEL, -1)[:n, :k].contiguous()


def _by_group(ranges: Tensor, n: int) -> Tensor:
    """`[R, G]` ▸ `[G, 16 P]`."""
    return pad(ranges.expand(n, -1).T, (0, -n % PANEL)).contiguous()


def _zero(tensor: AffineTensor) -> Tensor | None:
    """`Packed.zero`."""
    n, middle = tensor.shape[0], 2 ** (tensor.bits - 1)
    scale, zero = tensor.scale, tensor.zero
    if tensor.kind is ZeroKind.CONSTANT:
        return None
    if tensor.kind in (ZeroKind.CODE, ZeroKind.INTEGER):
        # A uint8 is compared with 256 as with 0.
        code = zero.to(torch.int32)
        if bool((code == middle).all()):
            return None
        if bool(((code >= 0) & (code < 2**tensor.bits)).all()):
            return _by_group(zero.to(torch.uint8), n)
    offset = scale.double() * middle + zero.double() if tensor.kind is ZeroKind.MINIMUM else (middle - zero.double()) * scale.double()
    return _by_group(offset.float(), n)


def given_out(x: Tensor, shape: tuple[int, int], out: Tensor | None) -> Tensor:
    """`out`, or new memory for it; not filled. shape: (N, K). Raises ValueError for an x or an out that no backend takes."""
    n, k = shape
    if x.dtype not in TYPES or x.dim() != 2 or x.shape[1] != k or not len(x):
        raise ValueError(f"x is {tuple(x.shape)}, {x.dtype}; it must be float16 or bfloat16 [1 or more, {k}]")
    if out is None:
        return torch.empty(len(x), n, dtype=x.dtype, device=x.device)
    if not out.is_contiguous() or out.dtype != x.dtype or out.shape != (len(x), n):
        raise ValueError(f"out is {tuple(out.shape)}, {out.dtype}; it must be contiguous {(len(x), n)}, {x.dtype}")
    return out
