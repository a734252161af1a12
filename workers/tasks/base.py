"""What all tasks share: the model as a function, windows of tokens, per-item rows and the score of a token.

Letters: n windows of T tokens, B windows a batch, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.errors import InputError, NumericalError
from workers.specs import WINDOWS

Logits = Callable[[Sequence[Tensor]], Iterator[Tensor]]
"""Batches of tokens `[B, T]` int64 ▸ their logits `[B, T, V]`, one by one in order. Takes all batches at once, so that a
model that does not fit can walk them block by block."""

Column = list[str] | list[int] | list[float]

CHUNK_BYTES = {"cpu": 2**20, "cuda": 2**26}
"""Bound for one float32 copy of logits, one row at least: on a CPU the passes over it stay in the cache."""


@dataclass(frozen=True)
class Result:
    columns: dict[str, Column]
    """Per item: id, n_tokens, weight and the metrics; equal lengths, items in a fixed order."""
    scores: dict[str, float]
    primary: str

    @property
    def n_items(self) -> int:
        return len(self.columns["id"])

    @property
    def n_tokens(self) -> int:
        return int(sum(int(n) for n in self.columns["n_tokens"]))


def cut(tokens: Tensor, window: int, limit: int | None = None, max_windows: int | None = None, choice: str = "first") -> Tensor:
    """tokens `[L]` ▸ windows `[n, T]` that do not overlap; the last, partial one is dropped (methods of the GPTQ literature).

    `max_windows` shortens the text first. Of what is left `limit` takes the first windows, or, with choice=spread, so many at
    equal distances. Raises InputError when no window is left.
    """
    if choice not in WINDOWS:
        raise InputError(f"task.windows={choice!r}; allowed: {', '.join(WINDOWS)}")
    if window < 2:
        raise InputError(f"task.params.window={window} leaves nothing to predict; it must be at least 2")
    bounds = [b for b in (limit, max_windows) if b is not None]
    if bounds and min(bounds) < 1:
        raise InputError(f"task.params.limit={limit}, max_windows={max_windows}: at least one window is needed; null means all")
    whole = min(tokens.numel() // window, max_windows or tokens.numel())
    count = min(whole, limit or whole)
    if count < 1:
        raise InputError(
            f"the text has {tokens.numel()} tokens, fewer than one window of {window}; give a longer text or lower task.params.window"
        )
    windows = tokens[: whole * window].reshape(whole, window)
    return windows[:count] if choice == "first" else windows[torch.arange(count) * whole // count]


def documents_of(documents: Tensor) -> list[int]:
    """documents `[n, T]`, of every token ▸ of each window `[n]`: the one that most of its scored tokens are of, the first of equals.

    A window counts as one document in statistics. Of all assignments this one leaves the fewest tokens with another's document;
    the document of the first token would take a window for an article's that ends after its first words.
    """
    return [Counter(row).most_common(1)[0][0] for row in documents[:, 1:].tolist()]


def chunks(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """(windows, positions) of logits `[B, T, V]`: all positions with a known next token, a few rows at a time."""
    count, length, vocabulary = logits.shape
    rows = max(1, CHUNK_BYTES.get(logits.device.type, CHUNK_BYTES["cuda"]) // (4 * vocabulary))
    together = max(1, rows // (length - 1))
    for window in range(0, count, together):
        for start in range(0, length - 1, rows):
            yield slice(window, window + together), slice(start, min(start + rows, length - 1))


def log_probs(logits: Tensor) -> Tensor:
    """`[.., V]` of any float type ▸ log-probabilities, float32."""
    return torch.log_softmax(logits.float(), dim=-1)


def next_tokens(batch: Tensor, logits: Tensor) -> Tensor:
    """Tokens `[B, T]` ▸ what logits `[B, T, V]` are to predict, `[B, T-1]` where they are."""
    return batch[:, 1:].to(logits.device)


def picked(values: Tensor, tokens: Tensor) -> Tensor:
    """values `[.., V]` at tokens `[..]`."""
    return values.gather(-1, tokens[..., None])[..., 0]


def check_finite(values: Tensor, first_window: int) -> None:
    """values `[B]` of consecutive windows. Raises NumericalError naming the first that is not finite."""
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        raise NumericalError(
            f"window {first_window + int(bad[0])} scores {float(values[bad[0, 0]])}: the model's logits are not finite; "
            "more bits, smaller groups or model.dtype=float32 help when a variant overflows"
        )


def item_ids(count: int) -> list[str]:
    return [f"w{i:05d}" for i in range(count)]
