"""Artifacts of a finished sweep that are lost or damaged: what is still read is made again, and nothing else."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator import run
from orchestrator.command import Command
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.preview import print_explanations, print_plan
from orchestrator.stage import Status
from orchestrator.store import Store
from tests.orchestrator.sweeping import committed, overrides, scores, sweep
from tests.orchestrator.test_store import a_stage, an_outcome
from tests.orchestrator.test_verbs import small_stage
from workers.artifact import RECORD

ALL = ("method=rtn,gptq", "scheme=w4a16_g64")


@pytest.fixture(autouse=True)
def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "open_executor", lambda settings: InProcessExecutor(runner=small_stage))


def without(record: Path, key: str) -> None:
    content = json.loads(record.read_text())
    del content[key]
    record.write_text(json.dumps(content))


def flipped(record: Path) -> None:
    """One bit of the time at which the stage ended: still a number, and JSON."""
    text = record.read_text()
    place = text.index('"ended": ') + len('"ended": ')
    record.write_text(text[:place] + chr(ord(text[place]) ^ 2) + text[place + 1 :])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "the artifact is gone": shutil.rmtree,
    "the record is gone": lambda folder: (folder / RECORD).unlink(),
    "the record is cut off": lambda folder: (folder / RECORD).write_text("{"),
    "the record is none": lambda folder: (folder / RECORD).write_text("[]"),
    "the record is empty": lambda folder: (folder / RECORD).write_text("{}"),
    "the record lacks its end": lambda folder: without(folder / RECORD, "ended"),
    "a number of the record is another": lambda folder: flipped(folder / RECORD),
    "a table is gone": lambda folder: (folder / "payload" / "values.txt").unlink(),
    "a table is another": lambda folder: (folder / "payload" / "values.txt").write_text("0.5"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_quantized_model_of_a_finished_sweep_is_made_again(tmp_path: Path, damage: str) -> None:
    store = tmp_path / "store"
    first = sweep(store, *ALL)
    quantize = next(v.quantize for v in first.result.variants if v.axes["method"] == "gptq")
    assert quantize is not None
    assert quantize.payload is not None
    content = (quantize.payload / "values.txt").read_bytes()
    before = committed(store)
    DAMAGES[damage](quantize.payload.parent)
    said = looked_at(store)
    # Cells of the table of stages: in all, cached, to run.
    assert re.search(r"quantize\D+2\D+1\D+1\D", said), said
    assert re.search(r"evaluate\D+3\D+3\D+0\D", said), said
    if damage not in ("the artifact is gone", "the record is gone"):
        assert f"{quantize.label} [{quantize.key[:8]}]: its artifact is corrupt" in said
    again = sweep(store, *ALL)
    after = committed(store)
    assert [k for k, s in again.statuses.items() if s is not Status.CACHED] == [quantize.key]
    assert {k: t for k, t in after.items() if k != quantize.key} == {k: t for k, t in before.items() if k != quantize.key}
    assert (quantize.payload / "values.txt").read_bytes() == content
    assert scores(again) == scores(first)
    assert set(sweep(store, *ALL).statuses.values()) == {Status.CACHED}


def looked_at(store: Path) -> str:
    """What `bitgrid plan` and `bitgrid explain` say."""
    said = io.StringIO()
    for look in (print_plan, print_explanations):
        look(Command(tuple(overrides(store, *ALL)), multirun=True), Console(file=said, width=200))
    return said.getvalue()


def test_what_only_lost_stages_read_is_not_made_again(tmp_path: Path) -> None:
    store = tmp_path / "store"
    sweep(store, *ALL)
    shutil.rmtree(store / "objects" / "calibrate")
    left = committed(store)
    assert set(sweep(store, *ALL).statuses.values()) == {Status.CACHED}
    assert committed(store) == left


@pytest.mark.parametrize("name", ["items.parquet", "weights.safetensors"])
def test_an_artifact_is_whole_by_the_size_of_tensors_and_the_content_of_tables(tmp_path: Path, name: str) -> None:
    store, stage = Store(tmp_path).open(), a_stage()
    staging = store.new_staging(stage.key)
    for made in ("items.parquet", "weights.safetensors"):
        (staging / "payload" / made).write_bytes(b"content")
    store.commit(stage, an_outcome(stage), staging, 1, "sweep")
    file = store.folder(stage.kind, stage.key) / "payload" / name

    def whole(content: bytes) -> bool:
        file.write_bytes(content)
        return store.is_whole(stage.kind, stage.key)

    assert not whole(b"conten")
    # Of the same size: tensors are read by the stages that need them, and only there.
    assert whole(b"c0ntent") is name.endswith(".safetensors")
    assert whole(b"content")
    file.unlink()
    assert not store.is_whole(stage.kind, stage.key)
