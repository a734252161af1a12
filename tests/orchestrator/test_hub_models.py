"""Hub models from a local cache, offline: planned under the digests of the same files in a folder, and run."""

from __future__ import annotations

import json
import os
import re
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


def run(tmp_path: Path, *arguments: str, verb: str = "run") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", verb, "-m", *overrides(tmp_path / "store", *HUB, *arguments)],
        cwd=tmp_path,
        env=plain_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=200,
    )


def folder_digest(folder: Path) -> str:
    return Sources(None, None, None)._local_model("m", folder).digest


def models_of(store: Path) -> dict[str, Any]:
    (plan,) = (store / "sweeps").glob("*/plan.json")
    return dict(json.loads(plan.read_text())["models"])


RUNS = "import json, sys; from orchestrator.cli import main; sys.exit(max(main(line) for line in json.loads(sys.argv[1])))"


def test_only_needed_files_are_fetched_from_a_hub_that_answers(tmp_path: Path) -> None:
    # Two sweeps in one process: most of their time is that of the imports.
    tiny, store, pickled_store = tiny_model("opt"), tmp_path / "store", tmp_path / "pickled-store"
    both, pickled = pickled_copy(tiny, tmp_path / "both"), pickled_copy(tiny, tmp_path / "pickled", strip="model.")
    (both / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    for folder in (both, pickled):
        for name in ("flax_model.msgpack", "tf_model.h5", "README.md"):
            (folder / name).write_bytes(b"not wanted")
    with fake_hub.serve({"org/both": both, "org/pickled": pickled}) as hub:
        given = {store: "org/both", pickled_store: "org/pickled"}
        lines = [
            ["run", "-m", *overrides(folder, *HUB, f"model.hub.id={name}", "model.hub.revision=main")] for folder, name in given.items()
        ]
        environment = {**plain_environment(tmp_path), "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", RUNS, json.dumps(lines)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    read = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    wanted = {f"org/both/{n}" for n in (*read, "model.safetensors")} | {f"org/pickled/{n}" for n in (*read, "pytorch_model.bin")}
    assert {n for n in hub.fetched if not n.endswith("/generation_config.json")} == wanted
    for folder, source in ((store, both), (pickled_store, pickled)):
        ((found, model),) = models_of(folder).items()
        assert found == folder_digest(source)
        assert model["location"]["revision"] == fake_hub.COMMIT
    # What was fetched is enough to plan offline, under the same keys.
    again = run(tmp_path, "model.hub.id=org/both", f"model.hub.revision={fake_hub.COMMIT}", verb="plan")
    assert "everything is cached" in again.stdout, again.stdout + again.stderr
    (record,) = [json.loads(p.read_text()) for p in (pickled_store / "objects" / "quantize").glob("*/*/record.json")]
    assert any("pytorch_model.bin: converted" in n or "converted before" in n for n in record["notes"])


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
    # It can be planned; how long it takes, without its size, cannot be told.
    looked = run(tmp_path, "model.hub.id=org/absent", f"model.hub.revision={COMMIT}", verb="plan")
    assert looked.returncode == 0, looked.stderr
    assert "org/absent cannot be had from the hub" in looked.stdout
    assert "keys are provisional; check the network, unset HF_HUB_OFFLINE" in looked.stdout
    assert "1 cell, 2 variants; how much work it is depends on models whose size is not known" in " ".join(looked.stdout.split())
    assert not re.search(r"\d (s|B|kB|MB)\b", looked.stdout), looked.stdout


@pytest.mark.parametrize(
    ("refusal", "told"),
    [
        ((403, "GatedRepo"), "ask for access on {hub}/org/tiny, then log in: `hf auth login`, or HF_TOKEN"),
        ((404, "RepoNotFound"), "correct model.hub.id"),
        ((404, "RevisionNotFound"), "correct model.hub.revision"),
        ((503, None), "check the network, unset HF_HUB_OFFLINE"),
        (None, "take another model.hub.revision"),
    ],
)
def test_what_the_hub_answers_decides_what_to_do(refusal: Any, told: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code = (
        "from orchestrator.hub import describe_model; from workers.artifact import file_digest;"
        "found = describe_model('org/tiny', 'main', file_digest); assert found.files is None; print(found.remedy)"
    )
    with fake_hub.serve({"org/tiny": tmp_path / "empty"}, refusal=refusal) as hub:
        environment = {**plain_environment(tmp_path), "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(told.format(hub=hub.address))


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
