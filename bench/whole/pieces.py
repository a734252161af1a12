"""Pieces of `bench.gpu` that quantize whole models."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from bench.on_gpu.clock import Bench, Goal, Row, going_on
from bench.whole.decoding import EXPERTS, OTHER_WIDTHS, SHAPE_7B, SHAPE_70B, Model, decoded
from bench.whole.runs import Work, measured
from bench.whole.stages import WRITTEN
from workers.request import Hints

GPTQ = {"static_groups": True, "true_sequential": True}
WHOLE = (Work("gptq", "7b", GPTQ, goal=Goal(20e6)),)
SEARCHES = (
    Work("billm", "7b", goal=Goal(25e6), published="0.5 h on one GPU (arXiv 2402.04291)"),
    Work("claq", "7b", goal=Goal(40e6)),
    Work("claq", "7b", {"codebooks": "batched"}, departure="codebooks of the columns as given: not the published order"),
)
STREAMED = (Work("gptq", "70b", GPTQ, streamed=True, goal=Goal(300e6), published="hours: 4 GPU hours for 175B (arXiv 2210.17323)"),)


def _root(b: Bench) -> Path:
    """Models that pieces share."""
    if b.folder is None:
        return _temporary()
    b.folder.mkdir(parents=True, exist_ok=True)
    return b.folder


@cache
def _temporary() -> Path:
    """Removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="bitgrid-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _hints(b: Bench) -> Hints:
    return Hints(device=b.device.type, threads=1 if b.dry else None)


def _rows(works: tuple[Work, ...], b: Bench) -> Iterator[Row]:
    root, hints = _root(b), _hints(b)

    def row(work: Work) -> Row:
        try:
            return measured(work, root, b, hints)
        finally:
            for folder in WRITTEN:
                shutil.rmtree(root / folder, ignore_errors=True)

    small = [replace(w, shape="dry", samples=2, length=32) if b.dry else replace(w, layers=b.layers or w.layers) for w in works]
    return going_on(partial(row, work) for work in small)


def whole(b: Bench) -> Iterator[Row]:
    """GPTQ of a model of 7 billion weights."""
    yield from _rows(WHOLE, b)


def whole_searches(b: Bench) -> Iterator[Row]:
    """BiLLM and CLAQ of it, CLAQ also with all codebooks of a linear in one launch."""
    yield from _rows(SEARCHES, b)


def streamed(b: Bench) -> Iterator[Row]:
    """GPTQ of a model of 70 billion weights, through one layer's file."""
    yield from _rows(STREAMED, b)


def _decoded(b: Bench, model: Model) -> Iterator[Row]:
    return decoded(_root(b), b, _hints(b), model)


def decoding(b: Bench) -> Iterator[Row]:
    """The stage `measure`, on a model of 7 billion weights of 4 bits, also with its cache in 4."""
    yield from _decoded(b, SHAPE_7B)


def decoding_widths(b: Bench) -> Iterator[Row]:
    """The same with weights of 3, 2 and 8 bits."""
    yield from _decoded(b, OTHER_WIDTHS)


def decoding_large(b: Bench) -> Iterator[Row]:
    """The same of 70 billion weights of 4 bits, through one layer's file."""
    yield from _decoded(b, SHAPE_70B)


def decoding_experts(b: Bench) -> Iterator[Row]:
    """The same of a model of experts, with 47 billion weights."""
    yield from _decoded(b, EXPERTS)
