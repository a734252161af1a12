"""A model in the layout of the hub's local cache, and the same model with pickled weights."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def into_cache(model: Path, hub_cache: Path, repository: str) -> Path:
    """`models--org--name/{refs,blobs,snapshots/COMMIT}` with links to blobs; returns the snapshot."""
    root = hub_cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "refs", root / "blobs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for path in model.iterdir():
        content = path.read_bytes()
        blob = root / "blobs" / sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def pickled_copy(model: Path, folder: Path, shards: int = 1, tied: tuple[str, str] | None = None, strip: str = "") -> Path:
    """The model's folder with pytorch_model.bin in place of safetensors.

    `tied`: (new name, name) of a tensor saved twice by sharing its memory; `strip`: a prefix left out of the names.
    """
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = load_file(model / "model.safetensors")
    if tied is not None:
        tensors[tied[0]] = tensors[tied[1]]
    tensors = {n.removeprefix(strip): t for n, t in tensors.items()}
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names = sorted(tensors)
    files = {n: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, n in enumerate(names)}
    for file in set(files.values()):
        torch.save({n: tensors[n] for n in names if files[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder
