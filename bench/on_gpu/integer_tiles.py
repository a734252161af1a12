"""Tiles that sums of integers may be made with on a GPU: each right first, then timed, beside torch's; the table `HOPPER` is made from it.

python -m bench.on_gpu.integer_tiles [--quick]

Compiles in threads. Ends with 1 where a product is wrong; a tile that fails is told and left out.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.on_gpu.clock import Bench
from quant.kernels import kernel
from quant.kernels.fake_quantize import RowCodes
from quant.kernels.int8_linear import Packed, eager, triton
from quant.kernels.int8_linear.triton import HOPPER, Tile, gluon_works

MORE = (
    Tile(128, 128, 128, 8, 4, 1.0),
    Tile(128, 256, 128, 8, 3, 1.0),
    Tile(64, 256, 128, 4, 3, 1.0),
    Tile(128, 128, 128, 4, 3, 1.0, gluon=False),
    Tile(128, 256, 128, 8, 4, 1.0, gluon=False),
    Tile(128, 256, 128, 8, 3, 1.0, gluon=False, stay=True),
    Tile(64, 32, 256, 4, 4, 1.0, gluon=False),
    Tile(16, 64, 256, 4, 4, 1.0, gluon=False),
)
SHAPES = ((4096, 4096), (11008, 4096), (8192, 8192))


def problem(b: Bench, m: int, n: int, k: int) -> tuple[RowCodes, Packed]:
    g = torch.Generator(b.device).manual_seed(n)
    codes, weight = (torch.randint(-127, 128, (r, k), generator=g, device=b.device).to(torch.int8) for r in (m, n))
    scale, row_scale = (torch.rand(r, generator=g, device=b.device) for r in (n, m))
    sums = weight.sum(1, dtype=torch.int64).float()
    return RowCodes(codes, row_scale[:, None], torch.zeros(m, 1, device=b.device)), Packed(weight, scale, None, sums, 8, True, 1.0)


def compiled(b: Bench, tiles: list[Tile], dtype: torch.dtype) -> list[Tile]:
    """Those that compile and are right on a shape which none of them holds whole."""
    rows, packed = problem(b, 520, 776, 4096)
    want = eager.multiply(rows, packed).to(dtype)

    def first(tile: Tile) -> str:
        out = torch.full((520, 776), torch.nan, dtype=dtype, device=b.device)
        try:
            triton.run(tile, rows.codes, rows, packed, out)
            torch.cuda.synchronize()
        except Exception as e:
            return f"failed: {e!r}"[:300]
        # The two products with scales may come in another order of rounding.
        return "" if torch.allclose(out.double(), want.double(), rtol=2.0**-7 if dtype is torch.bfloat16 else 2.0**-22, atol=0) else "WRONG"

    began = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(first, tiles))
    print(f"{len(tiles)} tiles compiled in {time.perf_counter() - began:.0f} s", flush=True)
    for tile, message in zip(tiles, told, strict=True):
        if message:
            print(f"{tile}: {message}", flush=True)
    return [t for t, message in zip(tiles, told, strict=True) if not message]


def main() -> int:
    b, quick = Bench(dry=False), "--quick" in sys.argv[1:]
    tiles = [t for t in (*HOPPER, *MORE) if not t.gluon or gluon_works()]
    right = compiled(b, tiles, torch.bfloat16)
    plain = kernel("int8_linear", "triton", b.device).run
    for (n, k), m in product(SHAPES[:1] if quick else SHAPES, (1, 16, 64, 256, 1024, 4096)):
        rows, packed = problem(b, m, n, k)
        x, dense = b.random(m, k, dtype=torch.bfloat16), b.random(n, k, dtype=torch.bfloat16)
        found = []
        for tile in right:
            if tile.rows > max(64, 2 * m) or (m >= 1024 and tile.rows * tile.columns < 8192):
                continue
            out = torch.empty(m, n, dtype=torch.bfloat16, device=b.device)

            def ours(_: int, tile: Tile = tile, out: Tensor = out) -> None:
                triton.run(tile, rows.codes, rows, packed, out)  # noqa: B023

            found.append((b.time(ours) or 0.0, tile))
        torch_us = b.time(lambda i: eager.multiply(rows, packed, torch.bfloat16))  # noqa: B023
        auto, dense_us = (
            b.time(lambda i: plain.multiply(rows, packed, torch.bfloat16)),  # noqa: B023
            b.time(lambda i: linear(x, dense)),  # noqa: B023
        )
        print(f"{n} x {k}, M={m}: bfloat16 {dense_us:.1f} us, torch {torch_us:.1f} us, chosen {auto:.1f} us", flush=True)
        for us, t in sorted(found, key=lambda f: f[0]):
            kind = ("gluon" if t.gluon else "triton") + (", stays" if t.stay else "")
            rate = 2e-6 * m * n * k / us
            print(
                f"    {us:7.1f} us {rate:6.0f} TOP/s  {t.rows} x {t.columns} x {t.step}, {t.warps} warps, {t.stages} stages, {kind}",
                flush=True,
            )
    return 0 if len(right) == len(tiles) else 1


if __name__ == "__main__":
    sys.exit(main())
