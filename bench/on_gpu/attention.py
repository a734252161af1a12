"""Attention to a cache: quantized, beside torch's on bfloat16 and our own on bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from bench.on_gpu.clock import COLD, Bench, Goal, Row, known
from quant.kernels import kernel
from quant.kernels.kv_attention import Cache, Packed, Plain, append, per_token, prepare, triton
from quant.kernels.kv_attention.per_token import PerTokenPacked


def attention(b: Bench) -> Iterator[Row]:
    cold = b.size(int(COLD), 0)
    s, n, h, d = b.size(16, 1), b.size(4096, 70), b.size(32, 2), b.size(128, 16)
    most = Goal(100.0)
    forms: tuple[tuple[int, int, int | None, int, Goal | None], ...] = (
        *((4, 64, 64, 1, most), (4, 64, 128, 1, None), (2, 32, 128, 1, None), (8, 64, 64, 1, None), (4, 64, 64, 4, None)),
        # Ranges of keys per token, too: no window.
        *((4, 128, None, 1, most), (4, 64, None, 1, None), (2, 32, None, 1, None), (8, 128, None, 1, None), (4, 128, None, 4, None)),
    )
    for bits, group, residual, rows, goal in forms if not b.dry else ((4, 16, 16, 1, None), (4, 16, None, 1, None)):
        kv, dtype = h // rows, torch.float16 if b.dry else torch.bfloat16
        keys, values, q = (b.random(*size, dtype=dtype) for size in ((s, kv, n, d), (s, kv, n, d + 1), (s, h, d)))
        values = values[..., :d].contiguous()
        caches = [_cache(keys, values, bits, group, residual)]
        caches += [replace(caches[0], **_tensors(caches[0], torch.clone)) for _ in range(cold // caches[0].bytes)]
        padded = [pad(x, (0, 0, 0, -n % 64)) for x in (keys, values)]
        plain = Plain(padded[0], padded[1], caches[0].counts)
        run, exact = (kernel("kv_attention", name, b.device).run.kv_attention for name in (b.backend, "reference"))
        # The first sequence and the last.
        some, said = slice(None, None, max(1, s - 1)), f"kv_attention {s} x {n}, {h} heads x {d}, {kv} of keys"
        peer = partial(scaled_dot_product_attention, enable_gqa=rows > 1)
        for name, cache in (("", caches[0]), (" not quantized", plain))[: 2 if residual else 1]:
            few = replace(cache, **_tensors(cache, lambda x: x[some].contiguous()))  # noqa: B023
            want = exact(q[some].double(), few)
            there = [x[:, :, :n].to(dtype) for x in few.decoded(torch.float32)]
            allowed = 2 * float((peer(q[some, :, None], there[0], there[1])[:, :, 0].double() - want).norm() / want.norm()) + 2.0**-9
            # Of the call that is timed, all sequences at a time.
            error = float((run(q, cache)[some].double() - want).norm() / want.norm())
            if name:
                yield Row(f"{said}, not quantized", error, allowed, b.time(lambda i: run(q, plain)), {}, cache.bytes)  # noqa: B023
                continue
            took = b.time(lambda i: run(q, caches[i]), len(caches))  # noqa: B023
            peers = {"torch_bfloat16": b.time(lambda i: peer(q[:, :, None], keys, values))}  # noqa: B023
            if goal:
                for parts in (1, 2, 3, 4, 6, 8, 11, 16):
                    peers[f"splits_{parts}"] = b.time(lambda i: run(q, caches[i], splits=parts), len(caches))  # noqa: B023
            if goal and residual and not b.dry:
                triton.REGISTERS, before = 168, triton.REGISTERS
                for parts in (2, 3, 6, 8):
                    peers[f"registers_168_splits_{parts}"] = b.time(lambda i: run(q, caches[i], splits=parts), len(caches))  # noqa: B023
                triton.REGISTERS = before
            ranges = f"G={group}, R={residual}" if residual else f"per token, G={group}"
            named, work = f"{said}, {bits} bits, {ranges}", {"bfloat16": 4.0 * s * h * n * d}
            yield Row(named, error, allowed, took, known(**peers), cache.bytes, goal, work, launches=2)


def _cache(keys: Tensor, values: Tensor, bits: int, group: int, residual: int | None) -> Packed | PerTokenPacked:
    """With the last token appended, as a step of decoding finds it."""
    if residual is None:
        return per_token.prepare(keys, values, bits, False, group)
    n = keys.shape[2]
    made = prepare(keys[:, :, : n - 1], values[:, :, : n - 1], bits, bits, group, residual, n)
    append(made, keys[:, :, n - 1 :], values[:, :, n - 1 :])
    return made


def _tensors(of: Cache, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: change(x) for name, x in vars(of).items() if isinstance(x, Tensor)}
