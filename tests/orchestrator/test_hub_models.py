"""Hub models from a local cache, offline: planned under the digests of the same files in a folder, and run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SourceError
from orchestrator.fingerprint import digest
from orchestrator.sources import Sources
from tests import fake_hub
from tests.hub_cache import COMMIT, into_cache, pickled_copy
from tests.orchestrator.sweeping import ROOT, overrides
from tests.tiny_models import tiny_model
from workers.artifact import file_digest

HUB = ("model=opt_125m", "method=rtn", "scheme=w4a16_channel", "task.params.window=32", "hints.threads=1")


def plain_environment(tmp_path: Path) -> dict[str, str]:
    left = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "BITGRID_"))}
    here = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "BITGRID_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    return {**left, **here, "OMP_NUM_THREADS": "1"}


def run(tmp_path: Path, *arguments: str, environment: dict[str, str] | None = None, verb: str = "run") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", verb, "-m", *overrides(tmp_path / "store", *HUB, *arguments)],
        cwd=tmp_path,
        env=environment or plain_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=200,
    )


def folder_digest(folder: Path) -> str:
    return Sources(None, None, None)._local_model("m", folder).digest


def models_of(store: Path) -> dict[str, Any]:
    (plan,) = (store / "sweeps").glob("*/plan.json")
    return dict(json.loads(plan.read_text())["models"])


@pytest.mark.parametrize("form", ["safetensors", "pickled"])
def test_only_needed_files_are_fetched_from_a_hub_that_answers(form: str, tmp_path: Path) -> None:
    folder = pickled_copy(tiny_model("opt"), tmp_path / "m", strip="model." if form == "pickled" else "")
    wanted = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    if form == "safetensors":
        (folder / "model.safetensors").write_bytes((tiny_model("opt") / "model.safetensors").read_bytes())
    for name in ("flax_model.msgpack", "tf_model.h5", "README.md"):
        (folder / name).write_bytes(b"not wanted")
    with fake_hub.serve("org/tiny", folder) as hub:
        environment = {**plain_environment(tmp_path), "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        done = run(tmp_path, "model.hub.id=org/tiny", "model.hub.revision=main", environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    weights = "model.safetensors" if form == "safetensors" else "pytorch_model.bin"
    assert hub.fetched - {"generation_config.json"} == {*wanted, weights}
    ((found, model),) = models_of(tmp_path / "store").items()
    assert found == folder_digest(folder)
    assert model["location"]["revision"] == fake_hub.COMMIT
    if form == "safetensors":
        # What was fetched is enough to plan offline, under the same keys.
        again = run(tmp_path, "model.hub.id=org/tiny", f"model.hub.revision={fake_hub.COMMIT}", verb="plan")
        assert "everything is cached" in again.stdout, again.stdout + again.stderr
        return
    records = [json.loads(p.read_text()) for p in (tmp_path / "store" / "objects" / "quantize").glob("*/*/record.json")]
    assert [any("pytorch_model.bin: converted" in n or "converted before" in n for n in r["notes"]) for r in records] == [True]


def test_a_branch_is_resolved_to_its_commit(tmp_path: Path) -> None:
    into_cache(tiny_model("llama"), tmp_path / "hf" / "hub", "org/tiny")
    code = (
        "from orchestrator.hub import describe_model; from workers.artifact import file_digest; import sys;"
        "found = describe_model('org/tiny', 'main', file_digest); print(found.revision, sorted(found.files), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=plain_environment(tmp_path), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{COMMIT} ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json'] False"


def test_a_hub_model_that_is_not_cached_says_what_to_do(tmp_path: Path) -> None:
    done = run(tmp_path, "model.hub.id=org/absent", f"model.hub.revision={COMMIT}")
    assert done.returncode == 2
    assert "HF_HUB_OFFLINE" in done.stderr
    assert "models_dir=" in done.stderr
    assert "Traceback" not in done.stderr


def test_only_the_weights_that_are_read_count(tmp_path: Path) -> None:
    both = pickled_copy(tiny_model("llama"), tmp_path / "both")
    (both / "model.safetensors").write_bytes((tiny_model("llama") / "model.safetensors").read_bytes())
    assert folder_digest(both) == folder_digest(tiny_model("llama"))


def test_identity_of_pickled_weights_is_the_digest_of_their_files(tmp_path: Path) -> None:
    folder = pickled_copy(tiny_model("opt"), tmp_path / "m", shards=2)
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", "pytorch_model.bin.index.json"]
    names += ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    assert folder_digest(folder) == digest({n: file_digest(folder / n) for n in names})


@pytest.mark.parametrize(("keep", "said"), [(100, "truncated"), (-100, "truncated"), (0, "no file of PyTorch weights")])
def test_truncated_pickled_weights_are_told_while_planning(keep: int, said: str, tmp_path: Path) -> None:
    folder = pickled_copy(tiny_model("opt"), tmp_path / "m")
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(SourceError, match=said):
        folder_digest(folder)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = pickled_copy(tiny_model("opt"), tmp_path / "m", shards=2)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(SourceError, match=r"lacks pytorch_model-00002-of-00002.bin, which pytorch_model.bin.index.json names"):
        folder_digest(folder)
