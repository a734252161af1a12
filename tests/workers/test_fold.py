"""Scaling every group leaves the model's function as it was: exact in real arithmetic, so tight in float64."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import FAMILIES, build
from workers import families
from workers.fold import BlockWeights

TOKENS = torch.arange(2, 38).view(3, 12)
# Of eight foldings of at most two roundings each through two blocks; the library's norms and softmax add theirs. Measured: 1e-13.
RELATIVE = 1e-10


def in_double(family: str) -> torch.nn.Module:
    model = build(family).double()
    if family == "mixtral":
        model.set_experts_implementation("eager")  # the default one has no float64
    return model


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"rwkv"}))  # RWKV has nothing that can be scaled
def test_folds_keep_the_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_double(family)
    # Norms and softmax of the library go through float32, which would hide what is tested.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    structure = families.structure(model.config.to_dict())
    with torch.no_grad():
        want = model(TOKENS, use_cache=False).logits
    draw = torch.Generator().manual_seed(1)
    folded = 0
    for block in model.get_submodule(structure.blocks):
        weights = BlockWeights(block, structure)
        for rule in structure.groups:
            if rule.reason is None:
                cols = weights.current[rule.consumers[0]].shape[1]
                weights.scale(rule, torch.empty(cols, dtype=torch.float64).uniform_(0.3, 3.0, generator=draw))
                folded += 1
        weights.write()
    with torch.no_grad():
        got = model(TOKENS, use_cache=False).logits
    assert folded
    assert float((got - want).norm() / want.norm()) < RELATIVE


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "bloom", "falcon_alibi"])
def test_shifts_and_scales_keep_the_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms with a bias in front of linears with biases: both norms of every block."""
    model = in_double(family)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    structure = families.structure(model.config.to_dict())
    with torch.no_grad():
        want = model(TOKENS, use_cache=False).logits
    draw = torch.Generator().manual_seed(1)
    shifted = 0
    for block in model.get_submodule(structure.blocks):
        weights = BlockWeights(block, structure)
        for rule in structure.groups:
            if rule.reason is None and weights.no_shift(rule) is None:
                cols = weights.current[rule.consumers[0]].shape[1]
                weights.shift(rule, torch.randn(cols, dtype=torch.float64, generator=draw))
                weights.scale(rule, torch.empty(cols, dtype=torch.float64).uniform_(0.3, 3.0, generator=draw))
                weights.shift(rule, torch.randn(cols, dtype=torch.float64, generator=draw))
                shifted += 1
        weights.write()
    with torch.no_grad():
        got = model(TOKENS, use_cache=False).logits
    assert shifted == 2 * structure.count
    assert float((got - want).norm() / want.norm()) < RELATIVE


@pytest.mark.parametrize(
    ("family", "reason"), [("llama_mha", "its norm has no bias"), ("falcon_new", "a linear that reads it has no bias")]
)
def test_a_shift_without_biases_is_refused(family: str, reason: str) -> None:
    model = build(family)
    structure = families.structure(model.config.to_dict())
    weights = BlockWeights(model.get_submodule(structure.blocks)[0], structure)
    rule = structure.groups[0]
    assert weights.no_shift(rule) == reason
    with pytest.raises(ValueError, match=f"group {rule.name} cannot be shifted: {reason}"):
        weights.shift(rule, torch.ones(32))


@pytest.mark.parametrize("family", ["llama_mha", "gpt2", "mixtral", "gemma"])
def test_unscaled_undoes_every_scale(family: str) -> None:
    model = build(family).double()
    structure = families.structure(model.config.to_dict())
    weights = BlockWeights(model.get_submodule(structure.blocks)[0], structure)
    for rule in structure.groups:
        if rule.reason is None:
            weights.scale(rule, torch.rand(weights.current[rule.consumers[0]].shape[1], dtype=torch.float64) + 0.5)
    for name, original in weights.original.items():
        torch.testing.assert_close(weights.unscaled(name, weights.current[name]), original, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(weights.scaled_original(name), weights.current[name], rtol=1e-12, atol=1e-12)


def test_a_group_without_a_producer_is_refused() -> None:
    model = build("bloom")
    structure = families.structure(model.config.to_dict())
    weights = BlockWeights(model.transformer.h[0], structure)
    with pytest.raises(ValueError, match="no producer"):
        weights.scale(next(g for g in structure.groups if g.name == "down"), torch.ones(128))
