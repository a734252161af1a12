"""A machine without a compiler, nvcc or Triton: a sweep runs to its end, by torch and the references, and its records say so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from quant.kernels import TABLE
from tests.orchestrator.sweeping import ROOT, overrides
from tests.tiny_models import tiny_model

PROGRAM = """
import sys
sys.modules["triton"] = None  # every import of it fails
from orchestrator.cli import main
sys.exit(main())
"""
METHODS = "rtn,gptq,hqq"
OPERATIONS = {
    "rtn_pack",
    "hqq_pack",
    "gptq_block",
    "lazy_update",
    "hessian_syrk",
    "token_log_probs",
    "fake_quantize",
    "wq_gemv",
    "int8_linear",
}


def test_a_sweep_quantizes_evaluates_and_measures(tmp_path: Path) -> None:
    store = tmp_path / "store"
    grid = [f"model.path={tiny_model('gemma')}", f"method={METHODS}", "scheme=w4a16_channel,w8a8", "task.params.window=32"]
    grid += ["measure=true", "workload.threads=1", "workload.prompt=4", "workload.tokens=2", "hints.device=cpu"]
    given = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME")}
    bare = {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT), "BITGRID_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", PROGRAM, "run", "-m", *overrides(store, *grid)]
    done = subprocess.run(arguments, cwd=tmp_path, env=given | bare, text=True, capture_output=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    ran: dict[str, set[str]] = {}
    for path in (store / "objects").glob("*/*/*/record.json"):
        record: dict[str, Any] = json.loads(path.read_text())
        for operation, backends in record["kernels"].items():
            ran.setdefault(operation, set()).update(backends)
        for operation, backends in record["kernels"].items():
            # In stages of every kind; and once, not once for each call.
            told = [note for note in record["notes"] if f"{operation} runs slower: there is no C++ compiler" in note]
            faster = list(TABLE[operation])[: list(TABLE[operation]).index(backends[0])]
            assert bool(told) == ("cpu" in faster), (operation, record["notes"])
        assert len(record["notes"]) == len(set(record["notes"]))
        if record["kind"] == "measure" and "quantize" in record["inputs"]:
            assert record["summary"]["backends"].keys() <= {"reference", "torch", "simulated"}
    assert ran.keys() == OPERATIONS
    assert set().union(*ran.values()) == {"reference", "torch"}
    assert not (tmp_path / "cache").exists()
