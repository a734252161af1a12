"""What the model hub says of a repository at a commit: file digests from its metadata, without downloading weights.

Only small files (configuration, tokenizer) are fetched, since planning reads them. With HF_HUB_OFFLINE=1 the local cache answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers.model_files import EXPECTED, SMALL_FILES, find_weights, weights_in

OUT_OF_REACH = "check the network, unset HF_HUB_OFFLINE"
"""What to do where the hub has not answered."""


@dataclass(frozen=True)
class HubModel:
    files: dict[str, str] | None
    """File name ▸ SHA-256; None when neither hub nor cache could answer."""
    revision: str | None = None
    """Resolved commit."""
    config: Mapping[str, Any] = field(default_factory=dict)
    weight_bytes: int = 0
    reason: str = ""
    """Why there are no files."""
    remedy: str = OUT_OF_REACH


def describe_model(repository: str, revision: str | None, file_digest: Callable[[Path], str]) -> HubModel:
    """Digests of a hub model's files at its resolved commit; equal to those of the same files in a folder."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _from_cache(repository, revision, file_digest)
    try:
        return _from_hub(repository, revision, file_digest)
    except Exception as e:  # any network or hub error: the cache may still answer
        cached = _from_cache(repository, revision, file_digest)
        lines = str(e).splitlines() or [""]
        reason = f"{type(e).__name__}: {lines[0][:200]}"
        return cached if cached.files is not None else HubModel(None, reason=reason, remedy=_remedy(e, repository))


def _remedy(error: Exception, repository: str) -> str:
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return f"ask for access on {ENDPOINT}/{repository}, then log in: `hf auth login`, or HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "correct model.hub.id; a private repository needs `hf auth login`, or HF_TOKEN"
    return "correct model.hub.revision" if isinstance(error, RevisionNotFoundError) else OUT_OF_REACH


def _from_hub(repository: str, revision: str | None, file_digest: Callable[[Path], str]) -> HubModel:
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=10)
    there = {s.rfilename: s for s in info.siblings or []}

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(repository, name, revision=info.sha))

    weights = find_weights(there.__contains__, lambda name: fetch(name).read_text())
    missing = [n for n in ("config.json", *(weights.files if weights else ())) if n not in there]
    if weights is None or missing:
        lacks = ", ".join(missing) or f"weights; expected {EXPECTED}"
        return HubModel(None, info.sha, reason=f"at {info.sha} it lacks {lacks}", remedy="take another model.hub.revision")
    files, size = {}, 0
    for name in (*(n for n in SMALL_FILES if n in there), *weights.identity):
        lfs = there[name].lfs
        large = lfs is not None and name in weights.files
        files[name] = lfs.sha256 if large and lfs is not None else file_digest(fetch(name))
        size += (there[name].size or 0) if name in weights.files else 0
    return HubModel(files, info.sha, json.loads(fetch("config.json").read_text()), size)


def _from_cache(repository: str, revision: str | None, file_digest: Callable[[Path], str]) -> HubModel:
    from huggingface_hub import snapshot_download

    try:
        # The named file only: the library refuses a snapshot that lacks files which nobody needs.
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=["config.json"]))
    except Exception as e:  # not cached, however the library says it
        return HubModel(None, reason=f"the hub is out of reach or HF_HUB_OFFLINE is set, and the local cache lacks it ({type(e).__name__})")
    try:
        weights = weights_in(folder)
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as e:
        return HubModel(None, reason=f"the local cache {folder} cannot be read ({e})")
    missing = [n for n in weights.files if not (folder / n).is_file()] if weights else []
    if weights is None or missing:
        return HubModel(None, reason=f"the local cache {folder} lacks {', '.join(missing) or 'the weights'}")
    names = (*(n for n in SMALL_FILES if (folder / n).is_file()), *weights.identity)
    files = {n: file_digest(folder / n) for n in names}
    return HubModel(files, folder.name, config, sum((folder / n).stat().st_size for n in weights.files))
