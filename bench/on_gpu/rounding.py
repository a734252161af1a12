"""RTN of a whole model's linears."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bench.on_gpu.clock import Bench, Goal, Row, known
from bench.on_gpu.weights import GROUP
from quant.kernels import kernel


def rounding(b: Bench) -> Iterator[Row]:
    """Linears of 32 decoder blocks with 6.5e9 weights in all, one launch each; two blocks in turn, which no cache holds."""
    run, plain = (kernel("rtn_pack", name, b.device).run.rtn_pack for name in (b.backend, "reference"))
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)] if not b.dry else [(3, 256)]
    blocks = [[b.random(*shape, dtype=torch.bfloat16) / 50 for shape in shapes] for _ in range(b.size(2, 1))]
    count, weights = 32, sum(n * k for n, k in shapes)
    for name, grid, bits, width, codes, goal in (
        ("groups of 128, packed", "g_asym", 4, GROUP, False, Goal(1e4)),
        ("groups of 128, packed, and a byte a code", "g_asym", 4, GROUP, True, None),
        ("groups of 128, packed", "g_asym", 3, GROUP, False, None),
        ("rows, packed", "q_sym", 4, 0, False, None),
    ):
        wrong = 0.0
        for w in {w.shape: w for w in blocks[0]}.values():
            given = (w, grid, bits, width or w.shape[1], torch.float16, codes)
            ours, want = run(*given), plain(*given)
            for part in ("scale", "zero", "stream", "told", *(["codes"] if codes else [])):
                wrong += float((getattr(ours, part) != getattr(want, part)).double().sum())

        def work(i: int) -> list[Any]:
            return [run(w, grid, bits, width or w.shape[1], torch.float16, codes) for w in blocks[i]]  # noqa: B023

        moved = sum(t.nbytes for p in work(0) for t in (p.scale, p.zero, p.stream, p.codes) if t is not None) + 2 * weights
        took = b.time(work, len(blocks))
        source, to = (torch.empty(moved // 2, dtype=torch.uint8, device=b.device) for _ in range(2))
        copied = b.time(lambda i: to.copy_(source))  # noqa: B023
        torch_took = b.once(lambda: [plain(w, grid, bits, width or w.shape[1], torch.float16) for w in blocks[0]])  # noqa: B023
        peers = {peer: count * us for peer, us in known(copy_of_as_much=copied, torch=torch_took).items()}
        ours_us = None if took is None else count * took
        named = f"rtn_pack {bits} bits, {name}, {count} blocks"
        yield Row(named, wrong, 0, ours_us, peers, count * moved, goal, launches=count * len(shapes))
