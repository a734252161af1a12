"""Site statistics cost one calibrate stage per model and calibration draw, rerun nothing, and stand in the report."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from orchestrator.errors import ConfigError
from orchestrator.explain import explain
from orchestrator.grid import compose_grid
from orchestrator.plan import build_plan
from orchestrator.planned import Plan
from orchestrator.report import write_report
from orchestrator.report.sites import read_series
from orchestrator.run import missing_stages
from orchestrator.sources import Sources
from orchestrator.store import Store
from orchestrator.sweeps import load_sweep
from tests.orchestrator import synthetic
from tests.orchestrator.sweeping import committed, overrides, sweep, told
from tests.orchestrator.test_report import Page, without_plotly
from tests.tiny_models import tiny_model
from workers.artifact import payload_files, sealed
from workers.specs import StageKind

ON = "site_statistics=true"


def line(*more: str) -> tuple[str, ...]:
    """A sweep of one cell on a tiny model."""
    return (f"model.path={tiny_model('llama')}", "method=rtn", "scheme=w4a16_channel", "task.params.window=64", *more)


def kinds(plan: Plan) -> dict[str, int]:
    return dict(Counter(s.kind.value for s in plan.stages.values()))


@pytest.mark.parametrize(
    ("grid", "draws", "without"),
    [
        (("method=rtn,gptq", "scheme=w4a16_g64,w3a16_g64"), 1, {"calibrate": 1, "quantize": 4, "evaluate": 5}),
        # Data-free variants share their stages over replicates; the draws are three all the same.
        (("method=rtn", "scheme=w4a16_g64", "replicate=r0,r1,r2"), 3, {"quantize": 1, "evaluate": 2}),
        (("method=gptq", "scheme=w4a16_g64", "calibration.samples=2,4"), 2, {"calibrate": 2, "quantize": 2, "evaluate": 3}),
        (("model.dtype=float32,bfloat16", "method=rtn", "scheme=w4a16_channel"), 2, {"quantize": 2, "evaluate": 4}),
    ],
)
def test_one_stage_for_each_model_and_calibration_draw(plan_of, grid: tuple[str, ...], draws: int, without: dict[str, int]) -> None:
    old, new = plan_of(*grid), plan_of(*grid, ON)
    assert (kinds(old), old.wanted) == (without, [])
    assert kinds(new) == {**without, "calibrate": without.get("calibrate", 0) + draws}
    assert set(new.stages) - set(old.stages) == set(new.wanted)
    assert len(new.wanted) == draws
    assert new.key == old.key
    assert [k for k in new.stages if k not in new.wanted] == list(old.stages)


def test_a_family_that_is_not_known_has_none_and_the_plan_says_so(plan_of, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model("llama"), tmp_path / "odd")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "odd"}))
    scheme = ("scheme=w4a16_g64", "scheme.weight=null")
    plan = plan_of(f"model.path={model}", "method=rtn", *scheme, "task.params.window=64", ON)
    assert kinds(plan) == {"evaluate": 1}
    assert any("no site statistics of wikitext_llama[path=odd]: model_type 'odd'" in note for note in plan.notes)


def test_it_belongs_to_the_sweep() -> None:
    with pytest.raises(ConfigError, match="site_statistics cannot be swept: it adds a section to the report"):
        compose_grid(["site_statistics=true,false"], multirun=True)
    with pytest.raises(ConfigError, match="expected true or false"):
        compose_grid(["site_statistics=often"], multirun=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A store with a sweep that was run without site statistics and then with them; what the first run had committed."""
    store = tmp_path_factory.mktemp("sites") / "store"
    assert sweep(store, *line()).exit_code == 0
    before = committed(store)
    run = sweep(store, *line(ON))
    assert run.exit_code == 0
    assert Counter(s.kind for s in run.result.stages.values() if s.key in run.plan.wanted) == {"calibrate": 1}
    return store, before


def test_turning_it_on_runs_one_stage_and_no_other(finished: tuple[Path, dict[str, float]]) -> None:
    store, before = finished
    after = committed(store)
    assert {k: after[k] for k in before} == before
    assert len(after) == len(before) + 1


def test_a_plan_without_the_list_is_read_and_its_page_has_no_section(finished: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    root = Path(shutil.copytree(finished[0], tmp_path / "store"))
    store = Store(root).open(create=False)
    (key,) = store.sweep_keys()
    assert "What the tensors look like" in (store.sweep_folder(key) / "report.html").read_text(encoding="utf-8")
    path = store.sweep_folder(key) / "plan.json"
    plan = json.loads(path.read_text())
    gone = plan.pop("wanted")
    plan["stages"] = {k: s for k, s in plan["stages"].items() if k not in gone}
    path.write_text(json.dumps(sealed(plan)))
    page = write_report(load_sweep(store, key), tmp_path / "report").html.read_text(encoding="utf-8")
    assert "What the tensors look like" not in page


def test_a_corrupt_artifact_is_missed_and_the_page_stands_without_it(finished: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    root = Path(shutil.copytree(finished[0], tmp_path / "store"))
    store = Store(root).open(create=False)
    (key,) = store.sweep_keys()
    grid = compose_grid(overrides(root, *line(ON)), multirun=True)
    plan = build_plan(grid, Sources(None, None, None))
    assert plan.key == key
    assert missing_stages(plan, store) == {}
    (wanted,) = plan.wanted
    file = store.folder(StageKind.CALIBRATE, wanted) / "payload" / "moments.parquet"
    file.write_bytes(file.read_bytes()[:-3] + b"odd")
    assert list(missing_stages(plan, store)) == [wanted]
    assert [e.reason for e in explain(plan, store) if e.stage.key == wanted] == ["its artifact is corrupt"]
    page = write_report(load_sweep(store, key), tmp_path / "report").html.read_text(encoding="utf-8")
    assert "What the tensors look like" not in page


def rows(blocks: int) -> list[dict[str, Any]]:
    """Kurtosis 3 + block everywhere, absmax / σ twice that; block 1's expert 2 and the keys of block 0 stand out."""
    sites = [
        ("input", "self_attn.q_proj", "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"),
        *(("input", f"mlp.experts.down_proj.{e}", f"mlp.experts.down_proj.{e}") for e in range(3)),
        ("weight", "self_attn.q_proj", ""),
        ("keys", "keys", ""),
    ]
    made = []
    for b in range(blocks):
        for kind, site, linears in sites:
            value = 3.0 + b + 100 * ((b, site) in ((1, "mlp.experts.down_proj.2"), (0, "keys")))
            spread = kind != "weight"
            place = {"block": b, "kind": kind, "site": site, "module": f"model.layers.{b}.{site}", "linears": linears}
            numbers = {"kurtosis": value if spread else None, "absmax_sigma": 2 * value if spread else None}
            made.append({**place, "count": 10, "mean": 0.0, "std": 1.0, "absmax": 2.0, **numbers})
    return made


def with_moments(root: Path, models: tuple[str, ...] = ("wikitext_llama",), seeds: tuple[int, ...] = (0,)) -> Any:
    result = synthetic.sweep(root, models=models, methods=("rtn",), schemes=("w4a16_g64",), tasks=(synthetic.PERPLEXITY,))
    table = {k: [r[k] for r in rows(3)] for k in rows(1)[0]}
    stages = dict(result.stages)
    for model in models:
        for seed in seeds:
            spec = {"model": {"digest": synthetic.key_of("model", model)}, "statistic": "moments", "calibration": {"seed": seed}}
            stage = synthetic.write_stage(
                root,
                "calibrate",
                f"calibrate {model} self_text moments",
                summary={"tokens": 4096},
                tables={"moments.parquet": table},
                spec=spec,
                key=synthetic.key_of("moments", model, seed),
            )
            stages[stage.key] = stage
    return replace(result, stages=stages)


def test_the_section_shows_medians_and_names_the_worst_block(tmp_path: Path) -> None:
    result = with_moments(tmp_path)
    page = Page(without_plotly(write_report(result, tmp_path / "report").html.read_text(encoding="utf-8")))
    found = {r[0][0]: [t for t, _ in r[1:]] for r in page.rows if r and r[0][0].startswith(("input of", "weight of", "keys"))}
    assert found == {
        "input of self_attn.q_proj, k_proj, v_proj": ["4.00", "5.00block 2", "8.00", "10.0block 2"],
        # nine values: 3, 3, 3, 4, 4, 5, 5, 5, 104
        "input of mlp.experts.down_proj.*": ["4.00", "104block 1, expert 2", "8.00", "208block 1, expert 2"],
        "weight of self_attn.q_proj": ["–"] * 4,
        "keys": ["5.00", "103block 0", "10.0", "206block 0"],
    }
    kurtosis = page.figures["site-kurtosis-0"]["data"]
    assert {t["name"]: (t["x"], t["y"]) for t in kurtosis} == {  # type: ignore[index]
        "input of self_attn.q_proj, k_proj, v_proj": ([0, 1, 2], [3, 4, 5]),
        "input of mlp.experts.down_proj.*": ([0, 1, 2], [3, 104, 5]),
        "keys": ([0, 1, 2], [103, 4, 5]),
    }
    assert page.figures["site-absmax-sigma-0"]["data"][2]["y"] == [206, 8, 10]  # type: ignore[index]
    assert "on 4096 tokens of self_text, seed 0." in " ".join(page.text)


def test_figures_are_valid_and_each_model_has_its_own(tmp_path: Path) -> None:
    import plotly.graph_objects as go

    result = with_moments(tmp_path, models=("wikitext_llama", "opt"), seeds=(0, 1))
    files = write_report(result, tmp_path / "report")
    page = Page(without_plotly(files.html.read_text(encoding="utf-8")))
    sites = {k: v for k, v in page.figures.items() if k.startswith("site-")}
    assert sorted(sites) == [f"site-{c}-{i}" for c in ("absmax-sigma", "kurtosis") for i in (0, 1)]
    for spec in sites.values():
        go.Figure(spec)
    assert " ".join(page.text).count("On another calibration draw: self_text, seed 1") == 2
    only = {"methods": ("rtn",), "schemes": ("w4a16_g64",), "tasks": (synthetic.PERPLEXITY,)}
    plain = synthetic.sweep(tmp_path / "plain", models=("wikitext_llama", "opt"), **only)
    other = write_report(plain, tmp_path / "other")
    assert (files.csv.read_bytes(), files.parquet.read_bytes()) == (other.csv.read_bytes(), other.parquet.read_bytes())
    assert "What the tensors look like" not in other.html.read_text(encoding="utf-8")


def test_the_page_of_a_real_sweep_shows_what_was_collected(finished: tuple[Path, dict[str, float]]) -> None:
    store = Store(finished[0]).open(create=False)
    (key,) = store.sweep_keys()
    result = load_sweep(store, key)
    (stage,) = (s for s in result.stages.values() if (s.spec or {}).get("statistic") == "moments")
    assert stage.payload is not None
    table = pq.read_table(stage.payload / "moments.parquet").to_pylist()
    page = (store.sweep_folder(key) / "report.html").read_text(encoding="utf-8")
    shown = sorted(float(x) for x in re.findall(r'data-kurtosis="([^"]+)"', page))
    largest: dict[tuple[str, str], float] = {}
    for row in table:
        place = (row["kind"], row["site"])
        largest[place] = max(largest.get(place, 0.0), row["kurtosis"])
    assert shown == sorted(largest.values())
    assert {s.kind for s in read_series(stage)} == {"input", "weight", "keys", "values"}
    assert sum(f["bytes"] for f in payload_files(stage.payload.parent).values()) < 100_000


def test_a_run_says_what_it_leaves_out(tmp_path: Path) -> None:
    """As `bitgrid plan` does: RTN reads no text, so that the cell runs, and site statistics are missing from its report."""
    _, said = told(tmp_path / "store", f"model.path={tiny_model('opt')}", *line(ON, "calibration.sequence_length=4096")[1:])
    assert re.search(r"^note: no site statistics of wikitext_llama\[path=.*\]: .*4096", said, re.MULTILINE)
    assert "1 cell, 3 stages;" in said
