"""What products of a few rows of activations with a packed weight have in common: `wq_gemv`, `lut_gemv`,
`row_lut_gemv`, `binary_gemv`.

out `[M, N]` = x `[M, K]` · weightᵀ, without making the weight. x: float32 or bfloat16, M = 1 to 8 rows, or as many as the backend's
MOST_ROWS says; out has its type, sums are float32 or wider. Where the stored weight has an input scale, x is divided by that first. Every
backend has
- `prepare(tensor) ▸ packed`, once per weight: what the backend reads in each call. Raises ValueError for what it does not take
- a function named as the operation, `(x, packed, out=None) ▸ out`; `out` is written to and returned. A row of out depends on its own row
  of x alone, bit for bit; but `wq_gemv` on CUDA with 2 bits may round one row alone otherwise than the same row beside others (its twin
  says when, and by how much).
- `values(packed, dtype) ▸ [N, K]`: the weight itself, before the input scale, for a product with many rows (`with_many_rows`)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOST_ROWS = 8
"""Rows of x that a call takes, of backends that name no number of their own."""
MANY_ROWS = {"cpu": 512, "cuda": 32}
"""Type of device ▸ rows of x above which it is faster to make the weight and multiply dense matrices than to go through the packed one for
every 8. On a CPU (4096 x 11008, 2 threads) those passes take 1.2, 2.3 and 3.0 ms a row with codes, codebooks and signs, a dense product
1.3, and making the weight 100 ms. On an H200 (8192 x 8192, 4 bits) 8 rows take 21 us, making the weight 54 and a product with it 37."""
TENSOR_CORE_ROWS = 256
"""Rows of x on a GPU up to which `wq_gemm` multiplies with codes, from `rows_alone` on."""
SMALL = 2**24
"""Weights of a linear up to which `wq_gemv` is given all the rows that it takes in one pass."""


def most_rows(backend: Any) -> int:
    """Rows of x that a call of a backend takes."""
    most: int = getattr(backend, "MOST_ROWS", MOST_ROWS)
    return most


def rows_alone(backend: Any, packed: Any, dtype: torch.dtype) -> int:
    """Rows of x, of a type, up to which a backend of `wq_gemv` multiplies, before `wq_gemm` does: `MOST_ROWS`, or more where it takes more
    in one pass through the codes and that is faster. It takes more of bfloat16 without an input scale alone: others need three columns a
    row. It is faster with small weights, or by slices of K: by blocks that have all of K 16 rows by 4-bit codes take 8.2 us on an H200 with
    4096 x 4096 weights (9.4 by `wq_gemm`), but 15.3 with 4096 x 11008 (13.5) and 17.9 with 8192 x 8192 (17.2)."""
    if dtype is not torch.bfloat16 or packed.input_scale is not None:
        return MOST_ROWS
    small, by_slices = packed.shape[0] * packed.shape[1] <= SMALL, getattr(backend, "by_slices", None)
    return most_rows(backend) if small or (by_slices is not None and by_slices(packed, dtype)[0]) else MOST_ROWS


def written_to(x: Tensor, shape: tuple[int, int], out: Tensor | None, most: int = MOST_ROWS) -> Tensor:
    """`out`, or new memory for it; not filled. shape: (N, K). most: rows of x. Raises ValueError for an x or an out that the backend does
    not take."""
    n, k = shape
    if x.dtype not in (torch.float32, torch.bfloat16) or x.dim() != 2 or x.shape[1] != k or not 1 <= x.shape[0] <= most:
        allowed = f"float32 or bfloat16 [1 to {most}, {k}]"
        raise ValueError(f"x is {tuple(x.shape)}, {x.dtype}; it must be {allowed}; multiply more rows by the dequantized weight")
    wanted = (x.shape[0], n)
    if out is None:
        return torch.empty(wanted, dtype=x.dtype, device=x.device)
    if not out.is_contiguous() or out.dtype != x.dtype or out.shape != wanted:
        raise ValueError(f"out is {tuple(out.shape)}, {out.dtype}; it must be contiguous {wanted}, {x.dtype}")
    return out


def given_to(x: Tensor, input_scale: Tensor | None) -> Tensor:
    """x as fast backends read it: float32, contiguous, divided by the input scale `[K]`."""
    given = x.detach().float()
    return (given if input_scale is None else given / input_scale).contiguous()


def dense(x: Tensor, weight: Tensor, input_scale: Tensor | None, out: Tensor | None) -> Tensor:
    """The product with a weight `[N, K]` that was made, in its type, rounded to that of x once."""
    n, k = weight.shape
    made = written_to(x, (n, k), out)
    given = x.to(weight.dtype)
    if input_scale is not None:
        given = given / input_scale.to(weight.dtype)
    return made.copy_(given @ weight.T)


def with_many_rows(x: Tensor, packed: Any, backend: Any) -> Tensor:
    """out `[M, N]` in the type of x, for any M: the weight is made by the backend, multiplied and given up. In the type of x on a GPU, in
    float32 on a CPU, where few have faster ones."""
    kind = x.dtype if x.is_cuda else torch.float32
    given = x if packed.input_scale is None else x.float() / packed.input_scale
    weight: Tensor = backend.values(packed, kind)
    return (given.to(kind) @ weight.T).to(x.dtype)
