"""A model of random weights in a known shape, quantized as a stage of a sweep does it: from files on the disk to a committed artifact.

python -m bench.whole_model [--shape 7b] [--layers N] [--methods gptq,...] [--params true_sequential=true] [--profile] [--out FILE]

The times are those of the stage's own record, from reading the checkpoint to the renamed, flushed artifact. With fewer layers than the
shape has, a line says what the whole would take at the same time a layer. Where a CUDA device is there the first method runs twice on two
layers before: loading libraries and compiling kernels is not counted, and is printed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from orchestrator.store import write_json
from quant.methods.registry import ROUNDINGS
from quant.scheme import Granularity, WeightScheme
from workers.artifact import PAYLOAD, RECORD, payload_files, rename_flushed
from workers.request import Hints, Location, Outcome, Request, StageRequest
from workers.run_stage import run_request
from workers.specs import CalibrationSpec, Component, MethodSpec, ModelSpec, QuantizeSpec, Rule, StageKind, TextSpec, to_json

GB = 1e9


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int


SHAPES = {
    "tiny": Shape(256, 768, 4, 4, 4),
    "7b": Shape(4096, 11008, 32, 32, 32),
    "13b": Shape(5120, 13824, 40, 40, 40),
    "70b": Shape(8192, 28672, 80, 64, 8),
}
SCHEMES = {"billm": WeightScheme(1), "claq": WeightScheme(2)}
"""Method ▸ the scheme where 4 bits in groups of 128 is not what it is for."""


def make_model(folder: Path, shape: Shape, layers: int, device: str) -> None:
    """A LLaMA checkpoint of bfloat16 weights drawn from N(0, 0.02²), one file a layer, with the tokenizer of the shipped model."""
    shipped = files("workers.assets") / "wikitext_llama"
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((shipped / name).read_bytes())
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": shape.hidden, "intermediate_size": shape.inner, "num_hidden_layers": layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=g, device=device, dtype=torch.float32) * 0.02).to(torch.bfloat16).cpu()

    where: dict[str, str] = {}

    def save(tensors: dict[str, torch.Tensor], name: str) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    outer = {"model.embed_tokens.weight": normal(32000, shape.hidden), "lm_head.weight": normal(32000, shape.hidden)}
    save({**outer, "model.norm.weight": ones}, "outer.safetensors")
    h, i, kv = shape.hidden, shape.inner, shape.hidden // shape.heads * shape.kv_heads
    for n in range(layers):
        at = f"model.layers.{n}."
        attention = {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)}
        sizes = {f"self_attn.{k}": s for k, s in attention.items()}
        sizes |= {"mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i)}
        norms = {f"{at}{k}.weight": ones.clone() for k in ("input_layernorm", "post_attention_layernorm")}
        save({f"{at}{k}.weight": normal(*s) for k, s in sizes.items()} | norms, f"layer_{n:03d}.safetensors")
    total = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))


def quantize(spec: QuantizeSpec, model: Path, store: Path, hints: Hints) -> tuple[dict[str, Any], float, float]:
    """The committed record, and seconds of the stage and of the commit. Raises RuntimeError for a failed stage."""
    key = f"{time.time_ns():064x}"
    staging = store / "staging" / key
    (staging / PAYLOAD).mkdir(parents=True)
    text = files("workers.assets") / "self_text" / "calibration.jsonl"
    request = Request(
        id="bench",
        stages=(StageRequest(key, StageKind.QUANTIZE.value, to_json(spec), {}, str(staging)),),
        models={spec.model.digest: Location("folder", str(model))},
        texts={"text": Location("file", str(text))},
        hints=hints,
    )
    outcomes: list[Outcome] = []
    began = time.perf_counter()
    run_request(request, outcomes.append)
    made = time.perf_counter()
    outcome = outcomes[0]
    if outcome.failure is not None or outcome.record is None:
        raise RuntimeError(f"{outcome.failure and outcome.failure.message}\n{outcome.failure and outcome.failure.log_tail}")
    record = {**outcome.record, "files": payload_files(staging)}
    write_json(staging / RECORD, record)
    final = store / "objects" / key
    final.parent.mkdir(exist_ok=True)
    rename_flushed(staging, final)
    return record, made - began, time.perf_counter() - made


def spec_of(method: str, given: argparse.Namespace) -> QuantizeSpec:
    params = tuple(sorted(dict(p.split("=", 1) for p in given.params).items())) if given.params else ()
    typed = tuple((k, json.loads(v)) for k, v in params)
    component = Component(method, ROUNDINGS[method].version, typed)
    scheme = SCHEMES.get(method, WeightScheme(4, granularity=Granularity.GROUP, group_size=128))
    feeds = given.propagation == "quantized" and bool(ROUNDINGS[method].needs)
    return QuantizeSpec(
        ModelSpec("model", "bfloat16"),
        (Rule("*", MethodSpec(component, propagation="quantized" if feeds else "original"), scheme),),
        CalibrationSpec(TextSpec("text", field="text"), given.samples, given.length) if feeds else None,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.whole_model", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="all of the shape when left out")
    parser.add_argument("--methods", default="gptq")
    parser.add_argument("--params", nargs="*", help="name=JSON of the methods")
    parser.add_argument("--propagation", default="quantized")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="keep models and artifacts here; a folder that is removed when left out")
    parser.add_argument("--profile", action="store_true", help="of two layers: the operations that take longest on the device")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    root = given.folder or Path(tempfile.mkdtemp(prefix="bitgrid-bench-"))
    try:
        rows = measured(given, root)
    finally:
        if given.folder is None:
            shutil.rmtree(root, ignore_errors=True)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def measured(given: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    shape = SHAPES[given.shape]
    layers = given.layers or shape.layers
    cuda = torch.cuda.is_available() and given.device != "cpu"
    hints = Hints(device=given.device, batch_tokens=given.batch_tokens)
    model, small = root / f"{given.shape}-{layers}", root / f"{given.shape}-2"
    for folder, n in ((model, layers), (small, 2)):
        if not folder.exists() and (folder is model or cuda):
            began = time.perf_counter()
            make_model(folder, shape, n, "cuda" if cuda else "cpu")
            print(f"made {folder.name} in {time.perf_counter() - began:.1f} s", flush=True)
    rows = []
    for method in given.methods.split(","):
        spec = spec_of(method, given)
        if cuda:
            for turn in ("first", "second"):
                _, stage, commit = quantize(spec, small, root, hints)
                print(f"{method}, 2 layers, {turn} time: {stage:.2f} s + commit {commit:.2f} s", flush=True)
            if given.profile:
                profiled(spec, small, root, hints)
        record, stage, commit = quantize(spec, model, root, hints)
        rows.append(told(method, given, layers, record, stage, commit))
    return rows


def told(method: str, given: argparse.Namespace, layers: int, record: dict[str, Any], stage: float, commit: float) -> dict[str, Any]:
    shape, summary = SHAPES[given.shape], record["summary"]
    size = sum(f["bytes"] for f in record["files"].values())
    row = {
        "method": method, "params": given.params, "shape": given.shape, "layers": layers, "of": shape.layers,
        "samples": given.samples, "length": given.length, "propagation": given.propagation, "damp": 0.01,
        "stage_s": stage, "commit_s": commit, "seconds": record["seconds"], "bytes": size,
        "bits_stored": summary["bits_stored"], "peak_memory_bytes": summary["peak_memory_bytes"], "kernels": record["kernels"],
        "environment": record["environment"], "notes": record["notes"],
    }  # fmt: skip
    phases = ", ".join(f"{k} {v:.2f}" for k, v in record["seconds"].items())
    fed = f"propagation={given.propagation}, {given.samples} x {given.length} tokens"
    print(f"{method}, {given.shape}, {layers} of {shape.layers} layers, {fed}, {given.params or 'parameters as they are'}")
    print(f"  {stage + commit:.2f} s: stage {stage:.2f} ({phases}), commit {commit:.2f} of {size / GB:.2f} GB")
    print(f"  peak {summary['peak_memory_bytes'] / GB:.1f} GB, {summary['bits_stored']:.3f} bits stored, kernels {record['kernels']}")
    if layers != shape.layers:
        print(f"  all {shape.layers} layers at this rate: {(stage + commit) * shape.layers / layers:.1f} s (scaled, not measured)")
    for note in record["notes"]:
        print(f"  note: {note}")
    sys.stdout.flush()
    return row


def profiled(spec: QuantizeSpec, model: Path, root: Path, hints: Hints) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
        quantize(spec, model, root, replace(hints))
    average = p.key_averages()
    print(average.table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))
    print(average.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60), flush=True)


if __name__ == "__main__":
    sys.exit(main())
