"""The sums in Triton, which makes the product of them too: nothing between passes through memory.

Where a GPU has the instructions for it, large products are `program_specialized.py`'s, or `hopper.py`'s where terms with zeros or
columns in odd numbers take too many registers; the rest, and other GPUs', `program.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quant.kernels import on_triton
from quant.kernels.fake_quantize import RowCodes
from quant.kernels.int8_linear import Packed, prepare, rounded
from quant.kernels.on_triton import has_gluon, interpreted, unavailable

__all__ = ["int8_linear", "multiply", "prepare", "rounded", "unavailable"]

GROUP = 8
"""Rows of tiles whose operands are to stay in the L2 cache."""
ALIGNED = 16
"""Bytes that the copy engine wants a row to be a multiple of."""


@dataclass(frozen=True)
class Tile(on_triton.Tile):
    """Of out. Its columns are a power of two, and with gluon also one and a half; a step is columns of the operands."""

    speed: float
    """Products per time of a multiprocessor that always has such tiles, the best being 1."""
    gluon: bool = True
    descriptors: bool = True
    stay: bool = False
    """A program a multiprocessor, which makes one tile after another. Not with gluon."""

    @property
    def whole(self) -> int:
        """Columns that are multiplied in one, a power of two; what is left of them is aside."""
        return 1 << self.columns.bit_length() - 1

    def count(self, m: int, n: int) -> int:
        """Of an out [m, n]."""
        return -(-m // self.rows) * -(-n // self.columns)

    @property
    def high(self) -> int:
        """Rows of a warp group, of which there are one or two."""
        return 128 if self.rows > 128 else 64

    def registers(self, zeros: int) -> tuple[int, int] | None:
        """With warp specialization, the most that a thread starts with, and those of the second warp group while it multiplies; None where
        sums and as many terms with zeros need more. As few as can be, so that programs that round the rows of x have room beside."""
        if self.rows == 64:
            return (128, 0) if zeros < 2 else None
        if self.high * self.columns > 64 * 192:
            return None if zeros else (168, 232)
        return ((112, 152), (168, 232), None)[zeros]


HOPPER = (
    Tile(128, 256, 128, 8, 4, 1.0),
    Tile(256, 128, 128, 8, 4, 1.0),
    Tile(128, 192, 128, 8, 5, 0.98),
    Tile(128, 128, 128, 8, 6, 0.9),
    Tile(128, 64, 128, 8, 8, 0.7),
    Tile(64, 128, 128, 4, 8, 0.75),
    Tile(64, 64, 128, 4, 6, 0.5),
    Tile(32, 32, 256, 4, 4, 0.15, gluon=False),
    Tile(16, 32, 256, 4, 4, 0.1, gluon=False),
)
"""For compute capability 9.0. Speeds are guesses from the traffic of shared memory until `bench.on_gpu.integer_tiles` has run. Small tiles
are for few rows, of which there is one a multiprocessor: as many stages as there is room for, or its loads do not keep up."""
EARLY = True
"""Let a product with gluon start while the kernel before it still runs, up to where it reads."""
SPECIALIZED = True
"""Make products with gluon by `program_specialized.py`."""
PLAIN = (
    Tile(128, 128, 128, 8, 3, 1.0, gluon=False, descriptors=False),
    Tile(64, 64, 128, 4, 4, 0.6, gluon=False, descriptors=False),
    Tile(16, 32, 256, 4, 4, 0.2, gluon=False, descriptors=False),
)
"""For other GPUs, and for operands whose rows the copy engine does not take."""
SMALL = (Tile(16, 32, 32, 4, 1, 1.0, gluon=False), Tile(16, 32, 32, 4, 1, 1.0, gluon=False, descriptors=False))
"""For the interpreter, with descriptors and without."""


def fastest(tiles: tuple[Tile, ...], m: int, n: int, processors: int) -> Tile:
    """By the multiprocessor that has the most tiles to make."""
    return min(tiles, key=lambda t: -(-t.count(m, n) // processors) * t.rows * t.columns / t.speed)


def multiply(rows: RowCodes, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    return _product(rows, packed, dtype, False)


def _product(rows: RowCodes, packed: Packed, dtype: torch.dtype, first: bool) -> Tensor:
    """first: as in `run`."""
    codes = rows.codes.contiguous()
    m, k = codes.shape
    n = packed.codes.shape[0]
    # The interpreter does not round to bfloat16, it cuts off.
    kind = torch.float32 if dtype not in (torch.float32, torch.bfloat16, torch.float16) or interpreted() else dtype
    out = torch.empty(m, n, dtype=kind, device=codes.device)
    if out.numel():
        tile = chosen(m, n, k, codes, packed)
        # Where tiles come in several waves, a weight read ahead is in the way of the rounding in front.
        one_wave = first and tile.gluon and tile.count(m, n) <= _device(codes.device)[1]
        run(tile, codes, rows, packed, out, one_wave)
    return out.to(dtype)


def chosen(m: int, n: int, k: int, codes: Tensor, packed: Packed) -> Tile:
    """The fastest that the device, and where codes `[m, k]` and the weight `[n, k]` lie, allow."""
    whole = k > 0 and k % ALIGNED == 0 and codes.data_ptr() % ALIGNED == 0 and packed.codes.data_ptr() % ALIGNED == 0
    if interpreted():
        return SMALL[0 if whole else 1]
    capability, processors = _device(codes.device)
    tiles = tuple(t for t in HOPPER if not t.gluon or gluon_works()) if whole and capability == (9, 0) else PLAIN
    return fastest(tiles, m, n, processors)


@cache
def _device(device: torch.device) -> tuple[tuple[int, int], int]:
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor), found.multi_processor_count


def gluon_works() -> bool:
    return has_gluon("quant.kernels.int8_linear.hopper")


@cache
def specialized_works() -> bool:
    return gluon_works() and has_gluon("quant.kernels.int8_linear.program_specialized")


def run(tile: Tile, codes: Tensor, rows: RowCodes, packed: Packed, out: Tensor, first: bool = False) -> None:
    """Write the product to out, with one of the tiles. first: the weight may be read before the kernel in front is over, which therefore
    must not write it, nor have started itself before a kernel was over that does."""
    (m, k), (n, _) = codes.shape, packed.codes.shape
    weight = packed.codes.contiguous()
    tiles = tile.count(m, n)
    # What a program does not read stands for what it is not given.
    added = packed.scale if packed.zero is None else rows.sums if rows.sums is not None else codes.sum(1, dtype=torch.int32)
    zero = packed.scale if packed.zero is None else packed.zero
    shared = (out, rows.scale, rows.zero, added, packed.scale, zero, packed.sums, m, n, k)
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "STEP": tile.step, "GROUP": GROUP}
    constants |= {"ZERO": packed.zero is not None, "ROW_ZERO": not packed.symmetric}
    if tile.gluon:
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Descriptor

        from quant.kernels.int8_linear.hopper import multiply as hopper

        layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
        aside, registers = tile.columns - tile.whole, tile.registers((packed.zero is not None) + (not packed.symmetric))
        apart = registers is not None and n % ALIGNED == 0 and SPECIALIZED and specialized_works()
        heights = ((codes, tile.high if apart else tile.rows), (weight, tile.whole), (weight, aside or tile.whole))
        described = [Descriptor.from_tensor(t, [high, tile.step], layout) for t, high in heights]
        constants |= {"COLUMNS": tile.whole, "ASIDE": aside, "STAGES": tile.stages, "WIDE": min(128, tile.whole), "EARLY": EARLY}
        if apart and registers is not None:
            from quant.kernels.int8_linear.program_specialized import multiply as specialized

            del constants["ROWS"]
            most, second = registers
            specialized[(tiles,)](
                *described, *shared, **constants, HIGH=tile.high, PARTS=tile.rows // tile.high, FIRST=first, REGISTERS=second,
                num_warps=4, maxnreg=most, launch_pdl=EARLY,
            )  # fmt: skip
            return
        hopper[(tiles,)](*described, *shared, **constants, WARPS=tile.warps, num_warps=tile.warps, launch_pdl=EARLY)
        return
    from quant.kernels.int8_linear.program import multiply as program

    given = [codes, weight]
    if tile.descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor

        given = [TensorDescriptor.from_tensor(t, [high, tile.step]) for t, high in ((codes, tile.rows), (weight, tile.columns))]
    programs = min(tiles, _device(codes.device)[1]) if tile.stay else tiles
    program[(programs,)](
        *given, *shared, **constants, DESCRIPTORS=tile.descriptors, WHOLE=k % tile.step == 0, STAY=programs < tiles,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def int8_linear(x: Tensor, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    # What rounds the rows does not write the weight, and waits for what does.
    return _product(rounded(x, packed), packed, dtype, True)
