"""Products with packed weights, codebooks and signs beside torch's on 2 threads: right first, then the least of some times, with no
weight left in a cache.

python bench/wq_gemv.py [--out FILE]

Ends with 1 where a product is wrong, or where that of 2 or 3 bits and one row is less than 1.5 times as fast as torch's of a dense bfloat16
weight. What a peer is given is what it is fastest with: ATen's int4 and int8 kernels multiply bfloat16.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.copies import copied  # noqa: E402
from bench.kept import keep  # noqa: E402
from quant.affine import ZeroKind  # noqa: E402
from quant.kernels import kernel  # noqa: E402
from quant.methods.base import StoredTensor  # noqa: E402
from quant.tensors.affine import AffineTensor  # noqa: E402
from quant.tensors.binary import BinaryTensor  # noqa: E402
from quant.tensors.codebook import CodebookTensor, Outliers  # noqa: E402
from quant.tensors.row_codebook import RowCodebookTensor  # noqa: E402

SHAPES = ((4096, 11008), (11008, 4096))
"""(N, K)."""
GROUP, COLD, TIMES, GOAL, GOALS = 128, 64e6, 30, 1.5, ("2 bits", "3 bits")
"""Columns; bytes that are read before a weight's turn comes again; times as fast as bfloat16, and where."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    torch.set_num_threads(2)
    kernels = {operation: kernel(operation) for operation in ("wq_gemv", "lut_gemv", "row_lut_gemv", "binary_gemv")}
    backends = {operation: chosen.backend for operation, chosen in kernels.items()}
    said = ", ".join(f"{operation}: {name}" for operation, name in backends.items())
    print(f"{said}; 2 threads, groups of {GROUP}; milliseconds, least of {TIMES}")
    print(*(note for chosen in kernels.values() for note in chosen.notes), sep="\n", end="")
    made: dict[str, Any] = {
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "threads": 2,
        "group": GROUP,
        "backends": backends,
        "rows": [],
    }
    good = True
    for n, k in SHAPES:
        dense = torch.randn(n, k, generator=torch.Generator().manual_seed(n))
        for m in (1, 4):
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
            half = x.bfloat16()
            peers = {"float32": least(dense, partial(linear, x)), "bfloat16": least(dense.bfloat16(), partial(linear, half))}
            print(f"{n} x {k}, M={m}: " + ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in peers.items()), flush=True)
            for name, operation, tensor in formats(n, k):
                run = getattr(kernels[operation].run, operation)
                packed = kernels[operation].run.prepare(tensor)
                error, allowed = errors(x, tensor, run(x, packed))
                ours, ours_half = (least(packed, partial(multiply, run, v)) for v in (x, half))
                beside = aten(half, tensor) if isinstance(tensor, AffineTensor) and tensor.bits in (4, 8) else {}
                ratio, goal = peers["bfloat16"] / ours_half, name in GOALS and m == 1
                row: dict[str, Any] = {"n": n, "k": k, "m": m, "format": name, "megabytes": packed.bytes / 1e6}
                row |= {"error": error, "allowed": allowed}
                row |= {"ours_s": ours, "ours_bfloat16_s": ours_half, "times_bfloat16": ratio, "peers_s": peers | beside}
                made["rows"].append(row)
                keep(given.out, made)
                good &= error <= allowed and (ratio >= GOAL or not goal)
                line = f"  {name}: error {error:.1e} (allowed {allowed:.1e}), {1e3 * ours:.2f} (bfloat16 x {1e3 * ours_half:.2f}), "
                line += f"{packed.bytes / ours / 1e9:.1f} GB/s, {ratio:.1f} times bfloat16"
                line += f" (goal {GOAL})" if goal else ""
                print(line + "".join(f", {peer} {1e3 * seconds:.2f}" for peer, seconds in beside.items()), flush=True)
    return 0 if good else 1


def formats(n: int, k: int) -> list[tuple[str, str, StoredTensor]]:
    """Name, operation, weight."""
    found: list[tuple[str, str, StoredTensor]] = [(f"{bits} bits", "wq_gemv", affine(n, k, bits)) for bits in (2, 3, 4, 8)]
    found += [(f"codebooks of {bits} bits", "lut_gemv", codebook(n, k, bits)) for bits in (2, 3, 4)]
    found.append(("codebooks of 2 bits, 1 % of the weights kept", "lut_gemv", codebook(n, k, 2, n // 100)))
    found += [(f"tables of rows of {bits} bits", "row_lut_gemv", row_codebook(n, k, bits)) for bits in (2, 3, 4)]
    return [*found, ("signs", "binary_gemv", signs(n, k))]


def affine(n: int, k: int, bits: int) -> AffineTensor:
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
    scale = ((torch.rand(n, k // GROUP, generator=g) + 0.5) / 2**bits).half()
    return AffineTensor(codes, scale, torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8), bits, ZeroKind.CODE)


def codebook(n: int, k: int, bits: int, kept: int = 0) -> CodebookTensor:
    """`kept` weights of every column kept aside."""
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
    outliers = None
    if kept:
        rows = torch.stack([torch.randperm(n, generator=g)[:kept].sort().values for _ in range(k)]).flatten()
        outliers = Outliers(torch.full((k,), kept), rows, torch.randn(len(rows), generator=g).half())
    return CodebookTensor(codes, torch.full((k,), bits), torch.randn(k, 2**bits, generator=g).half(), bits, outliers)


def row_codebook(n: int, k: int, bits: int) -> RowCodebookTensor:
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
    return RowCodebookTensor(codes, torch.randn(n, 2**bits, generator=g).half(), bits)


def signs(n: int, k: int) -> BinaryTensor:
    g = torch.Generator().manual_seed(1)
    salient = torch.rand(k, generator=g) < 0.05
    sign, second, split = (torch.rand(n, k, generator=g) < 0.5 for _ in range(3))
    scale, mean = (torch.randn(n, k // GROUP, values, generator=g).half() for values in (4, 3))
    return BinaryTensor(sign, second & salient, split & ~salient, salient, scale, mean, GROUP)


def errors(x: Tensor, tensor: StoredTensor, ours: Tensor) -> tuple[float, float]:
    """Relative to the product in float64, where (code - zero) · scale is exact: of ours; and twice that of torch's in float32, or half an
    ulp of all terms' magnitudes."""
    weight = tensor.dequantize()
    want = x.double() @ weight.double().T
    allowed = 2 * (linear(x, weight).double() - want).norm() + 2.0**-24 * linear(x.abs(), weight.abs()).double().norm()
    return float((ours.double() - want).norm() / want.norm()), float(allowed / want.norm())


def least(weight: Any, work: Callable[[Any], object], times: int = TIMES) -> float:
    """Seconds; with as many copies of the weight in turn as keep each out of the caches."""
    one = weight if isinstance(weight, tuple) else (weight,)
    size = sum(w.bytes if hasattr(w, "bytes") else w.numel() * w.element_size() for w in one)
    copies = [weight, *(copied(weight) for _ in range(int(COLD / size)))]
    best = float("inf")
    for i in range(times):
        start = time.perf_counter()
        work(copies[i % len(copies)])
        best = min(best, time.perf_counter() - start)
    return best


def multiply(run: Callable[[Tensor, Any], Tensor], x: Tensor, packed: Any) -> Tensor:
    return run(x, packed)


def aten(x: Tensor, tensor: AffineTensor) -> dict[str, float]:
    """Seconds of ATen's kernels for 4 and 8 bits, where this torch has them for this machine; the codes are the same."""
    n, _ = tensor.shape
    try:
        if tensor.bits == 4:
            codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(tensor.codes.int(), 1)
            ranges = torch.stack([tensor.scale.T, torch.zeros_like(tensor.scale.T)], dim=2).bfloat16().contiguous()

            def int4(w: tuple[Tensor, Tensor]) -> Tensor:
                made: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, w[0], GROUP, w[1])
                return made

            return {"ATen int4": least((codes, ranges), int4)}
        codes = (tensor.codes.int() - 128).to(torch.int8)
        scales = torch.ones(n, dtype=torch.bfloat16)
        return {"ATen int8, one scale per row": least((codes, scales), lambda w: torch.ops.aten._weight_int8pack_mm(x, *w))}
    except (AttributeError, RuntimeError) as e:
        print(f"  ATen's kernel for {tensor.bits} bits does not run here: {str(e).splitlines()[0]}")
        return {}


if __name__ == "__main__":
    sys.exit(main())
