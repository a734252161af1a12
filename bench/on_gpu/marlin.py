"""Marlin, W4A16, as a peer: its kernel out of the package `optimum-quanto` (0.2.7, Apache-2.0), which ships its one file and what packs
weights for it. `marlin` in the package registry is something else, and packages with the kernel compiled (vllm, gptqmodel) are larger than
this needs, or bound to other releases of torch.

The file is compiled with nvcc as it lies in the package, behind an entry of ours. The package adds a zero to Marlin's scale of each group.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.on_gpu.peer_kernels import GROUP, Case, Ready, copied, decoded, drawn, product, size, some
from quant.kernels.on_cuda import FLAGS, compiler, target

if TYPE_CHECKING:
    from bench.on_gpu.clock import Bench

KERNEL = "library/extensions/cuda/marlin/marlin_cuda_kernel.cu"
ENTRY = """#include "{kernel}"
extern "C" int marlin_run(const void* x, const void* codes, void* out, void* scale, void* zero, void* locks, long long m, long long n,
                          long long k, long long group, void* stream) {{
  return marlin_cuda(x, codes, out, scale, zero, (int)m, (int)n, (int)k, locks, (int)group, 0, (cudaStream_t)stream);
}}
"""
PARALLEL = 16
"""Products side by side that its locks are for, by its own default."""


def built(kernel: Path, capability: tuple[int, int]) -> Any:
    """The entry of a library made from the package's file. Raises RuntimeError with what nvcc says."""
    nvcc = compiler()
    if nvcc is None:
        raise RuntimeError("there is no CUDA compiler")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "marlin.cu", Path(folder) / "marlin.so"
        source.write_text(ENTRY.format(kernel=kernel))
        flags = [*FLAGS, "--expt-relaxed-constexpr", "-w", target(capability)]
        made = subprocess.run([nvcc, *flags, str(source), "-o", str(library)], capture_output=True, text=True, timeout=120)
        if made.returncode:
            raise RuntimeError(f"nvcc: {made.stderr[-200:]}")
        entry = ctypes.CDLL(str(library)).marlin_run
    entry.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_longlong] * 4 + [ctypes.c_void_p]
    entry.restype = ctypes.c_int
    return entry


def start(b: Bench, cases: list[Case]) -> Callable[[Case], Ready]:
    """float16, which is what it is written for."""
    found = importlib.util.find_spec("optimum.quanto")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'optimum.quanto'")
    from optimum.quanto.tensor.weights.marlin import marlin_permute
    from optimum.quanto.tensor.weights.marlin.int4.packed import pack

    run_kernel = built(Path(found.submodule_search_locations[0]) / KERNEL, torch.cuda.get_device_capability(b.device))

    def make(case: Case) -> Ready:
        codes, scale = drawn(b, case)
        scale, rows = scale.half(), some(case.n)
        given = scale.T.contiguous()
        inputs = copied(pack(codes), marlin_permute(given), marlin_permute(-8 * given))
        x = b.random(case.m, case.k, dtype=torch.float16)
        out = torch.empty(case.m, case.n, dtype=torch.float16, device=b.device)
        locks = torch.zeros(case.n // 128 * PARALLEL, dtype=torch.int32, device=b.device)

        def run(i: int) -> Tensor:
            there = (t.data_ptr() for t in (x, inputs[i][0], out, inputs[i][1], inputs[i][2], locks))
            stream = torch.cuda.current_stream(b.device).cuda_stream
            failed = run_kernel(*there, case.m, case.n, case.k, GROUP, stream)
            if failed:
                raise RuntimeError(f"it refuses the shape, or has no kernel for it: {failed}")
            return out

        return product(x, decoded(codes[rows], scale[rows], 4), rows, run, size(*inputs[0]), 1e-2)

    return make
