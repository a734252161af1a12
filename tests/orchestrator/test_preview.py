"""`bitgrid plan` and `bitgrid explain` write nothing, and a cache of digests that cannot be written costs nobody a sweep."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.cell import Option
from orchestrator.command import Command
from orchestrator.errors import SourceError
from orchestrator.preview import print_explanations, print_plan
from orchestrator.sources import Sources
from orchestrator.store import Store
from tests.orchestrator.sweeping import overrides

ASSET = Path(__file__).resolve().parents[2] / "workers" / "assets" / "wikitext_llama"


def text(path: Path) -> Option:
    return Option("task", "mine", {"text": {"path": str(path)}})


def test_a_preview_leaves_the_store_as_it_is(tmp_path: Path) -> None:
    store = Store(tmp_path / "store").open()
    before = sorted(store.root.rglob("*"))
    command = Command(tuple(overrides(store.root, "method=rtn")), True)
    for look in (print_plan, print_explanations):
        said = io.StringIO()
        look(command, Console(file=said, width=200))
        assert "evaluate" in said.getvalue()
    assert sorted(store.root.rglob("*")) == before


def test_a_preview_uses_the_digests_that_are_known_and_adds_none(tmp_path: Path) -> None:
    one, other, cache = tmp_path / "one.txt", tmp_path / "other.txt", tmp_path / "cache" / "digests.json"
    one.write_text("a text")
    other.write_text("another text")
    Sources(None, None, cache).text(text(one))
    known = {name: "f" * 64 for name in json.loads(cache.read_text())}
    assert len(known) == 1
    cache.write_text(json.dumps(known))
    looking = Sources(None, None, cache, cache_read_only=True)
    assert looking.text(text(one)).digest == "f" * 32
    assert looking.text(text(other)).digest == Sources(None, None, None).text(text(other)).digest
    assert json.loads(cache.read_text()) == known
    assert list(cache.parent.iterdir()) == [cache]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("a text")
    (tmp_path / "file").write_text("where the folder would be")
    (tmp_path / "folder" / "digests.json").mkdir(parents=True)
    for place in ("file", "folder"):
        found = Sources(None, None, tmp_path / place / "digests.json").text(text(file))
        assert found == Sources(None, None, None).text(text(file))
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["digests.json"]


def test_a_preview_says_what_is_left_out_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model and text are found by the folders of the environment, unless the command line names others."""
    models, data = tmp_path / "models", tmp_path / "data"
    shutil.copytree(ASSET, models / "stories260k")
    config = json.loads((ASSET / "config.json").read_text())
    (models / "stories260k" / "config.json").write_text(json.dumps({**config, "intermediate_size": 172}))
    (data / "web_text").mkdir(parents=True)
    (data / "web_text" / "tinystories_sample.txt").write_text("a story<|endoftext|>another story")
    monkeypatch.setenv("BITGRID_MODELS", str(models))
    monkeypatch.setenv("BITGRID_DATA", str(data))
    given = (
        *("model=stories260k", "method=rtn,gptq", "scheme=w4a16_g64,w4a16_channel,w3a16_channel", "task=tinystories"),
        *("task.params.window=64", "+sweep.exclude=[{method: rtn, scheme: w3a16_channel}]"),
    )
    said = io.StringIO()
    print_plan(Command(tuple(overrides(tmp_path / "store", *given)), True), Console(file=said, width=200))
    lines = said.getvalue().splitlines()
    skipped, excluded = (next(x for x in lines if x.startswith(word)) for word in ("skipped: ", "excluded: "))
    assert "group size 64 does not divide 172 inputs" in skipped
    assert "(2: stories260k rtn w4a16_g64 self_text tinystories r0, …)" in skipped
    assert excluded.endswith("{method: rtn, scheme: w3a16_channel} (1: stories260k rtn w3a16_channel self_text tinystories r0)")
    other = Command(tuple(overrides(tmp_path / "store", *given, f"models_dir={data}")), True)
    with pytest.raises(SourceError, match=f"looked for {data}"):
        print_plan(other, Console(file=io.StringIO()))
