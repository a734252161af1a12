"""One forward of a block that waits at the input of every site until the linears that read it are quantized.

GPTQ's true-sequential order (Frantar et al. 2022; `--true-sequential` of the reference code) needs, at each site, inputs that have passed
the quantized linears before it. Run anew for every site, a block of four sites is run five times over. Here every batch's forward is a
greenlet that goes on where it stopped, and its outputs are those of the quantized block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextvars import copy_context

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from workers.blocks import tap_inputs
from workers.capture import BlockStatistics, Collector, gathered
from workers.stream import Call
from workers.structure import Structure


class PausedForward:
    """Of all batches through one block. Outputs, and statistics of every site, equal those of forwards run anew, bit for bit: each module
    sees the same inputs and weights."""

    def __init__(
        self,
        block: nn.Module,
        widths: Mapping[str, int],
        kinds: frozenset[str],
        calls: list[Call],
        hidden: list[Tensor],
        kept_sequences: int,
    ) -> None:
        """widths: first linear of each site to stop at ▸ channels of its input."""
        self._widths = widths
        self._kinds, self._kept = kinds, kept_sequences
        self._block, self._calls, self._hidden = block, calls, hidden
        self.outputs: list[Tensor] = []
        """Of the batches, when `sites` has come to its end."""

    def sites(self) -> Iterator[tuple[str, BlockStatistics]]:
        """Name of each site, in the order of the forward, and the statistics of its inputs. What is done to the block's
        linears before the next one is asked for is what the inputs pass then. Raises NumericalError for inputs that are not finite."""
        batches = [_Batch(self._block, call, h) for call, h in zip(self._calls, self._hidden, strict=True)]
        taps = tap_inputs(self._block, self._widths, _wait)
        try:
            stops = [batch.resume() for batch in batches]
            while stops[0] is not None:
                name = stops[0][0]
                assert all(s is not None and s[0] == name for s in stops), "batches take different ways through the block"
                yield name, self._of(name, (s[1] for s in stops if s is not None))
                stops = [batch.resume() for batch in batches]
            self.outputs = [batch.output for batch in batches]
        finally:
            taps.remove()
            for batch in batches:
                batch.give_up()

    def _of(self, name: str, inputs: Iterable[Tensor]) -> BlockStatistics:
        collector = Collector(self._kinds, self._widths[name], self._hidden[0].device, self._kept, routed=False)
        for x, h in zip(inputs, self._hidden, strict=True):
            collector.add_sequences(x.reshape(*h.shape[:2], -1))
        return gathered({name: collector})


def waiting_bytes(structure: Structure, tokens: int, dtype: torch.dtype) -> int:
    """About what batches hold while they wait, at most: the inputs of a site, what a block adds to, and what comes in between."""
    return tokens * (2 * max(s.cols for s in structure.sites) + 3 * structure.sites[0].cols) * dtype.itemsize


class _Batch:
    """A forward that stops at every tap."""

    def __init__(self, block: nn.Module, call: Call, hidden: Tensor) -> None:
        self.output: Tensor

        def run() -> None:
            self.output = call.run(block, hidden)

        self._run = greenlet(run)
        # Or kernels would not be recorded there.
        self._run.gr_context = copy_context()

    def resume(self) -> tuple[str, Tensor] | None:
        """Where it stopped, and with which input; None at the end."""
        with torch.no_grad():
            stop: tuple[str, Tensor] | None = self._run.switch()
        return stop

    def give_up(self) -> None:
        if self._run:
            self._run.throw(GreenletExit)


def _wait(name: str, x: Tensor, tokens: Tensor | None) -> Tensor:
    parent = getcurrent().parent
    assert parent is not None
    parent.switch((name, x))
    return x
