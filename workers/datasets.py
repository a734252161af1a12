"""Texts: from a location to documents, from documents to tokens, from tokens to calibration samples and batches.

Rows of a .jsonl (or .json with one object a line) and of hub data sets are documents as they are, empty ones included,
since the perplexity protocol joins them all. Plain text is cut by `TextSpec.split`, and blank documents are left out.

WikiText's rows are lines. For statistics, which resample documents, an article is put together again (`document_starts`).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.checkpoint import bad_config, hub_status, locate, passes
from workers.errors import InputError, Unreachable
from workers.request import Location
from workers.specs import CalibrationSpec, TextSpec

Tokenizer = Callable[..., Any]
"""A tokenizer of transformers: text ▸ mapping with `input_ids`, and with `offset_mapping` where it is asked for and can tell."""

SPLITS: dict[str, Callable[[str], list[str]]] = {
    "rows": lambda text: text.splitlines(),
    "paragraphs": lambda text: [p.strip("\n") for p in re.split(r"\n[ \t]*\n", text)],
    "endoftext": lambda text: [p.strip() for p in text.split("<|endoftext|>")],
    "whole": lambda text: [text],
}
JSON_SUFFIXES = (".jsonl", ".json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
HEADING = re.compile(r"= (?!= )\S.*(?<! =) =")
"""Of an article of WikiText, without the spaces around: one `=` on either side. Sections have two and more."""
MARK = "\ufeff"
"""That some editors put before UTF-8 (a byte order mark): no part of the text."""
COMMIT = re.compile(r"[0-9a-f]{40}")
MISSES = 1000
"""Random documents in a row that are too short before sampling=documents gives up."""


def load_documents(location: Location, spec: TextSpec) -> list[str]:
    """Documents of a text, after skip_documents and documents. Raises InputError."""
    found = _hub_rows(location, spec) if location.kind == "hub_dataset" else _file_documents(Path(location.path), spec)
    end = None if spec.documents is None else spec.skip_documents + spec.documents
    chosen = found[spec.skip_documents : end]
    if not any(chosen):
        raise InputError(
            f"{location.path}: no text is left of {len(found)} documents after skip_documents={spec.skip_documents}, "
            f"documents={spec.documents}; lower text.skip_documents or give a longer text"
        )
    return chosen


def _file_documents(path: Path, spec: TextSpec) -> list[str]:
    if not path.is_file():
        raise InputError(f"text {path} is not a file; give a .jsonl or .txt file")
    try:
        text = path.read_text(encoding="utf-8").removeprefix(MARK)
    except UnicodeDecodeError as e:
        raise InputError(f"text {path} is not UTF-8 (byte {e.start}); convert it to a .jsonl or .txt file in UTF-8") from e
    if not text.strip():
        raise InputError(f"text {path} is empty; give a text of at least one window of tokens")
    if path.suffix in JSON_SUFFIXES:
        return _json_rows(path, text, spec.field)
    _refuse_json(path, text, spec.field)
    if spec.split not in SPLITS:
        raise InputError(f"text.split={spec.split!r}; allowed: {', '.join(sorted(SPLITS))}")
    return [d for d in SPLITS[spec.split](text) if d.strip()]


def _refuse_json(path: Path, text: str, field: str | None) -> None:
    """A key is made of what a file says, not of its name: read as plain text here, a copy named .jsonl would find the same scores."""
    try:
        _field(json.loads(text.lstrip("\n ").split("\n", 1)[0]), field, "")
    except (ValueError, InputError):
        return
    raise InputError(f"text {path} holds rows of JSON with {field!r}; name it .jsonl to read them, or set text.field=null for plain text")


def _json_rows(path: Path, text: str, field: str | None) -> list[str]:
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            if _is_json(text):
                raise InputError(f"{path} holds one JSON value over several lines; expected one object a line (JSONL): write it so") from e
            raise InputError(f"{path}, line {number}, is not JSON ({e}); the file may be truncated, copy it again") from e
    return [_field(row, field, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _field(row: Any, field: str | None, where: str) -> str:
    if not isinstance(row, dict):
        raise InputError(f"{where} is a JSON {type(row).__name__}; expected one object a line (JSONL): write it so")
    keys = ", ".join(sorted(row))
    if field is None:
        raise InputError(f"{where}: rows of JSON need text.field, the key of the text; this row has {keys}")
    if field not in row:
        raise InputError(f"{where} has no text under {field!r}; it has {keys}; set text.field")
    if not isinstance(row[field], str):
        raise InputError(f"{where} has {type(row[field]).__name__} under {field!r}, expected text; set text.field, or take such rows out")
    text = str(row[field])
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(
            f"{where} has half a surrogate pair ({text[e.start]!a} at character {e.start}), which no tokenizer takes; expected whole "
            "characters: remove it or the row"
        ) from e
    return text


def _hub_rows(location: Location, spec: TextSpec) -> list[str]:
    import datasets
    from huggingface_hub import constants

    options = location.options
    split = options.get("split") or "train"
    files = options.get("data_files")
    try:
        rows = datasets.load_dataset(
            location.path,
            name=options.get("config"),
            split=split,
            revision=location.revision,
            data_files=None if files is None else {split: files},
            # The sizes the data set publishes are those of whole splits, not of chosen files.
            verification_mode=None if files is None else "no_checks",
        )
    except (ConnectionError, FileNotFoundError, ValueError) as e:
        if isinstance(e, ConnectionError) and not constants.HF_HUB_OFFLINE:
            raise
        status = hub_status(e)
        if status is not None and passes(status):  # the library says that there is no such data set
            raise Unreachable(
                f"data set {location.path} at {location.revision}: {constants.ENDPOINT} answers with {status}; run again when it gives it, "
                "or set data_dir= (or BITGRID_DATA) or text.path="
            ) from e
        offline = "HF_HUB_OFFLINE is set and it is not in the local cache; " if constants.HF_HUB_OFFLINE else ""
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise InputError(
            f"data set {location.path} at {location.revision} cannot be read: {offline}{reason}. "
            "Set data_dir= (or BITGRID_DATA), text.path=, or let the hub be reached"
        ) from e
    other = _other_commit(rows.cache_files, location.revision)
    if other is not None:
        raise InputError(
            f"data set {location.path}: commit {location.revision} is asked for, the local cache holds {other}, and the hub cannot be "
            "reached. Let it be reached once, or set data_dir= (or BITGRID_DATA) or text.path="
        )
    if spec.field is None or spec.field not in rows.column_names:
        raise InputError(
            f"data set {location.path} has columns {', '.join(rows.column_names)}, not text.field={spec.field}; set it to one of these"
        )
    end = None if spec.documents is None else min(len(rows), spec.skip_documents + spec.documents)
    found: list[Any] = rows[:end][spec.field]
    odd = next((i for i, text in enumerate(found) if not isinstance(text, str)), None)
    if odd is not None:
        raise InputError(
            f"data set {location.path}, row {odd + 1}, has {type(found[odd]).__name__} under {spec.field!r}, expected text; "
            "set text.field, or take the rows before it with text.documents"
        )
    return found


def _other_commit(files: Sequence[Mapping[str, str]], revision: str | None) -> str | None:
    """The commit that rows come from, where it is not the one asked for: a hub out of reach makes datasets take the latest that it has.

    The folder that holds a hub data set's cached files is named by its commit."""
    if revision is None or not COMMIT.fullmatch(revision):
        return None
    folders = (Path(f["filename"]).parent.name for f in files)
    return next((name for name in folders if COMMIT.fullmatch(name) and name != revision), None)


def load_tokenizer(location: Location) -> Tokenizer:
    """The model's own tokenizer; bytes for an RWKV model of 256 tokens without one. Raises InputError where its folder has none, or
    files that are no tokenizer's."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    folder = locate(location)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if _reads_bytes(folder):
            return byte_tokens
        raise InputError(f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the model's tokenizer files there")
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, MemoryError, ImportError):
        raise  # say what is wrong themselves
    except StrictDataclassError as e:  # it reads config.json, too
        raise bad_config(folder, "configuration", e) from e
    except Exception as e:  # whatever a parser, Rust's included, makes of a damaged file
        there = [name for name in (*TOKENIZER_FILES, "tokenizer_config.json") if (folder / name).is_file()]
        remedy, reason = "copy these files again", f"{type(e).__name__}: {e}"
        if there[0].endswith(".model") and find_spec("sentencepiece") is None:
            # Without it transformers takes the file for one of another kind, whose package it asks for.
            remedy, reason = (
                "`pip install sentencepiece`, or copy the model's tokenizer.json there",
                f"{there[0]} needs the package sentencepiece",
            )
        raise InputError(f"the tokenizer of {folder} ({', '.join(there)}) cannot be read: {reason}; {remedy}") from e
    return tokenizer


def byte_tokens(text: str, return_offsets_mapping: bool = False, **_: Any) -> dict[str, Any]:
    """A tokenizer whose tokens are the bytes of UTF-8. All bytes of a character have its offsets, as in transformers."""
    found: dict[str, Any] = {"input_ids": list(text.encode())}
    if return_offsets_mapping:
        found["offset_mapping"] = [(i, i + 1) for i, c in enumerate(text) for _ in c.encode()]
    return found


def _reads_bytes(folder: Path) -> bool:
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    return config.get("model_type") == "rwkv" and config.get("vocab_size") == 256


def tokenize(tokenizer: Tokenizer, text: str) -> Tensor:
    """One call for the whole text ▸ tokens `[L]` int64; a beginning token comes once, if the tokenizer adds it."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class TokenizedText:
    tokens: Tensor
    """`[L]` int64."""
    documents: Tensor | None
    """`[L]` int64, never falling: of which document each token is. None where the tokenizer does not tell offsets."""


def tokenize_documents(tokenizer: Tokenizer, documents: Sequence[str], join: str) -> TokenizedText:
    """`tokenize` of the joined documents, with the document of every token: the one its last character lies in.

    So what joins two documents counts to the first, as does a token for the beginning to the first of all; a token that holds
    both the end of what joins and the start of the next document counts to the next. Documents are those of `document_starts`.
    """
    text = join.join(documents)
    if tokenizer is not byte_tokens and not getattr(tokenizer, "is_fast", False):
        return TokenizedText(tokenize(tokenizer, text), None)
    encoded = tokenizer(text, verbose=False, return_offsets_mapping=True)
    begins = [0, *accumulate(len(d) + len(join) for d in documents)]
    starts = torch.tensor([begins[i] for i in document_starts(documents)])
    # Ends, not starts: some tokenizers leave the space before a word out of its range. Added tokens have the range (0, 0), wherever
    # they stand.
    ends = torch.tensor([end for _, end in encoded["offset_mapping"]]).cummax(0).values
    of = torch.searchsorted(starts, ends) - 1  # starts below the end, less one: the last document that has begun
    return TokenizedText(torch.tensor(encoded["input_ids"], dtype=torch.int64), of.clamp(min=0))


def document_starts(documents: Sequence[str]) -> list[int]:
    """Which of the documents begin one that stands for itself, ascending.

    All do, but where rows are lines of articles: then those that are a heading ` = Title = ` between blank rows (blank rows may
    have been left out of plain text). What is not blank before the first heading is a document, too.
    """
    blank = [not d.strip() for d in documents]
    around, spaced = [True, *blank, True], any(blank)
    headings = [i for i, d in enumerate(documents) if HEADING.fullmatch(d.strip())]
    found = [i for i in headings if not spaced or (around[i] and around[i + 2])]
    if not found:
        return list(range(len(documents)))
    return found if all(blank[: found[0]]) else [0, *found]


def calibration_tokens(location: Location, spec: CalibrationSpec, tokenizer: Tokenizer) -> Tensor:
    """Calibration samples `[S, T]` int64, drawn with Python's `random.Random(seed)` as the GPTQ repository does.

    windows: start randint(0, L - T - 1) in the joined text of L tokens; documents: random documents until one has more
    than T tokens, then a random window in it; sequential: the first S windows. Raises InputError on too short a text.
    """
    if spec.samples < 1 or spec.sequence_length < 2:
        raise InputError(
            f"calibration.samples={spec.samples}, sequence_length={spec.sequence_length}: at least 1 sample of 2 tokens is needed"
        )
    if spec.sampling not in SAMPLINGS:
        raise InputError(f"calibration.sampling={spec.sampling!r}; allowed: {', '.join(sorted(SAMPLINGS))}")
    return SAMPLINGS[spec.sampling](load_documents(location, spec.text), spec, tokenizer, location.path)


def _windows(documents: Sequence[str], spec: CalibrationSpec, tokenizer: Tokenizer, where: str) -> Tensor:
    tokens = tokenize(tokenizer, spec.text.join.join(documents))
    length = spec.sequence_length
    if len(tokens) <= length:
        raise InputError(
            f"calibration text {where} has {len(tokens)} tokens; windows of calibration.sequence_length={length} need more: "
            "lower it or give a longer text"
        )
    rng = random.Random(spec.seed)
    starts = [rng.randint(0, len(tokens) - length - 1) for _ in range(spec.samples)]
    return torch.stack([tokens[i : i + length] for i in starts])


def _documents(documents: Sequence[str], spec: CalibrationSpec, tokenizer: Tokenizer, where: str) -> Tensor:
    rng, length = random.Random(spec.seed), spec.sequence_length
    known: dict[int, Tensor] = {}
    samples: list[Tensor] = []
    for _ in range(spec.samples):
        for _ in range(MISSES):
            index = rng.randint(0, len(documents) - 1)
            if index not in known:
                known[index] = tokenize(tokenizer, documents[index])
            if len(known[index]) > length:
                break
        else:
            longest = max(len(t) for t in known.values())
            raise InputError(
                f"calibration text {where}: none of {MISSES} random documents has more than calibration.sequence_length={length} "
                f"tokens (the longest seen has {longest}); lower it, or set calibration.sampling=windows"
            )
        start = rng.randint(0, len(known[index]) - length - 1)
        samples.append(known[index][start : start + length])
    return torch.stack(samples)


def _sequential(documents: Sequence[str], spec: CalibrationSpec, tokenizer: Tokenizer, where: str) -> Tensor:
    tokens = tokenize(tokenizer, spec.text.join.join(documents))
    needed = spec.samples * spec.sequence_length
    if len(tokens) < needed:
        raise InputError(
            f"calibration text {where} has {len(tokens)} tokens; {spec.samples} consecutive windows of {spec.sequence_length} need "
            f"{needed}: lower calibration.samples or sequence_length, or give a longer text"
        )
    return tokens[:needed].view(spec.samples, spec.sequence_length)


SAMPLINGS: dict[str, Callable[[Sequence[str], CalibrationSpec, Tokenizer, str], Tensor]] = {
    "windows": _windows,
    "documents": _documents,
    "sequential": _sequential,
}


def batches(sequences: Tensor, batch_tokens: int) -> list[Tensor]:
    """`[S, T, ...]` in consecutive parts of at most `batch_tokens` tokens, of one sequence at least."""
    return list(torch.split(sequences, max(1, batch_tokens // sequences.shape[1])))
