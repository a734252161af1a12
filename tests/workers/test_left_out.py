"""Weights that a recipe replaces are not read where that changes no bit of what is computed: on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.workers.stage_runs import quantize_spec, quantized, tiny_context
from tests.workers.test_rebuild import MODEL, logits
from workers.rebuild import left_out_where_replaced, rebuild
from workers.recipe import Recipe
from workers.stream import BlockModel


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_weights_that_are_replaced_need_not_be_read(family: str, streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products by weights elsewhere in memory may differ in their last bits on a CPU: some layers of sums of some dozens."""
    ctx = tiny_context(family, tmp_path, streamed=streamed)
    artifact, _ = quantized(ctx, tmp_path, quantize_spec(), {})
    whole = rebuild(tiny_context(family, tmp_path), MODEL, artifact)
    read: list[str] = []
    plain = BlockModel._read
    monkeypatch.setattr("workers.rebuild.left_out_where_replaced", lambda device: True)
    monkeypatch.setattr(BlockModel, "_read", lambda self, names, *ahead: read.extend(names) or plain(self, names, *ahead))
    model = rebuild(ctx, MODEL, artifact)
    for _ in range(2):
        torch.testing.assert_close(logits(model), logits(whole), rtol=1e-5, atol=1e-5)
    linears = {n for n, m in whole.named_modules() if isinstance(m, nn.Linear)}
    replaced = {f"{op['module']}.weight" for op in Recipe(artifact).replaced() if op["module"] in linears}
    assert bool(replaced) == (family != "gpt2")
    assert not replaced & set(read)
    assert any("layernorm" in name or "ln_1" in name for name in read)
    if not streamed:
        for (name, got), (_, want) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
            assert torch.equal(got, want), name


def test_on_a_cpu_they_are() -> None:
    assert [left_out_where_replaced(torch.device(d)) for d in ("cpu", "cuda")] == [False, True]
