"""Perplexity of a rounded model, through both stages, against weights rounded in NumPy and the loss of transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quant.scheme import Granularity, WeightScheme
from tests.shared import shared_path
from tests.workers.stage_runs import context, quantize_spec, quantized
from workers.evaluate import run_evaluate
from workers.request import Location
from workers.residency import Residency
from workers.specs import EvaluateSpec, ModelSpec, TaskSpec, TextSpec

ASSETS = Path(__file__).resolve().parents[2] / "workers" / "assets"
MODEL = ASSETS / "wikitext_llama"
TEXTS = {"self_text": (ASSETS / "self_text" / "evaluation.jsonl", 128), "wikitext2": (("data", "wikitext2", "test.jsonl"), 512)}
DOCUMENTS, WINDOWS = 60, 3


def rounded(weight: np.ndarray, bits: int, group: int | None) -> np.ndarray:
    """G-asym: the range of a group, extended to 0, in 2^bits - 1 steps, with an integer zero."""
    w = weight.reshape(-1, group or weight.shape[1])
    low, high = np.minimum(w.min(1, keepdims=True), 0), np.maximum(w.max(1, keepdims=True), 0)
    step = (high - low) / np.float32(2**bits - 1)
    zero = np.round(-low / step)
    return ((np.clip(np.round(w / step) + zero, 0, 2**bits - 1) - zero) * step).reshape(weight.shape)


def independent(path: Path, window: int, bits: int, group: int | None) -> float:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(MODEL)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = torch.from_numpy(rounded(module.weight.data.numpy(), bits, group))
    rows = path.read_text(encoding="utf-8").split("\n")[:DOCUMENTS]
    ids = torch.tensor(tokenizer("\n\n".join(json.loads(r)["text"] for r in rows))["input_ids"])
    with torch.inference_mode():
        losses = [float(model(input_ids=w[None], labels=w[None]).loss) for w in ids[: WINDOWS * window].view(WINDOWS, window)]
    return math.exp(sum(losses) / WINDOWS)


@pytest.mark.parametrize(("text", "bits", "group"), [("self_text", 4, None), ("wikitext2", 3, 64)])
def test_both_stages_give_the_perplexity_of_weights_rounded_by_hand(text: str, bits: int, group: int | None, tmp_path: Path) -> None:
    place, window = TEXTS[text]
    path = place if isinstance(place, Path) else shared_path(*place)
    ctx = context(MODEL, tmp_path)
    ctx.texts = {"text": Location("file", str(path))}
    scheme = WeightScheme(bits, False, Granularity.GROUP if group else Granularity.CHANNEL, group, "float32")
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec("rtn", weight=scheme), {})
    task = TaskSpec("perplexity", 1, TextSpec("text", field="text", documents=DOCUMENTS), (("limit", WINDOWS), ("window", window)))
    (tmp_path / "e").mkdir()
    found = run_evaluate(EvaluateSpec(ModelSpec("model"), task), {"quantize": artifact}, tmp_path / "e", ctx, Residency())
    assert (found["n_items"], found["n_tokens"]) == (WINDOWS, WINDOWS * (window - 1))
    assert found["scores"]["ppl"] == pytest.approx(independent(path, window, bits, group), rel=1e-5)
