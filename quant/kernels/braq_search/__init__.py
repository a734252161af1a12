"""`braq_search`: the errors of BiLLM's candidates in a block of columns (Huang et al. 2024, arXiv 2402.04291, algorithm 2).

A set of n values binarized once leaves Σ(x - μ)² - n α², μ its mean and α the mean of |x - μ|; a second order takes n μ₂² + n α₂² off.
Every twin has
- `order_two_errors(m, counts) ▸ [k]`: m `[N, C]`, its columns ranked. For each count k the squared error when the first k columns and the
  rest are each binarized twice
- `split_errors(x, thresholds, skip=None) ▸ [T]`: x `[N, C]`. For each threshold, 0 or more, that when values with |x| ≥ t and the rest
  are each binarized once. `skip` int64 `[]` on the device of x: so many columns at the front count for nothing.
Means are used; errors are float64 sums over all rows. Twins differ by rounding: of float32 sums along a row. As operators of torch they
are `braq_counts` and `braq_splits`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant import kernels


def chosen(x: Tensor) -> kernels.Kernel:
    """The twin for x `[N, C]`: the compiled ones have no float64, and that for GPUs no wide blocks."""
    return kernels.kernel("braq_search", "auto" if x.dtype is torch.float32 else "torch", x.device, x=x)
