"""How an evaluation gets a quantized cache's effect: by decoding through it, or within one forward pass.

per_token and kvquant quantize a token before anything reads it, so one pass over a window reads what decoding reads. kivi ages
tokens: its single pass gives every query position its own view (`workers.kv_aging`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from quant.kv import Kivi, KVQuantizer, PerToken, make
from quant.scheme import ActivationScheme, KVScheme
from workers import families, kv_capture, kv_fisher, kv_rules
from workers.blocks import decoder_blocks
from workers.context import Context
from workers.decoding import decoded_logits
from workers.errors import InputError
from workers.kv_aging import aging
from workers.kv_cache import MakeCache, QuantizedCache
from workers.recipe import Recipe
from workers.steps import key_rotation
from workers.tasks import base
from workers.window_logits import window_logits


def through_cache(kv: KVScheme) -> bool:
    """Whether `logits` is needed; otherwise `workers.runtime` quantizes keys and values as they enter attention."""
    return kv.mode == "decode" or kv.kind != "per_token"


def logits(
    model: nn.Module,
    kv: KVScheme,
    inputs: Mapping[str, Path],
    context: Context,
    runtime: Callable[[], AbstractContextManager[None]],
    activation: ActivationScheme | None = None,
) -> base.Logits:
    """The model with the scheme's cache, as tasks see it. `inputs`: committed artifacts, of the variant (`quantize`), and of the
    statistics `kv` and `kv_fisher` where the scheme needs them. activation: what `runtime` attaches.

    Raises InputError for a model, version or missing calibration that does not suit the scheme, CorruptArtifactError."""
    quantizers = _with_key_rotations(model, _quantizers(model, kv, inputs), context)
    if quantizers[0].needs and "quantize" in inputs:
        _note_changed_outputs(kv, inputs["quantize"], context)
    first = quantizers[0]
    if kv.mode == "simulate" and isinstance(first, Kivi):

        @contextmanager
        def aged() -> Iterator[None]:
            with runtime(), aging(model, first, kv.prefill):
                yield

        return window_logits(model, context, aged)
    window = kv.mode == "simulate"
    prefill = 10**9 if window else kv.prefill
    longest = 1 if activation is not None and activation.by_sequence else None  # tokens that come together would not be rounded as alone
    return decoded_logits(model, context.device, runtime, lambda: QuantizedCache(quantizers), context.batch_tokens, prefill, longest)


def empty_caches(model: nn.Module, kv: KVScheme, context: Context) -> MakeCache:
    """What makes caches that decoding fills, whatever `kv.mode`, of a scheme that is not calibrated. Raises InputError as `logits`
    does for that mode."""
    quantizers = _with_key_rotations(model, _quantizers(model, replace(kv, mode="decode"), {}), context)
    return lambda: QuantizedCache(quantizers)


def _with_key_rotations(model: nn.Module, quantizers: list[KVQuantizer], context: Context) -> list[KVQuantizer]:
    """Keys are mixed as the model's method says, where a token is rounded on its own; otherwise that is noted."""
    structure = families.structure_of(model)
    mixed = [key_rotation(block.get_submodule(structure.attention)) for block in decoder_blocks(model, structure)]
    made: list[KVQuantizer] = [replace(q, mixed=m) if isinstance(q, PerToken) else q for q, m in zip(quantizers, mixed, strict=True)]
    if any(mixed) and not isinstance(quantizers[0], PerToken):
        context.notes.append(f"the method's rotation of keys is left out: kv.kind={quantizers[0].name} rounds them by channel")
    return made


def _note_changed_outputs(kv: KVScheme, artifact: Path, context: Context) -> None:
    """Calibration sees the unquantized model, whose keys and values may differ from the variant's by more than rounding."""
    changed: dict[str, list[str]] = {}
    for op in Recipe(artifact).operations:
        name = op["module"].rpartition(".")[2]
        if op.get("outputs") and name in ("k_proj", "v_proj"):
            changed[name] = op["outputs"]
    if changed:
        which = ", ".join(f"{name} ({' and '.join(changed[name])})" for name in sorted(changed))
        context.notes.append(
            f"kv.kind={kv.kind} was calibrated on the unquantized model, and the method's transforms change what these give: {which}; "
            "ranges of keys and codebooks may not fit"
        )


def summary(model: nn.Module, kv: KVScheme, window: int) -> dict[str, Any]:
    """JSON facts of the record: how the cache was read, and bits a value of a whole window's cache.

    Raises InputError for a model that the scheme does not work on, or a version that is not here."""
    config = _config(model)
    made = _made(kv, config)
    heads = int(
        config.get("num_key_value_heads") or config.get("num_kv_heads") or config.get("num_attention_heads") or config.get("n_head") or 1
    )
    width = kv_rules.head_width(config)
    bits = None if width is None else made.bits(window, heads, width)
    return {"kind": kv.kind, "mode": kv.mode, "tokens": window, "bits_stored": bits}


def _config(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    found: dict[str, Any] = config.to_dict()
    return found


def _made(kv: KVScheme, config: Mapping[str, Any]) -> KVQuantizer:
    refusal = kv_rules.refuses(kv, config)
    if refusal is not None:
        raise InputError(refusal)
    try:
        return make(kv)
    except ValueError as e:
        raise InputError(f"{e}; driver and workers must run the same bitgrid") from e


def _quantizers(model: nn.Module, kv: KVScheme, inputs: Mapping[str, Path]) -> list[KVQuantizer]:
    quantizer = _made(kv, _config(model))
    structure = families.structure_of(model)
    if not quantizer.needs:
        return [quantizer] * structure.count
    if kv_capture.KIND not in inputs:
        raise InputError(f"kv.kind={kv.kind} needs keys and values of calibration text as the input `{kv_capture.KIND}`")
    if kv.fisher and kv_fisher.KIND not in inputs:
        raise InputError(f"kv.fisher=true needs the squared gradients of calibration text as the input `{kv_fisher.KIND}`")
    fisher = inputs[kv_fisher.KIND] if kv.fisher else None
    return kv_capture.calibrated(quantizer, structure, inputs[kv_capture.KIND], fisher, kv.first_few_fp16)
