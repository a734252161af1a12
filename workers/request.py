"""What crosses between driver and worker: a request of one or more stages, and one outcome per stage.

Plain JSON, standard library only. A worker writes a stage's files into the request's `staging` folder and returns a draft
record; the driver alone commits (renames) into the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

FORMAT = 1
BATCH_TOKENS = {"cpu": 1024, "cuda": 4096}
"""On a CPU activations of 1024 tokens stay in the cache: a forward of a small model takes 10 to 15 % less than with 4096."""


class ErrorClass(str, Enum):
    """How the driver answers a failure."""

    INFRASTRUCTURE = "infrastructure"
    """Worker, node or storage trouble: retried with backoff."""
    MEMORY = "memory"
    """Out of memory: retried down the ladder of hints."""
    NUMERICAL = "numerical"
    """NaN, a Hessian that no damping repairs: not retried."""
    USER = "user"
    """Wrong input: not retried."""
    CORRUPT = "corrupt"
    """An input artifact's digest differs: set aside, its stage runs again."""
    DISK_FULL = "disk_full"
    """No space left while writing: not retried, nothing lost."""
    INTERNAL = "internal"
    """Any other exception: not retried."""
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Input:
    key: str
    path: str
    """Folder of the committed artifact (holds record.json and payload/)."""


@dataclass(frozen=True)
class StageRequest:
    key: str
    kind: str
    spec: dict[str, Any]
    """`workers.specs.to_json` of the spec."""
    inputs: dict[str, Input]
    """Role ▸ artifact: a statistic's name for quantize; quantize, reference for evaluate."""
    staging: str
    """Existing empty folder for payload/ and log.txt."""
    attempt: int = 1


@dataclass(frozen=True)
class Location:
    """Where content with a known digest is found on this machine."""

    kind: str
    """folder, file, hub_model, hub_dataset."""
    path: str
    """Folder or file; the repository id for hub kinds."""
    revision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """hub_dataset: config, split, data_files."""


BACKENDS = ("auto", "cpu", "cuda", "triton", "torch", "reference")
"""Of `quant.kernels`. Tested against its table."""


@dataclass(frozen=True)
class Hints:
    """How to run. Never identity."""

    device: str = "auto"
    threads: int | None = None
    batch_tokens: int | None = None
    """Tokens per forward pass; None for what suits the device (`BATCH_TOKENS`)."""
    memory_bytes: int | None = None
    """Memory a stage may use for weights; models above it are streamed block by block."""
    streamed: bool = False
    reference_bytes: int = 512 * 2**20
    """Budget for stored reference log-probabilities (divergence); above it both models are walked side by side."""
    quantized_cache: int = 1
    """Quantized models a worker keeps resident beside the unquantized one."""
    kept_bytes: int | None = None
    """Budget of a worker for statistics and factors of Hessians that it keeps between stages, on its device; 0 keeps none, None is a
    quarter of what is free on a host, half on a GPU (`workers.kept`)."""
    backend: str = "auto"
    """Of kernels, one of BACKENDS: operations that have it use it or fail. Not of what measure times, which its spec names."""
    kept_host_bytes: int | None = None
    """Budget of a GPU's worker for what of these has no room on it, in the host's memory; 0 keeps none there, None is a quarter of what
    is free."""


@dataclass(frozen=True)
class Request:
    id: str
    stages: tuple[StageRequest, ...]
    models: dict[str, Location]
    """Model digest ▸ location."""
    texts: dict[str, Location]
    """Text digest ▸ location."""
    hints: Hints = Hints()
    toolkits: dict[str, str] = field(default_factory=dict)
    """Toolkit ▸ folder of its environment, the same on every machine; only those that the stages use."""

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Request:
        if data.get("format") != FORMAT:
            raise ValueError(f"request format {data.get('format')!r} is not {FORMAT}; driver and worker must be the same version")
        stages = tuple(StageRequest(**{**s, "inputs": {role: Input(**i) for role, i in s["inputs"].items()}}) for s in data["stages"])
        return Request(
            id=data["id"],
            stages=stages,
            models={k: Location(**v) for k, v in data["models"].items()},
            texts={k: Location(**v) for k, v in data["texts"].items()},
            hints=Hints(**data["hints"]),
            toolkits=dict(data.get("toolkits", {})),
        )


@dataclass(frozen=True)
class Failure:
    error_class: ErrorClass
    type: str
    """Exception class name."""
    message: str
    log_tail: str = ""
    corrupt_key: str | None = None
    """The artifact to set aside, when the class is corrupt."""


@dataclass(frozen=True)
class Outcome:
    """What became of one stage of a request."""

    key: str
    record: dict[str, Any] | None = None
    """Draft record on success: started, ended (epoch seconds), seconds {phase: s}, environment, hints, notes [str],
    summary {kind-specific, JSON}. The driver adds key, kind, spec, inputs and file digests when committing."""
    failure: Failure | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Outcome:
        failure = data.get("failure")
        if failure is not None:
            failure = Failure(**{**failure, "error_class": ErrorClass(failure["error_class"])})
        return Outcome(key=data["key"], record=data.get("record"), failure=failure)
