"""Which sweep a verb means, and where the store is: copies, starts of keys, damaged plans, paths with quotes."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator import run, verbs
from orchestrator.command import Command
from orchestrator.errors import StoreError
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.run import run_grid
from orchestrator.store import Store
from orchestrator.sweeps import find_sweep
from tests.orchestrator.small_stages import small_stage
from tests.orchestrator.sweeping import overrides, sweep
from workers.artifact import sealed


@pytest.fixture(autouse=True)
def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "open_executor", lambda settings: InProcessExecutor(runner=small_stage))


def test_the_sweep_started_last_is_the_latest_in_a_copy_too(tmp_path: Path) -> None:
    store, copy = tmp_path / "store", tmp_path / "copy"
    first = sweep(store, "method=rtn").result.key
    second = sweep(store, "method=rtn", "scheme=w8a16_channel").result.key
    shutil.copytree(store, copy)
    for i, key in enumerate((second, first)):
        os.utime(copy / "sweeps" / key / "started.json", (i, i))
    assert Store(copy).sweep_keys() == [second, first]


def test_a_start_of_several_keys_is_refused_unless_it_is_a_name(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    made = sweep(store.root, "method=rtn").result.key
    twin = made[:4] + ("0" if made[4] != "0" else "1") + made[5:]
    shutil.copytree(store.sweep_folder(made), store.sweep_folder(twin))
    with pytest.raises(StoreError, match=f"(?s)not the only one.*{twin[:8]}"):
        find_sweep(store, made[:4])
    plan = json.loads((store.sweep_folder(twin) / "plan.json").read_text())
    (store.sweep_folder(twin) / "plan.json").write_text(json.dumps(sealed({**plan, "name": made[:4]})))
    assert find_sweep(store, made[:4]) == twin
    assert find_sweep(store, made[:5]) == made
    (store.sweep_folder(twin) / "plan.json").write_text(json.dumps(sealed({**plan, "name": made[:5]})))
    assert find_sweep(store, made[:5]) == twin  # as `c4` may be both
    assert find_sweep(store, made[:8]) == made


def test_sweeps_that_differ_in_what_all_their_cells_share_have_names_of_their_own(tmp_path: Path) -> None:
    store, damp = Store(tmp_path / "store"), "method.rounding.params.damp"
    plain = sweep(store.root, "method=gptq").result
    low, high = (sweep(store.root, "method=gptq", f"{damp}={d}").result for d in (0.05, 0.1))
    wikitext, swept = (sweep(store.root, "method=gptq", *more).result for more in (("calibration.seed=3",), (f"{damp}=0.05,0.2",)))
    head, common = plain.name.split(" · ")
    assert (head, common) == ("wikitext_llama × gptq × w4a16_g64 × self_perplexity", low.name.split(" · ")[1].rpartition(", ")[0])
    assert common.split(", ") == ["task.params.limit=2", "calibration=self_text", "calibration.samples=2", "calibration.sequence_length=64"]
    assert [r.name.rpartition(", ")[2] for r in (low, high, wikitext)] == [f"{damp}=0.05", f"{damp}=0.1", "calibration.seed=3"]
    assert swept.name == f"{head.replace('gptq', 'gptq[rounding.params.damp=0.05],gptq[rounding.params.damp=0.2]')} · {common}"
    assert [find_sweep(store, r.name) for r in (low, high, plain)] == [low.key, high.key, plain.key]
    with pytest.raises(StoreError, match="not the only one, the latest first:") as told:
        find_sweep(store, head)
    lines = [f"  {r.key[:8]} {r.name}" for r in (wikitext, high, low, plain)]
    assert str(told.value).splitlines()[1:] == [*lines, "give its key"]


def test_the_same_grid_in_other_words_keeps_its_name(tmp_path: Path) -> None:
    first = sweep(tmp_path / "store", "method=gptq").result
    again = sweep(tmp_path / "store", "method=gptq", "method.rounding.params.damp=0.01").result
    assert (again.key, again.name) == (first.key, first.name)
    named = sweep(tmp_path / "store", "method=gptq", "sweep.name=mine").result
    assert (named.key, named.name.partition(" · ")[0]) == (first.key, "mine")
    assert find_sweep(Store(tmp_path / "store"), "mine") == first.key


def test_resume_finds_a_store_whose_path_has_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "it's a “spâce”\\"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("BITGRID_STORE", "store")
    given = [o for o in overrides(Path("store"), "method=rtn") if not o.startswith("store=")]
    command = Command(tuple(given), multirun=True)
    assert run_grid(command.compose(), command, Console(file=io.StringIO())).exit_code == 0
    said = io.StringIO()
    code = verbs.resume(home / "store", None, Console(file=said, width=200))
    assert (code, "to run: nothing" in said.getvalue()) == (0, True)


@pytest.mark.parametrize("content", ["", "[]", '{"key": "', '{"name": "a"}', None])
def test_a_damaged_plan_is_told_and_written_anew_by_the_next_run(content: str | None, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    key, other = sweep(store.root, "method=rtn").result.key, sweep(store.root, "method=rtn", "scheme=w8a16_channel").result.key
    plan = store.sweep_folder(key) / "plan.json"
    whole = json.loads(plan.read_text())
    plan.write_text(json.dumps(whole)[:500] if content is None else content)
    with pytest.raises(StoreError, match=r"plan\.json .*start the sweep again"):
        verbs.status(store.root, key, Console(file=io.StringIO()))
    assert find_sweep(store, whole["name"].replace("w4a16_g64", "w8a16_channel")) == other
    said = io.StringIO()
    assert verbs.reconcile(store.root, None, (), Console(file=said, width=200)) == 1
    assert f"{key[:8]} left out" in said.getvalue()
    assert sweep(store.root, "method=rtn").exit_code == 0
    assert json.loads(plan.read_text())["variants"] == whole["variants"]


def test_a_plan_that_gives_a_variant_another_name_is_told(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    key = sweep(store.root, "method=rtn").result.key
    plan = store.sweep_folder(key) / "plan.json"
    whole = json.loads(plan.read_text())
    plan.write_text(plan.read_text().replace('"rtn"', '"stn"'))
    with pytest.raises(StoreError, match=r"plan\.json is not what was written.*start the sweep again"):
        verbs.status(store.root, key, Console(file=io.StringIO()))
    # Earlier versions wrote no digest.
    plan.write_text(json.dumps({name: value for name, value in whole.items() if name != "digest"}))
    assert verbs.status(store.root, key, Console(file=io.StringIO())) == 0


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"command": []}', '{"command": {"overrides": 3, "jobs": null}}'])
def test_a_damaged_command_is_told_and_written_anew_by_the_next_run(content: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    key = sweep(store.root, "method=rtn").result.key
    started = store.sweep_folder(key) / "started.json"
    started.write_text(content)
    with pytest.raises(StoreError, match=r"started\.json .*start the sweep again"):
        verbs.resume(store.root, key, Console(file=io.StringIO()))
    assert sweep(store.root, "method=rtn").exit_code == 0
    assert verbs.resume(store.root, key, Console(file=io.StringIO())) == 0
