"""Methods by name, and how a method's transforms and rounding go together by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quant.methods.awq import Awq
from quant.methods.gptq import Gptq
from quant.methods.learned_rotation import LearnedRotation
from quant.methods.quarot import Quarot
from quant.methods.rtn import Rtn
from quant.methods.smoothquant import SmoothQuant

ROUNDINGS: dict[str, type[Rtn] | type[Gptq]] = {"rtn": Rtn, "gptq": Gptq}
TRANSFORMS: dict[str, type[Awq] | type[SmoothQuant]] = {"awq": Awq, "smoothquant": SmoothQuant}
MODEL_TRANSFORMS: dict[str, type[Quarot] | type[LearnedRotation]] = {"quarot": Quarot, "learned_rotation": LearnedRotation}
"""Transforms of a whole model: the first of a method's transforms, if any."""


@dataclass(frozen=True)
class Recipe:
    """A method as `quantize_linear` and `conf/method/` know it: only parameters that differ from the classes' defaults."""

    rounding: str
    rounding_params: Mapping[str, Any] = field(default_factory=dict)
    transforms: tuple[str, ...] = ()


METHODS: dict[str, Recipe] = {
    "rtn": Recipe("rtn"),
    "gptq": Recipe("gptq"),
    "awq": Recipe("rtn", {"grid": "awq_asym"}, ("awq",)),
    "smoothquant": Recipe("rtn", {"grid": "absmax"}, ("smoothquant",)),
}

MODEL_METHODS: dict[str, Recipe] = {
    "quarot": Recipe("gptq", {"grid": "q_sym"}, ("quarot",)),
    "learned_rotation": Recipe("gptq", {"grid": "q_sym"}, ("learned_rotation",)),
}
"""Methods that rewrite a whole model: in `conf/method/`, but nothing that one linear could be given to."""
