"""A stage: a node of the plan's graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from workers.specs import CalibrateSpec, Spec, StageKind


class Status(str, Enum):
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    CACHED = "CACHED"
    FAILED = "FAILED"
    DEP_FAILED = "DEP_FAILED"
    CANCELLED = "CANCELLED"

    @property
    def finished(self) -> bool:
        return self not in (Status.PENDING, Status.RUNNING)


@dataclass(frozen=True)
class Resources:
    """What a stage needs to run. Never identity."""

    seconds: float = 1.0
    """Estimated."""
    output_bytes: int = 0
    """Estimated size of the artifact."""
    uncertainty: float = 1.0
    """Time and size are likely between `estimate / uncertainty` and `estimate * uncertainty`; 1 where history tells them, infinite where
    not even the model's size is known."""


@dataclass(frozen=True)
class Stage:
    key: str
    kind: StageKind
    spec: Spec
    label: str
    """For people: `quantize wikitext_llama gptq w4a16_g64`."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Role ▸ key of the stage that produces it."""
    resources: Resources = Resources()

    @property
    def model(self) -> str:
        """Digest of the model it works on."""
        return self.spec.model.digest

    @property
    def exclusive(self) -> bool:
        """Whether nothing else may run beside it: what it times would be wrong."""
        return self.kind is StageKind.MEASURE

    @property
    def affinity(self) -> tuple[str, ...]:
        """What a worker that already holds it runs this stage faster, best first: the quantized variant, then the model."""
        variant = self.inputs.get("quantize")
        return (variant, self.model) if variant else (self.model,)

    @property
    def share_group(self) -> tuple[str, ...] | None:
        """Ready stages with the same value go into one request: all statistics of one model and calibration set."""
        return (self.model, repr(self.spec.calibration)) if isinstance(self.spec, CalibrateSpec) else None
