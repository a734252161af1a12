"""`wq_gemv`: a few rows of activations times a weight of integer codes, without making the weight: out `[M, N]` = x `[M, K]` · weightᵀ.

What holds for every product with a packed weight: `quant.kernels.products`. The weight is an `AffineTensor`.

A group's columns give scale · Σ code · x + offset · Σ x, where the offset is what a code of 0 stands for. `reference` takes any affine
tensor; `cpu` takes what `Packed` can hold, `prepare` says what that is. `cuda` takes the same in a layout of its own (`fragments`).
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
LANES = 8
"""Columns that are neighbours in memory, and rows whose words are."""
STEP = 32
"""Columns: the fewest that share a scale."""


@dataclass(frozen=True)
class Packed:
    """An affine weight as a kernel reads it that takes 8 rows and 8 columns at a time: `T` tiles of 8 rows, `U` units of columns, padded
    with zeros. A unit is what words of 32 bits hold in 8 lanes; lane l has the unit's columns l, l + 8, l + 16, ... Its code number v lies

    - with 2, 4 or 8 bits in one word, from bit v · bits on: 128, 64 or 32 columns a unit
    - with 3 bits in three words, 256 columns a unit: codes 0 to 29 in word v // 10, from bit 3 · (v % 10) on. Codes 30 and 31 have their
      lower two bits in bits 30 and 31 of words 0 and 1, and the third in bit 30 and bit 31 of word 2
    """

    words: Tensor
    """int32 `[T, U, words, 8, 8]`: rows, then lanes."""
    ranges: Tensor
    """float32 `[T, G, 2, 8]`: scale and offset of the rows' groups."""
    input_scale: Tensor | None
    """float32 `[K]`."""
    shape: tuple[int, int]
    """(N, K)."""
    bits: int

    @property
    def bytes(self) -> int:
        """What a call reads of the weight."""
        return size_bytes(self.words, self.ranges, self.input_scale)

    @property
    def groups(self) -> int:
        return self.ranges.shape[1]

    def codes(self) -> Tensor:
        """uint8 `[N, K]`, as they were before `prepare`."""
        return read_out(self.words, self.bits, self.shape)

    def values(self, dtype: torch.dtype) -> Tensor:
        """`[N, K]` as the codes have it, before the input scale."""
        n, k = self.shape
        scale, offset = self.ranges.to(dtype).permute(2, 0, 3, 1).reshape(2, -1, self.groups)[:, :n].repeat_interleave(k // self.groups, 2)
        weight: Tensor = self.codes().to(dtype) * scale + offset
        return weight


@dataclass(frozen=True)
class _Field:
    """`width` bits of a code, from its bit `first` on, that lie in a word from bit `at` on."""

    word: int
    at: int
    first: int
    width: int

    @property
    def mask(self) -> int:
        return int(2**self.width - 1)


def _fields(bits: int) -> list[list[_Field]]:
    """Of each code of a lane, in the order of the columns."""
    if bits != 3:
        return [[_Field(0, v * bits, 0, bits)] for v in range(32 // bits)]
    whole = [[_Field(v // 10, 3 * (v % 10), 0, 3)] for v in range(30)]
    return whole + [[_Field(w, 30, 0, 2), _Field(2, 30 + w, 2, 1)] for w in range(2)]


def refusal(tensor: AffineTensor) -> str | None:
    """Why packed layouts do not hold the tensor; None where they do."""
    if tensor.bits not in BITS:
        return f"codes of {tensor.bits} bits; the packed layout has {', '.join(map(str, BITS))}: use backend=reference"
    if tensor.g_idx is not None:
        return (
            "groups are given by g_idx (act-order), so that columns of one group lie apart; the packed layout adds up neighbours: "
            "use backend=reference, or quantize without act_order"
        )
    group = tensor.group_size
    if group % STEP:
        return f"groups of {group} columns of {tensor.shape[1]}; the packed layout takes multiples of {STEP}: use backend=reference"
    return None


def prepare(tensor: AffineTensor) -> Packed:
    """The same codes, laid out anew. Raises ValueError for what the layout does not hold."""
    reason = refusal(tensor)
    if reason is not None:
        raise ValueError(reason)
    words = laid_out(tensor.codes, tensor.bits)
    return Packed(words, _ranges(tensor), None if tensor.input_scale is None else tensor.input_scale.float(), tensor.shape, tensor.bits)


def laid_out(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[N, K]` ▸ `Packed.words`."""
    n, k = codes.shape
    fields = _fields(bits)
    unit = len(fields) * LANES
    # [T, U, codes of a lane, rows, lanes].
    tiled = pad(codes, (0, -k % unit, 0, -n % LANES)).reshape(-(-n // LANES), LANES, -(-k // unit), len(fields), LANES)
    tiled = tiled.permute(0, 2, 3, 1, 4)
    words = torch.zeros(*tiled.shape[:2], 3 if bits == 3 else 1, LANES, LANES, dtype=torch.int32, device=codes.device)
    for v, parts in enumerate(fields):
        code = tiled[:, :, v].to(torch.int32)
        for part in parts:
            words[:, :, part.word] |= (code >> part.first & part.mask) << part.at
    return words


def read_out(words: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """Inverse of `laid_out`: codes uint8 `[N, K]`."""
    vectors = []
    for fields in _fields(bits):
        code = torch.zeros((), dtype=torch.int32, device=words.device)
        for field in fields:
            code = code | (words[:, :, field.word] >> field.at & field.mask) << field.first
        vectors.append(code.to(torch.uint8))
    tiled = torch.stack(vectors, dim=2).permute(0, 3, 1, 2, 4)
    n, k = shape
    return tiled.reshape(tiled.shape[0] * LANES, -1)[:n, :k]


def _ranges(tensor: AffineTensor) -> Tensor:
    """float32 `[T, G, 2, 8]`. A zero times a float16 scale has at most 24 bits (26 where a zero of 16 bits is large): nothing is lost."""
    n = tensor.shape[0]
    scale, zero = tensor.scale.double(), tensor.zero.double()
    offset = zero if tensor.kind is ZeroKind.MINIMUM else -zero * scale
    both = torch.stack([scale, offset]).float().expand(2, n, -1)
    return pad(both, (0, 0, 0, -n % LANES)).reshape(2, -1, LANES, both.shape[2]).permute(1, 3, 0, 2).contiguous()
