"""Methods by name, and how a method's transforms and its rounding or tuner go together by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quant.methods.awq import Awq
from quant.methods.gptq import Gptq
from quant.methods.learned_rounding import LearnedRounding
from quant.methods.omniquant import OmniQuant
from quant.methods.rtn import Rtn
from quant.methods.smoothquant import SmoothQuant

ROUNDINGS: dict[str, type[Rtn] | type[Gptq]] = {"rtn": Rtn, "gptq": Gptq}
TRANSFORMS: dict[str, type[Awq] | type[SmoothQuant]] = {"awq": Awq, "smoothquant": SmoothQuant}
TUNERS: dict[str, type[OmniQuant] | type[LearnedRounding]] = {"omniquant": OmniQuant, "learned_rounding": LearnedRounding}


@dataclass(frozen=True)
class Recipe:
    """A method as `quantize_linear` and `conf/method/` know it: only parameters that differ from the classes' defaults."""

    rounding: str
    """Of ROUNDINGS or TUNERS."""
    rounding_params: Mapping[str, Any] = field(default_factory=dict)
    transforms: tuple[str, ...] = ()


METHODS: dict[str, Recipe] = {
    "rtn": Recipe("rtn"),
    "gptq": Recipe("gptq"),
    "awq": Recipe("rtn", {"grid": "awq_asym"}, ("awq",)),
    "smoothquant": Recipe("rtn", {"grid": "absmax"}, ("smoothquant",)),
    "omniquant": Recipe("omniquant"),
    "learned_rounding": Recipe("learned_rounding"),
    "awq_omniquant": Recipe("omniquant", transforms=("awq",)),
}
