"""Scale groups of a block as transforms see them: consumers, statistics, and the effect of changed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant.methods.base import InputGroup, ScaleGroup
from quant.statistics import Statistics
from workers.blocks import Taps, tap_inputs
from workers.datasets import batches
from workers.fold import BlockWeights
from workers.stream import Call
from workers.structure import ScaleRule


class GroupForward:
    """Runs a group's inspected modules on given inputs, with the arguments they get inside the block."""

    def __init__(
        self, block: nn.Module, weights: BlockWeights, calls: Callable[[int, int], Call], batch_tokens: int, hidden_size: int
    ) -> None:
        self._block = block
        self._weights = weights
        self._calls = calls
        self._batch_tokens = batch_tokens
        self._hidden_size = hidden_size
        self._known: dict[tuple[int, int], dict[str, Call]] = {}

    def group(self, rule: ScaleRule, statistics: Statistics, prefix: str) -> ScaleGroup:
        """Weights and statistics as they are now."""
        consumers = {prefix + n: self._weights.current[n] for n in rule.consumers}
        linear = rule.inspect == rule.consumers

        def forward(weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
            relative = {n: weights[prefix + n] for n in rule.consumers}
            if linear:
                (weight,) = relative.values()
                return F.linear(inputs.to(weight.dtype), weight)
            return self._modules(rule, relative, inputs)

        routers = {prefix + n: self._weights.router(n) for n in rule.routers}
        return ScaleGroup(prefix + rule.name, rule.producer_kind, consumers, statistics, forward, routers, linear)

    def input_group(self, rule: ScaleRule, following: str | None, statistics: Statistics, prefix: str) -> InputGroup:
        """As `group`; following: the linear whose input the effect is seen in, None for the output of the one consumer."""
        consumers = {prefix + n: self._weights.current[n] for n in rule.consumers}

        def forward(weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
            relative = {n: weights[prefix + n] for n in rule.consumers}
            if following is None:
                (weight,) = relative.values()
                return F.linear(inputs.to(weight.dtype), weight)
            seen: list[Tensor] = []

            def tap(name: str, x: Tensor, tokens: Tensor | None) -> Tensor:
                seen.append(x)
                return x

            with tap_inputs(self._block, [following], tap):
                # The block runs on zeros to learn the modules' arguments: before what is to be seen.
                for part in batches(inputs, self._batch_tokens):
                    self._arguments(part.shape[0], part.shape[1], rule)
                seen.clear()
                self._modules(rule, relative, inputs)
            return torch.cat(seen)

        return InputGroup(prefix + rule.name, consumers, statistics, forward)

    @torch.no_grad()
    def _modules(self, rule: ScaleRule, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        outputs = []
        dtype = next(self._block.parameters()).dtype
        with self._replaced(weights):
            for part in batches(inputs.to(dtype), self._batch_tokens):
                calls = self._arguments(part.shape[0], part.shape[1], rule)
                outputs.append(sum(calls[m].run(self._block.get_submodule(m), part) for m in rule.inspect))
        return torch.cat(outputs)  # type: ignore[arg-type]

    @contextmanager
    def _replaced(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        views = self._weights.views
        before = {n: views[n].weight().clone() for n in weights}
        try:
            for n, w in weights.items():
                views[n].write(w)
            yield
        finally:
            for n, w in before.items():
                views[n].write(w)

    def _arguments(self, batch: int, length: int, rule: ScaleRule) -> dict[str, Call]:
        """Arguments of the inspected modules besides their input, from one run of the block on zeros."""
        known = self._known.setdefault((batch, length), {})
        missing = [m for m in rule.inspect if m not in known]
        if missing:
            first = next(self._block.parameters())
            with Taps() as taps:
                for name in missing:
                    taps.add(self._block.get_submodule(name).register_forward_pre_hook(_recorder(known, name), with_kwargs=True).remove)
                self._calls(batch, length).run(self._block, first.new_zeros(batch, length, self._hidden_size))
        return known


def _recorder(known: dict[str, Call], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        known[name] = Call.beside_input(args, kwargs)

    return hook
