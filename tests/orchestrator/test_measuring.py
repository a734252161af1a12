"""`measure=true`: one stage more per variant and no other change, alone on its device, in the report and among the metrics."""

from __future__ import annotations

import io
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.errors import ConfigError
from orchestrator.grid import compose_grid
from orchestrator.measuring import check_length, gpu_name, measured_cache, measuring, unmeasured
from orchestrator.report.numbers import duration, size
from orchestrator.report.overview import model_tables
from orchestrator.report.speed import Speed, columns, speed_table, speeds
from orchestrator.report.tables import long_table
from orchestrator.results import StageResult
from orchestrator.stage import Resources, Stage, Status
from orchestrator.tracked_metrics import MEASURE_FACTS, _facts, variant_points
from quant.scheme import ActivationScheme, Granularity, KVScheme, Scheme, WeightScheme
from tests.orchestrator import synthetic
from tests.orchestrator.sweeping import committed, sweep
from tests.orchestrator.test_report import Page, without_plotly
from tests.orchestrator.virtual_time import OK, evaluate, failure, plan, run
from tests.tiny_models import tiny_model
from workers.machine import cpu_model
from workers.request import ErrorClass
from workers.specs import MeasureSpec, ModelSpec, StageKind, Workload, to_json

ON = ("measure=true", "workload.threads=1", "workload.device=A100")
REAL = ("measure=true", "workload.threads=1", "workload.prompt=4", "workload.tokens=2", "hints.device=cpu")


def test_one_stage_for_each_variant_that_a_kernel_can_run(plan_of: Any) -> None:
    grid = ("method=rtn", "scheme=w4a16_g64,w8a8,w4a8_g64", "task=self_perplexity,self_divergence")
    old, new = plan_of(*grid), plan_of(*grid, *ON)
    assert [k for k in new.stages if k not in new.wanted] == list(old.stages)
    assert new.key == old.key
    assert [new.stages[k].label for k in new.wanted] == [
        "measure wikitext_llama unquantized",
        "measure wikitext_llama rtn w4a16_g64",
        "measure wikitext_llama rtn w8a8",
    ]
    flagged = [v.label for v in new.variants.values() if any("not measured" in f for f in v.flags)]
    assert flagged == ["wikitext_llama · rtn · w4a8_g64"]
    spec = new.stages[new.wanted[1]].spec
    assert isinstance(spec, MeasureSpec)
    assert (spec.device, spec.workload, spec.activation) == ("A100", Workload(threads=1), None)
    rounded = new.stages[new.wanted[2]].spec
    assert isinstance(rounded, MeasureSpec)
    assert rounded.activation == ActivationScheme(8)
    assert new.stages[new.wanted[1]].inputs == {
        "quantize": next(v.quantize for v in new.variants.values() if v.label.endswith("w4a16_g64"))
    }


def test_a_cache_is_measured_in_its_format_however_it_is_evaluated(plan_of: Any) -> None:
    """One measurement for both ways of simulating it."""
    schemes = "w16a16kv2_kivi,w16a16kv2_kivi_decode,w4a16kv2_kivi_g64,w16a16kv4,w16a16kv4_decode"
    grid = ("method=rtn", f"scheme={schemes}", "task=self_perplexity")
    new = plan_of(*grid, *ON)
    specs = {new.stages[k].label: new.stages[k].spec for k in new.wanted}
    caches = {label: spec.kv for label, spec in specs.items() if isinstance(spec, MeasureSpec)}
    kivi = KVScheme(2, kind="kivi", group_size=32, residual_length=128)
    assert list(caches.values()) == [None, kivi, kivi, KVScheme(4)]


def test_sequences_that_transformers_mixes_are_not_measured_side_by_side(plan_of: Any) -> None:
    """Nor is the unquantized model; one sequence is."""
    grid = (f"model.path={tiny_model('rwkv')}", "method=rtn", "scheme=w4a16_channel", "task.params.window=32", *ON)
    several = plan_of(*grid, "workload.batch=2")
    assert several.wanted == []
    assert [next(iter(v.flags)) for v in several.variants.values()] == [
        "not measured: in a step of several sequences transformers mixes those of rwkv; use workload.batch=1"
    ] * 2
    assert len(plan_of(*grid).wanted) == 2


W8, A8 = WeightScheme(8), ActivationScheme(8)
KIVI = KVScheme(4, kind="kivi", group_size=32, residual_length=128, mode="decode", prefill=64)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (Scheme(W8, A8), None),
        (Scheme(WeightScheme(4, granularity=Granularity.TENSOR), ActivationScheme(4, symmetric=False, clip=0.9)), None),
        (Scheme(W8), None),
        (Scheme(W8, A8, KVScheme(8)), None),
        (Scheme(W8, A8, KVScheme(4, kind="kvquant")), "kv.kind=kvquant: "),
        (Scheme(W8, A8, KIVI), None),
        (Scheme(None, None, KIVI), None),
        (Scheme(W8, ActivationScheme(8, granularity=Granularity.TENSOR)), "per token"),
        (Scheme(W8, ActivationScheme(8, number="fp8_e4m3")), "integers"),
        (Scheme(W8, ActivationScheme(8, outlier_threshold=6.0)), "outlier_threshold"),
        (Scheme(WeightScheme(4, granularity=Granularity.GROUP, group_size=64), A8), "one scale per row"),
        (Scheme(WeightScheme(8, True, number="fp8_e4m3"), A8), "integer weights"),
        (Scheme(None, A8), "integer weights"),
    ],
)
def test_what_kernels_compute_in_is_measured(scheme: Scheme, reason: str | None) -> None:
    found = unmeasured(scheme, {"model_type": "llama", "hidden_size": 512, "num_attention_heads": 8}, Workload(prompt=128, tokens=32))
    assert (found is None) if reason is None else (found is not None and reason in found)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("workload.tokens=0",), "workload.tokens=0; give a whole number from 1"),
        (("workload.prompt=2040",), "make 2072 positions, and wikitext_llama has 2048"),
        (("cluster=ray_existing", "workload.device=auto"), "give the name its workers report"),
        (("workload.promt=1",), "prompt"),
        (("workload.backend=trition",), "unknown workload.backend 'trition'; nearest: triton"),
        (("workload.backend=null",), "unknown workload.backend 'None'; .*allowed: auto, .*, dense"),
        (("workload.device=null",), "workload.device=None; give the name"),
    ],
)
def test_a_workload_that_cannot_run_is_refused_on_the_driver(plan_of: Any, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of("method=rtn", "scheme=w4a16_g64", *ON, *more)


@pytest.mark.parametrize("less", ["workload=null", "~workload", "~workload.tokens"])
def test_what_is_left_out_of_the_workload_is_at_its_default(plan_of: Any, less: str) -> None:
    whole = plan_of("method=rtn", "scheme=w4a16_g64", "measure=true")
    assert plan_of("method=rtn", "scheme=w4a16_g64", "measure=true", less).stages.keys() == whole.stages.keys()


def test_it_belongs_to_the_sweep() -> None:
    with pytest.raises(ConfigError, match="measure cannot be swept: it adds timings"):
        compose_grid(["measure=true,false"], multirun=True)
    with pytest.raises(ConfigError, match=r"workload(\.batch)? cannot be swept"):
        compose_grid(["workload.batch=1,2"], multirun=True)


def test_the_device_is_this_machines() -> None:
    grid = compose_grid(["measure=true", "hints.device=cpu"], multirun=True)
    found = measuring(grid.settings)
    assert found is not None
    assert found.device == cpu_model()
    assert found.workload.threads is not None
    assert measuring(compose_grid([], multirun=True).settings) is None


ASKED = """#!/bin/sh
[ "$2 $3" = "--query-gpu=name --format=csv,noheader" ] || exit 9
case "$1" in --id=0) echo "NVIDIA H200";; --id=1) echo "NVIDIA L4";; --id=2) echo;; *) echo "No devices were found"; exit 6;; esac
"""


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as nvidia-smi tells."""
    program = tmp_path / "nvidia-smi"
    program.write_text(ASKED)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("hints", "device"),
    [
        ("hints.device=auto", "NVIDIA H200"),
        ("hints.device=cuda", "NVIDIA H200"),
        ("hints.device=cuda:1", "NVIDIA L4"),
        ("~hints", "NVIDIA H200"),
        ("hints.device=cpu", None),
        ("hints.device=cuda:2", None),
        ("hints.device=cuda:3", None),
    ],
)
def test_the_device_is_the_gpu_that_stages_run_on(hints: str, device: str | None) -> None:
    """As nvidia-smi names it; without one the CPU, whose threads are part of the workload."""
    settings = dict(compose_grid(["measure=true", *([] if hints == "~hints" else [hints])], multirun=True).settings)
    if hints == "~hints":
        settings["hints"] = None
    found = measuring(settings)
    assert found is not None
    assert found.device == (device or cpu_model())
    assert found.workload.threads == (None if device else os.cpu_count())
    given = measuring({**settings, "workload": {"threads": 3, "device": "auto"}})
    assert given is not None
    assert (given.device, given.workload.threads) == (found.device, 3)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("visible", "index", "device"),
    [("0,1", 1, "NVIDIA L4"), ("1, 0", 0, "NVIDIA L4"), ("1, 0", 1, "NVIDIA H200"), ("1", 1, None), ("", 0, None), ("-1", 0, None)],
)
def test_gpus_are_counted_among_the_visible_ones(visible: str, index: int, device: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_name(index) == device


def test_a_workload_of_one_of_each_is_one() -> None:
    least = {"batch": 1, "prompt": 1, "tokens": 1, "threads": 1}
    found = measuring({"measure": True, "workload": {**least, "device": "A100"}})
    assert found is not None
    assert found.workload == Workload(**least)
    for name in least:
        with pytest.raises(ConfigError, match=f"workload.{name}=0; give a whole number from 1"):
            measuring({"measure": True, "workload": {**least, name: 0, "device": "A100"}})
        if name != "threads":
            with pytest.raises(ConfigError, match=f"workload.{name}=None; give a whole number from 1"):
                measuring({"measure": True, "workload": {**least, name: None, "device": "A100"}})


def test_all_positions_of_a_model_can_be_measured() -> None:
    config = {"model_type": "llama", "max_position_embeddings": 160}
    check_length(Workload(prompt=128, tokens=32), config, "a model")
    with pytest.raises(ConfigError, match="make 161 positions, and a model has 160"):
        check_length(Workload(prompt=129, tokens=32), config, "a model")


def test_a_window_must_hold_prompt_and_tokens() -> None:
    """Of sliding attention, where the cache is read packed."""
    config = {"model_type": "mistral", "hidden_size": 512, "num_attention_heads": 8, "sliding_window": 160}
    assert unmeasured(Scheme(None, None, KVScheme(4)), config, Workload(prompt=128, tokens=32)) is None
    assert "a token sees 160 tokens" in str(unmeasured(Scheme(None, None, KVScheme(4)), config, Workload(prompt=129, tokens=32)))


def test_a_measured_cache_is_its_format_alone() -> None:
    assert measured_cache(KIVI) == KVScheme(4, kind="kivi", group_size=32, residual_length=128)
    assert measured_cache(None) is None


def test_a_measure_stage_runs_alone() -> None:
    """Beside a stage, too, that waits for its second attempt when nothing else is left to run."""
    spec = MeasureSpec(ModelSpec("m"), Workload(), "cpu")
    timed = {k: Stage(k, StageKind.MEASURE, spec, f"measure {k}", resources=Resources(5.0)) for k in ("m1", "m2")}
    lost = failure(ErrorClass.INFRASTRUCTURE)
    others = plan(*(evaluate(f"e{i}") for i in range(8)))
    statuses, _, executor = run(timed | others, lambda key, attempt: lost if (key, attempt) == ("e7", 1) else None)
    assert set(statuses.values()) == {OK}
    assert [k for _, k, _ in executor.starts].count("e7") == 2
    runs = [(t, t + (timed | others)[k].resources.seconds, k) for t, k, _ in executor.starts]
    for start, end, key in runs:
        if key in timed:
            assert all(last <= start or first >= end for first, last, k in runs if k != key)


def test_a_sweep_is_measured_and_told(tmp_path: Path) -> None:
    store = tmp_path / "store"
    line = (f"model.path={tiny_model('llama')}", "method=rtn", "scheme=w4a16_channel", "task.params.window=64")
    assert sweep(store, *line).exit_code == 0
    before = committed(store)
    done = sweep(store, *line, *REAL)
    assert done.exit_code == 0
    after = committed(store)
    assert {k: after[k] for k in before} == before
    assert Counter(s.kind for s in done.result.stages.values()) == {"evaluate": 2, "quantize": 1, "measure": 2}
    page = Page(without_plotly(done.report.read_text(encoding="utf-8")))
    text = " ".join(page.text)
    assert "Speed and memory" in text
    assert "1 thread; 1 sequence, prompt of 4 tokens, 2 decoded" in text
    variant = next(v for v in done.result.variants if not v.is_baseline)
    assert variant.measure is not None
    points = {p.name: p.value for p in variant_points(variant, None, {}, lambda *_: pytest.fail("no delta is asked for"))[0]}
    assert points["perf/decode_tok_s"] == variant.measure.summary["decode_tokens_per_s"]
    assert points["mem/weights_bytes"] < variant.measure.summary["peak_memory_bytes"]
    assert sweep(store, *line, *REAL).exit_code == 0
    assert committed(store) == after, "measured once"


def test_variants_without_a_measurement_have_no_table(tmp_path: Path) -> None:
    result = synthetic.sweep(tmp_path)
    assert all(speeds(m) == [] for m in model_tables(result, long_table(result)))


def figures(**more: Any) -> dict[str, Any]:
    """What a worker on a GPU tells."""
    known = {"decode_p50_s": 0.0123, "decode_low_s": 0.0121, "decode_high_s": 0.0126, "decode_p95_s": 0.0205, "decode_tokens_per_s": 81.3}
    stored = {"disk_bytes": 4.1e9, "bits_stored": 4.25, "weights_bytes": 4.2e9, "peak_memory_bytes": 5.2e9, "threads": 8}
    return {**known, "prefill_p50_s": 0.1, "prefill_p95_s": 0.2, **stored, "backends": {"cuda": 224}, **more}


def test_the_table_shows_what_was_measured_and_what_quantizing_took(tmp_path: Path) -> None:
    """A column in which nothing was measured is left out; a record of an older worker has fewer."""
    result = synthetic.sweep(tmp_path)
    model = model_tables(result, long_table(result))[0]
    line = next(x for x in model.lines if x.variant.quantize is not None and x.variant.quantize.record is not None)
    gpu = {"peak_reserved_bytes": 6e9, "run_energy_j": 220.0, "token_energy_j": 6.9, "graph": True}

    def shown(summary: dict[str, Any]) -> dict[str, str]:
        record = {"started": 0.0, "ended": 1.0, "summary": summary}
        stage = StageResult("k", "measure", "measure", Status.SUCCEEDED, record)
        found = Speed(line, stage)
        return {c.heading: c.text(found) for c in columns([found])}

    cpu = shown(figures())
    assert cpu["ms per token"] == "12.3 [12.1, 12.6]"
    assert (cpu["p95"], cpu["prompt, p95"], cpu["weights on disk"], cpu["kernels"]) == ("20.5", "200", "4.10 GB", "224 cuda")
    assert line.variant.quantize is not None
    assert cpu["quantized in"] == duration(line.variant.quantize.seconds)
    assert cpu["with at most"] == size(line.variant.quantize.summary["peak_memory_bytes"])
    more = shown(figures(**gpu))
    assert set(more) - set(cpu) == {"J per token", "J in all", "peak reserved"}
    assert (more["J per token"], more["peak reserved"], more["kernels"]) == ("6.90", "6.00 GB", "224 cuda, CUDA graph")
    stage = StageResult("k", "measure", "measure", Status.SUCCEEDED, {"ended": 1.0, "summary": figures(**gpu)})
    points = {p.name: p.value for p in _facts(stage, MEASURE_FACTS)}
    assert points["perf/token_energy_j"] == 6.9
    assert points["mem/measure_reserved_bytes"] == 6e9


def test_what_quantizing_took_elsewhere_says_where(tmp_path: Path) -> None:
    """A worker with a GPU times what a CPU quantized before: the CPU's figures are not the GPU's."""
    result = synthetic.sweep(tmp_path)
    line = next(x for x in model_tables(result, long_table(result))[0].lines if x.variant.quantize is not None)
    assert line.variant.quantize is not None
    record = {**(line.variant.quantize.record or {}), "environment": {"device_name": "EPYC"}}
    variant = replace(line.variant, quantize=replace(line.variant.quantize, record=record))
    for device, end in (("EPYC", ""), ("A100", " on EPYC")):
        stage = StageResult("k", "measure", "measure", Status.SUCCEEDED, {"ended": 1.0, "summary": figures(device=device)})
        speed = Speed(replace(line, variant=variant), stage)
        cells = {c.heading: c.text(speed) for c in columns([speed])}
        assert cells["quantized in"] == duration(speed.quantize_s) + end
        assert cells["with at most"] == size(speed.quantize_bytes) + end


@pytest.mark.parametrize("width", [80, 100])
def test_names_give_way_in_the_terminal_and_numbers_stay_whole(tmp_path: Path, width: int) -> None:
    name = "m[dtype=bfloat16]"
    result = synthetic.sweep(tmp_path, models=(name,), methods=("omniquant[rounding.params.epochs=1,rounding.params.let=true]",))
    model = model_tables(result, long_table(result))[0]
    spec = to_json(MeasureSpec(ModelSpec("0" * 64), Workload(), "A100"))
    stage = StageResult("k", "measure", "measure", Status.SUCCEEDED, {"started": 0.0, "ended": 1.0, "summary": figures()}, spec=spec)
    timed = replace(model, lines=tuple(replace(x, variant=replace(x.variant, measure=stage)) for x in model.lines))
    out = io.StringIO()
    Console(file=out, width=width).print(speed_table(timed))
    assert out.getvalue().startswith(f"{name}: speed on A100")
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert max(map(len, out.getvalue().splitlines())) <= width
    wanted = ["12.3", "20.5", "81.3", "100", "4.20", "GB", "5.20", "GB", "224", "cuda"]
    assert sum(row[-len(wanted) :] == wanted for row in rows) == len(model.lines)
