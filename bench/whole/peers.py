"""Other programs on the same files, layers and text as ours: from files to flushed files of packed weights, by the clock on the wall.

python -m bench.whole.peers NAME MODEL TOKENS OUT

Each runs in a process of its own, twice: loading libraries and compiling kernels is not counted, as it is not in ours. One that is not
installed, or fails, costs a line that says why. llm-compressor is looked for in the environment that `bitgrid toolkit install
llm_compressor` makes, where BITGRID_TOOLKITS names the folder that holds it, and else beside this program. All damp by 0.01.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.kmeans import peer_seconds
from bench.on_gpu.peers import last_said, run_apart
from bench.whole import torch_loop
from bench.whole.check import LAYER, QUERY, Yardstick, weight_of
from bench.whole.shapes import Shape
from workers.toolkits.environments import python_of

SECONDS = 150.0
"""For one."""
SAMPLE = 8
"""Columns that scikit-learn fits of a linear."""

Program = Callable[[Path, Tensor, Path, torch.device], Iterator[tuple[str, Tensor]]]
"""Folder of the model, tokens `[S, T]`, folder for files, device ▸ name and values of linears."""


def llm_compressor(folder: Path, tokens: Tensor, out: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """GPTQ as it comes, in the plain order of columns, 4 bits in groups of 128; it places the model on devices itself."""
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from quant.methods.toolkits import LlmCompressor
    from quant.scheme import Granularity, WeightScheme
    from workers.toolkits.llm_compressor import batches, modifier

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    scheme = WeightScheme(4, granularity=Granularity.GROUP, group_size=128)
    linears = {name: scheme for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name.startswith("model.layers.")}
    recipe = [modifier(LlmCompressor(act_order=False), linears)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    oneshot(model=model, tokenizer=tokenizer, dataset=batches(tokens), recipe=recipe, propagate_error=True)
    yield QUERY, model.get_submodule(QUERY).weight.detach().clone()
    model.save_pretrained(out, save_compressed=True)


PROGRAMS: dict[str, Program] = {"llm_compressor": llm_compressor, "torch_loop": torch_loop.run}


def python_for(program: str) -> Path:
    """Of the program's own environment, if it has one."""
    own = python_of(Path(os.environ.get("BITGRID_TOOLKITS", "")) / program)
    return own if own.is_file() else Path(sys.executable)


def beside(model: Path, tokens: Tensor, yardstick: Yardstick, times: float, seconds: float = SECONDS) -> dict[str, float]:
    """Program ▸ microseconds of the model's layers, times `times`, of those that are better than round to nearest."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({"tokens": tokens}, folder / "tokens")
        for program in PROGRAMS:
            out, log = folder / program, folder / f"{program}.log"
            out.mkdir()
            command = [str(python_for(program)), "-m", "bench.whole.peers", program, str(model), str(folder / "tokens"), str(out)]
            code = run_apart(command, log, seconds)
            if code != 0:
                why = f"{seconds:.0f} s were spent" if code is None else f"its process ended with {code}"
                print(f"   peer {program}: not run: {': '.join([why, *last_said(log)])}", flush=True)
                continue
            told = json.loads((out / "told.json").read_text())
            error = yardstick.error(load_file(out / "query")["values"])
            right = yardstick.rtn is not None and error < yardstick.rtn
            figures = f"{told['second_s']:.2f} s ({told['first_s']:.2f} s the first time), output error {error:.4f}"
            print(f"   peer {program}: {figures}{'' if right else '  WRONG, not shown beside ours'}", flush=True)
            if right:
                found[f"{program}_scaled_x_{times:g}"] = 1e6 * told["second_s"] * times
            shutil.rmtree(out)
    return found


@cache
def sampled_kmeans(model: Path, shape: Shape, layers: int, centres: int, threads: int) -> dict[str, float]:
    """Microseconds of one scikit-learn fit per column of all linears, from a few columns of the first layer. Empty where it is missing."""
    try:
        import sklearn
    except ImportError:
        print("   peer scikit-learn: not run: it is not installed", flush=True)
        return {}
    each: dict[int, float] = {}
    for name, (rows, _) in shape.linears().items():
        if rows not in each:
            x = weight_of(model, LAYER + name, torch.device("cpu"))[:, :SAMPLE].float().T.contiguous()
            each[rows] = peer_seconds(x, centres, threads)
    seconds = layers * sum(each[rows] * columns for rows, columns in shape.linears().values())
    count = layers * sum(columns for _, columns in shape.linears().values())
    said = ", ".join(f"{1e3 * s:.2f} ms a column of {rows}" for rows, s in each.items())
    print(f"   peer scikit-learn {sklearn.__version__}: {said}; {count} columns take {seconds:.0f} s (scaled, not measured)", flush=True)
    return {f"scikit_learn_scaled_from_{SAMPLE}_columns": 1e6 * seconds}


def main(name: str, model: str, tokens: str, out: str) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text, folder, seconds = load_file(tokens)["tokens"], Path(out), []
    for turn in ("first", "second"):
        (folder / turn).mkdir()
        began = time.perf_counter()
        values = {n: v for n, v in PROGRAMS[name](Path(model), text, folder / turn, device) if n == QUERY}
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        print(f"the {turn} time {seconds[-1]:.2f} s", flush=True)  # for one that is ended during the second
        shutil.rmtree(folder / turn)
    save_file({"values": values[QUERY].cpu().contiguous()}, folder / "query")
    (folder / "told.json").write_text(json.dumps({"first_s": seconds[0], "second_s": seconds[1]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
