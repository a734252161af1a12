"""AutoRound by its own package, block by block on our own token batches.

It keeps fake-quantized weights with `scale` `[N, G]` and `zp` in each linear: `zp` is a tensor of whole numbers, or 2^(bits-1)
for symmetric formats, whose scales may be negative. It multiplies in the model's own type, in bfloat16 under autocast unless that
is float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from quant.methods.base import Rounded
from quant.methods.toolkits import AutoRound
from quant.scheme import WeightScheme
from workers import families
from workers.errors import UnsupportedModel
from workers.toolkits import tensors
from workers.toolkits.job import Job

LEFT = {"bits": 16, "data_type": "float", "act_bits": 16, "act_data_type": "float"}
"""Of a linear that stays as it is."""


def quantize(job: Job) -> Iterator[tuple[str, Rounded]]:
    # Its exports cannot hold asymmetric 8-bit weights; ours can.
    os.environ["AR_ALLOW_W8_ASYM"] = "1"
    import auto_round

    method: AutoRound = job.made
    model = job.load_model()
    modules = job.modules(model)
    text = job.text()
    compressor = auto_round.AutoRound(
        model,
        job.load_tokenizer(),
        **arguments(method, job, [s.name for s in families.linear_shapes(model.config.to_dict())]),
        dataset=[t[None] for t in text],
        nsamples=text.shape[0],
        seqlen=text.shape[1],
        device_map=str(job.device),
    )
    done, _ = compressor.quantize()
    if done.dtype is not job.dtype:
        job.notes.append(f"AutoRound computed in {done.dtype}, not in the model's {job.dtype}")
    # Blocks may have been replaced on the way.
    modules = job.modules(done)
    for name, scheme in job.linears.items():
        yield name, stored(modules[name], name, scheme)


def arguments(method: AutoRound, job: Job, names: list[str]) -> dict[str, Any]:
    """Of `auto_round.AutoRound`; names: all linears of the blocks, others it leaves alone by itself."""
    common = next(iter(job.linears.values()))
    tuning: dict[str, Any] = {"disable_opt_rtn": True}
    if method.iters:
        tuning = {"lr": method.lr, "enable_minmax_tuning": method.tune_range}
    return {
        "scheme": {**weights(common), "data_type": "int", "act_bits": 16},
        "layer_config": {n: weights(job.linears[n]) if n in job.linears else dict(LEFT) for n in names},
        "iters": method.iters,
        "batch_size": method.batch_size,
        "seed": job.seed,
        "scale_dtype": {"float16": "fp16", "float32": "fp32"}[common.scale_dtype],
        "amp": job.dtype is not torch.float32,
        "enable_torch_compile": False,
        "low_cpu_mem_usage": False,
        "disable_model_free": True,
        **tuning,
    }


def weights(scheme: WeightScheme) -> dict[str, Any]:
    """A format in AutoRound's words; group size -1 is one scale per output."""
    return {"bits": scheme.bits, "group_size": scheme.group_size or -1, "sym": scheme.symmetric}


def stored(module: Any, name: str, scheme: WeightScheme) -> Rounded:
    """A quantized linear ▸ the stored tensor. Raises UnsupportedModel where it was left unquantized."""
    scale, zero = getattr(module, "scale", None), getattr(module, "zp", None)
    if scale is None:
        n, k = module.weight.shape
        raise UnsupportedModel(f"AutoRound leaves linears alone whose sizes 32 does not divide: {name} is {n} x {k}")
    weight = module.weight.detach().cpu()
    scale = scale.detach().float().cpu().reshape(weight.shape[0], -1)
    whole = None if scheme.symmetric or not isinstance(zero, torch.Tensor) else zero.detach().float().cpu().reshape(scale.shape)
    return tensors.affine(tensors.codes_of(weight, scale, whole, scheme.bits), scale, whole, scheme)
