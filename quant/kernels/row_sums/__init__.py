"""`row_sums`: what tells a matrix from another.

Every twin has `row_sums(bits, odd)`: int64 `[R]` of int32 bits `[R, C]`, contiguous, and int64 odd `[C]`, the sum over each row of bits
times odd, modulo 2⁶⁴.
"""
