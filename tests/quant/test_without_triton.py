"""An installation without Triton: everything of `quant` is imported, and the table passes over Triton's twins with the reason."""

from __future__ import annotations

import json
import subprocess
import sys

from quant.kernels import TABLE

SCRIPT = """
import json, pkgutil, sys
sys.modules["triton"] = None  # every import of it fails
import quant
from quant.kernels import TABLE, kernel, library

def imported(package):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        # What is written in Triton is imported when it runs.
        name = found.name.rpartition(".")[2]
        if not name.startswith(("hopper", "program")):
            __import__(found.name)

imported(quant)
told = {}
for name, row in TABLE.items():
    on_gpu = kernel(name, "auto", "cuda") if "cuda" not in row else None
    refused = None
    if "triton" in row:
        try:
            kernel(name, "triton", "cuda")
        except RuntimeError as e:
            refused = str(e)
    told[name] = [kernel(name).backend, on_gpu and [on_gpu.backend, on_gpu.notes], refused]
print(json.dumps(told))
"""


def test_other_backends_are_chosen_and_the_reason_is_told() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert set(told) == set(TABLE)
    for name, (on_cpu, on_gpu, refused) in told.items():
        assert on_cpu in TABLE[name]
        assert on_cpu != "triton"
        if "triton" not in TABLE[name]:
            continue
        assert f"backend triton of {name} does not work on cuda" in refused
        assert "Triton is not installed (pip install triton)" in refused
        if on_gpu is not None:
            assert on_gpu[0] != "triton"
            assert on_gpu[1][0] == f"{name} runs slower: Triton is not installed (pip install triton)"
