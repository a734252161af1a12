"""Batches of a streamed model share a pass through its blocks, and have the logits that they have alone."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from greenlet import greenlet

from quant.kv import Kivi
from quant.scheme import ActivationScheme, Granularity, KVScheme
from tests.tiny_models import FAMILIES
from tests.workers.stage_runs import tiny_context
from workers import kv_runs, one_pass, window_logits
from workers.context import Context
from workers.rebuild import load_model
from workers.runtime import attach
from workers.specs import ModelSpec
from workers.stream import BlockModel
from workers.window_logits import WAITING

DRAW = torch.Generator().manual_seed(0)
BATCHES = [torch.randint(2, 90, (n, 12), generator=DRAW) for n in (3, 3, 1)]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks, as they are read."""
    found: list[int] = []
    load = BlockModel._tensors_of
    monkeypatch.setattr(BlockModel, "_tensors_of", lambda self, i: found.append(i) or load(self, i))
    return found


def models(family: str, folder: Path) -> list[tuple[Any, Context]]:
    """Resident, streamed."""
    contexts = [tiny_context(family, folder, streamed=streamed) for streamed in (False, True)]
    return [(load_model(context, ModelSpec("model")), context) for context in contexts]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_read_once_for_all_batches(family: str, tmp_path: Path, read: list[int]) -> None:
    (resident, _), (streamed, context) = models(family, tmp_path)
    read.clear()
    got = list(window_logits.window_logits(streamed, context, nullcontext)(BATCHES))
    assert read == list(range(len(read)))
    assert len(read) > 1
    with torch.no_grad():
        assert all(torch.equal(g, resident(b, use_cache=False).logits) for g, b in zip(got, BATCHES, strict=True))
    assert not [n for n in context.notes if "were read" in n]


def test_as_many_batches_share_a_pass_as_memory_holds(tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    _, (streamed, context) = models("llama", tmp_path)
    want = list(window_logits.window_logits(streamed, context, nullcontext)(BATCHES))
    token = WAITING * streamed.config.hidden_size * 4
    for tokens, passes in ((84, 1), (83, 2), (72, 2), (18, 3)):  # all batches have 84, the larger ones 36
        read.clear()
        monkeypatch.setattr(window_logits, "free_bytes", lambda device, tokens=tokens: 2 * token * tokens)
        got = list(window_logits.window_logits(streamed, context, nullcontext)(BATCHES))
        assert all(map(torch.equal, got, want))
        assert read == [0, 1] * passes
    assert [n.partition(":")[0] for n in context.notes if "were read" in n] == [f"the blocks were read {n} times" for n in (2, 2, 3)]


@pytest.mark.parametrize("granularity", [Granularity.TENSOR, Granularity.TOKEN])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_is_rounded_while_the_model_runs_is_so_in_a_shared_pass(family: str, granularity: Granularity, tmp_path: Path) -> None:
    found = []
    for model, context in models(family, tmp_path):
        hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

        class Runtime:
            def __enter__(self, model: Any = model) -> None:
                self.taps = attach(model, None, ActivationScheme(4, granularity=granularity), KVScheme(4))

            def __exit__(self, *_: object) -> None:
                self.taps.remove()

        kept = []
        for logits in window_logits.window_logits(model, context, Runtime)(BATCHES):  # type: ignore[arg-type]
            assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks
            kept.append(logits)
        found.append(torch.cat(kept))
    assert torch.equal(*found)


def test_an_aging_cache_reads_the_same_in_a_shared_pass(tmp_path: Path, read: list[int]) -> None:
    scheme, found = KVScheme(2, kind=Kivi.name, group_size=4, residual_length=4, mode="simulate"), []
    for model, context in models("llama", tmp_path):
        read.clear()
        found.append(torch.cat(list(kv_runs.logits(model, scheme, {}, context, nullcontext)(BATCHES))))
    assert torch.equal(*found)
    assert read == [0, 1]


def test_two_readers_of_one_model_do_not_meet(tmp_path: Path) -> None:
    """As a reference that is walked beside a variant with its weights."""
    (resident, plain), (streamed, context) = models("llama", tmp_path)
    readers = [window_logits.window_logits(streamed, context, nullcontext)(BATCHES) for _ in range(2)]
    for first, second, want in zip(*readers, window_logits.window_logits(resident, plain, nullcontext)(BATCHES), strict=True):
        assert torch.equal(first, want)
        assert torch.equal(second, want)


def test_a_reader_that_stops_early_leaves_nothing_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (streamed, context) = models("llama", tmp_path)
    begun: list[greenlet] = []
    begin = one_pass._forward
    monkeypatch.setattr(one_pass, "_forward", lambda *given: begun.append(begin(*given)) or begun[-1])
    reader = window_logits.window_logits(streamed, context, nullcontext)(BATCHES)
    next(reader)
    assert [bool(g) for g in begun] == [False, True, True]
    reader.close()
    assert not any(begun)
