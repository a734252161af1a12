"""A text of the hub is planned at a commit only: nothing else keeps its key and what it says together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cell import Option
from orchestrator.errors import SourceError
from orchestrator.grid import compose_grid
from orchestrator.sources import Sources
from tests.hub_cache import COMMIT
from workers.datasets import load_documents
from workers.specs import TextSpec

SOURCES = Sources(None, None, None)


def option(hub: dict[str, Any], **text: Any) -> Option:
    return Option("calibration", "mine", {"text": {"hub": {"id": "org/texts", **hub}, "field": "text", **text}})


@pytest.mark.parametrize(
    ("hub", "got"),
    [({}, "null"), ({"revision": None}, "null"), *(({"revision": r}, str(r)) for r in ("main", COMMIT[:7], f"{COMMIT}0", 12))],
)
def test_anything_but_a_commit_is_refused_with_what_to_do(hub: dict[str, Any], got: str) -> None:
    with pytest.raises(SourceError) as caught:
        SOURCES.text(option(hub))
    said = str(caught.value)
    assert f"calibration 'mine': text.hub.revision={got} of the data set org/texts" in said
    assert "set calibration.text.hub.revision= to a commit, 40 hexadecimal digits" in said
    assert "HfApi().dataset_info('org/texts').sha" in said


def test_texts_of_two_commits_have_two_keys() -> None:
    one, other = (SOURCES.text(option({"revision": c})) for c in (COMMIT, COMMIT[::-1]))
    assert one.location.revision == COMMIT
    assert one.digest != other.digest


def test_a_file_of_ones_own_needs_no_commit(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("words")
    assert SOURCES.text(option({}, path=str(file))).location.path == str(file)


def test_a_link_is_read_under_its_own_name(tmp_path: Path) -> None:
    """The hub's cache links to files without a suffix, which tells rows of JSON from plain text."""
    (tmp_path / "blob").write_text('{"text": "words"}\n')
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "blob")
    location = SOURCES.text(option({}, path=str(tmp_path / "rows.jsonl"))).location
    assert load_documents(location, TextSpec("", field="text")) == ["words"]


def test_shipped_options_name_commits() -> None:
    cells = compose_grid(["task=glob(*)", "calibration=glob(*)"], multirun=True).cells
    found = [SOURCES.text(o) for o in {id(o): o for c in cells for o in (c.task, c.calibration)}.values()]
    revisions = [t.location.revision for t in found if t.location.kind == "hub_dataset"]
    assert len(revisions) >= 8
    assert all(r is not None and re.fullmatch("[0-9a-f]{40}", r) for r in revisions)
