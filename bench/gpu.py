"""Kernels on a GPU: right first, then fast, each beside a peer and beside the device's own limits from the same run.

python -m bench.gpu [PIECE ...] [--out FILE] [--alone] [--dry]

Pieces: see --help; all when none is named. Times are of a replayed CUDA graph over inputs that no cache holds; the least of some replays.
`--dry` runs everything small on the CPU, in Triton's interpreter, and times nothing. Ends with 1 where a result is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench import gpu_attention, gpu_block, gpu_peers, gpu_searches
from bench.copies import copied
from bench.gpu_peer_kernels import SHAPES
from quant import quantize_linear
from quant.affine import ZeroKind
from quant.kernels import kernel
from quant.kernels.products import MOST_ROWS
from quant.scheme import ActivationScheme
from quant.tensors.affine import AffineTensor
from quant.tensors.base import Stored
from quant.tensors.binary import BinaryTensor
from quant.tensors.codebook import CodebookTensor

COLD, REPLAYS, GROUP = 512e6, 20, 128
"""Bytes that are read before an input's turn comes again; replays; columns that share a scale."""


@dataclass
class Row:
    name: str
    error: float
    allowed: float
    ours_us: float | None = None
    peers_us: dict[str, float] = field(default_factory=dict)
    read: int = 0
    """Bytes that a call has to read."""
    goal: str = ""

    def line(self, read_gbs: float | None) -> str:
        said = f"{self.name}: error {self.error:.1e} (allowed {self.allowed:.1e})"
        if self.ours_us is None:
            return said
        said += f", {self.ours_us:.1f} us"
        if self.read:
            speed = self.read / self.ours_us / 1e3
            said += f", {speed:.0f} GB/s" + (f" ({100 * speed / read_gbs:.0f} % of what can be read)" if read_gbs else "")
        said += "".join(f", {name} {us:.1f} us" for name, us in self.peers_us.items())
        return said + (f"; goal {self.goal}" if self.goal else "")


class Bench:
    """dry: small shapes on the CPU, nothing timed. alone: without other packages."""

    def __init__(self, dry: bool, alone: bool = False) -> None:
        self.dry, self.alone = dry, alone or dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.backend = "triton"
        self.read_gbs: float | None = None

    def size(self, real: int, small: int) -> int:
        return small if self.dry else real

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=torch.Generator(self.device).manual_seed(sum(shape)), device=self.device).to(dtype)

    def time(self, work: Callable[[int], object], copies: int = 1) -> float | None:
        """Microseconds of `work(i)`, i of `copies` inputs in turn."""
        if self.dry:
            work(0)
            return None
        calls = max(copies, 8)
        for i in range(3):
            work(i % copies)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                work(i % copies)
        return self._least(graph.replay) / calls

    def once(self, work: Callable[[], object]) -> float | None:
        """Microseconds of a call that no graph can hold."""
        if self.dry:
            work()
            return None
        return self._least(work)

    def _least(self, work: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            best = min(best, 1e3 * start.elapsed_time(end))
        return best


def known(**times: float | None) -> dict[str, float]:
    return {name: t for name, t in times.items() if t is not None}


def limits(b: Bench) -> Iterator[Row]:
    n = b.size(1 << 30, 1 << 10)
    x = b.random(n // 4)
    took = b.time(lambda i: x.sum())
    if took is not None:
        b.read_gbs = n / took / 1e3
    yield Row("read 1 GiB", 0, 0, took, read=n)
    y = torch.empty_like(x)
    yield Row("copy 1 GiB", 0, 0, b.time(lambda i: torch.mul(x, 1.0, out=y)), read=2 * n)
    k = b.size(8192, 64)
    a = b.random(k, k, dtype=torch.bfloat16)
    yield Row(f"bfloat16 product {k}³", 0, 0, b.time(lambda i: a @ a))
    for k in (4096, 11008) if not b.dry else (64,):
        a = b.random(k, k)
        h = a @ a.T + k * torch.eye(k, device=b.device)
        yield Row(f"Cholesky {k}", 0, 0, b.once(partial(torch.linalg.cholesky, h)))


def hessian(b: Bench) -> Iterator[Row]:
    run = kernel("hessian_syrk", "auto" if not b.dry else b.backend, b.device).run
    length = b.size(2048, 32)
    for k, goal in ((4096, "8 ms"), (11008, "58 ms")) if not b.dry else ((48, ""),):
        x = b.random(b.size(128, 2), length, k, dtype=torch.float16 if b.dry else torch.bfloat16)
        some = slice(0, min(k, 64))
        flat = x.view(-1, k)
        want = flat.double().T[some] @ flat.double()
        chunks = flat.split(16384)
        summed = torch.zeros(len(range(k)[some]), k, device=b.device)
        for c in chunks:
            summed += c.float().T[some] @ c.float() if b.dry else torch.mm(c.T[some], c, out_dtype=torch.float32)
        allowed = 2 * float((summed.double() - want).norm() / want.norm()) + 2.0**-24
        total = torch.empty(k, k, device=b.device)

        def row(name: str, add: Callable[[Tensor, Tensor], None], peers: dict[str, float], x: Tensor) -> Row:
            total.zero_()  # noqa: B023
            add(total, x)  # noqa: B023
            got = run.finished(total)[some].double()  # noqa: B023
            error = float((got - want).norm() / want.norm())  # noqa: B023
            took = b.once(lambda: add(total, x))  # noqa: B023
            return Row(f"{name}, {x.shape[0] * x.shape[1]} tokens x {x.shape[2]}", error, allowed, took, peers, goal=goal)  # noqa: B023

        peers = known(
            addmm_out_dtype=None if b.dry else b.once(lambda: [torch.mm(c.T, c, out_dtype=torch.float32) for c in chunks]),  # noqa: B023
            addmm_float32_of_a_sixteenth=b.once(lambda: torch.addmm(total, chunks[0].float().T, chunks[0].float())),  # noqa: B023
        )
        # In the chunks that a calibration adds.
        together = x.view(-1, min(flat.shape[0], getattr(run, "CHUNK", length)), k)
        yield row("hessian_syrk", run.add, peers, together)
        yield row("hessian_syrk, sequences of 2048 one by one", lambda t, x: [run.add(t, s[None]) for s in x] and None, {}, x)
        for name, add in () if b.dry else ways():
            yield row(name, add, {}, together)
        if k == 4096:
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
    for c in flat.split(16384):
        exact.addmm_(c.double().T, c.double())
    weight = b.random(1024, flat.shape[1])
    make = partial(quantize_linear, weight, method="gptq", bits=4, group_size=128)
    # Codes: ranges of groups follow the updated weights, whose last bits differ.
    ours, want = (cast(AffineTensor, make(hessian=h.float() / len(flat))).codes for h in (hessian, exact))
    return Row("codes of GPTQ that a float64 Hessian changes", float((ours != want).double().mean()), 1e-3)


def block(b: Bench) -> Iterator[Row]:
    for name, rows, wrong, took, peers, goal in gpu_block.figures(b):
        yield Row(name, wrong, 0.0, took, known(**peers) | gpu_peers.times(b, "block", rows, 128, 0, 4), goal=goal)


def rounding(b: Bench) -> Iterator[Row]:
    """Linears of 32 decoder blocks with 7e9 weights in all, one launch each; two blocks in turn, which no cache holds."""
    run, plain = (kernel("rtn_pack", name, b.device).run.rtn_pack for name in (b.backend, "reference"))
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)] if not b.dry else [(3, 256)]
    blocks = [[b.random(*shape, dtype=torch.bfloat16) / 50 for shape in shapes] for _ in range(b.size(2, 1))]
    count, weights = 32, sum(n * k for n, k in shapes)
    for name, grid, bits, width, codes, goal in (
        ("groups of 128, packed", "g_asym", 4, GROUP, False, "10 ms, 70 % of a copy's speed"),
        ("groups of 128, packed, and a byte a code", "g_asym", 4, GROUP, True, ""),
        ("groups of 128, packed", "g_asym", 3, GROUP, False, ""),
        ("rows, packed", "q_sym", 4, 0, False, ""),
    ):
        wrong = 0.0
        for w in {w.shape: w for w in blocks[0]}.values():
            given = (w, grid, bits, width or w.shape[1], torch.float16, codes)
            ours, want = run(*given), plain(*given)
            for part in ("scale", "zero", "stream", "told", *(["codes"] if codes else [])):
                wrong += float((getattr(ours, part) != getattr(want, part)).double().sum())

        def work(i: int) -> list[Any]:
            return [run(w, grid, bits, width or w.shape[1], torch.float16, codes) for w in blocks[i]]  # noqa: B023

        moved = sum(t.nbytes for p in work(0) for t in (p.scale, p.zero, p.stream, p.codes) if t is not None) + 2 * weights
        took = b.time(work, len(blocks))
        source, to = (torch.empty(moved // 2, dtype=torch.uint8, device=b.device) for _ in range(2))
        copied = b.time(lambda i: to.copy_(source))  # noqa: B023
        torch_took = b.once(lambda: [plain(w, grid, bits, width or w.shape[1], torch.float16) for w in blocks[0]])  # noqa: B023
        peers = {peer: count * us for peer, us in known(copy_of_as_much=copied, torch=torch_took).items()}
        ours_us = None if took is None else count * took
        yield Row(f"rtn_pack {bits} bits, {name}, {count} blocks", wrong, 0, ours_us, peers, count * moved, goal)


def products(b: Bench) -> Iterator[Row]:
    goals = {(8192, 28672, 4): "85 %", (8192, 8192, 4): "70 %", (4096, 11008, 4): "65 %", (4096, 4096, 4): "45 %"}
    goals |= {(8192, 8192, 2): "60 %", (8192, 8192, 3): "60 %"}
    for n, k in ((4096, 4096), (4096, 11008), (8192, 8192), (8192, 28672)) if not b.dry else ((16, 256),):
        yield from multiplied(b, n, k, ((f"{bits} bits", "wq_gemv", partial(_affine, bits=bits)) for bits in (2, 3, 4, 8)), goals)


def batches(b: Bench) -> Iterator[Row]:
    """Products with 16 rows."""
    for n, k in SHAPES if not b.dry else ((8, 128),):
        x, dense = (b.random(rows, k, dtype=torch.bfloat16) for rows in (16, n))
        plain = beside_dense(b, x, dense)
        for bits in (2, 3, 4, 8) if not b.dry else (4,):
            run, tensor = kernel("wq_gemv", b.backend if b.dry else "auto", b.device).run, _affine(b, n, k, bits)
            packed, weight = run.prepare(tensor), tensor.dequantize()
            copies = [packed, *(run.prepare(tensor) for _ in range(b.size(int(COLD / packed.bytes), 0)))]

            def ours(i: int) -> Tensor:
                return torch.cat([run.wq_gemv(part, copies[i]) for part in x.split(MOST_ROWS)])  # noqa: B023

            want = x.double() @ weight.double().T
            allowed = float((2 * (linear(x.float(), weight).double() - want).norm() + 2.0**-8 * want.norm()) / want.norm())
            error = float((ours(0).double() - want).norm() / want.norm())
            peers = known(bfloat16=plain) | gpu_peers.times(b, "products", n, k, 16, bits)
            yield Row(f"wq_gemv {n} x {k}, {bits} bits, M=16", error, allowed, b.time(ours, len(copies)), peers, packed.bytes)


def skinny(b: Bench) -> Iterator[Row]:
    yield from import_module("bench.wq_gemm").skinny(b)


def prompts(b: Bench) -> Iterator[Row]:
    yield from import_module("bench.wq_gemm").prompts(b)


def tables(b: Bench) -> Iterator[Row]:
    n, k = b.size(8192, 16), b.size(16384, 256)
    dense = b.random(n, k, dtype=torch.bfloat16)
    makers = [(f"codebooks of {bits} bits", "lut_gemv", partial(_codebook, bits=bits)) for bits in (2, 3, 4)]
    for name, operation, make in [*makers, ("signs", "binary_gemv", _signs)]:
        tensor: Any = make(b, n, k)
        ours, other = (kernel(operation, backend, b.device).run for backend in ("auto", "triton"))
        packed, weight = ours.prepare(tensor), tensor.dequantize()
        copies = [copied(packed) for _ in range(b.size(1 + int(COLD / packed.bytes), 1))]
        for m in (1, 2, 4, 8):
            x = b.random(m, k, dtype=torch.bfloat16)
            want = x.double() @ weight.double().T
            allowed = float((2 * (linear(x.float(), weight).double() - want).norm() + 2.0**-8 * want.norm()) / want.norm())
            error = float((getattr(ours, operation)(x, packed).double() - want).norm() / want.norm())
            took = b.time(lambda i: getattr(ours, operation)(x, copies[i]), len(copies))  # noqa: B023
            peers = {"bfloat16": beside_dense(b, x, dense)} if m in (1, 4) else {}
            if m in (1, 4):
                peers["triton"] = b.time(lambda i: getattr(other, operation)(x, copies[i]), len(copies))  # noqa: B023
            goal = "60 % of what can be read" if m == 1 else ""
            yield Row(f"{operation} {n} x {k}, {name}, M={m}", error, allowed, took, known(**peers), packed.bytes, goal)


def multiplied(b: Bench, n: int, k: int, makers: Any, goals: dict[tuple[int, int, int], str]) -> Iterator[Row]:
    """With one row of x and four, and 4-bit codes with two and eight too: the best backend, and Triton's beside it."""
    dense = b.random(n, k, dtype=torch.bfloat16)
    xs = {m: b.random(m, k, dtype=torch.bfloat16) for m in (1, 2, 4, 8)}
    plain = {m: beside_dense(b, x, dense) for m, x in xs.items()}
    for name, operation, make in makers:
        tensor: Stored = make(b, n, k)
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
            peers = known(bfloat16=plain[m])
            if chosen.backend != other.backend:
                peers |= known(triton=b.time(lambda i: getattr(other.run, operation)(x, copies_other[i]), len(copies_other)))  # noqa: B023
            if operation == "wq_gemv":
                peers |= gpu_peers.times(b, "products", n, k, m, bits)
            goal = goals.get((n, k, bits), "") if m == 1 else ""
            yield Row(f"{operation} {n} x {k}, {name}, M={m}, {chosen.backend}", error, allowed, took, peers, packed.bytes, goal)


def cold_copies(b: Bench, packed: Any) -> list[Any]:
    return [packed, *(copied(packed) for _ in range(b.size(int(COLD / packed.bytes), 0)))]


def beside_dense(b: Bench, x: Tensor, dense: Tensor) -> float | None:
    weights = [dense.clone() for _ in range(b.size(1 + int(COLD / dense.nbytes), 1))]
    return b.time(lambda i: linear(x, weights[i]), len(weights))


def _affine(b: Bench, n: int, k: int, bits: int) -> AffineTensor:
    g = torch.Generator(b.device).manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8, device=b.device)
    scale = ((torch.rand(n, k // GROUP, generator=g, device=b.device) + 0.5) / 2**bits).half()
    zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8, device=b.device)
    return AffineTensor(codes, scale, zero, bits, ZeroKind.CODE)


def _codebook(b: Bench, n: int, k: int, bits: int) -> CodebookTensor:
    g = torch.Generator(b.device).manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8, device=b.device)
    return CodebookTensor(codes, torch.full((k,), bits, device=b.device), b.random(k, 2**bits).half(), bits)


def _signs(b: Bench, n: int, k: int) -> BinaryTensor:
    flags = [b.random(n, k + i)[:, :k] > 0 for i in range(3)]
    salient = b.random(k) > 1.6
    scale, mean = (b.random(n, k // GROUP, values).half() for values in (4, 3))
    return BinaryTensor(flags[0], flags[1] & salient, flags[2] & ~salient, salient, scale, mean, GROUP)


def integers(b: Bench) -> Iterator[Row]:
    scheme = ActivationScheme(8)
    for n, k in ((4096, 4096), (11008, 4096), (8192, 8192)) if not b.dry else ((16, 64),):
        g = torch.Generator(b.device).manual_seed(n)
        codes = torch.randint(0, 256, (n, k), generator=g, dtype=torch.uint8, device=b.device)
        half = torch.full((n, 1), 128, dtype=torch.uint8, device=b.device)
        tensor = AffineTensor(codes, torch.rand(n, 1, generator=g, device=b.device) / 128, half, 8, ZeroKind.CONSTANT)
        run, library, plain = (kernel("int8_linear", name, b.device).run for name in (b.backend, "auto" if b.dry else "torch", "reference"))
        packed, dense = run.prepare(tensor, scheme), b.random(n, k, dtype=torch.bfloat16)
        for m in (256, 1024, 4096) if not b.dry else (40,):
            x = b.random(m, k, dtype=torch.float16 if b.dry else torch.bfloat16)
            want = plain.int8_linear(x[:64], packed)
            error = float((run.int8_linear(x, packed)[:64] - want).norm() / want.norm())
            took = b.time(lambda i: run.int8_linear(x, packed, x.dtype))  # noqa: B023
            rows = run.rounded(x, packed)
            peers = known(
                sums_alone=b.time(lambda i: run.multiply(rows, packed, x.dtype)),  # noqa: B023
                torch_int_mm=b.time(lambda i: library.int8_linear(x, packed, x.dtype)),  # noqa: B023
                bfloat16=b.time(lambda i: linear(x, dense.to(x.dtype))),  # noqa: B023
                rounding_alone=b.time(lambda i: run.rounded(x, packed)),  # noqa: B023
            )
            yield Row(f"int8_linear {n} x {k}, M={m}", error, 1e-5, took, peers, goal="1.4 x bfloat16")


def attention(b: Bench) -> Iterator[Row]:
    for name, error, allowed, took, peers, read, goal in gpu_attention.figures(b, b.size(int(COLD), 0)):
        yield Row(name, error, allowed, took, known(**peers), read, goal)


def hadamard(b: Bench) -> Iterator[Row]:
    run, plain = (kernel("hadamard", name, b.device).run.transform for name in (b.backend, "reference"))
    for n in (4096, 16384) if not b.dry else (64,):
        # The interpreter does not round to bfloat16, it cuts off.
        x = b.random(b.size((1 << 30) // n, 5), n, dtype=torch.float16 if b.dry else torch.bfloat16)
        few = x[:64]
        want = plain(few.double(), n**-0.5)
        error = float((run(few, n**-0.5).double() - want).norm() / want.norm())
        allowed = 2 * float((plain(few, n**-0.5).double() - want).norm() / want.norm())
        took = b.time(lambda i: run(x, n**-0.5))  # noqa: B023
        yield Row(f"hadamard {x.shape[0]} x {n}", error, allowed, took, read=2 * x.nbytes, goal="80 % of a copy")


def scoring(b: Bench) -> Iterator[Row]:
    run, plain = (kernel("token_log_probs", name, b.device).run.token_log_probs for name in (b.backend, "reference"))
    logits = b.random(b.size(4096, 8), b.size(128256, 300), dtype=torch.bfloat16)
    tokens = torch.arange(len(logits), device=b.device)
    want = torch.log_softmax(logits[:64].double(), -1).gather(-1, tokens[:64, None])[:, 0]
    error = float((run(logits[:64], tokens[:64]).double() - want).abs().max())
    peers = known(torch=b.time(lambda i: plain(logits, tokens)))
    yield Row(f"token_log_probs {tuple(logits.shape)}", error, 1e-3, b.time(lambda i: run(logits, tokens)), peers, logits.nbytes)


def searches(b: Bench) -> Iterator[Row]:
    for name, error, allowed, took, peers, goal in gpu_searches.measured(b):
        yield Row(name, error, allowed, took, known(**peers), goal=goal)


_ALL = (limits, hessian, block, rounding, products, batches, skinny, prompts, tables, integers, attention, hadamard, scoring, searches)
PIECES: dict[str, Callable[[Bench], Iterator[Row]]] = {f.__name__: f for f in _ALL}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("pieces", nargs="*", choices=[*PIECES, []], help="all when left out")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--alone", action="store_true", help="without other packages' kernels")
    parser.add_argument("--dry", action="store_true", help="small shapes on the CPU (TRITON_INTERPRET=1), nothing timed")
    given = parser.parse_args()
    if not given.dry and not torch.cuda.is_available():
        print("there is no CUDA device; `TRITON_INTERPRET=1 python -m bench.gpu --dry` checks the kernels without one", file=sys.stderr)
        return 2
    b = Bench(given.dry, given.alone)
    device = "the CPU, Triton's interpreter" if given.dry else torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    rows: list[Row] = []
    failed: list[str] = []
    for name in given.pieces or PIECES:
        began = time.perf_counter()
        try:
            for row in PIECES[name](b):
                rows.append(row)
                print(row.line(b.read_gbs) + ("" if row.error <= row.allowed else "  WRONG"), flush=True)
        except Exception:  # the other pieces are measured all the same
            failed.append(name)
            traceback.print_exc()
        print(f"-- {name}: {time.perf_counter() - began:.0f} s", flush=True)
    if given.out:
        told = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda, "date": time.strftime("%Y-%m-%d")}
        given.out.write_text(json.dumps(told | {"read_gbs": b.read_gbs, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return 0 if not failed and all(r.error <= r.allowed for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
