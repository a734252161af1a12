"""GPTQ and round to nearest by llm-compressor's `oneshot`, on our own token batches.

It leaves a scale and a zero per group in each linear, beside weights that GPTQ has rounded and round to nearest has not; codes are
what its own `quantize` makes of both when a checkpoint is written. Zeros and codes are signed there, -2^(bits-1) .. 2^(bits-1) - 1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quant.methods.base import Rounded
from quant.methods.toolkits import LlmCompressor
from quant.scheme import Granularity, WeightScheme
from workers.errors import WorkerError
from workers.toolkits import tensors
from workers.toolkits.job import Job

log = logging.getLogger("workers.toolkits")


def quantize(job: Job) -> Iterator[tuple[str, Rounded]]:
    from compressed_tensors.quantization import quantize as codes_of
    from llmcompressor import oneshot

    method: LlmCompressor = job.made
    model = job.load_model()
    modules = job.modules(model)
    told: list[str] = _listen()
    data = None if method.algorithm == "rtn" else batches(job.text())
    oneshot(
        model=model,
        tokenizer=job.load_tokenizer(),
        dataset=data,
        recipe=[modifier(method, job.linears)],
        propagate_error=job.propagation == "quantized",
    )
    job.notes += [line for line in told if "round-to-nearest" in line]
    for name, scheme in job.linears.items():
        module = modules[name]
        scale, zero = getattr(module, "weight_scale", None), getattr(module, "weight_zero_point", None)
        if scale is None:
            raise WorkerError(f"llm-compressor left {name} unquantized")
        yield name, stored(codes_of(module.weight, scale, zero, module.quantization_scheme.weights), scale, zero, scheme)


def modifier(method: LlmCompressor, linears: dict[str, WeightScheme]) -> Any:
    """One configuration group per format."""
    from compressed_tensors.quantization import QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    groups: dict[WeightScheme, list[str]] = {}
    for name, scheme in linears.items():
        groups.setdefault(scheme, []).append(name)
    config = {
        f"group_{i}": QuantizationScheme(targets=names, weights=arguments(scheme)) for i, (scheme, names) in enumerate(groups.items())
    }
    if method.algorithm == "rtn":
        return QuantizationModifier(config_groups=config)
    return GPTQModifier(
        config_groups=config,
        actorder="static" if method.act_order else None,
        block_size=method.block_size,
        dampening_frac=method.damp,
    )


def arguments(scheme: WeightScheme) -> dict[str, Any]:
    """Of compressed-tensors' `QuantizationArgs`."""
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": {Granularity.TENSOR: "tensor", Granularity.CHANNEL: "channel", Granularity.GROUP: "group"}[scheme.granularity],
        "group_size": scheme.group_size,
        "observer": "memoryless_minmax",
    }


def batches(tokens: Tensor) -> Any:
    """`[S, T]` ▸ a loader of one sequence a batch, in order."""
    rows = [{"input_ids": t[None]} for t in tokens]
    return torch.utils.data.DataLoader(rows, batch_size=None)  # type: ignore[arg-type]  # torch takes any sequence


def stored(codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: WeightScheme) -> Rounded:
    """Signed codes `[N, K]`, scales and signed zeros of their groups (no zeros where the format is symmetric) ▸ the stored tensor."""
    middle = 2 ** (scheme.bits - 1)
    steps = scale.detach().float().cpu().reshape(1 if scheme.granularity is Granularity.TENSOR else codes.shape[0], -1)
    offset = None if scheme.symmetric or zero is None else zero.detach().float().cpu().reshape(steps.shape) + middle
    return tensors.affine(codes.detach().float().cpu() + middle, steps, offset, scheme)


def _listen() -> list[str]:
    """llm-compressor logs through loguru; its warnings go to our log, and are returned."""
    from loguru import logger

    told: list[str] = []

    def hear(message: Any) -> None:
        told.append(message.record["message"])
        log.warning("%s", message.record["message"])

    logger.add(hear, level="WARNING")
    return told
