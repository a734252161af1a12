"""The structure table agrees with the real modules of transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from tests.shared import shared_path
from tests.tiny_models import FAMILIES, build, config_of
from workers import families
from workers.blocks import linear_view, tap_inputs
from workers.errors import UnsupportedModel


def written_config(family: str) -> dict[str, Any]:
    return json.loads(config_of(family).to_json_string())


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_are_exactly_those_of_the_decoder_blocks(family: str) -> None:
    model = build(family)
    structure = families.structure(written_config(family))
    found = {}
    for name, module in model.get_submodule(structure.blocks).named_modules(prefix=structure.blocks):
        if isinstance(module, Conv1D):
            found[name] = tuple(reversed(module.weight.shape))
        elif isinstance(module, nn.Linear):
            found[name] = tuple(module.weight.shape)
        elif type(module).__name__.endswith("Experts"):
            for parameter in ("gate_up_proj", "down_proj"):
                stacked = getattr(module, parameter)
                found.update({f"{name}.{parameter}.{e}": tuple(stacked[e].shape) for e in range(stacked.shape[0])})
    shapes = families.linear_shapes(written_config(family))
    assert {s.name: (s.rows, s.cols) for s in shapes} == found
    assert all(linear_view(model, s.name).weight().shape == (s.rows, s.cols) for s in shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_of_a_site_read_the_same_tensor_and_sites_come_in_order(family: str) -> None:
    model = build(family)
    shapes = families.linear_shapes(written_config(family))
    seen: dict[str, torch.Tensor] = {}

    def tap(name: str, x: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        seen[name] = x
        return x

    taps = tap_inputs(model, [s.name for s in shapes], tap)
    with torch.no_grad():
        model(torch.arange(2, 26).view(2, 12))
    taps.remove()
    assert all(torch.equal(seen[s.name], seen[s.site]) for s in shapes if s.name in seen)
    distinct: list[torch.Tensor] = []
    for site in dict.fromkeys(s.site for s in shapes if s.name in seen):
        x = seen[site]
        assert not any(x.shape == y.shape and torch.equal(x, y) for y in distinct), f"{site} shares its input with another site"
        distinct.append(x)


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_groups_name_modules_that_exist(family: str) -> None:
    model = build(family)
    structure = families.structure(written_config(family))
    block = model.get_submodule(structure.blocks)[0]
    names = set(structure.linear_names())
    for group in structure.groups:
        assert set(group.consumers) <= names
        assert group.inspect == group.consumers or all(block.get_submodule(m) is not None for m in group.inspect)
        if group.reason is None:
            assert group.producer is not None
            assert group.producer in names if group.producer_kind == "linear" else block.get_submodule(group.producer) is not None
    # Every norm in front of linears takes a scale: these are the groups SmoothQuant needs.
    assert sum(g.producer_kind == "norm" for g in structure.groups) == (1 if family == "falcon_old" else 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_left_out_of_config_json_are_those_of_transformers(family: str) -> None:
    """Or the file is refused for what it lacks."""
    full = written_config(family)
    for left_out in full.keys() - {"model_type", "transformers_version", "num_attention_heads"}:  # transformers refuses some without heads
        short = {k: v for k, v in full.items() if k != left_out}
        try:
            found = families.structure(short)
        except UnsupportedModel:
            continue
        made = AutoConfig.for_model(**{k: v for k, v in short.items() if k != "transformers_version"}).to_dict()
        assert found == families.structure(made), left_out


def test_a_post_norm_block_keeps_its_norms() -> None:
    config = {**written_config("opt"), "do_layer_norm_before": False}
    reasons = {g.name: g.reason for g in families.structure(config).groups}
    assert reasons["qkv"] == reasons["fc1"] == families.POST_NORM
    assert reasons["fc2"] is None


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "mamba"}, "Mamba has state-space blocks"),
        ({"model_type": "phi9"}, "supported: bloom, falcon"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "already quantized"),
        ({"model_type": "llama", "hidden_size": 8}, "lacks intermediate_size"),
    ],
)
def test_unsupported_models_are_refused_with_the_reason(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        families.linear_shapes(config)


def test_a_real_rwkv_checkpoint_has_seven_linears_a_block() -> None:
    config = json.loads((shared_path("models", "tiny-rwkv4-660K") / "config.json").read_text())
    shapes = families.linear_shapes(config)
    assert len(shapes) == 7 * 4
    assert {s.site for s in shapes} == {s.name for s in shapes}
