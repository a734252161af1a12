"""Where a rotation of the residual stream enters and leaves a model, by family. Standard library only; planning reads it too.

A rotation R of the hidden states h ▸ h R leaves a pre-norm decoder's function as it is, once every norm is x / rms(x) without
scale, embeddings and linears that write to the stream are followed by R, and linears that read it by its transpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.errors import UnsupportedModel
from workers.families import structure

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Rotatable:
    """Names inside a block are relative to it; all others are module paths."""

    embeddings: tuple[str, ...]
    """Modules whose rows start the residual stream."""
    head: str
    final_norm: str
    readers: tuple[tuple[str, tuple[str, ...]], ...]
    """(norm, linears that read its output), of every block."""
    writers: tuple[str, ...]
    """Linears whose output is added to the stream."""
    value: str
    output: str
    """Linear that reads the attended values."""
    down: str
    """Second linear of the feed-forward module."""
    centred: bool
    """Norms are LayerNorms: the stream's mean over channels is taken off everything that writes to it."""
    hidden: int
    inner: int
    heads: int
    head_dim: int


def rotatable(config: Config) -> Rotatable:
    """Raises UnsupportedModel with the reason for a family, or a variant of one, whose stream cannot be rotated."""
    s = structure(config)
    if s.model_type in ("llama", "mistral", "qwen2"):
        return _llama_like(config)
    if s.model_type == "opt":
        return _opt(config)
    why = REFUSED.get(s.model_type, "its residual stream is not in bitgrid's table of rotations")
    raise UnsupportedModel(f"model_type {s.model_type!r} cannot be rotated: {why}; rotated are {', '.join(FAMILIES)}")


def recollects(sites: Rotatable, needs: frozenset[str], maps: frozenset[str]) -> str | None:
    """Why statistics `needs` of the unrotated model do not give those of the rotated one; None where they do."""
    if needs - maps:
        return f"{', '.join(sorted(needs - maps))} cannot be had from the unrotated model's"
    if needs and sites.centred:
        return "LayerNorms have biases, which the statistics of their outputs contain"
    return None


FAMILIES = ("llama", "mistral", "qwen2", "opt")
REFUSED = {
    "gemma": "its embeddings are scaled and its norms multiply by 1 + weight",
    "mixtral": "its router reads the stream and its experts share no module that could rotate their inputs at run time",
    "gpt2": "its qkv is fused and stored transposed",
    "gpt_neox": "its qkv is fused, head by head",
    "bloom": "its qkv is fused, and a norm follows the embedding",
    "falcon": "its qkv is fused, and one norm may feed attention and feed-forward",
}


def _llama_like(config: Config) -> Rotatable:
    return _of_four_sites(
        config,
        embeddings=("model.embed_tokens",),
        final_norm="model.norm",
        norms=("input_layernorm", "post_attention_layernorm"),
        centred=False,
    )


def _opt(config: Config) -> Rotatable:
    reason = None
    if not config.get("do_layer_norm_before", True):
        reason = "its norms come after the residual sum, so no linear could undo the rotation of the stream"
    elif config.get("_remove_final_layer_norm", False):
        reason = "it has no final norm, so its head reads the mean that centring takes off"
    elif int(config.get("word_embed_proj_dim") or config["hidden_size"]) != int(config["hidden_size"]):
        reason = "its embeddings have another width than its blocks"
    if reason is not None:
        raise UnsupportedModel(f"this opt model cannot be rotated: {reason}")
    return _of_four_sites(
        config,
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        final_norm="model.decoder.final_layer_norm",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        centred=True,
    )


def _of_four_sites(config: Config, *, embeddings: tuple[str, ...], final_norm: str, norms: tuple[str, str], centred: bool) -> Rotatable:
    """Blocks of query, key and value, output, up (and gate), and down. norms: before attention, and before the feed-forward module."""
    attention, output, up, down = structure(config).sites
    heads = int(config["num_attention_heads"])
    return Rotatable(
        embeddings=embeddings,
        head="lm_head",
        final_norm=final_norm,
        readers=((norms[0], attention.linears), (norms[1], up.linears)),
        writers=(output.linears[0], down.linears[0]),
        value=attention.linears[2],
        output=output.linears[0],
        down=down.linears[0],
        centred=centred,
        hidden=attention.cols,
        inner=down.cols,
        heads=heads,
        head_dim=output.cols // heads,
    )
