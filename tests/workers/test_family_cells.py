"""Plain methods on the families that tests/matrix.yaml leaves out of a part: quantized, rebuilt and run. RTN on all of them is in
test_quantize.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quant.scheme import WeightScheme
from tests.quick import QUICK
from tests.workers.stage_runs import W4G16, calibrated, component, quantize_spec, quantized, tiny_context
from workers import families
from workers.rebuild import rebuild
from workers.specs import ModelSpec, QuantizeSpec
from workers.stream import open_blocks

METHODS: dict[str, tuple[QuantizeSpec, tuple[str, ...]]] = {
    "gptq": (quantize_spec("gptq", weight=W4G16), ("hessian",)),
    "awq": (quantize_spec("rtn", component("awq", **QUICK["awq"]), weight=W4G16), ("absmean", "samples")),
    "smoothquant": (quantize_spec("rtn", "smoothquant", weight=WeightScheme(8, symmetric=True)), ("absmax",)),
}
FAMILIES = {
    **dict.fromkeys(("bloom", "falcon_new", "falcon_old", "falcon_alibi"), tuple(METHODS)),
    **dict.fromkeys(("mistral", "qwen2"), ("gptq",)),
    **dict.fromkeys(("gpt_neox", "gemma"), ("awq", "smoothquant")),
}
NOT_POSITIVE = "down alone in 2 blocks: an activation function that is not positively homogeneous produces this input"
FUSED = ("output alone in 2 blocks: the producer is part of a fused qkv whose rows are not the values alone", NOT_POSITIVE)
GROUPED = ("output alone in 2 blocks: value and output projections differ in shape (grouped-query attention)",)
LEFT_ALONE = {**dict.fromkeys(("bloom", "falcon_new", "falcon_old", "falcon_alibi", "gpt_neox"), FUSED), "gemma": GROUPED}
"""Groups of linears that no scale can be folded for: they are rounded as they are, and the record says why."""
TOKENS = torch.arange(2, 38).view(3, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_methods_work(family: str, tmp_path: Path) -> None:
    ctx = tiny_context(family, tmp_path)
    kinds = {k for name in FAMILIES[family] for k in METHODS[name][1]}
    statistics = calibrated(ctx, tmp_path, *sorted(kinds))
    opened = open_blocks(ctx, ModelSpec("model"))
    linears = len(families.linear_shapes(opened.checkpoint.config))
    for name in FAMILIES[family]:
        spec, _ = METHODS[name]
        artifact, summary = quantized(ctx, tmp_path / name, spec, statistics)
        assert summary["coverage"] == {"asked": linears, "quantized": linears, "kept": []}, name
        with torch.no_grad():
            logits = rebuild(ctx, ModelSpec("model"), artifact)(TOKENS, use_cache=False).logits
        assert torch.isfinite(logits).all(), name
    scaled = [name for name in FAMILIES[family] if name != "gptq"]
    assert ctx.notes == [f"{name} left group {reason}" for name in scaled for reason in LEFT_ALONE[family]]
