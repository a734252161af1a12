"""Methods and schemes that do not go together, or with a model: skipped with the reason while planning, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.errors import ConfigError, PlanError

ASSET = Path(__file__).resolve().parents[2] / "workers" / "assets" / "wikitext_llama"


def odd_model(folder: Path, like: Path) -> Path:
    """The shipped model's files under another width of the feed-forward, which no group of 64 divides."""
    model = folder / "odd"
    model.mkdir(parents=True)
    for path in like.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 172}))
    return model


def test_group_that_does_not_divide_is_skipped_with_its_reason(plan_of, tmp_path: Path) -> None:
    odd = odd_model(tmp_path, ASSET)
    plan = plan_of("method=rtn", "scheme=w4a16_g64,w4a16_channel", f"model.path={odd}")
    assert [s.cell.scheme.name for s in plan.skipped] == ["w4a16_g64"]
    assert "64 does not divide 172" in plan.skipped[0].reason
    assert len(plan.cells) == 1


def test_impossible_cell_alone_is_refused(plan_of, tmp_path: Path) -> None:
    odd = odd_model(tmp_path, ASSET)
    with pytest.raises(PlanError, match="64 does not divide 172"):
        plan_of("method=rtn", "scheme=w4a16_g64", f"model.path={odd}")


def test_what_cannot_be_cut_into_groups_is_skipped_and_what_can_is_not(plan_of, tmp_path: Path) -> None:
    """quip_sharp codes 8 inputs together whatever the scheme; groups along HQQ's axis 0 are of the whole weight."""
    odd = f"model.path={odd_model(tmp_path, ASSET)}"
    plan = plan_of("method=rtn,quip_sharp", "scheme=w4a16_channel", odd)
    assert [s.cell.method.name for s in plan.skipped] == ["quip_sharp"]
    assert "8 weights that quip_sharp codes together do not divide 172 inputs" in plan.skipped[0].reason
    along = ("method=hqq", odd, "method.rounding.params.axis=0,1", "scheme=w4a16_g64")
    assert [s.cell.method.name for s in plan_of(*along).skipped] == ["hqq[rounding.params.axis=1]"]
    with pytest.raises(PlanError, match=r"group size 64 does not divide 172 inputs"):
        plan_of("method=hqq", "+transform@method.transforms.awq=awq", odd, "method.rounding.params.axis=0", "scheme=w4a16_g64")
    with pytest.raises(PlanError, match=r"group size 7 does not divide .* weights, as axis=0 needs"):
        plan_of("method=hqq", odd, "method.rounding.params.axis=0", "scheme=w4a16_g64", "scheme.weight.group_size=7")


def test_groups_are_asked_of_every_part_of_a_method_that_has_them(plan_of, tmp_path: Path) -> None:
    """awq searches in groups of inputs; pb_llm's may be ragged, those along HQQ's axis 0 are others, and scales and rotations have none."""
    odd = f"model.path={odd_model(tmp_path, ASSET)}"
    for method, scheme in (("pb_llm",), "w1a16_g128"), (("hqq", "method.rounding.params.axis=0"), "w4a16_g64"):
        given = [f"method={method[0]}", *method[1:], f"scheme={scheme}", odd]
        for transform in ("smoothquant", "quarot", "learned_rotation"):
            assert not plan_of(*given, f"+transform@method.transforms.t={transform}").skipped
        with pytest.raises(PlanError, match=r"group size \d+ does not divide 172 inputs"):
            plan_of(*given, "+transform@method.transforms.t=awq")
        with pytest.raises(PlanError, match=r"group size \d+ does not divide 172 inputs"):  # its search rounds to nearest
            plan_of(*given, "+transform@method.transforms.t=learned_rotation", "method.transforms.t.params.weights=true")


def test_columns_kept_beside_codes_of_a_number_format_are_skipped(plan_of) -> None:
    plan = plan_of("method=owq", "scheme=w8a16_channel,w8fpa16_channel")
    assert [s.cell.scheme.name for s in plan.skipped] == ["w8fpa16_channel"]
    assert "owq: outlier_columns=4 works with integer codes; weight.number=fp8_e4m3 has none" in plan.skipped[0].reason
    assert not plan_of("method=owq", "scheme=w8fpa16_channel", "method.rounding.params.outlier_columns=0").skipped
    with pytest.raises(PlanError, match=r"weight\.number=fp8_e4m3 has none"):
        plan_of("method=owq", "scheme=w8a16_channel", "+scheme.overrides={*.q_proj:{number:fp8_e4m3,symmetric:true}}")


def test_awqs_clip_search_is_skipped_where_a_tensor_has_one_scale(plan_of) -> None:
    one = ("scheme=w8a16_channel", "scheme.weight.granularity=channel,tensor")
    plan = plan_of("method=rtn,awq,hqq", "+transform@method.transforms.before=awq", *one)
    assert len(plan.cells) == len(plan.skipped) == 3
    assert all("awq's clip search works per group or channel" in s.reason for s in plan.skipped)
    assert not plan_of("method=awq", "method.transforms.awq.params.clip_search=false", *one).skipped


@pytest.mark.parametrize(("method", "added"), [("awq", "quarot"), ("quarot", "learned_rotation")])
def test_a_transform_of_the_whole_model_that_does_not_come_first_is_refused(method: str, added: str, plan_of) -> None:
    with pytest.raises(ConfigError, match=f"{added} rewrites the whole model: it must be the first transform; got {method}, {added}"):
        plan_of(f"method={method}", f"+transform@method.transforms.more={added}")


def test_a_refusal_by_a_part_of_a_method_names_the_option_that_the_grid_has(plan_of) -> None:
    """AWQ's and SmoothQuant's rounding is RTN."""
    plan = plan_of("method=rtn,awq,smoothquant", "scheme=w1a16_channel,w4a16_channel")
    refused = "rtn does not make weight.bits=1; it makes 2, 3, 4, 5, 6, 7, 8"
    assert {s.cell.method.name: s.reason for s in plan.skipped} == {
        "rtn": refused,
        "awq": f"method awq: {refused}",
        "smoothquant": f"method smoothquant: {refused}",
    }
