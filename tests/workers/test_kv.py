"""The cache in the model: decoding equals the plain forward at 16 bits, one pass equals decoding, and the stages carry it all."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant.errors import ScaleDtypeError
from quant.kv import Kivi, KVQuant, KVQuantizer, PerToken
from quant.scheme import ActivationScheme, Granularity, KVScheme, WeightScheme
from tests.tiny_models import EXPERTS, FAMILIES, tiny_model
from tests.workers.stage_runs import calibrated, calibration_text, commit, quantize_spec, quantized, tiny_context
from tests.workers.test_evaluate import evaluated, items
from workers import kv_rules, kv_runs
from workers.blocks import Taps
from workers.decoding import decoded_logits
from workers.errors import InputError
from workers.kv_aging import aging
from workers.kv_cache import QuantizedCache
from workers.kv_rules import SEPARATE_ROTARY_KEYS
from workers.rebuild import attach_runtime, rebuild
from workers.residency import Residency
from workers.specs import ModelSpec, QuantizeSpec

TOKENS = torch.arange(2, 50).view(2, 24)
CPU = torch.device("cpu")
ROTARY = ["llama", "mistral", "qwen2", "gemma"]
"""Grouped queries; sliding windows in all or some layers; heads wider than hidden / heads."""
ROUNDING = 1e-5
"""Models run in float64, but norms and ranges of the cache in float32: logits of size 5 after a few such roundings of 6e-8. In float32
throughout, a value between two codes would now and then be rounded the other way, which costs 1e-3."""


def model_of(family: str) -> Any:
    experts = {"experts_implementation": EXPERTS[family]} if family in EXPERTS else {}
    return AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float64, **experts).eval()


def plain(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def decoded(model: Any, rule: KVQuantizer, tokens: Tensor = TOKENS, **how: Any) -> Tensor:
    rules = [rule] * model.config.num_hidden_layers
    how = {"batch_tokens": 24, **how}
    return torch.cat(list(decoded_logits(model, CPU, nullcontext, lambda: QuantizedCache(rules), **how)(list(tokens.split(1)))))


def kvquant(model: Any, **params: Any) -> KVQuant:
    width = model.config.num_key_value_heads * kv_rules.head_width(model.config.to_dict())
    g = torch.Generator().manual_seed(0)
    return KVQuant(3, **params).calibrate(2 * torch.randn(500, width, generator=g), 2 * torch.randn(500, width, generator=g))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "rwkv"])
def test_decoding_at_16_bits_is_the_plain_forward(family: str) -> None:
    model = model_of(family)
    want = plain(model)
    rules: list[KVQuantizer] = [PerToken(16), Kivi(2, 2, 4, 64)]
    if family in ROTARY:
        rules += [KVQuant(16), Kivi(16, 16, 4, 8)]
    for rule in rules:
        torch.testing.assert_close(decoded(model, rule), want, rtol=0, atol=ROUNDING)
    assert torch.equal(plain(model), want)  # no tap is left


@pytest.mark.parametrize("family", ROTARY)
def test_kivis_single_pass_is_what_decoding_reads(family: str) -> None:
    """Two implementations of one rule: copies and a mask against a cache that ages."""
    model, rule, prefill = model_of(family), Kivi(2, 3, 4, 8), 1 if family == "llama" else 11
    with aging(model, rule, prefill):
        single = plain(model)
    stepwise = decoded(model, rule, prefill=prefill)
    torch.testing.assert_close(single, stepwise, rtol=0, atol=ROUNDING)
    assert float((single - plain(model)).abs().max()) > 0.1
    # A prompt, and the first R tokens, read full precision.
    torch.testing.assert_close(single[:, : max(8, prefill)], plain(model)[:, : max(8, prefill)], rtol=0, atol=ROUNDING)


def test_kivis_single_pass_rounds_no_values_that_do_not_age() -> None:
    """Values whose range float16 does not hold, all in the window in full precision."""
    model = model_of("llama")
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data *= 1e6
    want = plain(model)
    with aging(model, Kivi(2, 2, 4, 32), 1):
        torch.testing.assert_close(plain(model), want, rtol=0, atol=ROUNDING)
    with aging(model, Kivi(2, 2, 4, 8), 1), pytest.raises(ScaleDtypeError, match=r"do not fit torch\.float16"):
        plain(model)


@pytest.mark.parametrize("family", ROTARY)
def test_kvquant_reads_the_same_in_any_steps(family: str) -> None:
    model = model_of(family)
    rule = kvquant(model, first_few_fp16=2)
    whole = decoded(model, rule, prefill=TOKENS.shape[1])
    for how in ({"longest": 1}, {"longest": 5, "prefill": 9}):
        torch.testing.assert_close(decoded(model, rule, **how), whole, rtol=0, atol=ROUNDING)
    assert float((whole - plain(model)).abs().max()) > 0.05


def test_keys_are_quantized_before_the_rotary_embedding() -> None:
    """Reference: k_proj's output rounded by a hook, values by their own hook; the rotary embedding is the model's."""
    model = model_of("llama")
    rule = kvquant(model)
    taps = Taps()
    for layer in model.model.layers:
        taps.add(layer.self_attn.k_proj.register_forward_hook(lambda _m, _a, out: rule.keys_rounded(out)).remove)
        taps.add(layer.self_attn.v_proj.register_forward_hook(lambda _m, _a, out: rule.values_rounded(out)).remove)
    want = plain(model)
    taps.remove()
    torch.testing.assert_close(decoded(model, rule, prefill=TOKENS.shape[1]), want, rtol=0, atol=ROUNDING)


def test_a_batch_of_windows_is_decoded_as_each_alone() -> None:
    model = model_of("llama")
    rule = Kivi(2, 2, 4, 8)
    together = decoded(model, rule, batch_tokens=1024)
    alone = torch.cat([decoded(model, rule, tokens) for tokens in TOKENS.split(1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=ROUNDING)


def test_whole_windows_take_no_more_tokens_at_once_than_a_forward_may() -> None:
    """Of a batch of one window each; steps of decoding take a token of every window together."""
    model, seen = model_of("llama"), []
    windows = torch.arange(6 * 24).view(6, 24) % 96
    tap = model.model.layers[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[:2].numel()))
    whole = decoded(model, PerToken(4), windows, batch_tokens=48, prefill=24)
    assert max(seen) <= 48
    seen.clear()
    torch.testing.assert_close(decoded(model, PerToken(4), windows, batch_tokens=48, longest=1), whole, rtol=0, atol=ROUNDING)
    tap.remove()
    assert seen == [6] * 24


# --- stages ---------------------------------------------------------------------------------------------------------

KIVI = KVScheme(2, group_size=4, kind="kivi", residual_length=4)
SCHEMES = [
    (KVScheme(3), KVScheme(3, mode="decode")),
    (KIVI, KVScheme(2, group_size=4, kind="kivi", residual_length=4, mode="decode")),
    (
        KVScheme(3, kind="kvquant", version=2, outliers=0.1, codebook="nuq"),
        KVScheme(3, kind="kvquant", version=2, outliers=0.1, codebook="nuq", mode="decode"),
    ),
    (
        KVScheme(2, kind="kvquant", version=2, outliers=0.1, codebook="nuq", fisher=True),
        KVScheme(2, kind="kvquant", version=2, outliers=0.1, codebook="nuq", fisher=True, mode="decode"),
    ),
]


@pytest.mark.parametrize("schemes", SCHEMES, ids=lambda s: s[0].kind)
def test_weights_and_cache_in_one_variant_decoded_or_in_one_pass(schemes: tuple[KVScheme, KVScheme], tmp_path: Path) -> None:
    context = tiny_context("llama", tmp_path)
    residency = Residency()
    artifact, _ = quantized(context, tmp_path / "q", quantize_spec(), {})
    inputs = {"quantize": artifact}
    _, weights = evaluated(context, tmp_path / "w", "perplexity", inputs, residency)
    if schemes[0].statistics:
        inputs |= calibrated(context, tmp_path / "c", *schemes[0].statistics)
    found = [evaluated(context, tmp_path / kv.mode, "perplexity", inputs, residency, kv=kv) for kv in schemes]
    scores = [summary["scores"]["nll"] for _, summary in found]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)  # a rounding to the other code here and there (see ROUNDING), in float32
    assert abs(scores[0] - weights["scores"]["nll"]) > 1e-2
    assert items(found[0][0])["id"] == items(found[1][0])["id"]
    for (_, summary), kv in zip(found, schemes, strict=True):
        assert summary["kv"]["mode"] == kv.mode
        assert summary["kv"]["tokens"] == 16
        assert 2 < summary["kv"]["bits_stored"] < 16
    assert evaluated(context, tmp_path / "again", "perplexity", {"quantize": artifact}, residency)[1]["scores"] == weights["scores"]


def test_decoding_mixes_the_keys_of_a_rotated_model_as_one_pass_does(tmp_path: Path) -> None:
    context = tiny_context("llama", tmp_path)
    artifact, _ = quantized(context, tmp_path / "q", quantize_spec("rtn", "quarot"), {})
    model = rebuild(context, ModelSpec("model"), artifact).double()
    handle = attach_runtime(model, None, None, KVScheme(4))
    one_pass = plain(model)
    handle.remove()

    def through(kv: KVScheme) -> Tensor:
        return torch.cat(list(kv_runs.logits(model, kv, {}, context, nullcontext)(list(TOKENS.split(1)))))

    torch.testing.assert_close(through(KVScheme(4, mode="decode")), one_pass, rtol=0, atol=ROUNDING)
    assert float((decoded(model, PerToken(4)) - one_pass).abs().max()) > 1000 * ROUNDING
    assert not any("rotation of keys" in n for n in context.notes)
    through(KVScheme(2, group_size=4, kind="kivi", residual_length=4, mode="decode"))
    assert any("the method's rotation of keys is left out: kv.kind=kivi" in n for n in context.notes)


LET = quantize_spec("omniquant", weight=WeightScheme(8), activation=ActivationScheme(8, symmetric=False), epochs=0, let=True)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (quantize_spec("rtn", "quarot"), "these give: v_proj (rotated);"),
        (LET, "these give: k_proj (scaled), v_proj (scaled);"),
        (quantize_spec("rtn", "smoothquant"), None),  # scales norms alone
    ],
    ids=["quarot", "let", "smoothquant"],
)
def test_kvquant_says_that_keys_and_values_are_not_those_it_was_calibrated_on(spec: QuantizeSpec, said: str | None, tmp_path: Path) -> None:
    context = tiny_context("llama_mha", tmp_path)
    statistics = calibrated(context, tmp_path / "c", "kv", "absmax")
    artifact, _ = quantized(context, tmp_path / "q", spec, {"absmax": statistics["absmax"]} if said is None else {})
    kv = KVScheme(3, kind="kvquant", version=2, codebook="nuq")
    evaluated(context, tmp_path / "e", "perplexity", {"quantize": artifact, "kv": statistics["kv"]}, kv=kv)
    found = [n for n in context.notes if "calibrated on the unquantized model" in n]
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_first_tokens_that_are_kept_are_not_calibrated_on(tmp_path: Path) -> None:
    """Sinks are what ranges should not have to hold: with the first two of every sequence a thousand times as large nothing changes."""
    context = tiny_context("llama", tmp_path)
    statistics = calibrated(context, tmp_path / "c", "kv", "kv_fisher")

    def rows(name: str, kept: int) -> dict[str, list[Any]]:
        kv = KVScheme(3, kind="kvquant", version=2, outliers=0.1, codebook="nuq", fisher=True, first_few_fp16=kept)
        return items(evaluated(context, tmp_path / name, "perplexity", statistics, kv=kv)[0])

    want, fewer = rows("want", 2), rows("fewer", 1)
    for artifact in statistics.values():
        for file in (artifact / "payload").glob("block_*.safetensors"):
            tensors = load_file(file)
            for x in tensors.values():
                x[:, :2] *= 1000
            save_file(tensors, file)
        commit(artifact)
    assert rows("got", 2) == want
    assert rows("none", 1) != fewer
    with pytest.raises(InputError, match=r"kv\.first_few_fp16=12 leaves nothing to calibrate on: calibration sequences have 12 tokens"):
        rows("all", 12)


def test_divergence_of_a_decoded_cache_and_more_bits_are_better(tmp_path: Path) -> None:
    context = tiny_context("llama", tmp_path)
    residency = Residency()
    reference, _ = evaluated(context, tmp_path / "ref", "divergence", residency=residency)
    kl = []
    for bits in (2, 4, 8):
        kv = KVScheme(bits, group_size=4, kind="kivi", residual_length=4, mode="decode")
        _, summary = evaluated(context, tmp_path / str(bits), "divergence", {"reference": reference}, residency, kv=kv)
        kl.append(summary["scores"]["kl"])
    assert kl[0] > 5 * kl[1] > 5 * kl[2] > 0


def test_the_statistic_kv_is_what_the_projections_give(tmp_path: Path) -> None:
    family = "llama_mha"  # with biases
    context = tiny_context(family, tmp_path)
    together = calibrated(context, tmp_path / "a", "kv", "hessian", "samples")
    found = load_file(together["kv"] / "payload" / "block_0001.safetensors")
    inputs = load_file(together["samples"] / "payload" / "block_0001.safetensors")["model.layers.1.self_attn.q_proj"]
    attention = model_of(family).float().model.layers[1].self_attn
    with torch.no_grad():
        for name, projection in (("keys", attention.k_proj), ("values", attention.v_proj)):
            torch.testing.assert_close(found[f"model.layers.1.{name}"], projection(inputs), rtol=1e-5, atol=1e-5)
    alone = calibrated(context, tmp_path / "b", "kv")["kv"]
    for file in (alone / "payload").iterdir():
        assert file.read_bytes() == (together["kv"] / "payload" / file.name).read_bytes()


def test_fisher_weights_are_squared_slopes_of_the_loss(tmp_path: Path) -> None:
    """Reference: central differences of the loss when one key or value of one token is moved. Norms run in float32, so that the loss, about
    40, is off by some 1e-6; over twice the step that is 1e-4, and the third derivative adds as much."""
    context = tiny_context("llama_mha", tmp_path)
    artifact = calibrated(context, tmp_path / "f", "kv_fisher", dtype="float64")["kv_fisher"]
    tokens = calibration_text(context, "llama_mha")[1:2].long()
    model = model_of("llama_mha")
    step = 1e-2

    def loss(projection: Any, token: int, channel: int, by: float) -> float:
        def moved(_m: Any, _a: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[0, token, channel] += by
            return out

        handle = projection.register_forward_hook(moved)
        with torch.no_grad():
            log_p = model(tokens, use_cache=False).logits.log_softmax(-1)
        handle.remove()
        return -float(log_p[0, :-1].gather(-1, tokens[0, 1:, None]).sum())

    for b in range(2):
        found = load_file(artifact / "payload" / f"block_{b:04d}.safetensors")
        attention = model.model.layers[b].self_attn
        for name, projection in (("keys", attention.k_proj), ("values", attention.v_proj)):
            weights = found[f"model.layers.{b}.{name}"]
            assert weights.dtype == torch.float32
            assert not weights[:, -1].any()  # no loss comes after the last token
            for token, channel in ((0, 3), (5, 17), (10, 30)):
                slope = (loss(projection, token, channel, step) - loss(projection, token, channel, -step)) / (2 * step)
                assert float(weights[1, token, channel]) ** 0.5 == pytest.approx(abs(slope), rel=1e-2, abs=1e-3)


def test_fisher_weights_need_the_whole_model_and_their_own_input(tmp_path: Path) -> None:
    context = tiny_context("llama", tmp_path, memory_bytes=50_000)
    with pytest.raises(InputError, match=r"kv_fisher needs the whole model .* hints\.memory_bytes=50000"):
        calibrated(context, tmp_path / "a", "kv_fisher")
    context = tiny_context("llama", tmp_path)
    inputs = calibrated(context, tmp_path / "b", "kv")
    with pytest.raises(InputError, match="as the input `kv_fisher`"):
        evaluated(context, tmp_path / "c", "perplexity", inputs, kv=KVScheme(3, kind="kvquant", version=2, codebook="nuq", fisher=True))


def test_what_cannot_work_is_refused_with_its_reason(tmp_path: Path) -> None:
    nuq = KVScheme(3, kind="kvquant", version=2, codebook="nuq")
    llama, gpt2 = tiny_context("llama", tmp_path), tiny_context("gpt2", tmp_path)
    with pytest.raises(InputError, match=r"before the rotary embedding, .* a gpt2 model"):
        evaluated(gpt2, tmp_path / "a", "perplexity", kv=nuq)
    with pytest.raises(InputError, match="got a gpt2 model"):
        calibrated(gpt2, tmp_path / "b", "kv")
    with pytest.raises(InputError, match="as the input `kv`"):
        evaluated(llama, tmp_path / "c", "perplexity", kv=nuq)
    with pytest.raises(InputError, match=r"use kv\.mode=decode for a gpt2 model"):
        evaluated(gpt2, tmp_path / "d", "perplexity", kv=KIVI)
    with pytest.raises(InputError, match="KV group size 3 does not divide a head of 8"):
        evaluated(llama, tmp_path / "e", "perplexity", kv=KVScheme(2, group_size=3, kind="kivi", residual_length=6))
    with pytest.raises(InputError, match="KV group size 16 does not divide a head of 8"):
        evaluated(llama, tmp_path / "h", "perplexity", kv=KVScheme(4, group_size=16))
    with pytest.raises(InputError, match="the same bitgrid"):
        evaluated(llama, tmp_path / "f", "perplexity", kv=KVScheme(2, version=7, mode="decode"))
    assert kv_rules.refuses(KVScheme(4), {"model_type": "mamba"}) is not None
    with pytest.raises(InputError, match="a rwkv model has no keys and values"):
        evaluated(tiny_context("rwkv", tmp_path), tmp_path / "g", "perplexity", kv=KVScheme(4, mode="decode"))


@pytest.mark.parametrize("mode", ["simulate", "decode"])
def test_keys_of_a_streamed_model_are_rotated_from_the_first_token(mode: str, tmp_path: Path) -> None:
    """Its blocks are not read yet when its cache is made. Scores are some 0.03 off without; sums of one order leave 1e-6."""
    ctx = tiny_context("llama", tmp_path)
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec("rtn", "quarot", weight=WeightScheme(8)), {})
    scored = []
    for name, hints in (("whole", ctx.hints), ("streamed", replace(ctx.hints, streamed=True))):
        run, _ = evaluated(replace(ctx, hints=hints), tmp_path / name, "perplexity", {"quantize": artifact}, kv=KVScheme(4, mode=mode))
        scored.append(items(run)["nll"])
    assert scored[1] == pytest.approx(scored[0], abs=1e-5)


@pytest.mark.parametrize("activation", [ActivationScheme(8, granularity=Granularity.TENSOR), ActivationScheme(6, outlier_threshold=3.0)])
def test_what_goes_by_a_sequence_is_rounded_step_by_step_whatever_the_batch(activation: ActivationScheme, tmp_path: Path) -> None:
    """Scores are 0.01 to 0.04 off where steps take as many tokens as a batch has room for."""
    ctx, scored = tiny_context("llama", tmp_path), []
    for tokens in (1, 24, 400):
        run = replace(ctx, hints=replace(ctx.hints, batch_tokens=tokens))
        artifact, _ = evaluated(run, tmp_path / str(tokens), "perplexity", activation=activation, kv=KVScheme(8, mode="decode"))
        scored.append(items(artifact)["nll"])
    assert scored[1:] == [pytest.approx(scored[0], abs=1e-5)] * 2


def test_a_refused_cache_leaves_a_resident_model_as_it_was() -> None:
    """Its activations would be rounded in every later stage."""
    model = model_of("rwkv")
    before = plain(model)
    with pytest.raises(InputError, match="a rwkv model has no keys and values"):
        attach_runtime(model, None, ActivationScheme(4), KVScheme(4))
    assert torch.equal(plain(model), before)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"bits": 1}, "kv.bits=1 is not between 2 and 8"),
        ({"bits": 8, "kind": "kvquant"}, "not between 2 and 5"),
        ({"bits": 4, "kind": "kvi"}, "choose per_token, kivi, kvquant"),
        ({"bits": 4, "mode": "decoded"}, "choose simulate or decode"),
        ({"bits": 2, "kind": "kivi", "group_size": 32}, "kivi needs"),
        ({"bits": 2, "kind": "kivi", "group_size": 32, "residual_length": 48}, "kivi needs"),
        ({"bits": 4, "residual_length": 32}, "kv.residual_length=32 means nothing to kv.kind=per_token; it is for kivi"),
        ({"bits": 4, "kind": "kvquant", "group_size": 32}, "means nothing to kv.kind=kvquant"),
        ({"bits": 4, "kind": "kvquant", "outliers": 0.5}, "a share from 0 to below 0.5"),
        ({"bits": 4, "kind": "kvquant", "codebook": "nf"}, "choose uniform or nuq"),
        ({"bits": 4, "kind": "kvquant", "fisher": True}, "kv.codebook=uniform has none"),
        ({"bits": 4, "fisher": True}, "means nothing to kv.kind=per_token"),
    ],
)
def test_wrong_schemes_say_what_is_allowed(params: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        KVScheme(**params)


def test_labels_say_how_the_cache_was_read() -> None:
    assert kv_rules.label(KVScheme(4)) == "KV cache simulated in the single forward pass"
    assert "teacher-forced decoding" in kv_rules.label(KVScheme(4, mode="decode"))
    assert "as old as decoding would show" in kv_rules.label(KIVI)
    assert kv_runs.through_cache(KIVI)
    assert not kv_runs.through_cache(KVScheme(4))
    assert set(SEPARATE_ROTARY_KEYS) <= {f.partition("_")[0] for f in FAMILIES}
