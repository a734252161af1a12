"""A model's folder on this machine: configuration, weight files, their headers, and what can be wrong with them.

Pickled weights are read through their conversion to safetensors (`workers.convert`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from workers.convert import convert_once
from workers.errors import InputError, Unreachable
from workers.model_files import EXPECTED, PICKLED, SAFETENSORS, SMALL_FILES, Weights, safetensors_header, weights_in
from workers.request import Location

HUB_FILES = (*SMALL_FILES, "generation_config.json", "tokenizer*", "*.model", "chat_template*", "additional_chat_templates/*")
"""Fetched of every hub model besides its weights."""
FLOATS = ("F16", "BF16", "F32", "F64")
"""Types of weights, as safetensors names them."""
TRY_LATER = (408, 429)
"""HTTP's request timeout and too many requests."""


@dataclass(frozen=True)
class TensorEntry:
    file: Path
    bytes: int
    shape: tuple[int, ...]
    name: str
    """In the file; another than the checkpoint's own where two names share one tensor."""
    dtype: str
    """As safetensors names it: F32, BF16, I8, F8_E4M3, ..."""


@dataclass(frozen=True)
class Checkpoint:
    """Checked headers of all shards; no tensor is read."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    """Checkpoint name ▸ where it is and its size as stored."""
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Of all tensors; one with two names counts once."""
        return sum(t.bytes for t in {(t.file, t.name): t for t in self.tensors.values()}.values())


def bad_config(folder: Path, what: str, error: Exception) -> InputError:
    """Of a config.json from which transformers makes no `what`."""
    said = f"transformers makes no {what} of it ({type(error).__name__}: {' '.join(str(error).split())})"
    return InputError(f"{folder / 'config.json'}: {said}; correct it, or copy it again")


def locate(location: Location) -> Path:
    """Folder of the model: as given, or the hub snapshot at the given commit (HF_HUB_OFFLINE is respected)."""
    if location.kind == "folder":
        folder = Path(location.path)
        if not folder.is_dir():
            raise InputError(f"model folder {folder} does not exist; give the folder that holds config.json and model.safetensors")
        return folder
    if location.kind == "hub_model":
        return _snapshot(location.path, location.revision)
    raise InputError(f"a model cannot be at a location of kind {location.kind!r}; allowed: folder, hub_model")


@lru_cache(maxsize=64)
def _snapshot(repository: str, revision: str | None) -> Path:
    """The hub's cache folder with the small files and one format of the weights: safetensors, or else the pickled ones."""
    folder = _fetch(repository, revision, (*HUB_FILES, SAFETENSORS.single, SAFETENSORS.index, PICKLED.index))
    weights = _weights(folder)
    if weights is None:  # nothing but, at most, a single pickled file
        _fetch(repository, revision, (PICKLED.single,))
    elif not all((folder / n).is_file() for n in weights.files):
        _fetch(repository, revision, weights.files)
    return folder


def _fetch(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except (LocalEntryNotFoundError, HfHubHTTPError) as e:
        if not constants.HF_HUB_OFFLINE and _may_pass(e):
            raise Unreachable(
                f"model {repository} at {revision}: it is not in the local hub cache and {constants.ENDPOINT} does not answer "
                f"({type(e.__cause__ or e).__name__}); run again when it does, or put the model into a folder and set models_dir="
            ) from e
        offline = "HF_HUB_OFFLINE is set and " if constants.HF_HUB_OFFLINE else ""
        raise InputError(
            f"model {repository} at {revision}: {offline}it is not in the local hub cache and cannot be fetched "
            f"({type(e).__name__}); download it once with a network, or put it into a folder and set models_dir="
        ) from e


def _may_pass(error: Exception) -> bool:
    """Whether asking the hub again later may help: no answer at all, a server in trouble, too many requests."""
    status = hub_status(error)
    return status is None or passes(status)


def hub_status(error: BaseException | None) -> int | None:
    """What the hub answered by HTTP, of an exception or those behind it; None where it did not."""
    while error is not None:
        answer = getattr(error, "response", None)
        if answer is not None:
            return int(answer.status_code)
        error = error.__cause__ or error.__context__
    return None


def passes(status: int) -> bool:
    return status >= 500 or status in TRY_LATER


def open_checkpoint(location: Location) -> Checkpoint:
    """Raises InputError for a missing or truncated file, a shard that the index names and the folder lacks, or pickled weights
    that torch's restricted loader refuses."""
    folder = locate(location)
    config = _json(folder / "config.json", "the model's configuration")
    weights = _weights(folder)
    if weights is None:
        raise InputError(f"{folder} holds no weights: got {_names(folder)}; expected {EXPECTED}")
    missing = [n for n in weights.files if not (folder / n).is_file()]
    if missing:
        raise InputError(f"{folder / missing[0]} is missing; {weights.index} names {len(weights.files)} shards; fetch the model again")
    files = tuple(folder / n for n in weights.files)
    aliases: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    if weights.format is PICKLED:
        converted = convert_once(files)
        files, aliases, notes = converted.files, converted.aliases, (converted.note,)
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        tensors.update(_header(file))
    tensors.update({alias: tensors[name] for alias, name in aliases.items()})
    if weights.index is not None:
        lacking = sorted(set(_json(folder / weights.index, "the shard index")["weight_map"]) - set(tensors))
        if lacking:
            raise InputError(
                f"{folder / weights.index} names {len(lacking)} tensors that no shard holds, first {lacking[0]}; fetch the model again"
            )
    return Checkpoint(folder, config, tensors, notes)


def require_floats(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Raises InputError for a quantized weight under a weight's own name: codes would be taken for values, without their scales."""
    for entry in (checkpoint.tensors[name] for name in names):
        if entry.dtype not in FLOATS:
            raise InputError(
                f"{entry.file} stores {entry.name} as {entry.dtype}, expected {', '.join(FLOATS)}: it is quantized already; give the "
                "unquantized model"
            )


def unread(checkpoint: Checkpoint, read: Collection[str], known: Iterable[str] | None) -> tuple[str, ...]:
    """A note on tensors that are read into nothing, none where there are none. known: patterns of such as older checkpoints hold."""
    patterns = (*(known or ()), r"rotary_emb\.inv_freq", r"\.masked_bias$")
    left = sorted(n for n in checkpoint.tensors if n not in read and not any(re.search(p, n) for p in patterns))
    return (f"{len(left)} tensors of the checkpoint have no place in the model of its config.json, first {left[0]}",) if left else ()


def _weights(folder: Path) -> Weights | None:
    try:
        return weights_in(folder)
    except ValueError as e:
        raise InputError(f"{folder}: {e}") from e


def _names(folder: Path) -> str:
    return ", ".join(sorted(p.name for p in folder.iterdir())) or "an empty folder"


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as e:
        raise InputError(f"{path} ({what}) is missing; fetch the model again") from e
    except ValueError as e:
        raise InputError(f"{path} ({what}) is not JSON: {e}; fetch the model again") from e
    if not isinstance(data, dict):
        raise InputError(f"{path} ({what}) holds a {type(data).__name__}, expected an object; fetch the model again")
    return data


def _header(path: Path) -> dict[str, TensorEntry]:
    try:
        header = safetensors_header(path)
    except ValueError as e:
        raise InputError(str(e)) from e
    return {
        name: TensorEntry(path, e["data_offsets"][1] - e["data_offsets"][0], tuple(e["shape"]), name, str(e.get("dtype")))
        for name, e in header.items()
    }
