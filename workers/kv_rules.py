"""Which models a KV scheme works on. Standard library only: planning and workers ask here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant.scheme import KVScheme
from workers.errors import UnsupportedModel
from workers.families import structure

SEPARATE_ROTARY_KEYS = ("gemma", "llama", "mistral", "mixtral", "qwen2")
"""Families whose keys are a linear of their own (`k_proj`), then rotated by halves of a head."""


def head_width(config: Mapping[str, Any]) -> int | None:
    """Channels of a head; None where the configuration does not say."""
    if config.get("head_dim"):
        return int(config["head_dim"])
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
    return None


def label(kv: KVScheme) -> str:
    """How the cache's effect is measured, for people."""
    if kv.mode == "decode":
        prompt = f" after a prompt of {kv.prefill} tokens" if kv.prefill > 1 else ""
        return f"KV cache read back by teacher-forced decoding{prompt}"
    aged = ", each query position with the cache as old as decoding would show it" if kv.kind == "kivi" else ""
    return f"KV cache simulated in the single forward pass{aged}"
