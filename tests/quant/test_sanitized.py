"""C++ of `quant/csrc` under the compiler's sanitizers: tests that call it, in processes whose libraries look at each access. They find what
compute-sanitizer looks for on a device, as far as kernels run on the host: reads and writes beside tensors and shared memory
(AddressSanitizer), what the language does not define (UndefinedBehaviorSanitizer), and what two threads, those of a GPU's block included
(`cuda_on_host.h`, `quant/csrc/host_threads.h`), do to the same memory with no barrier in between (ThreadSanitizer). What those of a warp
that run together do to each other is seen only where they have a thread each."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quant.kernels import native

ROOT = Path(__file__).parents[2]
ASKED = pytest.mark.skipif(os.environ.get("BITGRID_SANITIZE") != "1", reason="BITGRID_SANITIZE is not 1: it takes half an hour")
# Of "undefined" not those that AddressSanitizer finds out, too, which take the compiler minutes.
FLAGS = {
    "address": "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr,null,object-size,pointer-overflow "
    "-fno-sanitize-recover=undefined",
    "thread": "-fsanitize=thread",
}
LIBRARIES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0:log_path={0}", "UBSAN_OPTIONS": "print_stacktrace=1:log_path={0}"},
    # Python and torch are built without it: what they do is left out. A small history, of which each thread of a block has its own.
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:history_size=1:die_after_fork=0:log_path={0}"},
}
# Their threads change stacks, of which AddressSanitizer knows nothing; past their shared memory a read ends the process.
EMULATED = ["claq_cuda", "kmeans_cuda", "braq_cuda"]
TWINS = ["braq_search", "claq_block", "fake_quantize", "gptq_cpu", "hqq", "int8_linear", "kmeans", "rtn_pack", "table_gemv", "wq_gemv"]
LANES = ["table_gemv_cuda", "gptq_lanes"]
SELECTED = {"address": [*TWINS, *LANES, "wq_fragments", "wq_slices"], "thread": [*EMULATED, *TWINS, *LANES]}

PROGRAMS = {
    # A word that a thread of another warp has written is read after a barrier of each warp alone, or of all.
    "thread": """
#include "host_threads.h"
int main() {
    static int shared[64], seen[64];
    const auto phase = [](int t) { shared[t] = t; };
    const auto next = [](int t) { seen[t] = shared[63 - t]; };
    host::Launch launch;
    launch.every(64, FAULT ? 32 : 64, phase);
    launch.every(64, 64, next);
    return seen[3] - 60;
}
""",
    "address": """
#include <vector>
int main(int count, char**) { return std::vector<int>(4)[count + 3 - !FAULT]; }
""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if shutil.which("g++") is None or sys.platform != "linux":
        pytest.skip("sanitizers are those of g++, on Linux")
    return tmp_path


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("fault", [False, True])
def test_a_fault_is_found_and_nothing_else(kind: str, fault: bool, folder: Path) -> None:
    (folder / "program.cpp").write_text(PROGRAMS[kind])
    flags = ["-std=c++17", "-g", "-O1", *FLAGS[kind].split(), f"-DFAULT={int(fault)}", f"-I{native.SOURCES}"]
    built = subprocess.run(["g++", *flags, "program.cpp", "-o", "program"], cwd=folder, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr:
        pytest.skip(f"g++ has no {kind} sanitizer here")
    assert built.returncode == 0, built.stderr
    done = subprocess.run(["./program"], cwd=folder, capture_output=True, text=True, check=False)
    assert (("Sanitizer" in done.stderr), done.returncode != 0) == (fault, fault), done.stderr


@ASKED
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in SELECTED.items() for name in names])
def test_tests_of_native_code_pass_under_sanitizers(kind: str, name: str, folder: Path) -> None:
    for compiler in ("g++", "c++"):
        (folder / compiler).write_text(f'#!/bin/sh\nexec {shutil.which(compiler)} "$@" -O1 -g {FLAGS[kind]}\n')
        (folder / compiler).chmod(0o755)
    kept = native.cache_folder() / f"{kind}-{hashlib.sha256(FLAGS[kind].encode()).hexdigest()[:8]}"
    found = [subprocess.check_output(["g++", f"-print-file-name={n}"], text=True).strip() for n in (*LIBRARIES[kind], "libstdc++.so")]
    environment = os.environ | {option: value.format(folder / "said") for option, value in OPTIONS[kind].items()}
    environment |= {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "CXX": str(folder / "g++"), "LD_PRELOAD": " ".join(found)}
    environment |= {"BITGRID_CACHE": str(kept), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "BITGRID_COMPILE": ""}
    options = ["-q", "-p", "no:cacheprovider", "-p", "tests.quant.sanitizing", "-m", "not gpu", "--timeout=3600"]
    command = [sys.executable, "-m", "pytest", *options, f"tests/quant/test_{name}.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    said = "".join(path.read_text() for path in sorted(folder.glob("said*")))
    assert (said, done.returncode) == ("", 0), said[:20000] + done.stdout[-3000:] + done.stderr[-3000:]
