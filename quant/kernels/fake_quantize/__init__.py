"""`fake_quantize`: every row of x `[R, n]` rounded to a grid of its own, in one pass over memory.

Every twin has `fake_quantize(x, bits, symmetric, clip) ▸ [R, n]` in the type of x, by the grids `absmax` (symmetric) and `omni` of
`quant.grids`; the range of a row is that of its values times `clip`. float32 arithmetic, no gradient, bit for bit the same in all twins.
A row with a NaN becomes NaN.
"""
