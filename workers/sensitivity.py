"""How much the model's predictions change when one linear alone is quantized: the table behind `scheme=auto`.

For every linear l and candidate width: the mean KL divergence (nats per token) of the next-token distribution of the model with only
l quantized, from the unquantized model's, on the first sequences of the calibration set. Inputs: one quantize artifact per
candidate. Only the blocks from l's on are run again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from quant.accounting import size_bytes
from workers import knapsack
from workers.artifact import payload_path
from workers.blocks import linear_view
from workers.calibrate import calibration_tokens
from workers.context import Context
from workers.datasets import batches
from workers.errors import InputError, NumericalError
from workers.memory import PeakMemory
from workers.recipe import Recipe
from workers.specs import AutoBits, PrepareSpec, QuantizeSpec, Rule
from workers.stream import BlockModel, open_blocks
from workers.tasks.base import log_probs
from workers.tasks.divergence import compare

KIND = "sensitivity"
VERSION = 1
TABLE = "sensitivity.parquet"


@dataclass(frozen=True)
class Params:
    sequences: int = 8
    """Of the calibration set, the first ones."""


def run(spec: PrepareSpec, inputs: Mapping[str, Path], payload: Path, context: Context) -> dict[str, Any]:
    """Writes the table; returns the summary. Raises InputError."""
    params = Params(**dict(spec.params))
    if spec.calibration is None or not inputs:
        raise InputError("a sensitivity table needs a calibration set and one quantize artifact per candidate width")
    peak = PeakMemory(context.device, context.kept)
    model = open_blocks(context, spec.model)
    recipes = {name: Recipe(path) for name, path in inputs.items()}
    for name, recipe in recipes.items():
        if any(op["op"] not in ("replace_linear", "keep") or op.get("input") for op in recipe.operations):
            raise InputError(f"candidate {name} changes more than its linears; automatic bits work with methods without transforms")
    tokens = calibration_tokens(context, model, spec.calibration)[: params.sequences]
    with context.phase("read"):
        for b in range(model.structure.count):
            model.load(b)
    with context.phase("forward"), torch.no_grad():
        rows = _Walk(model, batches(tokens, context.batch_tokens)).table(recipes)
    with context.phase("write"):
        pq.write_table(pa.Table.from_pylist(rows), payload / TABLE)
    return {
        "linears": len(rows) // len(recipes),
        "candidates": sorted(recipes),
        "tokens": tokens.numel(),
        "peak_memory_bytes": peak.bytes(),
    }


class _Walk:
    def __init__(self, model: BlockModel, work: list[Tensor]) -> None:
        self._model, self._work = model, work
        prepared = model.prepare(work)
        self._hidden, self._calls = prepared.hidden, prepared.calls
        self._reference = [log_probs(self._logits(0, i)[:, :-1]) for i in range(len(work))]

    def table(self, recipes: Mapping[str, Recipe]) -> list[dict[str, Any]]:
        rows = []
        by_block: dict[int, list[tuple[str, dict[str, Any]]]] = {}
        prefix = self._model.structure.blocks + "."
        for name, recipe in recipes.items():
            for op in recipe.replaced():
                by_block.setdefault(int(op["module"].removeprefix(prefix).split(".")[0]), []).append((name, op))
        for b in range(self._model.structure.count):
            for name, op in by_block.get(b, []):
                rows.append({"module": op["module"], "candidate": name, **self._measure(b, recipes[name], op)})
            self._hidden = [self._run(b, i, h) for i, h in enumerate(self._hidden)]
        return rows

    def _measure(self, b: int, recipe: Recipe, op: dict[str, Any]) -> dict[str, Any]:
        stored, view = recipe.stored(op, self._model.device), linear_view(self._model.model, op["module"])
        before = view.weight().clone()
        view.write(stored.dequantize())
        total = tokens = 0.0
        for i, batch in enumerate(self._work):
            kl = compare(self._reference[i], self._logits(b, i), batch).kl.double()
            total, tokens = total + float(kl.sum()), tokens + kl.numel()
        view.write(before)
        return {"loss": total / tokens, "bytes": size_bytes(*stored.pack().values()), "weights": before.numel()}

    def _run(self, b: int, i: int, hidden: Tensor) -> Tensor:
        return self._calls[i][b].run(self._model.blocks[b], hidden)

    def _logits(self, start: int, i: int) -> Tensor:
        hidden = self._hidden[i]
        for b in range(start, self._model.structure.count):
            hidden = self._run(b, i, hidden)
        return self._model.logits(self._work[i], hidden)


def with_chosen_bits(spec: QuantizeSpec, auto: AutoBits, artifact: Path) -> tuple[QuantizeSpec, dict[str, Any]]:
    """The spec with one rule per linear, of the widths that lose least within the budget; and what was chosen, for the record.

    Raises InputError where the budget is below the smallest widths, NumericalError where a loss is not finite."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for row in pq.read_table(payload_path(artifact, TABLE)).to_pylist():
        table.setdefault(row["module"], {})[row["candidate"]] = row
    names = [auto.role(i) for i in range(len(auto.candidates))]
    for module, rows in table.items():
        for name, candidate in zip(names, auto.candidates, strict=True):
            if not math.isfinite(rows[name]["loss"]):
                raise NumericalError(
                    f"{module} alone at {candidate.bits} bits makes the model's predictions not finite (loss {rows[name]['loss']}); leave "
                    f"{candidate.bits} out of scheme.auto.bits, or use model.dtype=bfloat16 or float32"
                )
    weights = sum(rows[names[0]]["weights"] for rows in table.values())
    losses = [[rows[n]["loss"] for n in names] for rows in table.values()]
    sizes = [[rows[n]["bytes"] for n in names] for rows in table.values()]
    try:
        picks = knapsack.choose(losses, sizes, int(auto.budget * weights / 8))
    except ValueError as e:
        least = 8 * sum(min(s) for s in sizes) / weights
        raise InputError(
            f"scheme.auto.budget={auto.budget} stored bits per weight: the smallest widths take {least:.6g}; give at least "
            f"{math.floor(1000 * least + 1) / 1000:.3f}, or smaller ones in scheme.auto.bits"
        ) from e
    (base,) = spec.rules
    rules = tuple(Rule(module, base.method, auto.candidates[p]) for module, p in zip(table, picks, strict=True))
    chosen = {module: auto.candidates[p].bits for module, p in zip(table, picks, strict=True)}
    stored = 8 * sum(s[p] for s, p in zip(sizes, picks, strict=True)) / weights
    expected = sum(x[p] for x, p in zip(losses, picks, strict=True))
    return replace(spec, rules=rules, auto=None), {"bits": chosen, "bits_stored": stored, "sum_of_losses": expected}


def note_budget(context: Context, budget: float, planned: float, stored: float) -> None:
    """Says so where the linears, quantized together, take more than the budget: sizes may depend on what came before a linear."""
    if stored > budget * (1 + 1e-9):
        context.notes.append(
            f"automatic bits are above their budget: {stored:.4f} stored bits per weight, scheme.auto.budget={budget}; by the sizes in "
            f"the sensitivity table, of linears quantized with one width for all, they would be {planned:.4f}: give a lower budget"
        )
