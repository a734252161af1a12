"""GPTQ with ranges of groups taken from the weights as given (static) or as updated by the columns before them (dynamic), on real weights.

    python -m bench.grids [--draws 2] [--windows 64] [--threads 2] [--out FILE]

The shipped model in groups of 64 with 4, 3 and 2 bits, columns in the plain order and by decreasing diagonal of the Hessian. Statistics are
the unquantized model's, so that both see the same Hessian: the loss tr(E H Eᵀ) / tr(W H Wᵀ) is the mean over linears and draws of
calibration text. The difference of nats per token (dynamic less static, above 0: static is better) is paired by windows of held-out text,
each averaged over draws; its interval is of 95 % and knows of the windows alone.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from bench.kept import keep
from bench.whole.stages import committed
from quant.methods.registry import ROUNDINGS
from quant.scheme import Granularity, WeightScheme
from workers.artifact import PAYLOAD
from workers.request import Hints, Location
from workers.specs import (
    CalibrateSpec,
    CalibrationSpec,
    Component,
    EvaluateSpec,
    MethodSpec,
    ModelSpec,
    QuantizeSpec,
    Rule,
    TaskSpec,
    TextSpec,
)
from workers.specs import StageKind as Kind

BITS, GROUP = (4, 3, 2), 64
ASSETS = files("workers.assets")
MODEL, TEXTS = ModelSpec("model"), {n: Location("file", str(ASSETS / "self_text" / f"{n}.jsonl")) for n in ("calibration", "evaluation")}


@dataclass
class Ranges:
    """Of one kind of ranges: a value a draw."""

    losses: list[float] = field(default_factory=list)
    nats: list[Any] = field(default_factory=list)
    """`[n]`, per window."""
    bits: float = 0


class Runs:
    def __init__(self, store: Path, windows: int, threads: int) -> None:
        self._store, self._hints = store, Hints(device="cpu", threads=threads)
        self._model = Path(str(ASSETS / "wikitext_llama"))
        self._task = TaskSpec("perplexity", 1, TextSpec("evaluation", field="text"), (("limit", windows), ("window", 256)))

    def calibrated(self, draw: int) -> Path:
        spec = CalibrationSpec(TextSpec("calibration", field="text"), 64, 256, draw)
        folder: Path = self._made(Kind.CALIBRATE, CalibrateSpec(MODEL, spec, "hessian"), {}).folder
        return folder

    def scored(self, made: Path | None) -> Any:
        """Nats per token of each window."""
        folder = self._made(Kind.EVALUATE, EvaluateSpec(MODEL, self._task), {} if made is None else {"quantize": made}).folder
        return pq.read_table(folder / PAYLOAD / "items.parquet").column("nll").to_numpy()

    def add(self, to: Ranges, hessian: Path, bits: int, static: bool, act_order: bool) -> None:
        component = Component("gptq", ROUNDINGS["gptq"].version, (("act_order", act_order), ("static_groups", static)))
        rule = Rule("*", MethodSpec(component), WeightScheme(bits, granularity=Granularity.GROUP, group_size=GROUP))
        made = self._made(Kind.QUANTIZE, QuantizeSpec(MODEL, (rule,)), {"hessian": hessian})
        to.losses.append(made.record["summary"]["output_error"])
        to.bits = made.record["summary"]["bits_stored"]
        to.nats.append(self.scored(made.folder))

    def _made(self, kind: Kind, spec: Any, inputs: dict[str, Path]) -> Any:
        return committed(kind, spec, inputs, self._model, TEXTS, self._store, self._hints)


def compared(static: Ranges, dynamic: Ranges) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name, ranges in (("static", static), ("dynamic", dynamic)):
        nats = float(np.mean(ranges.nats))
        told[name] = {"loss": float(np.mean(ranges.losses)), "perplexity": math.exp(nats), "bits_stored": ranges.bits}
    difference = np.mean(dynamic.nats, 0) - np.mean(static.nats, 0)
    half = 1.96 * float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return told | {"nats": float(difference.mean()), "nats_half": half, "loss_ratio": told["dynamic"]["loss"] / told["static"]["loss"]}


def rows(runs: Runs, draws: int) -> Iterator[dict[str, Any]]:
    hessians = [runs.calibrated(draw) for draw in range(draws)]
    for bits, act_order in product(BITS, (False, True)):
        both = {True: Ranges(), False: Ranges()}
        for (static, to), hessian in product(both.items(), hessians):
            runs.add(to, hessian, bits, static, act_order)
        yield {"bits": bits, "act_order": act_order, **compared(both[True], both[False])}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.grids", description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=2, help="of calibration text")
    parser.add_argument("--windows", type=int, default=64, help="of 256 tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bitgrid-grids-") as store:
        runs = Runs(Path(store), given.windows, given.threads)
        unquantized = math.exp(float(np.mean(runs.scored(None))))
        print(f"perplexity of the unquantized model {unquantized:.3f}", flush=True)
        about = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "draws": given.draws, "windows": given.windows}
        report: dict[str, Any] = about | {"unquantized_perplexity": unquantized, "rows": []}
        for row in rows(runs, given.draws):
            report["rows"].append(row)
            keep(given.out, report)
            pair = ", ".join(f"{n} {row[n]['loss']:.5f} / {row[n]['perplexity']:.3f}" for n in ("static", "dynamic"))
            order = "act-order" if row["act_order"] else "plain order"
            verdict = f"dynamic - static {row['nats']:+.5f} ± {row['nats_half']:.5f} nats, loss x {row['loss_ratio']:.3f}"
            print(f"{row['bits']} bits, {order}: loss / perplexity {pair}; {verdict}", flush=True)


if __name__ == "__main__":
    main()
