"""Shipped content never changes: keys of every demo and of every user's store contain these digests."""

from __future__ import annotations

import json

import pytest
import torch

from workers.artifact import file_digest
from workers.assets import ASSETS

DIGESTS = {
    "self_text/calibration.jsonl": "f9773b6771a7e6134459c6610a2710c0f01f2d1cd9505e6cf3cc6c5687d5f790",
    "self_text/evaluation.jsonl": "afa2224ae3a22a9b0e6ca5ce698bfb4b78eaa6c9662e65960c111f1ef7b93d13",
    "wikitext_llama/config.json": "e56ea34a0d3896fae0a30edabe1b2473f9a9eb055d96490dffb62dc1cef79e7c",
    "wikitext_llama/model.safetensors": "f3596fb2298d1d27c7930748cecf9d3f20354649cf193dd7c622831ae632c2a1",
    "wikitext_llama/tokenizer.json": "ca2aeb8c92583c1f0959e99825b2f725fd122fedfc3b7042ff3b97a988108452",
    "wikitext_llama/tokenizer_config.json": "d1b3b05b0a3752279d552d7fb148f99e44b3ea8729e38afad617ae2f93e63f9d",
}


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_shipped_files_are_the_ones_keys_were_made_with(name: str) -> None:
    assert file_digest(ASSETS / name) == DIGESTS[name]


def documents(split: str) -> list[str]:
    return [json.loads(line)["text"] for line in (ASSETS / "self_text" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_calibration_and_evaluation_text_are_disjoint() -> None:
    calibration, evaluation = documents("calibration"), documents("evaluation")
    assert len(calibration) == len(set(calibration)) == len(evaluation) == len(set(evaluation)) == 128
    assert not set(calibration) & set(evaluation)
    # Not even the greedy beginnings agree, since first tokens differ.
    assert not {d[:40] for d in calibration} & {d[:40] for d in evaluation}


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_text_tokenizes_back_to_about_what_was_drawn(split: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "wikitext_llama")
    lengths = [len(tokenizer(d)["input_ids"]) for d in documents(split)]
    assert min(lengths) >= 0.97 * 512
    assert max(lengths) <= 1.03 * 512
    assert not any("\ufffd" in d for d in documents(split))


def test_generation_never_draws_banned_tokens_and_repeats_with_its_seed() -> None:
    from tests.tiny_models import build
    from workers.assets import generate_text

    model, banned = build("llama"), torch.tensor([0, 1, 7])
    first = torch.tensor([3, 4])
    draws = [generate_text.generate(model, first, banned, torch.Generator().manual_seed(s), length=40) for s in (0, 0, 1)]
    assert draws[0].shape == (2, 40)
    assert draws[0][:, 0].tolist() == [3, 4]
    assert torch.equal(draws[0], draws[1])
    # The first tokens are greedy, so that seeds agree on them, and differ after.
    greedy = 1 + generate_text.GREEDY
    assert torch.equal(draws[0][:, :greedy], draws[2][:, :greedy])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.isin(draws[0][:, 1:], banned).any()
