"""The statistic `kv`: keys before the rotary embedding and values of calibration tokens, per decoder block.

They are outputs of `k_proj` and `v_proj`, kept for the first sequences as `samples` keeps inputs, in the model's own dtype (exact).
Tensors of one block: `<block>.keys` and `<block>.values`, `[sequences, T, H D]`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quant.kv import KVQuantizer
from workers.artifact import payload_path
from workers.blocks import Taps
from workers.capture import block_file
from workers.errors import InputError, NumericalError
from workers.kv_rules import SEPARATE_ROTARY_KEYS
from workers.structure import Structure

KIND = "kv"


def check_family(structure: Structure) -> None:
    """Raises InputError for a family whose keys cannot be seen before the rotary embedding."""
    if structure.model_type not in SEPARATE_ROTARY_KEYS:
        raise InputError(
            f"the statistic kv needs keys before the rotary embedding, which is known for {', '.join(SEPARATE_ROTARY_KEYS)}; "
            f"got a {structure.model_type} model"
        )


class KVSamples:
    """Taps on one block's projections while calibration text runs through it."""

    def __init__(self, block: nn.Module, structure: Structure, kept_sequences: int) -> None:
        self._found: dict[str, list[Tensor]] = {"keys": [], "values": []}
        self._keep = kept_sequences
        self._taps = Taps()
        attention = block.get_submodule(structure.attention)
        for projection, name in (("k_proj", "keys"), ("v_proj", "values")):
            self._taps.add(attention.get_submodule(projection).register_forward_hook(self._hook(name)).remove)

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            left = self._keep - sum(len(x) for x in self._found[name])
            if left > 0:
                self._found[name].append(output[:left].detach().clone())

        return hook

    def write(self, path: str, file: Path) -> dict[str, Any]:
        """Save as tensors below the block's module path; returns their entry of the index. Raises NumericalError."""
        self._taps.remove()
        tensors = {f"{path}.{name}": torch.cat(parts).cpu() for name, parts in self._found.items()}
        for name, x in tensors.items():
            if not torch.isfinite(x).all():
                raise NumericalError(f"{name} are not finite during calibration; the model overflows in its dtype, use bfloat16 or float32")
        return save(tensors, file)


def save(tensors: dict[str, Tensor], file: Path) -> dict[str, Any]:
    """Write one block's `[sequences, T, H D]`; returns their entry of the index."""
    save_file(tensors, file)
    return {"file": file.name, "sites": {n: {"tokens": x.shape[0] * x.shape[1], "cols": x.shape[2]} for n, x in tensors.items()}}


def calibrated(quantizer: KVQuantizer, structure: Structure, artifact: Path, fisher: Path | None, skipped: int) -> list[KVQuantizer]:
    """The quantizer fitted to each block's keys and values, weighted by the statistic `kv_fisher` where given; without the first
    `skipped` tokens of every sequence (those it keeps exactly). Raises CorruptArtifactError, InputError."""
    made = []
    for b in range(structure.count):
        found = [_of_block(a, structure, b, skipped) for a in (artifact, fisher) if a is not None]
        made.append(quantizer.calibrate(*(x for pair in found for x in pair)))
    return made


def _of_block(artifact: Path, structure: Structure, b: int, skipped: int) -> tuple[Tensor, Tensor]:
    """Keys and values, or their weights, `[tokens, H D]`, without the first `skipped` tokens of every sequence."""
    found = load_file(payload_path(artifact, block_file(b)))
    keys, values = (found[f"{structure.blocks}.{b}.{name}"] for name in ("keys", "values"))
    if skipped >= keys.shape[1]:
        raise InputError(
            f"kv.first_few_fp16={skipped} leaves nothing to calibrate on: calibration sequences have {keys.shape[1]} tokens; "
            "give fewer, or a longer calibration.sequence_length"
        )
    return keys[:, skipped:].flatten(0, 1), values[:, skipped:].flatten(0, 1)
