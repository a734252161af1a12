"""What benchmarks that are cut off leave: every row that they had come to."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gptq_block, gpu, grids, int8_linear, kept, kmeans, whole_model, wq_gemv
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


def test_figures_name_the_commit_where_git_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "ROOT", tmp_path)
    assert kept.commit() is None
    run = partial(subprocess.run, check=True, cwd=tmp_path, capture_output=True)
    (tmp_path / "file").write_text("one")
    as_somebody = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (
        ["git", "init"],
        ["git", "add", "file"],
        [*as_somebody, "commit", "-m", "one"],
        [*as_somebody, "tag", "-a", "v1", "-m", "v1"],
    ):
        run(command)
    named = kept.commit()
    assert named is not None
    assert run(["git", "rev-parse", "HEAD"]).stdout.decode().startswith(named)
    (tmp_path / "file").write_text("two")
    assert kept.commit() == f"{named}-dirty"


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
    assert told["environment"]["packages"]["torch"] == torch.__version__


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


class Cut:
    """Of two values the second never comes."""

    def __init__(self, first: Any) -> None:
        self._first = first

    def __iter__(self) -> Iterator[Any]:
        yield self._first
        raise KeyboardInterrupt


CUT = {
    "gptq_block": (gptq_block, {"SIZES": Cut((128, 0.0))}, 1),
    "int8_linear": (int8_linear, {"SHAPES": Cut((16, 32)), "TIMES": 1, "FEW": 1}, 4),
    "wq_gemv": (wq_gemv, {"SHAPES": Cut((128, 128)), "TIMES": 1}, 24),
}


@pytest.mark.parametrize("bench", CUT)
def test_benchmarks_of_the_cpu_that_are_cut_off_leave_their_rows(bench: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, small, rows = CUT[bench]
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(wq_gemv, "COLD", 0)
    monkeypatch.setattr(sys, "argv", [bench, "--out", str(tmp_path / "figures.json")])
    threads = torch.get_num_threads()
    try:
        with pytest.raises(KeyboardInterrupt):
            module.main()
    finally:
        torch.set_num_threads(threads)
    assert len(json.loads((tmp_path / "figures.json").read_text())["rows"]) == rows


def test_kmeans_that_is_cut_off_leaves_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    fits = iter(["k=4"])
    monkeypatch.setattr(kmeans, "compare", lambda *_: {"squares_max": 0, "squares_mean": 0, **dict.fromkeys(TIMES, 0), "k": next(fits)})
    monkeypatch.setattr(sys, "argv", ["kmeans", "--out", str(tmp_path / "figures.json"), "--rows", "8", "--columns", "2"])
    with pytest.raises(StopIteration):
        kmeans.main()
    assert [r["k"] for r in json.loads((tmp_path / "figures.json").read_text())["results"]] == ["k=4"]


TIMES = ("batch_us", "single_us", "sklearn_us", "ratio_batch", "ratio_single")


def test_ranges_that_are_cut_off_leave_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = {name: {"loss": 0.1, "perplexity": 3.0} for name in ("static", "dynamic")}
    row = {"bits": 4, "act_order": False, "nats": 0, "nats_half": 0, "loss_ratio": 1, **both}
    monkeypatch.setattr(grids, "rows", lambda *_: Cut(row))
    monkeypatch.setattr(grids.Runs, "scored", lambda *_: [1.0])
    monkeypatch.setattr(sys, "argv", ["grids", "--out", str(tmp_path / "figures.json")])
    with pytest.raises(KeyboardInterrupt):
        grids.main()
    assert json.loads((tmp_path / "figures.json").read_text())["rows"] == [row]
