"""Whether a packed model is the simulated one that was evaluated: logits of both on the same tokens, by the same experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from workers import generation, kv_runs, one_pass
from workers.alike import jittered
from workers.context import Context
from workers.errors import NumericalError
from workers.generation import Decoder, Eager, Generation, generate, last_logits
from workers.residency import Residency
from workers.routing import Choices
from workers.specs import MeasureSpec
from workers.stream import streams

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2}
"""Relative error of logits, over all of them. The residual stream is rounded twice a block, by 0.4 u of its norm each time (u = 2⁻⁸ for
bfloat16), in both models independently: 0.8 u √blocks, in bfloat16 0.028 of 80 blocks. (Random Llamas of 2, 8 and 24 blocks, weights with a
deviation of 0.02: 0.004, 0.008, 0.012.) This holds while both compute one function: they are given the same experts (`workers.routing`)."""


class Noise(NamedTuple):
    """What rounding activations and caches changes, relative."""

    logits: float
    routers: float
    """Of their logits."""


class Comparison:
    """Of what one model of a variant generates with another's, on a prompt `[B, P]` and given tokens `[B, steps]`."""

    def __init__(self, spec: MeasureSpec, prompt: Tensor, given: Tensor, context: Context) -> None:
        self._spec, self._prompt, self._given, self._context = spec, prompt, given, context
        self._expected: Tensor | None = None
        """Logits `[B, steps + 1, V]` of the variant as evaluated; None: there is nothing to compare with."""
        self._noise, self._choices = Noise(0.0, 0.0), Choices()
        self.error: float | None = None
        """Relative, of the logits that were checked; None where there were none to compare them with."""

    def simulate(self, model: nn.Module, artifact: Path | None, residency: Residency) -> None:
        """What is to be expected: of the variant as evaluated. How far logits are from it without anything rounded while the model runs
        is noise."""
        spec, context = self._spec, self._context
        with residency.runtime(model, artifact, spec.activation, None), self._choices.recorded(model):
            cache = None if spec.kv is None else kv_runs.empty_caches(model, spec.kv, context)
            self._expected = _logits(model, self._prompt, self._given, cache, context)
        if spec.activation is not None or spec.kv is not None:
            with self._choices.replayed(model):
                plain = _logits(model, self._prompt, self._given, None, context)
            self._noise = Noise(distance(plain, self._expected), self._choices.distance)

    def check(self, decoder: Decoder, model: nn.Module) -> Generation:
        """What the packed model generates, by experts of its own. Raises NumericalError where its logits, or those of its routers, are too
        far from the simulated ones, or not numbers."""
        choices, own = self._choices, Choices()
        with choices.replayed(model), own.recorded(model):
            found = self._generate(decoder)
        if self._expected is None:
            return found
        self.error = distance(found.logits, self._expected)
        if self._spec.model.dtype != "float32" and (self.error > self.allowed or choices.distance > self._allowed(self._noise.routers)):
            # How far rounding to a type of 16 bits alone moves them, by the same experts: deep models and those with large weights enlarge
            # it. A product that is wrong was found out alone (`workers.alike`).
            with own.replayed(model), jittered(model):
                moved = distance(self._generate(decoder).logits, found.logits)
            self._noise = Noise(self._noise.logits + moved, self._noise.routers + own.distance)
        require_close("logits", self.error, self.allowed)
        if not choices:
            return found
        require_close("routers' logits", choices.distance, self._allowed(self._noise.routers))
        if choices.other:
            self._context.notes.append(
                f"{choices.other} of {choices.given} choices of experts were the simulated model's for the comparison: the packed one, "
                "rounded otherwise, would have chosen others"
            )
        # A captured step, which has no hooks, is compared with it.
        return self._generate(decoder) if generation.has_graphs(self._context.device) else found

    @property
    def allowed(self) -> float:
        """Relative error of logits."""
        return self._allowed(self._noise.logits)

    def _allowed(self, noise: float) -> float:
        """A sum in another order may put one value on the other side of a boundary between two codes; in later layers many follow, until
        packed and simulated model are two roundings of the same, √2 noise apart."""
        return TOLERANCE[self._spec.model.dtype] + 2 * noise

    def _generate(self, decoder: Decoder) -> Generation:
        return generate(decoder, self._prompt, self._given.shape[1], self._given)


def require_close(what: str, error: float, allowed: float) -> None:
    """Raises NumericalError where a relative error is above what is allowed, or not a number."""
    if not error <= allowed:
        raise NumericalError(
            f"{what} with packed weights differ from the simulated ones by {error:.2g} of their norm, above {allowed:.2g}; "
            "use workload.backend=dense and report this"
        )


def _logits(model: nn.Module, prompt: Tensor, given: Tensor, cache: Callable[[], Any] | None, context: Context) -> Tensor:
    """`[B, steps + 1, V]`."""
    if one_pass.serves(model):
        found: list[Tensor] = []
        # Tokens of sliding windows are all held, and masked: how many there are is then known from the first block, which others have not.
        one_pass.decode(
            model,
            (prompt, *torch.split(given, 1, dim=1)),
            DynamicCache() if cache is None else cache(),
            lambda out: found.append(out.logits[:, -1].to(torch.float32, copy=True)),
            **last_logits(model),
        )
        return torch.stack(found, 1)
    if streams(model):
        context.notes.append("the model has no cache of keys and values: for the comparison the checkpoint was read once for every token")
    return generate(Eager(model, cache), prompt, given.shape[1], given).logits


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, over all."""
    return float((found - expected).double().norm() / expected.double().norm())
