"""Artifacts exported to the AutoGPTQ format and to dense folders. The real auto-gptq reads them in tests/auto_gptq."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant.scheme import ActivationScheme, Granularity, WeightScheme
from tests.tiny_models import build, save_tokenizer
from tests.workers.stage_runs import calibrated, context, quantize_spec, quantized
from workers.errors import InputError
from workers.export import FORMATS, ExportError, run
from workers.export.__main__ import main, program
from workers.export.model import as_half, open_model, read_quantized
from workers.recipe import Recipe

G16 = WeightScheme(4, granularity=Granularity.GROUP, group_size=16)
SIZES = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build("llama", **SIZES).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rtn")
    return quantized(context(model, folder), folder / "a", quantize_spec(weight=G16), {})[0]


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 `[R, C]` whose codes do not cross words ▸ `[R * 32 / bits, C]`."""
    shifts = torch.arange(0, 32, bits)
    return (words.to(torch.int64)[:, None, :] >> shifts[None, :, None] & (2**bits - 1)).reshape(-1, words.shape[1])


def read_linear(tensors: dict[str, Tensor], name: str, bits: int) -> Tensor:
    """The weight `[N, K]`, float32, as the format defines it."""
    codes = unpacked(tensors[f"{name}.qweight"], bits)
    zeros = (unpacked(tensors[f"{name}.qzeros"].T.contiguous(), bits).T + 1) % 2**bits
    groups = tensors[f"{name}.g_idx"].long()
    return (tensors[f"{name}.scales"].float()[groups] * (codes - zeros[groups])).T


def test_the_checkpoint_holds_the_very_weights(model: Path, artifact: Path, tmp_path: Path) -> None:
    report = run("auto_gptq", artifact, model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    stored = read_quantized(artifact, model).linears
    assert report.linears == len(stored) == 14
    for name, tensor in stored.items():
        assert torch.equal(read_linear(tensors, name, 4), tensor.dequantize())
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    config = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert {k: config[k] for k in ("bits", "group_size", "desc_act", "sym")} == {
        "bits": 4,
        "group_size": 16,
        "desc_act": False,
        "sym": False,
    }


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_who_may_read_it_is_said_by_the_umask(mask: int, model: Path, artifact: Path, tmp_path: Path) -> None:
    """Temporary folders, and files of safetensors, are made for their owner alone."""
    before = os.umask(mask)
    try:
        run("dense", artifact, model, tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()} == {0o666 & ~mask}


@pytest.mark.parametrize(
    ("propagation", "params", "told"),
    [
        ("original", {"damp": 0.05}, (0.05, False, False)),
        ("quantized", {"static_groups": True, "damp": 1.5}, (0.01, True, False)),  # readers refuse 1 and more
        ("quantized", {"true_sequential": True}, (0.01, False, True)),
    ],
)
def test_the_configuration_says_how_the_codes_were_found(propagation: str, params: dict, told: tuple, model: Path, tmp_path: Path) -> None:
    work = context(model, tmp_path)
    inputs = calibrated(work, tmp_path / "statistics", "hessian") if propagation == "original" else {}
    artifact = quantized(work, tmp_path / "a", quantize_spec("gptq", weight=G16, propagation=propagation, **params), inputs)[0]
    run("auto_gptq", artifact, model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert (config["damp_percent"], config["static_groups"], config["true_sequential"]) == told
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == config
    (artifact / "spec.json").unlink()
    with pytest.raises(InputError, match=r"spec\.json does not say how the model was quantized"):
        run("auto_gptq", artifact, model, tmp_path / "again")


def test_rounding_to_nearest_is_not_true_sequential(model: Path, artifact: Path, tmp_path: Path) -> None:
    run("auto_gptq", artifact, model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text())["true_sequential"] is False


def test_a_folded_norm_is_exported_folded(model: Path, tmp_path: Path) -> None:
    work = context(model, tmp_path)
    inputs = calibrated(work, tmp_path / "statistics", "absmean", "samples")
    artifact = quantized(work, tmp_path / "a", quantize_spec("rtn", "awq", weight=G16), inputs)[0]
    report = run("auto_gptq", artifact, model, tmp_path / "out")
    assert "rounded to float16" in " ".join(report.notes)
    opened = open_model(Recipe(artifact), model)
    name = "input_layernorm.weight"
    folded = opened.load(0).get_parameter(name)
    found = load_file(tmp_path / "out" / "model.safetensors")[f"model.layers.0.{name}"]
    assert torch.equal(found, folded.half())
    assert not torch.equal(found, load_file(model / "model.safetensors")[f"model.layers.0.{name}"].half())


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (quantize_spec(weight=G16, pattern="*mlp*"), "8 of 14 linears are not quantized"),
        (quantize_spec(weight=WeightScheme(5)), "5 bits; the format has 2, 3, 4 and 8"),
        (quantize_spec("hqq", weight=G16), "zero points of kind 'float'; the format stores integers within the codes"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_leaves_nothing(model: Path, tmp_path: Path, spec, reason: str) -> None:
    artifact = quantized(context(model, tmp_path), tmp_path / "a", spec, {})[0]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ExportError, match=f"{reason}.*; use the format dense$"):
        run("auto_gptq", artifact, model, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_family_that_auto_gptq_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build("rwkv", hidden_size=64, attention_hidden_size=64, intermediate_size=96).save_pretrained(folder)
    artifact = quantized(context(folder, tmp_path), tmp_path / "a", quantize_spec(weight=G16), {})[0]
    with pytest.raises(ExportError, match=r"no rwkv models, only bloom, .*; use the format dense"):
        run("auto_gptq", artifact, folder, tmp_path / "out")
    run("dense", artifact, folder, tmp_path / "out")


@pytest.mark.parametrize("form", ["auto_gptq", "dense"])
def test_static_ranges_that_are_left_out_are_noted(form: str, model: Path, tmp_path: Path) -> None:
    spec = quantize_spec(weight=G16, activation=ActivationScheme(8, granularity=Granularity.TENSOR, dynamic=False))
    artifact = quantized(context(model, tmp_path), tmp_path / "a", spec, {})[0]
    assert "static activation ranges are left out" in " ".join(run(form, artifact, model, tmp_path / "out").notes)


def test_a_used_folder_and_an_unknown_format_are_refused(model: Path, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ExportError, match="not an empty folder"):
        run("auto_gptq", artifact, model, tmp_path)
    with pytest.raises(ExportError, match="allowed: auto_gptq, dense"):
        run("gguf", artifact, model, tmp_path / "out")
    with pytest.raises(ExportError, match=r"no folder can be made in .*file.*--out"):
        run("auto_gptq", artifact, model, tmp_path / "file" / "out")


@pytest.mark.parametrize("form", ["auto_gptq", "dense"])
def test_a_disk_that_is_full_is_told_and_leaves_nothing(form: str, model: Path, artifact: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ExportError, match=r"out was not written: .*File too large.*--out"):
            run(form, artifact, model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["auto_gptq", "dense"])
def test_a_head_of_its_own_is_not_called_tied(form: str, model: Path, artifact: Path, tmp_path: Path) -> None:
    """transformers 5 keeps both where config.json ties them and the tensors differ; 4.44 would drop the head."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    head = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    for source, tied in ((folder, False), (model, True)):
        out = tmp_path / f"out_{tied}"
        run(form, artifact, source, out)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
    assert torch.equal(load_file(tmp_path / "out_False" / "model.safetensors")["lm_head.weight"], head.half())


def test_values_beyond_float16_are_refused() -> None:
    with pytest.raises(ExportError, match="norm has values that float16 cannot hold"):
        as_half({"norm": torch.tensor([1e6])})


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_neox"])
def test_a_dense_export_is_an_ordinary_model(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build(family, **SIZES).save_pretrained(folder)
    save_tokenizer(folder)
    artifact = quantized(context(folder, tmp_path), tmp_path / "a", quantize_spec(weight=G16), {})[0]
    run("dense", artifact, folder, tmp_path / "out")
    # Names of old files, which every version reads.
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(load_file(folder / "model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    opened = open_model(Recipe(artifact), folder)
    for i in range(opened.structure.count):
        opened.load(i)
    rebuilt = dict(opened.model.named_parameters())
    found = dict(loaded.named_parameters())
    assert set(found) == set(rebuilt)
    assert all(torch.equal(found[n], rebuilt[n].half().float()) for n in found)


def test_a_dense_export_that_old_transformers_would_misread_says_so(model: Path, artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": yarn}))
    assert "rope scaling 'yarn'" in " ".join(run("dense", artifact, folder, tmp_path / "yarn").notes)
    assert "transformers" not in " ".join(run("dense", artifact, model, tmp_path / "plain").notes)


@pytest.mark.parametrize("own_file", [True, False])
def test_generation_settings_are_the_model_s_own(own_file: bool, model: Path, artifact: Path, tmp_path: Path) -> None:
    """Old models have them in config.json."""
    folder, settings = Path(shutil.copytree(model, tmp_path / "model")), {"do_sample": True, "temperature": 0.7, "max_length": 50}
    (folder / "generation_config.json").unlink()
    path = folder / ("generation_config.json" if own_file else "config.json")
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **settings}))
    run("dense", artifact, folder, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.to_dict()
    assert {k: found[k] for k in settings} == settings
    assert found == AutoModelForCausalLM.from_pretrained(folder).generation_config.to_dict()


def test_the_command_prints_a_report_or_the_reason(model: Path, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--format", "auto_gptq", "--artifact", str(artifact), "--model", str(model), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["format"], report["linears"]) == ("auto_gptq", 14)
    assert report["bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert main(arguments) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert main([*arguments, "--format", "gptq"]) == 2
    assert capsys.readouterr().err == "unknown export format 'gptq'; allowed: auto_gptq, dense\n"


def test_a_corrupt_artifact_is_told_with_how_to_make_it_again(
    model: Path, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(artifact, tmp_path / "broken"))
    next((broken / "payload").glob("*.safetensors")).write_bytes(b"nothing")
    assert main(["--format", "dense", "--artifact", str(broken), "--model", str(model), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "differs from its recorded digest" in said
    assert f"remove {broken} and run the sweep again" in said


def test_an_export_that_is_told_to_stop_leaves_nothing_and_says_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[Path] = []

    def stopped(artifact: Path, model: Path, staging: Path) -> tuple[int, list[str]]:
        (staging / "begun").touch()
        begun.extend(tmp_path.glob(".export-*/begun"))
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it goes on")

    monkeypatch.setitem(FORMATS, "dense", stopped)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            program(["--format", "dense", "--artifact", str(tmp_path), "--model", str(model), "--out", str(tmp_path / "out")])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 128 + signal.SIGTERM
    assert len(begun) == 1
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""
