"""Methods by name, and how a method's transforms and rounding go together by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quant.methods.awq import Awq
from quant.methods.gptq import Gptq
from quant.methods.hqq import Hqq
from quant.methods.quip import Quip
from quant.methods.quip_sharp import QuipSharp
from quant.methods.rtn import Rtn
from quant.methods.slim_llm import SlimLlm
from quant.methods.smoothquant import SmoothQuant
from quant.methods.spqr import Spqr

ROUNDINGS: dict[str, type[Rtn] | type[Gptq] | type[Hqq] | type[Quip] | type[QuipSharp] | type[SlimLlm] | type[Spqr]] = {
    "rtn": Rtn,
    "gptq": Gptq,
    "hqq": Hqq,
    "quip": Quip,
    "quip_sharp": QuipSharp,
    "slim_llm": SlimLlm,
    "spqr": Spqr,
}
TRANSFORMS: dict[str, type[Awq] | type[SmoothQuant]] = {"awq": Awq, "smoothquant": SmoothQuant}


@dataclass(frozen=True)
class Recipe:
    """A method as `quantize_linear` and `conf/method/` know it: only parameters that differ from the classes' defaults."""

    rounding: str
    rounding_params: Mapping[str, Any] = field(default_factory=dict)
    transforms: tuple[str, ...] = ()


METHODS: dict[str, Recipe] = {
    "rtn": Recipe("rtn"),
    "gptq": Recipe("gptq"),
    "hqq": Recipe("hqq"),
    "quip": Recipe("quip"),
    "quip_sharp": Recipe("quip_sharp"),
    "awq": Recipe("rtn", {"grid": "awq_asym"}, ("awq",)),
    "smoothquant": Recipe("rtn", {"grid": "absmax"}, ("smoothquant",)),
    "owq": Recipe("gptq", {"outlier_columns": 4}),
    "quik": Recipe("gptq", {"outlier_columns": 16, "outlier_metric": "quik"}),
    "slim_llm": Recipe("slim_llm"),
    "slim_llm_corrected": Recipe("slim_llm", {"variant": "corrected"}),
    "spqr": Recipe("spqr"),
}
