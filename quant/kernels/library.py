"""Kernels as operators of torch, `torch.ops.bitgrid.*`, from when this module is imported.

An operator takes tensors and numbers only, so that it can stand in a compiled graph, and knows its result's shape without running. On CPU
tensors it runs the backend that `kernel(name)` chooses, whose notes say where that is a slower one. Registered by `Library` itself: the
decorator `custom_op` adds several microseconds to each call. Nothing here has a derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quant.affine import Affine, ZeroKind
from quant.kernels import kernel
from quant.kernels.wq_gemv import Packed

LIBRARY = torch.library.Library("bitgrid", "DEF")  # type: ignore[no-untyped-call]


def _define(schema: str, cpu: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, cpu, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"bitgrid::{name}", fake, lib=LIBRARY)


def _wq_gemv(x: Tensor, words: Tensor, ranges: Tensor, input_scale: Tensor | None, rows: int, bits: int) -> Tensor:
    packed = Packed(words, ranges, input_scale, (rows, x.shape[1]), bits)
    made: Tensor = kernel("wq_gemv").run.wq_gemv(x, packed)
    return made


def _wq_gemv_shape(x: Tensor, words: Tensor, ranges: Tensor, input_scale: Tensor | None, rows: int, bits: int) -> Tensor:
    return x.new_empty(x.shape[0], rows)


def _gptq_block(
    block: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, group: list[int], bits: int, zero_kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    solved = kernel("gptq_block").run.solve_block(block, upper, Affine(scale, zero, bits, ZeroKind(zero_kind)), group)
    return solved.codes, solved.values, solved.errors


def _gptq_block_shapes(
    block: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, group: list[int], bits: int, zero_kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    n, k = block.shape
    return block.new_empty(n, k), block.new_empty(n, k), block.new_empty(n, k)


def _kmeans_columns(columns: Tensor, k: int, start: str = "partition") -> Tensor:
    centres: Tensor = kernel("kmeans_columns").run.kmeans(columns, k, start)
    return centres


def _kmeans_columns_shape(columns: Tensor, k: int, start: str = "partition") -> Tensor:
    return columns.new_empty(columns.shape[0], k)


def _nearest_centre(columns: Tensor, centres: Tensor) -> Tensor:
    codes: Tensor = kernel("kmeans_columns").run.nearest(columns, centres)
    return codes


def _nearest_centre_shape(columns: Tensor, centres: Tensor) -> Tensor:
    return columns.new_empty(columns.shape, dtype=torch.uint8)


_define("wq_gemv(Tensor x, Tensor words, Tensor ranges, Tensor? input_scale, SymInt rows, int bits) -> Tensor", _wq_gemv, _wq_gemv_shape)
_define(
    "gptq_block(Tensor block, Tensor upper, Tensor scale, Tensor zero, int[] group, int bits, str zero_kind) -> (Tensor, Tensor, Tensor)",
    _gptq_block,
    _gptq_block_shapes,
)
_define('kmeans_columns(Tensor columns, int k, str start="partition") -> Tensor', _kmeans_columns, _kmeans_columns_shape)
_define("nearest_centre(Tensor columns, Tensor centres) -> Tensor", _nearest_centre, _nearest_centre_shape)


def operands(packed: Packed) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """What `torch.ops.bitgrid.wq_gemv(x, *operands(packed))` takes besides x."""
    return packed.words, packed.ranges, packed.input_scale, packed.shape[0], packed.bits
