"""What operators of torch are given, looked at before a kernel reads memory by address: each function takes an operator's arguments and
raises ValueError for those whose sizes or types do not belong together. Nothing waits for a device: what stands in a tensor is not read.

K of a product is that of x: another K whose codes fill as many words of memory is not found out.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from quant.kernels import binary_gemv as binary
from quant.kernels import claq_block as claq
from quant.kernels import kv_attention as kv_cache
from quant.kernels import lut_gemv as lut
from quant.kernels import row_lut_gemv as row_lut
from quant.kernels import wq_gemm as gemm
from quant.kernels import wq_gemv as gemv
from quant.kernels.gptq_block import GRID_NUMBERS
from quant.kernels.lut_gemv import fragments as lut_fragments
from quant.kernels.wq_gemv import fragments as gemv_fragments

SOLVED, STORED = (torch.float32, torch.float64), (torch.float16, torch.float32)
SIGNED = ("q_sym", "absmax")
"""Grids without a step where codes have 1 bit."""
PREPARED = "give what `operands` gives of a cache, with its own numbers of bits"


def _require(right: bool, got: str | Callable[[], str], wanted: str) -> None:
    """got: a function where saying it takes microseconds, in each call of an operator."""
    if not right:
        raise ValueError(f"{got if isinstance(got, str) else got()}; {wanted}")


def _said(**tensors: Tensor | None) -> Callable[[], str]:
    return lambda: ", ".join(f"{name} is {None if t is None else (*t.shape,)}" for name, t in tensors.items())


def _bits(bits: int, least: int = 1) -> None:
    _require(least <= bits <= 8, f"bits={bits}", f"give {least} to 8")


def _matrix(name: str, x: Tensor) -> None:
    right = x.dim() == 2 and x.is_floating_point()
    _require(right, lambda: f"{name} is {tuple(x.shape)}, {x.dtype}", "it must be a matrix of floats: flatten(0, -2) gives one of rows")


def _block(block: Tensor, upper: Tensor) -> None:
    _matrix("block", block)
    _require(block.dtype in SOLVED, lambda: f"block is {block.dtype}", "it must be float32 or float64")
    b = len(block)
    _require(b > 0 and upper.shape == (b, b), _said(block=block, upper=upper), "give [B, N] and [B, B], B of 1 or more")


def gptq_block(
    block: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, group: list[int], bits: int, zero_kind: str, tops: Tensor | None = None
) -> None:
    _block(block, upper)
    _bits(bits)
    (b, n), right = block.shape, scale.dim() == 2 and zero.shape == scale.shape and (tops is None or tops.shape == block.shape[1:])
    _require(right and scale.shape[1] == n, _said(scale=scale, zero=zero, tops=tops), f"give [G, {n}] twice, and [{n}] or None")
    fits = len(group) == b and 0 <= min(group) and max(group) < len(scale)
    _require(fits, lambda: f"group={group}", f"give {b} numbers of groups, 0 to {len(scale) - 1}")


def gptq_block_fitted(block: Tensor, upper: Tensor, width: int, grid: str, bits: int, half: bool = True) -> None:
    _block(block, upper)
    _grid(grid, bits)
    _require(width > 0 and len(block) % width == 0, f"width={width}", f"give a divisor of the block's {len(block)} columns")


def _grid(grid: str, bits: int) -> None:
    _require(grid in GRID_NUMBERS, f"grid={grid!r}", f"choose one of {', '.join(GRID_NUMBERS)}")
    _bits(bits, 2 if grid in SIGNED else 1)


def lazy_update_(later: Tensor, left: Tensor, right: Tensor) -> None:
    fits = later.dim() == left.dim() == right.dim() == 2 and later.shape == (len(left), right.shape[1]) and left.shape[1] == len(right)
    alike = later.dtype == left.dtype == right.dtype
    _require(fits and alike, _said(later=later, left=left, right=right), "give [R, N], [R, B] and [B, N] of one type")


def hessian_syrk_(total: Tensor, x: Tensor) -> None:
    fits = x.dim() == 3 and x.is_floating_point() and total.shape == (x.shape[2], x.shape[2]) and total.dtype is torch.float32
    _require(fits and total.is_contiguous(), _said(total=total, x=x), "give contiguous float32 [K, K] and floats [S, T, K]")


def matrix(x: Tensor, *_: Any, **__: Any) -> None:
    """Of `hadamard`."""
    _matrix("x", x)


def rows(x: Tensor, bits: int, *_: Any, **__: Any) -> None:
    """Of `fake_quantize` and `hadamard_codes`."""
    _matrix("x", x)
    _bits(bits, 2)


def rtn_pack(weight: Tensor, grid: str, bits: int, width: int, scale_dtype: torch.dtype, mse: bool = False, error: bool = False) -> None:
    _matrix("weight", weight)
    _grid(grid, bits)
    _require(scale_dtype in STORED, lambda: f"scale_dtype={scale_dtype}", "choose torch.float16 or torch.float32")


def hqq_pack(weight: Tensor, bits: int, width: int, scale_dtype: torch.dtype, *_: Any, **__: Any) -> None:
    rtn_pack(weight, "hqq", bits, width, scale_dtype)


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, sums: Tensor, bits: int, *_: Any, **__: Any) -> None:
    rows(x, bits)
    right = codes.dim() == 2 and codes.dtype is torch.int8 and codes.shape[1] == x.shape[1]
    right = right and all(t is None or t.shape == codes.shape[:1] for t in (scale, zero, sums))
    said = _said(x=x, codes=codes, scale=scale, zero=zero, sums=sums)
    _require(right, said, "give x [M, K], int8 codes [N, K], and [N] of the others")


def token_log_probs(logits: Tensor, tokens: Tensor) -> None:
    fits = logits.dim() > 0 and tokens.shape == logits.shape[:-1]
    _require(fits, _said(logits=logits, tokens=tokens), "give a token for each row of logits: [...] for [..., V]")
    right = logits.is_floating_point() and tokens.dtype in (torch.int32, torch.int64)
    _require(right, lambda: f"logits are {logits.dtype}, tokens {tokens.dtype}", "give floats, and int32 or int64")


def kv_attention(
    q: Tensor, keys: Tensor, key_ranges: Tensor, values: Tensor, value_ranges: Tensor, window_keys: Tensor, window_values: Tensor,
    counts: Tensor, key_bits: int, value_bits: int, scale: float | None = None,
) -> None:  # fmt: skip
    _bits(key_bits, 2)
    _bits(value_bits, 2)
    said = _said(keys=keys, key_ranges=key_ranges, values=values, value_ranges=value_ranges, window_keys=window_keys, counts=counts)
    _require(keys.dim() == 5 and window_keys.dim() == 4 and counts.dim() == 2, said, PREPARED)
    (s, kv, b, g, _), (v, d) = keys.shape, window_keys.shape[2:]
    right = keys.shape[4] == kv_cache.words(key_bits, d) and key_ranges.shape == (s, kv, b, d, 2)
    right &= values.shape == (s, kv, b, kv_cache.words(value_bits, d), g) and value_ranges.shape == (s, kv, b, d // g, g, 2)
    right &= window_keys.shape == window_values.shape == (s, kv, v, d) and v > g
    _cache(right, said, (keys, values), counts)
    _require(key_ranges.dtype == value_ranges.dtype == torch.float16, f"ranges are {key_ranges.dtype}, {value_ranges.dtype}", PREPARED)


def kv_attention_per_token(
    q: Tensor, keys: Tensor, values: Tensor, ranges: Tensor, counts: Tensor, bits: int, scale: float | None = None
) -> None:
    _bits(bits, 2)
    said = _said(q=q, keys=keys, values=values, ranges=ranges, counts=counts)
    _require(q.dim() == 3 and keys.dim() == 5 and ranges.dim() == 6 and counts.dim() == 2, said, PREPARED)
    (s, kv, b, t, _), d, w = keys.shape, q.shape[2], kv_cache.words(bits, q.shape[2])
    right = keys.shape[4] == w and values.shape == (s, kv, b, w, t) and ranges.shape[:3] == (s, kv, b) and ranges.shape[5] == t
    right &= ranges.shape[3] > 0 and d % ranges.shape[3] == 0 and ranges.shape[4] in (2, 3) and ranges.dtype is torch.int32
    _cache(right, said, (keys, values), counts)


def _cache(right: bool, said: Callable[[], str], codes: tuple[Tensor, Tensor], counts: Tensor) -> None:
    right &= counts.shape == (len(codes[0]), 3) and counts.dtype is torch.int32 and all(t.dtype is torch.int16 for t in codes)
    _require(right, said, PREPARED)


def kmeans_columns(columns: Tensor, *_: Any, **__: Any) -> None:
    _matrix("columns", columns)
    _require(columns.shape[1] > 0, _said(columns=columns), "a column has at least one value")


def nearest_centre(columns: Tensor, centres: Tensor) -> None:
    _matrix("columns", columns)
    right = centres.dim() == 2 and len(centres) == len(columns) and 0 < centres.shape[1] <= 256
    _require(right, _said(columns=columns, centres=centres), "give [C, N] and [C, k], k of 1 to 256")


def claq_block(
    block: Tensor, upper: Tensor, widths: list[int], dtype: torch.dtype, start: str = "", tails: list[int] | None = None, *_: Any, **__: Any
) -> None:
    _block(block, upper)
    b, n = block.shape
    _require(len(widths) == b, f"{len(widths)} widths", f"give one for each of the block's {b} columns")
    for width in widths:
        _bits(width)
    _require(dtype in claq.TYPES, f"dtype={dtype}", f"choose {', '.join(map(str, claq.TYPES))}")
    if tails is not None:
        right = len(tails) == 2 * b and min(tails) >= 0 and all(i + j <= n for i, j in zip(tails[::2], tails[1::2], strict=True))
        _require(right, f"tails={tails}", f"give two numbers for each of {b} columns, 0 or more, that add up to no more than {n}")


def braq_counts(m: Tensor, counts: list[int]) -> None:
    _matrix("m", m)
    _require(all(0 <= c <= m.shape[1] for c in counts), lambda: f"counts={counts}", f"give numbers of columns, 0 to {m.shape[1]}")


def braq_splits(x: Tensor, thresholds: Tensor, skip: Tensor | None = None) -> None:
    _matrix("x", x)
    _require(thresholds.dim() == 1, _said(thresholds=thresholds), "give a list of them, [T]")
    _require(skip is None or (skip.dim() == 0 and skip.dtype is torch.int64), _said(skip=skip), "give a number of columns, int64 []")


def _packed(x: Tensor, n: int, held: tuple[int, ...], side: int, unit: int, input_scale: Tensor | None, more: bool = True) -> None:
    """held: tiles of `side` rows and units of `unit` columns."""
    k = x.shape[1] if x.dim() == 2 else -1
    right = more and n > 0 and held[:2] == (-(-n // side), -(-k // unit)) and (input_scale is None or input_scale.shape == (k,))
    wanted = "give x [M, K], and what `operands` gives of a weight [N, K]"
    _require(right, lambda: f"{_said(x=x)()}, of {n} rows of a weight there are {held[:2]} tiles of {side} x {unit}", wanted)


def wq_gemv(x: Tensor, words: Tensor, ranges: Tensor, input_scale: Tensor | None, rows: int, bits: int) -> None:
    _require(bits in gemm.BITS, f"bits={bits}", "choose 2, 3, 4 or 8")
    # Words of `fragments` have three dimensions, those of the other twins five.
    plain = gemv.LANES, 256 if bits == 3 else gemv.LANES * 32 // bits
    side, unit = (gemv_fragments.ROWS, gemv_fragments.STEP) if words.dim() == 3 else plain
    groups = ranges.shape[1] if ranges.shape[2:] == ((8, 2, 2) if words.dim() == 3 else (2, 8)) else 0
    more = groups > 0 and x.shape[-1] % groups == 0 and len(ranges) == len(words) and prod(words.shape[2:]) == bits * side * unit // 32
    _packed(x, rows, tuple(words.shape), side, unit, input_scale, more)


def wq_gemm(
    x: Tensor, low: Tensor, high: Tensor | None, scale: Tensor, zero: Tensor | None, input_scale: Tensor | None, rows: int, bits: int
) -> None:
    _require(bits in gemm.BITS, f"bits={bits}", "choose 2, 3, 4 or 8")
    tiles, units = low.shape[:2]
    more = scale.shape == (scale.shape[0], gemm.PANEL * tiles) and len(scale) > 0 and x.shape[-1] % len(scale) == 0
    more &= (zero is None or zero.shape == scale.shape) and low.shape[2:] == (16, 16) and (high is None) == (bits != 3)
    more &= high is None or high.shape == (tiles, units, 4, 16, 2)
    _packed(x, rows, tuple(low.shape), gemm.PANEL, gemm.UNIT[bits], input_scale, more)


def lut_gemv(
    x: Tensor, words: list[Tensor], values: list[Tensor], columns: list[Tensor], bits: list[int], apart: list[Tensor],
    input_scale: Tensor | None, rows: int,
) -> None:  # fmt: skip
    count = sum(map(len, columns))
    _require(x.dim() == 2 and x.shape[1] == count, _said(x=x), f"it must be [M, {count}], as many columns as the weight's parts have")
    for held, own, width in zip(words, columns, bits, strict=True):
        # Words of `fragments` have all bits of a unit's columns of a row.
        unit = lut_fragments.UNIT if held.shape[2] == lut_fragments.UNIT * width else 32 // width
        _packed(x, rows, (len(held), -(-count // unit)), lut.ROWS, unit, input_scale, held.shape[1] == -(-len(own) // unit))


def row_lut_gemv(x: Tensor, words: Tensor, tables: Tensor, input_scale: Tensor | None, rows: int, bits: int) -> None:
    more = words.shape[2:] == (bits, row_lut.ROWS) and tables.shape == (len(words), 2**bits, row_lut.ROWS)
    _packed(x, rows, tuple(words.shape), row_lut.ROWS, row_lut.UNIT, input_scale, more)


def binary_gemv(
    x: Tensor, words: Tensor, tables: Tensor, salient: Tensor, largest: Tensor, input_scale: Tensor | None, rows: int, block: int
) -> None:
    # Tables of `digits` are two.
    tiles, blocks = tables.shape[1:3] if tables.dim() == 5 else tables.shape[:2]
    more = block > 0 and (tiles, blocks) == (len(words), -(-x.shape[-1] // block)) and words.shape[2:] == (1, 8, 8)
    _packed(x, rows, tuple(words.shape), 8, binary.UNIT, input_scale, more)
