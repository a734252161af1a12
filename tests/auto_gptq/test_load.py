"""The real auto-gptq loads our checkpoints on the CPU and computes what we compute. Runs in .venv-auto-gptq only.

Every quantized weight is compared exactly, by putting the identity through its layer: products with 0 and 1 and sums of
one term are exact in float32, whatever the order. Logits are compared with float64 arithmetic; auto-gptq multiplies the
same float32 numbers in another order than we do, so its error has the size of ours, and 16 times ours is the bound.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from auto_gptq import AutoGPTQForCausalLM
from safetensors.torch import load_file
from transformers import AutoTokenizer

FOLDER = Path(os.environ["BITGRID_CHECKPOINTS"])
CASES = sorted(p.name for p in FOLDER.iterdir())
ERROR_FACTOR = 16


@pytest.fixture(scope="module", params=CASES)
def case(request):
    folder = FOLDER / request.param
    model = AutoGPTQForCausalLM.from_quantized(
        str(folder / "checkpoint"),
        device="cpu",
        torch_dtype=torch.float32,
        disable_exllama=True,
        disable_exllamav2=True,
        inject_fused_attention=False,
        inject_fused_mlp=False,
    )
    return folder, model, load_file(folder / "expected.safetensors")


def test_every_weight_is_the_same_number(case):
    _, model, expected = case
    layers = dict(model.model.named_modules())
    weights = {k.removeprefix("weight."): w for k, w in expected.items() if k.startswith("weight.")}
    replaced = {n for n, m in layers.items() if hasattr(m, "qweight")}
    assert replaced == set(weights)
    for name, weight in weights.items():
        layer = layers[name]
        with torch.no_grad():
            found = layer(torch.eye(weight.shape[1]))
            bias = layer(torch.zeros(1, weight.shape[1]))
        # The bias was added to both; subtracting it again would round, so compare with it added.
        assert torch.equal(found, weight.T + bias), name


def test_logits_are_the_same_up_to_float32_arithmetic(case):
    _, model, expected = case
    with torch.no_grad():
        logits = model(input_ids=expected["tokens"], use_cache=False).logits.double()
    assert float((logits - expected["exact"]).abs().max()) <= ERROR_FACTOR * float(expected["error"])


def test_the_tokenizer_gives_the_same_ids(case):
    folder, _, _ = case
    told = json.loads((folder / "case.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    assert tokenizer(told["text"])["input_ids"] == told["ids"]


def test_the_quantization_configuration_says_what_was_done(case):
    folder, _, _ = case
    wanted = json.loads((folder / "case.json").read_text())["configuration"]
    for found in (
        json.loads((folder / "checkpoint" / "quantize_config.json").read_text()),
        json.loads((folder / "checkpoint" / "config.json").read_text())["quantization_config"],
    ):
        assert {k: found[k] for k in wanted} == wanted
        assert (found["quant_method"], found["checkpoint_format"]) == ("gptq", "gptq")


def test_a_wrong_rope_theta_would_have_been_seen():
    """The bound is far below the effect of the error it is there to catch."""
    folder = FOLDER / "theta_symmetric"
    if not folder.is_dir():
        pytest.skip("the case theta_symmetric was not made")
    expected = load_file(folder / "expected.safetensors")
    model = AutoGPTQForCausalLM.from_quantized(
        str(folder / "checkpoint"), device="cpu", torch_dtype=torch.float32, disable_exllama=True, disable_exllamav2=True
    )
    assert model.config.rope_theta == 500000.0
    for module in model.model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq = module.inv_freq ** (math.log(1e4) / math.log(5e5))
    with torch.no_grad():
        logits = model(input_ids=expected["tokens"], use_cache=False).logits.double()
    assert float((logits - expected["exact"]).abs().max()) > 100 * ERROR_FACTOR * float(expected["error"])
