"""Perplexity: the protocol of the literature, against independent references."""

from __future__ import annotations

import json
import math
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.shared import shared_path
from tests.tiny_models import tiny_model
from tests.workers.fake_models import given_logits, logits_of, table_model
from workers.assets import ASSETS
from workers.errors import InputError, NumericalError
from workers.tasks import base, perplexity


def tokens(count: int, vocabulary: int = 11, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


def naive_perplexity(table: Tensor, text: Tensor, window: int) -> float:
    """Token by token in double precision, as the formula reads."""
    log_p = torch.log_softmax(table.double(), -1)
    total, weight = 0.0, 0
    for start in range(0, len(text) - window + 1, window):
        part = text[start : start + window].tolist()
        mean = -sum(float(log_p[a, b]) for a, b in pairwise(part)) / (window - 1)
        total += mean * window
        weight += window
    return math.exp(total / weight)


@pytest.mark.parametrize("batch_tokens", [1, 20, 10_000])
def test_equals_a_naive_loop_whatever_the_batch(batch_tokens: int) -> None:
    model, text = table_model(), tokens(77)
    result = perplexity.run(logits_of(model), base.cut(text, 7), batch_tokens)
    # float32 log-probabilities, summed in float64
    assert result.scores["ppl"] == pytest.approx(naive_perplexity(model.table, text, 7), rel=1e-6)
    assert result.scores["nll"] == pytest.approx(math.log(result.scores["ppl"]), rel=1e-12)
    assert result.n_items == 11
    assert result.n_tokens == 66


@pytest.mark.parametrize("rows", [0, 1, 3, 6, 13])
def test_chunks_of_rows_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = table_model(), base.cut(tokens(70), 7)
    whole = perplexity.run(logits_of(model), windows, 10_000)
    monkeypatch.setitem(base.CHUNK_BYTES, "cpu", rows * 4 * 11)
    assert perplexity.run(logits_of(model), windows, 10_000) == whole


def test_batches_change_a_real_model_by_rounding_only() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    windows = base.cut(tokens(480, 96), 24)
    with torch.inference_mode():
        one, all_ = (perplexity.run(logits_of(model), windows, n).scores["ppl"] for n in (24, 480))
        losses = [float(model(input_ids=w[None], labels=w[None]).loss) for w in windows]
    assert one == pytest.approx(all_, rel=1e-6)
    # The library's own shifted loss is an independent reference for the mean of a window.
    assert one == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_score_follows_from_the_items() -> None:
    result = perplexity.run(logits_of(table_model()), base.cut(tokens(50), 7), 20)
    nll, weight = torch.tensor(result.columns["nll"]), torch.tensor(result.columns["weight"])
    assert result.scores["ppl"] == pytest.approx(math.exp(float((nll * weight).sum() / weight.sum())), rel=1e-6)
    assert len(set(result.columns["id"])) == result.n_items


def test_partial_window_is_dropped_and_limits_take_the_first() -> None:
    text = tokens(29)
    assert base.cut(text, 10).tolist() == text[:20].view(2, 10).tolist()
    assert base.cut(text, 10, limit=1).tolist() == [text[:10].tolist()]
    assert len(base.cut(text, 3, limit=5, max_windows=4)) == 4
    assert len(base.cut(text, 10, limit=100, max_windows=256)) == 2


def test_spread_windows_stand_at_equal_distances_and_all_are_the_same_either_way() -> None:
    text = tokens(29)
    whole = base.cut(text, 2)
    assert base.cut(text, 2, limit=3, choice="spread").tolist() == whole[[0, 4, 9]].tolist()
    assert base.cut(text, 2, limit=2, max_windows=6, choice="spread").tolist() == whole[[0, 3]].tolist()
    assert base.cut(text, 2, limit=99, choice="spread").tolist() == whole.tolist()
    with pytest.raises(InputError, match=r"windows='last'; allowed: first, spread"):
        base.cut(text, 2, choice="last")


def test_a_window_is_of_the_document_that_most_of_its_scored_tokens_are_of() -> None:
    assert base.documents_of(torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1]])) == [0, 1, 1]
    assert base.documents_of(torch.tensor([[2, 3, 4], [7, 7, 8]])) == [3, 7]  # the first of equals


@pytest.mark.parametrize(
    ("window", "limit", "said"),
    [(30, None, r"29 tokens, fewer than one window of 30"), (1, None, r"window=1 .* at least 2"), (10, 0, r"limit=0")],
)
def test_nothing_to_score_is_an_error_that_says_what_to_do(window: int, limit: int | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        base.cut(tokens(29), window, limit)


def test_logits_that_are_not_finite_name_their_window() -> None:
    logits = torch.zeros(4, 5, 6)
    logits[2, 1, 3] = torch.nan
    with pytest.raises(NumericalError, match="window 2"):
        perplexity.run(given_logits(logits), torch.zeros(4, 5, dtype=torch.long), 5)


def test_a_loss_beyond_any_perplexity_is_a_numerical_error() -> None:
    logits = torch.zeros(1, 5, 6)
    logits[..., 1] = 800.0
    with pytest.raises(NumericalError, match="the loss is 800 nats"):
        perplexity.run(given_logits(logits), torch.zeros(1, 5, dtype=torch.long), 5)


@cache
def shipped() -> tuple[Any, Any]:
    """(model, tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ASSETS / "wikitext_llama"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def library_perplexity(text: str, window: int, count: int) -> tuple[float, float]:
    """(ours, by the loss of transformers) for the first windows of a text on the shipped model."""
    model, tokenizer = shipped()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    windows = base.cut(ids, window, limit=count)
    with torch.inference_mode():
        ours = perplexity.run(logits_of(model), windows, 1024).scores["ppl"]
        losses = [float(model(input_ids=w[None], labels=w[None]).loss) for w in windows]
    return ours, math.exp(sum(losses) / len(losses))


def test_shipped_model_on_its_own_text_is_far_from_chance() -> None:
    rows = (ASSETS / "self_text" / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    ours, theirs = library_perplexity("\n\n".join(json.loads(r)["text"] for r in rows), 128, 8)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert 30 < ours < 80  # 4096 by chance


def test_wikitext2_windows_of_the_real_text() -> None:
    rows = shared_path("data", "wikitext2", "test.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    ours, theirs = library_perplexity("\n\n".join(json.loads(r)["text"] for r in rows), 512, 2)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert 40 < ours < 160
