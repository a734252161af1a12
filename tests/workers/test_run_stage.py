"""The stage runner: one failure does not touch the others, every exception gets its class, and nothing leaks between stages."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quant.errors import NonFiniteError, ScaleDtypeError, SingularHessianError
from quant.kernels import kernel
from quant.scheme import WeightScheme
from tests.tiny_models import tiny_model
from tests.workers.fake_models import CountingBuilder, bare_context
from tests.workers.stage_runs import text_file
from workers import kept, residency, run_stage
from workers.artifact import CorruptArtifactError
from workers.context import Context
from workers.errors import InputError, NumericalError, Unreachable, UnsupportedModel
from workers.failures import classify
from workers.request import ErrorClass, Hints, Location, Outcome, Request, StageRequest
from workers.specs import (
    CalibrateSpec,
    CalibrationSpec,
    Component,
    EvaluateSpec,
    MeasureSpec,
    MethodSpec,
    ModelSpec,
    QuantizeSpec,
    Rule,
    Spec,
    TaskSpec,
    TextSpec,
    Workload,
    to_json,
)

ROOT = Path(__file__).resolve().parents[2]
M = ModelSpec("model")
TEXT = TextSpec("text", join="")
EVALUATE = EvaluateSpec(M, TaskSpec("perplexity", 1, TEXT, (("limit", 4), ("window", 16))))
QUANTIZE = QuantizeSpec(M, (Rule("*", MethodSpec(Component("rtn", 1)), WeightScheme(4)),))


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other tests' stages."""
    monkeypatch.setattr(kept, "_process", None)


def calibrate(statistic: str, samples: int = 4) -> CalibrateSpec:
    return CalibrateSpec(M, CalibrationSpec(TEXT, samples=samples, sequence_length=12), statistic)


@dataclass
class FakeRunners:
    """Records what was asked; raises what it is told to, by stage key."""

    raises: dict[str, Exception] = field(default_factory=dict)
    calls: list[Any] = field(default_factory=list)
    act: Callable[[], Any] = lambda: None

    def runners(self) -> run_stage.Runners:
        return run_stage.Runners(self._calibrate, self._quantize, self._evaluate, self._quantize, self._evaluate)

    def _calibrate(self, stages: Mapping[str, tuple[CalibrateSpec, Path]], context: Context) -> dict[str, dict[str, Any]]:
        self.calls.append(sorted(stages))
        self._work(*stages)
        return {key: {"statistic": spec.statistic} for key, (spec, _) in stages.items()}

    def _quantize(self, spec: QuantizeSpec, inputs: Mapping[str, Path], payload: Path, context: Context) -> dict[str, Any]:
        return self._one(payload, context)

    def _evaluate(self, spec: EvaluateSpec, inputs: Mapping[str, Path], payload: Path, context: Context, _: Any) -> dict[str, Any]:
        return self._one(payload, context)

    def _one(self, payload: Path, context: Context) -> dict[str, Any]:
        key = payload.parent.name
        self.calls.append(key)
        with context.phase("forward"):
            self._work(key)
        (payload / "out.json").write_text("{}")
        context.notes.append(f"note of {key}")
        return {"key": key}

    def _work(self, *keys: str) -> None:
        self.act()
        for key in keys:
            if key in self.raises:
                raise self.raises[key]


def request(folder: Path, stages: Mapping[str, Spec], **hints: Any) -> Request:
    kinds = {CalibrateSpec: "calibrate", QuantizeSpec: "quantize", EvaluateSpec: "evaluate", MeasureSpec: "measure"}
    rows = []
    for key, spec in stages.items():
        (folder / key).mkdir(parents=True)
        rows.append(StageRequest(key, kinds[type(spec)], to_json(spec), {}, str(folder / key)))
    return Request(
        id="r",
        stages=tuple(rows),
        models={"model": Location("folder", str(tiny_model("llama")))},
        texts={"text": Location("file", str(text_file(folder)))},
        hints=Hints(**{"device": "cpu", **hints}),
    )


def outcomes(wanted: Request, fake: FakeRunners, **more: Any) -> dict[str, Outcome]:
    found: list[Outcome] = []
    run_stage.run_request(wanted, found.append, runners=fake.runners(), **more)
    assert len({o.key for o in found}) == len(found)
    return {o.key: Outcome.from_json(json.loads(json.dumps(o.to_json()))) for o in found}


def test_one_failing_stage_reports_and_the_others_go_on(tmp_path: Path) -> None:
    fake = FakeRunners(raises={"b": ValueError("no such thing")})
    found = outcomes(request(tmp_path, {"a": EVALUATE, "b": QUANTIZE, "c": EVALUATE}), fake)
    assert fake.calls == ["a", "b", "c"]
    assert found["a"].failure is None
    assert found["c"].failure is None
    failure = found["b"].failure
    assert failure is not None
    assert (failure.error_class, failure.type, failure.message) == (ErrorClass.INTERNAL, "ValueError", "no such thing")
    assert "Traceback" in failure.log_tail
    assert "in _work" in failure.log_tail
    assert failure.log_tail in (tmp_path / "b" / "log.txt").read_text()
    assert "no such thing" not in (tmp_path / "c" / "log.txt").read_text()


def test_the_backend_asked_for_runs_in_all_stages_but_measure(tmp_path: Path) -> None:
    def stage(*_: Any) -> dict[str, Any]:
        return {"backend": kernel("rtn_pack").backend}

    runners = replace(run_stage.RUNNERS, quantize=stage, measure=stage)
    wanted = request(tmp_path, {"a": QUANTIZE, "b": MeasureSpec(M, Workload(), "any")}, backend="reference")
    found: list[Outcome] = []
    run_stage.run_request(wanted, found.append, runners=runners)
    quantize, measure = (o.record for o in found)
    assert quantize is not None
    assert quantize["kernels"] == {"rtn_pack": ["reference"]}
    assert measure is not None
    assert measure["summary"]["backend"] == kernel("rtn_pack").backend != "reference"


def test_a_backend_that_does_not_work_here_is_the_users(tmp_path: Path) -> None:
    def stage(*_: Any) -> dict[str, Any]:
        return {"backend": kernel("gptq_block").backend}

    found: list[Outcome] = []
    run_stage.run_request(
        request(tmp_path, {"a": QUANTIZE}, backend="cuda"), found.append, runners=replace(run_stage.RUNNERS, quantize=stage)
    )
    [failure] = [o.failure for o in found]
    assert failure is not None
    assert failure.error_class is ErrorClass.USER
    assert all(word in failure.message for word in ("hints.backend=cuda", "gptq_block", "on cpu", "choose hints.backend=auto"))


def test_record_says_when_where_and_how(tmp_path: Path) -> None:
    found = outcomes(request(tmp_path, {"a": EVALUATE, "b": EVALUATE}, batch_tokens=77), FakeRunners())
    record = found["b"].record
    assert record is not None
    assert set(record) == {"started", "ended", "seconds", "environment", "hints", "kernels", "notes", "summary"}
    assert record["seconds"]["total"] == pytest.approx(record["ended"] - record["started"], abs=1e-6)
    assert 0 <= record["seconds"]["forward"] <= record["seconds"]["total"]
    assert record["hints"]["batch_tokens"] == 77
    assert record["notes"] == ["note of b"]
    assert record["summary"] == {"key": "b"}
    assert {"python", "packages", "hostname", "kernel", "cpu", "device", "device_name", "threads"} <= set(record["environment"])
    # Not torch.__version__, which may have a local part that the installed metadata lacks.
    assert record["environment"]["packages"]["torch"] == version("torch")


def test_a_clock_that_is_put_back_makes_no_stage_quicker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(1_000_000, -3600)
    monkeypatch.setattr(run_stage.time, "time", lambda: float(next(clock)))
    record = outcomes(request(tmp_path, {"a": EVALUATE}), FakeRunners())["a"].record
    assert record is not None
    assert 0 <= record["ended"] - record["started"] < 3600


def test_calibrate_stages_of_one_set_share_a_pass_and_its_time(tmp_path: Path) -> None:
    fake = FakeRunners()
    stages = {"h": calibrate("hessian"), "q": QUANTIZE, "m": calibrate("absmax"), "other": calibrate("hessian", samples=5)}
    found = outcomes(request(tmp_path, stages), fake)
    assert fake.calls == [["h", "m"], "q", ["other"]]
    h, m = found["h"].record, found["m"].record
    assert h is not None
    assert m is not None
    assert h["summary"] == {"statistic": "hessian"}
    assert h["ended"] == pytest.approx(m["started"])
    # Epoch seconds in double precision resolve about 0.2 microseconds.
    assert h["ended"] - h["started"] == pytest.approx(m["ended"] - m["started"], abs=1e-6)
    assert any("equal share" in n for n in h["notes"])


def test_a_calibration_that_fails_among_others_fails_alone(tmp_path: Path) -> None:
    fake = FakeRunners(raises={"m": InputError("too short")})
    found = outcomes(request(tmp_path, {"h": calibrate("hessian"), "m": calibrate("absmax"), "e": EVALUATE}), fake)
    assert fake.calls == [["h", "m"], ["h"], ["m"], "e"]
    failure = found["m"].failure
    assert failure is not None
    assert failure.error_class is ErrorClass.USER
    assert "too short" in failure.log_tail
    why = "the pass shared with 1 other calibrate stages failed (InputError: too short)"
    assert {key: o.record["notes"] for key, o in found.items() if o.record is not None} == {
        "h": [f"ran again alone: {why}"],
        "e": ["note of e"],
    }


def test_a_pass_that_lacks_memory_is_left_to_the_driver(tmp_path: Path) -> None:
    fake = FakeRunners(raises={"m": MemoryError()})
    found = outcomes(request(tmp_path, {"h": calibrate("hessian"), "m": calibrate("absmax")}), fake)
    assert fake.calls == [["h", "m"]]
    assert all(o.failure is not None and o.failure.error_class is ErrorClass.MEMORY for o in found.values())


def test_stop_lets_the_running_stage_end_and_leaves_the_others_without_outcome(tmp_path: Path) -> None:
    fake = FakeRunners()
    found = outcomes(request(tmp_path, {"a": EVALUATE, "b": EVALUATE}), fake, should_stop=lambda: bool(fake.calls))
    assert list(found) == ["a"]


def test_seeds_depend_on_the_key_alone(tmp_path: Path) -> None:
    drawn: list[tuple[float, float, float]] = []
    fake = FakeRunners(act=lambda: drawn.append((random.random(), float(np.random.rand()), float(torch.rand(())))))
    outcomes(request(tmp_path / "1", {"a": EVALUATE, "b": EVALUATE}), fake)
    outcomes(request(tmp_path / "2", {"b": EVALUATE, "a": EVALUATE}), fake)
    assert drawn[:2] == drawn[:1:-1]
    assert drawn[0] != drawn[1]


def test_threads_and_determinism_hold_inside_and_come_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    seen: list[tuple[int, bool]] = []
    fake = FakeRunners(act=lambda: seen.append((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())))
    found = outcomes(request(tmp_path, {"a": EVALUATE}, threads=before + 1), fake)
    assert seen == [(before + 1, True)]
    assert torch.get_num_threads() == before
    assert found["a"].record["environment"]["threads"] == before + 1, "the record tells what the stage had"
    assert not torch.are_deterministic_algorithms_enabled()


def test_log_holds_messages_and_warnings_of_its_own_stage(tmp_path: Path) -> None:
    def act() -> None:
        logging.getLogger("workers.tasks").info("information")
        logging.getLogger("elsewhere").warning("foreign")
        warnings.warn("beware", stacklevel=1)

    root = logging.getLogger()
    before = list(root.handlers)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        outcomes(request(tmp_path, {"a": EVALUATE}), FakeRunners(act=act))
    text = (tmp_path / "a" / "log.txt").read_text()
    assert all(word in text for word in ("information", "foreign", "beware", "evaluate a, attempt 1", "done in"))
    assert root.handlers == before


def test_missing_staging_folder_is_a_failure_not_a_crash(tmp_path: Path) -> None:
    wanted = request(tmp_path, {"a": EVALUATE, "b": EVALUATE})
    gone = replace(wanted, stages=(replace(wanted.stages[0], staging=str(tmp_path / "gone")), wanted.stages[1]))
    found = outcomes(gone, FakeRunners())
    assert found["a"].failure is not None
    assert found["b"].failure is None


def test_spec_of_another_version_is_refused(tmp_path: Path) -> None:
    wanted = request(tmp_path, {"a": EVALUATE})
    newer = replace(wanted, stages=(replace(wanted.stages[0], spec={**wanted.stages[0].spec, "novelty": 1}),))
    failure = outcomes(newer, FakeRunners())["a"].failure
    assert failure is not None
    assert "has no field novelty" in failure.message


def test_unknown_device_says_what_there_is(tmp_path: Path) -> None:
    failure = outcomes(request(tmp_path, {"a": EVALUATE}, device="abacus"), FakeRunners())["a"].failure
    assert failure is not None
    assert failure.error_class is ErrorClass.USER
    assert "auto, cpu, cuda" in failure.message


def test_out_of_memory_lets_go_of_resident_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = residency.Residency(CountingBuilder())
    held.unquantized(bare_context(), ModelSpec("m"))
    monkeypatch.setattr(residency, "_process", held)
    fake = FakeRunners(raises={"a": ValueError("x"), "b": torch.OutOfMemoryError("CUDA out of memory")})
    outcomes(request(tmp_path / "1", {"a": EVALUATE}), fake)
    assert held.holds() == ["m"]
    found = outcomes(request(tmp_path / "2", {"b": EVALUATE}), fake)
    assert held.holds() == []
    assert found["b"].failure is not None
    assert found["b"].failure.error_class is ErrorClass.MEMORY


class SafetensorError(Exception):
    """Named as the library's."""


class TransportError(Exception):
    """Named as httpx's, which is no OSError."""


class ReadTimeout(TransportError):
    pass


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), ErrorClass.MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ErrorClass.MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), ErrorClass.MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ErrorClass.MEMORY),
        (RuntimeError("CUDA error: out of memory"), ErrorClass.MEMORY),
        (RuntimeError("Triton Error [CUDA]: out of memory"), ErrorClass.MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ErrorClass.MEMORY),
        (SafetensorError("I/O error: Cannot allocate memory (os error 12)"), ErrorClass.MEMORY),
        (OSError(errno.ENOSPC, "No space left on device"), ErrorClass.DISK_FULL),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ErrorClass.DISK_FULL),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), ErrorClass.DISK_FULL),
        (SafetensorError(f"Error while serializing: I/O error: Disk quota exceeded (os error {errno.EDQUOT})"), ErrorClass.DISK_FULL),
        (SafetensorError(f"Error while serializing: I/O error: File too large (os error {errno.EFBIG})"), ErrorClass.DISK_FULL),
        (CorruptArtifactError("abc", "payload differs"), ErrorClass.CORRUPT),
        (InputError("x"), ErrorClass.USER),
        (UnsupportedModel("x"), ErrorClass.USER),
        (FileNotFoundError(errno.ENOENT, "gone"), ErrorClass.USER),
        (NumericalError("x"), ErrorClass.NUMERICAL),
        (NonFiniteError("x"), ErrorClass.NUMERICAL),
        (ScaleDtypeError("x"), ErrorClass.NUMERICAL),
        (SingularHessianError("x"), ErrorClass.NUMERICAL),
        (torch.linalg.LinAlgError("not positive-definite"), ErrorClass.NUMERICAL),
        (OSError(errno.EIO, "Input/output error"), ErrorClass.INFRASTRUCTURE),
        (ConnectionResetError(), ErrorClass.INFRASTRUCTURE),
        (TimeoutError(), ErrorClass.INFRASTRUCTURE),
        (ReadTimeout("the hub took too long"), ErrorClass.INFRASTRUCTURE),
        (Unreachable("x"), ErrorClass.INFRASTRUCTURE),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), ErrorClass.INFRASTRUCTURE),
        (ValueError("x"), ErrorClass.INTERNAL),
        (RuntimeError("shapes differ"), ErrorClass.INTERNAL),
        (ImportError("x"), ErrorClass.INTERNAL),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Exception) else v.value,
)
def test_error_classes(error: Exception, expected: ErrorClass) -> None:
    assert classify(error) is expected


def test_corrupt_input_names_its_artifact(tmp_path: Path) -> None:
    fake = FakeRunners(raises={"a": CorruptArtifactError("deadbeef", "payload differs")})
    failure = outcomes(request(tmp_path, {"a": EVALUATE}), fake)["a"].failure
    assert failure is not None
    assert (failure.error_class, failure.corrupt_key) == (ErrorClass.CORRUPT, "deadbeef")


def test_command_line_runs_a_request_of_all_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = {"c": calibrate("absmax"), "q": QUANTIZE, "e": EVALUATE}
    (tmp_path / "request.json").write_text(json.dumps(request(tmp_path / "s", stages, threads=1).to_json()))
    assert run_stage.main([str(tmp_path / "request.json")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["key"] for r in rows] == ["c", "q", "e"]
    assert all(r["failure"] is None for r in rows)
    assert (tmp_path / "s" / "e" / "payload" / "items.parquet").is_file()
    assert any((tmp_path / "s" / "q" / "payload").iterdir())


def test_command_line_exit_codes(tmp_path: Path) -> None:
    broken = EvaluateSpec(M, TaskSpec("perplexity", 1, TextSpec("text", skip_documents=10**6)))
    (tmp_path / "request.json").write_text(json.dumps(request(tmp_path / "s", {"e": broken}, threads=1).to_json()))
    assert run_stage.main([str(tmp_path / "request.json"), "--outcomes", str(tmp_path / "out.jsonl")]) == 1
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row["failure"]["error_class"] == "user"
    assert "no text is left" in row["failure"]["message"]
    for unreadable in ('{"format": 99}', "[]", '{"format": 1, "id": "r", "stages": [], "models": [], "texts": {}, "hints": {}}'):
        (tmp_path / "request.json").write_text(unreadable)
        assert run_stage.main([str(tmp_path / "request.json")]) == 2


def test_importing_the_runner_needs_the_standard_library_only() -> None:
    # -S leaves site-packages out, so any other import fails.
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from workers.run_stage import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--outcomes" in done.stdout
