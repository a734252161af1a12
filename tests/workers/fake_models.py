"""Language models for tests of tasks: a table of logits, and a builder that counts what it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from quant.scheme import ActivationScheme, KVScheme
from workers.context import Context
from workers.request import Hints, Location
from workers.specs import ModelSpec
from workers.tasks.base import Logits


class TableModel(nn.Module):
    """Logits of the next token are a row of a table, chosen by the current token."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)  # [V, V]
        self.noise = 0.0

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids] + self.noise * torch.cos(self.table[input_ids]))


def table_model(seed: int = 0, vocabulary: int = 11) -> TableModel:
    return TableModel(3 * torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)))


def logits_of(model: nn.Module) -> Logits:
    def logits(batches: Sequence[Tensor]) -> Iterator[Tensor]:
        return (model(input_ids=b, use_cache=False).logits for b in batches)

    return logits


def given_logits(values: Tensor) -> Logits:
    """The same hand-made logits `[n, T, V]` whatever the tokens are."""

    def logits(batches: Sequence[Tensor]) -> Iterator[Tensor]:
        start = 0
        for batch in batches:
            yield values[start : start + len(batch)]
            start += len(batch)

    return logits


class Handle:
    def __init__(self, remove: Callable[[], None]) -> None:
        self.remove = remove


class CountingBuilder:
    """A `workers.residency.Builder` of table models; run-time parts add noise while attached."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.rebuilt: list[str] = []

    def load_model(self, context: Context, model: ModelSpec) -> TableModel:
        self.loaded.append(model.digest)
        return table_model()

    def rebuild(self, context: Context, model: ModelSpec, artifact: Path) -> TableModel:
        self.rebuilt.append(artifact.name)
        return table_model(seed=1)

    def attach_runtime(self, model: nn.Module, artifact: Path | None, activation: ActivationScheme | None, kv: KVScheme | None) -> Handle:
        assert isinstance(model, TableModel)
        assert model.noise == 0.0, "attached twice"
        model.noise = 0.5

        def remove() -> None:
            model.noise = 0.0

        return Handle(remove)


def bare_context(**hints: object) -> Context:
    """No texts; every model digest that the tests use."""
    models = {name: Location("folder", "nowhere") for name in ("m", "other")}
    return Context(models=models, texts={}, hints=Hints(**hints), device=torch.device("cpu"))  # type: ignore[arg-type]
