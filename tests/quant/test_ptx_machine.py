"""The machine that runs PTX on the host (`tests/quant/ptx`): instructions against what the PTX ISA says of them, written another way; and
programs with a fault, which it must find."""

from __future__ import annotations

import re
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from quant.kernels import on_cuda
from tests.quant.ptx.launches import Fault, Module, Program

HEAD = ".version 8.0\n.target sm_90a\n.address_size 64\n"


def of_lanes(body: str, *given: np.ndarray, made: int = 1) -> np.ndarray:
    """uint64 `[made, 32]`: what a warp's lanes leave in %d0, … when they begin with their own of each given `[32]` in %a0, …"""
    loads = "".join(f"ld.global.b64 %a{i}, [%rd2+{256 * i}];" for i in range(len(given)))
    stores = "".join(f"st.global.b64 [%rd3+{256 * i}], %d{i};" for i in range(made))
    text = f"""{HEAD}.entry k(.param .u64 k_0, .param .u64 k_1)\n{{
        .reg .b64 %rd<4>; .reg .b32 %r<2>; .reg .b64 %a<9>; .reg .b64 %d<9>;
        ld.param.u64 %rd0, [k_0]; ld.param.u64 %rd1, [k_1]; mov.u32 %r0, %tid.x;
        mad.wide.u32 %rd2, %r0, 8, %rd0; mad.wide.u32 %rd3, %r0, 8, %rd1;
        {loads}{body}{stores}
        ret;\n}}\n"""
    bits = np.stack([np.broadcast_to(g, 32).view(f"u{g.dtype.itemsize}").astype(np.uint64) for g in map(np.ascontiguousarray, given)])
    out = torch.zeros(made, 32, dtype=torch.int64)
    Module(text).run("k", 1, 32, torch.from_numpy(bits.view(np.int64).copy()), out)
    return out.numpy().view(np.uint64)


def words(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, shape or (32,), dtype=np.uint32)


def rounded(v: Fraction, digits: int) -> Fraction:
    """To nearest, ties to even, of numbers with so many binary digits."""
    if v == 0:
        return v
    place = Fraction(2) ** (len(bin(int(abs(v) * 2**300))) - 302 - digits)
    return round(v / place) * place


def test_logic_of_three_and_of_bytes() -> None:
    a, b, c = words(1), words(2), words(3)
    for table in (0xEA, 0xCA, 0x96, 0x01, 0x3C):
        got = of_lanes(f"lop3.b32 %d0, %a0, %a1, %a2, {table};", a, b, c)[0]
        want = sum(((table >> (4 * (a >> k & 1) + 2 * (b >> k & 1) + (c >> k & 1))) & 1).astype(np.uint64) << k for k in range(32))
        assert (got == want).all()
    got = of_lanes("prmt.b32 %d0, %a0, %a1, %a2;", a, b, c)[0]
    for lane in range(32):
        eight = struct.pack("<II", a[lane], b[lane])
        picks = [int(c[lane]) >> 4 * i & 15 for i in range(4)]
        want = bytes(eight[p & 7] if p < 8 else 255 * (eight[p & 7] >> 7) for p in picks)
        assert struct.pack("<Q", got[lane]) == want + bytes(4)


def test_bits_and_whole_numbers() -> None:
    a, b = words(4), words(5) % 40
    s = a.view(np.int32).astype(object)  # Python's own
    wide = np.minimum(b, 32).astype(np.uint64)
    cases = {
        "shl.b32 %d0, %a0, %a1;": a.astype(np.uint64) << wide & 0xFFFFFFFF,
        "shr.u32 %d0, %a0, %a1;": a.astype(np.uint64) >> wide,
        "shr.s32 %d0, %a0, %a1;": [(x >> min(n, 31)) % 2**32 for x, n in zip(s, b.tolist(), strict=True)],
        "mul.wide.s32 %d0, %a0, %a1;": (s * b) % 2**64,
        "mul.hi.s32 %d0, %a0, %a1;": (s * b >> 32) % 2**32,
        "mul.lo.s32 %d0, %a0, %a0;": (s * s) % 2**32,
        "mad.wide.s32 %d0, %a0, %a1, 7;": (s * b + 7) % 2**64,
        "bmsk.clamp.b32 %d0, %a1, 5;": [sum(1 << k for k in range(32) if n <= k < n + 5) for n in b.tolist()],
        "bfi.b32 %d0, %a0, -1, %a1, 3;": [
            sum((int(x) >> (k - n) & 1 if n <= k < n + 3 else 1) << k for k in range(32)) for x, n in zip(a, b.tolist(), strict=True)
        ],
        "max.u16x2 %d0, %a0, 0x80008000;": np.maximum(a.view(np.uint16), 0x8000).view(np.uint32),
        "popc.b32 %d0, %a0;": [bin(x).count("1") for x in a.tolist()],
        "cvt.s64.s32 %d0, %a0;": s % 2**64,
        "cvt.s32.s8 %d0, %a0;": a.view(np.int8)[::4].astype(object) % 2**32,
        "mov.b64 {lo, hi}, %a0; mov.b64 %d0, {hi, lo};": a.astype(np.uint64) << 32,
        "div.s32 %d0, %a0, -7;": [abs(x) // 7 * (1 if x < 0 else -1) % 2**32 for x in s.tolist()],
    }
    for body, want in cases.items():
        got = of_lanes("{ .reg .b32 lo, hi;" + body + "}", a, b)[0]
        assert (got == np.array(list(want), dtype=np.uint64)).all(), body


def test_roundings() -> None:
    g = np.random.default_rng(0)
    x = g.standard_normal(32) * 2.0 ** g.integers(-30, 30, 32)
    x[:6] = 0.0, -0.0, 1 + 2.0**-24, 1 + 3 * 2.0**-24, -(1 + 2.0**-24), 2.0**-149 * 0.7
    f = x.astype(np.float32)
    low, high = (of_lanes(f"cvt.{mode}.f32.f64 %d0, %a0;", x)[0].astype(np.uint32).view(np.float32) for mode in ("rm", "rp"))
    assert ((low <= x) & (x <= high) & ((low == high) == (f == x)) & (np.nextafter(low, np.float32(np.inf)) >= high)).all()
    assert (of_lanes("cvt.rn.f32.f64 %d0, %a0;", x)[0].astype(np.uint32) == f.view(np.uint32)).all()
    y = np.array([0.5, 1.5, -2.5, 2.0**31, -(2.0**40), np.nan, 1e-9, 2.0**31 - 128] * 4, dtype=np.float32)
    want = [0, 2, -2 % 2**32, 2**31 - 1, 2**31, 0, 0, 2**31 - 128] * 4
    assert of_lanes("cvt.rni.s32.f32 %d0, %a0;", y)[0].tolist() == want
    assert of_lanes("cvt.rzi.s32.f32 %d0, %a0;", y)[0].tolist() == [0, 1, *want[2:8]] * 4
    both = of_lanes("cvt.rn.bf16x2.f32 %d0, %a0, %a1;", f, f[::-1].copy())[0]
    as_brain = torch.from_numpy(f).bfloat16().view(torch.int16).numpy().view(np.uint16).astype(np.uint64)
    assert (both == (as_brain << 16 | as_brain[::-1])).all()
    f = np.clip(f, -6e4, 6e4)
    both = of_lanes("cvt.rn.f16x2.f32 %d0, %a0, %a1;", f, f)[0]
    assert (both == f.astype(np.float16).view(np.uint16).astype(np.uint64) * 65537).all()


def test_fused_products_are_rounded_once() -> None:
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(64, generator=g).bfloat16() for _ in range(3))
    a[:4] = torch.tensor([1.0, 257.0, 1 + 2.0**-7, 3.0])  # and what a first rounding would tie
    b[:4] = torch.tensor([1.0, 255.0, 1 + 2.0**-7, 2.0**-9])
    c[:4] = torch.tensor([2.0**-60, 2.0**-50, -(2.0**-90), 1.0])
    given = [v.view(torch.int16).numpy().view(np.uint32) for v in (a, b, c)]
    got = torch.from_numpy(of_lanes("fma.rn.bf16x2 %d0, %a0, %a1, %a2;", *given)[0].astype(np.uint32).view(np.int16)).view(torch.bfloat16)
    for x, y, z, made in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        assert Fraction(made) == rounded(Fraction(x) * Fraction(y) + Fraction(z), 8), (x, y, z)


@pytest.mark.parametrize("width", [32, 16, 8, 4])
def test_lanes_shuffle(width: int) -> None:
    a = words(6)
    for by in (0, 1, 3, 5, 17):
        for mode, c in (("up", 0), ("down", 31), ("bfly", 31), ("idx", 31)):
            body = f"{{ .reg .pred p; shfl.sync.{mode}.b32 %d0|p, %a0, {by}, {32 - width << 8 | c}, -1; selp.b64 %d1, 1, 0, p; }}"
            got, there = of_lanes(body, a, made=2)
            for lane in range(32):
                first = lane // width * width
                source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first + by % width}[mode]
                # bfly may read lanes of earlier segments.
                good = (source >= first or mode == "bfly") and source < first + width
                assert (got[lane], there[lane]) == (a[source if good else lane], int(good)), (mode, by, lane)


def test_votes_and_sums_of_some_lanes() -> None:
    a = words(7)
    body = "{ .reg .pred p, q; setp.lt.s32 p, %a0, 0; vote.sync.ballot.b32 %d0, p, -1; setp.lt.u32 q, %r0, 20;"
    body += "mov.b64 %d1, 0; @q redux.sync.add.s32 %d1, %a0, 0xfffff; }"
    ballot, total = of_lanes(body, a, made=2)
    assert (ballot == sum(int(x >> 31) << lane for lane, x in enumerate(a.tolist()))).all()
    assert total.tolist() == [int(a[:20].sum()) % 2**32] * 20 + [0] * 12


# NVIDIA, PTX ISA, "Matrix Fragments for mma.m16n8k8, k16, k32, k256": of a register's element i of all, its row and column.
LAYOUTS = {
    "m16n8k8.row.col.f32.tf32.tf32.f32": (1, 8),
    "m16n8k16.row.col.f32.bf16.bf16.f32": (2, 16),
    "m16n8k32.row.col.s32.u8.s8.s32": (4, 32),
    "m16n8k256.row.col.s32.b1.b1.s32.and.popc": (32, 256),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_fragments_of_products(kind: str) -> None:
    each, k = LAYOUTS[kind]
    g = np.random.default_rng(k)
    low, high = {1: (-50, 50), 2: (-50, 50), 4: (0, 256), 32: (0, 2)}[each]
    a, b = g.integers(low, high, (16, k)), g.integers(-128 if each == 4 else low, 128 if each == 4 else high, (k, 8))
    c = g.integers(-99, 99, (16, 8))

    def bits(v: int) -> int:
        if each == 1:  # what is below the 11 bits of tf32 is not read
            return int(torch.tensor(float(v)).view(torch.int32)) & 0xFFFFFFFF | 0x1FFF
        return int(torch.tensor(float(v)).bfloat16().view(torch.int16)) & 0xFFFF if each == 2 else v & (0xFF if each == 4 else 1)

    registers = np.zeros((6, 32), dtype=np.uint32)
    for lane in range(32):
        group, thread = lane >> 2, lane & 3
        for i in range(4 * each):
            # Elements of the first register are of row `group`, of the second 8 further on, and so on; see the figures.
            row = group if i // each in (0, 2) else group + 8
            column = thread * each + i % each if i < 2 * each else thread * each + i % each + k // 2
            registers[i // each, lane] |= bits(int(a[row, column])) << (32 // each * (i % each))
        for i in range(2 * each):
            row = thread * each + i % each + (k // 2 if i >= each else 0)
            registers[4 + i // each, lane] |= bits(int(b[row, group])) << (32 // each * (i % each))
    places = [[((lane >> 2) + 8 * (i >= 2), 2 * (lane & 3) + i % 2) for lane in range(32)] for i in range(4)]
    sums = [np.array([c[at] for at in place], dtype=np.float32 if each < 4 else np.int32) for place in places]
    body = f"mma.sync.aligned.{kind} {{%d0, %d1, %d2, %d3}}, {{%a0, %a1, %a2, %a3}}, {{%a4, %a5}}, {{%c0, %c1, %c2, %c3}};"
    # Nine inputs at most: the sums come as constants of each lane, one after another.
    made = [
        of_lanes(re.sub(r"%c(\d)", lambda m, i=i: "%a6" if int(m[1]) == i else "0", body), *registers, sums[i], made=4)[i] for i in range(4)
    ]
    want = a @ b + c
    for i, place in enumerate(places):
        got = made[i].astype(np.uint32).view(np.float32 if each < 4 else np.int32)
        assert got.tolist() == [want[at] for at in place]


def test_lanes_that_part_come_together_again() -> None:
    """A loop that lanes leave after 0 to 31 rounds; then what they do together."""
    body = """{ .reg .pred p; .reg .b32 i; mov.u32 i, 0;
      again: setp.ge.u32 p, i, %r0; @p bra over; add.u32 i, i, 1; bra again;
      over: bar.warp.sync -1; shfl.sync.idx.b32 %d0, i, 31, 31, -1; bar.sync 0; }"""
    assert (of_lanes(body, words(8)) == 31).all()


FAULTS = """
#include <cstdint>
#define KERNEL(NAME) extern "C" __global__ void NAME(const float* a, float* out, int n)
__device__ float* room() { extern __shared__ float memory[]; return memory; }
#define T threadIdx.x
KERNEL(fine) {
    float* s = room();
    s[T] = T < n ? a[T] : 0.0f;
    __syncthreads();
    out[T] = s[63 - T];
    __syncthreads();
    s[T] = a[0];
    __syncwarp();
    out[T] += s[T ^ 1];
}
KERNEL(reads_beside) { out[T] = a[T + n]; }
KERNEL(writes_beside) { out[T + (n == 64)] = a[T]; }
KERNEL(unaligned) { *reinterpret_cast<float2*>(out) = *reinterpret_cast<const float2*>(a + (n & 1)); }
KERNEL(beside_shared) { room()[T + n] = a[T]; }
KERNEL(no_barrier) { room()[T] = a[T]; out[T] = room()[63 - T]; }
KERNEL(overwritten) {
    float* s = room();
    s[T] = a[T];
    __syncthreads();
    out[T] = s[63 - T];
    s[T] = 0.0f;
}
KERNEL(overwritten_in_a_warp) {
    volatile float* s = room();
    s[T] = a[T];
    __syncwarp();
    out[T] = s[T ^ 1];
    s[T] = 0.0f;
}
KERNEL(no_warp_barrier) { volatile float* s = room(); s[T] = a[T]; out[T] = s[T ^ 1]; }
KERNEL(not_all) {
    if (T < n) __syncthreads();
    else asm volatile("bar.sync 1, 64;");
}
KERNEL(not_its_lanes) { if (T % 32 < n) out[T] = __shfl_sync(0xffff, a[T], 20); }
KERNEL(too_soon) {
    const uint32_t to = uint32_t(__cvta_generic_to_shared(room() + 4 * T));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(a + 4 * (T % 16)) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (n & 1) asm volatile("cp.async.wait_group 0;" ::: "memory");
    out[T] = room()[4 * T];
}
KERNEL(early) {
    if (n & 1) asm volatile("griddepcontrol.wait;" ::: "memory");
    out[T] = a[T];
}
KERNEL(blocks) { out[T] = blockIdx.x; }
KERNEL(for_ever) { while (*static_cast<volatile const float*>(a) >= -1e30f) out[T] = 1.0f; }
"""
SAID = {
    "reads_beside": "outside all buffers",
    "writes_beside": "outside all buffers",
    "unaligned": "not a multiple of its size",
    "beside_shared": "outside shared memory",
    "no_barrier": "a race with a",
    "overwritten": "a race with a",
    "overwritten_in_a_warp": "a race with a read",
    "no_warp_barrier": "a race with a write",
    "not_all": "wait at barriers",
    "not_its_lanes": "lane 20, which takes no part",
    "too_soon": "a race with a write",
    "early": "before the kernel in front is over",
    "blocks": "a race with what another block",
    "for_ever": "does not end",
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Module:
    if on_cuda.compiler() is None:
        pytest.skip("there is no nvcc")
    source = tmp_path_factory.mktemp("faults") / "faults.cu"
    source.write_text(FAULTS)
    return Program(source)


def run(module: Module, name: str, n: int) -> tuple[Tensor, Tensor]:
    a, out = torch.arange(1.0, 65.0), torch.zeros(64)
    memory = {"late": [a]} if name == "early" else {}
    module.run(
        name, 2 if name == "blocks" else 1, 64, a, out, n, dynamic=1024 if name == "too_soon" else 256, early=name == "early", **memory
    )
    return a, out


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_program_without_a_fault_is_run(faults: Module, seed: int) -> None:
    faults.seed = seed
    a, out = run(faults, "fine", 64)
    assert torch.equal(out, a.flip(0) + 1)
    a, out = run(faults, "too_soon", 65)
    assert torch.equal(out, a[::4].repeat(4))
    assert torch.equal(*run(faults, "early", 65))


@pytest.mark.parametrize("name", SAID)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_fault_is_found(faults: Module, name: str, seed: int) -> None:
    faults.seed, faults.most = seed, 100_000
    with pytest.raises(Fault, match=SAID[name]):
        run(faults, name, {"not_all": 32, "not_its_lanes": 16, "reads_beside": 1, "unaligned": 1, "beside_shared": 1}.get(name, 64))
