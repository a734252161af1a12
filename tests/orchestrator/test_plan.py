"""A known grid gives exactly these stages: what is shared is planned once."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cell import Option
from orchestrator.errors import ConfigError, PlanError, SourceError
from orchestrator.grid import compose_grid, compose_jobs
from orchestrator.hydra_bridge import Composer
from orchestrator.parts import method_part
from orchestrator.plan import build_plan
from orchestrator.planned import Plan
from orchestrator.sources import Sources
from tests.tiny_models import tiny_model
from workers.artifact import file_digest
from workers.specs import CalibrateSpec, EvaluateSpec, QuantizeSpec, StageKind


@pytest.fixture
def plan_of(tmp_path: Path):
    def make(*overrides: str, models_dir: Path | None = None) -> Plan:
        grid = compose_grid(list(overrides), multirun=True)
        return build_plan(grid, Sources(models_dir, None, tmp_path / "digests.json"))

    return make


def kinds(plan: Plan) -> dict[str, int]:
    return dict(Counter(s.kind.value for s in plan.stages.values()))


def test_known_grid_has_exactly_these_stages(plan_of) -> None:
    plan = plan_of(
        "method=rtn,gptq,awq", "scheme=w4a16_g64,w3a16_g64,w4a16_channel", "task=self_perplexity,self_divergence", "calibration=self_text"
    )
    # One Hessian for all GPTQ variants, absmean and samples for all AWQ ones; 9 quantizations; (9 variants + baseline) x 2 tasks.
    assert kinds(plan) == {"calibrate": 3, "quantize": 9, "evaluate": 20}
    assert len(plan.cells) == 18
    assert sum(v.is_baseline for v in plan.variants.values()) == 1


def test_two_models_and_two_calibrations_multiply_only_what_depends_on_them(plan_of, tmp_path: Path) -> None:
    for name, family in (("wikitext_llama", "llama"), ("stories260k", "opt")):
        shutil.copytree(tiny_model(family), tmp_path / "models" / name)
    plan = plan_of(
        *("model=wikitext_llama,stories260k", "calibration.samples=16,32", "method=rtn,gptq,awq"),
        *("scheme=w4a16_channel,w3a16_g16", "task=self_perplexity", "task.params.window=64", "calibration.sequence_length=64"),
        models_dir=tmp_path / "models",
    )
    # Per model and calibration one Hessian for GPTQ, absmean and samples for AWQ; GPTQ and AWQ per calibration, RTN once; then baselines.
    assert kinds(plan) == {"calibrate": 2 * 2 * 3, "quantize": 2 * (2 * 2 + 1) * 2, "evaluate": 2 * (2 * 2 + 1) * 2 + 2}
    assert len(plan.cells) == 2 * 2 * 3 * 2
    assert sum(v.is_baseline for v in plan.variants.values()) == 2
    of_calibrate = Counter(s.spec.statistic for s in plan.stages.values() if isinstance(s.spec, CalibrateSpec))
    assert of_calibrate == dict.fromkeys(("hessian", "absmean", "samples"), 4)


def test_run_time_parts_share_one_quantize(plan_of) -> None:
    plan = plan_of("method=rtn", "scheme=w4a16_g64,w4a8_g64", "task=self_perplexity")
    assert kinds(plan) == {"quantize": 1, "evaluate": 3}
    assert len({v.quantize for v in plan.variants.values() if v.quantize}) == 1
    assert len({c.variant for c in plan.cells}) == 2


def test_caches_without_calibration_share_the_weights_and_add_nothing(plan_of) -> None:
    plan = plan_of("method=rtn", "scheme=w4a16_g64,w4a16kv2_kivi_g64,w16a16kv2_kivi,w16a16kv2_kivi_decode", "task=self_perplexity")
    assert kinds(plan) == {"quantize": 1, "evaluate": 5}
    flags = {v.axes["scheme"]: " ".join(v.flags) for v in plan.variants.values()}
    assert "simulated" in flags["w4a16kv2_kivi_g64"]
    assert "simulated" in flags["w16a16kv2_kivi"]
    assert "teacher-forced decoding" in flags["w16a16kv2_kivi_decode"]
    assert "simulated" not in flags["w16a16kv2_kivi_decode"]


def test_a_calibrated_cache_takes_keys_and_values_once_for_each_calibration(plan_of) -> None:
    line = ("method=rtn", "scheme=w16a16kv2_kvquant,w16a16kv3_kvquant", "task=self_perplexity,self_divergence", "replicate=r0,r1")
    plan = plan_of(*line)
    assert kinds(plan) == {"calibrate": 2, "evaluate": 2 + 2 * 2 * 2}
    assert len(plan.variants) == 1 + 2 * 2
    calibrations = {k for k, s in plan.stages.items() if s.kind is StageKind.CALIBRATE}
    given = [s.inputs["kv"] for s in plan.stages.values() if "kv" in s.inputs]
    assert set(given) == calibrations
    assert len(given) == 8


def test_a_cache_that_the_model_cannot_have_is_refused(plan_of) -> None:
    with pytest.raises(PlanError, match="KV group size 24 does not divide a head of 64"):
        plan_of("method=rtn", "scheme=w16a16kv2_kivi", "scheme.kv.group_size=24", "scheme.kv.residual_length=48", "task=self_perplexity")


def test_static_activation_ranges_make_a_quantize_of_their_own(plan_of) -> None:
    plan = plan_of("method=rtn", "scheme=w8a8_tensor,w8a8_static", "task=self_perplexity")
    specs = [s.spec for s in plan.stages.values() if s.kind is StageKind.QUANTIZE]
    assert sorted(isinstance(s, QuantizeSpec) and s.activation is not None for s in specs) == [False, True]


def test_number_of_tasks_does_not_multiply_quantization(plan_of) -> None:
    one = plan_of("method=gptq", "scheme=w4a16_g64", "task=self_perplexity")
    two = plan_of("method=gptq", "scheme=w4a16_g64", "task=self_perplexity,self_divergence")
    assert kinds(one)["quantize"] == kinds(two)["quantize"] == 1
    assert set(one.stages) < set(two.stages)


def test_adding_a_method_keeps_every_old_stage(plan_of) -> None:
    old = plan_of("method=rtn,gptq", "scheme=w4a16_g64,w3a16_g64", "task=self_perplexity,self_divergence")
    new = plan_of("method=rtn,gptq,awq", "scheme=w4a16_g64,w3a16_g64", "task=self_perplexity,self_divergence")
    assert set(old.stages) < set(new.stages)
    assert old.key != new.key


def test_replicates_draw_calibration_anew_but_share_data_free_variants(plan_of) -> None:
    plan = plan_of("method=rtn,gptq", "scheme=w4a16_g64", "task=self_perplexity", "replicate=r0,r1,r2")
    assert kinds(plan) == {"calibrate": 3, "quantize": 4, "evaluate": 5}


def test_replicates_share_calibration_that_draws_nothing(plan_of) -> None:
    """Consecutive windows are the same text for every seed: three runs of them would look like three that agree."""
    line = ("method=gptq,quarot", "scheme=w4a4_channel", "task=self_perplexity", "replicate=r0,r1,r2", "calibration.sampling=sequential")
    plan = plan_of(*line)
    # quarot's signs are drawn from the replicate's seed.
    assert kinds(plan) == {"calibrate": 1, "quantize": 4, "evaluate": 5}
    assert plan_of(*line, "calibration.seed=7").stages.keys() == plan.stages.keys()


def test_divergence_reads_the_baseline_and_perplexity_does_not(plan_of) -> None:
    plan = plan_of("method=rtn", "scheme=w4a16_g64", "task=self_perplexity,self_divergence")
    baseline = next(v for v in plan.variants.values() if v.is_baseline)
    variant = next(v for v in plan.variants.values() if not v.is_baseline)
    assert plan.stages[variant.evaluations["self_divergence"]].inputs["reference"] == baseline.evaluations["self_divergence"]
    assert "reference" not in plan.stages[variant.evaluations["self_perplexity"]].inputs


def test_same_grid_in_another_order_is_the_same_sweep(plan_of) -> None:
    first = plan_of("method=rtn,gptq", "scheme=w4a16_g64,w3a16_g64")
    second = plan_of("scheme=w3a16_g64,w4a16_g64", "method=gptq,rtn")
    assert first.key == second.key


def test_jobs_of_a_foreign_sweeper_get_the_scores_of_their_own_task(tmp_path: Path) -> None:
    pairs = [(window, damp) for window in (64, 128) for damp in (0.01, 0.1)]
    jobs = [["method=gptq", f"task.params.window={w}", f"method.rounding.params.damp={d}"] for w, d in pairs]
    grid, cells = compose_jobs(Composer.at(), jobs)
    plan = build_plan(grid, Sources(None, None, tmp_path / "digests.json"))
    planned = {c.cell: c for c in plan.cells}
    for cell, (window, damp) in zip(cells, pairs, strict=True):
        spec = plan.stages[planned[cell].evaluate].spec
        assert isinstance(spec, EvaluateSpec)
        assert dict(spec.task.params)["window"] == window
        assert (cell.task.name, cell.method.name) == (f"self_perplexity[params.window={window}]", f"gptq[rounding.params.damp={damp}]")
    assert kinds(plan) == {"calibrate": 1, "quantize": 2, "evaluate": 3 * 2}
    assert len({v.label for v in plan.variants.values()}) == 3


def test_tasks_that_differ_under_one_name_are_refused(tmp_path: Path) -> None:
    grid = compose_grid(["task.params.window=64,128"], multirun=True)
    alike = tuple(cell._replace(task=replace(cell.task, name="self_perplexity")) for cell in grid.cells)
    with pytest.raises(PlanError, match="two tasks of the grid are called 'self_perplexity'"):
        build_plan(replace(grid, cells=alike), Sources(None, None, tmp_path / "digests.json"))


@pytest.mark.parametrize(
    "damage", [lambda d: None, lambda d: [], lambda d: dict.fromkeys(d, 1), lambda d: {n: v[:-1] for n, v in d.items()}]
)
def test_known_digests_that_are_none_are_found_again(plan_of, damage, tmp_path: Path) -> None:
    key, cache = plan_of().key, tmp_path / "digests.json"
    cache.write_text(json.dumps(damage(json.loads(cache.read_text()))))
    assert plan_of().key == key


def test_labels_tell_stages_of_several_draws_apart(plan_of) -> None:
    swept = ("method=rtn,gptq,quip", "calibration.samples=2,4", "replicate=r0,r1", "task=self_perplexity")
    drawn, in_order = (plan_of(*swept, f"calibration.sampling={s}") for s in ("windows", "sequential"))
    for plan in (drawn, in_order):
        assert len({s.label for s in plan.stages.values()}) == len(plan.stages)
    assert "quantize wikitext_llama rtn w4a16_g64" in {s.label for s in drawn.stages.values()}
    assert "quantize wikitext_llama gptq w4a16_g64 self_text[samples=2] r1" in {s.label for s in drawn.stages.values()}
    assert "calibrate wikitext_llama self_text[samples=4] r0 hessian" in {s.label for s in drawn.stages.values()}
    labels = {s.label for s in in_order.stages.values()}
    assert "quantize wikitext_llama gptq w4a16_g64 self_text[samples=2]" in labels
    assert "quantize wikitext_llama quip w4a16_g64 self_text[samples=2] r1" in labels, "its rotations have seeds"


def test_inputs_come_before_what_reads_them(plan_of) -> None:
    plan = plan_of("method=rtn,gptq,awq", "scheme=w4a16_g64", "task=self_divergence")
    seen: set[str] = set()
    for stage in plan.stages.values():
        assert set(stage.inputs.values()) <= seen
        seen.add(stage.key)


def tiny(folder: Path, family: str) -> Path:
    shutil.copytree(tiny_model(family), folder / family)
    return folder / family


def test_a_rotation_shares_its_calibration_with_the_rounding_alone(plan_of) -> None:
    plan = plan_of("method=gptq,quarot", "scheme=w4a4_channel,w4a4kv4_channel", "task=self_perplexity")
    # Keys and values are of the evaluation alone, so both schemes share one quantize per method.
    assert kinds(plan) == {"calibrate": 1, "quantize": 2, "evaluate": 5}
    seeds = {s.spec.seed for s in plan.stages.values() if isinstance(s.spec, QuantizeSpec)}
    assert seeds == {None, 0}


def test_statistics_that_a_rotation_does_not_map_are_collected_in_the_stage(plan_of, tmp_path: Path) -> None:
    short = ("task.params.window=64", "calibration.sequence_length=64")
    plan = plan_of("method=quarot", "scheme=w4a4_channel", "task=self_perplexity", f"model.path={tiny(tmp_path, 'opt')}", *short)
    assert kinds(plan) == {"quantize": 1, "evaluate": 2}
    assert [s.spec.calibration is not None for s in plan.stages.values() if isinstance(s.spec, QuantizeSpec)] == [True]
    flags = next(v.flags for v in plan.variants.values() if v.quantize)
    assert "the quantize stage collects statistics of the rotated model itself: LayerNorms have biases" in flags[0]


def test_a_learned_rotation_reads_text_and_what_is_quantized_at_run_time(plan_of) -> None:
    plan = plan_of("method=learned_rotation", "scheme=w4a4_channel,w4a4kv4_channel", "task=self_perplexity")
    specs = [s.spec for s in plan.stages.values() if isinstance(s.spec, QuantizeSpec)]
    assert kinds(plan) == {"calibrate": 1, "quantize": 2, "evaluate": 3}
    assert all(s.calibration is not None and s.activation is not None for s in specs)
    assert {s.kv is None for s in specs} == {True, False}


def test_a_model_that_cannot_be_rotated_is_refused_with_the_reason(plan_of, tmp_path: Path) -> None:
    folder = tiny(tmp_path, "opt")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "do_layer_norm_before": False}))
    with pytest.raises(PlanError, match="its norms come after the residual sum"):
        plan_of("method=quarot", "scheme=w4a4_channel", "task=self_perplexity", f"model.path={folder}")
    with pytest.raises(PlanError, match="model_type 'gpt2' cannot be rotated: its qkv is fused and stored transposed"):
        plan_of("method=quarot", "scheme=w4a4_channel", "task=self_perplexity", f"model.path={tiny(tmp_path, 'gpt2')}")


ASSET = Path(__file__).resolve().parents[2] / "workers" / "assets" / "wikitext_llama"


def test_model_path_with_several_models_is_refused(plan_of) -> None:
    with pytest.raises(ConfigError, match="single model"):
        plan_of("model=wikitext_llama,stories260k", f"model.path={ASSET}")


def test_a_folder_of_its_own_names_the_model(plan_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is another model than the option's, whose name the table would bear otherwise."""
    folder = shutil.copytree(ASSET, tmp_path / "mine")
    monkeypatch.chdir(folder)
    same = ("method=rtn", "scheme=w4a16_channel", "task=self_perplexity")
    for path in (f"{folder}/", ".", "../mine"):
        labels = [s.label for s in plan_of(*same, f"model.path={path}").stages.values()]
        assert "quantize wikitext_llama[path=mine] rtn w4a16_channel" in labels
    assert "quantize wikitext_llama rtn w4a16_channel" in [s.label for s in plan_of(*same, "model.path=null").stages.values()]


@pytest.mark.parametrize(
    ("swept", "digests", "dtypes"), [("model.path={a},{b}", 2, 1), ("model.dtype=float32,bfloat16 model.path={a}", 1, 2)]
)
def test_models_with_folders_of_their_own_are_compared(swept: str, digests: int, dtypes: int, plan_of, tmp_path: Path) -> None:
    other = shutil.copytree(ASSET, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    overrides = swept.format(a=ASSET, b=other).split()
    plan = plan_of("method=rtn", "scheme=w4a16_channel", "task=self_perplexity", *overrides)
    models = {s.spec.model for s in plan.stages.values() if isinstance(s.spec, EvaluateSpec)}
    assert (len({m.digest for m in models}), len({m.dtype for m in models})) == (digests, dtypes)


@pytest.mark.parametrize(("changed", "version"), [({}, 1), ({"rescale_every": 2}, 2), ({"rescale_every": None}, 2)])
def test_results_of_a_rescaled_rwkv_have_keys_of_their_own(changed: dict, version: int, plan_of, tmp_path: Path) -> None:
    """None is left out of config.json: transformers' default then holds. Stores have results computed with other epsilons."""
    folder = shutil.copytree(tiny_model("rwkv"), tmp_path / "rwkv")
    config = {**json.loads((folder / "config.json").read_text()), **changed}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    plan = plan_of("method=gptq", "scheme=w4a16_channel", "task=self_perplexity", "task.params.window=32", f"model.path={folder}")
    assert kinds(plan) == {"calibrate": 1, "quantize": 1, "evaluate": 2}
    assert {s.spec.model.forward for s in plan.stages.values()} == {version}


def test_missing_model_names_what_is_there(plan_of, tmp_path: Path) -> None:
    (tmp_path / "models" / "other").mkdir(parents=True)
    with pytest.raises(SourceError, match="other"):
        plan_of("model=stories260k", models_dir=tmp_path / "models")


@pytest.mark.parametrize("name", ["models_dir", "data_dir"])
def test_a_folder_that_is_not_there_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"{name}=.*absent is not a folder; correct it, or BITGRID_"):
        Sources(**{"models_dir": None, "data_dir": None, "cache_file": None, name: tmp_path / "absent"})


def test_what_a_given_folder_lacks_is_noted_with_what_is_used_instead(tmp_path: Path) -> None:
    grid = compose_grid(["task=self_perplexity,wikitext2", "task.params.limit=1,2", "calibration=self_text"], multirun=True)
    assert build_plan(grid, Sources(None, None, tmp_path / "digests.json")).notes == []
    notes = build_plan(grid, Sources(tmp_path, tmp_path, tmp_path / "digests.json")).notes
    looked = f"{tmp_path / 'wikitext-llama-6m'} and no {tmp_path / 'wikitext_llama'}"
    assert notes == [
        f"model wikitext_llama: models_dir has no {looked}; the shipped copy is used",
        f"text of task wikitext2: data_dir has no {tmp_path / 'wikitext2' / 'test.jsonl'}; Salesforce/wikitext of the hub is used",
    ]
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.jsonl").write_text('{"text": "some words"}\n')
    assert build_plan(grid, Sources(None, tmp_path, tmp_path / "digests.json")).notes == []


def test_truncated_model_file_is_told_before_anything_runs(plan_of, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(ASSET, tmp_path / "cut"))
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"truncated: expected \d+ bytes, got \d+"):
        plan_of(f"model.path={cut}")


def test_same_content_in_another_folder_has_the_same_keys(plan_of, tmp_path: Path) -> None:
    copy = tmp_path / "models" / "wikitext-llama-6m"
    copy.mkdir(parents=True)
    for path in ASSET.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert set(plan_of().stages) == set(plan_of(models_dir=tmp_path / "models").stages)


def test_unknown_statistic_is_told_with_the_known_ones(plan_of) -> None:
    # Not a choice on the command line: it comes from the yaml of a new method.
    values = compose_grid(["method=gptq"], multirun=True).cells[0].method.values
    sequential = {**values["rounding"], "params": {"true_sequential": True}}
    with pytest.raises(ConfigError, match=r"true_sequential=true does nothing .* set method\.propagation=quantized too"):
        method_part(Option("method", "mine", {**values, "propagation": "original", "rounding": sequential}))
    option = Option("method", "mine", {**values, "rounding": {**values["rounding"], "needs": ["hesian"]}})
    with pytest.raises(PlanError, match="unknown statistic 'hesian'; nearest: hessian; allowed: absmax, absmean, hessian, minmax, samples"):
        method_part(option)


def test_fed_quantization_asks_for_no_stored_statistics(plan_of) -> None:
    plan = plan_of("method=awq", "method.propagation=quantized", "scheme=w4a16_g64", "task=self_perplexity")
    assert kinds(plan) == {"quantize": 1, "evaluate": 2}
    (quantize,) = (s for s in plan.stages.values() if s.kind is StageKind.QUANTIZE)
    assert quantize.inputs == {}
    assert isinstance(quantize.spec, QuantizeSpec)
    assert quantize.spec.calibration is not None


def test_qllm_reads_activations_and_says_where_it_is_idle(plan_of, tmp_path: Path) -> None:
    plan = plan_of("method=qllm,qllm_reassembly", "scheme=w4a4_asym,w6a6_asym,w4a16_channel", "task=self_perplexity")
    assert kinds(plan) == {"calibrate": 2, "quantize": 6, "evaluate": 7}
    flags = [f for v in plan.variants.values() for f in v.flags]
    assert flags == 2 * ["qllm_reassembly is idle without activation quantization"]
    with pytest.raises(PlanError, match="qllm_reassembly does not know the blocks of model_type 'opt'"):
        plan_of("method=qllm", "scheme=w4a4_asym", "task=self_perplexity", f"model.path={tiny(tmp_path, 'opt')}")


def test_a_tuner_feeds_text_whatever_the_propagation(plan_of) -> None:
    """And reads the activation part, so that two of them make two quantize stages."""
    for method, statistics in (("omniquant", set()), ("awq_omniquant", {"absmean", "samples"}), ("learned_rounding", set())):
        plan = plan_of(f"method={method}", "scheme=w4a16_g64,w4a8_g64", "task=self_perplexity")
        stages = [s for s in plan.stages.values() if s.kind == StageKind.QUANTIZE]
        assert len(stages) == 2
        for stage in stages:
            assert stage.spec.calibration is not None
            assert set(stage.inputs) == statistics
        assert {stage.spec.activation is None for stage in stages} == {True, False}
        assert (stages[0].spec.seed is None) is (method != "learned_rounding")


def test_empty_calibration_text_is_told(plan_of, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(SourceError, match="is empty"):
        plan_of("method=gptq", f"calibration.text.path={empty}")


@pytest.mark.parametrize(("mark", "alone"), [("", True), ("\ufeff", False)])
def test_a_text_read_without_its_byte_order_mark_is_not_known_by_its_file_alone(plan_of, tmp_path: Path, mark: str, alone: bool) -> None:
    """Under that digest results of the text with the mark may be kept."""
    path = tmp_path / "text.txt"
    path.write_text(f"{mark}some text\n", encoding="utf-8")
    (digest,) = {s.spec.task.text.digest for s in plan_of(f"task.text.path={path}").stages.values() if isinstance(s.spec, EvaluateSpec)}
    assert file_digest(path).startswith(digest) is alone
