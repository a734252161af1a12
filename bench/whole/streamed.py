"""A model larger than its disk: all decoder layers are one layer's shard, read once for each through the real loader.

The page cache is told to forget the shard after each reading, before the next one begins, and what was really read of the disk is asked of
the system. A block's packed tensors are written by the real writer, hashed, and removed.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from workers import measure, stream
from workers.artifact import file_digest, flush
from workers.checkpoint import Checkpoint, open_checkpoint
from workers.context import Context
from workers.quantize import quantize_blocks
from workers.run_stage import RUNNERS
from workers.specs import QuantizeSpec
from workers.stream import BlockModel, open_checked

FIRST = "model.layers.0."
PIECE, THREADS = 16 << 20, 8


def repeated(checkpoint: Checkpoint) -> Checkpoint:
    """With every layer's names for the tensors of the first layer, in the one file that holds them."""
    shard = {n.removeprefix(FIRST): e for n, e in checkpoint.tensors.items() if n.startswith(FIRST)}
    layers = range(checkpoint.config["num_hidden_layers"])
    return replace(checkpoint, tensors=checkpoint.tensors | {f"model.layers.{i}.{n}": e for i in layers for n, e in shard.items()})


@contextmanager
def one_for_all() -> Iterator[None]:
    """While it lasts every checkpoint that is opened is `repeated`."""
    with ExitStack() as stack:
        for module in (stream, measure):
            stack.enter_context(patch.object(module, "open_checkpoint", lambda location: repeated(open_checkpoint(location))))
        yield


def forget(path: Path) -> None:
    """Drop a file from the page cache; pages that are mapped or not yet written stay."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def bytes_from_disk() -> int | None:
    """That this process has made the system read so far. None where the system does not tell."""
    try:
        return next(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes"))
    except (OSError, StopIteration):
        return None


def read_rate(path: Path) -> float:
    """GB/s of a file that is not in the page cache, read in pieces by threads."""
    flush(path)
    forget(path)
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY)
    began = time.perf_counter()
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            got = sum(pool.map(lambda at: len(os.pread(descriptor, PIECE, at)), range(0, size, PIECE)))
    finally:
        took = time.perf_counter() - began
        os.close(descriptor)
        forget(path)
    assert got == size
    return size / took / 1e9


class Dropped:
    """Packed blocks: hashed and removed by a thread."""

    def __init__(self, payload: Path) -> None:
        self._payload = payload
        self._thread = ThreadPoolExecutor(1, "dropped")
        self._found: dict[str, Future[tuple[str, int]]] = {}

    def take(self, block: int) -> None:
        """A block whose file is complete; nothing for one before the first."""
        path = self._payload / f"tensors_{block:04d}.safetensors"
        if block >= 0:
            self._found[path.name] = self._thread.submit(self._drop, path)

    @staticmethod
    def _drop(path: Path) -> tuple[str, int]:
        told = file_digest(path), path.stat().st_size
        path.unlink()
        return told

    def told(self) -> tuple[dict[str, str], int]:
        """File ▸ SHA-256, and bytes of all."""
        self._thread.shutdown()
        found = {name: future.result() for name, future in self._found.items()}
        return {name: digest for name, (digest, _) in found.items()}, sum(size for _, size in found.values())


def loader_rate(model: BlockModel, path: Path, size: int) -> float:
    """GB/s of the loader alone, from the disk to the device."""
    forget(path)
    began = time.perf_counter()
    model.prefetch(0)
    model.load(0)
    synchronize(model)
    took = time.perf_counter() - began
    model.release(0)
    forget(path)
    return size / took / 1e9


def synchronize(model: BlockModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def run_streamed(spec: QuantizeSpec, inputs: Mapping[str, Path], payload: Path, context: Context) -> dict[str, Any]:
    """As `workers.quantize.run_quantize`, of a folder that holds one decoder layer."""
    checkpoint = repeated(open_checkpoint(context.model_location(spec.model)))
    model, dropped = open_checked(context, spec.model, checkpoint), Dropped(payload)
    entries = {e for n, e in checkpoint.tensors.items() if n.startswith(FIRST)}
    (path,), size = {e.file for e in entries}, sum(e.bytes for e in entries)
    began = time.perf_counter()
    told = {"layers": model.structure.count, "layer_bytes": size, "disk_gbs": read_rate(path), "loader_gbs": loader_rate(model, path, size)}
    told["apart_s"] = time.perf_counter() - began
    opened, before = context.seconds["read"], bytes_from_disk()

    def done(i: int) -> None:
        synchronize(model)  # the next wait for a block is for its reading alone
        model.release(i)
        forget(path)  # a block on the CPU maps the file until now
        dropped.take(i - 1)

    # Before the next one is read, which begins once this one is there.
    model.on_load.append(lambda i: forget(path))
    began = time.perf_counter()
    try:
        summary = quantize_blocks(spec, inputs, payload, context, model, done)
    finally:
        model.on_load.clear()
    dropped.take(model.structure.count - 1)
    digests, written = dropped.told()
    seconds, waited = time.perf_counter() - began, context.seconds["read"] - opened
    after = bytes_from_disk()
    return summary | {
        "streamed": told
        | {
            "seconds": seconds,
            "waited_s": waited,
            "load_bound": waited / seconds,
            "read_gbs": model.structure.count * size / seconds / 1e9,
            "from_disk": None if after is None or before is None else (after - before) / (model.structure.count * size),
            "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "written_bytes": written,
            "digests": digests,
        }
    }


STREAMED = replace(RUNNERS, quantize=run_streamed)
