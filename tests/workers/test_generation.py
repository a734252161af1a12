"""Steps as one launch: the logits of steps launched kernel by kernel, from buffers that stay where they are, and no read by the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny_models import FAMILIES, tiny_model
from tests.workers.fake_devices import fake_capture
from workers import generation
from workers.families import refuses_steps
from workers.generation import Eager, Graphed, NoGraph, generate
from workers.positions import positions

PROMPT = torch.randint(2, 90, (2, 6), generator=torch.Generator().manual_seed(0))


def model(family: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model(family)).eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_steps_are_those_of_one_pass_over_all_tokens(family: str) -> None:
    """Of sequences side by side, but where planning refuses them."""
    found: Any = model(family)
    prompt = PROMPT[:1] if refuses_steps(2, found.config.to_dict()) else PROMPT
    got = generate(Eager(found), prompt, 4)
    want = found(torch.cat([prompt, got.tokens], 1)).logits[:, prompt.shape[1] - 1 :]
    assert (got.logits - want).norm() <= 1e-5 * want.norm()


@torch.inference_mode()
def test_steps_that_are_refused_are_wrong() -> None:
    """Once they are right, nothing needs to be refused."""
    found: Any = model("rwkv")
    got = generate(Eager(found), PROMPT, 1)
    want = found(torch.cat([PROMPT, got.tokens], 1)).logits[:, -1]
    assert (got.logits[:, 1] - want).norm() > 1e-3 * want.norm()


@pytest.mark.parametrize("family", ["mistral", "opt"])
def test_replayed_steps_are_the_models(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, since a prompt begins anew. float32: sums of some hundred in another order. Mistral's tokens see 8 others here, not all."""
    monkeypatch.setattr(generation, "captured", fake_capture)
    found = model(family)
    want = generate(Eager(found), PROMPT, 5)
    graphed = Graphed(found, PROMPT, 5)
    for _ in range(2):
        got = generate(graphed, PROMPT, 5)
        assert torch.equal(got.tokens, want.tokens)
        assert (got.logits - want.logits).norm() <= 1e-5 * want.logits.norm()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_step_can_be_captured(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device no value can be read, so that whatever runs there waits for nothing."""
    monkeypatch.setattr(generation, "captured", lambda step, device: (step, step()))
    Graphed(model(family).to("meta"), PROMPT.to("meta"), 5)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("rwkv", "keeps no keys and values"),
        ("falcon_alibi", "does not run with a cache of fixed size"),
    ],
)
def test_what_cannot_be_captured_says_why(family: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "captured", fake_capture)
    with pytest.raises(NoGraph, match=reason):
        Graphed(model(family), PROMPT, 5)


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
def test_steps_before_a_capture_stay_within_learned_positions(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for all of them is refused by one token too many, where a GPU's process would be lost; other positions can go on."""
    monkeypatch.setattr(generation, "captured", fake_capture)
    found = model(family)
    most = positions(found.config.to_dict())
    assert most is not None
    fits = torch.ones(1, most - generation.WARM - 1, dtype=torch.int64)
    for prompt in (fits, torch.ones(1, most - 1, dtype=torch.int64)):
        if family == "llama" or prompt is fits:
            assert generate(Graphed(found, prompt, 1), prompt, 1).tokens.shape == (1, 1)
        else:
            assert generate(Eager(found), prompt, 1).tokens.shape == (1, 1)
            with pytest.raises(NoGraph, match=f"come to {most + generation.WARM} tokens, above the model's {most} learned positions"):
                Graphed(found, prompt, 1)


def test_weights_that_come_and_go_cannot_be_captured() -> None:
    with pytest.raises(NoGraph, match="read anew"):
        Graphed(model("llama").to("meta"), PROMPT, 5)


@pytest.mark.gpu
def test_graphs_of_a_gpu() -> None:
    """A read by the host is found before a capture begins, and leaves nothing behind."""
    found, prompt = model("llama").cuda(), PROMPT.cuda()
    want = generate(Eager(found), prompt, 5)
    graphed = Graphed(found, prompt, 5)
    for _ in range(2):
        got = generate(graphed, prompt, 5, want.tokens)
        assert (got.logits - want.logits).norm() <= 1e-4 * want.logits.norm()
    with pytest.raises(NoGraph, match="could not be captured"):
        generation.captured(lambda: torch.ones(int(prompt.max())), prompt.device)
    assert torch.randn(3, device="cuda").isfinite().all()
