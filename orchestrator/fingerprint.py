"""Canonical form ▸ key. What bears identity is in the spec and the inputs; nothing else is hashed.

A key is the SHA-256, cut to 32 hexadecimal digits, of the canonical JSON of: hash format, stage kind and version, spec (fields
at their default left out), and the keys of the inputs by role. Method and task versions are fields of the spec. Values
without a stable form (NaN, callables) are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from workers.specs import Spec, StageKind, to_json

HASH_FORMAT = 1
STAGE_VERSIONS = {StageKind.CALIBRATE: 1, StageKind.PREPARE: 1, StageKind.QUANTIZE: 1, StageKind.EVALUATE: 1, StageKind.MEASURE: 8}
"""Raise one when the code of a stage changes its results: all keys of that kind change, and of what depends on them."""


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces. Raises ValueError for NaN and infinity, TypeError for anything not JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def digest(value: Any) -> str:
    """32 hexadecimal digits of a JSON value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:32]


def identity(kind: StageKind, spec: Spec, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Everything a key is made of; stored as spec.json beside the artifact, so that a miss can be explained field by field."""
    return {
        "hash_format": HASH_FORMAT,
        "kind": kind.value,
        "stage_version": STAGE_VERSIONS[kind],
        "spec": to_json(spec),
        "inputs": dict(inputs),
    }


def stage_key(kind: StageKind, spec: Spec, inputs: Mapping[str, str]) -> str:
    return digest(identity(kind, spec, inputs))
