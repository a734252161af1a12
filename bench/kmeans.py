"""k-means of columns beside one scikit-learn fit per column, after a check of the sums of squares.

    python bench/kmeans.py [--rows 4096] [--columns 64] [--threads 2] [--out results.json]

Both give centres and codes. scikit-learn runs `KMeans(k, n_init=1)` (k-means++), with the given number of threads and with one, whichever
is faster. Prints the least seconds of five rounds per column, for a batch and for one column at a time, as CLAQ's column loop needs it.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.kept import keep  # noqa: E402
from quant.kernels import kernel  # noqa: E402

ROUNDS = 5


def columns(kind: str, rows: int, count: int) -> Tensor:
    """float32 `[count, rows]`."""
    draw = np.random.RandomState(0)
    x = draw.standard_normal((count, rows)) if kind == "normal" else draw.standard_t(5, (count, rows))
    return torch.from_numpy(x.astype(np.float32))


def squared_error(x: Tensor, centres: Tensor) -> Tensor:
    """`[C]`, by brute force."""
    return (x.double()[:, :, None] - centres.double()[:, None, :]).square().amin(2).sum(1)


def least(work: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Seconds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def peer(x: Tensor, k: int) -> list[Any]:
    from sklearn.cluster import KMeans

    return [KMeans(k, n_init=1, random_state=10).fit(column) for column in x.numpy()[:, :, None]]


def peer_seconds(x: Tensor, k: int, threads: int) -> float:
    """Per column, on the better number of threads."""
    from threadpoolctl import threadpool_limits

    seconds = []
    for limit in sorted({1, threads}):
        with threadpool_limits(limit):
            seconds.append(least(lambda: peer(x, k)))
    return min(seconds) / len(x)


def compare(x: Tensor, k: int, start: str, threads: int) -> dict[str, Any]:
    run = kernel("kmeans_columns").run

    def ours(some: Tensor = x) -> Tensor:
        centres: Tensor = run.kmeans(some, k, start)
        run.nearest(some, centres)
        return centres

    def one_by_one() -> None:
        for column in x:
            ours(column[None])

    few = x[: min(len(x), 16)]
    other = torch.from_numpy(np.stack([fit.cluster_centers_[:, 0] for fit in peer(x, k)]))
    ratio = squared_error(x, ours()) / squared_error(x, other)
    if start == "partition":
        assert float(ratio.max()) <= 1.03, f"sum of squares {float(ratio.max()):.4f} x scikit-learn's in a column; 1.03 is allowed"
        assert float(ratio.mean()) <= 1.0, f"sum of squares {float(ratio.mean()):.4f} x scikit-learn's in the mean; 1.0 is allowed"
    batch, single, theirs = least(ours) / len(x), least(one_by_one) / len(x), peer_seconds(few, k, threads)
    return {
        "centres": k,
        "start": start,
        "squares_max": round(float(ratio.max()), 5),
        "squares_mean": round(float(ratio.mean()), 5),
        "batch_us": round(1e6 * batch, 1),
        "single_us": round(1e6 * single, 1),
        "sklearn_us": round(1e6 * theirs, 1),
        "ratio_batch": round(theirs / batch),
        "ratio_single": round(theirs / single),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    given = parser.parse_args()
    try:
        import sklearn
    except ImportError:
        raise SystemExit("scikit-learn is not installed; python -m pip install -e '.[bench]'") from None
    torch.set_num_threads(given.threads)
    chosen = kernel("kmeans_columns")
    print(f"backend {chosen.backend}, {given.threads} threads, {given.rows} rows; microseconds per column, least of {ROUNDS}")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "scikit-learn": sklearn.__version__}
    report: dict[str, Any] = {"versions": versions, "backend": chosen.backend, "threads": given.threads, "rows": given.rows, "results": []}
    for kind in ("normal", "student_t5"):
        x = columns(kind, given.rows, given.columns)
        for k in (4, 16):
            for start in ("partition", "plus_plus"):
                r = {"columns": kind, **compare(x, k, start, given.threads)}
                report["results"].append(r)
                keep(given.out, report)
                squares = f"squares max {r['squares_max']:.4f} mean {r['squares_mean']:.4f}"
                speed = f"batch {r['batch_us']:.0f} ({r['ratio_batch']} x)  single {r['single_us']:.0f} ({r['ratio_single']} x)"
                print(f"{kind:11s} k={k:<3d}{start:10s} {squares}  {speed}  scikit-learn {r['sklearn_us']:.0f}", flush=True)


if __name__ == "__main__":
    main()
