"""Pickled PyTorch weights ▸ safetensors, once per content, in a cache folder.

The files are opened by torch's restricted unpickler (`weights_only`), which builds tensors and plain containers and runs no
code of the file. The result lies under `BITGRID_CACHE` (default ~/.cache/bitgrid) as `converted/<digest>/`: safetensors files
of about a gigabyte and `converted.json`. It is written into a sibling folder and renamed; the first writer wins.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from quant.accounting import size_bytes
from workers.artifact import file_digest, rename_flushed, share
from workers.errors import InputError

FORMAT = 1
MANIFEST = "converted.json"
FILE_BYTES = 2**30
"""A file is closed once it holds so many bytes, so that no more than this and one tensor are in memory."""

INSTEAD = (
    "take a revision with safetensors (model.hub.revision=), or convert it once where you trust it: "
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder), then model.path=new_folder"
)


@dataclass(frozen=True)
class Converted:
    files: tuple[Path, ...]
    """Safetensors files, whole."""
    aliases: dict[str, str]
    """Tensor that shares all its memory with another ▸ that other, which alone is stored."""
    note: str


def cache_root() -> Path:
    return Path(os.environ.get("BITGRID_CACHE") or "~/.cache/bitgrid").expanduser()


def convert_once(pickled: Sequence[Path]) -> Converted:
    """The safetensors form of these pickled files, from the cache where it is there.

    Raises InputError for a file that the restricted loader refuses or cannot read, or a cache that cannot be written; OSError
    when the disk is full.
    """
    names = ", ".join(p.name for p in pickled)
    folder = cache_root() / "converted" / _digest(pickled)
    found = _read(folder, f"{names}: read as safetensors from {folder}, converted before")
    if found is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as e:
        raise InputError(f"{names} must be converted to safetensors, but {folder.parent} cannot be written ({e}); set BITGRID_CACHE") from e
    try:
        _write(pickled, staging)
        share(staging)
        try:
            rename_flushed(staging, folder)
        except OSError:
            # It is there: another worker was first, and its files may be in use; or one that is not whole.
            if _read(folder, "") is None:
                shutil.rmtree(folder, ignore_errors=True)
                rename_flushed(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    found = _read(folder, f"{names}: converted once to safetensors in {folder}, through torch's restricted loader (weights_only)")
    if found is None:
        raise InputError(f"{folder} changed while it was written; remove it and run again")
    return found


def _digest(pickled: Sequence[Path]) -> str:
    return sha256(json.dumps([_content(p.resolve(), p.stat().st_size, p.stat().st_mtime_ns) for p in pickled]).encode()).hexdigest()[:32]


@lru_cache(maxsize=256)
def _content(path: Path, size: int, mtime_ns: int) -> str:
    return file_digest(path)


def _read(folder: Path, note: str) -> Converted | None:
    """None where it is not there, of another format, or not whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT or any((folder / n).stat().st_size != size for n, size in manifest["files"].items()):
            return None
        return Converted(tuple(folder / n for n in manifest["files"]), manifest["aliases"], note)
    except (OSError, ValueError, KeyError):
        return None


def _write(pickled: Sequence[Path], folder: Path) -> None:
    files: list[str] = []
    aliases: dict[str, str] = {}
    part: dict[str, Tensor] = {}

    def close() -> None:
        if part:
            files.append(f"model-{len(files) + 1:05d}.safetensors")
            save_file(part, folder / files[-1], {"format": "pt"})
            part.clear()

    for path in pickled:
        kept: dict[tuple[Any, ...], str] = {}
        for name, tensor in _tensors(path):
            memory = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and memory in kept:
                aliases[name] = kept[memory]
                continue
            kept[memory] = name
            # Parts of one memory each get their own: safetensors holds no views.
            part[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
            if size_bytes(*part.values()) >= FILE_BYTES:
                close()
        # The next shard's tensors may come to lie where this one's were.
        close()
    sizes = {n: (folder / n).stat().st_size for n in files}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": sizes, "aliases": aliases}, indent=1))


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    # Files from before torch 1.6 are no zip archives and cannot be mapped into memory.
    mapped = zipfile.is_zipfile(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError as e:
        # Of torch's long message only the cause: the rest is advice to load the file without restrictions.
        cause = re.search(r"WeightsUnpickler error: (.*)", str(e))
        reason = cause[1] if cause else type(e).__name__
        raise InputError(
            f"{path} is refused by torch's restricted loader: it holds more than tensors, or is damaged ({reason}); {INSTEAD}"
        ) from e
    except (RuntimeError, EOFError, ValueError, KeyError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(f"{path} is no whole file of PyTorch weights ({reason}); fetch it again") from e
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds a {type(loaded).__name__}, expected tensors by name; {INSTEAD}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            raise InputError(f"{path} holds a {type(value).__name__} under {name!r}, expected tensors by name; {INSTEAD}")
        yield name, value
