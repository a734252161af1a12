"""Windows that a model has no positions for are told while planning, before calibrate and quantize are paid for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import ConfigError, PlanError
from orchestrator.grid import compose_grid
from orchestrator.plan import build_plan
from orchestrator.planned import Plan
from orchestrator.sources import Sources
from tests.tiny_models import tiny_model
from workers.specs import EvaluateSpec

PlanOf = Callable[..., Plan]
AUTO = ("scheme=auto,w4a16_channel", "budget=5", "scheme.weight.granularity=channel", "scheme.weight.group_size=null")


@pytest.fixture
def plan_of(tmp_path: Path) -> PlanOf:
    """Of a tiny model, which has 128 positions."""

    def make(family: str, *overrides: str) -> Plan:
        grid = compose_grid([f"model.path={tiny_model(family)}", "task=self_perplexity", *overrides], multirun=True)
        return build_plan(grid, Sources(None, None, tmp_path / "digests.json"))

    return make


def named(family: str) -> str:
    return f"wikitext_llama[path={tiny_model(family).name}]"


def fed(plan: Plan, key: str) -> bool:
    """Whether the stage, or one that it needs, is given a calibration text."""
    stage = plan.stages[key]
    return getattr(stage.spec, "calibration", None) is not None or any(fed(plan, k) for k in stage.inputs.values())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_window_beyond_the_positions_is_skipped_with_its_reason(plan_of: PlanOf, family: str) -> None:
    plan = plan_of(family, "method=rtn,gptq", "scheme=w4a16_channel", "task.params.window=128,129", "calibration.sequence_length=64")
    assert {s.cell.task.name for s in plan.skipped} == {"self_perplexity[params.window=129]"}
    said = f"{named(family)}: task.params.window=129 is above the model's 128 positions; use 128 or less"
    assert [s.reason for s in plan.skipped] == [said, said]
    assert len(plan.cells) == 2
    windows = {dict(s.spec.task.params)["window"] for s in plan.stages.values() if isinstance(s.spec, EvaluateSpec)}
    assert windows == {128}
    assert list(plan.tasks) == ["self_perplexity[params.window=128]"]


def test_alone_it_is_refused(plan_of: PlanOf) -> None:
    with pytest.raises(PlanError, match=r"none of the 1 cells asked for is possible:\n.* above the model's 128 positions; use 128 or less"):
        plan_of("llama", "method=rtn", "scheme=w4a16_channel", "task.params.window=129")


@pytest.mark.parametrize("family", ["bloom", "rwkv"])
def test_a_family_without_positions_takes_any_window(plan_of: PlanOf, family: str) -> None:
    plan = plan_of(family, "method=gptq", "scheme=w4a16_channel", "task.params.window=4000", "calibration.sequence_length=4000")
    assert (len(plan.cells), plan.skipped) == (1, [])


@pytest.mark.parametrize(
    "grid",
    [
        ("method=rtn,gptq,gptq_sequential,hqq,awq,smoothquant,omniquant,billm", "scheme=w4a16_channel,w8a8,w8a8_static,w16a16kv4"),
        ("method=rtn,gptq,hqq", *AUTO),
    ],
)
def test_long_samples_skip_exactly_what_is_fed_them(plan_of: PlanOf, grid: tuple[str, ...]) -> None:
    short, long = (plan_of("gpt2", *grid, "task.params.window=64", f"calibration.sequence_length={n}") for n in (128, 129))
    reasons = {s.cell.names()["method"] + s.cell.names()["scheme"]: s.reason for s in long.skipped}
    lost = [c for c in short.cells if c.cell.method.name + c.cell.scheme.name in reasons]
    assert [c.cell.names() for c in lost] == [c.cell.names() for c in short.cells if fed(short, c.evaluate)]
    said = f"{named('gpt2')}: calibration.sequence_length=129 is above the model's 128 learned positions; use 128 or less"
    assert {reasons[c.cell.method.name + c.cell.scheme.name] for c in lost} == {said}
    assert len(long.cells) == len(short.cells) - len(lost)


def test_samples_beyond_positions_that_are_not_learned_go_on(plan_of: PlanOf) -> None:
    plan = plan_of("llama", "method=gptq", "scheme=w4a16_channel", "task.params.window=64", "calibration.sequence_length=129")
    assert (len(plan.cells), plan.skipped) == (1, [])


def test_site_statistics_of_long_samples_are_left_out_and_noted(plan_of: PlanOf) -> None:
    long = ("task.params.window=64", "calibration.sequence_length=129", "site_statistics=true")
    plan = plan_of("gpt2", "method=rtn", "scheme=w4a16_channel", *long)
    assert (len(plan.cells), plan.wanted) == (1, [])
    assert any(f"no site statistics of {named('gpt2')}: calibration.sequence_length=129 is above" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("task.params.window=1", "task 'self_perplexity': params.window=1; give a whole number from 2"),
        ("task.params.window=null", "params.window=None; give a whole number from 2"),
        ("task.params.window=-4", "params.window=-4; give a whole number from 2"),
        ("task.params.limit=0", "params.limit=0; give a whole number from 1"),
        ("task.params.limit=2.5", "params.limit=2.5"),
        ("task.params.max_windows=0", "params.max_windows=0; give a whole number from 1"),
        ("task.text.documents=0", "task 'self_perplexity': text.documents=0; give a whole number from 1"),
        ("calibration.text.documents=-1", "calibration 'self_text': text.documents=-1; give a whole number from 1"),
        ("calibration.text.skip_documents=-1", "calibration 'self_text': text.skip_documents=-1; give a whole number from 0"),
    ],
)
def test_sizes_that_leave_no_text_or_count_from_its_end_are_refused(plan_of: PlanOf, override: str, said: str) -> None:
    fits = [o for o in ("calibration.sequence_length=64", "task.params.window=64") if o.split("=")[0] != override.split("=")[0]]
    with pytest.raises(ConfigError) as error:
        plan_of("llama", "method=gptq", "scheme=w4a16_channel", *fits, override)
    assert said in str(error.value)
