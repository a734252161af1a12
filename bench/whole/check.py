"""What a run is checked by before it is timed: plain float64 arithmetic on its files and text, beside round to nearest.

The input of the first layer's query projection does not depend on anything quantized: it is the embedding of the text, divided by its root
mean square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from torch import Tensor

from bench.on_gpu.clock import worst
from bench.whole.stages import Made, text_of
from quant.methods import rounding
from quant.methods.base import Linear
from quant.scheme import WeightScheme
from quant.statistics import Statistics
from workers import datasets
from workers.recipe import Recipe
from workers.request import Location
from workers.specs import QuantizeSpec

LAYER = "model.layers.0."
QUERY = LAYER + "self_attn.q_proj"
ALLOWED = 2.0**-7
"""Of recorded errors against those computed here. The stage feeds inputs, and compares weights, in bfloat16: an error of 2⁻⁹ in each
of two factors, twice in a square."""
EPSILON = 1e-5
"""Of the model's norms."""


def tokens_of(spec: QuantizeSpec, model: Path) -> Tensor:
    """`[S, T]`, of the stage's own text."""
    assert spec.calibration is not None
    tokenizer = datasets.load_tokenizer(Location("folder", str(model)))
    return datasets.calibration_tokens(text_of(model), spec.calibration, tokenizer).to(torch.long)


def weight_of(model: Path, name: str, device: torch.device) -> Tensor:
    """float64."""
    file = "outer.safetensors" if not name.startswith(LAYER) else "layer_000.safetensors"
    with safe_open(model / file, framework="pt") as tensors:
        found: Tensor = tensors.get_tensor(f"{name}.weight").to(device).double()
    return found


class Yardstick:
    """Output errors tr(E H Eᵀ) / tr(W H Wᵀ) of the query projection."""

    def __init__(self, tokens: Tensor, model: Path, scheme: WeightScheme, device: torch.device) -> None:
        embedding = weight_of(model, "model.embed_tokens", device)
        self.weight = weight_of(model, QUERY, device)
        k = self.weight.shape[1]
        self._hessian = torch.zeros(k, k, dtype=torch.float64, device=device)
        for part in torch.split(tokens.flatten().to(device), 16384):
            x = embedding[part]
            x = x / (x.square().mean(1, keepdim=True) + EPSILON).sqrt()
            self._hessian.addmm_(x.T, x)
        self._size = self._form(self.weight)
        method = rounding("rtn", {})
        self.rtn: float | None = None
        """Of round to nearest in the same format, of one bit signs times the mean size of their row; None where it has none of that."""
        if scheme.bits == 1:
            self.rtn = self.error(self.weight.sign() * self.weight.abs().mean(1, keepdim=True))
        elif method.supports.refuses("rtn", scheme, "llama") is None:
            nearest = method.quantize(self.weight.float(), Statistics(), scheme, Linear(QUERY, 0)).tensor.dequantize()
            self.rtn = self.error(nearest)

    def _form(self, e: Tensor) -> float:
        return float(((e @ self._hessian) * e).sum())

    def error(self, stored: Tensor) -> float:
        return self._form(stored.to(self.weight) - self.weight) / self._size


@dataclass(frozen=True)
class Checked:
    error: float
    """The largest share by which a recorded error of the first layer differs from the one computed here; infinite where the method does
    not beat round to nearest in the same format."""
    output_error: float | None
    rtn: float | None

    def __str__(self) -> str:
        said = f"recorded errors within {self.error:.1e} of those from the files (allowed {ALLOWED:.1e})"
        if self.output_error is None:
            return said
        beside = "" if self.rtn is None else f", round to nearest {self.rtn:.4f}"
        return f"{said}; output error of the first query projection {self.output_error:.4f}{beside}"


def check(made: Made, model: Path, spec: QuantizeSpec, yardstick: Yardstick | None, device: torch.device) -> Checked:
    """yardstick: None where the method reads no text."""
    recipe = Recipe(made.folder)
    rows: dict[str, dict[str, Any]] = {r["module"]: r for r in pq.read_table(made.folder / "payload" / "layers.parquet").to_pylist()}
    found: list[float] = []
    ours: float | None = None
    for op in recipe.replaced():
        if not op["module"].startswith(LAYER):
            continue
        row, stored = rows[op["module"]], recipe.stored(op, device).dequantize().double()
        weight = weight_of(model, op["module"], device)
        found.append(_apart(row["weight_error"], float((stored - weight).norm() / weight.norm())))
        if op["module"] == QUERY and yardstick is not None:
            ours = yardstick.error(stored)
            found.append(_apart(row["output_error"], ours))
            if yardstick.rtn is not None and not ours < yardstick.rtn:
                found.append(math.inf)
    return Checked(worst(*found) if found else math.inf, ours, None if yardstick is None else yardstick.rtn)


def _apart(recorded: float, computed: float) -> float:
    return abs(recorded / computed - 1)
