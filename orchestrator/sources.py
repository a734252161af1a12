"""Model and text options ▸ content digests and locations. Nothing is downloaded here but small files of a hub model.

A model is found, in this order: `model.path`, the folder `models_dir/<folder or option name>`, the copy shipped with bitgrid, the
hub at the commit named in the option. A text likewise: `text.path`, `data_dir/<file>`, the shipped copy, the hub.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zipfile
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import workers
from orchestrator.cell import Option
from orchestrator.errors import SourceError
from orchestrator.fingerprint import digest
from orchestrator.hub import describe_model
from orchestrator.places import expanded
from workers.artifact import file_digest
from workers.model_files import EXPECTED, SAFETENSORS, SMALL_FILES, Weights, safetensors_header, weights_in
from workers.request import Location

ASSETS = Path(workers.__file__).parent / "assets"
SIZES = (
    *("hidden_size", "n_embd", "n_embed", "word_embed_proj_dim", "attention_hidden_size"),
    *("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"),
    *("num_hidden_layers", "n_layer", "num_experts", "num_local_experts"),
    *("num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads", "head_dim"),
    *("max_position_embeddings", "n_positions", "vocab_size"),
)
"""Keys of a model's config.json that planning computes with."""


@dataclass(frozen=True)
class ModelSource:
    name: str
    digest: str
    location: Location
    config: Mapping[str, Any]
    """config.json."""
    weight_bytes: int
    """Of all weight files."""
    provisional: bool = False
    """The hub could not be asked: planned under the digest of the name and commit, and cannot run."""


@dataclass(frozen=True)
class TextSource:
    digest: str
    location: Location


@dataclass
class Sources:
    """Finds models and texts, each once."""

    models_dir: Path | None
    data_dir: Path | None
    cache_file: Path | None
    """Digests by path, size and modification time, so that large files are read once; None writes nothing."""
    cache_read_only: bool = False
    allow_provisional: bool = False
    notes: list[str] = field(default_factory=list)
    """Each model and text that the folder given does not hold, with what is used instead; each model that the hub does not give."""
    _models: dict[int, ModelSource] = field(default_factory=dict)
    _texts: dict[str, TextSource] = field(default_factory=dict)
    _cache: dict[str, str] | None = None

    def __post_init__(self) -> None:
        for name, variable, folder in (("models_dir", "BITGRID_MODELS", self.models_dir), ("data_dir", "BITGRID_DATA", self.data_dir)):
            if folder is not None and not folder.is_dir():
                raise SourceError(f"{name}={folder} is not a folder; correct it, or {variable}; {name}=null: shipped copies and the hub")

    def model(self, option: Option) -> ModelSource:
        if id(option) not in self._models:
            self._models[id(option)] = self._find_model(option)
        return self._models[id(option)]

    def text(self, option: Option) -> TextSource:
        source = option.values["text"]
        name = digest(json.loads(json.dumps(source)))
        if name not in self._texts:
            self._texts[name] = self._find_text(option, source)
        return self._texts[name]

    def _find_model(self, option: Option) -> ModelSource:
        values = option.values
        folder = values.get("folder") or option.file
        tried = []
        if values.get("path"):
            return self._local_model(option.name, expanded(values["path"]))
        if self.models_dir is not None:
            for name in dict.fromkeys((folder, option.file)):
                candidate = self.models_dir / name
                if candidate.is_dir():
                    return self._local_model(option.name, candidate)
                tried.append(str(candidate))
        if values.get("asset"):
            self._note(f"model {option.file}", "models_dir", tried, "the shipped copy")
            return self._local_model(option.name, ASSETS / values["asset"])
        if values.get("hub"):
            self._note(f"model {option.file}", "models_dir", tried, f"{values['hub']['id']} of the hub")
            return self._hub_model(option.name, values["hub"])
        there = _folders(self.models_dir)
        raise SourceError(
            f"model {option.name!r} was not found: looked for {', '.join(tried) or 'models_dir (not set)'}"
            + (f"; models_dir holds {', '.join(there)}" if there else "")
            + ". Set models_dir= (or BITGRID_MODELS) to the folder that holds it, or model.path= to its own folder"
        )

    def _local_model(self, name: str, folder: Path) -> ModelSource:
        if not folder.is_dir():
            raise SourceError(f"model {name!r}: {folder} is not a folder; give a folder with config.json and the weights")
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise SourceError(f"model {name!r}: {folder} has no config.json; give a folder saved with save_pretrained")
        try:
            config = json.loads(config_file.read_text())
        except ValueError as e:
            raise SourceError(f"model {name!r}: {config_file} is not JSON ({e}); copy it again") from e
        check_config(f"model {name!r}: {config_file}", config)
        weights = _weight_files(name, folder)
        for file in weights.files:
            check = check_safetensors if weights.format is SAFETENSORS else check_pickled
            check(folder / file)
        present = [*(f for f in SMALL_FILES if (folder / f).is_file()), *weights.identity]
        digests = {name: self._file_digest(folder / name) for name in present}
        return ModelSource(
            name=name,
            digest=digest(digests),
            location=Location(kind="folder", path=str(folder.resolve())),
            config=config,
            weight_bytes=sum((folder / f).stat().st_size for f in weights.files),
        )

    def _hub_model(self, name: str, hub: Mapping[str, Any]) -> ModelSource:
        repository, revision = str(hub["id"]), hub.get("revision")
        found = describe_model(repository, revision, self._file_digest)
        location = Location(kind="hub_model", path=repository, revision=found.revision or revision)
        if found.files is None:
            told = f"model {name!r}: {repository} cannot be had from the hub ({found.reason})"
            if not self.allow_provisional:
                raise SourceError(f"{told}; {found.remedy}, or put the model into a folder and set models_dir=")
            self.notes.append(f"{told}, keys are provisional; {found.remedy}")
            return ModelSource(name, digest({"hub": repository, "revision": revision}), location, {}, 0, provisional=True)
        check_config(f"model {name!r}: config.json of {repository}", found.config)
        return ModelSource(name, digest(found.files), location, found.config, found.weight_bytes)

    def _find_text(self, option: Option, source: Mapping[str, Any]) -> TextSource:
        tried = []
        if source.get("path"):
            return self._local_text(option, expanded(source["path"]))
        if self.data_dir is not None and source.get("file"):
            candidate = self.data_dir / source["file"]
            if candidate.is_file():
                return self._local_text(option, candidate)
            tried.append(str(candidate))
        if source.get("asset"):
            self._note(f"text of {option.axis} {option.file}", "data_dir", tried, "the shipped copy")
            return self._local_text(option, ASSETS / source["asset"])
        if source.get("hub"):
            self._note(f"text of {option.axis} {option.file}", "data_dir", tried, f"{source['hub']['id']} of the hub")
            hub = dict(source["hub"])
            _check_commit(option, hub)
            options = {k: v for k, v in hub.items() if k not in ("id", "revision")}
            location = Location(kind="hub_dataset", path=hub["id"], revision=hub.get("revision"), options=options)
            return TextSource(digest({"hub": hub}), location)
        raise SourceError(
            f"{option.axis} {option.name!r}: its text was not found: looked for "
            f"{', '.join(tried) or str(source.get('file')) + ' in data_dir (not set)'}. "
            f"Set data_dir= (or BITGRID_DATA) to the folder that holds it, or {option.axis}.text.path= to the file"
        )

    def _note(self, what: str, folder: str, tried: Sequence[str], instead: str) -> None:
        note = f"{what}: {folder} has no {' and no '.join(tried)}; {instead} is used"
        if tried and note not in self.notes:
            self.notes.append(note)

    def _local_text(self, option: Option, path: Path) -> TextSource:
        if not path.is_file():
            raise SourceError(f"{option.axis} {option.name!r}: {path} is not a file; set {option.axis}.text.path= to a .jsonl or .txt file")
        if path.stat().st_size == 0:
            raise SourceError(f"{option.axis} {option.name!r}: {path} is empty; give a text with at least one window of tokens")
        found = self._file_digest(path)[:32]
        if _is_marked(path):
            found = digest({"text": found, "mark": "left out"})  # earlier versions took it for a character of plain text
        # Under its own name, which says whether it holds rows of JSON: what it is a link to, as in the hub's cache, may say nothing.
        return TextSource(found, Location(kind="file", path=str(path.absolute())))

    def _file_digest(self, path: Path) -> str:
        if self._cache is None:
            self._cache = _read_cache(self.cache_file)
        stat = path.stat()
        name = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if name not in self._cache:
            self._cache[name] = file_digest(path)
            if self.cache_file is not None and not self.cache_read_only:
                # Where it cannot be written, files are only read again the next time.
                with contextlib.suppress(OSError):
                    _write_cache(self.cache_file, self._cache)
        return self._cache[name]


def _is_marked(path: Path) -> bool:
    """Whether a byte order mark stands before the text, which is read without it."""
    with path.open("rb") as f:
        return f.read(len(BOM_UTF8)) == BOM_UTF8


def _check_commit(option: Option, hub: Mapping[str, Any]) -> None:
    """A text's key is made of where it is, not of what it says: only a commit keeps both together. Raises SourceError."""
    repository, revision = hub["id"], hub.get("revision")
    if not re.fullmatch(r"[0-9a-f]{40}", str(revision)):
        raise SourceError(
            f"{option.axis} {option.name!r}: text.hub.revision={'null' if revision is None else revision} of the data set {repository} may "
            f"be another text tomorrow; set {option.axis}.text.hub.revision= to a commit, 40 hexadecimal digits. The newest one: python -c "
            f"\"from huggingface_hub import HfApi; print(HfApi().dataset_info('{repository}').sha)\""
        )


def _folders(parent: Path | None) -> list[str]:
    if parent is None or not parent.is_dir():
        return []
    return sorted(p.name for p in parent.iterdir() if p.is_dir())


def _read_cache(path: Path | None) -> dict[str, str]:
    """What is no digest there is left out, and found again from its file."""
    try:
        found = {} if path is None else json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if re.fullmatch(r"[0-9a-f]{64}", str(v))} if isinstance(found, dict) else {}


def _write_cache(path: Path, digests: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    try:
        draft.write_text(json.dumps(digests, indent=0))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _weight_files(name: str, folder: Path) -> Weights:
    try:
        weights = weights_in(folder)
    except ValueError as e:
        raise SourceError(f"model {name!r}: {folder}: {e}") from e
    if weights is None:
        there = ", ".join(sorted(p.name for p in folder.iterdir()))
        raise SourceError(f"model {name!r}: {folder} holds no weights: got {there}; expected {EXPECTED}")
    missing = [f for f in weights.files if not (folder / f).is_file()]
    if missing:
        raise SourceError(f"model {name!r}: {folder} lacks {', '.join(missing)}, which {weights.index} names; copy the missing shards")
    return weights


def check_config(where: str, config: Any) -> None:
    """Raises SourceError for what is no model's configuration: planning computes with its numbers."""
    if not isinstance(config, Mapping):
        raise SourceError(f"{where} holds no mapping; copy it again")
    if not isinstance(config.get("model_type"), (str, type(None))):
        raise SourceError(f"{where}: model_type={config['model_type']!r} is no name; copy it again")
    for key in SIZES:
        value = config.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise SourceError(f"{where}: {key}={value!r} is no whole number from 1; copy it again")


def check_pickled(path: Path) -> None:
    """Raises SourceError for what cannot be a whole file of PyTorch weights; a zip archive's directory stands at its end."""
    with path.open("rb") as f:
        start = f.read(4)
    if start[:2] == b"PK" and not zipfile.is_zipfile(path):
        size = path.stat().st_size
        raise SourceError(f"{path} is truncated: got {size} bytes without the directory that ends the archive; copy it again")
    if start[:2] != b"PK" and start[:1] != b"\x80":
        raise SourceError(f"{path} is no file of PyTorch weights: it starts with {start!r}, as no zip or pickle does; copy it again")


def check_safetensors(path: Path) -> None:
    """Raises SourceError for what is no whole safetensors file."""
    try:
        safetensors_header(path)
    except ValueError as e:
        raise SourceError(str(e)) from e
