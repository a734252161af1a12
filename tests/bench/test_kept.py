"""What benchmarks that are cut off leave: every row that they had come to."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, whole_model
from bench.kept import keep
from bench.on_gpu.clock import Bench, Row


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    keep(path, {"rows": [1]})
    with pytest.raises(TypeError):
        keep(path, {"rows": [1, object()]})
    assert json.loads(path.read_text()) == {"rows": [1]}
    keep(None, {})
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"]


def test_pieces_that_are_cut_off_leave_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def done(b: Bench) -> Iterator[Row]:
        yield Row("first", 0, 0, None)

    def fails(b: Bench) -> Iterator[Row]:
        yield Row("second", 0, 0, None)
        raise ValueError

    def cut(b: Bench) -> Iterator[Row]:
        yield Row("third", 0, 0, None)
        raise KeyboardInterrupt

    path = tmp_path / "figures.json"
    monkeypatch.setattr(gpu, "PIECES", {"limits": done, "fails": fails, "cut": cut})
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--dry", "--out", str(path)])
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    told = json.loads(path.read_text())
    assert [r["name"] for r in told["rows"]] == ["first", "second", "third"]
    assert (told["pieces"], told["failed"]) == (["limits"], ["fails"])


def test_methods_that_are_cut_off_leave_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(work: Any, *_: Any) -> Row:
        if work.method == "claq":
            raise KeyboardInterrupt
        return Row(work.method, 0, 0, None)

    path = tmp_path / "figures.json"
    monkeypatch.setattr(whole_model, "measured", measured)
    given = {"device": "cpu", "alone": True, "longest": None, "batch_tokens": None, "params": [], "methods": "gptq,claq", "shape": "dry"}
    given |= {"layers": None, "samples": 2, "length": 32, "propagation": "quantized", "streamed": False, "profile": False, "out": path}
    with pytest.raises(KeyboardInterrupt):
        whole_model.run(Namespace(**given), tmp_path)
    assert [r["name"] for r in json.loads(path.read_text())] == ["gptq"]
