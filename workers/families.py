"""Per-family structure of decoder models, read from config.json alone. Standard library only; the driver plans with it.

One table entry per family says where the decoder blocks are, which linears a block has in true-sequential order, which
of them read one input (a site), and which groups can be scaled: the operation that produces an input, its consumers, and
the modules whose output shows the effect (AWQ, arXiv 2306.00978; SmoothQuant, arXiv 2211.10438).
lm_head, embeddings and expert routers are not linears here.

Names are module paths. A fused qkv is one linear; expert e of a 3-D expert tensor is `<...>.experts.gate_up_proj.e`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from workers.errors import UnsupportedModel
from workers.structure import LinearShape, ScaleRule, Scores, Site, Structure

Config = Mapping[str, Any]

HEAD_WIDTHS = {"gemma": 256}
"""Family ▸ what transformers takes where config.json gives no `head_dim`; others divide the hidden size by the heads."""
KV_HEADS = {"gemma": 16, "mistral": 8, "mixtral": 8, "qwen2": 32}
"""Likewise of `num_key_value_heads`; others, and null, have as many as query heads."""
RESCALE_EVERY = 6
"""Likewise of `rescale_every`, of RWKV."""
POST_NORM = "the norm's output is also the residual, so dividing it by a scale would change the block"
NONLINEAR = "an activation function that is not positively homogeneous produces this input"
FUSED = "the producer is part of a fused qkv whose rows are not the values alone"
MIXED = "each of its linears mixes in the previous token in its own proportion, so that they share no input"
GQA = "value and output projections differ in shape (grouped-query attention)"


def linear_shapes(config: Config) -> tuple[LinearShape, ...]:
    """All quantizable linears, block by block in true-sequential order. Raises UnsupportedModel."""
    s = structure(config)
    return tuple(
        LinearShape(s.path(b, name), b, rows, site.cols, s.path(b, site.linears[0]))
        for b in range(s.count)
        for site in s.sites
        for name, rows in zip(site.linears, site.rows, strict=True)
    )


def refuses_steps(batch: int, config: Config) -> str | None:
    """Why so many sequences are not decoded side by side; None where they are."""
    if batch == 1 or config.get("model_type") not in ALONE:
        return None
    return f"in a step of several sequences transformers mixes those of {config['model_type']}; use workload.batch=1"


def forward_version(config: Config) -> int:
    """Part of a model's keys. 2: an RWKV that transformers rescales, whose norms had the epsilon of one that it does not."""
    return 2 if config.get("model_type") == "rwkv" and config.get("rescale_every", RESCALE_EVERY) > 0 else 1


def structure(config: Config) -> Structure:
    """Structure of the model that `config` (the parsed config.json) describes. Raises UnsupportedModel with the reason."""
    kind = config.get("model_type")
    if config.get("quantization_config"):
        raise UnsupportedModel(
            f"this {kind} checkpoint is already quantized (config.json has quantization_config); give the unquantized one"
        )
    if kind not in FAMILIES:
        why = REFUSED.get(str(kind), "its blocks are not in bitgrid's table of families")
        raise UnsupportedModel(f"model_type {kind!r} cannot be quantized: {why}; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[str(kind)](config)


def structure_of(model: Any) -> Structure:
    """As `structure`, of a model of transformers."""
    return structure(model.config.to_dict())


def _get(config: Config, *names: str, default: Any = None) -> Any:
    for name in names:
        if config.get(name) is not None:
            return config[name]
    if default is None:
        raise UnsupportedModel(
            f"config.json of a {config.get('model_type')} model lacks {' or '.join(names)}; add it, or copy the file again"
        )
    return default


def _llama_like(config: Config) -> Structure:
    kind = str(config["model_type"])
    hidden, inner = int(_get(config, "hidden_size")), int(_get(config, "intermediate_size"))
    heads = int(_get(config, "num_attention_heads"))
    kv = int(config.get("num_key_value_heads", KV_HEADS.get(kind)) or heads)
    width = int(_get(config, "head_dim", default=HEAD_WIDTHS.get(kind, hidden // heads)))
    attention = (
        Site(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (heads * width, kv * width, kv * width), hidden),
        Site(("self_attn.o_proj",), (hidden,), heads * width),
    )
    groups: tuple[ScaleRule, ...] = (
        ScaleRule("qkv", "input_layernorm", "norm", attention[0].linears, ("self_attn",)),
        ScaleRule(
            "output",
            "self_attn.v_proj",
            "linear",
            ("self_attn.o_proj",),
            ("self_attn.o_proj",),
            reason=None if kv == heads and heads * width == hidden else GQA,
        ),
    )
    experts = None
    if kind == "mixtral":
        experts = "mlp.experts"
        count = int(_get(config, "num_local_experts", "num_experts", default=8))
        up = tuple(f"{experts}.gate_up_proj.{e}" for e in range(count))
        down = tuple(f"{experts}.down_proj.{e}" for e in range(count))
        # Each expert sees its own tokens, so every expert's linear is a site of its own.
        feed_forward = tuple(Site((u,), (2 * inner,), hidden) for u in up) + tuple(Site((d,), (hidden,), inner) for d in down)
        groups += (ScaleRule("experts", "post_attention_layernorm", "norm", up, ("mlp",), routers=("mlp.gate",)),)
        groups += tuple(ScaleRule(f"down.{e}", u, "linear", (d,), (d,)) for e, (u, d) in enumerate(zip(up, down, strict=True)))
    else:
        feed_forward = (Site(("mlp.gate_proj", "mlp.up_proj"), (inner, inner), hidden), Site(("mlp.down_proj",), (hidden,), inner))
        groups += (
            ScaleRule("gate_up", "post_attention_layernorm", "norm", feed_forward[0].linears, ("mlp",)),
            ScaleRule("down", "mlp.up_proj", "linear", ("mlp.down_proj",), ("mlp.down_proj",)),
        )
    return Structure(
        model_type=kind,
        blocks="model.layers",
        count=int(_get(config, "num_hidden_layers")),
        sites=attention + feed_forward,
        groups=groups,
        attention="self_attn",
        cache_argument="past_key_values",
        norm_offset=1.0 if kind == "gemma" else 0.0,
        scores=Scores("self_attn.q_proj", "self_attn.k_proj", heads, kv, rotary=True),
        experts=experts,
    )


def _opt(config: Config) -> Structure:
    hidden, inner = int(_get(config, "hidden_size")), int(_get(config, "ffn_dim"))
    qkv = tuple(f"self_attn.{p}_proj" for p in "qkv")
    affine = bool(config.get("layer_norm_elementwise_affine", True))
    pre = bool(config.get("do_layer_norm_before", True))
    norm_reason = (None if affine else "the norm has no weight to take the scale") if pre else POST_NORM
    relu = config.get("activation_function", "relu") == "relu"
    heads = int(_get(config, "num_attention_heads"))
    groups = (
        ScaleRule("qkv", "self_attn_layer_norm", "norm", qkv, ("self_attn",), reason=norm_reason),
        ScaleRule("output", "self_attn.v_proj", "linear", ("self_attn.out_proj",), ("self_attn.out_proj",)),
        ScaleRule("fc1", "final_layer_norm", "norm", ("fc1",), ("fc1",), reason=norm_reason),
        ScaleRule("fc2", "fc1", "linear", ("fc2",), ("fc2",), reason=None if relu else NONLINEAR),
    )
    return Structure(
        model_type="opt",
        blocks="model.decoder.layers",
        count=int(_get(config, "num_hidden_layers")),
        sites=(
            Site(qkv, (hidden,) * 3, hidden),
            Site(("self_attn.out_proj",), (hidden,), hidden),
            Site(("fc1",), (inner,), hidden),
            Site(("fc2",), (hidden,), inner),
        ),
        groups=groups,
        attention="self_attn",
        cache_argument="past_key_values",
        scores=Scores("self_attn.q_proj", "self_attn.k_proj", heads, heads, rotary=False),
    )


def _fused(
    config: Config,
    *,
    hidden: int,
    inner: int,
    qkv_rows: int,
    blocks: str,
    count: int,
    qkv: str,
    output: str,
    up: str,
    down: str,
    norms: tuple[ScaleRule, ...],
    output_group: ScaleRule | None = None,
    cache_argument: str = "layer_past",
    outputs: int = 1,
) -> Structure:
    """Blocks of four linears: fused qkv, output, up, down."""
    groups = (
        *norms,
        output_group or ScaleRule("output", qkv, "none", (output,), (output,), reason=FUSED),
        ScaleRule("down", None, "none", (down,), (down,), reason=NONLINEAR),
    )
    return Structure(
        model_type=str(config["model_type"]),
        blocks=blocks,
        count=count,
        sites=(
            Site((qkv,), (qkv_rows,), hidden),
            Site((output,), (hidden,), hidden),
            Site((up,), (inner,), hidden),
            Site((down,), (hidden,), inner),
        ),
        groups=groups,
        attention=qkv.split(".")[0],
        cache_argument=cache_argument,
        outputs=outputs,
    )


def _gpt2(config: Config) -> Structure:
    hidden = int(_get(config, "n_embd", "hidden_size"))
    inner = int(_get(config, "n_inner", default=4 * hidden))
    return _fused(
        config,
        hidden=hidden,
        inner=inner,
        qkv_rows=3 * hidden,
        blocks="transformer.h",
        count=int(_get(config, "n_layer", "num_hidden_layers")),
        qkv="attn.c_attn",
        output="attn.c_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        norms=(
            ScaleRule("qkv", "ln_1", "norm", ("attn.c_attn",), ("attn",)),
            ScaleRule("up", "ln_2", "norm", ("mlp.c_fc",), ("mlp",)),
        ),
        # The values are the last third of GPT-2's fused outputs, head after head, exactly as the output projection reads them.
        output_group=ScaleRule("output", "attn.c_attn", "linear", ("attn.c_proj",), ("attn.c_proj",)),
        cache_argument="past_key_values",
    )


def _gpt_neox(config: Config) -> Structure:
    hidden = int(_get(config, "hidden_size"))
    # With a parallel residual attention and feed-forward still have a norm each, so no groups merge.
    return _fused(
        config,
        hidden=hidden,
        inner=int(_get(config, "intermediate_size")),
        qkv_rows=3 * hidden,
        blocks="gpt_neox.layers",
        count=int(_get(config, "num_hidden_layers")),
        qkv="attention.query_key_value",
        output="attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        norms=(
            ScaleRule("qkv", "input_layernorm", "norm", ("attention.query_key_value",), ("attention",)),
            ScaleRule("up", "post_attention_layernorm", "norm", ("mlp.dense_h_to_4h",), ("mlp",)),
        ),
    )


def _bloom(config: Config) -> Structure:
    hidden = int(_get(config, "hidden_size", "n_embed"))
    reason = POST_NORM if config.get("apply_residual_connection_post_layernorm") else None
    return _fused(
        config,
        hidden=hidden,
        inner=4 * hidden,
        qkv_rows=3 * hidden,
        blocks="transformer.h",
        count=int(_get(config, "n_layer", "num_hidden_layers")),
        qkv="self_attention.query_key_value",
        output="self_attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        norms=(
            ScaleRule("qkv", "input_layernorm", "norm", ("self_attention.query_key_value",), ("self_attention",), reason=reason),
            ScaleRule("up", "post_attention_layernorm", "norm", ("mlp.dense_h_to_4h",), ("mlp",), reason=reason),
        ),
        outputs=2,
    )


def _falcon(config: Config) -> Structure:
    hidden, heads = int(_get(config, "hidden_size")), int(_get(config, "num_attention_heads", "n_head"))
    width = hidden // heads
    new = bool(config.get("new_decoder_architecture", False))
    parallel = bool(config.get("parallel_attn", True))
    norms_per_block = config.get("num_ln_in_parallel_attn")
    if norms_per_block is None and new:
        norms_per_block = 2
    if new:
        qkv_rows = (2 * int(_get(config, "num_kv_heads", default=heads)) + heads) * width
    else:
        qkv_rows = hidden + 2 * width if config.get("multi_query", True) else 3 * hidden
    qkv, up = "self_attention.query_key_value", "mlp.dense_h_to_4h"
    if parallel and norms_per_block == 2:
        attention_norm, mlp_norm = "ln_attn", "ln_mlp"
    else:
        attention_norm, mlp_norm = "input_layernorm", "input_layernorm" if parallel else "post_attention_layernorm"
    if attention_norm == mlp_norm:
        # One norm feeds both, so they share one scale.
        norms: tuple[ScaleRule, ...] = (ScaleRule("qkv_up", attention_norm, "norm", (qkv, up), ("self_attention", "mlp")),)
    else:
        norms = (
            ScaleRule("qkv", attention_norm, "norm", (qkv,), ("self_attention",)),
            ScaleRule("up", mlp_norm, "norm", (up,), ("mlp",)),
        )
    made = _fused(
        config,
        hidden=hidden,
        inner=int(_get(config, "ffn_hidden_size", default=4 * hidden)),
        qkv_rows=qkv_rows,
        blocks="transformer.h",
        count=int(_get(config, "num_hidden_layers", "n_layer")),
        qkv=qkv,
        output="self_attention.dense",
        up=up,
        down="mlp.dense_4h_to_h",
        norms=norms,
        outputs=2,
    )
    return made if attention_norm != mlp_norm else _merge_first_and_third_site(made)


def _merge_first_and_third_site(s: Structure) -> Structure:
    """Falcon with one norm: qkv and the feed-forward's first linear read one input."""
    a, output, b, down = s.sites
    shared = Site(a.linears + b.linears, a.rows + b.rows, a.cols)
    return replace(s, sites=(shared, output, down))


def _rwkv(config: Config) -> Structure:
    hidden = int(_get(config, "hidden_size"))
    inner = int(_get(config, "intermediate_size", default=4 * hidden))
    width = int(_get(config, "attention_hidden_size", default=hidden))
    # Every projection mixes the previous token into its input in its own proportion, so each reads an input of its own.
    shapes = (
        *((f"attention.{p}", width, hidden) for p in ("key", "value", "receptance")),
        ("attention.output", hidden, width),
        ("feed_forward.key", inner, hidden),
        ("feed_forward.receptance", hidden, hidden),
        ("feed_forward.value", hidden, inner),
    )
    mixing = tuple(f"attention.{p}" for p in ("key", "value", "receptance"))
    channel = ("feed_forward.key", "feed_forward.receptance")
    return Structure(
        model_type="rwkv",
        blocks="rwkv.blocks",
        count=int(_get(config, "num_hidden_layers")),
        sites=tuple(Site((name,), (rows,), cols) for name, rows, cols in shapes),
        groups=(
            ScaleRule("time_mixing", "ln1", "norm", mixing, ("attention",), reason=MIXED),
            ScaleRule("channel_mixing", "ln2", "norm", channel, ("feed_forward",), reason=MIXED),
        ),
        attention="attention",
        cache_argument="",
        outputs=3,
    )


FAMILIES: dict[str, Callable[[Config], Structure]] = {
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": _llama_like,
    "gemma": _llama_like,
    "mixtral": _llama_like,
    "opt": _opt,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
    "falcon": _falcon,
    "rwkv": _rwkv,
}
ALONE = ("rwkv",)
"""Families whose step reads the last token of every sequence in place of its own: states are `[B, C]` where hidden ones are `[B, 1, C]`."""
REFUSED = {
    "mamba": "Mamba has state-space blocks instead of attention blocks",
    "t5": "it is an encoder-decoder model; only decoders are supported",
}
