"""Statistics equal those of plain hooks on a plain forward pass, whatever is collected together and however it is batched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant.statistics import KINDS
from tests.tiny_models import FAMILIES, tiny_model
from tests.workers.stage_runs import (
    CALIBRATION,
    calibrated,
    calibration_text,
    context,
    model_with_a_dead_expert,
    plain_inputs,
    tiny_context,
)
from workers.calibrate import run_calibrate
from workers.capture import SAMPLE_TOKENS, check_kind, sample_sequences
from workers.errors import InputError, NumericalError
from workers.specs import CalibrateSpec, ModelSpec

DENSE = [f for f in FAMILIES if f != "mixtral"]


def stored(artifact: Path) -> dict[str, Tensor]:
    files = sorted((artifact / "payload").glob("block_*.safetensors"))
    return {name: t for f in files for name, t in load_file(f).items()}


@pytest.mark.parametrize("family", DENSE)
def test_statistics_equal_brute_force(family: str, tmp_path: Path) -> None:
    ctx = tiny_context(family, tmp_path)
    artifacts = calibrated(ctx, tmp_path, *KINDS)
    tokens = calibration_text(ctx, family)
    inputs = plain_inputs(family, tokens)
    sites = json.loads((artifacts["hessian"] / "payload" / "sites.json").read_text())["linears"]
    found = {kind: stored(path) for kind, path in artifacts.items()}
    for name, x in inputs.items():
        flat = x.reshape(-1, x.shape[-1]).double()
        want = {
            "hessian": 2 / tokens.shape[0] * flat.T @ flat,
            "absmax": flat.abs().amax(0),
            "absmean": flat.abs().mean(0),
            "samples": x.double(),
        }
        for kind, value in want.items():
            got = found[kind][sites[name]].double()
            # float32 sums of some 70 terms, batched otherwise than the reference
            torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


def test_statistics_of_experts_equal_brute_force(tmp_path: Path) -> None:
    ctx = tiny_context("mixtral", tmp_path)
    artifacts = calibrated(ctx, tmp_path, *KINDS)
    tokens = calibration_text(ctx, "mixtral")
    model = AutoModelForCausalLM.from_pretrained(tiny_model("mixtral"), experts_implementation="eager").eval()
    routed: list[tuple[Tensor, Tensor]] = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _m, args: routed.append((args[0], args[1])))
    with torch.no_grad():
        model(tokens, use_cache=False)
    for b, (hidden, chosen) in enumerate(routed):
        for e in range(4):
            x = hidden[(chosen == e).any(-1)]
            site = f"model.layers.{b}.mlp.experts.gate_up_proj.{e}"
            wide = x.double()
            torch.testing.assert_close(
                stored(artifacts["hessian"])[site].double(), 2 / tokens.shape[0] * wide.T @ wide, rtol=1e-4, atol=1e-5
            )
            assert stored(artifacts["samples"])[site].shape == (1, x.shape[0], 32)
            # The same tokens, in the order of the batches.
            torch.testing.assert_close(stored(artifacts["samples"])[site][0].sum(0), x.sum(0), rtol=1e-4, atol=1e-4)
        router = f"model.layers.{b}.mlp.gate"
        torch.testing.assert_close(stored(artifacts["absmax"])[router], hidden.abs().amax(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stored(artifacts["samples"])[router].flatten(0, 1), hidden, rtol=1e-5, atol=1e-6)
        assert router not in stored(artifacts["hessian"])


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_kinds_collected_together_equal_those_collected_alone(family: str, tmp_path: Path) -> None:
    together = calibrated(tiny_context(family, tmp_path), tmp_path / "together", *KINDS)
    for kind in KINDS:
        alone = calibrated(tiny_context(family, tmp_path), tmp_path / "alone", kind)[kind]
        for file in sorted((alone / "payload").iterdir()):
            assert file.read_bytes() == (together[kind] / "payload" / file.name).read_bytes()


def test_batching_changes_no_more_than_rounding(tmp_path: Path) -> None:
    one = calibrated(tiny_context("llama", tmp_path, batch_tokens=12), tmp_path / "one", "hessian")
    all_ = calibrated(tiny_context("llama", tmp_path, batch_tokens=4096), tmp_path / "all", "hessian")
    for name, h in stored(one["hessian"]).items():
        torch.testing.assert_close(h, stored(all_["hessian"])[name], rtol=1e-4, atol=1e-5 * float(h.abs().max()))


def test_hints_of_streaming_change_nothing(tmp_path: Path) -> None:
    plain = calibrated(tiny_context("llama", tmp_path), tmp_path / "plain", "hessian")
    streamed = calibrated(tiny_context("llama", tmp_path, streamed=True, memory_bytes=60_000), tmp_path / "streamed", "hessian")
    assert all(torch.equal(t, stored(streamed["hessian"])[n]) for n, t in stored(plain["hessian"]).items())


def test_the_summary_counts_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    spec = CalibrateSpec(ModelSpec("model"), CALIBRATION, "absmax")
    summary = run_calibrate({"k": (spec, tmp_path / "p")}, tiny_context("llama", tmp_path))["k"]
    assert summary["tokens"] == CALIBRATION.samples * CALIBRATION.sequence_length
    assert summary["sites"] == 2 * 4
    assert summary["bytes"] == sum(p.stat().st_size for p in (tmp_path / "p").iterdir())
    assert summary["peak_memory_bytes"] > 0


def test_samples_keep_whole_sequences_within_their_budget() -> None:
    assert sample_sequences(128, 512) == 16
    assert sample_sequences(128, 2048) == SAMPLE_TOKENS // 2048
    assert sample_sequences(128, 10 * SAMPLE_TOKENS) == 1
    assert sample_sequences(3, 12) == 3


def test_samples_are_the_first_sequences_across_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.capture.SAMPLE_SEQUENCES", 3)
    ctx = tiny_context("opt", tmp_path)  # OPT's feed-forward input is flat: sequences must be found again
    found = stored(calibrated(ctx, tmp_path, "samples")["samples"])
    inputs = plain_inputs("opt", calibration_text(ctx, "opt"))
    for name in ("model.decoder.layers.1.fc1", "model.decoder.layers.0.self_attn.out_proj"):
        torch.testing.assert_close(found[name], inputs[name][:3], rtol=1e-4, atol=1e-5)


def test_an_expert_that_no_token_reaches_has_zero_statistics_and_a_note(tmp_path: Path) -> None:
    folder = model_with_a_dead_expert(tmp_path / "m")
    ctx = context(folder, tmp_path)
    artifacts = calibrated(ctx, tmp_path, "hessian", "samples")
    name = "model.layers.1.mlp.experts.down_proj.2"
    assert not stored(artifacts["hessian"])[name].any()
    assert stored(artifacts["samples"])[name].shape == (1, 0, 48)
    assert f"no calibration token reached {name}; its statistics are zero" in ctx.notes


def test_an_unknown_statistic_is_refused_with_those_allowed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown statistic 'variance'; allowed: hessian, absmax, absmean, minmax, samples"):
        check_kind("variance")
    with pytest.raises(InputError, match="unknown statistic"):
        run_calibrate({"k": (CalibrateSpec(ModelSpec("model"), CALIBRATION, "variance"), tmp_path)}, tiny_context("llama", tmp_path))


def test_stages_of_different_calibrations_are_refused(tmp_path: Path) -> None:
    specs = [CalibrateSpec(ModelSpec("model", d), CALIBRATION, "absmax") for d in ("float32", "bfloat16")]
    with pytest.raises(InputError, match="must share model and calibration"):
        run_calibrate({str(i): (s, tmp_path) for i, s in enumerate(specs)}, tiny_context("llama", tmp_path))


def test_windows_longer_than_learned_positions_are_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    spec = CalibrateSpec(ModelSpec("model"), replace(CALIBRATION, sequence_length=200), "absmax")
    with pytest.raises(InputError, match="128 learned positions"):
        run_calibrate({"k": (spec, tmp_path)}, tiny_context("gpt2", tmp_path))


def test_activations_that_overflow_are_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"] *= 3e4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericalError, match="not finite during calibration"):
        calibrated(context(folder, tmp_path), tmp_path, "absmax", dtype="float16")
