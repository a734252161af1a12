"""The per-linear table of a quantize stage, `layers.parquet`, and what the summary takes from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from workers.rounding import LinearResult
from workers.rounding_errors import Errors
from workers.structure import LinearShape

SCHEMA = pa.schema(
    [
        ("module", pa.string()),
        ("block", pa.int32()),
        ("rows", pa.int32()),
        ("cols", pa.int32()),
        ("weight_error", pa.float64()),
        ("output_error", pa.float64()),
        ("bits_nominal", pa.float64()),
        ("bits_stored", pa.float64()),
        ("damp", pa.float64()),
        ("notes", pa.string()),
        ("details", pa.string()),  # JSON: what only this method has to say
        ("seconds", pa.float64()),
    ]
)


class Layers:
    def __init__(self, shapes: Mapping[str, LinearShape]) -> None:
        self._shapes = shapes
        self._rows: list[dict[str, Any]] = []
        self._errors: list[Errors] = []
        """Of the rows, in their order: not read before the end, as a GPU may still be at work on them."""
        self._lack_rank = 0

    def add(self, block: int, results: list[LinearResult], input_bits: Mapping[str, float]) -> None:
        """input_bits: linear ▸ its share of what is stored of its input, in bits per weight."""
        for r in results:
            shape = self._shapes[r.name]
            self._errors.append(r.errors)
            self._lack_rank += r.lacks_rank
            self._rows.append(
                {
                    "module": r.name,
                    "block": block,
                    "rows": shape.rows,
                    "cols": shape.cols,
                    "bits_nominal": float(r.rounded.tensor.bits_nominal),
                    "bits_stored": float(r.rounded.tensor.bits_stored) + input_bits.get(r.name, 0.0),
                    "damp": r.rounded.damp,
                    "notes": "; ".join(r.notes),
                    "details": json.dumps(r.rounded.details, sort_keys=True) if r.rounded.details else "",
                    "seconds": r.seconds,
                }
            )

    def write(self, path: Path) -> None:
        rows = [{**r, "weight_error": w, "output_error": o} for r, w, o in zip(self._rows, *self._found, strict=True)]
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)

    @property
    def _found(self) -> tuple[list[float], list[float | None]]:
        """Errors of weights, and of outputs."""
        return [e.weight for e in self._errors], [e.output for e in self._errors]

    def notes(self) -> Iterator[tuple[str, str]]:
        return ((r["module"], r["notes"]) for r in self._rows if r["notes"])

    def flags(self) -> list[str]:
        """What a reader of scores must know."""
        if not self._lack_rank:
            return []
        return [
            f"{self._lack_rank} of {len(self._rows)} linears saw fewer calibration tokens than they have inputs: their Hessians lack rank, "
            "so that damping decides much, and the last bits of sums, which the number of threads changes, too; give more calibration text"
        ]

    def summary(self) -> dict[str, Any]:
        """bits weighted by weights; errors averaged over linears. None where nothing was quantized."""
        weights = sum(r["rows"] * r["cols"] for r in self._rows)
        weight_errors, found = self._found
        outputs = [o for o in found if o is not None]
        return {
            "n_linears": len(self._rows),
            "bits_nominal": self._weighted("bits_nominal") / weights if weights else None,
            "bits_stored": self._weighted("bits_stored") / weights if weights else None,
            "weight_error": sum(weight_errors) / len(weight_errors) if weight_errors else None,
            "output_error": sum(outputs) / len(outputs) if outputs else None,
        }

    def _weighted(self, column: str) -> float:
        return float(sum(r[column] * r["rows"] * r["cols"] for r in self._rows))
