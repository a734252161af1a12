"""Tiny random models from the real transformers classes, one per family, saved once per session with a tokenizer."""

from __future__ import annotations

import atexit
import string
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import torch

VOCAB = 96
BASE = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "initializer_range": 0.2}
LLAMA = {
    **BASE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama_mha": ("LlamaConfig", {**LLAMA, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {**LLAMA, "num_key_value_heads": 2, "sliding_window": 8}),
    "qwen2": (
        "Qwen2Config",
        {**LLAMA, "num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "gemma": ("GemmaConfig", {**LLAMA, "num_key_value_heads": 1, "head_dim": 16}),
    "mixtral": ("MixtralConfig", {**LLAMA, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "opt": (
        "OPTConfig",
        {
            **BASE,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 128,
            "init_std": 0.2,
            "pad_token_id": 1,
        },
    ),
    "gpt2": ("GPT2Config", {**BASE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("GPTNeoXConfig", {**LLAMA, "intermediate_size": 64}),
    "bloom": ("BloomConfig", {**BASE, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon_new": (
        "FalconConfig",
        {
            **BASE,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "bias": False,
        },
    ),
    "falcon_old": (
        "FalconConfig",
        {**BASE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True, "bias": False},
    ),
    "falcon_alibi": (
        "FalconConfig",
        {
            **BASE,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
            "bias": True,
        },
    ),
}
FAMILIES["rwkv"] = (
    "RwkvConfig",
    {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "attention_hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "rescale_every": 0,
    },
)
EXPERTS = {"mixtral": "eager"}
"""The library's default adds up in another order."""


def config_of(family: str, **changes: Any) -> Any:
    import transformers

    name, values = FAMILIES[family]
    return getattr(transformers, name)(**{**values, **changes})


def build(family: str, **changes: Any) -> Any:
    """A random model whose norms and biases are not trivial."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, family)))
        model = AutoModelForCausalLM.from_config(config_of(family, **changes), experts_implementation=EXPERTS.get(family))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "time_mix" in name:  # proportions, all alike at first
                    p.uniform_(0.1, 0.9)
                elif p.ndim == 1:
                    offset = 1.0 if ("norm" in name or "ln_" in name) and name.endswith("weight") and "gemma" not in family else 0.0
                    p.copy_(offset + 0.2 * torch.randn_like(p))
    return model.eval()


@cache
def tiny_model(family: str) -> Path:
    """Folder of the family's tiny model, in float32 safetensors, with a character tokenizer. Not to be changed."""
    folder = Path(mkdtemp(prefix=f"bitgrid-tiny-{family}-"))
    atexit.register(rmtree, folder, ignore_errors=True)
    build(family).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of single characters: token 0 and 1 are special, printable ASCII follows."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [c for c in string.printable if c.isprintable()][: VOCAB - 2]
    vocabulary = {"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(characters)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
