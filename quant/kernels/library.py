"""Kernels as operators of torch, `torch.ops.bitgrid.*`, from when this module is imported.

An operator takes tensors and numbers only, so that it can stand in a compiled graph, and knows its result's shape without running. It runs
the backend that `kernel(name, device=...)` chooses, whose notes say where that is a slower one. Nothing here has a derivative.
Those for codebooks stand in `codebook_operators`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind
from quant.grids import GRIDS
from quant.kernels import (
    binary_gemv,
    braq_search,
    checks,
    codebook_operators,
    hqq_pack,
    int8_linear,
    kernel,
    kv_attention,
    lut_gemv,
    row_lut_gemv,
    rtn_pack,
    wq_gemm,
    wq_gemv,
)
from quant.kernels.gptq_block import Fit, Fits, SolvedBlock
from quant.kernels.kv_attention.per_token import PerTokenPacked
from quant.kernels.operands import operands
from quant.kernels.operators import LIBRARY, define

__all__ = ["LIBRARY", "codebook_operators", "operands"]


def _wq_gemv(x: Tensor, words: Tensor, ranges: Tensor, input_scale: Tensor | None, rows: int, bits: int) -> Tensor:
    packed = wq_gemv.Packed(words, ranges, input_scale, (rows, x.shape[1]), bits)
    made: Tensor = kernel("wq_gemv", device=x.device).run.wq_gemv(x, packed)
    return made


def _product_shape(x: Tensor, *given: Any) -> Tensor:
    """Of products whose last arguments are the rows of the weight and one number more."""
    return x.new_empty(x.shape[0], given[-2])


def _wq_gemm(
    x: Tensor,
    low: Tensor,
    high: Tensor | None,
    scale: Tensor,
    zero: Tensor | None,
    input_scale: Tensor | None,
    rows: int,
    bits: int,
) -> Tensor:
    packed = wq_gemm.Packed(low, high, scale, zero, input_scale, (rows, x.shape[1]), bits)
    made: Tensor = kernel("wq_gemm", device=x.device).run.wq_gemm(x, packed)
    return made


def _gptq_block(
    block: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, group: list[int], bits: int, zero_kind: str, tops: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    affine = Affine(scale, zero, bits, ZeroKind(zero_kind), tops)
    solved = kernel("gptq_block", device=block.device, block=block).run.solve_block(block, upper, affine, group)
    return solved.codes, solved.values, solved.errors


def _gptq_block_shapes(
    block: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, group: list[int], bits: int, zero_kind: str, tops: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    solved = SolvedBlock.like(block.new_empty(block.shape))
    return solved.codes, solved.values, solved.errors


def _gptq_block_fitted(
    block: Tensor, upper: Tensor, width: int, grid: str, bits: int, half: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    fits = Fits.of([Fit(block.shape[1], width, grid, bits, half)], block.device)
    scale, zero = (block.new_empty(len(block) // width, block.shape[1]) for _ in range(2))
    group = [j // width for j in range(len(block))]
    run = kernel("gptq_block", device=block.device, block=block).run
    solved = run.solve_block(block, upper, Affine(scale, zero, bits, GRIDS[grid].zero), group, None, fits)
    return solved.codes, solved.values, solved.errors, scale, zero, fits.odd


def _gptq_block_fitted_shapes(
    block: Tensor, upper: Tensor, width: int, grid: str, bits: int, half: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    solved, (b, n) = SolvedBlock.like(block.new_empty(block.shape)), block.shape
    ranges, odd = [block.new_empty(b // width, n) for _ in range(2)], block.new_empty(1, dtype=torch.int32)
    return solved.codes, solved.values, solved.errors, ranges[0], ranges[1], odd


def _lazy_update_(later: Tensor, left: Tensor, right: Tensor) -> None:
    kernel("lazy_update", device=later.device, later=later).run.lazy_update(later, left, right)


def _lut_gemv(
    x: Tensor,
    words: list[Tensor],
    values: list[Tensor],
    columns: list[Tensor],
    bits: list[int],
    apart: list[Tensor],
    input_scale: Tensor | None,
    rows: int,
) -> Tensor:
    parts = tuple(map(lut_gemv.Part, words, values, columns, bits))
    packed = lut_gemv.Packed(parts, lut_gemv.Apart(*apart) if apart else None, input_scale, (rows, x.shape[1]))
    made: Tensor = kernel("lut_gemv", device=x.device).run.lut_gemv(x, packed)
    return made


def _lut_gemv_shape(x: Tensor, *given: Any) -> Tensor:
    return x.new_empty(x.shape[0], given[-1])


def _row_lut_gemv(x: Tensor, words: Tensor, tables: Tensor, input_scale: Tensor | None, rows: int, bits: int) -> Tensor:
    packed = row_lut_gemv.Packed(words, tables, input_scale, (rows, x.shape[1]), bits)
    made: Tensor = kernel("row_lut_gemv", device=x.device).run.row_lut_gemv(x, packed)
    return made


def _binary_gemv(
    x: Tensor, words: Tensor, tables: Tensor, salient: Tensor, largest: Tensor, input_scale: Tensor | None, rows: int, block: int
) -> Tensor:
    packed = binary_gemv.Packed(words, tables, salient, largest, input_scale, (rows, x.shape[1]), block)
    made: Tensor = kernel("binary_gemv", device=x.device).run.binary_gemv(x, packed)
    return made


def _hessian_syrk_(total: Tensor, x: Tensor) -> None:
    kernel("hessian_syrk", device=total.device, channels=len(total)).run.add(total, x)


def _nothing(*_: Any) -> None:
    pass


def _hadamard(x: Tensor, factor: float = 1.0, transpose: bool = False) -> Tensor:
    made: Tensor = kernel("hadamard", device=x.device).run.transform(x, factor, transpose)
    return made


def _same_shape(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _hadamard_codes(
    x: Tensor, bits: int, symmetric: bool, clip: float = 1.0, factor: float = 1.0, transpose: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    made = kernel("hadamard", device=x.device).run.encode(x, bits, symmetric, clip, factor, transpose)
    return made.codes, made.scale, made.zero


def _hadamard_codes_shapes(x: Tensor, *given: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    scale, zero = (x.new_empty(x.shape[0], 1, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=torch.int8), scale, zero


def _braq_counts(m: Tensor, counts: list[int]) -> Tensor:
    errors: Tensor = braq_search.chosen(m).run.order_two_errors(m, counts)
    return errors


def _braq_counts_shape(m: Tensor, counts: list[int]) -> Tensor:
    return m.new_empty(len(counts), dtype=torch.float64)


def _braq_splits(x: Tensor, thresholds: Tensor, skip: Tensor | None = None) -> Tensor:
    errors: Tensor = braq_search.chosen(x).run.split_errors(x, thresholds, skip)
    return errors


def _braq_splits_shape(x: Tensor, thresholds: Tensor, skip: Tensor | None = None) -> Tensor:
    return x.new_empty(thresholds.shape, dtype=torch.float64)


def _fake_quantize(x: Tensor, bits: int, symmetric: bool, clip: float = 1.0) -> Tensor:
    made: Tensor = kernel("fake_quantize", device=x.device).run.fake_quantize(x, bits, symmetric, clip)
    return made


def _rtn_pack(
    weight: Tensor, grid: str, bits: int, width: int, scale_dtype: torch.dtype, mse: bool = False, error: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = kernel("rtn_pack", device=weight.device).run
    made = run.rtn_pack(weight, grid, bits, width, scale_dtype, codes=False, mse=mse, error=error)
    return made.stream, made.scale, made.zero, made.told, weight.new_empty(0, dtype=torch.float64) if made.error is None else made.error


def _rtn_pack_shapes(
    weight: Tensor, grid: str, bits: int, width: int, scale_dtype: torch.dtype, mse: bool = False, error: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, zero = rtn_pack.shape_of(weight, width), GRIDS[grid].zero.dtype(scale_dtype)
    stream = weight.new_empty((weight.numel() * bits + 7) // 8, dtype=torch.uint8)
    stored = weight.new_empty(shape, dtype=scale_dtype), weight.new_empty(shape, dtype=zero)
    off = weight.new_empty(shape if error else 0, dtype=torch.float64)
    return stream, *stored, weight.new_empty(2, dtype=torch.int32), off


def _hqq_pack(
    weight: Tensor, bits: int, width: int, scale_dtype: torch.dtype, round_zero: bool,
    iters: int = 20, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    run, search = kernel("hqq_pack", device=weight.device).run, hqq_pack.Search(iters, p, beta, kappa)
    made, _ = run.hqq_pack(weight, bits, width, scale_dtype, search, round_zero, codes=False)
    return made.stream, made.scale, made.zero, made.told


def _hqq_pack_shapes(
    weight: Tensor, bits: int, width: int, scale_dtype: torch.dtype, round_zero: bool,
    iters: int = 20, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return *_rtn_pack_shapes(weight, "hqq", bits, width, scale_dtype)[:3], weight.new_empty(3, dtype=torch.int32)


def _int8_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, sums: Tensor, bits: int, symmetric: bool, clip: float = 1.0
) -> Tensor:
    packed = int8_linear.Packed(codes, scale, zero, sums, bits, symmetric, clip)
    made: Tensor = kernel("int8_linear", device=x.device).run.int8_linear(x, packed)
    return made


def _int8_linear_shape(x: Tensor, codes: Tensor, *given: Any) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0], dtype=torch.float32)


def _token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    made: Tensor = kernel("token_log_probs", device=logits.device).run.token_log_probs(logits, tokens)
    return made


def _token_log_probs_shape(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.new_empty(tokens.shape, dtype=torch.float32)


def _kv_attention(
    q: Tensor, keys: Tensor, key_ranges: Tensor, values: Tensor, value_ranges: Tensor, window_keys: Tensor, window_values: Tensor,
    counts: Tensor, key_bits: int, value_bits: int, scale: float | None = None,
) -> Tensor:  # fmt: skip
    cache = kv_attention.Packed(keys, key_ranges, values, value_ranges, window_keys, window_values, counts, key_bits, value_bits)
    made: Tensor = kernel("kv_attention", device=q.device).run.kv_attention(q, cache, scale)
    return made


def _kv_attention_per_token(
    q: Tensor, keys: Tensor, values: Tensor, ranges: Tensor, counts: Tensor, bits: int, scale: float | None = None
) -> Tensor:
    cache = PerTokenPacked(keys, values, ranges, counts, bits, q.shape[-1])
    made: Tensor = kernel("kv_attention", device=q.device).run.kv_attention(q, cache, scale)
    return made


def _kv_attention_shape(q: Tensor, *given: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


define(
    "wq_gemv(Tensor x, Tensor words, Tensor ranges, Tensor? input_scale, SymInt rows, int bits) -> Tensor",
    _wq_gemv,
    _product_shape,
    checks.wq_gemv,
    whole=True,
)
define(
    "wq_gemm(Tensor x, Tensor low, Tensor? high, Tensor scale, Tensor? zero, Tensor? input_scale, SymInt rows, int bits) -> Tensor",
    _wq_gemm,
    _product_shape,
    checks.wq_gemm,
    whole=True,
)
define(
    "gptq_block(Tensor block, Tensor upper, Tensor scale, Tensor zero, int[] group, int bits, str zero_kind, Tensor? tops=None)"
    " -> (Tensor, Tensor, Tensor)",
    _gptq_block,
    _gptq_block_shapes,
    checks.gptq_block,
)
define(
    "gptq_block_fitted(Tensor block, Tensor upper, int width, str grid, int bits, bool half=True)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gptq_block_fitted,
    _gptq_block_fitted_shapes,
    checks.gptq_block_fitted,
)
define("lazy_update_(Tensor(a!) later, Tensor left, Tensor right) -> ()", _lazy_update_, _nothing, checks.lazy_update_)
define(
    "lut_gemv(Tensor x, Tensor[] words, Tensor[] values, Tensor[] columns, int[] bits, Tensor[] apart, Tensor? input_scale, SymInt rows)"
    " -> Tensor",
    _lut_gemv,
    _lut_gemv_shape,
    checks.lut_gemv,
    whole=True,
)
define(
    "row_lut_gemv(Tensor x, Tensor words, Tensor tables, Tensor? input_scale, SymInt rows, int bits) -> Tensor",
    _row_lut_gemv,
    _product_shape,
    checks.row_lut_gemv,
    whole=True,
)
define(
    "binary_gemv(Tensor x, Tensor words, Tensor tables, Tensor salient, Tensor largest, Tensor? input_scale, SymInt rows, int block)"
    " -> Tensor",
    _binary_gemv,
    _product_shape,
    checks.binary_gemv,
    whole=True,
)
define("hessian_syrk_(Tensor(a!) total, Tensor x) -> ()", _hessian_syrk_, _nothing, checks.hessian_syrk_)
define("hadamard(Tensor x, float factor=1.0, bool transpose=False) -> Tensor", _hadamard, _same_shape, checks.matrix)
define(
    "hadamard_codes(Tensor x, int bits, bool symmetric, float clip=1.0, float factor=1.0, bool transpose=False)"
    " -> (Tensor, Tensor, Tensor)",
    _hadamard_codes,
    _hadamard_codes_shapes,
    checks.rows,
)
define("braq_counts(Tensor m, int[] counts) -> Tensor", _braq_counts, _braq_counts_shape, checks.braq_counts)
define("braq_splits(Tensor x, Tensor thresholds, Tensor? skip=None) -> Tensor", _braq_splits, _braq_splits_shape, checks.braq_splits)
define("fake_quantize(Tensor x, int bits, bool symmetric, float clip=1.0) -> Tensor", _fake_quantize, _same_shape, checks.rows)
define(
    "int8_linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor sums, int bits, bool symmetric, float clip=1.0) -> Tensor",
    _int8_linear,
    _int8_linear_shape,
    checks.int8_linear,
    whole=True,
)
define(
    "rtn_pack(Tensor weight, str grid, int bits, SymInt width, ScalarType scale_dtype, bool mse=False, bool error=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _rtn_pack,
    _rtn_pack_shapes,
    checks.rtn_pack,
)
define(
    "hqq_pack(Tensor weight, int bits, SymInt width, ScalarType scale_dtype, bool round_zero, int iters=20, float p=0.7, float beta=10.0,"
    " float kappa=1.01) -> (Tensor, Tensor, Tensor, Tensor)",
    _hqq_pack,
    _hqq_pack_shapes,
    checks.hqq_pack,
)
define("token_log_probs(Tensor logits, Tensor tokens) -> Tensor", _token_log_probs, _token_log_probs_shape, checks.token_log_probs)
define(
    "kv_attention(Tensor q, Tensor keys, Tensor key_ranges, Tensor values, Tensor value_ranges, Tensor window_keys, Tensor window_values,"
    " Tensor counts, int key_bits, int value_bits, float? scale=None) -> Tensor",
    _kv_attention,
    _kv_attention_shape,
    checks.kv_attention,
    whole=True,
)
define(
    "kv_attention_per_token(Tensor q, Tensor keys, Tensor values, Tensor ranges, Tensor counts, int bits, float? scale=None) -> Tensor",
    _kv_attention_per_token,
    _kv_attention_shape,
    checks.kv_attention_per_token,
    whole=True,
)
