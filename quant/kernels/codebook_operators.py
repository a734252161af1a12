"""Operators for codebooks: k-means of columns, the nearest centre, and a block of CLAQ's columns. See `quant.kernels.library`."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels import checks, claq_block, kernel
from quant.kernels.operators import define


def _kmeans_columns(columns: Tensor, k: int, start: str = "partition", weights: Tensor | None = None) -> Tensor:
    centres: Tensor = kernel("kmeans_columns", device=columns.device).run.kmeans(columns, k, start, weights)
    return centres


def _kmeans_columns_shape(columns: Tensor, k: int, start: str = "partition", weights: Tensor | None = None) -> Tensor:
    return columns.new_empty(columns.shape[0], k)


def _nearest_centre(columns: Tensor, centres: Tensor) -> Tensor:
    codes: Tensor = kernel("kmeans_columns", device=columns.device).run.nearest(columns, centres)
    return codes


def _nearest_centre_shape(columns: Tensor, centres: Tensor) -> Tensor:
    return columns.new_empty(columns.shape, dtype=torch.uint8)


def _claq_block(
    block: Tensor, upper: Tensor, widths: list[int], dtype: torch.dtype, start: str = "plus_plus", tails: list[int] | None = None,
    centres: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    ends = None if tails is None else list(zip(tails[::2], tails[1::2], strict=True))
    given = block.clone(memory_format=torch.contiguous_format)
    centres = None if centres is None else centres.contiguous()
    out, run = claq_block.SolvedBlock.like(given), kernel("claq_block", device=block.device).run
    found: claq_block.Found = run.solve_block(given, upper, claq_block.Wanted(widths, ends, dtype, start, centres), out)
    kept = block.new_empty(0, dtype=torch.bool) if found.kept is None else found.kept
    wrong = block.new_zeros(2, dtype=torch.bool) if found.wrong is None else found.wrong
    return out.codes, out.values, out.errors, found.tables, kept, wrong


def _claq_block_shapes(
    block: Tensor, upper: Tensor, widths: list[int], dtype: torch.dtype, start: str = "plus_plus", tails: list[int] | None = None,
    centres: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    made = claq_block.SolvedBlock.like(block.new_empty(block.shape))
    tables = block.new_empty(len(block), 2 ** max(widths), dtype=dtype)
    kept = block.new_empty(0 if tails is None else block.shape, dtype=torch.bool)
    return made.codes, made.values, made.errors, tables, kept, block.new_empty(2, dtype=torch.bool)


define(
    'kmeans_columns(Tensor columns, int k, str start="partition", Tensor? weights=None) -> Tensor',
    _kmeans_columns,
    _kmeans_columns_shape,
    checks.kmeans_columns,
)
define("nearest_centre(Tensor columns, Tensor centres) -> Tensor", _nearest_centre, _nearest_centre_shape, checks.nearest_centre)
# tails: of each column how many weights are kept at the top, then at the bottom. The last of what is made says which of
# `claq_block.REASONS` hold, on a GPU; on a CPU these raise.
define(
    'claq_block(Tensor block, Tensor upper, int[] widths, ScalarType dtype, str start="plus_plus", int[]? tails=None,'
    " Tensor? centres=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _claq_block,
    _claq_block_shapes,
    checks.claq_block,
)
