"""Other packages' kernels beside ours: a peer that is missing, wrong, slow or ends its process costs a line and nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.on_gpu import peers as gpu_peers
from bench.on_gpu.clock import Bench
from bench.on_gpu.peer_kernels import PEERS, Case, Peer, Ready, alone, streamed
from bench.on_gpu.peers import Figure, figures, supervised, times

CASE, OTHER = Case(8, 128, 1, 4), Case(16, 128, 1, 4)


def ready(value: float) -> Ready:
    return Ready(lambda i: torch.tensor(value), 1, 64, lambda got: abs(float(got) - 2), 0.5)


def peer(make: Callable[[Case], Ready], seconds: float = 60) -> Peer:
    return Peer(lambda b, cases: make, (CASE, OTHER), seconds)


def of(one: Peer) -> list[Figure]:
    return list(figures(Bench(dry=True), "some", one))


def failing(*given: object) -> Ready:
    raise RuntimeError("no such\n  kernel")


def test_a_right_and_a_wrong_peer() -> None:
    _, right, wrong = of(peer(lambda case: ready(2.0 if case is CASE else 3.0)))
    assert right.right
    assert (right.case, right.error) == (CASE, 0)
    assert not wrong.right
    assert "WRONG" in wrong.line()
    assert not replace(right, error=float("nan")).right


def test_a_peer_that_raises_is_one_line_and_the_other_case_is_measured() -> None:
    _, broken, right = of(peer(lambda case: failing() if case is CASE else ready(2.0)))
    assert broken.line() == "   peer some, 4 bits, 8 x 128, M=1: not run: RuntimeError: no such kernel"
    assert right.right


def test_a_peer_that_cannot_start_is_one_figure() -> None:
    (only,) = of(Peer(failing, (CASE, OTHER), 60))  # type: ignore[arg-type]
    assert "not run: RuntimeError" in only.line()


def test_a_peer_whose_time_is_spent() -> None:
    *_, last = of(peer(lambda case: ready(2.0), seconds=-1.0))
    assert "were spent" in last.reason
    assert last.case is None


CHILD = """
import json, os, sys, time
out, *names = sys.argv[1:]
with open(out, "a", buffering=1) as file:
    for name in names:
        if name == "ends":
            print("it was the kernel"); sys.stdout.flush(); os.abort()
        if name == "hangs":
            time.sleep(60)
        file.write(json.dumps({figure} | {"peer": name}) + "\\n" + json.dumps({"done": name}) + "\\n")
"""


@pytest.fixture
def told(tmp_path: Path) -> Callable[[list[str], float], dict[str, Figure]]:
    script = tmp_path / "child.py"
    script.write_text(CHILD.replace("{figure}", repr(json.loads(json.dumps(asdict(Figure("", CASE, 7.0)))))))

    def run(names: list[str], seconds: float) -> dict[str, Figure]:
        return {f.peer: f for f in supervised(names, lambda left, out: [sys.executable, str(script), str(out), *left], seconds)}

    return run


def test_a_peer_that_ends_its_process_does_not_keep_the_next_from_running(told: Callable[..., dict[str, Figure]]) -> None:
    got = told(["first", "ends", "last"], 30)
    assert list(got) == ["first", "ends", "last"]
    assert got["first"] == Figure("first", CASE, 7.0)
    assert got["last"].us == 7
    assert got["ends"].reason == "its process ended with -6: it was the kernel"


def test_a_peer_that_hangs_is_stopped(told: Callable[..., dict[str, Figure]]) -> None:
    assert "were spent" in told(["hangs"], 1)["hangs"].reason


def test_times_are_of_right_peers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    b = Bench(dry=True)
    made = (
        Figure("a", CASE, 1.0),
        Figure("b", CASE, 2.0, 1.0, 0.5),
        Figure("c", OTHER, 3.0),
        Figure("d", CASE, reason="none"),
        Figure("e"),
    )
    monkeypatch.setattr(gpu_peers, "found", lambda kind: made)
    assert times(b, "products", 8, 128, 1, 4) == {}
    b.dry = b.alone = False
    assert times(b, "products", 8, 128, 1, 4) == {"a": 1.0}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_stream_of_codes(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 64), dtype=torch.uint8)

    def words(row: Tensor) -> list[int]:
        number = sum(int(code) << bits * i for i, code in enumerate(row))
        return list(memoryview(number.to_bytes(8 * bits, "little")).cast("i"))

    assert torch.equal(streamed(torch.tensor([words(row) for row in codes], dtype=torch.int32), bits), codes)


def test_a_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    inner = tmp_path / "heavy_peer" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "heavy_peer" / "__init__.py").write_text("raise ImportError('its dependencies')")
    (inner / "kernel.py").write_text(
        "from compressed_tensors.utils.triton import HAS_TRITON, tl, triton\n"
        "from heavy_peer.inner.helpers import something\n"
        "def twice(x): return 2 * x if HAS_TRITON and tl.load else something\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert alone("heavy_peer", "inner/kernel.py").twice(4) == 8
    assert "heavy_peer" not in sys.modules
    assert "compressed_tensors" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="no_such_peer"):
        alone("no_such_peer", "kernel.py")


def test_every_peer_runs_or_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    for kind in ("block", "products"):
        found = gpu_peers.found(kind)
        assert {f.peer for f in found} == {name for name, p in PEERS.items() if p.kind == kind}
        assert all(f.reason or f.error <= f.allowed for f in found), [f.line() for f in found]
