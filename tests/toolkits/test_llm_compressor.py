"""llm-compressor against our `rtn` and `gptq`: g_asym and g_sym are its grids, its `actorder: static` is our act_order with static groups.

GPTQ carries the error of every code on to the columns after it, so that one code that falls the other way at a tie (the two differ by
roundings of float32) may change others in its row: shares of equal codes are high, not one. What both minimize must come out alike:
the divergence of the model, and the output error where the inputs are the same.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quant.scheme import WeightScheme
from tests.toolkits.both import ASSETS, Quantized, agreement, divergence, hessian, needs, quantize, weights
from workers.capture import block_file

pytestmark = needs("llm_compressor")
SCHEMES = {"w4_g64": weights(4, 64), "w4_g64_symmetric": weights(4, 64, symmetric=True), "w3_channel": weights(3)}
PLAIN = {"act_order": True, "static_groups": True}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_round_to_nearest_is_ours(scheme: WeightScheme, tmp_path: Path) -> None:
    theirs = quantize(tmp_path, scheme, "llm_compressor", feeds=True, algorithm="rtn")
    ours = quantize(tmp_path, scheme, "rtn")
    # It rounds w / s + z half to even, we w / s: where z is odd, the two part at every exact tie, of which float16 weights have some.
    found = agreement(theirs, ours)
    assert found.equal > 0.999
    assert found.most <= 1
    assert found.scale < 1e-6
    assert found.zeros == 1
    assert theirs.summary["bits_stored"] == ours.summary["bits_stored"]


@pytest.mark.parametrize("propagation", ["original", "quantized"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_gptq_is_ours(scheme: WeightScheme, propagation: str, tmp_path: Path) -> None:
    theirs = quantize(tmp_path, scheme, "llm_compressor", feeds=True, propagation=propagation)
    ours = quantize(tmp_path, scheme, "gptq", propagation=propagation, **PLAIN)
    nearest = quantize(tmp_path, scheme, "rtn")
    assert not [n for n in theirs.notes if "round-to-nearest" in n]
    first = [n for n in ours.tensors if ".layers.0.self_attn." in n and not n.endswith("o_proj")]
    same_inputs = agreement(theirs, ours, first)
    everywhere = agreement(theirs, ours)
    assert same_inputs.equal > 0.99
    # Behind quantized blocks one such code changes the inputs of all that follow.
    assert everywhere.equal > (0.99 if propagation == "original" else 0.8)
    assert everywhere.scale < 1e-6
    a, b, c = divergence(theirs, ours, nearest)
    print("divergence: llm-compressor", a, "ours", b, "rtn", c)
    assert a == pytest.approx(b, rel=0.1)
    assert max(a, b) < c
    for name in first:
        one, other, plain = (output_error(q, name, tmp_path) for q in (theirs, ours, nearest))
        assert one == pytest.approx(other, rel=0.02)
        assert max(one, other) < plain


def output_error(made: Quantized, name: str, folder: Path) -> float:
    """tr(E H Eᵀ) of a linear of the first block that reads the block's input."""
    place = folder / "hessian"
    if not place.is_dir():
        hessian(place)
    h = load_file(place / "payload" / block_file(0))["model.layers.0.self_attn.q_proj"].double()
    weight = load_file(ASSETS / "wikitext_llama" / "model.safetensors")[f"{name}.weight"].double()
    error = made.tensors[name].dequantize().double() - weight
    return float(torch.trace(error @ h @ error.T))
