"""Views on linears read and write the right values; taps see and change inputs without other effect."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from tests.tiny_models import FAMILIES, build
from workers import families
from workers.blocks import linear_view, tap_inputs

TOKENS = torch.arange(2, 38).view(3, 12)


def names_of(model: torch.nn.Module) -> list[str]:
    return [s.name for s in families.linear_shapes(model.config.to_dict())]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mixtral"])
def test_writing_a_weight_reads_back_and_touches_nothing_else(family: str) -> None:
    model = build(family)
    for name in names_of(model):
        before = {n: p.clone() for n, p in model.named_parameters()}
        view = linear_view(model, name)
        new = torch.randn(view.weight().shape)
        old = view.weight().clone()
        view.write(new)
        assert torch.equal(view.weight(), new)
        view.write(old)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_transposed_view_is_the_linear_it_stands_for() -> None:
    conv = Conv1D(6, 4)
    view = linear_view(torch.nn.ModuleDict({"c": conv}), "c")
    x = torch.randn(5, 4)
    torch.testing.assert_close(F.linear(x, view.weight(), view.bias), conv(x))


def test_an_expert_view_is_one_slice() -> None:
    model = build("mixtral")
    experts = model.model.layers[1].mlp.experts
    assert torch.equal(linear_view(model, "model.layers.1.mlp.experts.gate_up_proj.2").weight(), experts.gate_up_proj[2])
    assert torch.equal(linear_view(model, "model.layers.1.mlp.experts.down_proj.3").weight(), experts.down_proj[3])


def test_a_weight_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\) given for \(32, 32\)"):
        linear_view(build("llama"), "model.layers.0.self_attn.q_proj").write(torch.zeros(2, 2))


def test_a_module_that_is_no_linear_is_refused() -> None:
    with pytest.raises(TypeError, match="not a linear"):
        linear_view(build("llama"), "model.layers.0.mlp")


@pytest.mark.parametrize("family", FAMILIES)
def test_taps_that_change_nothing_change_no_bit(family: str) -> None:
    model = build(family)
    with torch.no_grad():
        want = model(TOKENS).logits
        taps = tap_inputs(model, names_of(model), lambda name, x, tokens: x)
        tapped = model(TOKENS).logits
        taps.remove()
        after = model(TOKENS).logits
    assert torch.equal(tapped, want)
    assert torch.equal(after, want)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_tap_replaces_the_input(family: str) -> None:
    """Halving every input is the same as halving every weight (in exact powers of two)."""
    model, halved = build(family), build(family)
    for name in names_of(halved):
        view = linear_view(halved, name)
        view.write(view.weight() / 2)
    taps = tap_inputs(model, names_of(model), lambda name, x, tokens: x / 2)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, halved(TOKENS).logits, rtol=1e-5, atol=1e-5)
    taps.remove()
