"""Views on linears inside modules: weight `[N, K]` whatever the storage (Linear, transposed Conv1D, one expert of a 3-D
tensor), how to write it back, and taps on the inputs of linears."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from workers.errors import NumericalError
from workers.structure import Structure

T = TypeVar("T")
Tap = Callable[[str, Tensor, Tensor | None], Tensor]
"""(name of the linear, its input `[..., K]`, index of each row among the batch's tokens or None where rows are all of them)
▸ the input to use."""


@dataclass(frozen=True)
class LinearView:
    """One linear of a block."""

    name: str
    module: nn.Module
    parameter: str
    expert: int | None = None
    transposed: bool = False

    @property
    def storage(self) -> Tensor:
        """The tensor that holds the weight: `[N, K]`, `[K, N]` or, of an expert, its slice."""
        tensor: Tensor = getattr(self.module, self.parameter)
        return tensor if self.expert is None else tensor[self.expert]

    def weight(self) -> Tensor:
        """`[N, K]`, sharing memory with the module's parameter."""
        w = self.storage.detach()
        return w.T if self.transposed else w

    @property
    def bias(self) -> Tensor | None:
        """`[N]`; experts have none."""
        return None if self.expert is not None else getattr(self.module, "bias", None)

    def write(self, weight: Tensor) -> None:
        """Copy `[N, K]` into the parameter, in its own dtype."""
        if weight.shape != self.weight().shape:
            raise ValueError(f"{self.name}: weight of shape {tuple(weight.shape)} given for {tuple(self.weight().shape)}")
        with torch.no_grad():
            self.weight().copy_(weight)

    def write_bias(self, bias: Tensor) -> None:
        """Copy `[N]` into the module's bias, in its own dtype. Raises ValueError where it has none."""
        if self.bias is None:
            raise ValueError(f"{self.name} has no bias")
        with torch.no_grad():
            self.bias.copy_(bias)


def linear_view(root: nn.Module, name: str) -> LinearView:
    """The linear at module path `name` below `root`; `<...>.gate_up_proj.3` is expert 3 of a 3-D parameter."""
    parent, _, last = name.rpartition(".")
    if last.isdigit():
        owner, _, parameter = parent.rpartition(".")
        module = root.get_submodule(owner)
        tensor = getattr(module, parameter, None)
        if isinstance(tensor, nn.Parameter) and tensor.ndim == 3:
            return LinearView(name, module, parameter, expert=int(last))
    module = root.get_submodule(name)
    if isinstance(module, Conv1D):
        return LinearView(name, module, "weight", transposed=True)
    if isinstance(module, nn.Linear):
        return LinearView(name, module, "weight")
    raise TypeError(f"{name} is a {type(module).__name__}, not a linear")


def check_held(tensor: Tensor | None, name: str, done: str) -> None:
    """Raises NumericalError where the model's dtype cannot hold what was written. done: to the values, before."""
    if tensor is not None and not bool(torch.isfinite(tensor).all()):
        raise NumericalError(f"{name}, {done}, is not finite in {tensor.dtype}; use model.dtype=bfloat16 or float32")


class Once:
    """What was made of an input, for as long as the same one is given: linears that share an input read the same tensor object."""

    def __init__(self) -> None:
        self._given: tuple[object, ...] = ()
        self._made: Any = None

    def of(self, make: Callable[[], T], *given: object) -> T:
        """given: the objects that what is made depends on."""
        if len(given) != len(self._given) or any(a is not b for a, b in zip(given, self._given, strict=True)):
            self._given, self._made = given, make()
        made: T = self._made
        return made

    def forget(self) -> None:
        self._given, self._made = (), None


class Taps:
    """Handle of installed taps; as a context, it removes them at its end."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def add(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()


def tap_inputs(root: nn.Module, names: Iterable[str], tap: Tap) -> Taps:
    """Call `tap` on the input of every named linear or module below `root`, and use what it returns.

    Linears inside 3-D expert tensors have no module of their own; the forward of their owner is replaced by `expert_forward`.
    """
    taps = Taps()
    experts: dict[nn.Module, dict[tuple[str, int], str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        owner, _, parameter = parent.rpartition(".")
        holder = _submodule(root, owner) if last.isdigit() else None
        if holder is not None and isinstance(getattr(holder, parameter, None), nn.Parameter):
            experts.setdefault(holder, {})[parameter, int(last)] = name
        else:
            taps.add(root.get_submodule(name).register_forward_pre_hook(_pre_hook(name, tap), with_kwargs=True).remove)
    for holder, known in experts.items():
        _replace_forward(holder, _tapped_experts(holder, known, tap), taps)
    return taps


def _submodule(root: nn.Module, name: str) -> nn.Module | None:
    try:
        return root.get_submodule(name)
    except AttributeError:
        return None


def _pre_hook(name: str, tap: Tap) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return replace_input(args, kwargs, tap(name, input_of(args, kwargs), None))

    return hook


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among a module's arguments."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def replace_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with x in the place of the hidden states."""
    return ((x, *args[1:]), dict(kwargs)) if args else ((), {**kwargs, "hidden_states": x})


def _replace_forward(module: nn.Module, forward: Callable[..., Tensor], taps: Taps) -> None:
    before = module.__dict__.get("forward")

    def undo() -> None:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before

    module.__dict__["forward"] = forward
    taps.add(undo)


def _tapped_experts(module: Any, names: Mapping[tuple[str, int], str], tap: Tap) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def product(parameter: str, expert: int, x: Tensor, tokens: Tensor) -> Tensor:
        name = names.get((parameter, expert))
        return F.linear(x if name is None else tap(name, x, tokens), getattr(module, parameter)[expert])

    return partial(expert_forward, module, product)


def expert_forward(
    module: Any,
    product: Callable[[str, int, Tensor, Tensor], Tensor],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Gated feed-forward of 3-D expert tensors, expert by expert. product: parameter, expert, its input and the numbers of these
    tokens ▸ the linear's output.

    hidden_states `[tokens, K]`, top_k_index and top_k_weights `[tokens, k]`; returns `[tokens, K]`. Same operations in the
    same order as the library's own eager experts, so that products which are its own change no bit.
    """
    out, flat = torch.zeros_like(hidden_states), top_k_index.T.reshape(-1)
    # The host reads numbers of tokens once, not each expert's.
    each = torch.split(flat.argsort(stable=True), flat.bincount(minlength=len(module.gate_up_proj)).tolist())
    for e, places in enumerate(each[: len(module.gate_up_proj)]):
        if len(places) == 0:
            continue
        slot, token = places // len(top_k_index), places % len(top_k_index)
        gate, up = product("gate_up_proj", e, hidden_states[token], token).chunk(2, dim=-1)
        y = product("down_proj", e, module.act_fn(gate) * up, token) * top_k_weights[token, slot, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out


def decoder_blocks(model: nn.Module, structure: Structure) -> nn.ModuleList:
    """Of the whole model."""
    found = model.get_submodule(structure.blocks)
    assert isinstance(found, nn.ModuleList)
    return found


@contextmanager
def replaced_forward(modules: Iterable[nn.Module], forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """For the time of the context, module number i runs `forward(i)` instead of its own forward."""
    with Taps() as taps:
        for i, module in enumerate(modules):
            _replace_forward(module, forward(i), taps)
        yield
