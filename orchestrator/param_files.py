"""Parameters that are long mappings may be given as the path of a file: bits per linear, or per group of a linear.

    method.rounding.params.layer_bits=bits.yaml            YAML or JSON: linear ▸ value
    method.rounding.params.bit_lists=.../layers.parquet    the table of an earlier quantize stage: its `group_bits`

The content is what counts and what keys digest, not the path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

FILES = {"bit_lists": "group_bits", "layer_bits": None}
"""Parameter ▸ the detail of `layers.parquet` that holds its values."""


def with_files_read(params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` with the content of files in place of their paths. Raises ValueError for files that do not serve."""
    return {n: _read(n, Path(v)) if n in FILES and isinstance(v, str) else v for n, v in params.items()}


def _read(name: str, path: Path) -> dict[str, Any]:
    detail = FILES[name]
    if path.suffix not in (".yaml", ".yml", ".json") and (path.suffix != ".parquet" or detail is None):
        table = f", or layers.parquet of a quantize stage with {detail}" if detail else ""
        raise ValueError(f"{name}={path} is not a file of bits; give YAML or JSON{table}, or a mapping in place of the path")
    try:
        found = _details(path, str(detail)) if path.suffix == ".parquet" else yaml.safe_load(path.read_text())
    except (OSError, ValueError, KeyError, yaml.YAMLError) as e:
        raise ValueError(f"{name}={path} cannot be read: {e}") from e
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{name}={path} must hold a mapping from names of linears, and holds {str(found)[:60]!r}")
    return found


def _details(path: Path, detail: str) -> dict[str, Any]:
    import pyarrow.parquet as pq

    rows = pq.read_table(path, columns=["module", "details"]).to_pylist()
    details = {r["module"]: json.loads(r["details"] or "{}") for r in rows}
    return {module: found[detail] for module, found in details.items() if detail in found}
