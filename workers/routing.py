"""Which experts tokens go to: recorded of one model, and given to another that is compared with it.

Two roundings of one function may order two experts differently where a router finds them nearly alike. The token then has another
expert, and its logits, and those of tokens that attend to it, are no longer the same function's: no tolerance for rounding holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from workers import families
from workers.blocks import Taps


class Choices:
    """Of the routers of a model, in the order of each one's calls; of a model without experts there are none."""

    def __init__(self) -> None:
        self._recorded: dict[str, list[tuple[Tensor, Tensor]]] = {}
        """Router ▸ of each call its logits `[tokens, experts]` and its choice, int64 `[tokens, k]`."""
        self.given = 0
        """Choices that the last replay gave, of all routers; each one of a token."""
        self.other = 0
        """Of those, where the model's own choice was another."""
        self._squares = (0.0, 0.0)
        """Of the differences of its routers' logits from those recorded, and of these."""

    def __bool__(self) -> bool:
        return bool(self._recorded)

    @property
    def distance(self) -> float:
        """Of all routers' logits together, relative, in the last replay: a choice that is given says nothing of the router."""
        differences, recorded = self._squares
        if not recorded:
            return math.inf if differences else 0.0
        return math.sqrt(differences / recorded)

    @contextmanager
    def recorded(self, model: nn.Module) -> Iterator[None]:
        """Of what runs within."""
        self._recorded = {name: [] for name in _routers(model)}

        def record(name: str) -> Callable[..., None]:
            return lambda module, args, out: self._recorded[name].append((out[0], out[2]))

        with _hooked(model, {name: record(name) for name in self._recorded}):
            yield

    @contextmanager
    def replayed(self, model: nn.Module) -> Iterator[None]:
        """What runs within chooses as was recorded, and weighs the chosen experts by its own logits."""
        self.given, self.other, self._squares = 0, 0, (0.0, 0.0)
        with _hooked(model, {name: self._replay(iter(calls)) for name, calls in self._recorded.items()}):
            yield

    def _replay(self, calls: Iterator[tuple[Tensor, Tensor]]) -> Callable[..., Any]:
        def replay(module: nn.Module, args: Any, out: Any) -> Any:
            logits, weights, own = out
            recorded, given = next(calls)
            other = (given.sort(-1).values != own.sort(-1).values).any(-1, keepdim=True)
            self.given, self.other = self.given + len(other), self.other + int(other.sum())
            more = ((logits.double() - recorded.double()).square().sum(), recorded.double().square().sum())
            self._squares = (self._squares[0] + float(more[0]), self._squares[1] + float(more[1]))
            scores = torch.softmax(logits.float(), -1).gather(-1, given)
            scores = (scores / scores.sum(-1, keepdim=True)).to(weights.dtype)
            return logits, torch.where(other, scores, weights), torch.where(other, given, own)

        return replay


def _routers(model: nn.Module) -> list[str]:
    structure = families.structure_of(model)
    return [structure.path(b, name) for b in range(structure.count) for name in structure.routed_inputs()]


@contextmanager
def _hooked(model: nn.Module, hooks: dict[str, Callable[..., Any]]) -> Iterator[None]:
    with Taps() as taps:
        for name, hook in hooks.items():
            taps.add(model.get_submodule(name).register_forward_hook(hook).remove)
        yield
