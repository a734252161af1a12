"""Kernels on a GPU: right first, then fast, each beside a peer and beside the device's own limits from the same run.

python -m bench.gpu [PIECE ...] [--out FILE] [--alone] [--folder FOLDER] [--layers N] [--longest SECONDS] [--dry]

Pieces: see --help; all when none is named, and `limits` always: goals are judged, and what limits a row that misses its goal is reckoned,
by what the device does in the same run. Times are the least of some replays of a CUDA graph: of products of few rows and of attention over
inputs that no cache holds, of what is larger than a cache or reads its input again and again over one input; what no graph can hold is
timed call by call. Those of whole models are of one run, by the clock on the wall. `--dry` runs everything small on the CPU, in Triton's
interpreter, and times nothing. Ends with 1 where a result is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear

from bench.kept import commit, keep
from bench.on_gpu.attention import attention
from bench.on_gpu.block import block
from bench.on_gpu.clock import Bench, Goal, Row, known, spread
from bench.on_gpu.forms import forms
from bench.on_gpu.further import further
from bench.on_gpu.hessian import hessian
from bench.on_gpu.limits import limits
from bench.on_gpu.products import batches, products, tables
from bench.on_gpu.rounding import rounding
from bench.on_gpu.searches import searches
from bench.on_gpu.skinny import prompts, skinny
from bench.whole.pieces import decoding, decoding_experts, decoding_large, decoding_widths, streamed, whole, whole_searches
from quant.affine import ZeroKind
from quant.kernels import kernel
from quant.scheme import ActivationScheme
from quant.tensors.affine import AffineTensor
from workers.environment import environment


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
            some = spread(m)
            want = plain.int8_linear(x[some], packed)
            error = float((run.int8_linear(x, packed)[some] - want).norm() / want.norm())
            # The call that is timed gives a type of 16 bits: within its last place, but for sums that all but cancel.
            timed, least = run.int8_linear(x, packed, x.dtype)[some].float(), 1e-5 * float(want.abs().mean())
            if not torch.allclose(timed, want, rtol=2.0**-7, atol=least):
                error = float("inf")
            took = b.time(lambda i: run.int8_linear(x, packed, x.dtype))  # noqa: B023
            rows = run.rounded(x, packed)
            peers = known(
                sums_alone=b.time(lambda i: run.multiply(rows, packed, x.dtype)),  # noqa: B023
                torch_int_mm=b.time(lambda i: library.int8_linear(x, packed, x.dtype)),  # noqa: B023
                bfloat16=b.time(lambda i: linear(x, dense.to(x.dtype))),  # noqa: B023
                rounding_alone=b.time(lambda i: run.rounded(x, packed)),  # noqa: B023
            )
            goal, work = Goal(1.4, "speed", ("bfloat16",)), {"int8": 2.0 * m * n * k}
            yield Row(f"int8_linear {n} x {k}, M={m}", error, 1e-5, took, peers, goal=goal, work=work, launches=2)


def hadamard(b: Bench) -> Iterator[Row]:
    fast, slow = (kernel("hadamard", name, b.device).run for name in (b.backend, "reference"))
    rows, run, plain = kernel("fake_quantize", b.backend, b.device).run, fast.transform, slow.transform
    for n in (4096, 11008, 14336, 16384, 28672) if not b.dry else (64, 96):
        # The interpreter does not round to bfloat16, it cuts off.
        x = b.random(b.size((1 << 30) // n, 5), n, dtype=torch.float16 if b.dry else torch.bfloat16)
        some = spread(len(x))
        few = x[some]
        want = plain(few.double(), n**-0.5)
        error = float((run(x, n**-0.5)[some].double() - want).norm() / want.norm())
        allowed = 2 * float((plain(few, n**-0.5).double() - want).norm() / want.norm())
        took = b.time(lambda i: run(x, n**-0.5))  # noqa: B023
        yield Row(f"hadamard {x.shape[0]} x {n}", error, allowed, took, read=2 * x.nbytes, goal=Goal(0.8, "copy"))
        own = partial(fast.encode, bits=8, symmetric=True, factor=n**-0.5)
        two = rows.encode(run(few, n**-0.5), 8, True)
        peers = known(apart=b.time(lambda i: rows.encode(run(x, n**-0.5), 8, True)))  # noqa: B023
        differ, took = float((own(x).codes[some] != two.codes).sum()), b.time(lambda i: own(x))  # noqa: B023
        yield Row(f"hadamard and int8 {x.shape[0]} x {n}", differ, 0, took, peers, read=x.nbytes + x.numel())


def scoring(b: Bench) -> Iterator[Row]:
    run, plain = (kernel("token_log_probs", name, b.device).run.token_log_probs for name in (b.backend, "reference"))
    logits = b.random(b.size(4096, 8), b.size(128256, 300), dtype=torch.bfloat16)
    tokens = torch.arange(len(logits), device=b.device)
    some = spread(len(logits))
    want = torch.log_softmax(logits[some].double(), -1).gather(-1, tokens[some, None])[:, 0]
    error = float((run(logits, tokens)[some].double() - want).abs().max())
    peers = known(torch=b.time(lambda i: plain(logits, tokens)))
    yield Row(f"token_log_probs {tuple(logits.shape)}", error, 1e-3, b.time(lambda i: run(logits, tokens)), peers, logits.nbytes)


_KERNELS = (hessian, block, rounding, products, batches, skinny, prompts, tables, integers, attention, hadamard, scoring, searches)
_MODELS = (further, forms, whole, whole_searches, streamed, decoding, decoding_widths, decoding_large, decoding_experts)
PIECES: dict[str, Callable[[Bench], Iterator[Row]]] = {f.__name__: f for f in (limits, *_KERNELS, *_MODELS)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("pieces", nargs="*", choices=[*PIECES, []], help="all when left out")
    parser.add_argument("--out", type=Path, help="JSON file for the figures, written anew after each row; `pieces` are those that are over")
    parser.add_argument("--alone", action="store_true", help="without other packages' kernels")
    parser.add_argument("--dry", action="store_true", help="small shapes on the CPU (TRITON_INTERPRET=1), nothing timed")
    parser.add_argument("--folder", type=Path, help="keep models here, for later runs too; a folder that is removed when left out")
    parser.add_argument("--layers", type=int, help="of whole models; rows of fewer than all are marked, and have no goal")
    parser.add_argument("--longest", type=float, help="seconds that a timed run of a whole model may take; it is cut to as many layers")
    given = parser.parse_args()
    if not given.dry and not torch.cuda.is_available():
        print("there is no CUDA device; `TRITON_INTERPRET=1 python -m bench.gpu --dry` checks the kernels without one", file=sys.stderr)
        return 2
    b = Bench(given.dry, given.alone)
    b.folder, b.layers, b.longest = given.folder, given.layers, given.longest
    device = "the CPU, Triton's interpreter" if given.dry else torch.cuda.get_device_name()
    rows: list[Row] = []
    failed: list[str] = []
    over: list[str] = []
    about = {"device": device, "commit": commit(), "date": time.strftime("%Y-%m-%d"), "environment": environment(str(b.device))}
    print(f"{device}, torch {torch.__version__}, CUDA {torch.version.cuda}, commit {about['commit'] or 'not known'}", flush=True)

    def kept() -> None:
        told = {"pieces": over, "failed": failed, "ceilings": asdict(b.ceilings), "rows": [r.told(b.ceilings) for r in rows]}
        keep(given.out, about | told)

    # Every row is compared with what the device can do in the same run.
    for name in dict.fromkeys(["limits", *(given.pieces or PIECES)]):
        began = time.perf_counter()
        try:
            for row in PIECES[name](b):
                rows.append(row)
                print(row.line(b.ceilings), flush=True)
                kept()
            over.append(name)
        except Exception:  # the other pieces are measured all the same
            failed.append(name)
            traceback.print_exc()
        kept()
        print(f"-- {name}: {time.perf_counter() - began:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return 0 if not failed and all(r.right for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
