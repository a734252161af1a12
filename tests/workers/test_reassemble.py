"""Reassembled inputs in the quantize stage: what the search sees, how weights and statistics follow, what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from quant.reassembly import Reassembly
from quant.scheme import ActivationScheme
from tests.workers.stage_runs import W4, calibrated, component, quantize_spec, quantized, tiny_context
from tests.workers.test_rotate import loaded, logits
from workers.errors import InputError
from workers.fold import BlockWeights
from workers.quantize import quantize_blocks
from workers.recipe import Recipe
from workers.scaling import GroupForward
from workers.specs import ModelSpec, QuantizeSpec
from workers.steps import set_reassembly
from workers.stream import BlockModel, open_blocks

A4 = ActivationScheme(4, symmetric=False)
REASSEMBLY = component("qllm_reassembly", ratio=0.4)


def two_into_one(width: int) -> Reassembly:
    """Channel 5 is split in three, 0 and 2 go into 1."""
    splits = torch.ones(width, dtype=torch.uint8)
    splits[5] = 3
    return Reassembly(splits, torch.tensor([0, 2], dtype=torch.int32), torch.tensor([1, 1], dtype=torch.int32))


def opened(family: str, folder: Path) -> tuple[BlockModel, BlockWeights, GroupForward]:
    model = open_blocks(tiny_context(family, folder), ModelSpec("model", "float64"))
    block = model.load(0)
    weights = BlockWeights(block, model.structure)
    width = model.structure.sites[0].cols
    return model, weights, GroupForward(block, weights, lambda s, t: model.block_calls(s, t)[0], 24, width)


def test_the_search_sees_what_the_next_linear_reads(tmp_path: Path) -> None:
    model, weights, forward = opened("llama_mha", tmp_path)
    block: Any = model.blocks[0]
    sites, groups = model.structure.sites, {g.name: g for g in model.structure.groups}
    x = torch.randn(3, 10, sites[0].cols, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def seen(name: str, following: int | None, inputs: Tensor, factor: float) -> Tensor:
        group = forward.input_group(groups[name], None if following is None else sites[following].linears[0], None, "p.")  # type: ignore[arg-type]
        return group.forward({n: factor * w for n, w in group.consumers.items()}, inputs)

    mlp = block.mlp
    want = mlp.act_fn(x @ (2 * mlp.gate_proj.weight).T + mlp.gate_proj.bias) * (x @ (2 * mlp.up_proj.weight).T + mlp.up_proj.bias)
    assert torch.allclose(seen("gate_up", 3, x, 2.0), want, atol=1e-12)
    # The first token attends to itself alone: what comes out is its values.
    values = x @ block.self_attn.v_proj.weight.T + block.self_attn.v_proj.bias
    attended = seen("qkv", 1, x, 1.0)
    assert attended.shape == x.shape
    assert torch.allclose(attended[:, 0], values[:, 0], atol=1e-12)
    assert not torch.allclose(attended[:, 1:], values[:, 1:], atol=1e-3)
    inner = torch.randn(2, 4, sites[3].cols, dtype=torch.float64)
    assert torch.allclose(seen("down", None, inner, 3.0), inner @ (3 * mlp.down_proj.weight).T, atol=1e-12)
    assert weights.current == weights.original


def test_weights_steps_and_errors_follow_the_input(tmp_path: Path) -> None:
    model, weights, _ = opened("llama", tmp_path)
    block: Any = model.blocks[0]
    width = model.structure.sites[2].cols
    made, names = two_into_one(width), model.structure.sites[2].linears
    x = torch.randn(4, 7, width, dtype=torch.float64)
    weights.reassemble(names, made)
    weights.write()
    for n in names:
        set_reassembly(weights.views[n].module, made)
        original = weights.original[n]
        # Merging is an approximation of W, and read_as says of which weight it is exact.
        assert torch.allclose(weights.views[n].module(x), x @ weights.unscaled(n, weights.current[n]).T, atol=1e-12)
        assert torch.equal(weights.scaled_original(n), made.weight(original))
        stands_for = weights.unscaled(n, weights.current[n])
        alone = [c for c in range(width) if c not in (0, 1, 2)]
        assert torch.allclose(stands_for[:, alone], original[:, alone], atol=1e-15)
        assert torch.allclose(stands_for[:, 0], original[:, :3].mean(1), atol=1e-15)
    with pytest.raises(ValueError, match="reassembled already"):
        weights.reassemble(names, made)
    assert block.mlp.gate_proj.weight.shape[1] == width


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_splitting_alone_keeps_the_logits(family: str, tmp_path: Path) -> None:
    """QLLM's disassembly without its assembly, of every input in the model, in float64."""
    ctx = tiny_context(family, tmp_path)
    want, model = logits(loaded(ctx).model), loaded(ctx)

    def split(linear: Any, made: Reassembly) -> None:
        wide = made.widen(linear.weight)
        assert wide.shape[1] == linear.weight.shape[1] + 3
        linear.forward = lambda x: F.linear(made.disassemble(x), wide, linear.bias)

    for block in model.blocks:
        for site in model.structure.sites:
            splits = torch.ones(site.cols, dtype=torch.uint8)
            splits[5], splits[7] = 3, 2
            made = Reassembly.__new__(Reassembly)  # without merges, which it asks for otherwise
            object.__setattr__(made, "splits", splits)
            for n in site.linears:
                split(block.get_submodule(n), made)
    got = logits(model.model)
    assert not torch.equal(got, want)
    assert float((got - want).abs().max()) < 1e-10 * float(want.abs().max())


def run(spec: QuantizeSpec, folder: Path, family: str = "llama") -> tuple[Recipe, dict[str, Any], list[str]]:
    ctx = tiny_context(family, folder)
    artifact, summary = quantized(ctx, folder / "q", spec, calibrated(ctx, folder, "absmax", "samples"))
    return Recipe(artifact), summary, ctx.notes


def reassembled(recipe: Recipe) -> set[str]:
    return {op["module"].rpartition(".")[2] for op in recipe.replaced() for s in op["input"] if s["op"] == "reassemble"}


def test_the_output_projection_is_left_alone_and_tensors_are_shared(tmp_path: Path) -> None:
    recipe, summary, _ = run(quantize_spec("rtn", REASSEMBLY, activation=A4), tmp_path)
    found = reassembled(recipe)
    assert found
    assert found <= {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    by_block: dict[str, set[str]] = {}
    for op in recipe.replaced():
        for s in op["input"]:
            by_block.setdefault(s["splits"], set()).add(op["module"].rpartition(".")[2])
    assert set(map(frozenset, by_block.values())) <= {
        frozenset({"q_proj", "k_proj", "v_proj"}),
        frozenset({"gate_proj", "up_proj"}),
        frozenset({"down_proj"}),
    }
    facts = summary["reassembly"]
    assert {"input", "start_loss", "loss", "candidates"} <= set(facts[0])
    assert recipe.changes_the_model() == "reassemble"


def test_stored_bits_are_all_bytes_that_are_stored(tmp_path: Path) -> None:
    """Codes, scales, zeros, and the tables of every input once."""
    recipe, summary, _ = run(quantize_spec("rtn", REASSEMBLY, activation=A4), tmp_path)
    tensors = {n: t for file in (tmp_path / "q" / "payload").glob("*.safetensors") for n, t in load_file(file).items()}
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    assert any(n.endswith(".input.splits") for n in tensors)
    rows = pq.read_table(tmp_path / "q" / "payload" / "layers.parquet").to_pylist()
    assert summary["bits_stored"] == pytest.approx(8 * stored / sum(r["rows"] * r["cols"] for r in rows))
    alone = {op["module"]: recipe.stored(op).bits_stored for op in recipe.replaced() if not op["input"]}
    assert alone
    assert {r["module"]: r["bits_stored"] for r in rows if r["module"] in alone} == alone


def test_without_activation_quantization_it_is_idle_and_flagged(tmp_path: Path) -> None:
    recipe, summary, notes = run(quantize_spec("rtn", REASSEMBLY), tmp_path)
    assert not reassembled(recipe)
    assert summary["flags"] == ["qllm_reassembly could change nothing in this model"]
    assert any("qllm_reassembly left group qkv alone in 2 blocks: activations are not quantized" in n for n in notes)


def test_scales_do_not_pass_a_reassembled_input(tmp_path: Path) -> None:
    recipe, _, notes = run(quantize_spec("rtn", REASSEMBLY, "smoothquant", activation=A4), tmp_path)
    assert reassembled(recipe)
    assert any("smoothquant left group" in n and "its input is reassembled at run time" in n for n in notes)


def test_other_families_are_refused(tmp_path: Path) -> None:
    ctx = tiny_context("gpt2", tmp_path)
    (tmp_path / "payload").mkdir()
    model = open_blocks(ctx, ModelSpec("model"))
    with pytest.raises(InputError, match="qllm_reassembly does not know the blocks of model_type 'gpt2'"):
        quantize_blocks(quantize_spec("rtn", REASSEMBLY, weight=W4, activation=A4), {}, tmp_path / "payload", ctx, model, lambda b: None)


@pytest.mark.parametrize(("blocks", "remainder", "tuned"), [(1, True, [[0], [1]]), (4, False, [[0, 1]])])
def test_corrections_are_tuned_over_consecutive_blocks(blocks: int, remainder: bool, tuned: list[list[int]], tmp_path: Path) -> None:
    spec = quantize_spec("qllm_correction", REASSEMBLY, activation=A4, epochs=1, blocks=blocks, remainder=remainder)
    _, summary, notes = run(spec, tmp_path)
    assert [t["blocks"] for t in summary["tuning"]] == tuned
    assert all(t["loss"] <= t["start"] for t in summary["tuning"])
    assert any("rounded only" in n for n in notes) == (not remainder)
