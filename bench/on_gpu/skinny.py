"""`wq_gemm` on a GPU: beside dense products, and every shape of its programs that is worth trying.

python -m bench.on_gpu.skinny [--rows 16 64] [--bits 4] [--workers 12]

Compiles all candidates of `quant.kernels.wq_gemm.triton`, times them, and prints the table's choice and the best for each product: the
winners belong into `TILES` there. `python -m bench.gpu skinny` shows what is in the table beside cuBLAS and the made weight; where packed
models multiply so few rows with `wq_gemv`, that one, and `wq_gemm` beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.on_gpu import peers as other_packages
from bench.on_gpu.clock import Bench, Goal, Row, beside_dense, cold_copies, known, spread, worst
from bench.on_gpu.weights import GROUP, affine
from quant.kernels import kernel
from quant.kernels.products import rows_alone, with_many_rows
from quant.kernels.wq_gemm.triton import Shape, candidates, warm

SHAPES = ((4096, 4096), (4096, 11008), (8192, 8192), (8192, 28672))
ROWS = (16, 32, 64, 128, 256)
GOALS = {16: Goal(1.0, "speed", ("marlin", "humming")), 64: Goal(1.5, "speed", ("bfloat16",)), 256: Goal(0.5, "speed", ("bfloat16",))}
"""Rows ▸ goal of 4-bit codes."""


def products(b: Bench, rows: tuple[int, ...] = ROWS, bits: tuple[int, ...] = (2, 3, 4, 8)) -> list[tuple[int, int, int, int]]:
    """Bits, M, N, K."""
    if b.dry:
        return [(4, 9, 48, 256), (3, 9, 48, 256)]
    found = [(4, m, n, k) for n, k in SHAPES for m in rows if 4 in bits]
    return found + [(width, 16, 8192, 8192) for width in bits if width != 4]


def skinny(b: Bench) -> Iterator[Row]:
    run = kernel("wq_gemm", b.backend, b.device).run
    alone = kernel("wq_gemv", b.backend if b.dry else "auto", b.device)
    dense: Tensor | None = None
    for bits, m, n, k in products(b):
        if dense is None or dense.shape != (n, k):
            dense = b.random(n, k, dtype=torch.float16 if b.dry else torch.bfloat16)
        tensor = affine(b, n, k, bits)
        packed, x = run.prepare(tensor), b.random(m, k, dtype=dense.dtype)
        weight = tensor.dequantize()
        want = x.double() @ weight.double().T
        peer = linear(x, weight.to(x.dtype)).double() - want
        allowed = max(2 * float(peer.norm() / want.norm()), 1e-3 if b.dry else 4e-3)
        del weight
        error = float((run.wq_gemm(x, packed).double() - want).norm() / want.norm())
        copies = cold_copies(b, packed)
        took = b.time(lambda i: run.wq_gemm(x, copies[i]), len(copies))  # noqa: B023
        beside, own, ours = {}, alone.run.prepare(tensor), f"wq_gemm {n} x {k}, {bits} bits, M={m}"
        if m <= rows_alone(alone.run, own, x.dtype):
            beside, ours = known(wq_gemm=took), f"wq_gemv {n} x {k}, {bits} bits, M={m}, {alone.backend}, in place of wq_gemm"
            error = worst(error, float((alone.run.wq_gemv(x, own).double() - want).norm() / want.norm()))
            several, packed = cold_copies(b, own), own
            took = b.time(lambda i: alone.run.wq_gemv(x, several[i]), len(several))  # noqa: B023
        del want, peer
        peers = known(bfloat16=beside_dense(b, x, dense), made=b.time(lambda i: with_many_rows(x, own, alone.run)))  # noqa: B023
        peers |= beside | other_packages.times(b, "products", n, k, m, bits)
        goal, work = GOALS.get(m) if bits == 4 else None, {"bfloat16": 2.0 * m * n * k}
        yield Row(ours, error, allowed, took, peers, packed.bytes, goal, work)


def prompts(b: Bench) -> Iterator[Row]:
    n, k = b.size(8192, 16), b.size(8192, 256)
    run, dense = kernel("wq_gemv", b.backend if b.dry else "auto", b.device).run, b.random(n, k, dtype=torch.bfloat16)
    tensor = affine(b, n, k, 4)
    packed, weight = run.prepare(tensor), tensor.dequantize()
    for m, speed in ((64, 0.0), (256, 0.5), (512, 0.65), (1024, 0.75), (2304, 0.9)) if not b.dry else ((40, 0.0),):
        x = b.random(m, k, dtype=torch.float16 if b.dry else torch.bfloat16)
        some = spread(m)
        want = x[some].double() @ weight.double().T
        allowed = float((2 * (linear(x[some].float(), weight).double() - want).norm() + 2.0**-7 * want.norm()) / want.norm())
        error = float((with_many_rows(x, packed, run)[some].double() - want).norm() / want.norm())
        took = b.time(lambda i: with_many_rows(x, packed, run))  # noqa: B023
        peers = known(bfloat16=b.time(lambda i: linear(x, dense.to(x.dtype))), weight_alone=b.time(lambda i: run.values(packed, x.dtype)))  # noqa: B023
        goal, work = Goal(speed, "speed", ("bfloat16",)) if speed else None, {"bfloat16": 2.0 * m * n * k}
        moved = packed.bytes + 2 * 2 * n * k  # the made weight is written, and read by the product
        yield Row(f"4 bits {n} x {k}, the weight made, M={m}", error, allowed, took, peers, moved, goal, work, launches=2)


def compiled(wanted: list[tuple[int, int, int, int, Shape]], workers: int) -> None:
    """By processes, into Triton's cache."""
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for _ in pool.map(_warm, wanted, chunksize=1):
            pass


def _warm(given: tuple[int, int, int, int, Shape]) -> None:
    bits, m, n, k, cut = given
    try:
        warm(bits, m, n, k, GROUP, cut)
    except Exception as e:  # what does not compile is told when it is timed
        print(f"{given}: {e}", flush=True)


def timed(b: Bench, run: Any, bits: int, m: int, n: int, k: int, found: list[Shape]) -> None:
    tensor = affine(b, n, k, bits)
    copies = cold_copies(b, run.prepare(tensor))
    x = b.random(m, k, dtype=torch.bfloat16)
    want = linear(x.float(), tensor.dequantize())
    del tensor
    times: list[tuple[float, Shape]] = []
    for cut in found:
        try:
            error = float((run.wq_gemm(x, copies[0], None, cut).float() - want).norm() / want.norm())
            took = b.time(lambda i: run.wq_gemm(x, copies[i], None, cut), len(copies))  # noqa: B023
        except Exception as e:  # too much shared memory, say: the others are still worth knowing
            print(f"  {cut}: {type(e).__name__} {str(e)[:100]}", flush=True)
            continue
        assert took is not None
        print(f"  {cut}: {took:.2f} us, error {error:.1e}{'' if error < 1e-2 else '  WRONG'}", flush=True)
        times.append((took, cut))
    best, cut = min(times, key=lambda t: t[0])
    print(f"{bits} bits, M={m}, {n} x {k}: {copies[0].bytes / best / 1e3:.0f} GB/s, best {best:.2f} us {cut}, table {times[0][0]:.2f} us")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.on_gpu.skinny", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--bits", type=int, nargs="+", default=(2, 3, 4, 8))
    parser.add_argument("--workers", type=int, default=12)
    given = parser.parse_args()
    b = Bench(False)
    run = kernel("wq_gemm", b.backend, b.device).run
    count = torch.cuda.get_device_properties(b.device).multi_processor_count
    wanted = products(b, tuple(given.rows), tuple(given.bits))
    start = time.monotonic()
    compiled([(*product, cut) for product in wanted for cut in candidates(*product, count)], given.workers)
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    for product in wanted:
        timed(b, run, *product, candidates(*product, count))


if __name__ == "__main__":
    main()
