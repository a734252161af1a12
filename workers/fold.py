"""The weights of one block while it is being quantized: as given, as scaled, and how both relate.

A scale s of a group multiplies the columns of its consumers and divides the output of its producer:
a norm's weight and bias, or the last s.numel() output rows and biases of a linear. Exact in real arithmetic; computed in
float32 (float64 for float64 models).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quant.reassembly import Reassembly
from workers.blocks import LinearView, check_held, linear_view
from workers.structure import ScaleRule, Structure

FOLDED = "with its scales folded in"


class BlockWeights:
    """Names are relative to the block; weights are `[N, K]`."""

    def __init__(self, block: nn.Module, structure: Structure) -> None:
        self._block = block
        self._structure = structure
        self.views: dict[str, LinearView] = {n: linear_view(block, n) for n in structure.linear_names()}
        self.original: dict[str, Tensor] = {n: wide(v.weight()) for n, v in self.views.items()}
        self.current: dict[str, Tensor] = dict(self.original)
        """Scaled, rewritten or dequantized; replaced, never changed in place."""
        self.columns: dict[str, Tensor] = {}
        """Linear ▸ product of all scales of its input `[K]`, where there are any."""
        self.rows: dict[str, Tensor] = {}
        """Linear ▸ product of all factors of its output rows `[N]`, where there are any."""
        self.biases: dict[str, Tensor] = {}
        """Linear ▸ changed bias `[N]`."""
        self.inputs: dict[str, Reassembly] = {}
        """Linear ▸ what is done to its input at run time, after which its columns are scaled no more."""
        self.norms: dict[str, dict[str, Tensor]] = {}
        """Norm ▸ its changed parameters, as stored in the module."""
        self.routers: dict[str, Tensor] = {}
        """Router ▸ changed weight."""

    def scale(self, rule: ScaleRule, s: Tensor) -> None:
        """Divide the group's shared input by s `[K]` > 0 and multiply its consumers' columns."""
        for name in rule.consumers:
            w = self.current[name]
            factor = s.to(w)
            self.current[name] = w * factor
            self.columns[name] = self.columns.get(name, torch.ones_like(factor)) * factor
        for name in rule.routers:
            w = self.router(name)
            self.routers[name] = w * s.to(w)
        if rule.producer is None:
            raise ValueError(f"group {rule.name} has no producer to divide by the scale")
        if rule.producer_kind == "norm":
            self._divide_norm(rule.producer, s)
        else:
            self._divide_rows(rule.producer, s)

    def reassemble(self, names: tuple[str, ...], made: Reassembly) -> None:
        """The linears read `made.apply` of the input that they share."""
        for name in names:
            if name in self.inputs:
                raise ValueError(f"the input of {name} is reassembled already")
            self.current[name] = made.weight(self.current[name])
            self.inputs[name] = made

    def no_shift(self, rule: ScaleRule) -> str | None:
        """Why the group's input cannot be shifted; None where it can."""
        if rule.producer is None or rule.producer_kind != "norm":
            return "its input does not come from a norm"
        if getattr(self._module(rule.producer), "bias", None) is None:
            return "its norm has no bias"
        if rule.routers or any(self.views[n].bias is None for n in rule.consumers):
            return "a linear that reads it has no bias"
        return None

    def shift(self, rule: ScaleRule, z: Tensor) -> None:
        """Subtract z `[K]` from the group's shared input: the norm's bias loses it, the consumers' biases gain W z."""
        reason = self.no_shift(rule)
        if reason is not None or rule.producer is None:
            raise ValueError(f"group {rule.name} cannot be shifted: {reason}")
        for name in rule.consumers:
            w, bias = self.current[name], self.biases.get(name, self.views[name].bias)
            assert bias is not None
            self.biases[name] = wide(bias) + (w.double() @ z.to(w).double()).to(w)
        values = self._norm(rule.producer)
        self.norms[rule.producer] = {**values, "bias": values["bias"] - z.to(values["bias"])}

    def _norm(self, name: str) -> dict[str, Tensor]:
        return self.norms.get(name) or {k: wide(p) for k, p in self._module(name).named_parameters(recurse=False)}

    def router(self, name: str) -> Tensor:
        """The router's weight `[*, K]` as it is now."""
        return self.routers[name] if name in self.routers else wide(self._module(name).weight)

    def _divide_norm(self, name: str, s: Tensor) -> None:
        values = self._norm(name)
        offset = self._structure.norm_offset
        divided = {k: v / s.to(v) for k, v in values.items() if k != "weight"}
        weight = values["weight"]
        self.norms[name] = {"weight": (weight + offset) / s.to(weight) - offset, **divided}

    def _divide_rows(self, name: str, s: Tensor) -> None:
        w = self.current[name]
        factor = torch.ones(w.shape[0], dtype=w.dtype, device=w.device)
        factor[-s.numel() :] = 1 / s.to(w)
        self.current[name] = w * factor[:, None]
        self.rows[name] = self.rows.get(name, torch.ones_like(factor)) * factor
        bias = self.views[name].bias
        if bias is not None:
            self.biases[name] = self.biases.get(name, wide(bias)) * factor

    def unscaled(self, name: str, weight: Tensor) -> Tensor:
        """A weight of `name` in the scaled block ▸ what it stands for in the original one."""
        out = weight
        if name in self.rows:
            out = out / self.rows[name][:, None].to(out)
        if name in self.inputs:
            out = self.inputs[name].read_as(out)
        return out / self.columns[name].to(out) if name in self.columns else out

    def scaled_original(self, name: str) -> Tensor:
        """The original weight with all scales applied, without rewrites or rounding."""
        out = self.original[name]
        if name in self.columns:
            out = out * self.columns[name]
        if name in self.inputs:
            out = self.inputs[name].weight(out)
        return out * self.rows[name][:, None] if name in self.rows else out

    def write(self) -> None:
        """Put the current weights, biases, norms and routers into the block's modules, in their dtypes.

        Raises NumericalError for a value that the dtype cannot hold."""
        for name, view in self.views.items():
            if self.current[name] is not self.original[name]:
                view.write(self.current[name])
                check_held(view.storage, f"{name}.weight", FOLDED)
        for name, bias in self.biases.items():
            self.views[name].write_bias(bias)
            check_held(self.views[name].bias, f"{name}.bias", FOLDED)
        with torch.no_grad():
            for name, values in self.norms.items():
                for k, v in values.items():
                    check_held(getattr(self._module(name), k).copy_(v), f"{name}.{k}", FOLDED)
            for name, weight in self.routers.items():
                check_held(self._module(name).weight.copy_(weight), f"{name}.weight", FOLDED)

    def _module(self, name: str) -> Any:
        return self._block.get_submodule(name)


def wide(t: Tensor) -> Tensor:
    """A contiguous copy in float32, or float64 where the tensor is."""
    return t.detach().to(torch.promote_types(t.dtype, torch.float32), copy=True).contiguous()
