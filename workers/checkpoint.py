"""A model's folder on this machine: configuration, safetensors shards, their headers, and what can be wrong with them."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import InputError
from workers.request import Location

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.model", "vocab*", "merges*"]
MAX_HEADER = 100_000_000
"""The format's own limit for the JSON header, in bytes."""


@dataclass(frozen=True)
class TensorEntry:
    file: Path
    bytes: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """Checked headers of all shards; no tensor is read."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    """Checkpoint name ▸ where it is and its size as stored."""

    @property
    def bytes(self) -> int:
        return sum(t.bytes for t in self.tensors.values())


def locate(location: Location) -> Path:
    """Folder of the model: as given, or the hub snapshot at the given commit (HF_HUB_OFFLINE is respected)."""
    if location.kind == "folder":
        folder = Path(location.path)
        if not folder.is_dir():
            raise InputError(f"model folder {folder} does not exist; give the folder that holds config.json and model.safetensors")
        return folder
    if location.kind == "hub_model":
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(location.path, revision=location.revision, allow_patterns=HUB_FILES))
        except LocalEntryNotFoundError as e:
            raise InputError(
                f"model {location.path} at {location.revision} is not in the local hub cache and cannot be downloaded ({e}); "
                "download it once with a network, or give a folder"
            ) from e
    raise InputError(f"a model cannot be at a location of kind {location.kind!r}; allowed: folder, hub_model")


def open_checkpoint(location: Location) -> Checkpoint:
    """Raises InputError for a missing or truncated file, a shard that the index names and the folder lacks, or pickled weights."""
    folder = locate(location)
    config = _json(folder / "config.json", "the model's configuration")
    tensors: dict[str, TensorEntry] = {}
    for shard in _shards(folder):
        tensors.update(_header(shard))
    index = folder / INDEX
    if index.is_file():
        missing = sorted(set(_json(index, "the shard index")["weight_map"]) - set(tensors))
        if missing:
            raise InputError(f"{index} names {len(missing)} tensors that no shard holds, first {missing[0]}; fetch the model again")
    return Checkpoint(folder, config, tensors)


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(_json(index, "the shard index")["weight_map"].values()))
        for name in names:
            if not (folder / name).is_file():
                raise InputError(f"{folder / name} is missing; {INDEX} names {len(names)} shards; fetch the model again")
        return [folder / n for n in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder} holds only pickled weights ({', '.join(pickles)}), which are never loaded because unpickling runs code; "
            "convert once where you trust the file: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}; give the folder of a model in safetensors format")


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as e:
        raise InputError(f"{path} ({what}) is missing") from e
    except ValueError as e:
        raise InputError(f"{path} ({what}) is not JSON: {e}") from e
    if not isinstance(data, dict):
        raise InputError(f"{path} ({what}) holds a {type(data).__name__}, expected an object")
    return data


def _header(path: Path) -> dict[str, TensorEntry]:
    """Entries of a safetensors file: 8 bytes of header length, a JSON header, then the data."""
    actual = path.stat().st_size
    with path.open("rb") as f:
        first = f.read(8)
        if len(first) < 8:
            raise InputError(f"{path} is truncated: expected at least 8 bytes, got {actual}; fetch it again")
        (length,) = struct.unpack("<Q", first)
        if length > MAX_HEADER:
            raise InputError(f"{path} is not a safetensors file: its header would have {length} bytes")
        raw = f.read(length)
    if len(raw) < length:
        raise InputError(f"{path} is truncated: expected at least {8 + length} bytes, got {actual}; fetch it again")
    try:
        header = json.loads(raw)
    except ValueError as e:
        raise InputError(f"{path} is not a safetensors file: its header is not JSON ({e})") from e
    header.pop("__metadata__", None)
    expected = 8 + length + max((e["data_offsets"][1] for e in header.values()), default=0)
    if actual < expected:
        raise InputError(f"{path} is truncated: expected {expected} bytes, got {actual}; fetch it again")
    return {name: TensorEntry(path, e["data_offsets"][1] - e["data_offsets"][0], tuple(e["shape"])) for name, e in header.items()}
