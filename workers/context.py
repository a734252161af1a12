"""What a running stage is given besides its spec: locations, hints, device, and where it leaves notes and timings."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from workers.kept import Kept
from workers.request import BATCH_TOKENS, Hints, Location
from workers.specs import ModelSpec, TextSpec


@dataclass
class Context:
    models: Mapping[str, Location]
    texts: Mapping[str, Location]
    hints: Hints
    device: torch.device
    notes: list[str] = field(default_factory=list)
    """Every fallback and departure, in words; goes into the record."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time per phase: load, forward, search, round, write, ..."""
    toolkits: Mapping[str, str] = field(default_factory=dict)
    """Toolkit ▸ folder of its environment."""
    kept: Kept | None = None
    """Statistics and factors that the process keeps between stages."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def batch_tokens(self) -> int:
        """Tokens per forward pass."""
        return self.hints.batch_tokens or BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cuda"])

    def model_location(self, model: ModelSpec) -> Location:
        return self.models[model.digest]

    def text_location(self, text: TextSpec) -> Location:
        return self.texts[text.digest]
