"""How long windows may be is what the real models of transformers say, and do."""

from __future__ import annotations

import json

import pytest
import torch

from tests.tiny_models import FAMILIES, build, config_of
from workers import families
from workers.positions import DEFAULTS, LEARNED, UNLIMITED, positions, refuses_calibration, refuses_window

SETTING = {"gpt2": "n_positions", "rwkv": "context_length"}
"""Where a family calls it otherwise."""


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_those_of_the_configuration_and_of_its_defaults(family: str) -> None:
    config = config_of(family)
    endless = config.model_type in UNLIMITED
    written = json.loads(config.to_json_string())
    assert positions(written) == (None if endless or "alibi" in family else config.max_position_embeddings)
    assert positions({"model_type": config.model_type}) == (None if endless else type(config)().max_position_embeddings)


def test_every_family_is_known() -> None:
    assert sorted((*DEFAULTS, *UNLIMITED)) == sorted(families.FAMILIES)
    assert positions({"model_type": "another"}) is None
    assert positions({"model_type": "another", "n_positions": 7}) == 7
    assert positions({"model_type": "llama", "max_position_embeddings": None}) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_only_models_with_learned_positions_cannot_go_on(family: str) -> None:
    changes = {} if family == "bloom" else {SETTING.get(family, "max_position_embeddings"): 16}
    model, tokens = build(family, **changes), torch.arange(2, 26)[None]
    with torch.no_grad():
        if family in LEARNED:
            with pytest.raises(IndexError):
                model(tokens, use_cache=False)
        else:
            assert torch.isfinite(model(tokens, use_cache=False).logits).all()


def test_messages_say_what_is_allowed() -> None:
    llama, gpt2 = ({"model_type": kind, name: 128} for kind, name in (("llama", "max_position_embeddings"), ("gpt2", "n_positions")))
    assert [refuses_window(128, c) for c in (llama, gpt2)] == [None, None]
    assert refuses_window(129, llama) == "task.params.window=129 is above the model's 128 positions; use 128 or less"
    assert [refuses_calibration(128, gpt2), refuses_calibration(129, llama)] == [None, None]
    said = "calibration.sequence_length=129 is above the model's 128 learned positions; use 128 or less"
    assert refuses_calibration(129, gpt2) == said
