"""Which kernel, by which grid, a product or a block of GPTQ is launched as on a device (`quant/csrc/wq_gemv.cu`, `wq_slices.cu`,
`gptq_block.cu`): the forms that bench/results/gpu-limits.md was measured with, and launches that devices take for all other shapes.
Libraries as nvcc builds them, with a runtime that notes their launches (`fake_device.cpp`) in place of CUDA's."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from quant.kernels import native, on_cuda
from quant.kernels.wq_gemv.cuda import by_slices
from quant.kernels.wq_gemv.fragments import Fragments

pytestmark = pytest.mark.xdist_group("forms")
LONG = pytest.mark.skipif(os.environ.get("BITGRID_COMPILE") != "1", reason="BITGRID_COMPILE is not 1: compiling takes half a minute")
FAKE = Path(__file__).with_name("fake_device.cpp")
KB = 1024


@dataclass(frozen=True)
class Device:
    """NVIDIA, CUDA C++ Programming Guide, table of compute capabilities."""

    number: int
    multiprocessors: int
    each: int
    block: int
    major: int


H200 = Device(0, 132, 228 * KB, 227 * KB, 9)
DEVICES = (H200, Device(1, 108, 164 * KB, 163 * KB, 8), Device(2, 82, 100 * KB, 99 * KB, 8), Device(3, 16, 100 * KB, 99 * KB, 8))


@dataclass(frozen=True)
class Launch:
    kernel: str
    blocks: tuple[int, int]
    threads: int
    shared: int
    attributes: int

    @property
    def numbers(self) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", self.kernel)]


class Libraries(dict[str, ctypes.CDLL]):
    """By name, each built when it is first asked for."""

    def __init__(self, nvcc: str, folder: Path) -> None:
        super().__init__()
        self.nvcc, self.folder = nvcc, folder

    def __missing__(self, name: str) -> ctypes.CDLL:
        # Device code is not run: none is made but PTX, as fast as can be. What is called is the runtime beside it, whoever else has one.
        target = ("-gencode=arch=compute_90a,code=compute_90a", "-Ofc", "max", "-Xlinker", "-Bsymbolic")
        command = [self.nvcc, "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-cudart", "none", *target]
        made = [str(native.SOURCES / f"{name}.cu"), str(FAKE), "-o", str(self.folder / f"{name}.so")]
        done = subprocess.run([*command, *made], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return self.setdefault(name, ctypes.CDLL(made[-1]))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Libraries:
    nvcc = on_cuda.compiler()
    if nvcc is None:
        pytest.skip("there is no nvcc")
    return Libraries(nvcc, tmp_path_factory.mktemp("forms"))


def called(library: ctypes.CDLL, function: str, device: Device, *values: object) -> tuple[int, int]:
    """The CUDA error, and how many kernels were launched."""
    library.fake_device(*map(ctypes.c_int64, (device.number, device.multiprocessors, device.each, device.block, device.major)))
    launches = ctypes.c_int64.in_dll(library, "fake_launches")
    before = launches.value
    failed: int = getattr(library, function)(*(ctypes.c_int64(v) if isinstance(v, int) else v for v in values))
    return failed, launches.value - before


def launched(library: ctypes.CDLL, function: str, device: Device, *values: object) -> Launch:
    assert called(library, function, device, *values) == (0, 1), (function, device, values)
    x, y, z, threads, shared, attributes = (ctypes.c_int64 * 6).in_dll(library, "fake_launched")
    assert z == 1
    name = (ctypes.c_char * 4096).in_dll(library, "fake_kernel").value.decode()
    name = re.sub(r"\(anonymous namespace\)::|\w+::|^void ", "", name)
    return Launch(re.sub(r"\(Room\)|\(\w+\)$", "", name), (x, y), threads, shared, attributes)


def product(libraries: Libraries, device: Device, n: int, k: int, bits: int, m: int, **given: int) -> Launch:
    """As `cuda.wq_gemv` asks for it, of bfloat16; groups of 128 columns and float16 ranges where nothing else is given."""
    of = {"groups": max(k // 128, 1), "half": 1, "half_x": 1, "scale": 0} | given
    early = int(device.major >= 9)
    if m > 8 and of["half_x"] and not of["scale"]:
        ranges = torch.empty(1, of["groups"], 8, 2, 2, dtype=torch.float16 if of["half"] else torch.float32)
        packed = Fragments(torch.empty(0), ranges, None, (n, k), bits)
        at_once, blocks = by_slices(packed, torch.bfloat16, (device.multiprocessors, device.block))
        if at_once:
            values = (0, 0, 0, 0, 0, 0, n, k, of["groups"], bits, m, of["half"], at_once, blocks, early, 0)
            return launched(libraries["wq_slices"], "bitgrid_wq_slices", device, *values)
    values = (0, 0, 0, of["scale"], 0, n, k, of["groups"], bits, m, of["half"], of["half_x"], early, 0)
    return launched(libraries["wq_gemv"], "bitgrid_wq_gemv", device, *values)


def of_block(rows: int, columns: int, plain: bool, lanes: int = 0) -> tuple[object, ...]:
    """What the entry of gptq_block is called with."""
    group = (ctypes.c_int32 * columns)()
    return (0, 0, 0, 0, group, columns, rows, rows, columns, rows, 15, int(not plain), int(plain), *(0,) * 7, lanes, 0)


def block(library: ctypes.CDLL, device: Device, rows: int, columns: int, plain: bool) -> Launch:
    return launched(library, "bitgrid_gptq_block", device, *of_block(rows, columns, plain))


def ceiling(a: int, b: int) -> int:
    return -(-a // b)


# Of bench/results/gpu-limits.md, groups of 128 columns: N, K, bits, M ▸ kernel, blocks. Two numbers of a product: by slices of x.
MEASURED = {
    (4096, 4096, 4, 1): ("single<true>", 256),
    (4096, 11008, 4, 1): ("balanced<Floats<Lane, 4, true> >", 132),
    (8192, 8192, 4, 1): ("product<4, 2, 1, 1, 1>", 256),
    (8192, 28672, 4, 1): ("product<4, 2, 1, 1, 1>", 256),
    (8192, 8192, 3, 1): ("balanced<Floats<Lane, 3, true> >", 132),
    (8192, 8192, 2, 1): ("balanced<Whole<Lane, true, 2, 0> >", 132),
    (8192, 28672, 2, 1): ("balanced<Whole<Lane, true, 2, 2> >", 132),
    (4096, 4096, 4, 16): ("product<4, 1, 1, 1, 2>", 128),
    (4096, 11008, 4, 16): ("product<1, 6>", 128),
    (8192, 8192, 4, 16): ("product<4, 2, 1, 1, 2>", 128),
    (8192, 28672, 4, 16): ("product<2, 3>", 128),
}
BLOCKS = {
    4096: ("solve<Form<4, true, 1, 4, 2> >", 128),
    8192: ("solve<Form<1, true, 1, 2, 3> >", 128),
    12288: ("solve<Form<1, true, 1, 3, 3> >", 128),
    # The last with so many teams, and the first with more.
    4224: ("solve<Form<4, true, 1, 4, 2> >", 132),
    4225: ("solve<Form<1, true, 1, 2, 3> >", 67),
    8448: ("solve<Form<1, true, 1, 2, 3> >", 132),
    8449: ("solve<Form<1, true, 1, 3, 3> >", 89),
    12672: ("solve<Form<1, true, 1, 3, 3> >", 132),
    12673: ("solve<Form<1, true, 1, 4, 3> >", 100),
    16896: ("solve<Form<1, true, 1, 4, 3> >", 132),
    16897: ("solve<Form<1, true, 1, 4, 1> >", 133),
    16384: ("solve<Form<1, true, 1, 4, 3> >", 128),
    8 * 4096: ("solve<Form<1, true, 2, 4, 2> >", 128),
    8 * 12288: ("solve<Form<1, true, 2, 4, 2> >", 384),
}


@LONG
def test_products_are_launched_as_they_were_measured(libraries: Libraries) -> None:
    for shape, form in MEASURED.items():
        made = product(libraries, H200, *shape)
        assert ((made.kernel, made.blocks[0]), made.blocks[1], made.attributes) == (form, 1, 1), shape
        # One block a multiprocessor of one whose ring is the whole memory; else room for two, or for three, and for none beside.
        each = 1 if shape[3] > 8 or "true, 2, 2" in made.kernel else 3 if made.kernel.startswith("single") else 2
        assert H200.each // (each + 1) - KB <= made.shared <= (H200.block if each == 1 else H200.each // each - KB), shape


def test_blocks_of_gptq_are_launched_as_they_were_measured(libraries: Libraries) -> None:
    for rows, form in BLOCKS.items():
        made = block(libraries["gptq_block"], H200, rows, 128, True)
        assert ((made.kernel, made.blocks[0]), made.blocks[1], made.attributes) == (form, 1, 1), rows


# N, K, groups: of one and of many tiles, no whole ones, more than all multiprocessors have at once; of steps whole and not.
ODD = ((1, 32, 1), (15, 96, 3), (17, 160, 5), (100, 128, 1), (4097, 1376, 43), (4224, 6144, 48), (4240, 6272, 49), (11008, 4096, 64))
ODD += ((12304, 14336, 112), (8200, 28672, 1), (128256, 4096, 32), (1 << 20, 64, 2))


@LONG
def test_any_product_is_launched_within_the_devices_limits(libraries: Libraries) -> None:
    """The runtime refuses what is beyond them; blocks are as many as all of out takes, and no more."""
    for device in DEVICES:
        for n, k, groups in ODD:
            for bits in (2, 3, 4, 8):
                for m in range(1, 17):
                    for half, half_x, scale in ((1, 1, 0), (0, 1, 0), (1, 0, 0), (0, 1, 16)):
                        given = {"groups": groups, "half": half, "half_x": half_x, "scale": scale}
                        made = product(libraries, device, n, k, bits, m, **given)
                        tiles, numbers = ceiling(n, 16), made.numbers
                        if made.kernel.startswith("product") and len(numbers) == 5:
                            of_bits, r, _, parts, c = numbers
                            want = (ceiling(tiles, c * r), ceiling(m, c * (8 // parts)))
                            assert (of_bits, parts) == (bits, 1 if half_x and not scale else 3)
                        elif made.kernel.startswith("product"):
                            want = (device.multiprocessors // 8 * 8, 1)
                        else:
                            want = (tiles if made.kernel.startswith("single") else min(tiles, device.multiprocessors), 1)
                        assert made.blocks == want, (device, n, k, groups, bits, m, made)
                        assert (made.threads % 32, made.attributes) == (0, int(device.major >= 9))


def test_any_block_of_gptq_is_launched_within_the_devices_limits(libraries: Libraries) -> None:
    for device in DEVICES:
        for rows in (1, 31, 64, 100, 1024, 4224, 4288, 8512, 16896, 16960, 21120, 21121, 21184, 28672, 98304, 8 * 28672):
            for columns in (128, 64, 48, 17):
                for plain in {columns % 16 == 0, False}:
                    made = block(libraries["gptq_block"], device, rows, columns, plain)
                    lanes, of_lane, teams, helpers = made.numbers
                    want = (ceiling(rows, 32 // lanes * of_lane * teams), 1)
                    assert (made.blocks, made.threads) == (want, 32 * teams * (1 + helpers)), (device, rows, columns, made)
                    assert ("true" in made.kernel) == plain
                    assert not plain or made.blocks[0] <= device.multiprocessors or rows > 128 * device.multiprocessors


def test_numbers_of_lanes_that_there_are_not_are_refused(libraries: Libraries) -> None:
    for lanes in (2, 3, 5, 8, -1):
        failed, launches = called(libraries["gptq_block"], "bitgrid_gptq_block", H200, *of_block(64, 128, True, lanes))
        assert failed != 0
        assert launches == 0
