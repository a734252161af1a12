"""The GPTQ column solver with the C++ block loop beside the plain reference, and pulling, with its factor, beside pushing, on 2 threads:
equal codes first, then the least of 5 times.

python bench/gptq_block.py [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.kept import keep  # noqa: E402
from bench.kmeans import least  # noqa: E402
from quant.affine import Affine  # noqa: E402
from quant.factors import inverse_factor, pull_factor  # noqa: E402
from quant.grids import GRIDS, fit  # noqa: E402
from quant.kernels import kernel  # noqa: E402
from quant.kernels.gptq_block import SolvedBlock  # noqa: E402
from quant.kernels.lazy_update.eager import SPAN  # noqa: E402
from quant.solver import Solved, solve_affine  # noqa: E402

SIZES = ((768, 25.0), (2048, 15.0), (4096, 15.0))
"""(N = K, how many times faster it is to be)."""
BITS, BLOCK, EQUAL, DAMP = 4, 128, 0.999, 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    torch.set_num_threads(2)
    made: dict[str, Any] = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "threads": 2, "rows": []}
    good = True
    for size, goal in SIZES:
        weight, hessian = problem(size)
        upper, _ = inverse_factor(hessian, DAMP)
        reference, ours = (solve(weight, upper, backend) for backend in ("reference", "cpu"))
        equal = float((ours.codes == reference.codes).float().mean())
        row: dict[str, float] = {"size": size, "equal_codes": equal, "goal": goal}
        pushed, pulled = (linear(weight, hessian, span) for span in (None, SPAN))
        row["pulled_equal_codes"] = float((pulled.codes == pushed.codes).float().mean())
        loop = partial(block_loop, blocks(weight, upper), SolvedBlock.like(weight[:BLOCK]))
        for what, run in (("block_loop", loop), ("solver", partial(solve, weight, upper))):
            reference_s, ours_s = (least(partial(run, backend)) for backend in ("reference", "cpu"))
            row |= {f"{what}_reference_s": reference_s, f"{what}_cpu_s": ours_s, f"{what}_ratio": reference_s / ours_s}
        for form, span in (("pushed", None), ("pulled", SPAN)):
            row[f"linear_{form}_s"] = least(partial(linear, weight, hessian, span))
        row["pulled_ratio"] = row["linear_pushed_s"] / row["linear_pulled_s"]
        good &= min(equal, row["pulled_equal_codes"]) >= EQUAL and row["block_loop_ratio"] >= goal
        made["rows"].append(row)
        keep(given.out, made)
        alone, whole = ([row[f"{what}_{part}"] for part in ("reference_s", "cpu_s", "ratio")] for what in ("block_loop", "solver"))
        print(f"{size} x {size}: {equal:.3%} equal codes")
        print(f"  block loop {alone[0] * 1e3:.1f} ▸ {alone[1] * 1e3:.1f} ms: {alone[2]:.1f} times (goal {goal:g})")
        print(f"  with ranges and updates of later blocks {whole[0] * 1e3:.1f} ▸ {whole[1] * 1e3:.1f} ms: {whole[2]:.1f} times")
        pushed_s, pulled_s, ratio = (row[name] for name in ("linear_pushed_s", "linear_pulled_s", "pulled_ratio"))
        print(f"  a linear with its factor, pulled: {row['pulled_equal_codes']:.3%} codes equal to those pushed")
        print(f"  pushed {pushed_s * 1e3:.1f} ▸ pulled {pulled_s * 1e3:.1f} ms: {ratio:.2f} times")
    return 0 if good else 1


def problem(size: int) -> tuple[Tensor, Tensor]:
    """Weights `[K, N]` and a Hessian of inputs that are correlated."""
    g = torch.Generator().manual_seed(size)
    x = torch.randn(2 * size, size, generator=g) @ (torch.eye(size) + 0.3 * torch.randn(size, size, generator=g) / size**0.5)
    return torch.randn(size, size, generator=g), x.T @ x


def solve(weight: Tensor, upper: Tensor, backend: str) -> Solved:
    """With dynamic groups: ranges are fitted before each block."""
    return solve_affine(weight, upper, BLOCK, ranges, backend)


def linear(weight: Tensor, hessian: Tensor, span: int | None) -> Solved:
    """The factor and the solver, of spans of so many columns."""
    upper, _ = inverse_factor(hessian, DAMP) if span is None else pull_factor(hessian, DAMP, span)
    return solve_affine(weight, upper, BLOCK, ranges, looks_ahead=False, span=span)


def ranges(start: int, end: int, weights: Tensor) -> tuple[Affine, list[int]]:
    made = fit(GRIDS["g_asym"], weights[start:end].T.contiguous(), BITS, torch.float32)
    return Affine(made.scale[:, 0][None], made.zero[:, 0][None], BITS, made.kind), [0] * (end - start)


def blocks(weight: Tensor, upper: Tensor) -> list[tuple[Tensor, Tensor, Affine]]:
    """The weight as given in blocks, with their parts of the factor and their grids."""
    made = []
    for start in range(0, weight.shape[0], BLOCK):
        part = weight[start : start + BLOCK]
        scale = part.amax(0, keepdim=True) / 8
        affine = Affine(scale, scale.new_full(scale.shape, 8), BITS, GRIDS["g_sym"].zero)
        made.append((part, upper[start : start + BLOCK, start : start + BLOCK], affine))
    return made


def block_loop(work: list[tuple[Tensor, Tensor, Affine]], out: SolvedBlock, backend: str) -> None:
    """The kernel alone, on every block."""
    run = kernel("gptq_block", backend).run.solve_block
    for part, upper, affine in work:
        run(part, upper, affine, [0] * BLOCK, out)


if __name__ == "__main__":
    sys.exit(main())
