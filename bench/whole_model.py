"""A model of random weights in a known shape, quantized as a stage of a sweep does it: from files on the disk to a committed artifact.

python -m bench.whole_model [--shape 7b] [--layers N] [--methods gptq,...] [--params true_sequential=true] [--streamed] [--longest SECONDS]
                            [--out FILE]

The times are those of the stage's own record, from reading the checkpoint to the renamed, flushed artifact. Two layers are quantized and
checked first, against plain arithmetic on the files: loading libraries and compiling kernels is not counted, and is printed. GPTQ stands
beside llm-compressor and a plain loop in torch on the same two layers, CLAQ beside scikit-learn on a few columns, each scaled to all layers
and marked so; `--alone` leaves them out. With fewer layers than the shape has, a line says what the whole would take at the same time a
layer.
`--longest` cuts the timed run to as many layers as fit, by the rate of two.
`--streamed` makes one layer's file, reads it for every layer without the page cache, and hashes and drops what is packed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.kept import keep
from bench.on_gpu.clock import Bench
from bench.on_gpu.limits import limits
from bench.whole.runs import Work, measured, model_in
from bench.whole.shapes import SHAPES
from bench.whole.stages import quantize
from workers.request import Hints


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.whole_model", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="all of the shape when left out")
    parser.add_argument("--methods", default="gptq")
    parser.add_argument("--params", nargs="*", default=[], help="name=JSON of the methods")
    parser.add_argument("--propagation", default="quantized")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--streamed", action="store_true", help="one layer's file stands for all")
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--alone", action="store_true", help="without other programs")
    parser.add_argument("--longest", type=float, help="seconds that the timed run may take")
    parser.add_argument("--folder", type=Path, help="keep models and artifacts here; a folder that is removed when left out")
    parser.add_argument("--profile", action="store_true", help="of two layers: the operations that take longest on the device")
    parser.add_argument("--out", type=Path, help="JSON file for the figures, written anew after each method")
    given = parser.parse_args()
    root = given.folder or Path(tempfile.mkdtemp(prefix="bitgrid-bench-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        return run(given, root)
    finally:
        if given.folder is None:
            shutil.rmtree(root, ignore_errors=True)


def run(given: argparse.Namespace, root: Path) -> int:
    """1 where a check fails."""
    b = Bench(dry=given.device == "cpu" or not torch.cuda.is_available())
    b.alone, b.longest = given.alone, given.longest
    hints = Hints(device=given.device, batch_tokens=given.batch_tokens)
    for row in () if b.dry else limits(b):
        print(row.line(b.ceilings), flush=True)
    params = {name: json.loads(value) for name, value in (p.split("=", 1) for p in given.params)}
    kept: list[dict[str, Any]] = []
    wrong = False
    for method in given.methods.split(","):
        work = Work(method, given.shape, params, given.layers, given.samples, given.length, given.propagation, given.streamed)
        if given.profile and not b.dry:
            profiled(work, root, b, hints)
        row = measured(work, root, b, hints)
        print(row.line(b.ceilings), flush=True)
        kept.append(row.told(b.ceilings))
        keep(given.out, kept)
        wrong |= not row.right
    return int(wrong)


def profiled(work: Work, root: Path, b: Bench, hints: Hints) -> None:
    from torch.profiler import ProfilerActivity, profile

    small = model_in(root, work, 2, b.device.type)
    quantize(work.spec, small, root, hints)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
        quantize(work.spec, small, root, hints)
    average = p.key_averages()
    print(average.table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))
    print(average.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60), flush=True)


if __name__ == "__main__":
    sys.exit(main())
