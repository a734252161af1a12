"""The linears of a block, input by input: one after another, or those of all inputs at the same time (`workers.side_by_side`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch

from quant import replay
from quant.factors import shared_factors
from workers.context import Context
from workers.feeding import FedStatistics, OriginalStatistics
from workers.rounding import BlockQuantizer, LinearResult, merge
from workers.side_by_side import fit, side_by_side
from workers.structure import Site
from workers.together import Made, make, round_together


def round_block(worker: BlockQuantizer, source: OriginalStatistics | FedStatistics, context: Context) -> list[LinearResult]:
    """All linears at once, or site by site with fresh statistics where a method asks for it and text is fed."""
    sequential = isinstance(source, FedStatistics) and source.kinds and any(m.sequential for m in worker.methods.values())
    results: list[LinearResult] = []
    origin = source.origin(worker.index)
    made = {} if sequential else _made_side_by_side(worker, origin, context)
    for position, site in enumerate(worker.structure.sites):
        names = rounded_here(worker, site)
        if sequential and position > 0 and names:
            with context.phase("forward"):
                fresh, tokens = merge(source.collect(worker.index, worker.structure, (site.linears[0],)))
            worker.statistics.update(fresh)
            worker.tokens.update(tokens)
        results += round_site(worker, site, origin, context, made.get(site.linears[0]))
    return results


def rounded_here(worker: BlockQuantizer, site: Site) -> list[str]:
    """Linears of a site that no tuner quantizes."""
    return [n for n in site.linears if n in worker.methods and worker.methods[n].tuner is None]


def round_site(worker: BlockQuantizer, site: Site, origin: str | None, context: Context, made: Made | None = None) -> list[LinearResult]:
    """Linears that read one input. origin: digest of the file of their Hessian, where it is of an artifact; made: see `round_together`."""
    own = rounded_here(worker, site)
    with context.phase("round"), _factors(context, origin, site, own):
        return round_together(worker, own, made)


@contextmanager
def _factors(context: Context, origin: str | None, site: Site, names: list[str]) -> Iterator[None]:
    """Where the solver has the factors of a site's Hessian from."""
    kept = nullcontext() if context.kept is None else context.kept.factors(origin, site.linears[0])
    with kept, shared_factors() if len(names) > 1 else nullcontext():
        yield


def _made_side_by_side(worker: BlockQuantizer, origin: str | None, context: Context) -> dict[str, Made]:
    """Site ▸ what roundings make of its linears, of those sites that are rounded side by side. A site that fails is left out: rounded
    alone, it says in its linears' names what it has."""
    sites = {s.linears[0]: (s, own) for s in worker.structure.sites if (own := rounded_here(worker, s))}
    if not fit(worker, [own for _, own in sites.values()]):
        return {}

    def work(site: Site, own: list[str]) -> Made:
        with _factors(context, origin, site, own):
            return make(worker, own)

    with context.phase("round"):
        found = side_by_side(context.device, {name: partial(work, *given) for name, given in sites.items()})
    failed = {name: f for name, f in found.items() if isinstance(f, Exception)}
    if any(isinstance(e, torch.OutOfMemoryError) for e in failed.values()):
        context.notes.append(f"block {worker.index}: not all inputs' linears fit the device's memory side by side: some had it alone")
        replay.give_back("the solver's blocks were queued one by one: memory had run out before")
        torch.cuda.empty_cache()
    # Told where the stage succeeds all the same: rounded alone, linears that cannot be rounded end it.
    for name, e in failed.items():
        if not isinstance(e, torch.OutOfMemoryError):
            context.notes.append(f"{worker.path(name)}: its input's linears, rounded side by side with others, raised {e!r}; rounded alone")
    return {name: made for name, made in found.items() if not isinstance(made, Exception)}
