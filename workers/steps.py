"""What a recipe adds to modules for every forward pass: steps on the inputs of linears, norms without scale, rotated keys.

Everything here is kept on the modules themselves, survives blocks that are given up and read again, and may be set twice.
Steps run before activation fake quantization, whose hooks come later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quant.hadamard import apply_hadamard, mix
from quant.reassembly import Reassembly
from workers.blocks import LinearView, input_of, replace_input
from workers.errors import InputError


class Step(NamedTuple):
    """On a linear's input."""

    run: Callable[[Tensor], Tensor]
    tensors: tuple[Tensor, ...] = ()
    """What it keeps, on the device of the linear."""


SLOTS = ("heads", "input", "reassembly")
"""In the order they run: heads_hadamard, then the steps of the linear's own operation, its reassembly while it is being made."""


def mix_heads(x: Tensor, heads: int, block: int) -> Tensor:
    """`[..., heads · D]`: a normalised Hadamard matrix across every `block` consecutive heads, channel by channel."""
    if not block:
        return x
    split = x.reshape(*x.shape[:-1], heads // block, block, -1).transpose(-1, -2)
    return apply_hadamard(split).transpose(-1, -2).reshape(x.shape)


def _gather(step: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Step:
    index, scale = tensors[step["index"]].long(), None if step.get("scale") is None else tensors[step["scale"]]

    def run(x: Tensor) -> Tensor:
        picked = x.index_select(-1, index)
        return picked if scale is None else picked * scale.to(picked)

    return Step(run, (index,) if scale is None else (index, scale))


def _scale(step: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Step:
    scale = tensors[step["scale"]]
    return Step(lambda x: x * scale.to(x), (scale,))


def _hadamard(step: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Step:
    size, block = int(step["size"]), int(step["block"])
    if block < 1 or size % block:
        raise InputError(f"a Hadamard step of size {size} cannot have blocks of {block}; the block must divide the size")

    def run(x: Tensor) -> Tensor:
        if x.shape[-1] != size:
            raise InputError(f"a Hadamard step of size {size} got an input of {x.shape[-1]} channels; the recipe is another model's")
        return mix(x, block)

    return Step(run)


def _rotation(step: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Step:
    matrix = tensors[step["matrix"]]
    return Step(lambda x: x @ matrix.to(x), (matrix,))


def _reassemble(step: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Step:
    made = Reassembly.unpack({k: tensors[step[k]] for k in ("splits", "sources", "destinations")})
    return Step(made.apply, made.held)


STEPS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor]], Step]] = {
    "gather": _gather,
    "scale": _scale,
    "hadamard": _hadamard,
    "rotation": _rotation,
    "reassemble": _reassemble,
}


def set_linear_steps(view: LinearView, steps: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> None:
    """The steps of a linear's operation, but for `activation`, which the run-time parts read. Raises InputError for an expert."""
    device = view.storage.device
    made = [STEPS[s["op"]](s, _named(s, tensors, device)) for s in steps if s["op"] != "activation"]
    if made and view.expert is not None:
        raise InputError(f"{view.name} is one of several experts in a tensor: steps on its input ({steps[0]['op']}) cannot be run")
    if view.expert is None:
        set_steps(view.module, "input", made)


def _named(step: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors that a step names."""
    return {n: tensors[n].to(device) for n in step.values() if isinstance(n, str) and n in tensors}


def set_reassembly(module: nn.Module, made: Reassembly) -> None:
    """After the module's other steps."""
    device: torch.device = next(module.parameters()).device
    made = made if made.splits.device == device else made.to(device)
    set_steps(module, "reassembly", [Step(made.apply, made.held)])


def held(model: nn.Module) -> list[Tensor]:
    """What the steps of a model keep, each once."""
    known = (m.__dict__["input_steps"] for m in model.modules() if "input_steps" in m.__dict__)
    found = (t for of in known for slot in of.slots.values() for step in slot for t in step.tensors)
    return list({t.data_ptr(): t for t in found}.values())


def drop_reassemblies(block: nn.Module) -> None:
    """Of a block that is given up."""
    for module in block.modules():
        known = module.__dict__.get("input_steps")
        if known is not None:
            known.slots.pop("reassembly", None)


def set_steps(module: nn.Module, slot: str, steps: list[Step]) -> None:
    known = module.__dict__.get("input_steps")
    if known is None:
        if not steps:
            return
        known = module.__dict__["input_steps"] = _Steps()
        # Before hooks that look at the linear's input or quantize it, also where a block is read after these were installed.
        module.register_forward_pre_hook(known, with_kwargs=True, prepend=True)
    known.slots[slot] = steps


class _Steps:
    """A forward pre-hook that runs the module's steps."""

    def __init__(self) -> None:
        self.slots: dict[str, list[Step]] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = input_of(args, kwargs)
        for slot in SLOTS:
            for step in self.slots.get(slot, ()):
                x = step.run(x)
        return replace_input(args, kwargs, x)


def set_rms_norm(module: Any, eps: float) -> None:
    """The norm becomes x / sqrt(mean(x²) + eps) with weight 1 and bias 0: computed in float32, in float64 for float64."""

    def forward(hidden_states: Tensor) -> Tensor:
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(hidden_states.dtype)
        return x if module.weight is None else x * module.weight

    with torch.no_grad():
        for parameter, value in (("weight", 1.0), ("bias", 0.0)):
            if getattr(module, parameter, None) is not None:
                getattr(module, parameter).fill_(value)
    module.__dict__["forward"] = forward


def set_key_rotation(attention: nn.Module, block: int) -> None:
    attention.__dict__["key_hadamard"] = block


def key_rotation(attention: nn.Module) -> int:
    """Channels of a head that one Hadamard matrix mixes before keys are quantized; 0 for none."""
    return int(attention.__dict__.get("key_hadamard", 0))


def write_bias(module: Any, bias: Tensor) -> None:
    """Copy `[N]` into the module's bias, which is made where there is none (or only its place, of a block that was given up)."""
    with torch.no_grad():
        if getattr(module, "bias", None) is None or module.bias.is_meta:
            module.bias = nn.Parameter(bias.to(module.weight).clone(), requires_grad=False)
        else:
            module.bias.copy_(bias)


def untie_head(model: Any, head: str) -> None:
    """Give the head a copy of the weight that it shares with the embedding."""
    module = model.get_submodule(head)
    module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    # Or what counts and ties weights later would still take the two for one tensor.
    ties = model.all_tied_weights_keys
    model.all_tied_weights_keys = {k: v for k, v in ties.items() if f"{head}.weight" not in (k, v)}
