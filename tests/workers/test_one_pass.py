"""Steps that wait for each other behind every block have the logits of steps one after another, and read every block once."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from quant.scheme import ActivationScheme, Granularity, KVScheme
from tests.tiny_models import FAMILIES, tiny_model
from tests.workers.stage_runs import tiny_context
from workers import kv_runs, one_pass, rebuild
from workers.generation import Eager, generate, last_logits
from workers.kv_runs import empty_caches
from workers.runtime import attach
from workers.specs import ModelSpec
from workers.stream import BlockModel

DRAW = torch.Generator().manual_seed(0)
PROMPT, GIVEN = (torch.randint(2, 90, (2, n), generator=DRAW) for n in (6, 9))
SLIDES = {"mistral", "qwen2"}
"""Their own cache drops tokens that a window does not reach; here they are masked."""


def decoded(model: Any, prompt: torch.Tensor, given: torch.Tensor, cache: Any = None) -> torch.Tensor:
    """float32 `[B, steps + 1, V]`, as `generate` has them."""
    found: list[torch.Tensor] = []
    steps = (prompt, *given.split(1, dim=1))
    one_pass.decode(model, steps, cache or DynamicCache(), lambda out: found.append(out.logits[:, -1].float()), **last_logits(model))
    return torch.stack(found, 1)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"rwkv"}))
def test_logits_are_those_of_steps_one_after_another(family: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model(family)).eval()
    want = generate(Eager(model), PROMPT, GIVEN.shape[1], GIVEN).logits
    got = decoded(model, PROMPT, GIVEN)
    if family in SLIDES:
        # A sum of as many terms as the window, in another order, some layers deep.
        assert (got - want).norm() <= 1e-5 * want.norm()
    else:
        assert torch.equal(got, want)
    assert not any(block._forward_hooks for block in model.base_model.modules())


@pytest.mark.parametrize("kv", [KVScheme(4), KVScheme(2, kind="kivi", group_size=4, residual_length=8)])
def test_steps_fill_a_quantized_cache_in_their_order(kv: KVScheme, tmp_path: Path) -> None:
    """KIVI ages tokens: what a step reads depends on how many came before it."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model("gemma")).eval()
    make = empty_caches(model, kv, tiny_context("gemma", tmp_path))
    want = generate(Eager(model, make), PROMPT, GIVEN.shape[1], GIVEN).logits
    assert torch.equal(decoded(model, PROMPT, GIVEN, make()), want)
    assert not torch.equal(decoded(model, PROMPT, GIVEN), want)


@pytest.mark.parametrize("granularity", [Granularity.TENSOR, Granularity.TOKEN])
def test_inputs_are_rounded_as_in_steps_one_after_another(granularity: Granularity) -> None:
    """A range of a tensor is one of a sequence: hooks know how many there are from the block that runs."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model("mixtral")).eval()
    plain, handle = decoded(model, PROMPT, GIVEN), attach(model, None, ActivationScheme(4, granularity=granularity), None)
    want = generate(Eager(model), PROMPT, GIVEN.shape[1], GIVEN).logits
    assert torch.equal(decoded(model, PROMPT, GIVEN), want)
    assert not torch.equal(plain, want)
    handle.remove()


def test_a_streamed_model_reads_every_block_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = rebuild.load_model(tiny_context("mixtral", tmp_path), ModelSpec("model"))
    streamed = rebuild.load_model(tiny_context("mixtral", tmp_path, streamed=True), ModelSpec("model"))
    read, load = [], BlockModel._tensors_of
    most = [0]

    def counted(self: BlockModel, i: int) -> list[str]:
        read.append(i)
        most[0] = max(most[0], len(self.loaded))
        return load(self, i)

    monkeypatch.setattr(BlockModel, "_tensors_of", counted)
    got = decoded(streamed, PROMPT, GIVEN)
    assert read == list(range(len(read)))
    assert most == [0]  # the one before was given up
    assert len(read) > 1
    assert torch.equal(got, decoded(resident, PROMPT, GIVEN))
    assert all(p.is_meta for n, p in streamed.named_parameters() if ".layers." in n)


@pytest.mark.parametrize(
    "kv",
    [
        KVScheme(3, mode="decode"),
        KVScheme(2, kind="kivi", group_size=4, residual_length=4, mode="decode"),
        KVScheme(2, kind="kivi", group_size=4, residual_length=4, mode="decode", prefill=5),
    ],
)
def test_windows_of_a_streamed_model_are_decoded_in_one_pass(kv: KVScheme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KIVI's steps are as long as the cache allows when they begin."""
    windows = torch.cat([PROMPT, GIVEN], 1)
    logits: list[torch.Tensor] = []
    read: list[int] = []
    load = BlockModel._tensors_of
    monkeypatch.setattr(BlockModel, "_tensors_of", lambda self, i: read.append(i) or load(self, i))
    for streamed in (False, True):
        context = tiny_context("llama", tmp_path, streamed=streamed)
        model = rebuild.load_model(context, ModelSpec("model"))
        read.clear()
        logits.append(torch.cat(list(kv_runs.logits(model, kv, {}, context, nullcontext)([windows]))))
    assert read == [0, 1]
    assert torch.equal(*logits)


def test_a_step_that_fails_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    with pytest.raises(IndexError):
        decoded(model, PROMPT, torch.full((2, 3), 10**6))
    assert not any(block._forward_hooks for block in model.base_model.modules())
