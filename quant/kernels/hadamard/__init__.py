"""`hadamard`: Sylvester's transform of rows whose length is a power of two, x `[R, n]` ▸ x H · factor.

Every twin has `transform(x, factor) ▸ [R, n]` in the type of x; float16 and bfloat16 are computed in float32.
"""
