"""The layout that the CUDA twin reads, and its host twin: in the order in which the lanes of a warp hand a tensor core its operands.

A tile is 16 rows of the weight, a step 128 columns; both are padded with zeros. Of a step, lane 4 g + t has the rows g and g + 8, and of
each slice of 32 columns the eight from 8 t on. Those are pairs of neighbouring columns: pair p = 8 q + 4 h + 2 c + r is row g + 8 r,
columns 32 q + 8 t + 4 h + 2 c and the next. Both codes of a pair lie in one word, at one place of its lower and its upper 16 bits:

- with 4 or 8 bits, the pairs of a word one after another from bit 0 on
- with 2 bits, the pairs of a word in the order 0, 4, 1, 5, 2, 6, 3, 7
- with 3 bits, 16 pairs are in three words, five in each (`ORDERS`), and the last one's bits in bit 15 of either half of the three

A product of 16 columns has four pairs, those of one h, which are to be masked out at one place. With 2 and 3 bits one shift of a word does
for two pairs: that of h = 0 in the lowest bits, that of h = 1 right above it (but the last pairs of the three words take shifts of their
own).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.affine import ZeroKind
from quant.kernels.wq_gemv import Packed, refusal
from quant.tensors.affine import AffineTensor

ROWS, STEP, LANES, PAIRS = 16, 128, 32, 32
"""Of a tile; columns of a step; lanes; pairs that a lane has of a step."""
ORDERS = {2: (0, 4, 1, 5, 2, 6, 3, 7), 3: (0, 4, 1, 5, 10, 2, 6, 3, 7, 11, 8, 12, 9, 13, 14), 4: (0, 1, 2, 3), 8: (0, 1)}
"""Bits ▸ pairs of a word, of three words with 3 bits, from bit 0 on."""


@dataclass(frozen=True)
class Fragments(Packed):
    """words: int32 `[T, S, 64 bits]`: tiles, steps, then what lanes copy at once, 16 bytes (and 8, with 3 bits), a lane after another.
    ranges: `[T, G, 8, 2, 2]`: g, the rows g and g + 8, and float16 scale and zero, or float32 scale and offset where that is not exact."""

    def codes(self) -> Tensor:
        return read_out(self.words, self.bits, self.shape)

    def values(self, dtype: torch.dtype) -> Tensor:
        n, k = self.shape
        scale, second = (
            self.ranges.to(dtype).permute(4, 0, 3, 2, 1).reshape(2, -1, self.groups)[:, :n].repeat_interleave(k // self.groups, 2)
        )
        codes = self.codes().to(dtype)
        weight: Tensor = (codes - second) * scale if self.ranges.dtype is torch.float16 else codes * scale + second
        return weight


def prepare(tensor: AffineTensor) -> Fragments:
    """The same codes, laid out anew. Raises ValueError for what the layout does not hold."""
    reason = refusal(tensor)
    if reason is not None:
        raise ValueError(reason)
    words = laid_out(tensor.codes, tensor.bits)
    # A copy: given is what may begin anywhere in other memory.
    scale = None if tensor.input_scale is None else tensor.input_scale.float().clone(memory_format=torch.contiguous_format)
    return Fragments(words, _ranges(tensor), scale, tensor.shape, tensor.bits)


def laid_out(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[N, K]` ▸ `Fragments.words`."""
    n, k = codes.shape
    padded = pad(codes, (0, -k % STEP, 0, -n % ROWS))
    tiles, steps = padded.shape[0] // ROWS, padded.shape[1] // STEP
    # Rows r, g and columns q, t, h, c, e of the docstring above.
    ordered = padded.reshape(tiles, 2, 8, steps, 4, 4, 2, 2, 2).permute(0, 3, 2, 5, 4, 6, 7, 1, 8).reshape(tiles, steps, LANES, PAIRS, 2)
    pairs = ordered[..., 0].to(torch.int32) | ordered[..., 1].to(torch.int32) << 16
    if bits != 3:
        held = pairs.view(tiles, steps, LANES, 2 * bits, 16 // bits)[..., ORDERS[bits]]
        words = _joined(held, bits)
        return words.view(tiles, steps, LANES, -1, 4).transpose(2, 3).reshape(tiles, steps, -1)
    held = pairs.view(tiles, steps, LANES, 2, 16)
    words = _joined(held[..., ORDERS[3]].view(tiles, steps, LANES, 2, 3, 5), 3)
    last = torch.stack([(held[..., 15] >> b & 0x00010001) << 15 for b in range(3)], -1)
    words = (words | last).flatten(-2)
    return torch.cat([words[..., :4].flatten(2), words[..., 4:].flatten(2)], -1)


def _joined(pairs: Tensor, bits: int) -> Tensor:
    """int32 `[..., pairs of a word]` ▸ `[...]`."""
    words = pairs[..., 0].clone()
    for i in range(1, pairs.shape[-1]):
        words |= pairs[..., i] << bits * i
    return words


def _inverse(order: tuple[int, ...]) -> list[int]:
    return [order.index(i) for i in range(len(order))]


def read_out(words: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """Inverse of `laid_out`: codes uint8 `[N, K]`."""
    tiles, steps = words.shape[:2]
    mask = (2**bits - 1) * 0x00010001
    if bits != 3:
        own = words.reshape(tiles, steps, -1, LANES, 4).transpose(2, 3).reshape(tiles, steps, LANES, 2 * bits)
        pairs = torch.stack([own >> bits * i & mask for i in range(16 // bits)], -1)[..., _inverse(ORDERS[bits])]
    else:
        own = torch.cat([words[..., :128].view(tiles, steps, LANES, 4), words[..., 128:].view(tiles, steps, LANES, 2)], -1)
        own = own.view(tiles, steps, LANES, 2, 3)
        first = torch.stack([own >> 3 * i & mask for i in range(5)], -1).flatten(-2)[..., _inverse(ORDERS[3])]
        last = sum((own[..., b] >> 15 & 0x00010001) << b for b in range(3))
        assert isinstance(last, Tensor)
        pairs = torch.cat([first, last.unsqueeze(-1)], -1)
    pairs = pairs.reshape(tiles, steps, LANES, PAIRS)
    codes = torch.stack([pairs & 255, pairs >> 16 & 255], -1).to(torch.uint8)
    rows = codes.view(tiles, steps, 8, 4, 4, 2, 2, 2, 2).permute(0, 7, 2, 1, 4, 3, 5, 6, 8).reshape(tiles * ROWS, steps * STEP)
    n, k = shape
    return rows[:n, :k]


def _ranges(tensor: AffineTensor) -> Tensor:
    n = tensor.shape[0]
    scale, zero = tensor.scale.double(), tensor.zero.double()
    exact = tensor.scale.dtype is torch.float16 and tensor.kind is not ZeroKind.MINIMUM and torch.equal(zero.half().double(), zero)
    second = zero if exact or tensor.kind is ZeroKind.MINIMUM else -zero * scale
    both = torch.stack([scale, second]).to(torch.float16 if exact else torch.float32).expand(2, n, -1)
    # [2, T, r, g, G] ▸ [T, G, g, r, 2].
    return pad(both, (0, 0, 0, -n % ROWS)).reshape(2, -1, 2, 8, both.shape[2]).permute(1, 4, 3, 2, 0).contiguous()
