"""Descriptions of runs: pure, stable, and complete without MLflow."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.dashboard_view import view_tag
from orchestrator.mlflow_names import KEY_LENGTH, metric_name, tag_key, tag_value
from orchestrator.results import StageResult, SweepResult, TaskInfo
from orchestrator.stats import Delta
from orchestrator.tracked_diff import CONTENT, LoggedRun, amendable, stale_tags
from orchestrator.tracked_metrics import Point
from orchestrator.tracked_runs import Phase, RunDescription, content_digest, describe_sweep, describe_variant
from tests.orchestrator import synthetic
from tests.orchestrator.tracked_sweep import OTHER, change, committed, fixed_delta, full_sweep, pending, started, variant, with_failure
from workers.specs import MeasureSpec, ModelSpec, Workload, to_json


@pytest.fixture
def sweep(tmp_path: Path) -> SweepResult:
    return full_sweep(tmp_path / "store")


def described(result: SweepResult, key: str, phase: Phase = Phase.ENDED) -> RunDescription:
    run = describe_variant(result, variant(result, key), phase, fixed_delta)
    assert run is not None
    return run


def metric(run: RunDescription, name: str) -> Point:
    (point,) = [p for p in run.metrics if p.name == name]
    return point


def test_a_description_depends_on_the_store_alone(tmp_path: Path, sweep: SweepResult) -> None:
    again = full_sweep(tmp_path / "elsewhere")
    for key in (v.key for v in sweep.variants):
        assert described(sweep, key).content == described(again, key).content
    assert describe_sweep(sweep, Phase.ENDED).content == describe_sweep(again, Phase.ENDED).content
    assert content_digest(sweep) == content_digest(again)


def test_every_change_that_shows_changes_the_digests(sweep: SweepResult) -> None:
    whole, run = content_digest(sweep), described(sweep, "v-rtn-w4").content
    other = with_failure(sweep)
    assert content_digest(other) != whole
    assert described(other, "v-rtn-w4").content == run
    assert described(other, "v-gptq-w2").content != described(sweep, "v-gptq-w2").content
    assert content_digest(started(sweep, 3)) != whole
    assert content_digest(sweep, Phase.RUNNING) != whole
    assert content_digest(replace(sweep, provenance={**sweep.provenance, "git": {"commit": "fff"}})) != whole


def test_points_of_a_growing_sweep_are_never_taken_back(sweep: SweepResult) -> None:
    """MLflow cannot forget a point: what an early sync writes must be part of the final description."""
    final = {v.key: set(described(sweep, v.key).metrics) for v in sweep.variants}
    for done in range(len(sweep.stages) + 1):
        partial = started(sweep, done)
        for v in partial.variants:
            run = describe_variant(partial, v, Phase.RUNNING, fixed_delta)
            if run is not None:
                assert set(run.metrics) <= final[v.key]
                assert run.params.items() <= described(sweep, v.key).params.items()
    last = describe_sweep(sweep, Phase.ENDED).metrics
    assert [p.step for p in last] == list(range(1, len(sweep.stages) + 1))
    interrupted = describe_sweep(started(sweep, 6), Phase.ENDED).metrics
    assert interrupted == last[:6]


def test_nothing_is_said_of_a_variant_before_its_first_stage_ended(sweep: SweepResult) -> None:
    v = variant(sweep, "v-rtn-w4")
    assert v.quantize is not None
    idle = change(sweep, v.key, quantize=pending(v.quantize), evaluations={t: pending(s) for t, s in v.evaluations.items()})
    assert describe_variant(idle, variant(idle, v.key), Phase.RUNNING, fixed_delta) is None


def test_an_unquantized_model_has_the_size_of_its_weight_files(sweep: SweepResult) -> None:
    run = described(replace(sweep, model_bytes={"m" * 64: 2**31}), "v-base")
    assert (metric(run, "size/model_bytes").value, metric(run, "size/model_gib").value) == (2**31, 2.0)
    assert not [p for p in described(sweep, "v-base").metrics if p.name.startswith("size/")], "not known"


def test_times_are_those_of_what_this_sweep_computed(tmp_path: Path, sweep: SweepResult) -> None:
    v = variant(sweep, "v-rtn-w4")
    assert v.quantize is not None
    assert v.quantize.spec is not None
    old = committed(tmp_path / "store", "quantize", v.quantize.key, 1_600_000_000.0, v.quantize.summary, v.quantize.spec, OTHER)
    reused = change(sweep, v.key, quantize=old)
    run = described(reused, v.key)
    evaluations = [s.record for s in v.evaluations.values() if s.record is not None]
    assert run.start_ms == round(min(r["started"] for r in evaluations) * 1000)
    assert run.end_ms == round(max(r["ended"] for r in evaluations) * 1000)
    assert metric(run, "size/bits_stored").timestamp_ms == 1_600_000_010_500
    assert run.tags["bitgrid.reused"] == "quantize"
    points = describe_sweep(reused, Phase.ENDED).metrics
    assert (points[0].value, points[0].timestamp_ms) == (1.0, round(sweep.created * 1000))
    assert points[-1].value == len(sweep.stages)


def test_a_delta_without_interval_is_logged_plainly_and_says_why(sweep: SweepResult) -> None:
    def refuse(v: StageResult, b: StageResult, task: TaskInfo, name: str) -> Delta:
        raise ValueError("items differ")

    run = describe_variant(sweep, variant(sweep, "v-rtn-w4"), Phase.ENDED, refuse)
    assert run is not None
    assert metric(run, "delta/text/perplexity").value == 0.5
    assert not [p for p in run.metrics if p.name.endswith(("_low", "_high"))]
    assert "delta of text/perplexity has no interval: items differ" in run.tags["bitgrid.notes"]


def test_the_paired_intervals_of_the_report_are_the_default(tmp_path: Path) -> None:
    from orchestrator.stats import paired_delta

    sweep = synthetic.sweep(tmp_path, methods=("rtn",), schemes=("w4a16_g64",))
    base, v = sweep.variants
    run = describe_variant(sweep, v, Phase.ENDED)
    assert run is not None
    wanted = paired_delta(v.evaluations["self_perplexity"], base.evaluations["self_perplexity"], synthetic.PERPLEXITY, "ppl")
    assert metric(run, "delta/self_perplexity/ppl").value == wanted.delta
    assert metric(run, "delta/self_perplexity/ppl_low").value == wanted.low
    assert metric(run, "delta/self_perplexity/ppl_high").value == wanted.high
    assert [p.step for p in run.metrics if p.name == "layer/weight_error"] == [0, 1, 2]
    assert "bitgrid.notes" not in run.tags


def test_a_corrupt_table_costs_its_metrics_only(sweep: SweepResult) -> None:
    v = variant(sweep, "v-rtn-w4")
    assert v.quantize is not None
    assert v.quantize.payload is not None
    (v.quantize.payload / "layers.parquet").write_bytes(b"garbage")
    run = described(sweep, v.key)
    assert metric(run, "eval/text/perplexity")
    assert not [p for p in run.metrics if p.name.startswith("layer/")]
    assert "layers.parquet" in run.tags["bitgrid.notes"]


def test_a_mixed_variant_names_all_its_bits(sweep: SweepResult) -> None:
    v = variant(sweep, "v-rtn-w4")
    assert v.quantize is not None
    rules = [{"pattern": "*", "weight": {"bits": 4}}, {"pattern": "mlp", "weight": {"bits": 2, "group_size": 64, "symmetric": True}}]
    mixed = change(sweep, v.key, quantize=replace(v.quantize, spec={"model": {"digest": "m", "dtype": "bfloat16"}, "rules": rules}))
    params = described(mixed, v.key).params
    assert (params["quant.bits"], params["quant.group_size"], params["quant.symmetric"]) == ("4,2", "none,64", "false,true")
    assert params["model.dtype"] == "bfloat16"


def test_a_quantized_cache_shows_its_bits(sweep: SweepResult) -> None:
    v = variant(sweep, "v-rtn-w4")
    stages = dict(v.evaluations)
    for task, bits in (("text", 2.5), ("kl", 2.25)):
        record = stages[task].record
        assert record is not None
        summary = {**record["summary"], "kv": {"kind": "kivi", "mode": "decode", "tokens": 128, "bits_stored": bits}}
        stages[task] = replace(stages[task], record={**record, "summary": summary})
    point = metric(described(change(sweep, v.key, evaluations=stages), v.key), "size/kv_bits_stored")
    # Of one task, the same however far the sweep has come: MLflow cannot take a point back.
    assert (point.value, point.timestamp_ms) == (2.25, round((stages["kl"].record or {})["ended"] * 1000))
    assert not [p for p in described(sweep, v.key).metrics if p.name == "size/kv_bits_stored"]


def test_automatic_bits_show_their_budget(sweep: SweepResult) -> None:
    v = variant(sweep, "v-rtn-w4")
    assert v.quantize is not None
    spec = {**(v.quantize.spec or {}), "auto": {"budget": 3.2, "candidates": [{"bits": 2}, {"bits": 8}]}}
    params = described(change(sweep, v.key, quantize=replace(v.quantize, spec=spec)), v.key).params
    assert (params["quant.bits"], params["quant.budget"]) == ("auto", "3.2")
    assert "quant.budget" not in described(sweep, v.key).params


def test_only_what_mlflow_cannot_amend_is_made_again(sweep: SweepResult) -> None:
    run = described(sweep, "v-rtn-w4")
    last = {p.name: p for p in run.metrics}
    logged = LoggedRun("id", run.name, run.status, dict(run.params), {**run.tags, CONTENT: "older"}, tuple(last.values()))
    assert amendable(logged, run)
    fewer = tuple(p for p in last.values() if not p.name.startswith("eval/"))
    assert amendable(replace(logged, params={"model.name": "tiny"}, latest=fewer), run)
    assert not amendable(replace(logged, params={**run.params, "quant.bits": "3"}), run)
    moved = replace(last["eval/text/perplexity"], timestamp_ms=5)
    assert not amendable(replace(logged, latest=(moved,)), run)
    assert not amendable(replace(logged, latest=(replace(moved, name="eval/gone/perplexity"),)), run)
    assert amendable(replace(logged, latest=(Point("theirs", 1.0, 5),), params={**run.params, "theirs": "x"}), run)
    assert stale_tags(replace(logged, tags={**logged.tags, "bitgrid.error_class": "x", "theirs": "y"}), run) == ["bitgrid.error_class"]


def test_nan_scores_can_be_written_again(tmp_path: Path, sweep: SweepResult) -> None:
    bad = committed(tmp_path / "store", "evaluate", "e-nan", 1_700_000_900.0, {"scores": {"perplexity": math.nan}}, {})
    run = described(change(sweep, "v-rtn-w4", evaluations={"text": bad}), "v-rtn-w4")
    points = tuple(replace(p, value=0.0) if math.isnan(p.value) else p for p in {p.name: p for p in run.metrics}.values())
    assert any(math.isnan(p.value) for p in run.metrics)
    assert amendable(LoggedRun("id", run.name, run.status, run.params, run.tags, points), run)


def test_the_saved_view_shows_the_headline_scores_of_each_task(sweep: SweepResult) -> None:
    key, value = view_tag(sweep)
    assert key.startswith("mlflow.sharedViewState.bitgrid-")
    for column in ("metrics.`eval/text/perplexity`", "metrics.`delta/kl/kl`", "params.`quant.method`"):
        assert column.replace('"', '\\"') in value
    assert "model.name" not in value


@pytest.mark.mlflow
@given(st.lists(st.text(max_size=400), min_size=1, max_size=4))
def test_names_are_always_ones_mlflow_takes(parts: list[str]) -> None:
    from mlflow.utils.validation import _validate_metric_name, _validate_tag_name

    name = metric_name(*parts)
    _validate_metric_name(name)
    assert len(name) <= KEY_LENGTH
    key = tag_key("bitgrid.stage." + "".join(parts).replace("/", "-"))
    _validate_tag_name(key)
    assert len(key) <= KEY_LENGTH


def test_file_names_that_are_no_utf8_become_values() -> None:
    assert tag_value("caf\udce9") == "caf\\udce9"


def test_long_values_say_that_they_were_cut() -> None:
    assert tag_value("short") == "short"
    cut = tag_value("y" * 9000)
    assert len(cut) == 8000
    assert cut.endswith("(cut from 9000 characters)")


def test_a_measured_run_says_what_was_timed_and_on_what(tmp_path: Path, sweep: SweepResult) -> None:
    """Two GPUs of one number are told apart, and tokens per second are those of a batch and a context."""
    spec = to_json(MeasureSpec(ModelSpec("m"), Workload(batch=2, prompt=64, tokens=8), "NVIDIA H200"))
    stage = committed(tmp_path / "store", "measure", "m1", 10.0, {"decode_tokens_per_s": 5.0, "threads": 1}, spec)
    assert stage.record is not None
    stage = replace(stage, record={**stage.record, "environment": {"device": "cuda:0", "device_name": "NVIDIA H200"}})
    tags = described(change(sweep, "v-rtn-w4", measure=stage), "v-rtn-w4").tags
    assert (tags["bitgrid.device.measure"], tags["bitgrid.device_name.measure"]) == ("cuda:0", "NVIDIA H200")
    assert tags["bitgrid.measured"] == "NVIDIA H200, 1 thread; 2 sequences, prompt of 64 tokens, 8 decoded"
    assert not any("measured" in name for name in described(sweep, "v-rtn-w4").tags)
