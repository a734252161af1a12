"""Whether linears that multiply packed give what the weights give that were evaluated, each alone on random inputs.

Logits of a whole model say less: in 16 bits, or with rounded activations, they move by as much as a wrong kernel would move them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quant.kernels.fake_quantize import reference
from quant.kernels.products import MANY_ROWS, TENSOR_CORE_ROWS
from quant.methods.base import StoredTensor
from quant.scheme import ActivationScheme
from quant.tensors.affine import AffineTensor
from quant.tensors.binary import BinaryTensor
from quant.tensors.codebook import CodebookTensor, Outliers
from quant.tensors.row_codebook import RowCodebookTensor
from workers.blocks import LinearView, Taps
from workers.errors import NumericalError

ROWS = 16
"""Of x that differ."""
MOST_ROWS = 1 + max(*MANY_ROWS.values(), TENSOR_CORE_ROWS)
"""More take the same way through a linear."""
MOST_CALLS = 4
TOLERANCE = {torch.float32: 2.0**-10, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""Relative error of a product, over all rows. In 16 bits that of two roundings at their largest: a product is rounded once, and some on a
GPU have a weight that was. In float32 sums are in another order, and on a GPU some are of whole numbers (ADR 30: 5e-5 of random columns,
more where a column has one large value): no more is asked of it than of float16."""
OF_ROWS: dict[type[StoredTensor], tuple[str, ...]] = {
    AffineTensor: ("codes", "scale", "zero"),
    CodebookTensor: ("codes",),
    RowCodebookTensor: ("codes", "tables"),
    BinaryTensor: ("signs", "second", "split", "scale", "mean"),
}
"""Stored format that has a kernel ▸ what it has for each row."""
AT_ONCE = 2**24
"""Weights that are dequantized together, in some 20 bytes each: dense a linear may not fit."""


def check_product(
    view: LinearView,
    stored: StoredTensor,
    product: Callable[[Tensor], Tensor],
    rows: Collection[int],
    activation: ActivationScheme | None,
    device: torch.device,
) -> float:
    """The largest relative error. product: x `[M, K]` ▸ `[M, N]`, without a bias. rows: of x, numbers that it is called with. device: of
    what is stored; the linear itself may not be loaded.

    A product with zeros alone has no norm to compare an error with: that is what one more of every code would make.
    Raises NumericalError where it is above the tolerance, or not a number."""
    dtype = view.storage.dtype
    x = torch.randn(ROWS, stored.shape[1], generator=torch.Generator().manual_seed(0)).to(device, dtype)
    given = x.float() if activation is None else reference.fake_quantize(x.float(), activation.bits, activation.symmetric, activation.clip)
    step, products, alive = _step(stored), list[Tensor](), list[Tensor]()
    for part in _parts(stored):
        weight = part.dequantize().float()
        products.append(given @ weight.T)
        alive.append(torch.ones_like(weight[:, 0], dtype=torch.bool) if step is None else weight.any(1))
    expected, live = torch.cat(products, 1), torch.cat(alive)
    nothing = expected.new_zeros(()) if step is None else (~live * step).norm()
    worst, allowed = 0.0, TOLERANCE[dtype]
    for some in _chosen(rows):
        at = torch.tensor(some, device=device)
        wanted, found = expected[at], product(x[at]).float()
        error = max(relative((found - wanted) * live, wanted.norm()), relative(found * ~live, given[at].norm() * nothing))
        if not error <= allowed:
            raise NumericalError(
                f"with {len(some)} rows of inputs {view.name} packed differs from its dequantized weight by {error:.2g} of the product's "
                f"norm, above {allowed:.2g}; use workload.backend=dense and report this"
            )
        worst = max(worst, error)
    return worst


def check_bias(view: LinearView, bias: Tensor | None) -> None:
    """Raises NumericalError where the module of the linear adds another one; its inputs are zeros."""
    module: Any = view.module
    found = module.forward(view.storage.new_zeros(1, _inputs(view)))
    if not torch.equal(found[0], torch.zeros_like(found[0]) if bias is None else bias.to(found)):
        raise NumericalError(f"{view.name} packed adds another bias than was evaluated; use workload.backend=dense and report this")


@contextmanager
def jittered(model: nn.Module) -> Iterator[None]:
    """While it lasts results of linears are off by a step of their type, up or down by chance."""
    random = torch.Generator().manual_seed(0)

    def jitter(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        signs = (2 * torch.randint(2, out.shape[-1:], generator=random) - 1).to(out)
        return torch.addcmul(out, out, signs, value=torch.finfo(out.dtype).eps / 2)  # in float32, of which no copy is made

    with Taps() as taps:
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                taps.add(module.register_forward_hook(jitter).remove)
        yield


def relative(error: Tensor, size: Tensor) -> float:
    """Norm of `error` beside a norm."""
    return float(error.norm() / size.clamp(min=torch.finfo(torch.float32).tiny))


def _step(stored: StoredTensor) -> Tensor | None:
    """What one code is worth in each row, `[N]` or `[1]`: where codes stand for 0 a kernel adds them up and takes as much off again, each
    sum rounded. None for other formats, which have nothing but zeros where all is 0."""
    return stored.scale.float().square().mean(1).sqrt() if isinstance(stored, AffineTensor) else None


def _inputs(view: LinearView) -> int:
    module: Any = view.module
    return int(module.nx if view.transposed else module.in_features)


def _parts(stored: StoredTensor) -> Iterator[StoredTensor]:
    """The weight by some rows at once."""
    (n, k), changed = stored.shape, cast(Any, stored)
    given = {name: t for name in OF_ROWS[type(stored)] if (t := getattr(stored, name)) is not None}
    count = max(1, AT_ONCE // k)
    for start in range(0, n, count):
        rows = slice(start, start + count)
        more: dict[str, Any] = {name: t[rows] for name, t in given.items() if len(t) == n}  # not of one scale for all
        if isinstance(stored, AffineTensor):
            more["stream"] = None
        elif isinstance(stored, CodebookTensor) and stored.outliers is not None:
            kept = stored.outliers
            column = torch.repeat_interleave(torch.arange(k, device=kept.rows.device), kept.counts)
            here = (kept.rows >= start) & (kept.rows < start + count)
            more["outliers"] = Outliers(torch.bincount(column[here], minlength=k), kept.rows[here] - start, kept.values[here])
        yield replace(changed, **more)


def _chosen(rows: Collection[int]) -> Iterator[list[int]]:
    """Rows of x for each call: the fewest and the most that are asked for, and the most of those between where they are, so that all ways
    through a linear are gone."""
    for m in sorted({min(m, MOST_ROWS) for m in (min(rows), max(rows), *([TENSOR_CORE_ROWS] if TENSOR_CORE_ROWS in rows else []))}):
        if m >= ROWS:
            yield [i % ROWS for i in range(m)]
        else:
            yield from ([*range(i, min(i + m, ROWS))] for i in range(0, min(ROWS, MOST_CALLS * m), m))
