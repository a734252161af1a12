"""HQQ by its authors' package: `hqq.core.quantize.Quantizer`, weight by weight.

Its groups are rows of `[N K / g, g]` for axis 1 and columns of `[g, N K / g]` for axis 0; scale is the step, zero in units of codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quant.methods.base import Rounded
from quant.methods.toolkits import HqqPackage
from quant.scheme import WeightScheme
from workers.blocks import linear_view
from workers.toolkits import tensors
from workers.toolkits.job import Job

BITS_OF_ROUNDED_ZEROS = 4


def quantize(job: Job) -> Iterator[tuple[str, Rounded]]:
    from hqq.core.quantize import Quantizer

    method: HqqPackage = job.made
    model = job.load_model()
    for name, scheme in job.linears.items():
        weight = linear_view(model, name).weight().to(job.device)
        codes, meta = Quantizer.quantize(
            weight.contiguous(), **arguments(method, scheme), bitpack=False, compute_dtype=torch.float32, device=str(job.device)
        )
        yield name, stored(codes, meta["scale"], meta["zero"], tuple(weight.shape), method, scheme)


def arguments(method: HqqPackage, scheme: WeightScheme) -> dict[str, object]:
    """Of `Quantizer.quantize`."""
    rounded = scheme.bits == BITS_OF_ROUNDED_ZEROS if method.round_zero is None else method.round_zero
    return {
        "nbits": scheme.bits,
        "channel_wise": True,
        "group_size": scheme.group_size,
        "optimize": method.optimize,
        "round_zero": rounded,
        "axis": method.axis,
    }


def stored(codes: Tensor, scale: Tensor, zero: Tensor, shape: tuple[int, ...], method: HqqPackage, scheme: WeightScheme) -> Rounded:
    """codes in the package's shape of groups, scale and zero one per group ▸ the stored tensor of a weight `shape`."""
    # The package gives codes in the weight's own type, and tensors made in inference mode.
    whole, step, offset = (t.clone().float().cpu() for t in (codes.reshape(shape), scale, zero))
    if method.axis == 0:
        return tensors.strided(whole, step.flatten(), offset.flatten(), scheme)
    return tensors.affine(whole, step.reshape(shape[0], -1), offset.reshape(shape[0], -1), scheme, real_zeros=True)
