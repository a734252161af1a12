"""Bad input: the message says what was got, what is allowed and what to do; no traceback; what was finished stays."""

from __future__ import annotations

import errno
import html
import json
import os
import re
import shlex
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.errors import PlanError, SourceError, StoreError, StoreLockedError, StoreVersionError
from orchestrator.lease import Lease
from orchestrator.results import StageResult
from orchestrator.run import SweepRun
from orchestrator.stage import Status
from orchestrator.store import FORMAT, Store
from tests.orchestrator.sweeping import bitgrid, committed, overrides, scores, sweep, told
from tests.shared import shared_path
from tests.tiny_models import tiny_model

TINY = ("scheme=w4a16_channel", "task.params.window=32", "calibration.sequence_length=32")


def failures(run: SweepRun) -> dict[str, StageResult]:
    return {s.label: s for s in run.result.stages.values() if s.status is Status.FAILED}


def only_failure(run: SweepRun) -> tuple[str, str]:
    """(error class, message) of the one failed stage."""
    assert run.exit_code == 1
    (stage,) = failures(run).values()
    assert stage.failure is not None
    return stage.failure["error_class"], stage.failure["message"]


def changed(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


# --- models -------------------------------------------------------------------------------------------------------------


def test_a_folder_without_weights_is_told_with_what_is_expected(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"holds no weights: got config.json.*expected model.safetensors.*pytorch_model.bin"):
        sweep(tmp_path / "store", f"model.path={folder}")


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"absent is not a folder; give a folder with config.json"):
        sweep(tmp_path / "store", f"model.path={tmp_path / 'absent'}")


def test_a_truncated_model_file_is_told_with_both_sizes(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    file = folder / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(SourceError, match=rf"truncated: expected {size} bytes, got {size - 64}; fetch it again"):
        sweep(tmp_path / "store", f"model.path={folder}")


@pytest.mark.parametrize("header", [b"[1]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b'{"a": {"data_offsets": [0]}}', b"\xff\xfe"])
def test_a_file_of_another_kind_is_told(header: bytes, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(SourceError, match=r"is not a safetensors file: its header is no JSON object of tensors; fetch it again"):
        sweep(tmp_path / "store", f"model.path={folder}")


@pytest.mark.parametrize(
    "change",
    [
        lambda one, other: one.update(data_offsets=other["data_offsets"]),
        lambda one, other: one.update(shape=[2 * one["shape"][0], *one["shape"][1:]]),
        lambda one, other: one.update(dtype="F16"),
        lambda one, other: one.update(data_offsets=[-8, *one["data_offsets"][1:]]),
    ],
)
def test_a_header_that_lies_is_told_with_its_tensor(change: Callable[[Any, Any], None], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    one, other, *_ = (name for name in header if "q_proj" in name)
    change(header[one], header[other])
    lying = json.dumps(header).encode()
    file.write_bytes(len(lying).to_bytes(8, "little") + lying + raw[start:])
    with pytest.raises(SourceError, match=rf"{file} is damaged: by its header .*_proj.weight is not right after .*; fetch it again"):
        sweep(tmp_path / "store", f"model.path={folder}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: [config], "holds no mapping"),
        (lambda config: {**config, "model_type": ["llama"]}, r"model_type=\['llama'\] is no name"),
        (lambda config: {**config, "hidden_size": "32"}, "hidden_size='32' is no whole number from 1"),
        (lambda config: {**config, "num_attention_heads": 0}, "num_attention_heads=0 is no whole number from 1"),
        (lambda config: {**config, "max_position_embeddings": {}}, r"max_position_embeddings=\{\} is no whole number from 1"),
    ],
)
def test_a_configuration_of_another_form_is_told(change: Callable[[dict[str, object]], object], said: str, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    config = folder / "config.json"
    config.write_text(json.dumps(change(json.loads(config.read_text()))))
    with pytest.raises(SourceError, match=rf"config\.json.*{said}; copy it again"):
        sweep(tmp_path / "store", f"model.path={folder}")


def test_nan_weights_fail_their_model_and_no_other(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, :3] = float("nan")

    models = tmp_path / "models"
    changed(tiny_model("llama"), models / "stories260k", spoil)
    shutil.copytree(tiny_model("llama_mha"), models / "wikitext_llama")
    run = sweep(tmp_path / "store", f"models_dir={models}", "model=stories260k,wikitext_llama", "method=rtn", *TINY)
    assert run.exit_code == 1
    for stage in failures(run).values():
        assert stage.failure is not None
        assert stage.failure["error_class"] == "numerical"
        assert "model.layers.1.mlp.up_proj.weight hold 3 NaN or infinite values" in stage.failure["message"]
    finished = {s.label for s in run.result.stages.values() if s.status is Status.SUCCEEDED}
    assert {label.split()[1] for label in finished} == {"wikitext_llama"}
    assert len(finished) == 3
    assert {label.split()[1] for label in failures(run)} == {"stories260k"}


def test_a_model_that_fits_neither_whole_nor_by_block_says_how_much_it_needs(tmp_path: Path) -> None:
    run = sweep(tmp_path / "store", "method=rtn", f"model.path={tiny_model('llama')}", "hints.memory_bytes=20000", *TINY)
    assert run.exit_code == 1
    for stage in failures(run).values():
        assert stage.failure is not None
        assert stage.failure["error_class"] == "user"
        assert "not fit even block by block" in stage.failure["message"]
        assert "20000 are given; raise hints.memory_bytes" in stage.failure["message"]
    # It is a hint: with more memory the same sweep goes on.
    again = sweep(tmp_path / "store", "method=rtn", f"model.path={tiny_model('llama')}", "hints.memory_bytes=60000", *TINY)
    assert again.exit_code == 0
    assert again.plan.key == run.plan.key


def test_a_family_that_cannot_be_quantized_is_skipped_with_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny-rwkv4-660K"
    shutil.copytree(tiny_model("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    shutil.copytree(tiny_model("llama"), tmp_path / "models" / "wikitext_llama")
    run = sweep(tmp_path / "store", f"models_dir={folder.parent}", "model=tiny_rwkv,wikitext_llama", "method=rtn", *TINY)
    assert run.exit_code == 0
    (skipped,) = run.result.skipped
    assert "mamba" in skipped.reason
    assert "supported: " in skipped.reason
    assert run.report is not None
    assert skipped.reason in html.unescape(run.report.read_text())


def test_keys_and_values_of_the_real_rwkv_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="a rwkv model has no keys and values to quantize"):
        sweep(tmp_path / "store", f"models_dir={shared_path('models')}", "model=tiny_rwkv", "method=rtn", "scheme=w4a16kv4_g64")


def test_a_cache_in_a_single_pass_is_refused_in_plan_where_attention_cannot_show_it(tmp_path: Path) -> None:
    cache = ("scheme=w16a16kv2_kivi", "scheme.kv.group_size=8", "scheme.kv.residual_length=8")
    with pytest.raises(PlanError, match=r"single pass works on .*; use kv\.mode=decode for a gpt2 model"):
        sweep(tmp_path / "store", f"model.path={tiny_model('gpt2')}", "method=rtn", *TINY, *cache)


def test_the_real_rwkv_is_quantized_by_weight_only_methods(tmp_path: Path) -> None:
    """Bytes are its tokens."""
    where = (f"models_dir={shared_path('models')}", "model=tiny_rwkv", "method=rtn,gptq", "scheme=w4a16_g64,w8a16_g64")
    run = sweep(tmp_path / "store", *where, "task.params.window=32", "calibration.sequence_length=32")
    assert run.exit_code == 0
    kept = {label: value for (label, _, metric), value in scores(run).items() if metric == "nll"}
    unquantized = kept["tiny_rwkv · unquantized"]
    for method in ("rtn", "gptq"):
        near, far = (abs(kept[f"tiny_rwkv · {method} · {scheme}"] - unquantized) for scheme in ("w8a16_g64", "w4a16_g64"))
        assert near < far < 1.0


def test_a_group_that_divides_nothing_is_skipped_and_the_rest_runs(tmp_path: Path) -> None:
    run = sweep(tmp_path / "store", f"model.path={tiny_model('llama')}", "method=rtn", *TINY, "scheme=w4a16_g64,w4a16_channel")
    assert run.exit_code == 0
    (skipped,) = run.result.skipped
    assert "group size 64 does not divide 32, 48 inputs" in skipped.reason


# --- texts --------------------------------------------------------------------------------------------------------------


def test_an_empty_calibration_text_is_refused_while_planning(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(SourceError, match=r"calibration .*empty.txt is empty; give a text"):
        sweep(tmp_path / "store", "method=gptq", f"calibration.text.path={tmp_path / 'empty.txt'}")


@pytest.mark.parametrize(
    ("text", "said"),
    [(" \n\n", "is empty; give a text"), ("too short", "has 9 tokens; windows of calibration.sequence_length=32 need more")],
)
def test_a_calibration_text_that_is_too_short_fails_what_needs_it(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(text)
    run = sweep(tmp_path / "store", f"model.path={tiny_model('llama')}", "method=rtn,gptq", f"calibration.text.path={path}", *TINY)
    error_class, message = only_failure(run)
    assert error_class == "user"
    assert said in message
    assert sum(s.status is Status.SUCCEEDED for s in run.result.stages.values()) == 3


# --- the store ----------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_while_committing_loses_only_that_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The renaming of one commit answers as a full disk does."""
    plain, full = Path.rename, [True]

    def rename(source: Path, target: Path) -> None:
        if full[0] and "quantize" in target.parts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        plain(source, target)

    monkeypatch.setattr(Path, "rename", rename)
    arguments = (f"model.path={tiny_model('llama')}", "method=rtn", *TINY)
    store = tmp_path / "store"
    error_class, message = only_failure(sweep(store, *arguments))
    assert error_class == "disk_full"
    assert "No space left on device" in message
    assert "free space" in message
    assert "bitgrid resume" in message
    assert not list((store / "staging").iterdir())
    kept = committed(store)
    assert len(kept) == 1  # the baseline
    full[0] = False
    assert sweep(store, *arguments).exit_code == 0
    assert kept.items() <= committed(store).items()


def test_a_second_driver_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    store = Store(tmp_path / "store").open()
    with Lease(store.root / "lease.json", "bitgrid run"):
        done = bitgrid(tmp_path, "run", "-m", *overrides(store.root, "method=rtn,gptq"))
        shown = bitgrid(tmp_path, "status", "--store", str(store.root))
    assert done.returncode == 2
    assert f"is in use by bitgrid run on {socket.gethostname()} (process {os.getpid()}" in done.stderr
    assert "wait for it, stop it, or use another store=" in done.stderr
    assert "Traceback" not in done.stderr + shown.stderr
    assert not committed(store.root)
    with Lease(store.root / "lease.json", "bitgrid run"), pytest.raises(StoreLockedError):
        sweep(store.root, "method=rtn")


def test_a_store_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    store = tmp_path / "store"
    Store(store).open()
    (store / "store.json").write_text(json.dumps({"format": FORMAT + 1}))
    before = sorted(p.name for p in store.rglob("*"))
    with pytest.raises(StoreVersionError, match=rf"has format {FORMAT + 1}, this bitgrid reads up to {FORMAT}; use the newer bitgrid"):
        sweep(store, "method=rtn")
    assert sorted(p.name for p in store.rglob("*")) == before


@pytest.mark.parametrize("content", ["", "{}", "[]", "not json"])
def test_a_damaged_marker_of_the_store_is_told(content: str, tmp_path: Path) -> None:
    Store(tmp_path).open()
    (tmp_path / "store.json").write_text(content)
    with pytest.raises(StoreError, match=r"store\.json does not say"):
        Store(tmp_path).open()


def test_a_disk_that_is_full_for_the_driver_ends_it_with_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("orchestrator.run.write_sweep", full)
    with pytest.raises(StoreError, match=r"the disk of .*store is full: .*make free space there and run the sweep again"):
        sweep(tmp_path / "store", f"model.path={tiny_model('llama')}", "method=rtn", *TINY)


# --- MLflow -------------------------------------------------------------------------------------------------------------


@pytest.mark.mlflow
def test_an_mlflow_server_that_is_not_there_costs_nothing_but_a_reconcile(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = [f"model.path={tiny_model('llama')}", "method=rtn", *TINY, f"tracking.uri=http://127.0.0.1:{port}", "tracking.timeout_s=1"]
    run, said = told(tmp_path / "store", "tracking=mlflow_server", *arguments)
    assert run.exit_code == 0, said
    (typed,) = re.findall(r"nothing is lost: run `\S*bitgrid (reconcile \w+ --store .*)` later", said)
    assert shlex.split(typed)[2:] == ["--store", str(tmp_path / "store")]
    assert "Traceback" not in said + "".join(capfd.readouterr())
    assert len(committed(tmp_path / "store")) == 3


# --- the command line ---------------------------------------------------------------------------------------------------


def exit_code(*arguments: str) -> object:
    from orchestrator.cli import main

    try:
        return main(arguments)
    except SystemExit as e:
        return e.code


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["method=gtpq"], ["gtpq", "nearest: gptq", "rtn"]),
        (["metod=gptq"], ["metod", "nearest: method"]),
        (["method=gptq", "method.rounding.params.dampp=0.1"], ["dampp", "nearest: damp"]),
        (["method.rounding.params.damp=0.01,-1"], ["params.damp=-1", "gptq", "a number from 0"]),
        (["method.rounding.params.block_size=0"], ["params.block_size=0", "gptq", "a whole number from 1"]),
        (["method.rounding.params.damp=${calibration.dmp}"], ["method=gptq", "params.damp", "calibration.dmp", "not found"]),
        (["calibration.sampling=window"], ["window", "nearest: windows", "sequential"]),
        (["scheme.weight.bits=four"], ["bits", "four"]),
        (["hints.batch_token=3"], ["batch_token", "nearest: batch_tokens"]),
        (["hints.batch_tokens=many"], ["batch_tokens", "many"]),
        (["hints.batch_tokens=0"], ["batch_tokens", "0"]),
        (["hints.device=gpu7"], ["hints.device", "gpu7", "auto"]),
        (["hints.backend=tritn"], ["hints.backend", "tritn", "nearest: triton"]),
        (["hints.backend=cuda", "hints.device=cpu"], ["hints.backend=cuda", "hints.device=cpu", "hints.backend=auto"]),
        (["hints.backend=cpu", "hints.device=cuda:1"], ["hints.backend=cpu", "hints.device=cuda", "hints.device=cpu"]),
        (["cluster=in_proces"], ["in_proces", "nearest: in_process"]),
        (["cluster.threads=0"], ["cluster.threads=0", "from 1"]),
        (["tracking.kind=null"], ["tracking.kind", "None", "mlflow_server"]),
        (["store=null"], ["store=None", "leave store out"]),
        (["store=7"], ["store=7 is a whole number", "expected text like", r"store=\'7\'"]),
        (["models_dir=[a]"], ["models_dir=[a] is a list", "FOLDER"]),
        (["data_dir=true"], ["data_dir=true is true or false", "FOLDER"]),
        (["model.path=3"], ["model.path=3 is a whole number", "FOLDER"]),
        (["calibration.text.path={a:b}"], ["calibration.text.path={a:b} is a mapping", "FILE"]),
        (["cluster=ray_existing", "cluster.address=6379"], ["cluster.address=6379 is a whole number", "ADDRESS"]),
        (["tracking=mlflow_server", "tracking.uri=5000"], ["tracking.uri=5000 is a whole number", "ADDRESS"]),
        (["sweep.name=[a,b]"], ["sweep.name=[a,b] is a list", "NAME"]),
        (["scheme=auto", "budget=nan"], ["budget=nan", "budget=3.2"]),
        (["scheme=auto", "scheme.auto.budget=inf"], ["auto.budget=inf", "budget=3.2"]),
        (["--config-dir", "nowhere"], ["nowhere", "is not there"]),
        (["--config-name=nothing"], ["root config 'nothing' is not in"]),
        (["replicate.seed=one"], ["seed", "one"]),
        ([f"replicate.seed={2**63}"], [f"seed={2**63}", f"to {2**63 - 1}"]),
        ([f"calibration.seed={2**63 - 1}", "replicate.seed=1"], ["calibration", f"{2**63}", f"to {2**63 - 1}"]),
        (["calibration.seed=1", "replicate.seed=-2"], ["calibration", "seed with the replicate's added=-1", "from 0"]),
    ],
)
def test_what_is_misspelt_or_cannot_be_is_refused_with_what_can(
    arguments: list[str], said: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for verb in ("run", "plan"):
        assert exit_code(verb, "-m", *overrides(tmp_path / "store", "method=gptq", *arguments)) == 2
        shown = capfd.readouterr().err
        assert all(word in shown for word in said), shown
        assert "Traceback" not in shown
    assert not committed(tmp_path / "store")
    assert not list((tmp_path / "store").glob("sweeps/*"))


@pytest.mark.parametrize("sweep", ["zebra", "[a]", "3"])
def test_a_sweep_s_yaml_that_names_no_rules_is_told(
    sweep: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "sweep").mkdir(parents=True)
    (tmp_path / "conf" / "sweep" / "own.yaml").write_text(f"# @package _global_\nsweep: {sweep}\n")
    for verb in ("run", "plan"):
        assert exit_code(verb, "-m", "--config-dir", "conf", "sweep=own") == 2
        shown = capfd.readouterr().err
        assert "expected a mapping, as in conf/sweep/none.yaml; a name goes into sweep.name" in shown


def test_the_command_line_itself_ends_with_exit_code_2(tmp_path: Path) -> None:
    done = bitgrid(tmp_path, "run", "method=gtpq")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("bitgrid: ")
    assert not list(tmp_path.iterdir())
