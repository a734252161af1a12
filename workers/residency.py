"""What a worker process keeps between stages: the unquantized model, a few rebuilt variants, and tokenized texts.

One model is loaded at a time (the latest digest, dtype and device); variants are kept up to `hints.quantized_cache`, least
recently used first out. Run-time parts (activation and KV fake quantization) are attached for one evaluation and removed.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import nn

from quant.scheme import ActivationScheme, KVScheme
from workers import rebuild
from workers.context import Context
from workers.datasets import TokenizedText, Tokenizer, load_documents, load_tokenizer, tokenize_documents
from workers.specs import ModelSpec, TextSpec
from workers.stream import streams

TEXTS = 4
"""Tokenized texts kept."""


class Handle(Protocol):
    def remove(self) -> None: ...


class Builder(Protocol):
    """What makes models; `workers.rebuild` is one."""

    def load_model(self, context: Context, model: ModelSpec) -> nn.Module: ...

    def rebuild(self, context: Context, model: ModelSpec, artifact: Path) -> nn.Module: ...

    def attach_runtime(
        self, model: nn.Module, artifact: Path | None, activation: ActivationScheme | None, kv: KVScheme | None
    ) -> Handle: ...


class Key(NamedTuple):
    content: str
    """Digest of the model, or key of the variant's artifact."""
    dtype: str
    device: str
    streamed: bool
    memory_bytes: int | None


def _key(content: str, model: ModelSpec, context: Context) -> Key:
    return Key(content, model.dtype, str(context.device), context.hints.streamed, context.hints.memory_bytes)


class Residency:
    """Keeps models by content, dtype, device and whether they are streamed from disk."""

    def __init__(self, builder: Builder = rebuild) -> None:
        self.builder = builder
        self._digest: str | None = None
        """Of the model that everything resident is of."""
        self._model: tuple[Key, nn.Module] | None = None
        self._variants: OrderedDict[Key, nn.Module] = OrderedDict()
        self._tokenizer: tuple[str, Tokenizer] | None = None
        self._texts: OrderedDict[tuple[str, TextSpec], TokenizedText] = OrderedDict()

    def holds(self) -> list[str]:
        """Digest of the unquantized model and keys of the variants that are resident."""
        return [key.content for key in ([self._model[0]] if self._model else []) + list(self._variants)]

    def clear(self) -> None:
        """Let go of everything, after an out-of-memory error."""
        self._tokenizer = None
        self._texts.clear()
        self._drop_models()

    def _drop_models(self) -> None:
        self._model = None
        self.drop_variants()

    def drop_variants(self) -> None:
        """Let go of quantized models."""
        self._variants.clear()
        gc.collect()  # see `_collect`; the unquantized model may have been let go, too
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def unquantized(self, context: Context, model: ModelSpec) -> nn.Module:
        """The model as published, in `model.dtype` on the context's device."""
        key = _key(model.digest, model, context)
        if self._model is None or self._model[0] != key:
            self._leave_other_models(model)
            held = [] if self._model is None else [self._model[1]]
            self._model = None
            _collect(held)
            with context.phase("load"):
                self._model = (key, self.builder.load_model(context, model).eval())
        return self._model[1]

    def variant(self, context: Context, model: ModelSpec, artifact: Path) -> nn.Module:
        """The model rebuilt from a quantize artifact (folder named by its key)."""
        key = _key(artifact.name, model, context)
        if key in self._variants:
            self._variants.move_to_end(key)
            return self._variants[key]
        self._leave_other_models(model)
        oldest = list(self._variants)[: max(0, len(self._variants) + 1 - max(1, context.hints.quantized_cache))]
        _collect([self._variants.pop(k) for k in oldest])
        with context.phase("rebuild"):
            self._variants[key] = self.builder.rebuild(context, model, artifact).eval()
        return self._variants[key]

    def _leave_other_models(self, model: ModelSpec) -> None:
        # Variants may be all that is held of another model. Texts are few and small, and this model's were read already.
        if self._digest != model.digest:
            self._drop_models()
            self._digest = model.digest

    @contextmanager
    def runtime(self, model: nn.Module, artifact: Path | None, activation: ActivationScheme | None, kv: KVScheme | None) -> Iterator[None]:
        """Activation and KV parts attached to a resident model inside the block."""
        if activation is None and kv is None:
            yield
            return
        handle = self.builder.attach_runtime(model, artifact, activation, kv)
        try:
            yield
        finally:
            handle.remove()

    def text(self, context: Context, model: ModelSpec, text: TextSpec) -> TokenizedText:
        """The text's documents joined and tokenized by the model's tokenizer."""
        key = (model.digest, text)
        if key not in self._texts:
            with context.phase("tokenize"):
                documents = load_documents(context.text_location(text), text)
                self._texts[key] = tokenize_documents(self._tokenizer_of(context, model), documents, text.join)
            if len(self._texts) > TEXTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(key)
        return self._texts[key]

    def _tokenizer_of(self, context: Context, model: ModelSpec) -> Tokenizer:
        if self._tokenizer is None or self._tokenizer[0] != model.digest:
            self._tokenizer = (model.digest, load_tokenizer(context.model_location(model)))
        return self._tokenizer[1]


def _collect(let_go: list[nn.Module]) -> None:
    """Free models that nothing else refers to. The hooks of a streamed one, which read its blocks, hold it until a collection."""
    streamed = any(map(streams, let_go))
    let_go.clear()
    if streamed:
        gc.collect()


_process: Residency | None = None


def process_residency() -> Residency:
    """The one residency of this process."""
    global _process
    if _process is None:
        _process = Residency()
    return _process
