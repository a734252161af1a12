"""`hadamard`: the transform of rows x `[R, n]` ▸ x H · factor, n = m · 2^k (`matrices.py`), and the codes of what comes out.

H has entries ±1. Every twin has
- `transform(x, factor=1.0, transpose=False) ▸ [R, n]`, contiguous, in the type of x; float16 and bfloat16 are computed in float32. With
  `transpose` it is x Hᵀ · factor
- `encode(x, bits, symmetric, clip=1.0, factor=1.0, transpose=False) ▸ RowCodes`: of that, as `quant.kernels.fake_quantize` makes them,
  bit for bit: the transformed values are rounded to the type of x, then row by row to codes

Sums are added up in an order that is the twin's own where m > 1: twins differ by rounding. Powers of two give the same bits everywhere.
Raises ValueError where there is no matrix of order n.
"""
