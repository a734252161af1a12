"""What the model hub says of a repository at a commit: file digests from its metadata, without downloading weights.

Only small files (configuration, tokenizer) are fetched, since planning reads them. With HF_HUB_OFFLINE=1 the local cache answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers.artifact import file_digest

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
    "model.safetensors.index.json",
)
"""Files besides the weights that make up a model's identity."""


@dataclass(frozen=True)
class HubModel:
    files: dict[str, str] | None
    """File name ▸ SHA-256; None when neither hub nor cache could answer."""
    revision: str | None = None
    """Resolved commit."""
    config: Mapping[str, Any] = field(default_factory=dict)
    weight_bytes: int = 0
    reason: str = ""


def describe_model(repository: str, revision: str | None) -> HubModel:
    """Digests of a hub model's files at its resolved commit; equal to those of the same files in a folder."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    if constants.HF_HUB_OFFLINE:
        return _from_cache(repository, revision)
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=10)
        files, size = {}, 0
        for sibling in info.siblings or []:
            if sibling.rfilename in SMALL_FILES:
                files[sibling.rfilename] = file_digest(Path(hf_hub_download(repository, sibling.rfilename, revision=info.sha)))
            elif sibling.rfilename.endswith(".safetensors") and "/" not in sibling.rfilename and sibling.lfs is not None:
                files[sibling.rfilename] = sibling.lfs.sha256
                size += sibling.lfs.size
        config = json.loads(Path(hf_hub_download(repository, "config.json", revision=info.sha)).read_text())
    except Exception as e:  # any network or hub error: the cache may still answer
        cached = _from_cache(repository, revision)
        return cached if cached.files is not None else HubModel(None, reason=f"{type(e).__name__}: {str(e).splitlines()[0][:200]}")
    if not any(f.endswith(".safetensors") for f in files):
        return HubModel(None, info.sha, reason="the repository has no *.safetensors; name a revision that has them (refs/pr/...)")
    return HubModel(files, info.sha, config, size)


def _from_cache(repository: str, revision: str | None) -> HubModel:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except Exception as e:  # not cached, however the library says it
        return HubModel(None, reason=f"the hub is out of reach or HF_HUB_OFFLINE is set, and the local cache lacks it ({type(e).__name__})")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        return HubModel(None, reason=f"the local cache {folder} is incomplete")
    small = [folder / n for n in SMALL_FILES if (folder / n).is_file()]
    files = {p.name: file_digest(p) for p in [*small, *weights]}
    return HubModel(files, folder.name, json.loads((folder / "config.json").read_text()), sum(p.stat().st_size for p in weights))
