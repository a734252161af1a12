"""Overrides per linear become a full table of rules, which is what is hashed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import ConfigError, PlanError
from orchestrator.grid import compose_grid
from orchestrator.plan import build_plan
from orchestrator.planned import Plan
from orchestrator.sources import Sources
from workers.specs import QuantizeSpec, Rule, StageKind

PlanOf = Callable[..., Plan]


@pytest.fixture
def plan_of(tmp_path: Path) -> PlanOf:
    def make(*overrides: str) -> Plan:
        grid = compose_grid(["task=self_perplexity", *overrides], multirun=False)
        return build_plan(grid, Sources(None, None, tmp_path / "digests.json"))

    return make


def table(plan: Plan) -> dict[str, Rule]:
    (spec,) = [s.spec for s in plan.stages.values() if s.kind is StageKind.QUANTIZE]
    assert isinstance(spec, QuantizeSpec)
    return {r.pattern: r for r in spec.rules}


def key(plan: Plan) -> str:
    return next(k for k, s in plan.stages.items() if s.kind is StageKind.QUANTIZE)


def test_without_overrides_one_rule_serves_all(plan_of: PlanOf) -> None:
    assert list(table(plan_of("method=gptq", "scheme=w4a16_g64"))) == ["*"]


def test_the_last_match_wins_and_the_table_is_full(plan_of: PlanOf) -> None:
    plan = plan_of(
        "method=rtn",
        "scheme=w4a16_g64",
        "+scheme.overrides={*.down_proj:{bits:8},model.layers.0.*:{bits:6,group_size:32},*.1.*.q_proj:null}",
    )
    rules = table(plan)
    assert len(rules) == 6 * 7 - 1
    assert rules["model.layers.0.mlp.down_proj"].weight.bits == 6
    assert rules["model.layers.0.mlp.down_proj"].weight.group_size == 32
    assert rules["model.layers.1.mlp.down_proj"].weight.bits == 8
    assert rules["model.layers.1.mlp.up_proj"].weight.bits == 4
    assert "model.layers.1.self_attn.q_proj" not in rules


def test_two_ways_to_say_one_table_have_one_key(plan_of: PlanOf) -> None:
    one = plan_of("method=rtn", "scheme=w4a16_g64", "+scheme.overrides={*.self_attn.*:{bits:8}}")
    other = plan_of("method=rtn", "scheme=w4a16_g64", "+scheme.overrides={*.?_proj:{bits:8}}")
    assert key(one) == key(other)
    assert key(one) != key(plan_of("method=rtn", "scheme=w4a16_g64", "+scheme.overrides={*.q_proj:{bits:8}}"))


def test_parameters_of_the_rounding_differ_by_linear(plan_of: PlanOf) -> None:
    rules = table(plan_of("method=gptq", "scheme=w4a16_g64", "+method.overrides={*.o_proj:{damp:0.1}}"))
    assert {dict(r.method.rounding.params)["damp"] for n, r in rules.items() if n.endswith("o_proj")} == {0.1}
    assert {dict(r.method.rounding.params)["damp"] for n, r in rules.items() if not n.endswith("o_proj")} == {0.01}


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("+scheme.overrides={*.dwn_proj:{bits:8}}", PlanError, ["'*.dwn_proj' matches no linear of wikitext_llama", "down_proj"]),
        ("+scheme.overrides={*.down_proj:{bit:8}}", ConfigError, ["bit", "nearest: bits"]),
        ("+scheme.overrides={*.down_proj:{bits:11}}", ConfigError, ["weight.bits=11 is not between 1 and 8"]),
        ("+scheme.overrides={*.down_proj:8}", ConfigError, ["give a mapping of changes"]),
        ("+scheme.overrides={*:null}", PlanError, ["leave no linear"]),
        ("+method.overrides={*.dwn_proj:{damp:0.1}}", PlanError, ["'*.dwn_proj' matches no linear"]),
        ("+method.overrides={*.down_proj:{dump:8}}", ConfigError, ["dump", "nearest: damp"]),
        ("+scheme.overrides={*.down_proj:{group_size:100}}", PlanError, ["group size 100 does not divide 768 inputs (6 linears"]),
    ],
)
def test_wrong_overrides_say_what_is_allowed(plan_of: PlanOf, override: str, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as e:
        plan_of("method=gptq", "scheme=w4a16_g64", override)
    assert all(w in str(e.value) for w in words), str(e.value)


def test_every_method_takes_overrides(plan_of: PlanOf) -> None:
    grid = compose_grid(["method=glob(*)", "+method.overrides={*.q_proj:null}"], multirun=True)
    assert len(grid.cells) > 30
    assert all(c.method.values["overrides"] == {"*.q_proj": None} for c in grid.cells)
    rules = table(plan_of("method=hqq", "+method.overrides={*.q_proj:{iters:3}}"))
    assert {n for n, r in rules.items() if dict(r.method.rounding.params)["iters"] == 3} == {n for n in rules if n.endswith("q_proj")}


def test_linears_of_a_tuner_have_one_set_of_parameters_or_are_left_alone(plan_of: PlanOf) -> None:
    names = table(plan_of("method=omniquant", "+method.overrides={*.q_proj:null}"))
    assert len(names) == 6 * 6
    with pytest.raises(ConfigError, match="omniquant treats linears together, with one set of parameters; give null"):
        plan_of("method=omniquant", "+method.overrides={*.q_proj:{epochs:1}}")


BITS = "method.rounding.params"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("method=claq", "scheme=w3a16_channel", f"{BITS}.layer_bits={{*.dwn_proj:4}}"), ["layer_bits: '*.dwn_proj'", "mlp.down_proj"]),
        (("method=slim_llm", "scheme=w2a16_g64", f"{BITS}.bit_lists={{*.down_proj:[2,2]}}"), ["bit_lists: '*.down_proj'", "mlp.down_proj"]),
        (("method=slim_llm", "scheme=w2a16_g64", f"{BITS}.bit_lists={{model.layers.9.mlp.up_proj:[2,2]}}"), ["bit_lists", "layers.9"]),
    ],
)
def test_bits_per_linear_name_linears_of_the_model(plan_of: PlanOf, line: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(PlanError) as e:
        plan_of(*line)
    assert all(w in str(e.value) for w in words), str(e.value)


def test_patterns_and_names_of_bits_per_linear_are_taken(plan_of: PlanOf) -> None:
    bits = "{*.down_proj:4,model.layers.0.mlp.up_proj:2}"
    (rule,) = table(plan_of("method=claq", "scheme=w3a16_channel", f"{BITS}.layer_bits={bits}")).values()
    assert dict(rule.method.rounding.params)["layer_bits"] == (("*.down_proj", 4), ("model.layers.0.mlp.up_proj", 2))
    plan_of("method=slim_llm", "scheme=w2a16_g64", f"{BITS}.bit_lists={{model.layers.0.mlp.up_proj:[2,2]}}")


# --- automatic bits -------------------------------------------------------------------------------------------------


def test_automatic_bits_plan_a_table_made_from_shared_candidates(tmp_path: Path) -> None:
    def plan(*words: str) -> Plan:
        grid = compose_grid(["task=self_perplexity", "method=gptq", *words], multirun=True)
        return build_plan(grid, Sources(None, None, tmp_path / "digests.json"))

    auto = plan("scheme=auto", "scheme.auto.budget=3.2,4.0", "scheme.auto.bits=[2,3,4]")
    kinds = [s.kind for s in auto.stages.values()]
    assert kinds.count(StageKind.PREPARE) == 1  # both budgets read one table
    assert kinds.count(StageKind.QUANTIZE) == 3 + 2
    assert kinds.count(StageKind.CALIBRATE) == 1
    assert key(plan("scheme=w3a16_g64")) in auto.stages


def test_a_budget_names_its_variant_however_it_is_given(plan_of: PlanOf, tmp_path: Path) -> None:
    def named(plan: Plan) -> dict[str, tuple[str, str]]:
        return {v.key: (v.label, v.axes["scheme"]) for v in plan.variants.values() if v.quantize}

    grid = compose_grid(["task=self_perplexity", "method=rtn", "scheme=auto", "scheme.auto.budget=3.2,4.5"], multirun=True)
    swept = named(build_plan(grid, Sources(None, None, tmp_path / "digests.json")))
    assert sorted(scheme for _, scheme in swept.values()) == ["auto[auto.budget=3.2]", "auto[auto.budget=4.5]"]
    assert all(label.endswith(f"rtn · {scheme}") for label, scheme in swept.values())
    for given in ("budget=3.2", "scheme.auto.budget=3.2"):
        one = named(plan_of("method=rtn", "scheme=auto", given))
        assert len(one) == 1
        assert one.items() <= swept.items()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["scheme=w4a16_g64", "budget=3.2"], ["budget=3.2 is read by no scheme of the grid, which has w4a16_g64; choose scheme=auto"]),
        (["scheme=auto", "budget=3.2", "scheme.auto.budget=4"], ["budget=3.2 is read by no scheme"]),
        (["scheme=auto"], ["auto.budget=None", "as budget=3.2"]),
        (["scheme=auto", "scheme.auto.budget=nan"], ["auto.budget=nan", "as budget=3.2"]),
        (["scheme=auto", "budget=inf"], ["budget=inf", "as budget=3.2"]),
        (["scheme=auto", "budget=1.5"], ["not above the smallest width, 2"]),
        (["scheme=auto", "budget=3", "scheme.auto.bits=[4]"], ["at least two different widths"]),
        (["scheme=auto", "budget=3", "method=awq"], ["automatic bits work with methods without transforms"]),
        (["scheme=auto", "budget=3", "scheme.auto.bits=[2,9]"], ["weight.bits=9"]),
    ],
)
def test_wrong_automatic_bits_say_what_is_allowed(plan_of: PlanOf, overrides: list[str], words: list[str]) -> None:
    with pytest.raises((ConfigError, PlanError)) as e:
        plan_of(*overrides)
    assert all(w in str(e.value) for w in words), str(e.value)
