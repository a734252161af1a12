"""Greedy generation: a prompt fills a cache, then steps of one token read it, each launched anew or, on a GPU, as a CUDA graph."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from workers import families
from workers.errors import InputError
from workers.positions import refuses_room

CACHES = ("past_key_values", "state")
"""Names under which models return, and take, what they keep of earlier tokens."""
TOLD_POSITIONS = ("opt",)
"""Families that read the number of tokens held back from the device, unless they are told which places count and where a token stands."""
WARM = 3
"""Steps before a capture: kernels are compiled and libraries loaded by then."""
T = TypeVar("T")


class NoGraph(Exception):
    """Why a step is not captured."""


class Decoder(Protocol):
    """Tokens in, logits `[B, V]` after the last of them out; a prompt begins anew."""

    def prompt(self, tokens: Tensor) -> Tensor:
        """tokens `[B, P]`."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """tokens `[B, 1]`. The result may be overwritten by the next step."""
        ...


@dataclass(frozen=True)
class Generation:
    tokens: Tensor
    """`[B, steps]`, what went in after the prompt."""
    logits: Tensor
    """float32 `[B, steps + 1, V]`: after the prompt, and after each step; `[B, 1, V]`, after the last one, where only that is kept."""
    seconds: list[float]
    """Of the prompt, and of each step."""


@torch.inference_mode()
def generate(decoder: Decoder, prompt: Tensor, steps: int, given: Tensor | None = None, *, last_only: bool = False) -> Generation:
    """The most likely tokens after the prompt `[B, P]`, or `given` `[B, steps]`, one at a time. last_only: of the logits only the last
    are kept, so that memory is the model's and not that of a comparison."""
    tokens: list[Tensor] = []
    logits: list[Tensor] = []
    seconds: list[float] = []
    x, run = prompt, decoder.prompt
    for step in range(steps + 1):
        out, took = timed(lambda: run(x), prompt.device)  # noqa: B023
        seconds.append(took)
        if last_only:
            logits.clear()
        logits.append(out.to(torch.float32, copy=True))
        if step < steps:
            x, run = logits[-1].argmax(-1, keepdim=True) if given is None else given[:, step : step + 1], decoder.step
            tokens.append(x)
    return Generation(torch.cat(tokens, 1), torch.stack(logits, 1), seconds)


def timed(run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    if device.type != "cuda":
        start = time.perf_counter()
        return run(), time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    out = run()
    end.record()
    end.synchronize()
    return out, begin.elapsed_time(end) / 1000


class Eager:
    """Every kernel of a step is launched by the host. cache: makes an empty one; None: the model's own."""

    def __init__(self, model: nn.Module, cache: Callable[[], Any] | None = None) -> None:
        self._model, self._cache, self._last = model, cache, last_logits(model)
        self._kept: dict[str, Any] = {}

    def prompt(self, tokens: Tensor) -> Tensor:
        self._kept = {}  # given up before the next is made
        if self._cache is not None:
            self._kept = {CACHES[0]: self._cache()}
        return self.step(tokens)

    def step(self, tokens: Tensor) -> Tensor:
        out = self._model(input_ids=tokens, use_cache=True, **self._last, **self._kept)
        name = next((n for n in CACHES if getattr(out, n, None) is not None), None)
        if name is None:
            kind = type(self._model).__name__
            raise InputError(f"a {kind} returns none of {', '.join(CACHES)}, so that it cannot decode token by token")
        self._kept = {name: getattr(out, name)}
        logits: Tensor = out.logits[:, -1]
        return logits


class FixedCache(Cache):
    """A cache whose memory stays where it is from prompt to prompt, and whose tokens the device counts."""

    def on_device(self) -> AbstractContextManager[None]:
        """While it lasts a step asks nothing of the host."""
        return nullcontext()

    def by_host(self) -> bool:
        """Whether the next step is another one than was captured."""
        return False

    def replayed(self) -> None:
        """A step was replayed, of which the host has not seen anything."""


class Graphed:
    """A step is one launch: it was captured with a cache of fixed size, and is replayed.

    cache: with room for what `room` says; None: one in full precision, whose unused places are masked. Raises NoGraph for a model whose
    cache changes shape or place, and where the step cannot be captured."""

    @torch.inference_mode()
    def __init__(self, model: nn.Module, prompt: Tensor, steps: int, cache: FixedCache | None = None) -> None:
        """prompt `[B, P]` int64, and the steps that a generation has."""
        if any(p.device != prompt.device for p in model.parameters()):
            raise NoGraph("its weights are read anew in every forward pass")
        self._model, self._last = model, last_logits(model)
        self._room = room(prompt.shape[1], steps)
        config: Any = model.config
        if (reason := refuses_room(self._room, config.to_dict())) is not None:
            raise NoGraph(reason)
        self._cache = cache or _fixed_cache(model, self._room)
        self._tokens = prompt[:, :1].clone()
        try:
            self.prompt(prompt)
        except (RuntimeError, TypeError, ValueError) as e:
            raise NoGraph(f"it does not run with a cache of fixed size: {_line(e)}") from e
        self._replay, self._logits = captured(self._on_device, prompt.device)

    def prompt(self, tokens: Tensor) -> Tensor:
        self._cache.reset()  # type: ignore[no-untyped-call]
        return self._forward(tokens)

    def step(self, tokens: Tensor) -> Tensor:
        if self._cache.by_host():
            return self._forward(tokens)
        self._tokens.copy_(tokens)
        self._replay()
        self._cache.replayed()
        return self._logits

    def _on_device(self) -> Tensor:
        with self._cache.on_device():
            return self._forward(self._tokens, **self._told())

    def _told(self) -> dict[str, Tensor]:
        config: Any = self._model.config
        if config.model_type not in TOLD_POSITIONS:
            return {}
        at: Any = self._cache.get_seq_length()
        places = torch.ones(len(self._tokens), self._room, dtype=torch.int64, device=self._tokens.device)
        return {"attention_mask": places, "position_ids": at.view(1, 1)}

    def _forward(self, tokens: Tensor, **more: Tensor) -> Tensor:
        out = self._model(input_ids=tokens, use_cache=True, past_key_values=self._cache, **self._last, **more)
        logits: Tensor = out.logits[:, -1]
        return logits


def room(prompt: int, steps: int) -> int:
    """Tokens of a generation, and of what comes before a capture."""
    return prompt + max(steps, WARM + 1)


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def captured(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], Tensor]:
    """What replays `step` on the device, and the tensor that holds its result afterwards. Raises NoGraph.

    The step runs `WARM` times first, the last time with every wait for the device an error: a capture that one breaks is left half
    begun, and torch's random numbers with it."""
    before = torch.cuda.get_sync_debug_mode()
    stream = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        try:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for i in range(WARM):
                    torch.cuda.set_sync_debug_mode("error" if i == WARM - 1 else before)
                    step()
            torch.cuda.set_sync_debug_mode(before)
            torch.cuda.current_stream(device).wait_stream(stream)
            with torch.cuda.graph(graph):
                out = step()
        except RuntimeError as e:
            raise NoGraph(f"it could not be captured: {_line(e)}") from e
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return graph.replay, out


def _fixed_cache(model: nn.Module, length: int) -> FixedCache:
    structure = families.structure_of(model)
    if not structure.cache_argument:
        raise NoGraph(f"a {structure.model_type} model keeps no keys and values")
    return FixedCache(layers=[_FixedLayer(length) for _ in range(structure.count)])


class _FixedLayer(CacheLayerMixin):
    """Room for `length` tokens; how many there are stands on the device, so that a replayed step finds its place.

    transformers' own StaticLayer is the same but for sliding windows, whose places it counts on the host."""

    is_compileable = True
    """Masks are made for all places."""
    is_sliding = False
    """Windows of sliding attention are the mask's affair: all tokens are held."""

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._length = length
        self._held: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (x.new_zeros(*x.shape[:2], self._length, x.shape[3]) for x in (key_states, value_states))
        self._held = torch.zeros((), dtype=torch.int64, device=key_states.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`[B, H, T, D]` of the new tokens ▸ of all places."""
        if self._held is None:
            self.lazy_initialization(key_states, value_states)
        assert self._held is not None
        assert self.keys is not None
        assert self.values is not None
        at = torch.arange(key_states.shape[2], device=key_states.device) + self._held
        self._held.add_(key_states.shape[2])
        return self.keys.index_copy_(2, at, key_states), self.values.index_copy_(2, at, value_states)

    def reset(self) -> None:
        if self._held is not None:
            self._held.zero_()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length, 0

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]  # as of transformers' StaticLayer, which says int
        return 0 if self._held is None else self._held

    def get_max_length(self) -> int:
        return self._length


def _line(e: Exception) -> str:
    return str(e).strip().partition("\n")[0]


def last_logits(model: nn.Module) -> dict[str, int]:
    """The head's product for a whole prompt is thrown away by all who generate."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
