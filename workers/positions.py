"""How long a window a model takes. Standard library only: planning and workers ask here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = ("max_position_embeddings", "n_positions")
"""Keys of config.json, the one of most families and GPT-2's."""
DEFAULTS = {
    "falcon": 2048,
    "gemma": 8192,
    "gpt2": 1024,
    "gpt_neox": 2048,
    "llama": 2048,
    "mistral": 131_072,
    "mixtral": 131_072,
    "opt": 2048,
    "qwen2": 32_768,
}
"""Family ▸ what transformers takes where config.json does not say."""
UNLIMITED = ("bloom", "rwkv")
"""Families without positions: scores biased by distance (ALiBi, as in some Falcon models too), or a recurrence."""
LEARNED = ("gpt2", "opt")
"""Families with an embedding per position, which has no value for a later one. Others can go on, if badly."""


def positions(config: Mapping[str, Any]) -> int | None:
    """Of the model that `config` (config.json) describes; None where there is no limit, or none is known."""
    kind = config.get("model_type")
    if kind in UNLIMITED or config.get("alibi"):
        return None
    stated = next((config[n] for n in NAMES if n in config), DEFAULTS.get(str(kind)))
    return None if stated is None else int(stated)


def _learned(config: Mapping[str, Any]) -> int | None:
    """Positions beyond which nothing can be fed; None where a model can go on."""
    return positions(config) if config.get("model_type") in LEARNED else None


def refuses_window(window: int, config: Mapping[str, Any]) -> str | None:
    """Why a task cannot score windows of so many tokens; None where it can."""
    limit = positions(config)
    if limit is None or window <= limit:
        return None
    return f"task.params.window={window} is above the model's {limit} positions; use {limit} or less"


def refuses_calibration(length: int, config: Mapping[str, Any]) -> str | None:
    """Why samples of so many tokens cannot be fed; None where they can, also where that is beyond positions that are not learned."""
    limit = _learned(config)
    if limit is None or length <= limit:
        return None
    return f"calibration.sequence_length={length} is above the model's {limit} learned positions; use {limit} or less"


def refuses_room(tokens: int, config: Mapping[str, Any]) -> str | None:
    """Why no step is captured whose cache takes so many tokens; None where one can be. Steps before a capture may go on beyond the last
    token that is timed, where a device that reads an embedding that is not there takes no further work."""
    limit = _learned(config)
    if limit is None or tokens <= limit:
        return None
    return f"steps before a capture come to {tokens} tokens, above the model's {limit} learned positions"
