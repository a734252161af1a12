"""Channel reassembly in the quantize stage: searched block by block, written into the weights, run before the linears.

Only inputs that a function of several linears or a single linear reads: those of queries, keys and values, of gate and up, and of down.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from quant.accounting import bits_stored
from quant.methods.base import InputTransform
from workers.steps import set_reassembly
from workers.structure import ScaleRule

if TYPE_CHECKING:
    from workers.rounding import BlockQuantizer

GROUPS = ("qkv", "gate_up", "down")
REASSEMBLED = "its input is reassembled at run time"
OTHERS = "its linears are quantized by different methods"


def reassemble(worker: BlockQuantizer, position: int) -> None:
    """What transform number `position` of the methods changes of linears' inputs, if it is one of those that do."""
    for rule in worker.structure.groups:
        if rule.name in GROUPS:
            _group(worker, rule, position)


def _group(worker: BlockQuantizer, rule: ScaleRule, position: int) -> None:
    chosen = [worker.methods.get(n) for n in rule.consumers]
    some = next((m for m in chosen if m is not None and len(m.transforms) > position), None)
    if some is None or not hasattr(some.transforms[position], "reassemble"):
        return
    transform = cast(InputTransform, some.transforms[position])
    reason: str | None = None
    if any(m is None or m.rule.method != some.rule.method for m in chosen):
        reason = OTHERS
    elif rule.consumers[0] in worker.weights.inputs:
        reason = REASSEMBLED
    else:
        reason = _apply(worker, rule, transform, some.scheme)
    if reason is not None:
        worker.leave(transform.name, rule, reason)


def _apply(worker: BlockQuantizer, rule: ScaleRule, transform: InputTransform, scheme: Any) -> str | None:
    from workers.rounding import translated

    sites = worker.structure.sites
    following = None
    if rule.inspect != rule.consumers:
        following = sites[next(i for i, s in enumerate(sites) if rule.consumers[0] in s.linears) + 1].linears[0]
    activation = worker.activation
    if activation is not None and not activation.dynamic:
        activation = replace(activation, dynamic=True)
    group = worker.forward.input_group(rule, following, worker.statistics_of(rule.input), worker.path(""))
    group = replace(group, schemes=worker.schemes(rule))
    with translated(group.name):
        found = transform.reassemble(group, scheme, activation)
    if found.details:
        worker.reassembled.append({"input": group.name, **found.details})
    if found.map is None:
        return found.reason
    worker.worked.add(transform.name)
    worker.weights.reassemble(rule.consumers, found.map)
    for name in rule.consumers:
        set_reassembly(worker.weights.views[name].module, found.map)
    made = found.map
    worker.map_statistics(rule, lambda statistics: statistics.mapped(made.apply))
    worker.weights.write()
    return None


def input_bits(worker: BlockQuantizer) -> dict[str, float]:
    """Linear (full name) ▸ stored bits per weight of what is done to its input, which the linears that read it share by their weights."""
    readers: dict[str, list[str]] = {}
    for name in worker.weights.inputs:
        readers.setdefault(worker.site(name), []).append(name)
    out: dict[str, float] = {}
    for names in readers.values():
        weights = sum(worker.weights.original[n].numel() for n in names)
        bits = bits_stored(worker.weights.inputs[names[0]].pack(), weights)
        out |= {worker.path(n): bits for n in names}
    return out


def input_steps(worker: BlockQuantizer, name: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The recipe's step for the linear `name`, and its tensors, which all linears of the input share."""
    found = worker.weights.inputs.get(name)
    if found is None:
        return [], {}
    prefix = f"{worker.path(worker.site(name))}.input"
    tensors = {f"{prefix}.{k}": t for k, t in found.pack().items()}
    return [{"op": "reassemble", **{k: f"{prefix}.{k}" for k in found.pack()}}], tensors
