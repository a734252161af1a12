"""In torch, some rows at a time: products are written to memory."""

from __future__ import annotations

import torch
from torch import Tensor

AT_ONCE = 2**23
"""Numbers: 64 MB of products."""


def row_sums(bits: Tensor, odd: Tensor) -> Tensor:
    return torch.cat([(rows * odd).sum(1) for rows in torch.split(bits, max(1, AT_ONCE // max(1, bits.shape[1])))])
