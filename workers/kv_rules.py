"""Which models a KV scheme works on. Standard library only: planning and workers ask here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant.scheme import KVScheme
from workers.errors import UnsupportedModel
from workers.families import HEAD_WIDTHS, structure

SEPARATE_ROTARY_KEYS = ("gemma", "llama", "mistral", "mixtral", "qwen2")
"""Families whose keys are a linear of their own (`k_proj`), then rotated by halves of a head."""

PACKED_FAMILIES = ("gemma", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "opt", "qwen2")
"""Families whose attention is a function of queries, keys and values alone, which another may stand in for."""
PACKED_WIDTHS, PACKED_GROUPS = (16, 32, 64, 128, 256), (16, 32, 64, 128)
"""Channels of a head, and sizes of KIVI's groups, that `quant.kernels.kv_attention` takes; groups per token are of as many as a head."""
WINDOWS = {"mistral": 4096, "mixtral": None, "qwen2": 4096}
"""Family whose attention has a window ▸ what transformers takes where config.json does not say."""
SWITCHED = ("qwen2",)
"""Those whose window is off unless `use_sliding_window` is set."""
MOST_GROUPS = 8
"""Groups of a head per token that it takes."""


def head_width(config: Mapping[str, Any]) -> int | None:
    """Channels of a head; None where the configuration does not say."""
    stated = config.get("head_dim") or HEAD_WIDTHS.get(str(config.get("model_type")))
    if stated:
        return int(stated)
    hidden = config.get("hidden_size") or config.get("n_embd")
    heads = config.get("num_attention_heads") or config.get("n_head")
    return int(hidden) // int(heads) if hidden and heads else None


def refuses(kv: KVScheme, config: Mapping[str, Any]) -> str | None:
    """Why `kv` cannot be used with the model of `config`; None where it can."""
    try:
        found = structure(config)
    except UnsupportedModel as e:
        return str(e)
    kind = found.model_type
    if not found.cache_argument:
        return f"a {kind} model has no keys and values to quantize"
    width = head_width(config)
    if kv.group_size is not None and width is not None and width % kv.group_size:
        return f"KV group size {kv.group_size} does not divide a head of {width}"
    if kv.kind == "kvquant" and kind not in SEPARATE_ROTARY_KEYS:
        return (
            f"kv.kind=kvquant quantizes keys before the rotary embedding, which is known for {', '.join(SEPARATE_ROTARY_KEYS)}; "
            f"a {kind} model has no rotary embedding or a fused projection"
        )
    if kv.kind == "kivi" and kv.mode == "simulate" and kind not in SEPARATE_ROTARY_KEYS:
        return f"kv.kind=kivi in a single pass works on {', '.join(SEPARATE_ROTARY_KEYS)}; use kv.mode=decode for a {kind} model"
    return None


def not_packed(kv: KVScheme, config: Mapping[str, Any], length: int) -> str | None:
    """Why no kernel attends to a cache of `length` tokens as `kv` stores it; None where one does."""
    if kv.kind == "kvquant":
        return _unread(kv)
    groups = PACKED_GROUPS if kv.kind == "kivi" else PACKED_WIDTHS
    if kv.group_size is not None and kv.group_size not in groups:
        return f"kv.group_size={kv.group_size}: the kernel kv_attention has groups of {', '.join(map(str, groups))} for kv.kind={kv.kind}"
    if not config:  # of a model that is not known before it is fetched
        return None
    kind, width = config.get("model_type"), head_width(config)
    if kind not in PACKED_FAMILIES:
        return f"attention of a {kind} model is not a function that kv_attention could stand in for; it is of {', '.join(PACKED_FAMILIES)}"
    if width not in PACKED_WIDTHS or width % (kv.group_size or width):
        return (
            f"heads of {width} channels in groups of {kv.group_size or width}: the kernel kv_attention has heads of "
            f"{', '.join(map(str, PACKED_WIDTHS))}, which a group must divide"
        )
    if kv.kind == "per_token" and width // (kv.group_size or width) > MOST_GROUPS:
        return (
            f"kv.group_size={kv.group_size}: the kernel kv_attention has at most {MOST_GROUPS} groups to a head, here of {width} channels"
        )
    window = _window(config)
    if window and length > window:
        return f"a token sees {window} tokens at most, and kv_attention reads all {length}: lower workload.prompt or workload.tokens"
    return None


def _window(config: Mapping[str, Any]) -> int | None:
    """Tokens that one sees at most; None where it sees all."""
    kind = str(config.get("model_type"))
    if kind not in WINDOWS or (kind in SWITCHED and not config.get("use_sliding_window")):
        return None
    stated = config.get("sliding_window", WINDOWS[kind])
    return None if stated is None else int(stated)


def _unread(kv: KVScheme) -> str:
    """What a KVQuant cache would need."""
    lacks = ["a rotary embedding of keys as they are decoded (they are stored before it)"]
    if kv.codebook == "nuq":
        lacks.append("levels from a codebook (kv.codebook=nuq; codes are multiplied as they are)")
    if kv.outliers:
        lacks.append(f"values kept beside the codes, in each token another number of them (kv.outliers={kv.outliers:g})")
    if kv.first_few_fp16:
        lacks.append(f"first tokens in full precision (kv.first_few_fp16={kv.first_few_fp16})")
    lacks.append("calibrated ranges of key channels, and ranges of values over all heads of a token (a measure stage has no calibration)")
    return f"kv.kind=kvquant: to read its cache as it is stored, the kernel kv_attention lacks {'; '.join(lacks)}"


def label(kv: KVScheme) -> str:
    """How the cache's effect is measured, for people."""
    if kv.mode == "decode":
        prompt = f" after a prompt of {kv.prefill} tokens" if kv.prefill > 1 else ""
        return f"KV cache read back by teacher-forced decoding{prompt}"
    aged = ", each query position with the cache as old as decoding would show it" if kv.kind == "kivi" else ""
    return f"KV cache simulated in the single forward pass{aged}"
