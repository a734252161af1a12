"""W8A8 as sums of integers beside torch's products on 2 threads: right first, then the least of some times, rounding of inputs included.

python bench/int8_linear.py [--out FILE]

Ends with 1 where a product is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.kept import keep  # noqa: E402
from bench.wq_gemv import TIMES, least  # noqa: E402
from quant.activation import fake_quantize_activation  # noqa: E402
from quant.affine import ZeroKind  # noqa: E402
from quant.kernels import kernel  # noqa: E402
from quant.scheme import ActivationScheme  # noqa: E402
from quant.tensors.affine import AffineTensor  # noqa: E402

SHAPES = ((4096, 4096), (4096, 11008))
"""(N, K)."""
SCHEME, FEW = ActivationScheme(8), 5
"""FEW: how often more than 8 rows are timed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    torch.set_num_threads(2)
    chosen, reference = kernel("int8_linear"), kernel("int8_linear", "reference").run
    print(f"int8_linear: {chosen.backend}; 2 threads; milliseconds, least of {TIMES}, of {FEW} with more than 8 rows")
    rows: list[dict[str, Any]] = []
    made = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "threads": 2, "backend": chosen.backend, "rows": rows}
    for n, k in SHAPES:
        g = torch.Generator().manual_seed(n + k)
        codes = torch.randint(0, 256, (n, k), generator=g, dtype=torch.uint8)
        half = torch.full((n, 1), 128, dtype=torch.uint8)
        tensor = AffineTensor(codes, torch.rand(n, 1, generator=g) / 128, half, 8, ZeroKind.CONSTANT)
        packed, dense = chosen.run.prepare(tensor, SCHEME), tensor.dequantize()
        for m in (1, 8, 128, 512):
            x = torch.randn(m, k, generator=g)
            few, times = x[:8], TIMES if m <= 8 else FEW
            want = reference.int8_linear(few, packed)
            error = float((chosen.run.int8_linear(x, packed)[:8] - want).norm() / want.norm())
            ours = least(packed, partial(chosen.run.int8_linear, x), times)
            peers = {
                "float32": least(dense, partial(linear, x), times),
                "bfloat16": least(dense.bfloat16(), partial(linear, x.bfloat16()), times),
                "simulated": least(dense, lambda w: linear(fake_quantize_activation(x, SCHEME), w), times),  # noqa: B023
                "torch._int_mm alone": least(packed.codes, lambda w: torch._int_mm(w[:m], w.T), 2) if m <= 8 else None,  # noqa: B023
            }
            rows.append({"n": n, "k": k, "m": m, "error": error, "ours_s": ours, "peers_s": peers})
            keep(given.out, made)
            said = ", ".join(f"{name} {1e3 * s:.2f} ({s / ours:.1f} times ours)" for name, s in peers.items() if s is not None)
            print(f"{n} x {k}, M={m}: error {error:.1e} (allowed 1e-6), {1e3 * ours:.2f}, {said}", flush=True)
    return 0 if all(r["error"] <= 1e-6 for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
