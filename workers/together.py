"""Linears that read one input are rounded in one call where their methods take them together: one Hessian, one order, fewer launches."""

from __future__ import annotations

import time
from collections.abc import Sequence

from quant.errors import NonFiniteError, ScaleDtypeError
from quant.methods.base import Rounded, Stacks
from workers.rounding import BlockQuantizer, LinearResult, translated

Made = dict[str, tuple[Rounded, float]]
"""Linear ▸ what its rounding returned, and in how many seconds."""


def round_together(worker: BlockQuantizer, names: Sequence[str], made: Made | None = None) -> list[LinearResult]:
    """Quantize linears that read one input, with the results that each has alone. made: what `make` has of them; None: nothing yet."""
    made = stacked(worker, names) if made is None else made
    return [worker.round(n, *made.get(n, ())) for n in names]


def stacked(worker: BlockQuantizer, names: Sequence[str]) -> Made:
    """Of those linears that are taken together. Their seconds are shares by rows of the call."""
    made: Made = {}
    for alike in _alike(worker, names):
        start = time.perf_counter()
        rounded = _rounded(worker, alike)
        a_row = (time.perf_counter() - start) / sum(worker.weights.current[n].shape[0] for n in alike)
        made |= {n: (r, a_row * worker.weights.current[n].shape[0]) for n, r in rounded.items()}
    return made


def make(worker: BlockQuantizer, names: Sequence[str]) -> Made:
    """Of all of them, the others one by one; nothing in the block changes. Raises what roundings raise."""
    made = stacked(worker, names)
    for name in names:
        if name not in made:
            start = time.perf_counter()
            made[name] = worker.rounded(name), time.perf_counter() - start
    return made


def _alike(worker: BlockQuantizer, names: Sequence[str]) -> list[list[str]]:
    """Linears of one method that takes several: two or more each, and on a GPU one, too, whose blocks of columns are replayed then
    (`quant.replay`)."""
    found: list[list[str]] = []
    for name in names:
        rounding = worker.methods[name].rounding
        if isinstance(rounding, Stacks):
            own = next((f for f in found if worker.methods[f[0]].rounding == rounding), None)
            if own is None:
                found.append([name])
            else:
                own.append(name)
    return [f for f in found if len(f) > 1 or worker.weights.current[f[0]].is_cuda]


def _rounded(worker: BlockQuantizer, names: list[str]) -> dict[str, Rounded]:
    """Nothing where they are not taken together, or one of them is to be rounded alone, which says in its own name what it has."""
    rounding = worker.methods[names[0]].rounding
    weights, schemes = [worker.weights.current[n] for n in names], [worker.methods[n].scheme for n in names]
    if not isinstance(rounding, Stacks) or not rounding.stacks(weights, schemes):
        return {}
    with translated(worker.path(names[0])):
        try:
            rounded = rounding.quantize_stacked(weights, worker.statistics_to_round(names[0])[0], schemes)
        except (NonFiniteError, ScaleDtypeError):
            return {}
    return dict(zip(names, rounded, strict=True))
