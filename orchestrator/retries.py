"""What follows a failed attempt: another one, after how long and with which changes, or none.

| class          | answer |
|----------------|--------|
| infrastructure | again, after an exponentially growing wait with jitter, `Policy.max_retries` times; a lost worker is this class |
| memory         | again, one step down the ladder: half the tokens per pass, a quarter, streamed, alone on the machine |
| corrupt        | the input is set aside and made again first (`Scheduler.recompute`); this stage follows |
| the others     | no: the same input gives the same failure |

A killed worker leaves no exception, and out of memory is its usual cause: from the second loss of a stage on it also steps
down the memory ladder. After a CUDA error every further call in that process fails, so an internal error that names one is
retried as infrastructure, on a fresh worker.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from random import Random

from workers.request import BATCH_TOKENS, ErrorClass, Failure, Hints

LOST_WORKER = "WorkerLost"
"""`Failure.type` of a stage whose worker died."""

_CUDA_ERROR = re.compile(r"CUDA error|CUDA_ERROR|CUBLAS_STATUS|CUDNN_STATUS|device-side assert|illegal memory access", re.IGNORECASE)
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|memory pressure|\bOOM\b", re.IGNORECASE)


@dataclass(frozen=True)
class Policy:
    max_retries: int = 3
    """Attempts after the first, per stage, for infrastructure failures (and as many for corrupt inputs)."""
    backoff_s: float = 1.0
    """Wait before the first retry; doubled each time."""
    backoff_limit_s: float = 60.0
    slack: float = 0.5
    """A ready stage goes first when its longest path is at least (1 - slack) of the time left; see `orchestrator.placement`.
    On a modelled grid of 576 points, 2 to 32 slots, 0.5 stays within 10 % of the bound even with estimates wrong by a factor 3."""


@dataclass(frozen=True)
class Adjustment:
    """How a stage runs after it ran out of memory. Changes hints, never identity."""

    halvings: int = 0
    """Of the tokens per forward pass."""
    streamed: bool = False
    exclusive: bool = False
    """No other request runs meanwhile."""

    def apply(self, hints: Hints) -> Hints:
        batch = hints.batch_tokens
        if self.halvings:
            batch = max(1, (batch or min(BATCH_TOKENS.values())) >> self.halvings)
        return replace(hints, batch_tokens=batch, streamed=hints.streamed or self.streamed)

    def next_step(self, slots: int) -> Adjustment | None:
        """One step down the memory ladder; `None` at its end. With one slot every request is alone already."""
        if self.halvings < 2:
            return replace(self, halvings=self.halvings + 1)
        if not self.streamed:
            return replace(self, streamed=True)
        if not self.exclusive and slots > 1:
            return replace(self, exclusive=True)
        return None


@dataclass
class Tries:
    """What a stage went through in this run."""

    attempt: int = 0
    """Started so many times."""
    retries: int = 0
    """Of these, after infrastructure failures."""
    losses: int = 0
    """Workers lost while it ran."""
    recomputed: int = 0
    """Times a corrupt input was made again for it."""
    adjustment: Adjustment = field(default_factory=Adjustment)


@dataclass(frozen=True)
class Retry:
    delay_s: float
    adjustment: Adjustment
    counted: bool
    """Against `Policy.max_retries`; steps down the memory ladder are bounded by the ladder."""


def worker_lost(reason: str) -> Failure:
    """The failure of a stage whose worker died while it ran."""
    error_class = ErrorClass.MEMORY if _OUT_OF_MEMORY.search(reason) else ErrorClass.INFRASTRUCTURE
    return Failure(error_class, LOST_WORKER, reason)


def poisons_worker(failure: Failure) -> bool:
    """Whether the worker's CUDA context is unusable after this failure. Running out of memory leaves it whole."""
    text = f"{failure.type} {failure.message}"
    return bool(_CUDA_ERROR.search(text)) and not _OUT_OF_MEMORY.search(text)


def decide(tries: Tries, failure: Failure, policy: Policy, slots: int, random: Random) -> Retry | None:
    """The next attempt, or `None`. Corrupt inputs are not decided here: they need the store."""
    error_class = failure.error_class
    if error_class is ErrorClass.INTERNAL and poisons_worker(failure):
        error_class = ErrorClass.INFRASTRUCTURE
    if error_class is ErrorClass.MEMORY:
        step = tries.adjustment.next_step(slots)
        return Retry(0.0, step, counted=False) if step else None
    if error_class is not ErrorClass.INFRASTRUCTURE or tries.retries >= policy.max_retries:
        return None
    adjustment = tries.adjustment
    if failure.type == LOST_WORKER and tries.losses > 1:
        adjustment = adjustment.next_step(slots) or adjustment
    wait = min(policy.backoff_limit_s, policy.backoff_s * 2**tries.retries)
    # Full jitter would allow an immediate retry; half keeps the growth and still spreads simultaneous retries.
    return Retry(wait * (0.5 + 0.5 * random.random()), adjustment, counted=True)
