"""LLaMA and Mixtral checkpoints of random weights in the shapes of published models."""

from __future__ import annotations

import json
import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCABULARY = 32000
WEIGHT = 0.02
"""Standard deviation of weights."""
WRITERS = 4
TEXT = "text.jsonl"
"""Of calibration, in the folder of a model."""


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    documents: int | None = None
    """Of the shipped text; all where it is None."""
    experts: int = 0
    """Mixtral's, two of which each token gets; 0: LLaMA."""

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name in a decoder layer, as checkpoints have it ▸ rows and columns; routers among them."""
        h, i, kv = self.hidden, self.inner, self.hidden // self.heads * self.kv_heads
        attention = {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)}
        found = {f"self_attn.{k}": s for k, s in attention.items()}
        if not self.experts:
            return found | {f"mlp.{k}": s for k, s in {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}.items()}
        each = {"w1": (i, h), "w3": (i, h), "w2": (h, i)}
        moe = {"gate": (self.experts, h)} | {f"experts.{e}.{k}": s for e in range(self.experts) for k, s in each.items()}
        return found | {f"block_sparse_moe.{k}": s for k, s in moe.items()}

    def bytes(self, layers: int) -> int:
        """Of all bfloat16 weights, but for norms."""
        return 2 * (layers * sum(n * k for n, k in self.linears().values()) + 2 * VOCABULARY * self.hidden)

    def embedding(self, layers: int) -> float:
        """Standard deviation of embeddings: about four times that of all that blocks add to them. Where blocks outweigh what enters them,
        each amplifies the roundings of those before it: of 32 a packed model's logits in bfloat16 would be 8 % from the simulated ones,
        which `measure` refuses, where those of a trained model of 6 blocks are 0.4 %; and a router of random weights would choose anew."""
        inner = 0.4 * WEIGHT**2 * self.hidden  # of silu(x) y, for normal x and y; 0.4: near 1, by trying
        return max(WEIGHT, 4 * math.sqrt(layers * self.inner) * WEIGHT * inner)

    def config(self, layers: int) -> dict[str, Any]:
        kind: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        if self.experts:
            kind = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
            kind |= {"num_local_experts": self.experts, "num_experts_per_tok": 2, "sliding_window": None}
        return kind | {
            "vocab_size": VOCABULARY, "dtype": "bfloat16", "hidden_act": "silu", "hidden_size": self.hidden,
            "intermediate_size": self.inner, "num_hidden_layers": layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip


SHAPES = {
    "dry": Shape(128, 128, 1, 2, 1, 12),
    "dry_experts": Shape(128, 128, 2, 2, 1, 12, 4),
    "tiny": Shape(256, 768, 4, 4, 4),
    "7b": Shape(4096, 11008, 32, 32, 32),
    "13b": Shape(5120, 13824, 40, 40, 40),
    "70b": Shape(8192, 28672, 80, 64, 8),
    "8x7b": Shape(4096, 14336, 32, 32, 8, experts=8),
}


def make_model(folder: Path, shape: Shape, layers: int, device: str, files_of: int | None = None) -> None:
    """A checkpoint of bfloat16 weights drawn from N(0, WEIGHT²), but for embeddings, one file a layer, with the shipped model's tokenizer
    and text. files_of: layers that have a file; all when left out."""
    shipped = files("workers.assets") / "wikitext_llama"
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((shipped / name).read_bytes())
    documents = (files("workers.assets") / "self_text" / "calibration.jsonl").read_text().splitlines(keepends=True)
    (folder / TEXT).write_text("".join(documents[: shape.documents]))
    (folder / "config.json").write_text(json.dumps(shape.config(layers)))
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int, deviation: float | None = None) -> torch.Tensor:
        return (torch.randn(size, generator=g, device=device, dtype=torch.float32) * (deviation or WEIGHT)).to(torch.bfloat16).cpu()

    where: dict[str, str] = {}
    writing: list[Future[None]] = []

    def save(tensors: dict[str, torch.Tensor], name: str) -> None:
        """By a thread: one writes much slower than a disk does. As many tensors as files being written are in memory."""
        if len(writing) == WRITERS:
            writing.pop(0).result()
        writing.append(pool.submit(save_file, tensors, folder / name, metadata={"format": "pt"}))
        where.update(dict.fromkeys(tensors, name))

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    outer = {"model.embed_tokens.weight": normal(VOCABULARY, shape.hidden, deviation=shape.embedding(layers))}
    outer |= {"lm_head.weight": normal(VOCABULARY, shape.hidden)}
    with ThreadPoolExecutor(WRITERS) as pool:
        save({**outer, "model.norm.weight": ones}, "outer.safetensors")
        for n in range(layers if files_of is None else files_of):
            at = f"model.layers.{n}."
            norms = {f"{at}{k}.weight": ones.clone() for k in ("input_layernorm", "post_attention_layernorm")}
            save({f"{at}{k}.weight": normal(*s) for k, s in shape.linears().items()} | norms, f"layer_{n:03d}.safetensors")
        for file in writing:
            file.result()
    total = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
