"""Orderings that papers claim, as pairs of variants of conf/sweep/methods.yaml: the first is said to have the lower perplexity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    better: str
    """`method scheme`, as in the table of variants."""
    worse: str
    source: str


def _same(scheme: str, *orders: tuple[str, str, str]) -> Iterator[Claim]:
    return (Claim(f"{a} {scheme}", f"{b} {scheme}", source) for a, b, source in orders)


GPTQ, HQQ, CLAQ, OMNI, ROUND = "GPTQ 2210.17323", "HQQ (authors' report)", "CLAQ 2405.17233", "OmniQuant 2308.13137", "AutoRound 2309.05516"
KVQUANT, SQUEEZE = "KVQuant 2401.18079", "SqueezeLLM 2306.07629"
SLIM, QUAROT, QLLM, SMOOTH = "SliM-LLM 2405.14917", "QuaRot 2404.00456", "QLLM 2310.08041", "SmoothQuant 2211.10438"
OS_PLUS, QUIK, LLMC, BILLM = "OS+ 2304.09145", "QUIK 2310.09259", "LLMC 2405.06001", "BiLLM 2402.04291"
_SHARP, _OMNI, _ROUND = "quip_sharp[tune_iters=1]", "omniquant[epochs=2]", "learned_rounding[iters=40]"
_LET, _AWQ_OMNI, _SLIM = "omniquant[epochs=2,let=true]", "awq_omniquant[epochs=2]", "slim_llm_plus[epochs=2]"
_QLLM, _CORRECTION, _ROTATION = "qllm[epochs=2]", "qllm_correction[epochs=2]", "learned_rotation[steps=40]"
_AP, _PB_LLM, _ZERO = "claq[adaptive_bits=2.2]", "pb_llm[low_fraction=0.88]", "zeroquant[iters=0]"
_CLIP, _LKD = "clip_gptq[kind=learned]", "zeroquant[iters=10,lr=0.0001]"
_AP_OR = "claq[adaptive_bits=2.2,outlier_reservation=true]"

CLAIMS: tuple[Claim, ...] = (
    *(c for s in ("w4a16_channel", "w3a16_channel", "w2a16_channel") for c in _same(s, ("gptq", "rtn", GPTQ), ("hqq", "rtn", HQQ))),
    *(c for s in ("w4a16_g64", "w3a16_g64", "w2a16_g64") for c in _same(s, ("gptq", "rtn", GPTQ), ("hqq", "rtn", HQQ))),
    *(c for s in ("w4a16_g64", "w3a16_g64") for c in _same(s, ("awq", "rtn", "AWQ 2306.00978"), ("awq", "gptq", "AWQ 2306.00978"))),
    *_same("w3a16_channel", ("owq", "gptq", "OWQ 2306.02272"), ("claq", "gptq", CLAQ), ("gptq[act_order=true]", "gptq", GPTQ)),
    *_same("w3a16_channel", ("gptq_sequential", "gptq", GPTQ), ("squeezellm", "rtn", SQUEEZE), ("squeezellm", "gptq", SQUEEZE)),
    *_same("w4a16_channel", ("claq", "gptq", CLAQ)),
    *_same("w2a16_channel", ("claq_sequential", "claq", CLAQ)),
    Claim("gptq auto[auto.budget=3.28]", "gptq w3a16_g64", "this project"),
    *_same("w2a16_channel", ("claq", "gptq", CLAQ), (_AP_OR, "claq", CLAQ), (_AP, "claq", CLAQ), (_AP_OR, _AP, CLAQ)),
    *_same("w2a16_channel", ("quip", "rtn", "QuIP 2307.13304"), ("quip", "gptq", "QuIP 2307.13304")),
    *_same("w2a16_channel", (_SHARP, "quip", "QuIP# 2402.04396")),
    *_same("w2a16_channel", (_OMNI, "rtn", OMNI), (_OMNI, "gptq", OMNI), (_ROUND, "rtn", ROUND), (_ROUND, "gptq", ROUND)),
    *_same("w2a16_g64", ("slim_llm", "gptq", SLIM), ("slim_llm_corrected", "gptq", SLIM), ("slim_llm", "slim_llm[objective=mse]", SLIM)),
    Claim("slim_llm w2a16_g64", "quip w2a16_channel", SLIM),
    Claim("slim_llm w2a16_g64", f"{_PB_LLM} w1a16_channel", SLIM),
    *_same("w2a16_g64", ("awq_gptq", "gptq", "AWQ 2306.00978")),
    *_same("w2a16_g64", (_CLIP, "clip_gptq", LLMC), (_CLIP, "gptq", LLMC)),
    *_same("w2a16_g64", (_OMNI, "rtn", OMNI), (_OMNI, "gptq", OMNI), (_OMNI, "awq", OMNI)),
    *_same("w2a16_g64", (_SLIM, "slim_llm", SLIM), (_SLIM, _OMNI, SLIM), (_AWQ_OMNI, "awq", LLMC), (_AWQ_OMNI, _OMNI, LLMC)),
    Claim("spqr w3a16_g16", "gptq w4a16_g64", "SpQR 2306.03078"),
    Claim("spqr w3a16_g16", "gptq w3a16_g16", "SpQR 2306.03078"),
    *_same("w1a16_channel", ("billm", _PB_LLM, BILLM), ("billm_joint", "billm", "this project"), ("billm[block_size=32]", "billm", BILLM)),
    Claim("billm w1a16_channel", "gptq w2a16_channel", BILLM),
    Claim("nf4 w4nfa16_g64", "rtn w4a16_g64", "QLoRA 2305.14314"),
    *_same("w8a8_static", ("smoothquant", "rtn", SMOOTH), ("os_plus", "rtn", OS_PLUS), ("os_plus", "smoothquant", OS_PLUS)),
    *_same("w8a8", ("smoothquant", _ZERO, SMOOTH), ("smoothquant", "rtn", SMOOTH)),
    Claim("rtn w8fpa16_channel", "rtn w8a16_channel", "FP8 2208.09225"),
    Claim("rtn w8fpa16_channel", "rtn w8e5m2a16_channel", "FP8 2209.05433"),
    Claim("rtn w4nva16_g16", "rtn w4mxa16_g32", "NVFP4 2509.25149"),
    Claim("rtn w4nva4nv_g16", "rtn w4mxa4mx_g32", "NVFP4 2509.25149"),
    Claim(f"{_ZERO} w4a8_g64", "rtn w4a8_channel", "ZeroQuant 2206.01861"),
    *_same("w4a8_g64", (_LKD, _ZERO, "ZeroQuant 2206.01861")),
    Claim("llm_int8 w8a8_llm_int8", "rtn w8a8", "LLM.int8() 2208.07339"),
    *_same("w4a4_channel", ("smoothquant", "rtn", QUAROT), ("quarot", "smoothquant", QUAROT), ("quarot", "gptq", QUAROT)),
    *_same("w4a4_channel", ("smoothquant_gptq", "smoothquant", "MI-optimize 2406.12928")),
    *_same("w4a4_channel", ("os_plus", "rtn", OS_PLUS), ("os_plus", "smoothquant", OS_PLUS)),
    *_same("w4a4_channel", ("quik", "gptq", QUIK), ("quik", "smoothquant", QUIK), ("quarot", "quik", QUAROT)),
    *_same("w4a4_channel", (_ROTATION, "quarot", "SpinQuant 2405.16406")),
    *_same("w4a4_asym", (_LET, "smoothquant", OMNI), (_QLLM, "smoothquant", QLLM), (_QLLM, _LET, QLLM)),
    *_same("w4a4_asym", (_QLLM, "qllm_reassembly", QLLM), (_QLLM, _CORRECTION, QLLM)),
    Claim("rtn w16a16kv2_kivi", "rtn w16a16kv2", "KIVI 2402.02750"),
    Claim("rtn w16a16kv2_kvquant", "rtn w16a16kv2", KVQUANT),
    Claim("rtn w16a16kv2_kvquant", "rtn w16a16kv2_kivi", KVQUANT),
)
