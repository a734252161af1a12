"""The product in Triton, for 1 row of x or more; made for 9 to 256.

Scales of groups multiply float32 sums of their columns where x has few rows. From `OPERAND` rows on that would take registers and time
that tensor cores need: codes less their zero times the scale become the operand then, rounded to the type of x as a weight made in it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import torch
from torch import Tensor

from quant.kernels.counters import counters
from quant.kernels.on_triton import interpreted, unavailable
from quant.kernels.wq_gemm import PANEL, UNIT, Packed, given_out
from quant.kernels.wq_gemm import prepare as laid_out

__all__ = ["Shape", "candidates", "prepare", "shape", "unavailable", "wq_gemm"]

OPERAND = 128
"""Rows of x that a program has, from which on scales go into the operand."""
MAGIC = {torch.float16: 0x64006400, torch.bfloat16: 0x43004300}
"""2^10 and 2^7, twice."""
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Shape:
    """How the work is cut: rows of the weight and of x that a program has, parts of K, warps, and steps loaded ahead."""

    bn: int
    bm: int
    split: int
    warps: int
    stages: int
    operand: bool = False
    """Scales go into the operand."""


TILES = {16: (128, 4, 4, 3), 32: (128, 4, 4, 3), 64: (128, 8, 3, 1), 128: (128, 8, 3, 1), 256: (128, 8, 3, 1)}
"""Rows of x ▸ rows of the weight, warps, stages, and programs of which a multiprocessor holds that many at once (registers). Chosen from
what the compiler says, not from times: see `candidates`."""
OLDER = (64, 4, 3, 2)
"""The same before compute capability 9.0, whose tensor cores read no operand from shared memory; there for at most 64 rows of x."""


def _rows(bits: int, m: int, newer: bool = True) -> int:
    """Of x, in a program. Two steps of 256 columns that 256 rows of x have do not fit shared memory."""
    return min((128 if bits < 4 else 256) if newer else 64, max(16, 1 << (m - 1).bit_length()))


def shape(bits: int, m: int, n: int, k: int, multiprocessors: int = 132, newer: bool = True) -> Shape:
    """For x `[m, k]` and a weight `[n, k]`. newer: compute capability 9.0."""
    bm = _rows(bits, m, newer)
    bn, warps, stages, held = TILES[bm] if newer else OLDER
    tiles = -(-n // bn) * -(-m // bm)
    return Shape(bn, bm, _split(multiprocessors * held // tiles, -(-k // UNIT[bits])), warps, stages, bm >= OPERAND)


def _split(wanted: int, units: int) -> int:
    """Of `SPLITS`, the largest that is wanted and leaves two units to each part."""
    return max(s for s in SPLITS if s == 1 or s <= min(wanted, units // 2))


def candidates(bits: int, m: int, n: int, k: int, multiprocessors: int = 132) -> list[Shape]:
    """What is worth timing; the first is `shape`'s."""
    bm = _rows(bits, m)
    units = -(-k // UNIT[bits])
    found = [shape(bits, m, n, k, multiprocessors)]
    for bn, warps, stages, held, operand in {
        16: ((128, 4, 4, 2, False), (128, 4, 4, 4, False), (64, 4, 4, 4, False), (128, 8, 4, 2, False), (128, 4, 3, 4, False)),
        32: ((128, 4, 3, 2, False), (64, 4, 4, 4, False), (128, 8, 4, 2, False)),
        64: ((128, 8, 3, 2, False), (64, 4, 3, 2, False), (128, 8, 3, 2, True), (256, 8, 3, 1, True)),
        128: ((128, 8, 3, 2, True), (64, 4, 3, 2, True), (256, 8, 2, 1, True)),
        256: ((128, 8, 3, 2, True), (64, 4, 2, 1, True)),
    }[bm]:
        tiles = -(-n // bn) * -(-m // bm)
        one = Shape(bn, bm, _split(multiprocessors * held // tiles, units), warps, stages, operand)
        if one not in found:
            found.append(one)
    return found


def prepare(tensor: Any) -> Packed:
    """See `quant.kernels.wq_gemm.prepare`."""
    packed = laid_out(tensor)
    # Before a graph is captured, whose own memory these must not be.
    counters(packed.low.device)
    return packed


def wq_gemm(x: Tensor, packed: Packed, out: Tensor | None = None, cut: Shape | None = None) -> Tensor:
    """`[M, N]` in the type of x. cut: in place of what `shape` says."""
    from quant.kernels.wq_gemm.program import gemm

    made = given_out(x, packed.shape, out)
    given = x.detach() if packed.input_scale is None else (x.float() / packed.input_scale).to(x.dtype)
    m, (n, k) = len(x), packed.shape
    if cut is None:
        cut = shape(packed.bits, m, n, k, *((4, False) if interpreted() else _device(x.device)))
    units, each, grid = _grid(packed.bits, m, n, k, cut)
    tiles = grid[0] * grid[1]
    sums, arrived = given, given
    if grid[2] > 1:
        sums = torch.empty(tiles * grid[2] * cut.bn * cut.bm, dtype=torch.float32, device=x.device)
        arrived = counters(x.device).take(tiles)
    gemm[grid](
        packed.low, packed.low if packed.high is None else packed.high, packed.scale, packed.scale if packed.zero is None else packed.zero,
        given.contiguous(), made, sums, arrived, n, k, m, units, PANEL * packed.low.shape[0], each, MAGIC[x.dtype],
        **constants(packed.bits, k, packed.group, packed.zero is not None, packed.offsets, cut, grid[2]), num_warps=cut.warps,
    )  # fmt: skip
    return made


def warm(bits: int, m: int, n: int, k: int, group: int, cut: Shape) -> None:
    """Compile for bfloat16 x `[m, k]` and a weight `[n, k]` with float16 scales and zeros that are codes in the middle, without running."""
    from quant.kernels.wq_gemm.program import gemm

    units, each, grid = _grid(bits, m, n, k, cut)
    x, sums, arrived = torch.bfloat16, torch.bfloat16, torch.bfloat16
    if grid[2] > 1:
        sums, arrived = torch.float32, torch.int32
    gemm.warmup(
        torch.int32, torch.int32, torch.float16, torch.float16, x, x, sums, arrived, n, k, m, units, -(-n // PANEL) * PANEL, each, MAGIC[x],
        **constants(bits, k, group, False, False, cut, grid[2]), num_warps=cut.warps, grid=grid,
    )  # fmt: skip


def _grid(bits: int, m: int, n: int, k: int, cut: Shape) -> tuple[int, int, tuple[int, int, int]]:
    """Units, units of a part, and tiles along N, tiles along M, parts that have any."""
    units = -(-k // UNIT[bits])
    each = -(-units // cut.split)
    return units, each, (-(-n // cut.bn), -(-m // cut.bm), -(-units // each))


def constants(bits: int, k: int, group: int, zeros: bool, offsets: bool, cut: Shape, split: int) -> dict[str, Any]:
    """What the program is compiled for. zeros: there are zeros or offsets."""
    whole = group == k
    full = min(128, UNIT[bits])
    span = full if whole else gcd(group, full)
    # Words of four lanes are not cut: of 2 and 3 bits they hold 64 columns.
    narrow = span < 64 and bits < 4
    # Sums over x for the offsets take more registers than there are with more rows.
    many = offsets and cut.bm > 32
    scaled = "end" if whole and not offsets else "operand" if cut.operand or narrow or many else "sums"
    width = span if scaled == "sums" else full
    return {
        "BITS": bits,
        "ZEROS": zeros and not offsets,
        "OFFSETS": offsets,
        "SCALED": scaled,
        "EVEN": k % UNIT[bits] == 0,
        # A number that no column reaches for a scale of all columns: one program for every K.
        "BLOCKS": 1 << 20 if whole else group // 32,
        "WIDTH": width,
        "SCALES": width // span if scaled == "operand" else 1,
        "BN": cut.bn,
        "BM": cut.bm,
        "SPLIT": split,
        "WARPS": cut.warps,
        "STAGES": cut.stages,
    }


@cache
def _device(device: torch.device) -> tuple[int, bool]:
    """Multiprocessors, and whether it has what `TILES` is for."""
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.major == 9
