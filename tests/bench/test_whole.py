"""Whole models of random weights: what is streamed through one layer's file, what a run is checked by, and the plain loop beside it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.on_gpu.clock import Bench
from bench.whole import shapes, torch_loop
from bench.whole.check import ALLOWED, Yardstick, check, tokens_of
from bench.whole.runs import Work, fitting, measured, model_in, together
from bench.whole.shapes import SHAPES, Shape, make_model
from bench.whole.stages import Made, quantize, spec_of
from bench.whole.streamed import FIRST, STREAMED, bytes_from_disk, read_rate
from quant import quantize_linear
from quant.tensors.affine import AffineTensor
from workers.request import Hints

SHAPE = replace(SHAPES["dry"], layers=2)
SPEC = spec_of("gptq", 2, 32, {"static_groups": True, "true_sequential": True})
HINTS = Hints(device="cpu", threads=1)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "one"
    make_model(folder, SHAPE, SHAPE.layers, "cpu", files_of=1)
    return folder


@pytest.fixture(scope="module")
def whole(one_layer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Made]:
    """Layers with files of their own, of the same weights."""
    folder = tmp_path_factory.mktemp("models") / "whole"
    make_model(folder, SHAPE, SHAPE.layers, "cpu")
    layer = load_file(one_layer / "layer_000.safetensors")
    for i in range(SHAPE.layers):
        tensors = {n.replace(FIRST, f"model.layers.{i}."): t for n, t in layer.items()}
        save_file(tensors, folder / f"layer_{i:03d}.safetensors", metadata={"format": "pt"})
    return folder, quantize(SPEC, folder, tmp_path_factory.mktemp("store"), HINTS)


def test_layers_read_from_one_file_give_what_layers_with_files_of_their_own_give(
    one_layer: Path, whole: tuple[Path, Made], tmp_path: Path
) -> None:
    streamed = quantize(SPEC, one_layer, tmp_path, HINTS, STREAMED)
    told = streamed.record["summary"]["streamed"]
    blocks = {n: f for n, f in whole[1].record["files"].items() if n.startswith("tensors_")}
    assert not list(streamed.folder.rglob("tensors_*"))
    assert told["digests"] == {n: f["sha256"] for n, f in blocks.items()}
    assert told["written_bytes"] == sum(f["bytes"] for f in blocks.values())
    assert told["layers"] == len(blocks) == SHAPE.layers
    assert told["layer_bytes"] == sum(t.nbytes for t in load_file(one_layer / "layer_000.safetensors").values())
    assert 0 < told["load_bound"] < 1


def test_a_file_is_read_from_the_disk_again(one_layer: Path) -> None:
    shard = one_layer / "outer.safetensors"
    read_rate(shard)
    before = bytes_from_disk()
    read_rate(shard)
    after = bytes_from_disk()
    if before is None or after is None or after == before:
        pytest.skip("the system does not tell what it reads, or these files are on no disk")
    assert after - before >= 0.9 * shard.stat().st_size


def test_a_run_is_checked_against_its_files_and_round_to_nearest(whole: tuple[Path, Made], one_layer: Path) -> None:
    model, made = whole
    cpu = torch.device("cpu")
    yardstick = Yardstick(tokens_of(SPEC, model), model, SPEC.rules[0].weight, cpu)
    right = check(made, model, SPEC, yardstick, cpu)
    assert right.error <= ALLOWED
    assert right.output_error is not None
    assert yardstick.rtn is not None
    assert right.output_error < yardstick.rtn
    yardstick.rtn = right.output_error
    assert check(made, model, SPEC, yardstick, cpu).error == math.inf
    yardstick.rtn, yardstick._size = 1.0, math.nan
    assert math.isnan(check(made, model, SPEC, yardstick, cpu).error), "an error that cannot be told is none that is allowed"


@pytest.mark.parametrize("method", ["billm", "claq"])
def test_formats_of_few_bits_have_something_to_beat(method: str, whole: tuple[Path, Made]) -> None:
    spec, cpu = spec_of(method, 2, 32, {}), torch.device("cpu")
    yardstick = Yardstick(tokens_of(spec, whole[0]), whole[0], spec.rules[0].weight, cpu)
    assert yardstick.rtn is not None
    assert yardstick.rtn < 0.9 < yardstick.error(torch.zeros_like(yardstick.weight))


def test_a_whole_model_is_read_from_the_disk(tmp_path: Path) -> None:
    files = tmp_path / "models"
    made = measured(Work("gptq", "tiny", layers=3, samples=2, length=32), files, Bench(dry=True), HINTS)
    read = made.details["from_disk"]
    if not read:
        pytest.skip("the system does not tell what it reads, or these files are on no disk")
    assert read >= 0.9


def test_what_a_run_says_of_damping_is_the_methods() -> None:
    assert Work("gptq", "dry").damp == 0.01
    assert Work("gptq", "dry", {"damp": 0.05}).damp == 0.05
    assert Work("rtn", "dry").damp is None


def test_as_many_layers_are_timed_as_fit() -> None:
    def never() -> float:
        raise AssertionError("run again")

    assert fitting(32, 2, math.inf, 1e9, never) == 32
    assert fitting(32, 2, 160.0, 10.0, never) == 32, "the first run says that all fit"
    assert fitting(80, 2, 150.0, 12.0, lambda: 5.0) == 60
    assert fitting(32, 2, 150.0, 30.0, lambda: 2.0) == 32, "only the first run took long"
    assert fitting(80, 2, 1.0, 12.0, lambda: 5.0) == 2


def test_what_is_noted_of_many_linears_is_told_once() -> None:
    notes = ["model.layers.0.q: fits", "a layer: fits", "model.layers.1.q: fits", "model.layers.0.q: else"]
    assert together(notes) == ["2 linears: fits", "a layer: fits", "model.layers.0.q: else"]


def test_a_model_is_made_once_and_anew_where_that_was_stopped(tmp_path: Path) -> None:
    work = Work("gptq", "dry")
    part = tmp_path / "dry-1.part"
    part.mkdir()
    (part / "layer_000.safetensors").write_bytes(b"half")
    made = model_in(tmp_path, work, 1, "cpu")
    first = load_file(made / "layer_000.safetensors")
    written = (made / "outer.safetensors").stat().st_mtime_ns
    assert model_in(tmp_path, work, 1, "cpu") == made
    assert (made / "outer.safetensors").stat().st_mtime_ns == written
    assert not part.exists()
    assert sum("q_proj" in name for name in first) == 1


@pytest.mark.parametrize("experts", [0, 4])
def test_blocks_do_not_outweigh_what_enters_them(experts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that roundings of one are not amplified by the next."""
    from transformers import AutoModelForCausalLM

    shape = Shape(256, 640, 16, 4, 4, 12, experts)
    monkeypatch.setattr(shapes, "WEIGHT", 0.08)  # what a product makes of its input is as much larger as with 4096 columns and 0.02
    make_model(tmp_path / "model", shape, shape.layers, "cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = torch.randint(0, 32000, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        entered = model.model.embed_tokens(tokens)
        left: list[torch.Tensor] = []
        model.model.norm.register_forward_pre_hook(lambda _, given: left.append(given[0]))
        model(tokens)
    assert 1 / 8 < float((left[0] - entered).norm() / entered.norm()) < 1 / 2


def test_the_plain_loop_makes_our_codes() -> None:
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(16, 256, generator=g), torch.randn(512, 256, generator=g)
    hessian = x.T @ x / len(x)
    ours = quantize_linear(weight, method="gptq", bits=4, group_size=128, hessian=hessian)
    assert isinstance(ours, AffineTensor)
    tensor, values = torch_loop.solve(weight, hessian.clone())
    assert float((tensor.codes == ours.codes).double().mean()) >= 0.999
    assert torch.equal(values, tensor.dequantize())
