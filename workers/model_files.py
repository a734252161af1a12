"""Which files of a model's folder or hub repository are read. Standard library only; shared with the driver.

Weights are safetensors where there are any; PyTorch's pickled files are taken only where there are none, never both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

SMALL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
)
"""Files besides the weights that make up a model's identity."""


@dataclass(frozen=True)
class WeightFormat:
    single: str
    """The file of unsharded weights."""
    index: str
    """The JSON that names the shards."""


SAFETENSORS = WeightFormat("model.safetensors", "model.safetensors.index.json")
PICKLED = WeightFormat("pytorch_model.bin", "pytorch_model.bin.index.json")
MAX_HEADER = 100_000_000
"""The limit of the format safetensors for a file's JSON header, in bytes."""
ITEM_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1},
}
"""Of types in a safetensors file."""
EXPECTED = f"{SAFETENSORS.single}, {SAFETENSORS.index} with its shards, or {PICKLED.single} ({PICKLED.index})"


@dataclass(frozen=True)
class Weights:
    format: WeightFormat
    files: tuple[str, ...]
    """Names relative to the folder, sorted."""
    index: str | None = None
    """Where the weights are sharded."""

    @property
    def identity(self) -> tuple[str, ...]:
        """The files that make up the weights' identity."""
        return self.files if self.index is None else (self.index, *self.files)


def find_weights(has: Callable[[str], bool], read: Callable[[str], str]) -> Weights | None:
    """The weight files of a model, given whether a file is there and its text; None where there are none.

    Files that an index names need not be there. Raises ValueError for an index that cannot be read.
    """
    for form in (SAFETENSORS, PICKLED):
        if has(form.index):
            return Weights(form, shards(form.index, read(form.index)), form.index)
        if has(form.single):
            return Weights(form, (form.single,))
    return None


def shards(index: str, text: str) -> tuple[str, ...]:
    """The files an index names. Raises ValueError."""
    try:
        return tuple(sorted(set(json.loads(text)["weight_map"].values())))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{index} is no index of weight shards ({type(e).__name__}: {e}); fetch it again") from e


def weights_in(folder: Path) -> Weights | None:
    """As `find_weights`, of a folder."""
    return find_weights(lambda name: (folder / name).is_file(), lambda name: (folder / name).read_text())


def safetensors_header(path: Path) -> dict[str, Any]:
    """What a whole safetensors file says of each tensor, by name: 8 bytes of header length, a JSON header, then the data.

    Raises ValueError, which says what is wrong with the file and what to do.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        start = f.read(8)
        length = int.from_bytes(start, "little") if len(start) == 8 else 0
        if length > MAX_HEADER:
            raise ValueError(f"{path} is not a safetensors file: its header would have {length} bytes; fetch it again")
        raw = f.read(length)
    if size < 8 + length:
        raise ValueError(f"{path} is truncated: expected at least {8 + length} bytes, got {size}; fetch it again")
    try:
        header = {name: t for name, t in json.loads(raw).items() if name != "__metadata__"}
        expected = 8 + length + max((int(t["data_offsets"][1]) for t in header.values()), default=0)
        misplaced = _misplaced(header)
    except (ValueError, AttributeError, TypeError, LookupError):
        raise ValueError(f"{path} is not a safetensors file: its header is no JSON object of tensors; fetch it again") from None
    if size != expected:
        what = "is truncated" if size < expected else "is damaged"
        raise ValueError(f"{path} {what}: expected {expected} bytes, got {size}; fetch it again")
    if misplaced is not None:
        why = "is not right after the tensor before it, or has not the bytes of its shape"
        raise ValueError(f"{path} is damaged: by its header {misplaced} {why}; fetch it again")
    return header


def _misplaced(header: Mapping[str, Any]) -> str | None:
    """A tensor that does not start where the one before ends, or has not the bytes of its shape. Types that are not known here are left
    to safetensors. Raises TypeError, ValueError, LookupError for what is no description of a tensor."""
    end = 0
    for name, tensor in sorted(header.items(), key=lambda entry: entry[1]["data_offsets"]):
        start, stop = tensor["data_offsets"]
        size = ITEM_BYTES.get(tensor["dtype"])
        if start != end or stop < start or (size is not None and stop - start != math.prod(map(index, tensor["shape"])) * size):
            return name
        end = stop
    return None
