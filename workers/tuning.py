"""The tuner's part of the quantize stage: two streams of hidden states, and blocks as functions of their parameters.

The full-precision stream is what the unquantized model feeds each block; the other passes through the blocks as they are
finally quantized, with activations fake-quantized where the tuner reads them. All of it is computed in float32 (float64
for float64 models), in batches of one size whatever the hints say: training would make other last bits into other codes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quant.methods.base import Rounded
from quant.methods.tuner import LOSS_TOKENS, BlockTuner, Place, TunableLinear, Tuned, TuningBlocks
from quant.scheme import ActivationScheme
from quant.straight_through import activation_through
from workers.blocks import Once, Tap, Taps, replace_input, tap_inputs
from workers.context import Context
from workers.datasets import batches
from workers.errors import InputError
from workers.fold import wide
from workers.rounding import BlockQuantizer, LinearResult, Method, translated
from workers.runtime import BatchShape, quantized_input
from workers.stream import BlockModel, Call


def tuner_of(made: tuple[Method, ...]) -> BlockTuner | None:
    """The stage's tuner. Raises InputError where there are several."""
    tuners = [m.tuner for m in made if m.tuner is not None]
    if any(t != tuners[0] for t in tuners):
        raise InputError("the rules name different tuners or parameters; one quantize stage tunes with one, the other rules may round")
    return tuners[0] if tuners else None


class BlockForward:
    """Consecutive blocks as one differentiable function; a parameter that is not given is read from the modules as they are."""

    def __init__(self, model: BlockModel, indices: range, workers: Sequence[BlockQuantizer] = ()) -> None:
        """workers: of the blocks, where weights of linears will be given."""
        self._model, self._indices = model, indices
        self._dtype = torch.promote_types(model.dtype, torch.float32)
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._state = {b: {n: p.to(self._dtype) for n, p in model.blocks[b].named_parameters()} for b in indices}
        self._shape = BatchShape()
        self._linears = {w.path(n): view for w in workers for n, view in w.weights.views.items()}

    def __call__(self, changed: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """(parameters by full name, `[B, T, K]`) ▸ `[B, T, K]` float32 or float64."""
        batch, length = x.shape[:2]
        if (batch, length) not in self._calls:
            made = self._model.block_calls(batch, length)
            self._calls[batch, length] = [_cast(made[b], self._dtype) for b in self._indices]
        self._shape.sequences, self._shape.length = batch, length
        states = self._states(changed)
        hidden = x.to(self._dtype)
        for b, call in zip(self._indices, self._calls[batch, length], strict=True):
            args, kwargs = replace_input(call.args, call.kwargs, hidden)
            out = torch.func.functional_call(self._model.blocks[b], states[b], args, kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def all(self, x: Tensor) -> Tensor:
        """The modules as they are on `[S, T, K]`, in the model's dtype."""
        with torch.no_grad():
            return torch.cat([self({}, part).to(self._model.dtype) for part in batches(x, LOSS_TOKENS)])

    @contextmanager
    def quantizing(self, scheme: ActivationScheme | None, names: list[str]) -> Iterator[None]:
        """Within, inputs of the linears `names` are fake-quantized with dynamic ranges, straight-through."""
        if scheme is None:
            yield
            return
        once = Once()

        def tap(name: str, x: Tensor, tokens: Tensor | None) -> Tensor:
            return once.of(lambda: quantized_input(x, tokens, scheme, None, self._shape, activation_through), x)

        with self._tapped(names, tap):
            yield

    def observe(self, x: Tensor, names: list[str], tap: Callable[[str, Tensor], None]) -> None:
        """Shows `tap` the inputs `[T, K]` of linears, sequence by sequence."""

        def each(name: str, seen: Tensor, tokens: Tensor | None) -> Tensor:
            # Some feed-forwards get their tokens flat.
            for sequence in seen.reshape(self._shape.sequences, -1, seen.shape[-1]).unbind(0):
                tap(name, sequence)
            return seen

        with self._tapped(names, each):
            self.all(x)

    @contextmanager
    def _tapped(self, names: list[str], tap: Tap) -> Iterator[None]:
        with Taps() as taps:
            for b in self._indices:
                prefix = self._prefix(b)
                own = [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
                taps.add(tap_inputs(self._model.blocks[b], own, _below(prefix, tap)).remove)
            yield

    def _prefix(self, block: int) -> str:
        return f"{self._model.structure.blocks}.{block}."

    def _states(self, changed: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        states = {b: dict(s) for b, s in self._state.items()}
        experts: dict[tuple[int, str], dict[int, Tensor]] = {}
        for key, value in changed.items():
            module, _, parameter = key.rpartition(".")
            b = next(b for b in self._indices if key.startswith(self._prefix(b)))
            view = self._linears.get(module) if parameter == "weight" else None
            name, value = module.removeprefix(self._prefix(b)), value.to(self._dtype)
            if view is None:
                states[b][f"{name}.{parameter}"] = value
            elif view.expert is None:
                states[b][f"{name}.{view.parameter}"] = value.T if view.transposed else value
            else:
                experts.setdefault((b, name.rpartition(".")[0]), {})[view.expert] = value
        for (b, name), given in experts.items():
            whole = states[b][name]
            states[b][name] = torch.stack([given.get(e, whole[e]) for e in range(whole.shape[0])])
        return states


def _below(prefix: str, tap: Tap) -> Tap:
    """`tap`, which is told full names."""
    return lambda name, x, tokens: tap(prefix + name, x, tokens)


class Tuning:
    """Of one quantize stage."""

    def __init__(self, tuner: BlockTuner, model: BlockModel, tokens: Tensor, activation: ActivationScheme | None, context: Context) -> None:
        """tokens `[S, T]`; activation: the scheme's part, if the tuner reads it."""
        self.tuner, self._model, self._context = tuner, model, context
        self.losses: list[dict[str, Any]] = []
        if activation is not None and not activation.dynamic:
            context.notes.append(f"{tuner.name} trains with dynamic activation ranges; the static ones are taken from its result")
            activation = replace(activation, dynamic=True)
        self._activation = activation
        with context.phase("forward"):
            prepared = model.prepare(batches(tokens, LOSS_TOKENS))
        self._full = self._quantized = torch.cat(prepared.hidden)
        self._targets = self._full
        self._own: Tensor | None = None

    def open(self, indices: range) -> None:
        """Take the targets, while the blocks are as the checkpoint has them."""
        with self._context.phase("forward"):
            forward = BlockForward(self._model, indices)
            self._targets = forward.all(self._full)
            self._own = forward.all(self._quantized) if self.tuner.wants_own_targets else None

    def tune(self, workers: list[BlockQuantizer]) -> None:
        """Quantize the linears that the tuner is to quantize; their results are in the workers, in block order."""
        start = time.perf_counter()
        indices = range(workers[0].index, workers[-1].index + 1)
        forward = BlockForward(self._model, indices, workers)
        blocks = self._blocks(workers, forward)
        if not blocks.linears:
            return
        with self._context.phase("tune"), forward.quantizing(self._activation, _quantized_names(workers)), translated(blocks.name):
            tuned = self.tuner.tune(blocks)
        seconds = (time.perf_counter() - start) / len(blocks.linears)
        _write(workers, tuned)
        for name, rounded in tuned.tensors.items():
            worker = next(w for w in workers if name.startswith(w.path("")))
            worker.tuned.append(_accept(worker, name.removeprefix(worker.path("")), rounded, seconds))
        self._context.notes += [f"{blocks.name}: {note}" for note in tuned.notes]
        self.losses.append({"blocks": list(indices), "start": tuned.start, "loss": tuned.loss, "iterate": tuned.iterate})

    def advance(self, workers: list[BlockQuantizer]) -> None:
        """Both streams pass the blocks, which are quantized now."""
        with self._context.phase("forward"):
            forward = BlockForward(self._model, range(workers[0].index, workers[-1].index + 1))
            with forward.quantizing(self._activation, _quantized_names(workers)):
                self._quantized = forward.all(self._quantized)
            self._full = self._targets

    def _blocks(self, workers: list[BlockQuantizer], forward: BlockForward) -> TuningBlocks:
        linears: dict[str, TunableLinear] = {}
        norms: dict[str, Tensor] = {}
        sites: list[str] = []
        for w in workers:
            experts = w.structure.experts
            sites += [w.path(s.linears[0]) for s in w.structure.sites if experts is None or not s.linears[0].startswith(experts + ".")]
            norms.update({w.path(n): p for n, p in _norms(w).items()})
            for n, method in w.methods.items():
                if method.tuner is not None:
                    about = w.linear(n)
                    linears[w.path(n)] = TunableLinear(w.weights.current[n], method.scheme, about.bias, about, w.statistics_of(n))
        name = workers[0].path("").rstrip(".") + (f" .. {workers[-1].index}" if len(workers) > 1 else "")
        return TuningBlocks(
            name=name,
            linears=linears,
            inputs=self._full,
            quantized=self._quantized,
            targets=self._targets,
            forward=forward,
            own_targets=self._own,
            norms=norms,
            places=tuple(p for w in workers for p in _places(w)),
            observe=lambda tap: BlockForward(self._model, range(workers[0].index, workers[-1].index + 1)).observe(self._full, sites, tap),
            activation=self._activation,
            count=len(workers),
            seed=workers[0].seed,
        )


def _cast(call: Call, dtype: torch.dtype) -> Call:
    """Rotary tables and masks in the type of the computation."""

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
            return type(value)(cast(v) for v in value)
        return value

    return Call(tuple(cast(a) for a in call.args), {k: cast(v) for k, v in call.kwargs.items()})


def _quantized_names(workers: list[BlockQuantizer]) -> list[str]:
    return [w.path(n) for w in workers for n in w.methods]


def _norms(worker: BlockQuantizer) -> dict[str, Tensor]:
    """`<module>.<parameter>` ▸ values of all modules of vectors alone that are not linears, as the transforms left them."""
    out: dict[str, Tensor] = {}
    for name, module in worker.block.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if "forward" in module.__dict__:  # a fused norm is x / rms(x) times its weight; it has no bias any more
            own.pop("bias", None)
        if own and not isinstance(module, nn.Linear) and all(p.ndim == 1 for p in own.values()):
            changed = worker.weights.norms.get(name, {})
            out.update({f"{name}.{k}": changed.get(k, wide(p)) for k, p in own.items()})
    return out


def _places(worker: BlockQuantizer) -> list[Place]:
    """After norms, between values and output, between queries and keys. The feed-forward's last input is none: a product or a
    nonlinearity makes it, which a shift, or a negative scale, would change. Neither is an input that a router reads."""
    structure = worker.structure
    out = [
        Place(
            worker.path(rule.name),
            rule.producer_kind,
            worker.path(rule.producer),
            tuple(worker.path(c) for c in rule.consumers),
            norm_offset=structure.norm_offset,
        )
        for rule in structure.groups
        if rule.reason is None
        and rule.producer is not None
        and not rule.routers
        and not any(c in worker.weights.inputs for c in rule.consumers)
        and (rule.producer_kind == "norm" or rule.name == "output")
    ]
    s = structure.scores
    if s is not None:
        path = worker.path
        scores = Place(path("scores"), "scores", path(s.queries), (path(s.keys),), heads=s.heads, kv_heads=s.kv_heads, rotary=s.rotary)
        out.append(scores)
    return out


def _write(workers: list[BlockQuantizer], tuned: Tuned) -> None:
    """Norms, biases and factors into the blocks' books; `BlockWeights.write` then puts all into the modules."""
    for w in workers:
        prefix, weights = w.path(""), w.weights
        for key, value in tuned.parameters.items():
            if not key.startswith(prefix):
                continue
            module, _, parameter = key.removeprefix(prefix).rpartition(".")
            if module in weights.views:
                weights.biases[module] = value.detach()
            else:
                own = {k: wide(p) for k, p in w.block.get_submodule(module).named_parameters(recurse=False)}
                weights.norms[module] = {**(weights.norms.get(module) or own), parameter: value.detach()}
        for of, factors in ((weights.columns, tuned.columns), (weights.rows, tuned.rows)):
            for key, factor in factors.items():
                if key.startswith(prefix):
                    name = key.removeprefix(prefix)
                    of[name] = of[name] * factor if name in of else factor
        for key, rounded in tuned.tensors.items():
            if key.startswith(prefix):
                name = key.removeprefix(prefix)
                weights.current[name] = rounded.tensor.dequantize().to(weights.current[name])
        weights.write()


def _accept(worker: BlockQuantizer, name: str, rounded: Rounded, seconds: float) -> LinearResult:
    notes = [*worker.linear_notes.get(name, ()), *rounded.notes]
    return LinearResult(worker.path(name), rounded, worker.errors(name), seconds, notes)
