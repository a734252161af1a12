"""A real model with outliers planted where one wants them, that computes exactly what it computed before.

Channels are scaled by powers of two between an operation and what reads its output: every product keeps its bits, so the unquantized
function is bit-identical, and any change that a quantized variant shows comes from quantization. Llama families only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONSUMERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass
class Planted:
    """The tensors of a Llama checkpoint, float32, and its configuration; changed in place."""

    tensors: dict[str, Tensor]
    config: dict[str, int]

    @staticmethod
    def of(folder: Path) -> Planted:
        tensors = {k: t.float() for f in folder.glob("*.safetensors") for k, t in load_file(f).items()}
        return Planted(tensors, json.loads((folder / "config.json").read_text()))

    @property
    def blocks(self) -> int:
        return self.config["num_hidden_layers"]

    @property
    def head_width(self) -> int:
        return self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]

    def activations(self, channels: Iterable[int], power: int) -> None:
        """Both norms put out 2^power times as much on these channels; what reads them takes it back."""
        for b in range(self.blocks):
            for norm, consumers in CONSUMERS.items():
                for c in channels:
                    self._of(b, norm)[c] *= 2.0**power
                    for name in consumers:
                        self._of(b, name)[:, c] *= 2.0**-power

    def inner(self, channels: Iterable[int], power: int) -> None:
        """The input of down_proj is 2^power times as large on these channels."""
        for b in range(self.blocks):
            for c in channels:
                self._of(b, "mlp.up_proj")[c] *= 2.0**power
                self._of(b, "mlp.down_proj")[:, c] *= 2.0**-power

    def values(self, channels: Iterable[int], power: int) -> None:
        """Channels of every key-value head's values; the columns of all query heads that share it take it back."""
        width, shared = self.head_width, self.config["num_attention_heads"] // self.config["num_key_value_heads"]
        for b in range(self.blocks):
            for head in range(self.config["num_key_value_heads"]):
                for c in channels:
                    self._of(b, "self_attn.v_proj")[head * width + c] *= 2.0**power
                    for query in range(head * shared, (head + 1) * shared):
                        self._of(b, "self_attn.o_proj")[:, query * width + c] *= 2.0**-power

    def keys(self, channels: Iterable[int], power: int) -> None:
        """Channels below half a head, with their rotary partners: keys grow, the queries that meet them shrink."""
        width, shared = self.head_width, self.config["num_attention_heads"] // self.config["num_key_value_heads"]
        for b in range(self.blocks):
            for head in range(self.config["num_key_value_heads"]):
                for c in (x for channel in channels for x in (channel, channel + width // 2)):
                    self._of(b, "self_attn.k_proj")[head * width + c] *= 2.0**power
                    for query in range(head * shared, (head + 1) * shared):
                        self._of(b, "self_attn.q_proj")[query * width + c] *= 2.0**-power

    def save(self, like: Path, folder: Path) -> Path:
        """A checkpoint folder with the other files of `like`."""
        shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        (folder / "config.json").write_text(json.dumps({**self.config, "dtype": "float32", "torch_dtype": "float32"}))
        save_file({k: t.contiguous() for k, t in self.tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        return folder

    def _of(self, block: int, name: str) -> Tensor:
        return self.tensors[f"model.layers.{block}.{name}.weight"]


def logits(folder: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out: Tensor = model(tokens, use_cache=False).logits
    return out
