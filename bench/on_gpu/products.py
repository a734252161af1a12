"""Products of a few rows with packed weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.on_gpu import peers
from bench.on_gpu.clock import Bench, Goal, Row, beside_dense, cold_copies, known
from bench.on_gpu.peer_kernels import SHAPES
from bench.on_gpu.weights import affine, codebook, row_codebook, signs
from quant.kernels import kernel
from quant.kernels.products import most_rows
from quant.methods.base import StoredTensor


def products(b: Bench) -> Iterator[Row]:
    shares = {(8192, 28672, 4): 0.85, (8192, 8192, 4): 0.7, (4096, 11008, 4): 0.65, (4096, 4096, 4): 0.45}
    shares |= {(8192, 8192, 2): 0.6, (8192, 8192, 3): 0.6}
    goals = {product: Goal(share, "read") for product, share in shares.items()}
    for n, k in ((4096, 4096), (4096, 11008), (8192, 8192), (8192, 28672)) if not b.dry else ((16, 256),):
        yield from multiplied(b, n, k, ((f"{bits} bits", "wq_gemv", partial(affine, bits=bits)) for bits in (2, 3, 4, 8)), goals)


def batches(b: Bench) -> Iterator[Row]:
    """Products with 16 rows."""
    for n, k in SHAPES if not b.dry else ((8, 128),):
        x, dense = (b.random(rows, k, dtype=torch.bfloat16) for rows in (16, n))
        plain = beside_dense(b, x, dense)
        for bits in (2, 3, 4, 8) if not b.dry else (4,):
            run, tensor = kernel("wq_gemv", b.backend if b.dry else "auto", b.device).run, affine(b, n, k, bits)
            packed, weight = run.prepare(tensor), tensor.dequantize()
            copies = cold_copies(b, packed)

            def ours(i: int) -> Tensor:
                return torch.cat([run.wq_gemv(part, copies[i]) for part in torch.split(x, most_rows(run))])  # noqa: B023

            want = x.double() @ weight.double().T
            allowed = float((2 * (linear(x.float(), weight).double() - want).norm() + 2.0**-8 * want.norm()) / want.norm())
            error = float((ours(0).double() - want).norm() / want.norm())
            others = known(bfloat16=plain) | peers.times(b, "products", n, k, 16, bits)
            yield Row(f"wq_gemv {n} x {k}, {bits} bits, M=16", error, allowed, b.time(ours, len(copies)), others, packed.bytes)


def tables(b: Bench) -> Iterator[Row]:
    n, k = b.size(8192, 16), b.size(16384, 256)
    dense = b.random(n, k, dtype=torch.bfloat16)
    makers: list[tuple[str, str, Any]] = [(f"codebooks of {bits} bits", "lut_gemv", partial(codebook, bits=bits)) for bits in (2, 3, 4)]
    makers += [(f"tables of rows of {bits} bits", "row_lut_gemv", partial(row_codebook, bits=bits)) for bits in (2, 3, 4)]
    for name, operation, make in [*makers, ("signs", "binary_gemv", signs)]:
        tensor: Any = make(b, n, k)
        ours, other = (kernel(operation, backend, b.device).run for backend in ("auto", "triton"))
        packed, weight = ours.prepare(tensor), tensor.dequantize()
        copies, copies_other = (cold_copies(b, p) for p in (packed, other.prepare(tensor)))
        for m in (1, 2, 4, 8):
            x = b.random(m, k, dtype=torch.bfloat16)
            want = x.double() @ weight.double().T
            allowed = float((2 * (linear(x.float(), weight).double() - want).norm() + 2.0**-8 * want.norm()) / want.norm())
            error = float((getattr(ours, operation)(x, packed).double() - want).norm() / want.norm())
            took = b.time(lambda i: getattr(ours, operation)(x, copies[i]), len(copies))  # noqa: B023
            peers = {"bfloat16": beside_dense(b, x, dense)} if m in (1, 4) else {}
            if m in (1, 4):
                peers["triton"] = b.time(lambda i: getattr(other, operation)(x, copies_other[i]), len(copies_other))  # noqa: B023
            goal = Goal(0.6, "read") if m == 1 and operation != "row_lut_gemv" else None
            named, work = f"{operation} {n} x {k}, {name}, M={m}", {"float32": 2.0 * m * n * k}
            yield Row(named, error, allowed, took, known(**peers), getattr(packed, "read", packed.bytes), goal, work)


def multiplied(b: Bench, n: int, k: int, makers: Any, goals: dict[tuple[int, int, int], Goal]) -> Iterator[Row]:
    """With one row of x and four, and 4-bit codes with two and eight too: the best backend, and Triton's beside it."""
    dense = b.random(n, k, dtype=torch.bfloat16)
    xs = {m: b.random(m, k, dtype=torch.bfloat16) for m in ((1, 2, 4, 8) if not b.dry else (1, 2))}
    plain = {m: beside_dense(b, x, dense) for m, x in xs.items()}
    for name, operation, make in makers:
        tensor: StoredTensor = make(b, n, k)
        chosen = kernel(operation, b.backend if b.dry else "auto", b.device)
        other = kernel(operation, b.backend, b.device)
        packed, packed_other = (one.run.prepare(tensor) for one in (chosen, other))
        copies, copies_other = (cold_copies(b, one) for one in (packed, packed_other))
        weight = tensor.dequantize()
        for m, x in xs.items():
            bits = getattr(tensor, "bits", 0)
            if m in (2, 8) and (operation, bits) != ("wq_gemv", 4):
                continue
            want = x.double() @ weight.double().T
            allowed = float((2 * (linear(x.float(), weight).double() - want).norm() + 2.0**-8 * want.norm()) / want.norm())
            error = float((getattr(chosen.run, operation)(x, packed).double() - want).norm() / want.norm())
            took = b.time(lambda i: getattr(chosen.run, operation)(x, copies[i]), len(copies))  # noqa: B023
            others = known(bfloat16=plain[m])
            if chosen.backend != other.backend:
                others |= known(triton=b.time(lambda i: getattr(other.run, operation)(x, copies_other[i]), len(copies_other)))  # noqa: B023
            if operation == "wq_gemv":
                others |= peers.times(b, "products", n, k, m, bits)
            goal = goals.get((n, k, bits)) if m == 1 else None
            named = f"{operation} {n} x {k}, {name}, M={m}, {chosen.backend}"
            yield Row(named, error, allowed, took, others, packed.bytes, goal, {"float32": 2.0 * m * n * k})
