"""`bitgrid plan` and `bitgrid explain` write nothing, and a cache of digests that cannot be written costs nobody a sweep."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from orchestrator.cell import Option
from orchestrator.command import Command
from orchestrator.preview import print_explanations, print_plan
from orchestrator.sources import Sources
from orchestrator.store import Store
from tests.orchestrator.sweeping import overrides


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
