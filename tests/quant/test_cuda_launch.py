"""How kernels are started (`quant/csrc/early.h`, `cta.h`, `wq_start.h`, `clusters.h`): a device refuses more than 48 KB of shared memory
that nobody asked for, static and dynamic together, and older ones refuse clusters and early starts; what a call failed with is returned,
and not said again by a later call's check. Against a runtime with a device's rules, on the host."""

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
            fake::fixed = fixed, ran = last = 0, fake::granted.clear();
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


WITHOUT_CLUSTERS = """
#include "fake_runtime.h"
#include "wq_start.h"
#include <cstdio>

struct Problem { int number; };
int ran;
void kernel(Problem p) { ran = p.number; }

#define CHECK(that) if (!(that)) return std::printf("device %d of %d.0, early %d: %s\\n", fake::device, fake::major, int(early), #that), 1

int main() {
    // Each device is asked by itself, also after another has been.
    for (int number : {0, 1, 0})
        for (bool early : {false, true})
            for (int64_t bytes : {227 * 1024, 1024}) {
                fake::device = number;
                Device device;
                CHECK(found(device) == cudaSuccess && device.number == number && device.multiprocessors == 132);
                CHECK(device.most() == 113 * 1024 && device.most(2) == 227 * 1024);
                const Problem problem = {int(bytes) + number};
                CHECK(start<kernel>(problem, device, dim3(7, 3), 5, bytes, early, &ran) == cudaSuccess && ran == problem.number);
                const cudaLaunchConfig_t& c = fake::config;
                CHECK(c.gridDim.x == 7 && c.gridDim.y == 3 && c.blockDim.x == 160 && c.stream == &ran);
                CHECK(int64_t(c.dynamicSmemBytes) == bytes);
                CHECK(fake::early == early && fake::cluster == 0 && c.numAttrs == unsigned(early));
                // A launch that the device refuses is said to be one, once.
                CHECK(start<kernel>(problem, device, dim3(7), 5, 227 * 1024 + 1, early, &ran) == cudaErrorInvalidValue);
                CHECK(cudaGetLastError() == cudaSuccess);
            }
    const bool early = false;
    Device device;
    fake::device = 64;
    CHECK(found(device) == cudaErrorInvalidDevice);
}
"""

CLUSTERS = """
#include "fake_runtime.h"
#include "clusters.h"
#include <cstdio>

struct Problem { int number; };
int ran;
void kernel(Problem p) { ran = p.number; }

#define CHECK(that) if (!(that)) return std::printf("device %d of %d.0: %s\\n", fake::device, fake::major, #that), 1

int main() {
    for (int number : {0, 1, 2, 0}) {
        fake::device = number, fake::major = number == 2 ? 8 : 9;
        const int ranks = fake::major < 9 ? 1 : 8, before = fake::asked;
        Device device;
        int clusters = 0;
        for (int again = 0; again < 2; again++) CHECK(find(device, clusters, kernel, 256) == cudaSuccess);
        CHECK(device.number == number && device.ranks() == ranks && clusters == (fake::major < 9 ? 132 : 15));
        static bool known[3];
        CHECK(fake::asked == before + !known[number]);
        known[number] = true;
        int64_t told = 0;
        CHECK(tell_clusters(reinterpret_cast<int64_t>(&told), kernel, 256) == cudaSuccess && told == clusters);
        for (int64_t bytes : {227 * 1024, 100 * 1024, 0}) {
            CHECK(launch_clusters(kernel, Problem{number + 5}, device, 15, 2, 256, bytes, &ran) == cudaSuccess && ran == number + 5);
            const cudaLaunchConfig_t& c = fake::config;
            CHECK(int(c.gridDim.x) == 15 * ranks && c.gridDim.y == 2 && c.blockDim.x == 256 && c.stream == &ran);
            CHECK(int64_t(c.dynamicSmemBytes) == bytes && fake::early == (ranks > 1) && fake::cluster == (ranks > 1 ? 8 : 0));
            // What another thread of the host has asked for, and is about to launch with, is not taken from it.
            CHECK(fake::fits(reinterpret_cast<const void*>(kernel), 227 * 1024));
        }
        CHECK(launch_clusters(kernel, Problem{}, device, 15, 2, 256, 227 * 1024 + 16, &ran) == cudaErrorInvalidValue);
        device.shared += 16;  // which cannot be asked for
        CHECK(launch_clusters(kernel, Problem{}, device, 15, 2, 256, 0, &ran) == cudaErrorInvalidValue);
        CHECK(cudaGetLastError() == cudaSuccess);
    }
}
"""


@pytest.mark.parametrize("program", [PROGRAM, WITHOUT_CLUSTERS, CLUSTERS], ids=["cta", "wq_start", "clusters"])
def test_kernels_start_by_a_devices_rules(program: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    source, made = tmp_path / "launch.cpp", tmp_path / "launch"
    source.write_text(program)
    (tmp_path / "cuda_runtime.h").write_text('#include "fake_runtime.h"\n')
    folders = [f"-I{folder}" for folder in (tmp_path, Path(__file__).parent, SOURCES)]
    subprocess.run([compiler, "-std=c++17", "-w", *folders, str(source), "-o", str(made)], check=True)
    done = subprocess.run([str(made)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
