"""What a worker keeps: loads are counted, the least recently used variant goes, run-time parts never stay attached."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.scheme import ActivationScheme, KVScheme
from tests.workers.fake_models import CountingBuilder, bare_context
from tests.workers.stage_runs import tiny_context
from workers import rebuild
from workers.context import Context
from workers.residency import Residency
from workers.specs import ModelSpec, TextSpec

M = ModelSpec("m")


def test_unquantized_model_is_loaded_once_per_content_and_dtype() -> None:
    builder = CountingBuilder()
    residency = Residency(builder)
    context = bare_context()
    first = residency.unquantized(context, M)
    assert residency.unquantized(context, M) is first
    assert builder.loaded == ["m"]
    residency.unquantized(context, ModelSpec("m", "bfloat16"))
    assert builder.loaded == ["m", "m"]
    assert "load" in context.seconds


def test_streamed_and_whole_models_are_not_confused() -> None:
    builder = CountingBuilder()
    residency = Residency(builder)
    residency.unquantized(bare_context(), M)
    residency.unquantized(bare_context(streamed=True), M)
    assert builder.loaded == ["m", "m"]


@pytest.mark.parametrize(("kept", "rebuilt"), [(1, ["a", "b", "a"]), (2, ["a", "b"])])
def test_variants_are_kept_up_to_the_hint(kept: int, rebuilt: list[str]) -> None:
    builder = CountingBuilder()
    residency = Residency(builder)
    context = bare_context(quantized_cache=kept)
    for key in ("a", "a", "b", "a"):
        residency.variant(context, M, Path("objects") / key)
    assert builder.rebuilt == rebuilt


def test_least_recently_used_variant_goes_first() -> None:
    residency = Residency(CountingBuilder())
    context = bare_context(quantized_cache=2)
    for key in ("a", "b", "a", "c"):
        residency.variant(context, M, Path(key))
    assert residency.holds() == ["a", "c"]


def test_holds_names_the_model_and_its_variants_and_another_model_clears_all() -> None:
    residency = Residency(CountingBuilder())
    context = bare_context()
    assert residency.holds() == []
    residency.unquantized(context, M)
    residency.variant(context, M, Path("a"))
    assert residency.holds() == ["m", "a"]
    residency.unquantized(context, ModelSpec("other"))
    assert residency.holds() == ["other"]
    residency.variant(context, M, Path("a"))
    assert residency.holds() == ["a"]
    residency.clear()
    assert residency.holds() == []


def test_variants_alone_do_not_stay_beside_another_model() -> None:
    residency = Residency(CountingBuilder())
    context, other = bare_context(quantized_cache=2), ModelSpec("other")
    residency.variant(context, M, Path("a"))
    residency.unquantized(context, other)
    assert residency.holds() == ["other"]
    residency.variant(context, other, Path("b"))
    residency.variant(context, M, Path("a"))
    assert residency.holds() == ["a"]


@pytest.mark.parametrize(("activation", "kv"), [(ActivationScheme(8), None), (None, KVScheme(4))])
def test_runtime_parts_are_removed_even_when_the_evaluation_fails(activation: ActivationScheme | None, kv: KVScheme | None) -> None:
    residency = Residency(CountingBuilder())
    model = residency.unquantized(bare_context(), M)

    def evaluate() -> None:
        with residency.runtime(model, None, activation, kv):
            assert model.noise == 0.5
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        evaluate()
    assert model.noise == 0.0
    with residency.runtime(model, None, None, None):
        assert model.noise == 0.0


def test_texts_are_tokenized_once(tmp_path: Path) -> None:
    residency = Residency(CountingBuilder())
    context = tiny_context("llama", tmp_path)
    text = TextSpec("text", join="")
    first = residency.text(context, ModelSpec("model"), text)
    Path(context.texts["text"].path).write_text("changed\n")
    assert residency.text(context, ModelSpec("model"), text) is first
    assert len(first.tokens) == 60 * 80
    assert json.dumps(sorted(context.seconds)) == '["tokenize"]'
    # A text is read before its model is, and outlasts the other model that this one takes the place of.
    residency.unquantized(context, ModelSpec("other"))
    residency.variant(context, ModelSpec("model"), Path("a"))
    assert residency.text(context, ModelSpec("model"), text) is first


@pytest.mark.parametrize("streamed", [False, True])
def test_a_model_that_is_let_go_is_freed_at_once(streamed: bool, tmp_path: Path) -> None:
    """Or its embeddings would count as memory of the stage that comes next."""
    residency = Residency()
    model = residency.unquantized(tiny_context("llama", tmp_path, streamed=streamed), ModelSpec("model"))
    weight = weakref.ref(model.get_input_embeddings().weight)  # type: ignore[operator]
    del model
    gc.disable()
    try:
        residency.clear()
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("of_variants", [False, True])
def test_a_model_is_freed_before_the_one_in_its_place_is_made(streamed: bool, of_variants: bool, tmp_path: Path) -> None:
    """Or both would be on the device while it is read."""
    contexts = [tiny_context("llama", tmp_path, streamed=streamed, memory_bytes=m) for m in (None, 10**9)]
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    class Builder(CountingBuilder):
        def load_model(self, context: Context, model: ModelSpec) -> torch.nn.Module:
            alive.append(sum(weight() is not None for weight in held))
            made: Any = rebuild.load_model(context, model)
            held.append(weakref.ref(made.get_input_embeddings().weight))
            return made

        def rebuild(self, context: Context, model: ModelSpec, artifact: Path) -> torch.nn.Module:
            return self.load_model(context, model)

    residency = Residency(Builder())
    gc.disable()
    try:
        for i, context in enumerate(contexts):
            if of_variants:
                residency.variant(context, ModelSpec("model"), Path(str(i)))
            else:
                residency.unquantized(context, ModelSpec("model"))
    finally:
        gc.enable()
    assert alive == [0, 0]
