"""What Triton's compiler makes of the kernels for GPUs of two generations: they compile, fit shared memory, and spill nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quant.kernels.int8_linear.triton import gluon_works
from quant.kernels.on_triton import has_gluon

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes a program may use. NVIDIA, CUDA C++ Programming Guide, table of compute capabilities."""


@pytest.mark.skipif("BITGRID_COMPILE" not in os.environ, reason="compiling takes 40 s, or 2 minutes: BITGRID_COMPILE=first or 1")
def test_kernels_compile() -> None:
    # Where Triton's interpreter was asked for, its compiler cannot be: it has a process of its own.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_triton.py")
    command = [sys.executable, str(script), *map(str, MOST_SHARED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r["architecture"] for r in rows} == set(MOST_SHARED)
    wanted = {"solve", "gemv", "signs", "entries", "rows", "apart", "weight", "add_lower", "pick", "transform", "round_rows"}
    wanted |= {"whole_groups", "long_groups", "step", "gemm", "attend", "attend_plain", "attend_per_token", "merge", "multiply", "update"}
    wanted |= {"turn", "sum_rows", "append_token", "fill"}
    if has_gluon("quant.kernels.lazy_update.hopper_halves"):
        wanted |= {"update_by_halves", "split"}
    assert {r["kernel"] for r in rows if r["architecture"] == max(MOST_SHARED)} == wanted
    for row in rows:
        assert row["shared"] <= MOST_SHARED[row["architecture"]], row
        assert row["stack"] == 0, row
        if row["kernel"] in ("gemm", "attend", "attend_plain", "attend_per_token") or (row["kernel"], row["of"]) == ("add_lower", "bf16"):
            assert row["tensor_cores"], row
        if row["kernel"] == "update_by_halves":
            # A step's products go on while the next one's operands come; two programs share a multiprocessor.
            assert row["waits"] == ["0", "1"], row
            assert 2 * (row["shared"] + 1024) <= MOST_SHARED[90] + 1024, row
        if row["kernel"] in ("multiply", "update", "update_by_halves"):
            assert row["tensor_cores"], row
            # A large product goes on while that of the step before is waited for.
            large = row["architecture"] == 90 and gluon_works() and not {"192", "256"}.isdisjoint(row["of"].split())
            assert not large or not {"1", "2"}.isdisjoint(row["waits"]), row
