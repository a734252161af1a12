"""The evidence table: what every method stores and loses, and which orderings of the papers these models show.

    python -m bench.evidence --store STORE [--sweep methods] [--out bench/results]

Reads a sweep of conf/sweep/methods.yaml, as far as it has come, and writes evidence.md, evidence.csv and, window by window, evidence-
items.parquet. It is evidence, not a gate. Per variant: bits as the paper counts them, as stored, and as the same format takes at 4096 x
4096; NLL minus the unquantized model's on the same windows, and KL against it, with intervals over articles and draws. Per ordering that
a paper claims: the difference of NLL, and of KL as the more sensitive measure, with verdicts after Holm's correction over all rows.
Statistics: bench/evidence_stats.py; orderings: bench/evidence_claims.py.
"""

from __future__ import annotations

import argparse
import csv
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.evidence_bits import LARGE, bits_at
from bench.evidence_claims import CLAIMS, Claim
from bench.evidence_stats import BLOCK, BLOCKS, Effect, Floats, adjusted, clusters, difference, effect
from orchestrator.results import StageResult, SweepResult, VariantResult
from orchestrator.stage import Status
from orchestrator.stats import FEWEST_DOCUMENTS
from orchestrator.store import Store
from orchestrator.sweeps import find_sweep, load_sweep
from workers.recipe import Recipe

Key = tuple[str, str]
"""Model, and `method scheme`."""


@dataclass
class Row:
    """A variant over its calibration draws."""

    nominal: list[float] = field(default_factory=list)
    stored: list[float] = field(default_factory=list)
    large: list[float] = field(default_factory=list)
    cache: list[float] = field(default_factory=list)
    """Bits a value of a whole window's KV cache."""
    nll: dict[str, Floats] = field(default_factory=dict)
    """Draw ▸ `[n]`, minus the unquantized model's."""
    kl: dict[str, Floats] = field(default_factory=dict)
    documents: Floats | None = None
    """`[n]`: of which document each window is; None where no evaluation tells."""

    def values(self, metric: str, draws: Collection[str] | None = None) -> Floats:
        """`[R, n]`, draws in order of their names; of all draws, or of those given."""
        kept: dict[str, Floats] = getattr(self, metric)
        return np.stack([kept[draw] for draw in sorted(kept) if draws is None or draw in draws])


@dataclass(frozen=True)
class Verdict:
    model: str
    claim: Claim
    bits: tuple[float, float]
    """Stored bits of both: of weights, or of the cache where only that is quantized."""
    nll: Effect
    kl: Effect


def short(method: str) -> str:
    """`gptq[rounding.params.damp=0.1]` ▸ `gptq[damp=0.1]`; parameters of transforms likewise."""
    return re.sub(r"(rounding|transforms\.\w+)\.params\.", "", method)


def name_of(variant: VariantResult) -> str:
    return f"{short(variant.axes['method'])} {variant.axes['scheme']}"


def items(stage: StageResult) -> dict[str, Floats]:
    """Columns of an evaluation, in the order of the text; `document` where its items tell."""
    assert stage.payload is not None
    table = pq.read_table(stage.payload / "items.parquet")
    table = table.select([n for n in table.column_names if n in ("weight", "nll", "kl", "document")])
    columns = {name: table.column(name).to_numpy().astype(np.float64) for name in table.column_names}
    if np.ptp(columns["weight"]) > 0:
        raise SystemExit(f"{stage.label}: windows of different weights; the table takes windows of one length")
    return columns


def large_bits(artifact: Path) -> float:
    """Bits at 4096 x 4096, averaged over linears by their weights."""
    recipe = Recipe(artifact)
    tensors = [recipe.stored(op) for op in recipe.replaced()]
    return float(np.average([bits_at(t, *LARGE) for t in tensors], weights=[np.prod(t.shape) for t in tensors]))


def collect(result: SweepResult) -> tuple[dict[Key, Row], list[str]]:
    """Rows of the variants whose draws have all been evaluated, and what keeps the others out."""
    by_key = {v.key: v for v in result.variants}
    rows: dict[Key, Row] = {}
    missing: dict[Key, dict[str, list[str]]] = {}
    for variant in result.variants:
        if variant.is_baseline:
            continue
        key, draw = (variant.axes["model"], name_of(variant)), variant.axes["replicate"]
        task, stage = next(iter(variant.evaluations.items()))
        base = by_key[variant.baseline_key].evaluations[task]
        if variant.status is not Status.SUCCEEDED or base.payload is None:
            failed = next((s.failure for s in (variant.quantize, stage, base) if s is not None and s.failure), None)
            missing.setdefault(key, {}).setdefault(variant.status.value if failed is None else failed["message"], []).append(draw)
            continue
        row = rows.setdefault(key, Row())
        ours, theirs = items(stage), items(base)
        row.nll[draw], row.kl[draw] = ours["nll"] - theirs["nll"], ours["kl"]
        row.documents = ours.get("document", theirs.get("document"))
        cache = stage.summary.get("kv") or {}
        if cache.get("bits_stored") is not None:
            row.cache.append(cache["bits_stored"])
        quantize = variant.quantize
        if quantize is not None and quantize.payload is not None and quantize.summary.get("bits_stored") is not None:
            row.nominal.append(quantize.summary["bits_nominal"])
            row.stored.append(quantize.summary["bits_stored"])
            row.large.append(large_bits(quantize.payload.parent))
    reasons = [f"{model} {name}: {', '.join(d)} {why}" for (model, name), by in missing.items() for why, d in by.items()]
    return {key: row for key, row in rows.items() if key not in missing}, reasons


def judge(rows: Mapping[Key, Row], claims: Sequence[Claim] = CLAIMS) -> tuple[list[Verdict], list[str]]:
    """A verdict for every claim and model that has both variants, and the claims that no model has."""
    pairs = [
        (model, claim, rows[model, claim.better], rows[model, claim.worse])
        for claim in claims
        for model in dict.fromkeys(m for m, _ in rows)
        if {(model, claim.better), (model, claim.worse)} <= rows.keys()
    ]
    effects = {m: adjusted([effect(_paired(a, b, m), _documents(a, b)) for *_, a, b in pairs]) for m in ("nll", "kl")}
    found = [
        Verdict(model, claim, (_mean(a.stored or a.cache), _mean(b.stored or b.cache)), nll, kl)
        for (model, claim, a, b), nll, kl in zip(pairs, effects["nll"], effects["kl"], strict=True)
    ]
    judged = {v.claim for v in found}
    return found, [f"{c.better} < {c.worse}" for c in claims if c not in judged]


def _paired(a: Row, b: Row, metric: str) -> Floats:
    """Differences over the draws that both have; one without draws stands for all of the other's."""
    both = a.nll.keys() & b.nll.keys() if min(len(a.nll), len(b.nll)) > 1 else None
    return difference(a.values(metric, both), b.values(metric, both))


def _documents(a: Row, b: Row) -> Floats | None:
    return b.documents if a.documents is None else a.documents


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _bits(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"


def _interval(e: Effect) -> str:
    digits = 4 if abs(e.mean) < 0.1 else 3 if abs(e.mean) < 1 else 2
    return f"{e.mean:+.{digits}f} [{e.low:+.{digits}f}, {e.high:+.{digits}f}]"


def variant_lines(rows: Mapping[Key, Row], model: str) -> list[str]:
    lines = [
        "| variant | draws | bits nominal | bits stored | at 4096² | KV stored | ΔNLL, nats per token | KL, nats per token |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    mine = {name: row for (m, name), row in rows.items() if m == model}
    for name, row in sorted(mine.items(), key=lambda x: (x[0].split()[1], row_mean(x[1]))):
        nll, kl = effect(row.values("nll"), row.documents), effect(row.values("kl"), row.documents)
        bits = " | ".join(_bits(_mean(b)) for b in (row.nominal, row.stored, row.large, row.cache))
        lines.append(f"| {name} | {nll.draws} | {bits} | {_interval(nll)} | {_interval(kl)} |")
    return lines


def row_mean(row: Row) -> float:
    return float(row.values("kl").mean())


def verdict_lines(verdicts: Sequence[Verdict]) -> list[str]:
    lines = [
        "| model | lower perplexity claimed for | than | stored bits | ΔNLL | p (Holm) | verdict | ΔKL | by KL | source |",
        "|" + "---|" * 10,
    ]
    for v in verdicts:
        bits = " / ".join(_bits(b) for b in v.bits)
        cells = (v.model, v.claim.better, v.claim.worse, bits, _interval(v.nll), f"{v.nll.p_adjusted:.2g}", f"**{v.nll.verdict}**")
        lines.append("| " + " | ".join((*cells, _interval(v.kl), v.kl.verdict, v.claim.source)) + " |")
    return lines


def write_items(path: Path, rows: Mapping[Key, Row]) -> None:
    """What the table is made of, as Parquet: `nll` and `kl` minus the unquantized model's, of every window, draw, variant and model."""
    columns: dict[str, list[object]] = {n: [] for n in ("model", "variant", "draw", "window", "document", "nll", "kl")}
    for (model, name), row in rows.items():
        for draw, nll in row.nll.items():
            documents = [None] * len(nll) if row.documents is None else row.documents.astype(int)
            parts = ([model] * len(nll), [name] * len(nll), [draw] * len(nll), range(len(nll)), documents, nll, row.kl[draw])
            for column, part in zip(columns.values(), parts, strict=True):
                column.extend(part)
    table = pa.table(columns)
    for name in ("nll", "kl"):
        table = table.set_column(table.column_names.index(name), name, table.column(name).cast(pa.float32()))
    pq.write_table(table, path, compression="zstd")


def write_csv(path: Path, rows: Mapping[Key, Row], verdicts: Sequence[Verdict]) -> None:
    """Both tables in one file; `kind` is variant or ordering."""
    head = ["kind", "model", "variant", "than", "source", "draws", "clusters", "clusters_are"]
    head += ["bits_nominal", "bits_stored", "bits_4096", "bits_kv_stored", "bits_stored_than"]
    ends = [f"{m}_{part}" for m in ("nll", "kl") for part in ("mean", "low", "high", "p", "p_holm", "verdict")]

    def numbers(e: Effect, judged: bool) -> list[object]:
        return [*(f"{x:.6g}" for x in (e.mean, e.low, e.high, e.p)), *((f"{e.p_adjusted:.6g}", e.verdict) if judged else ("", ""))]

    with path.open("w", newline="") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow([*head, *ends])
        for (model, name), row in rows.items():
            nll, kl = effect(row.values("nll"), row.documents), effect(row.values("kl"), row.documents)
            bits = [f"{_mean(b):.5f}" for b in (row.nominal, row.stored, row.large, row.cache)]
            start = ["variant", model, name, "", "", nll.draws, nll.clusters, nll.clusters_are]
            out.writerow([*start, *bits, "", *numbers(nll, False), *numbers(kl, False)])
        for v in verdicts:
            bits = ["", f"{v.bits[0]:.5f}", "", "", f"{v.bits[1]:.5f}"]
            start = ["ordering", v.model, v.claim.better, v.claim.worse, v.claim.source, v.nll.draws, v.nll.clusters, v.nll.clusters_are]
            out.writerow([*start, *bits, *numbers(v.nll, True), *numbers(v.kl, True)])


def head_lines(result: SweepResult) -> list[str]:
    """When and where the stages ran, and what the unquantized models score on which windows."""
    records = [s.record for s in result.stages.values() if s.record]
    environment = records[0]["environment"]
    packages = ", ".join(f"{n} {v}" for n, v in {"python": environment["python"], **environment["packages"]}.items())
    devices = ", ".join(sorted({r["environment"]["device_name"] for r in records}))
    day = time.strftime("%Y-%m-%d", time.gmtime(max(r["ended"] for r in records)))
    lines = [
        f"Measured {day} on {devices}, {environment['cores']} cores, no GPU, one thread a stage; {packages}; sweep {result.key[:8]}.",
        "",
    ]
    for variant in result.variants:
        for task, stage in variant.evaluations.items() if variant.is_baseline else ():
            if stage.payload is not None:
                columns = items(stage)
                size = f"{len(columns['nll'])} windows of {int(columns['weight'][0]) + 1} tokens"
                score = f"NLL {columns['nll'].mean():.3f} nats per token on {size} of {task}"
                lines.append(f"- {variant.axes['model']}, unquantized: {score}; {resampled(columns)}")
    return lines


def resampled(columns: Mapping[str, Floats]) -> str:
    """What intervals on these windows are over."""
    found = clusters(len(columns["nll"]), columns.get("document"))
    count = int(found.of.max()) + 1
    return f"{count} blocks of {BLOCK} windows, since {found.reason}" if found.are == BLOCKS else f"{count} documents"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--sweep", default="methods", help="name or start of a key")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(arguments)
    store = Store(given.store.expanduser().resolve()).open(create=False)
    result = load_sweep(store, find_sweep(store, given.sweep))
    rows, failures = collect(result)
    if not rows:
        raise SystemExit(f"sweep {result.key[:8]} has no finished variant yet; run `bitgrid resume --store {given.store}`")
    verdicts, unjudged = judge(rows)
    lines = ["# Evidence", "", *head_lines(result), "", NOTES, ""]
    for model in dict.fromkeys(m for m, _ in rows):
        lines += [f"## {model}", "", *variant_lines(rows, model), ""]
    counts = {word: sum(v.nll.verdict == word for v in verdicts) for word in ("holds", "not distinguishable", "reversed")}
    lines += ["## Orderings", "", ", ".join(f"{n} {word}" for word, n in counts.items()) + f", of {len(verdicts)} rows.", ""]
    lines += verdict_lines(verdicts)
    for title, rest in (("Not judged: a side is missing", unjudged), ("Left out: not every draw was evaluated", failures)):
        if rest:
            lines += ["", f"## {title}", "", *(f"- {x}" for x in rest)]
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "evidence.md").write_text("\n".join(lines) + "\n")
    write_csv(given.out / "evidence.csv", rows, verdicts)
    write_items(given.out / "evidence-items.parquet", rows)
    print(f"{given.out}/evidence.md: {len(rows)} variants, {len(verdicts)} orderings ({', '.join(f'{n} {w}' for w, n in counts.items())})")


NOTES = f"""Made by `bench/evidence.py` from `conf/sweep/methods.yaml`. Evidence, not a gate: two models of 5.8 and 0.26 million parameters
say nothing certain about large ones, and no default was chosen by it.

- Intervals are 95 %, paired by window, over articles or stories (a window counts to the one that most of its tokens are of) and over the
  draws of the calibration text together; a variant with one draw does not depend on it. Windows are spread over the text, so that most are
  of different ones. With fewer than {FEWEST_DOCUMENTS} documents, or where evaluations of before do not tell them, clusters are blocks of
  {BLOCK} windows instead; the lines above say so, and the column clusters_are of the CSV.
- Stored bits count quantized linears alone. They are small here (64 to 768 wide), so that scales, tables, flags and columns kept as a
  count weigh far more than at 4096 x 4096; compare methods at equal stored bits, not at equal names. Of w16a16kv* only the cache is
  quantized, in one forward pass but for *_decode; its stored bits are those of a whole window, and orderings between such variants give
  them. KIVI keeps the latest 128 tokens in full precision, half of a window here. Tables of channels that QLLM takes apart and joins are
  counted in stored bits, not in those at 4096 x 4096.
- The verdict is by NLL, which is what perplexities in papers measure; KL against the unquantized model is more sensitive. p values are
  two-sided and adjusted by Holm over all rows of the table, for each measure.
- On wikitext_llama ΔNLL lies well below KL (for a model that predicts its text as well as it thinks they would be about equal). Why was not
  examined; KL tells more there.
- At 2 bits per channel stories260k knows nothing any more (ln 512 = 6.24 nats) unless k-means or learned rounding save it: orderings
  between its collapsed variants mean nothing.
- Tuners get few steps: OmniQuant, with AWQ too, SliM-LLM+ and QLLM's correction 2 epochs (64 steps of Adam, which can hardly move a
  clipping), learned rotations 40, learned rounding 40; QuIP# one sweep of descent. Calibration is 32 sequences of 256 tokens.
- ZeroQuant is with 10 steps of distillation at 1e-4 (the authors' script: 100 at 5e-6), and without any (iters=0). OS+ has nothing to
  shift in models with RMS norms, it only scales. Automatic bits have as many stored bits as w3a16_g64, chosen from groups of 64."""


if __name__ == "__main__":
    main()
