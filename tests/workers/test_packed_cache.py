"""Decoding on a cache as it is stored: the logits of the simulated cache, which is decoded into values that attention reads.

Tolerances. In float32 the reference differs from the model's attention by the order of sums of some hundred values, a few times 2^-24 of
each; two blocks, so that 1e-5 of the norm is far above. Triton's kernel rounds q · step and p · step to float16: 4 · 2^-11 of an output
(tests/quant/test_kv_attention), twice, and what a block makes of it.
"""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quant.kernels import kernel
from quant.kernels.kv_attention import GROUPS, WIDTHS
from quant.kernels.kv_attention.per_token import MOST_GROUPS
from quant.kernels.on_triton import interpreted, unavailable
from quant.scheme import KVScheme
from tests.tiny_models import tiny_model
from tests.workers.fake_devices import fake_capture
from tests.workers.stage_runs import tiny_context
from workers import generation, kv_rules, packed_cache
from workers.alike import TOLERANCE
from workers.errors import InputError, NumericalError
from workers.generation import Eager, Graphed, generate
from workers.kv_runs import empty_caches
from workers.packed_cache import PackedCaches
from workers.specs import Workload
from workers.steps import set_key_rotation

CPU = torch.device("cpu")
PROMPT, STEPS = 20, 13
"""With groups and a window of 16, keys age twice and values at every step."""
SHORT = Workload(prompt=PROMPT, tokens=2)
KIVI = KVScheme(2, kind="kivi", group_size=16, residual_length=16)
KV4 = KVScheme(4)
"""Per token and head."""


@pytest.fixture(scope="module")
def gemma() -> Any:
    """Four query heads of 16 channels on one of keys and values."""
    return AutoModelForCausalLM.from_pretrained(tiny_model("gemma")).eval()


def tokens(count: int) -> torch.Tensor:
    return torch.randint(2, 90, (2, count), generator=torch.Generator().manual_seed(0))


def distance(model: Any, kv: KVScheme, backend: str, tmp_path: Path, steps: int = STEPS, read: KVScheme | None = None) -> float:
    """Of the packed cache's logits to the simulated one's, relative. read: another scheme for the packed cache."""
    want = generate(Eager(model, empty_caches(model, kv, tiny_context("gemma", tmp_path))), tokens(PROMPT), steps)
    caches = PackedCaches(model, read or kv, Workload(prompt=PROMPT, tokens=steps, backend=backend), CPU)
    with caches.attached():
        got = generate(Eager(model, caches), tokens(PROMPT), steps, want.tokens)
    assert 0 < caches.bytes
    return float((got.logits - want.logits).norm() / want.logits.norm())


@pytest.mark.parametrize("values", [2, 8])
def test_logits_are_those_of_the_simulated_cache(values: int, gemma: Any, tmp_path: Path) -> None:
    kv = KVScheme(4, kind="kivi", group_size=16, residual_length=16, value_bits=values)
    assert distance(gemma, kv, "auto", tmp_path) <= 1e-5


@pytest.mark.parametrize("kv", [KV4, KVScheme(3, True, 16, clip=0.9)])
def test_ranges_per_token_too(kv: KVScheme, gemma: Any, tmp_path: Path) -> None:
    """The prompt reads itself rounded, and every step its own token."""
    assert distance(gemma, kv, "auto", tmp_path, steps=3) <= 1e-5


def test_keys_are_mixed_as_the_method_says(tmp_path: Path) -> None:
    """Before they are rounded, which makes other codes; stored keys stay mixed, and queries are mixed instead."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model("gemma")).eval()
    plain = generate(Eager(model, empty_caches(model, KV4, tiny_context("gemma", tmp_path))), tokens(PROMPT), 2)
    for layer in model.model.layers:
        set_key_rotation(layer.self_attn, 8)
    assert distance(model, KV4, "auto", tmp_path, steps=2) <= 1e-5
    caches = PackedCaches(model, KV4, SHORT, CPU)
    with caches.attached():
        mixed = generate(Eager(model, caches), tokens(PROMPT), 2, plain.tokens)
    assert (mixed.logits - plain.logits).norm() > 1e-3 * plain.logits.norm()


@pytest.mark.parametrize("kv", [KIVI, KV4])
def test_replayed_steps_read_what_was_appended_since(kv: KVScheme, gemma: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice in one memory, through a step in which KIVI's keys age: that one is not replayed."""
    monkeypatch.setattr(generation, "captured", fake_capture)
    want = generate(Eager(gemma, empty_caches(gemma, kv, tiny_context("gemma", tmp_path))), tokens(PROMPT), STEPS)
    caches = PackedCaches(gemma, kv, Workload(prompt=PROMPT, tokens=STEPS), CPU)
    with caches.attached():
        graphed = Graphed(gemma, tokens(PROMPT), STEPS, caches())
        for _ in range(2):
            got = generate(graphed, tokens(PROMPT), STEPS, want.tokens)
            assert (got.logits - want.logits).norm() <= 1e-5 * want.logits.norm()


@pytest.mark.parametrize("kv", [KIVI, KV4])
def test_such_a_step_can_be_captured(kv: KVScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device no value can be read."""
    monkeypatch.setattr(generation, "captured", lambda step, device: (step, step()))
    model, prompt = AutoModelForCausalLM.from_pretrained(tiny_model("gemma")).eval().to("meta"), tokens(PROMPT).to("meta")
    caches = PackedCaches(model, kv, SHORT, prompt.device)
    with caches.attached():
        Graphed(model, prompt, 2, caches())


def test_another_cache_is_found_out(gemma: Any, tmp_path: Path) -> None:
    """By far more than the tolerance: one bit of the values, or a window of another length."""
    for other in (KVScheme(3, kind="kivi", group_size=16, residual_length=16), KVScheme(2, kind="kivi", group_size=16, residual_length=32)):
        assert distance(gemma, KIVI, "auto", tmp_path, read=other) > 1e-3


@pytest.mark.skipif(unavailable(CPU) is not None or not interpreted(), reason="Triton's interpreter is not on (TRITON_INTERPRET=1)")
def test_a_fast_kernel_reads_it_too(gemma: Any, tmp_path: Path) -> None:
    assert distance(gemma, KIVI, "triton", tmp_path, steps=1) <= 1e-2


def test_attention_is_the_models_own_afterwards(gemma: Any) -> None:
    before, own = gemma.config._attn_implementation, generate(Eager(gemma), tokens(PROMPT), 2)
    caches = PackedCaches(gemma, KIVI, SHORT, CPU)
    with caches.attached():
        generate(Eager(gemma, caches), tokens(PROMPT), 2)
    assert gemma.config._attn_implementation == before
    assert torch.equal(generate(Eager(gemma), tokens(PROMPT), 2).logits, own.logits)


def test_planning_knows_what_the_kernel_takes() -> None:
    assert (kv_rules.PACKED_WIDTHS, kv_rules.PACKED_GROUPS, kv_rules.MOST_GROUPS) == (WIDTHS, GROUPS, MOST_GROUPS)


CONFIG = {"model_type": "llama", "hidden_size": 512, "num_attention_heads": 8}
G64 = KVScheme(4, kind="kivi", group_size=64, residual_length=64)


@pytest.mark.parametrize(
    ("kv", "config", "reason"),
    [
        (G64, CONFIG, None),
        (G64, {}, None),
        (G64, {**CONFIG, "model_type": "mistral", "sliding_window": 160}, None),
        (KV4, CONFIG, None),
        (KVScheme(3, True, 64), {**CONFIG, "hidden_size": 1024}, None),
        (KVScheme(4, group_size=8), CONFIG, "groups of 16, 32, 64, 128, 256 for kv.kind=per_token"),
        (KV4, {**CONFIG, "hidden_size": 640}, "heads of 80 channels in groups of 80"),
        (KVScheme(4, group_size=16), {**CONFIG, "head_dim": 256}, "at most 8 groups to a head, here of 256"),
        (KVScheme(4, kind="kvquant"), CONFIG, "lacks a rotary embedding of keys .*; calibrated ranges"),
        (KVScheme(4, kind="kvquant", codebook="nuq", outliers=0.01), CONFIG, "kv.codebook=nuq.*kv.outliers=0.01"),
        (KVScheme(4, kind="kvquant", first_few_fp16=1), CONFIG, "kv.first_few_fp16=1"),
        (KVScheme(4, kind="kivi", group_size=8, residual_length=64), CONFIG, "groups of 16, 32, 64, 128"),
        (G64, {**CONFIG, "hidden_size": 256}, "heads of 32 channels in groups of 64"),
        (G64, {**CONFIG, "hidden_size": 640}, "heads of 80 channels"),
        (G64, {**CONFIG, "model_type": "bloom"}, "a bloom model"),
        (G64, {**CONFIG, "model_type": "mistral", "sliding_window": 159}, "sees 159 tokens at most"),
    ],
)
def test_what_no_kernel_reads_is_refused_with_a_reason(kv: KVScheme, config: dict[str, Any], reason: str | None) -> None:
    found = kv_rules.not_packed(kv, config, 160)
    assert (found is None) if reason is None else (found is not None and re.search(reason, found) is not None)


@pytest.mark.parametrize("family", kv_rules.PACKED_FAMILIES)
@pytest.mark.parametrize(
    "more", [{}, {"sliding_window": 512}, {"use_sliding_window": True}, {"use_sliding_window": False, "sliding_window": 512}]
)
def test_what_a_config_leaves_out_is_as_transformers_has_it(family: str, more: dict[str, Any]) -> None:
    """Planning reads config.json, a worker the configuration that transformers makes of it."""
    written = {"hidden_size": 3072, "num_attention_heads": 48, **more}
    made = AutoConfig.for_model(family, **written).to_dict()
    assert kv_rules.head_width({"model_type": family, **written}) == kv_rules.head_width(made)
    for length in (500, 4000, 5000):
        assert kv_rules.not_packed(G64, {"model_type": family, **written}, length) == kv_rules.not_packed(G64, made, length)


def test_a_worker_refuses_too(gemma: Any) -> None:
    with pytest.raises(InputError, match=r"kv\.kind=kvquant: to read its cache"):
        PackedCaches(gemma, KVScheme(4, kind="kvquant"), SHORT, CPU)


@pytest.mark.gpu("triton")
@pytest.mark.parametrize("kv", [KIVI, KV4])
def test_graphs_of_a_gpu(kv: KVScheme) -> None:
    """Replayed and launched steps run the same kernels: what differs is where they find their places."""
    model, prompt = AutoModelForCausalLM.from_pretrained(tiny_model("gemma")).eval().cuda(), tokens(PROMPT).cuda()
    caches = PackedCaches(model, kv, Workload(prompt=PROMPT, tokens=STEPS), prompt.device)
    with caches.attached():
        want = generate(Eager(model, caches), prompt, STEPS)
        graphed = Graphed(model, prompt, STEPS, caches())
        for _ in range(2):
            got = generate(graphed, prompt, STEPS, want.tokens)
            assert (got.logits - want.logits).norm() <= 1e-5 * want.logits.norm()


def test_caches_that_decoding_fills_need_no_single_pass(tmp_path: Path) -> None:
    """A measurement decodes, and its scheme has the mode's default: families that KIVI's single pass refuses are timed."""
    gpt2 = AutoModelForCausalLM.from_pretrained(tiny_model("gpt2")).eval()
    kv = KVScheme(2, kind="kivi", group_size=8, residual_length=16)
    steps = generate(Eager(gpt2, empty_caches(gpt2, kv, tiny_context("gpt2", tmp_path))), tokens(PROMPT), 2)
    assert torch.isfinite(steps.logits).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv", [KIVI, KV4, KVScheme(2)])
def test_wrong_attention_is_found_out(kv: KVScheme, dtype: torch.dtype, gemma: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the step in which it is wrong, whatever rounding the cache does to logits; a mixed key is compared with a mixed one."""
    model = deepcopy(gemma).to(dtype)
    for layer in model.model.layers:
        set_key_rotation(layer.self_attn, 0 if kv is KIVI else 16)

    def checked() -> float:
        caches = PackedCaches(model, kv, Workload(prompt=PROMPT, tokens=STEPS, backend="reference"), CPU)
        with caches.attached():
            with caches.checking():
                generate(Eager(model, caches), tokens(PROMPT), STEPS)
            assert all(layer.beside is None for layer in caches.last)
            generate(Eager(model, caches), tokens(PROMPT), 1)
        assert not caches.unchecked
        return caches.error

    assert 0 < checked() <= TOLERANCE[dtype]
    run = kernel("kv_attention", "reference").run
    before = run.kv_attention
    for wrong in (
        lambda q, held, scale: before(q, held, scale) * 1.01,
        lambda q, held, scale: before(q, held, scale).flip(1).contiguous(),
        lambda q, held, scale: before(q * 1.5, held, scale),
        lambda q, held, scale: before(q, replace(held, counts=held.counts - torch.tensor([0, 0, 1], dtype=torch.int32)), scale),
    ):
        monkeypatch.setattr(run, "kv_attention", wrong)
        with pytest.raises(NumericalError, match=r"attention to the packed cache of 21 tokens differs .* use workload.backend=reference"):
            checked()


def test_as_many_blocks_are_compared_as_memory_holds(gemma: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a simulated cache in float32, of one sequence, beside each cache that is made: where logits are compared again there are more."""
    layers, heads, width = len(gemma.model.layers), gemma.config.num_key_value_heads, gemma.config.head_dim
    block = 2 * 2 * 4 * heads * width * generation.room(PROMPT, STEPS)
    for held in range(layers + 1):
        monkeypatch.setattr(packed_cache, "free_bytes", lambda device, held=held: 4 * held * block)
        caches = PackedCaches(gemma, KIVI, Workload(prompt=PROMPT, tokens=STEPS, backend="reference"), CPU)
        with caches.attached(), caches.checking():
            for _ in range(2):
                generate(Eager(gemma, caches), tokens(PROMPT), STEPS)
        assert caches.unchecked == layers - held
        assert (caches.error > 0) is (held > 0)
