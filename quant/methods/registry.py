"""Methods by name, and how a method's transforms and its rounding or tuner go together by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quant.methods.awq import Awq
from quant.methods.billm import Billm
from quant.methods.claq import Claq
from quant.methods.clip import Clip, ClipOutput
from quant.methods.gptq import Gptq
from quant.methods.hqq import Hqq
from quant.methods.learned_rotation import LearnedRotation
from quant.methods.learned_rounding import LearnedRounding
from quant.methods.llm_int8 import LlmInt8
from quant.methods.nf4 import Nf4
from quant.methods.omniquant import OmniQuant
from quant.methods.os_plus import OsPlus
from quant.methods.pb_llm import PbLlm
from quant.methods.qllm import QllmReassembly
from quant.methods.qllm_correction import QllmCorrection
from quant.methods.quarot import Quarot
from quant.methods.quip import Quip
from quant.methods.quip_sharp import QuipSharp
from quant.methods.rtn import Rtn
from quant.methods.slim_llm import SlimLlm
from quant.methods.slim_llm_plus import SlimLlmPlus
from quant.methods.smoothquant import SmoothQuant
from quant.methods.spqr import Spqr
from quant.methods.squeezellm import SqueezeLlm
from quant.methods.toolkits import AutoRound, HqqPackage, LlmCompressor
from quant.methods.zeroquant import ZeroQuant

ROUNDINGS: dict[str, type[Any]] = {
    c.name: c for c in (Rtn, Gptq, Claq, SlimLlm, Spqr, LlmInt8, Nf4, Hqq, Billm, PbLlm, Quip, QuipSharp, SqueezeLlm)
}
TRANSFORMS: dict[str, type[Any]] = {c.name: c for c in (Awq, SmoothQuant, QllmReassembly, OsPlus, Clip, ClipOutput)}
MODEL_TRANSFORMS: dict[str, type[Any]] = {c.name: c for c in (Quarot, LearnedRotation)}
"""Transforms of a whole model: the first of a method's transforms, if any."""
TUNERS: dict[str, type[Any]] = {c.name: c for c in (OmniQuant, LearnedRounding, QllmCorrection, SlimLlmPlus, ZeroQuant)}
ROUNDERS = {**ROUNDINGS, **TUNERS}
"""All that a method's `rounding` may name, but for those of toolkits."""
TOOLKIT_METHODS: dict[str, type[Any]] = {c.name: c for c in (HqqPackage, LlmCompressor, AutoRound)}
"""Carried out by other toolkits, for a whole model: in `conf/method/`, but nothing that one linear could be given to."""


@dataclass(frozen=True)
class Recipe:
    """A method as `quantize_linear` and `conf/method/` know it: only parameters that differ from the classes' defaults."""

    rounding: str
    """Of ROUNDERS."""
    rounding_params: Mapping[str, Any] = field(default_factory=dict)
    transforms: tuple[str, ...] = ()


METHODS: dict[str, Recipe] = {
    "rtn": Recipe("rtn"),
    "gptq": Recipe("gptq"),
    "claq": Recipe("claq"),
    "claq_batched": Recipe("claq", {"codebooks": "batched"}),
    "awq": Recipe("rtn", {"grid": "awq_asym"}, ("awq",)),
    "smoothquant": Recipe("rtn", {"grid": "absmax"}, ("smoothquant",)),
    "awq_gptq": Recipe("gptq", {"grid": "awq_asym"}, ("awq",)),
    "smoothquant_gptq": Recipe("gptq", transforms=("smoothquant",)),
    "clip_gptq": Recipe("gptq", transforms=("clip",)),
    "hqq": Recipe("hqq"),
    "billm": Recipe("billm"),
    "billm_joint": Recipe("billm", {"variant": "joint"}),
    "pb_llm": Recipe("pb_llm"),
    "quip": Recipe("quip"),
    "quip_sharp": Recipe("quip_sharp"),
    "owq": Recipe("gptq", {"outlier_columns": 4}),
    "quik": Recipe("gptq", {"outlier_columns": 16, "outlier_metric": "quik"}),
    "slim_llm": Recipe("slim_llm"),
    "slim_llm_corrected": Recipe("slim_llm", {"variant": "corrected"}),
    "spqr": Recipe("spqr"),
    "squeezellm": Recipe("squeezellm"),
    "omniquant": Recipe("omniquant"),
    "learned_rounding": Recipe("learned_rounding"),
    "slim_llm_plus": Recipe("slim_llm_plus"),
    "awq_omniquant": Recipe("omniquant", transforms=("awq",)),
    "qllm_correction": Recipe("qllm_correction"),
    "llm_int8": Recipe("llm_int8"),
    "nf4": Recipe("nf4"),
    "os_plus": Recipe("rtn", {"grid": "absmax"}, ("os_plus",)),
    "zeroquant": Recipe("zeroquant"),
}

MODEL_METHODS: dict[str, Recipe] = {
    "quarot": Recipe("gptq", {"grid": "q_sym"}, ("quarot",)),
    "learned_rotation": Recipe("gptq", {"grid": "q_sym"}, ("learned_rotation",)),
    "qllm": Recipe("qllm_correction", transforms=("qllm_reassembly",)),
    "qllm_reassembly": Recipe("rtn", {"grid": "omni"}, ("qllm_reassembly",)),
}
"""Methods that rewrite a whole model, or what its linears read at run time: in `conf/method/`, but nothing that one linear could be
given to."""
