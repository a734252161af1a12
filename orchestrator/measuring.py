"""What `measure=true` asks for: the workload of measure stages and the device they run on, which is part of their identity."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from orchestrator.config import check_whole
from orchestrator.errors import ConfigError, unknown_name
from quant.scheme import Granularity, KVScheme, Scheme
from workers import kv_rules
from workers.families import refuses_steps
from workers.machine import cpu_model
from workers.positions import positions
from workers.request import BACKENDS
from workers.specs import Workload

LEAST = {"batch": 1, "prompt": 1, "tokens": 1, "threads": 1}
WORKLOAD_BACKENDS = (*BACKENDS, "dense")
ELSEWHERE = "ray_existing"


class Measuring(NamedTuple):
    workload: Workload
    device: str


def measuring(settings: Mapping[str, Any]) -> Measuring | None:
    """None where the sweep times nothing. Raises ConfigError for a workload that no worker could run."""
    if not settings.get("measure"):
        return None
    given = {**asdict(Workload()), "device": "auto", **(settings.get("workload") or {})}
    for name, least in LEAST.items():
        if not (name == "threads" and given[name] is None):
            check_whole(f"workload.{name}", given[name], least)
    if given["backend"] not in WORKLOAD_BACKENDS:
        raise ConfigError(unknown_name("workload.backend", str(given["backend"]), WORKLOAD_BACKENDS))
    device = given.pop("device")
    if not isinstance(device, str):
        raise ConfigError(f"workload.device={device}; give the name that the device must have, or auto for this machine's")
    if device == "auto":
        if settings["cluster"]["kind"] == ELSEWHERE:
            raise ConfigError(
                "workload.device=auto is the device of this machine, and the stages run on another cluster; give the name its workers "
                "report, as in workload.device='NVIDIA H200'"
            )
        wanted = str((settings.get("hints") or {}).get("device", "auto"))
        gpu = None if wanted == "cpu" else gpu_name(int(wanted.partition(":")[2] or 0))
        device = gpu or cpu_model()
        if gpu is None and given["threads"] is None:
            given["threads"] = os.cpu_count()
    return Measuring(Workload(**given), device)


def measured_cache(kv: KVScheme | None) -> KVScheme | None:
    """The format alone: the prompt is the workload's, and a cache is decoded through however an evaluation simulates it."""
    return None if kv is None else replace(kv, mode="simulate", prefill=1)


def check_length(workload: Workload, config: Mapping[str, Any], model: str) -> None:
    """Raises ConfigError where the model has no positions for what is fed. config: the model's, empty where it is not known yet."""
    limit, length = positions(config), workload.prompt + workload.tokens
    if limit is not None and length > limit:
        raise ConfigError(
            f"workload.prompt={workload.prompt} and workload.tokens={workload.tokens} make {length} positions, and {model} has {limit}; "
            "lower one of them"
        )


def unmeasured(scheme: Scheme | None, config: Mapping[str, Any], workload: Workload) -> str | None:
    """None, or why the workload is not timed: the model cannot decode so, or no kernel computes in the scheme's numbers, so that there
    is but a simulation to time. scheme: None for the unquantized model; config: as `check_length` has it."""
    if (reason := refuses_steps(workload.batch, config)) is not None or scheme is None:
        return reason
    weight, activation = scheme.weight, scheme.activation
    if scheme.kv is not None and (reason := kv_rules.not_packed(scheme.kv, config, workload.prompt + workload.tokens)) is not None:
        return reason
    if activation is None:
        return None
    if activation.number != "int" or not activation.dynamic or activation.granularity is not Granularity.TOKEN:
        return "kernels here take activations as integers with a dynamic range per token"
    if activation.outlier_threshold is not None:
        return "no kernel here keeps activations above activation.outlier_threshold"
    if weight is None or weight.number != "int" or weight.granularity is Granularity.GROUP:
        return "with rounded activations kernels here take integer weights with one scale per row or tensor"
    return None


def gpu_name(index: int) -> str | None:
    """Of this machine's GPU, as torch names it; None without one. The driver imports no torch. CUDA_VISIBLE_DEVICES, which CUDA counts by,
    means nothing to nvidia-smi."""
    program = shutil.which("nvidia-smi")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = dict(enumerate(visible.split(","))).get(index, "").strip() if visible is not None else str(index)
    if program is None or chosen in ("", "-1"):
        return None
    command = [program, f"--id={chosen}", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() or None if done.returncode == 0 else None
