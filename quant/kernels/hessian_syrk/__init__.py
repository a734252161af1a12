"""`hessian_syrk`: add xᵀx of sequences to the raw sum of a Hessian, total `[K, K]` float32 += Σ over tokens of x xᵀ.

Every twin has
- `add(total, x)`: x `[S, T, K]`, any float type. Sequence after sequence: adding them together or apart gives the same bits
- `finished(total) ▸ [K, K]`: symmetric. Before it what lies above the diagonal of total is a twin's own affair

Raw sums, scaled once at the end: products of two 16-bit floats are exact in float32, and scaling x first would round them.
"""
