"""GPTQ of a LLaMA-shaped model in plain torch, as a program without kernels of its own does it: the peer that anybody can write.

Per layer one forward over all sequences, one after another, with float32 sums of outer products of every linear's input; then a Hessian
for each linear, its inverse by Cholesky, columns in blocks of 128, and a second forward with the quantized weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quant.affine import Affine, ZeroKind
from quant.grids import GRIDS, fit
from quant.tensors.affine import AffineTensor
from workers.artifact import flush

BLOCK, BITS, DAMP = 128, 4, 0.01
"""Columns of a block, and of a group."""


def solve(weight: Tensor, hessian: Tensor) -> tuple[AffineTensor, Tensor]:
    """float32 `[N, K]` and `[K, K]` ▸ the packed weight, and its values."""
    n, k = weight.shape
    w, grid = weight.clone(), GRIDS["g_asym"]
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    w[:, dead] = 0
    hessian.diagonal().add_(DAMP * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    codes = torch.empty_like(w)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    for first in range(0, k, BLOCK):
        block, factor = w[:, first : first + BLOCK], upper[first : first + BLOCK, first : first + BLOCK]
        ranges = fit(grid, block.reshape(n, 1, -1), BITS, torch.float16)
        scale, zero = ranges.scale[:, 0, 0], ranges.zero[:, 0, 0]
        scales, zeros = [*scales, scale], [*zeros, zero]
        errors = torch.empty_like(block)
        for j in range(block.shape[1]):
            column = block[:, j]
            code = (column / scale + zero).round().clamp(0, 2**BITS - 1)
            codes[:, first + j] = code
            errors[:, j] = (column - (code - zero) * scale) / factor[j, j]
            block[:, j + 1 :] -= errors[:, j : j + 1] * factor[j, j + 1 :]
        w[:, first + BLOCK :] -= errors @ upper[first : first + BLOCK, first + BLOCK :]
    affine = Affine(torch.stack(scales, 1), torch.stack(zeros, 1), BITS, ZeroKind.CODE)
    tensor = AffineTensor.build(codes, affine, torch.float16)
    return tensor, tensor.dequantize()


def run(folder: Path, tokens: Tensor, out: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """From the files of a model to flushed files of packed tensors in `out`. Yields the name and the values of every linear."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    inner = model.model
    with torch.no_grad():
        hidden = [inner.embed_tokens(t[None].to(device)) for t in tokens]
        positions = torch.arange(tokens.shape[1], device=device)[None]
        rotary = inner.rotary_emb(hidden[0], positions)
        for number, layer in enumerate(inner.layers):
            linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
            sums = {n: torch.zeros(m.in_features, m.in_features, device=device) for n, m in linears.items()}
            hooks = [m.register_forward_pre_hook(_adds(sums[n])) for n, m in linears.items()]
            for h in hidden:
                _forward(layer, h, positions, rotary)
            for hook in hooks:
                hook.remove()
            packed: dict[str, Tensor] = {}
            for name, module in linears.items():
                tensor, values = solve(module.weight.float(), sums.pop(name))
                module.weight.copy_(values)
                packed |= {f"model.layers.{number}.{name}.{key}": t.cpu() for key, t in tensor.pack().items()}
                yield f"model.layers.{number}.{name}", values
            hidden = [_forward(layer, h, positions, rotary) for h in hidden]
            save_file(packed, out / f"layer_{number:03d}.safetensors")
            flush(out / f"layer_{number:03d}.safetensors")


def _adds(to: Tensor) -> Any:
    def hook(_: nn.Module, given: tuple[Tensor]) -> None:
        x = given[0].reshape(-1, to.shape[0]).float()
        to.addmm_(x.T, x)

    return hook


def _forward(layer: nn.Module, hidden: Tensor, positions: Tensor, rotary: Any) -> Tensor:
    out = layer(hidden, position_ids=positions, position_embeddings=rotary)
    made: Tensor = out[0] if isinstance(out, tuple) else out
    return made
