"""config.json and tokenizer files that transformers 4.44 and transformers 5 both read. Standard library only.

transformers 5 writes `rope_parameters` and `dtype`, which 4.44 ignores in favour of its defaults (a rope theta of 10000,
float32): a checkpoint written by the one and read by the other is silently wrong. So both spellings are written.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = "chat_template.jinja"
MORE_CHAT_TEMPLATES = "additional_chat_templates"
COPIED = (
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    CHAT_TEMPLATE,
    "chat_template.json",
)
"""Copied as they are; tokenizer.json and tokenizer_config.json are adapted."""

_ROPE_SCALING = {
    "llama": ("linear", "dynamic", "llama3"),
    "falcon": ("linear", "dynamic"),
    "gpt_neox": ("linear", "dynamic"),
}
"""Kinds of rope scaling that 4.44 reads, by family; the other families have none."""
_TWO_KEYS = ("falcon", "gpt_neox")
"""Families whose rope scaling 4.44 takes as a type and a factor, and with nothing else."""
_FIXED_HEAD_DIM = ("llama", "mixtral", "qwen2")
"""Families whose head size in 4.44 is always hidden_size / num_attention_heads."""


def unreadable_by_old(config: Mapping[str, Any]) -> str | None:
    """Why transformers 4.44 would misread the model of a config.json; None when it would not."""
    kind = config.get("model_type")
    rope = _rope(config)
    if rope and any(isinstance(v, Mapping) for v in rope.values()):
        return "rope parameters that differ between layers"
    scaling = rope.get("rope_type", "default")
    if scaling != "default" and scaling not in _ROPE_SCALING.get(str(kind), ()):
        return f"rope scaling {scaling!r}, which transformers 4.44 does not have for {kind}"
    head_dim, hidden, heads = (config.get(k) for k in ("head_dim", "hidden_size", "num_attention_heads"))
    if kind in _FIXED_HEAD_DIM and head_dim is not None and head_dim * heads != hidden:
        return f"head_dim {head_dim}: transformers 4.44 takes hidden_size / num_attention_heads = {hidden} / {heads} for {kind}"
    if kind == "qwen2" and config.get("use_sliding_window"):
        return "sliding-window attention, which transformers 4.44 leaves out for qwen2"
    window = config.get("sliding_window") if kind == "mixtral" else None
    if window is not None and window < config.get("max_position_embeddings", math.inf):
        return f"a window of {window} tokens for attention, which transformers 4.44 leaves out for mixtral"
    if kind == "gpt2" and (config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True)):
        return "scale_attn_by_inverse_layer_idx or scale_attn_weights, which transformers 4.44 ignores"
    if config.get("use_bidirectional_attention"):
        return "bidirectional attention, which transformers 4.44 does not have"
    return None


def with_both_spellings(config: Mapping[str, Any], dtype: str, *, tied: bool = True) -> dict[str, Any]:
    """A config.json's values with the keys of transformers 4.44 and of 5, for weights stored as `dtype`.

    tied: the head is the embedding. Where it is not, the config must not say so: 5 sees it by the tensors, 4.44 drops the head."""
    out = {**config, "dtype": dtype, "torch_dtype": dtype}
    if not tied:
        out["tie_word_embeddings"] = False
    if config.get("model_type") == "gemma":
        # transformers 5 takes the "gelu" of the first published files for the tanh form that was meant, and that is its default; 4.44
        # reads this key alone and takes it at its word.
        named = config.get("hidden_act") or "gelu"
        out["hidden_activation"] = "gelu_pytorch_tanh" if named == "gelu" else named
    rope = _rope(config)
    if not rope:
        return out
    out["rope_parameters"] = rope
    neox = config.get("model_type") == "gpt_neox"
    if "rope_theta" in rope:
        out["rotary_emb_base" if neox else "rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        out["rotary_pct" if neox else "partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        out["rope_scaling"] = None
    elif config.get("model_type") in _TWO_KEYS and kind in ("linear", "dynamic"):
        out["rope_scaling"] = {"type": kind, "factor": float(scaling["factor"])}
    else:
        out["rope_scaling"] = scaling  # whole: transformers 5 reads it before rope_parameters
    return out


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope parameters as transformers 5 spells them; empty where the config leaves them at the family's defaults."""
    if config.get("rope_parameters"):
        return dict(config["rope_parameters"])
    out: dict[str, Any] = {}
    neox = config.get("model_type") == "gpt_neox"  # transformers reads these of its names alone
    theta = config.get("rotary_emb_base" if neox else "rope_theta")
    partial = config.get("rotary_pct" if neox else "partial_rotary_factor")
    scaling = dict(config.get("rope_scaling") or {})
    if theta is not None:
        out["rope_theta"] = float(theta)
    if partial is not None:
        out["partial_rotary_factor"] = partial
    if scaling:
        kind = scaling.pop("type", None)
        out.update({"rope_type": scaling.pop("rope_type", kind), **scaling})
    elif out:
        out["rope_type"] = "default"
    return out


def copy_tokenizer(model_folder: Path, out: Path) -> list[str]:
    """Write the tokenizer files of a model into `out` so that both versions read them; returns what could not be adapted."""
    notes = []
    for name in COPIED:
        if (model_folder / name).is_file():
            shutil.copyfile(model_folder / name, out / name)
    if (model_folder / "tokenizer.json").is_file():
        tokenizer = json.loads((model_folder / "tokenizer.json").read_text(encoding="utf-8"))
        merges = tokenizer.get("model", {}).get("merges")
        if merges and not isinstance(merges[0], str):
            # tokenizers before 0.20 read merges as "a b" only, which cannot hold a token with a space.
            if any(" " in token for pair in merges for token in pair):
                notes.append("tokenizer.json has merges of tokens with spaces; tokenizers before 0.20 cannot read it")
            else:
                tokenizer["model"]["merges"] = [" ".join(pair) for pair in merges]
        (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")
    if (model_folder / "tokenizer_config.json").is_file():
        config = json.loads((model_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        templates = _chat_templates(model_folder)
        if templates:
            # 4.44 reads them here alone; 5 reads them here where there is no file, and with the file that file alone.
            config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
            if len(templates) == 1:
                config["chat_template"] = templates["default"]
            else:
                (out / CHAT_TEMPLATE).unlink(missing_ok=True)
        (out / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")
    return notes


def _chat_templates(model_folder: Path) -> dict[str, str]:
    """Name ▸ text of the templates that transformers 5 keeps in files of their own; empty without the default one."""
    files = {"default": model_folder / CHAT_TEMPLATE} if (model_folder / CHAT_TEMPLATE).is_file() else {}
    if files:
        files.update({p.stem: p for p in sorted((model_folder / MORE_CHAT_TEMPLATES).glob("*.jinja"))})
    return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
