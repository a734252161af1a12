"""What the device can do at most: the ceilings that all other rows of a run are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bench.on_gpu.clock import Bench, Row, known

ORDERS = (4096, 8192, 11008, 28672)
"""Of Hessians in models of 7 and 70 billion weights."""


def limits(b: Bench) -> Iterator[Row]:
    ceilings = b.ceilings
    n = b.size(1 << 30, 1 << 10)
    x = b.random(n // 4)
    took = b.time(lambda i: x.sum())
    if took is not None:
        ceilings.read_gbs = n / took / 1e3
    yield Row("read 1 GiB", 0, 0, took, read=n)
    y = torch.empty_like(x)
    took = b.time(lambda i: torch.mul(x, 1.0, out=y))
    if took is not None:
        ceilings.copy_gbs = 2 * n / took / 1e3
    yield Row("copy 1 GiB", 0, 0, took, read=2 * n)
    one = b.random(1)
    ceilings.launch_us = b.time(lambda i: one.mul_(1.0), 64)
    yield Row("a launch with nothing to do", 0, 0, ceilings.launch_us)
    k = b.size(8192, 64)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a = b.random(k, k, dtype=dtype)
        yield from _product(b, name, k, b.time(lambda i: a @ a))  # noqa: B023
    codes = torch.ones(k, k, dtype=torch.int8, device=b.device)
    yield from _product(b, "int8", k, b.time(lambda i: torch._int_mm(codes, codes.T)))
    for k in ORDERS if not b.dry else (64,):
        a = b.random(k, k)
        # Its eigenvalues are k ± 2 √(2 k): definite, without the product of a and its transpose.
        a = (a + a.T).add_(torch.eye(k, device=b.device), alpha=k)
        took = b.once(partial(torch.linalg.cholesky, a))
        ceilings.cholesky_us |= {int(order): us for order, us in known(**{str(k): took}).items()}
        yield Row(f"Cholesky {k}", 0, 0, took, work={"float32": k**3 / 3})


def _product(b: Bench, name: str, k: int, took: float | None) -> Iterator[Row]:
    if took is not None:
        b.ceilings.tflops[name] = 2 * k**3 / took / 1e6
    yield Row(f"{name} product {k}³", 0, 0, took, work={name: 2 * k**3})
