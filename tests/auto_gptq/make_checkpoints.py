"""Quantize small models, export them, and write down what auto-gptq must compute from each. Runs in bitgrid's own environment.

    python tests/auto_gptq/make_checkpoints.py FOLDER

FOLDER/<case>/checkpoint is the export; FOLDER/<case>/expected.safetensors holds

    tokens   int64 `[B, T]`
    exact    float64 `[B, T, V]`, logits in float64 arithmetic
    error    float64 `[]`, largest difference of our own float32 logits from `exact`
    weight.<module>   float32 `[N, K]`, dequantized, by its name in the checkpoint

and FOLDER/<case>/case.json the text, its token ids, and what the quantization configuration must say.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from quant.scheme import Granularity, WeightScheme  # noqa: E402
from tests.tiny_models import build, save_tokenizer  # noqa: E402
from tests.workers.stage_runs import calibrated, context, quantize_spec, quantized  # noqa: E402
from workers.export import run  # noqa: E402
from workers.export.auto_gptq import old_linears  # noqa: E402
from workers.export.model import open_model, read_quantized  # noqa: E402
from workers.recipe import Recipe  # noqa: E402

SHIPPED = ROOT / "workers" / "assets" / "wikitext_llama"
TEXT = "The quick brown fox jumps over the lazy dog . In 1997 , the band released their second album ."


def weight(bits: int, group_size: int | None = None, *, symmetric: bool = False) -> WeightScheme:
    granularity = Granularity.CHANNEL if group_size is None else Granularity.GROUP
    return WeightScheme(bits, symmetric=symmetric, granularity=granularity, group_size=group_size)


@dataclass(frozen=True)
class Case:
    model: Callable[[Path], Path]
    """Folder for it ▸ the model's folder."""
    scheme: WeightScheme
    method: tuple[str, ...] = ("rtn",)
    """Rounding, then transforms."""
    statistics: tuple[str, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)
    configuration: dict[str, Any] = field(default_factory=dict)
    """Entries that quantize_config.json must have."""


def shipped(folder: Path) -> Path:
    return SHIPPED


def tiny(family: str, **changes: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        build(family, **changes).save_pretrained(folder)
        save_tokenizer(folder)
        return folder

    return make


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
THETA: dict[str, Any] = {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
G16 = weight(4, 16)
CASES = {
    "shipped_rtn_g64": Case(
        shipped, weight(4, 64), configuration={"bits": 4, "group_size": 64, "desc_act": False, "sym": False, "true_sequential": False}
    ),
    "shipped_gptq_act_order": Case(
        shipped, weight(4, 64), ("gptq",), ("hessian",), {"act_order": True}, {"group_size": 64, "desc_act": True}
    ),
    "shipped_awq_g64": Case(shipped, weight(4, 64), ("rtn", "awq"), ("absmean", "samples"), configuration={"desc_act": False}),
    "shipped_channel_3bit": Case(shipped, weight(3), configuration={"bits": 3, "group_size": -1}),
    "theta_symmetric": Case(tiny("llama", **THETA), weight(4, 32, symmetric=True), configuration={"sym": True}),
    "theta_2bit": Case(tiny("llama_mha", **THETA), weight(2, 16), configuration={"bits": 2, "group_size": 16}),
    "llama3_rope": Case(
        tiny("llama", **SIZES, rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, **LLAMA3}), G16
    ),
    "8bit": Case(tiny("llama", **SIZES), weight(8), configuration={"bits": 8}),
    "3bit_act_order": Case(
        tiny("llama", **SIZES), weight(3, 32), ("gptq",), ("hessian",), {"act_order": True}, {"bits": 3, "desc_act": True}
    ),
    "mistral": Case(tiny("mistral", **SIZES), G16),
    "mixtral": Case(tiny("mixtral", **SIZES), G16),
    "qwen2": Case(tiny("qwen2", **SIZES, use_sliding_window=False), G16),
    "gemma": Case(tiny("gemma", **SIZES, num_key_value_heads=2), G16),
    "opt": Case(tiny("opt", hidden_size=64, ffn_dim=96, word_embed_proj_dim=64), G16),
    "gpt2": Case(tiny("gpt2", n_embd=64), G16),
    "gpt_neox": Case(tiny("gpt_neox", **SIZES), G16),
    "bloom": Case(tiny("bloom", hidden_size=64), G16),
    "falcon": Case(tiny("falcon_new", hidden_size=64), G16),
}


def make(name: str, case: Case, folder: Path) -> None:
    folder.mkdir(parents=True)
    model = case.model(folder / "model")
    work = context(model, folder)
    artifact, _ = quantized(
        work,
        folder / "artifact",
        quantize_spec(*case.method, weight=case.scheme, **case.params),
        calibrated(work, folder / "statistics", *case.statistics) if case.statistics else {},
    )
    run("auto_gptq", artifact, model, folder / "checkpoint")
    ids = tokenize(model, TEXT)
    tokens = torch.tensor([ids, ids[::-1]])
    expected = {"tokens": tokens, **reference(artifact, model, tokens)}
    save_file(expected, folder / "expected.safetensors")
    (folder / "case.json").write_text(json.dumps({"text": TEXT, "ids": ids, "configuration": case.configuration}))


def tokenize(model: Path, text: str) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    return list(PreTrainedTokenizerFast.from_pretrained(model)(text)["input_ids"])


def reference(artifact: Path, model_folder: Path, tokens: Tensor) -> dict[str, Tensor]:
    """Logits of bitgrid's own rebuilt model, its unquantized parameters in the checkpoint's float16."""
    opened = open_model(Recipe(artifact), model_folder)
    for i in range(opened.structure.count):
        opened.load(i)
    model: nn.Module = opened.model
    stored = read_quantized(artifact, model_folder)
    with torch.no_grad():
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in stored.others:
            parameters[name].copy_(parameters[name].half())
        for path in stored.biases:
            parameters[f"{path}.bias"].copy_(parameters[f"{path}.bias"].half())
        single = model(tokens, use_cache=False).logits.double()
        exact = model.double()(tokens, use_cache=False).logits
    weights = {}
    for path, tensor in stored.linears.items():
        names = old_linears(stored, path)
        weights.update({f"weight.{n}": w.clone() for n, w in zip(names, tensor.dequantize().chunk(len(names)), strict=True)})
    return {"exact": exact, "error": (single - exact).abs().max(), **weights}


if __name__ == "__main__":
    torch.set_num_threads(1)
    disable_progress_bar()
    out = Path(sys.argv[1])
    for case_name in sys.argv[2:] or CASES:
        make(case_name, CASES[case_name], out / case_name)
        print(f"made {case_name}", flush=True)
