"""How kernels are started (`quant/csrc/cta.h`): a device refuses more than 48 KB of shared memory that nobody asked for, static and dynamic
together. Against a runtime with a device's rules, on the host."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from quant.kernels.native import SOURCES

PROGRAM = """
#include "fake_runtime.h"
#define __CUDACC__
#include "cta.h"
#include <cstdio>
#include <initializer_list>

int ran, last;
void kernel(int number, const double* values) { ran++, last = number + int(values[1]); }

int main() {
    double values[2] = {0, 30};
    for (int64_t fixed : {0, 16, 20400, 49152})
        for (int64_t bytes = 0; bytes <= 228 * 1024; bytes += 16) {
            fake::fixed = fixed, fake::granted = ran = last = 0;
            const bool fits = fixed + bytes <= fake::most;
            const int failed = LAUNCH(kernel, dim3(1), 32u, bytes, 0, int64_t(12), values);
            // A smaller launch takes nothing away from the next; no error is left behind.
            const bool less = !LAUNCH(kernel, dim3(1), 32u, 0, 0, 1, values), again = !LAUNCH(kernel, dim3(1), 32u, bytes, 0, 2, values);
            const bool right = (failed == 0) == fits && less && again == fits && ran == 1 + 2 * fits && last == (fits ? 32 : 31);
            if (!right || fake::last != cudaSuccess)
                return std::printf("static %d, dynamic %d: error %d\\n", int(fixed), int(bytes), failed), 1;
        }
}
"""


def test_all_the_shared_memory_of_a_device_can_be_had(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    source, program = tmp_path / "launch.cpp", tmp_path / "launch"
    source.write_text(PROGRAM)
    (tmp_path / "cuda_runtime.h").write_text('#include "fake_runtime.h"\n')
    folders = [f"-I{folder}" for folder in (tmp_path, Path(__file__).parent, SOURCES)]
    subprocess.run([compiler, "-std=c++17", "-w", *folders, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
