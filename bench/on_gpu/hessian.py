"""Sums of outer products of calibration inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor

from bench.on_gpu.clock import Bench, Goal, Row, known, spread
from quant import quantize_linear
from quant.kernels import kernel
from quant.tensors.affine import AffineTensor


def hessian(b: Bench) -> Iterator[Row]:
    run = kernel("hessian_syrk", "auto" if not b.dry else b.backend, b.device).run
    length = b.size(2048, 32)
    for k, goal in ((4096, Goal(8e3)), (11008, Goal(58e3))) if not b.dry else ((48, None),):
        x = b.random(b.size(128, 2), length, k, dtype=torch.float16 if b.dry else torch.bfloat16)
        some = spread(k)
        flat = x.view(-1, k)
        want = flat.double().T[some] @ flat.double()
        chunks = torch.split(flat, 16384)
        summed = torch.zeros(len(range(k)[some]), k, device=b.device)
        for c in chunks:
            summed += c.float().T[some] @ c.float() if b.dry else torch.mm(c.T[some].contiguous(), c, out_dtype=torch.float32)
        allowed = 2 * float((summed.double() - want).norm() / want.norm()) + 2.0**-24
        total = torch.empty(k, k, device=b.device)

        def row(name: str, add: Callable[[Tensor, Tensor], None], peers: dict[str, float], x: Tensor) -> Row:
            total.zero_()  # noqa: B023
            add(total, x)  # noqa: B023
            got = run.finished(total)[some].double()  # noqa: B023
            error = float((got - want).norm() / want.norm())  # noqa: B023
            took = b.once(lambda: add(total, x))  # noqa: B023
            tokens, width = x.shape[0] * x.shape[1], x.shape[2]
            work = {"bfloat16": tokens * width * (width + 1.0)}
            return Row(f"{name}, {tokens} tokens x {width}", error, allowed, took, peers, x.nbytes, goal, work)  # noqa: B023

        peers = known(
            addmm_out_dtype=None if b.dry else b.once(lambda: [torch.mm(c.T, c, out_dtype=torch.float32) for c in chunks]),  # noqa: B023
            addmm_float32_of_a_sixteenth=b.once(lambda: torch.addmm(total, chunks[0].float().T, chunks[0].float())),  # noqa: B023
        )

        def one_by_one(to: Tensor, x: Tensor) -> None:
            for sequence in x:
                run.add(to, sequence[None])

        # In the chunks that a calibration adds.
        together = x.view(-1, min(flat.shape[0], getattr(run, "CHUNK", length)), k)
        yield row("hessian_syrk", run.add, peers, together)
        yield row("hessian_syrk, sequences of 2048 one by one", one_by_one, {}, x)
        for name, add in () if b.dry else ways():
            yield row(name, add, {}, together)
        total.zero_()
        run.add(total, together)
        yield same_codes(b, flat, run.finished(total))


def ways() -> Iterator[tuple[str, Callable[[Tensor, Tensor], None]]]:
    """Other tiles and panels, to choose from."""
    from quant.kernels.hessian_syrk import panels
    from quant.kernels.hessian_syrk.triton import Tile
    from quant.kernels.hessian_syrk.triton import add as tiled

    yield f"panels of {panels.PANEL}", panels.add
    for tile in (
        Tile(128, 128, 64, 8, 4, True),
        Tile(128, 128, 64, 4, 3, True),
        Tile(128, 256, 64, 8, 4, True),
        Tile(256, 128, 64, 8, 4, True),
    ):
        yield f"{tile}", partial(tiled, tile=tile)


def same_codes(b: Bench, flat: Tensor, hessian: Tensor) -> Row:
    """Of GPTQ with this Hessian and with one summed in float64: the share that differs."""
    exact = torch.zeros(flat.shape[1], flat.shape[1], dtype=torch.float64, device=b.device)
    for c in torch.split(flat, 16384):
        exact.addmm_(c.double().T, c.double())
    weight = b.random(b.size(1024, 64), flat.shape[1])
    make = partial(quantize_linear, weight, method="gptq", bits=4, group_size=b.size(128, 16))
    # Codes: ranges of groups follow the updated weights, whose last bits differ.
    ours, want = (cast(AffineTensor, make(hessian=h.float() / len(flat))).codes for h in (hessian, exact))
    return Row(f"codes of GPTQ that a float64 Hessian changes, {flat.shape[1]} columns", float((ours != want).double().mean()), 1e-3)
