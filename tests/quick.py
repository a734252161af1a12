"""Parameters that make searches short, for tests of what does not depend on how long they are."""

from __future__ import annotations

from typing import Any

QUICK: dict[str, dict[str, Any]] = {
    "omniquant": {"epochs": 1},
    "learned_rounding": {"iters": 1, "checks": 1},
    "zeroquant": {"iters": 1, "checks": 1},
    "slim_llm_plus": {"epochs": 1},
    "qllm_correction": {"epochs": 1, "blocks": 2},
    "quip_sharp": {"tune_iters": 1},
    "hqq": {"iters": 2},
    "awq": {"scale_grid": 2, "clip_grid": 4},
    "clip": {"steps": 4},
    "clip_output": {"steps": 4},
    "os_plus": {"steps": 2},
    "qllm_reassembly": {"ratio": 0.05},
    "learned_rotation": {"steps": 1, "checked": 1},
}
"""Of roundings, tuners and transforms. What a search holds in memory, stores and refuses stays the same."""
