"""Export to the AutoGPTQ checkpoint format, version 1: what auto-gptq 0.7.1, transformers and most servers call "GPTQ".

Source of the format: the readers of the auto-gptq package, version 0.7.1. What the format cannot hold is refused: auto-gptq
replaces every linear of its own list for a family and gives all of them the same bits and group size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from quant.affine import ZeroKind
from quant.methods.base import StoredTensor
from quant.tensors.affine import AffineTensor
from workers.export.gptq_layout import pack, unholdable
from workers.export.model import QuantizedModel, as_half
from workers.export.report import ExportError
from workers.export.transformers_files import copy_tokenizer, unreadable_by_old, with_both_spellings
from workers.families import linear_shapes

FAMILIES = ("bloom", "falcon", "gemma", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "opt", "qwen2")
"""Those of ours that auto-gptq 0.7.1 knows; it refuses every other model_type."""
MAX_EXPERTS = 8
"""auto-gptq lists the first eight experts of a Mixtral by name."""
DAMP = 0.01
"""The format's usual, where a method has none or one that readers refuse."""
OLD_NAMES = {"mixtral": (".mlp.gate.", ".block_sparse_moe.gate."), "gpt_neox": ("lm_head.", "embed_out.")}
"""Family ▸ part of a parameter's name in transformers 5, and in 4.44; a Mixtral's experts are handled by `old_linears`."""


@dataclass(frozen=True)
class Layout:
    """What all linears of a checkpoint share."""

    bits: int
    group_size: int
    """-1: one group per output channel."""
    act_order: bool
    """Groups are not consecutive inputs, so readers must use g_idx."""
    symmetric: bool
    wrapped_zeros: int
    """Zero points of 0, stored as 2^bits - 1."""


def write(model: QuantizedModel, out: Path) -> list[str]:
    """Write the checkpoint into the existing empty folder `out`; returns notes. Raises ExportError with the reason."""
    kind = model.config["model_type"]
    if kind not in FAMILIES:
        raise _refused(f"auto-gptq 0.7.1 has no {kind} models, only {', '.join(FAMILIES)}")
    _check_coverage(model)
    reason = unreadable_by_old(model.config)
    if reason is not None:
        raise _refused(f"the model has {reason}; auto-gptq needs transformers 4.44")
    linears = {name: _affine(name, stored) for name, stored in model.linears.items()}
    layout = _layout(linears)
    # A tied output head is written too: auto-gptq does not load it from the embedding.
    tensors, notes = as_half({_old_name(model, k): v for k, v in model.others.items()})
    biases, bias_notes = as_half(model.biases)
    for name, linear in linears.items():
        tensors.update(_linear(model, name, linear, biases.get(name)))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "bits": layout.bits,
        "group_size": layout.group_size,
        **_how(model.methods),
        "desc_act": layout.act_order,
        "sym": layout.symmetric,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
    }
    config = {**with_both_spellings(model.config, "float16", tied=model.tied), "quantization_config": quantization}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    (out / "quantize_config.json").write_text(json.dumps(quantization, indent=2))
    if layout.wrapped_zeros:
        top = 2**layout.bits
        notes.append(
            f"{layout.wrapped_zeros} zero points are 0, stored as {top - 1}: auto-gptq reads them modulo {top}; "
            f"a reader that does not wrap would take {top}"
        )
    return [*model.notes, *notes, *bias_notes, *copy_tokenizer(model.folder, out)]


def _refused(reason: str) -> ExportError:
    return ExportError(f"{reason}; use the format dense")


def _how(methods: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How the codes were found, in the format's words: readers show these and compute nothing from them, but each must have a value.
    It has no word for other methods than GPTQ, nor for statistics of the unquantized model: both are not true-sequential."""
    params = [m["rounding"].get("params", {}) for m in methods]
    damp = max((float(p["damp"]) for p in params if "damp" in p), default=DAMP)
    return {
        "damp_percent": damp if 0 < damp < 1 else DAMP,  # readers refuse others
        "static_groups": all(p.get("static_groups", False) for p in params),
        "true_sequential": all(
            m.get("propagation") == "quantized" and p.get("true_sequential", False) for m, p in zip(methods, params, strict=True)
        ),
    }


def _check_coverage(model: QuantizedModel) -> None:
    """Every linear of the family is quantized, and nothing else: auto-gptq replaces exactly those."""
    expected = {s.name for s in linear_shapes(model.config)}
    missing, extra = sorted(expected - set(model.linears)), sorted(set(model.linears) - expected)
    if missing:
        raise _refused(
            f"{len(missing)} of {len(expected)} linears are not quantized, first {missing[0]}; auto-gptq replaces every linear of a "
            f"{model.config['model_type']} block and cannot leave one as it is"
        )
    if extra:
        raise _refused(f"{extra[0]} is quantized, but auto-gptq does not replace it in a {model.config['model_type']} model")
    experts = int(model.config.get("num_local_experts") or 0) if model.config["model_type"] == "mixtral" else 0
    if experts > MAX_EXPERTS:
        raise _refused(f"the model has {experts} experts; auto-gptq knows the first {MAX_EXPERTS} of a Mixtral")


def _affine(name: str, stored: StoredTensor) -> AffineTensor:
    if not isinstance(stored, AffineTensor):
        raise _refused(f"{name} is stored as {stored.format!r}; the format holds integer codes with a scale and a zero per group")
    return stored


def _layout(linears: Mapping[str, AffineTensor]) -> Layout:
    """Raises ExportError where linears differ in what they must share, or the format cannot hold one."""
    per_channel = all(t.scale.shape[1] == 1 for t in linears.values())
    act_order = not per_channel and any(not torch.equal(_g_idx(t), _consecutive(t)) for t in linears.values())
    for name, t in linears.items():
        if t.input_scale is not None:
            raise _refused(f"{name} divides its input by a scale at run time; the format has no place for it")
        if t.kind not in (ZeroKind.CONSTANT, ZeroKind.CODE, ZeroKind.INTEGER):
            raise _refused(f"{name} has zero points of kind {t.kind.value!r}; the format stores integers within the codes")
        reason = unholdable(t.bits, t.codes, *_rows(t), act_order=act_order)
        if reason is not None:
            raise _refused(f"{name} has {reason}")
    groups = {-1 if per_channel else t.group_size: name for name, t in linears.items()}
    bits = {t.bits: name for name, t in linears.items()}
    for what, values in (("bits", bits), ("group sizes", groups)):
        if len(values) > 1:
            told = ", ".join(f"{v} ({name})" for v, name in sorted(values.items()))
            raise _refused(f"the linears have different {what}: {told}; the format has one for the whole model")
    return Layout(
        bits=next(iter(bits)),
        group_size=next(iter(groups)),
        act_order=act_order,
        symmetric=all(bool((t.zero == 2 ** (t.bits - 1)).all()) for t in linears.values()),
        wrapped_zeros=sum(int((t.zero == 0).sum()) for t in linears.values()),
    )


def _linear(model: QuantizedModel, name: str, t: AffineTensor, bias: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Named tensors of one linear; of two for the fused gate and up projections of a Mixtral expert, w1 and w3."""
    scale, zero = _rows(t)
    n = t.shape[0]
    old_names = old_linears(model, name)
    rows = n // len(old_names)
    for i, old in enumerate(old_names):
        part = slice(i * rows, (i + 1) * rows)
        packed = pack(t.bits, t.codes[part], scale[part], zero[part], _g_idx(t))
        # auto-gptq gives every linear a bias.
        packed["bias"] = torch.zeros(rows, dtype=torch.float16) if bias is None else bias[part].contiguous()
        yield from ((f"{old}.{short}", tensor) for short, tensor in packed.items())


def _rows(t: AffineTensor) -> tuple[Tensor, Tensor]:
    """Scale and zero `[N, G]`, also where one row serves all."""
    shape = (t.shape[0], t.scale.shape[1])
    return t.scale.expand(shape), t.zero.expand(shape)


def _g_idx(t: AffineTensor) -> Tensor:
    return _consecutive(t) if t.g_idx is None else t.g_idx.to(torch.int32)


def _consecutive(t: AffineTensor) -> Tensor:
    return torch.arange(t.shape[1], dtype=torch.int32) // t.group_size


def _old_name(model: QuantizedModel, name: str) -> str:
    """Parameter name in transformers 4.44."""
    new, old = OLD_NAMES.get(str(model.config["model_type"]), ("", ""))
    return name.replace(new, old) if new else name


def old_linears(model: QuantizedModel, name: str) -> list[str]:
    """Module paths in transformers 4.44 of a linear; the outputs of several are stacked in the given order."""
    if model.config["model_type"] != "mixtral" or ".mlp.experts." not in name:
        return [name]
    block, rest = name.split(".mlp.experts.")
    kind, expert = rest.split(".")
    parts = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}[kind]
    return [f"{block}.block_sparse_moe.experts.{expert}.{p}" for p in parts]
