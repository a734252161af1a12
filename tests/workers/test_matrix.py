"""Every cell of tests/matrix.yaml works, and nothing is refused for a reason that is not listed there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel

from quant.scheme import ActivationScheme, WeightScheme
from tests.shared import shared_path
from tests.workers.stage_runs import CALIBRATION, calibrated, component, context, quantized, tiny_context
from workers import families
from workers.context import Context
from workers.errors import InputError
from workers.rebuild import attach_runtime, rebuild
from workers.recipe import Recipe
from workers.specs import Component, MethodSpec, ModelSpec, QuantizeSpec, Rule, from_json
from workers.stream import BlockModel, open_blocks

MATRIX: dict[str, Any] = yaml.safe_load((Path(__file__).resolve().parents[1] / "matrix.yaml").read_text())
PARTS = ("weight_only", "tuners", "transforms", "formats")
CELLS = [(family, name) for part in PARTS for family in MATRIX[part]["families"] for name in MATRIX[part]["methods"]]
METHODS = {name: values for part in PARTS for name, values in MATRIX[part]["methods"].items()}
TOKENS = torch.arange(2, 38).view(3, 12)
Calibrated = tuple[Context, dict[str, Path], int]
"""With the number of linears."""


@pytest.fixture(scope="module")
def calibrations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Calibrated]:
    return {}


def calibration_of(family: str, known: dict[str, Calibrated], factory: pytest.TempPathFactory) -> Calibrated:
    if family not in known:
        folder = factory.mktemp(family)
        ctx = tiny_context(family, folder)
        linears = len(families.linear_shapes(open_blocks(ctx, ModelSpec("model")).checkpoint.config))
        known[family] = ctx, calibrated(ctx, folder, "hessian", "absmax", "absmean", "minmax", "samples"), linears
    return known[family]


def transform(given: str | dict[str, dict[str, Any]]) -> Component:
    ((name, params),) = ({given: {}} if isinstance(given, str) else given).items()
    return component(name, **params)


def method_of(name: str) -> MethodSpec:
    method = METHODS[name]
    rounding = component(method["rounding"], **method.get("params", {}))
    return MethodSpec(rounding, tuple(transform(t) for t in method.get("transforms", ())))


def weight_of(name: str) -> WeightScheme:
    return from_json(WeightScheme, MATRIX["schemes"][METHODS[name]["scheme"]])


def spec_of(name: str, pattern: str = "*") -> QuantizeSpec:
    method = METHODS[name]
    activation = from_json(ActivationScheme, method["activation"]) if "activation" in method else None
    feeds = method.get("feeds", False) or activation is not None
    rules = (Rule(pattern, method_of(name), weight_of(name)),)
    return QuantizeSpec(ModelSpec("model"), rules, calibration=CALIBRATION if feeds else None, activation=activation)


def outputs(ctx: Context, artifact: Path, activation: ActivationScheme | None) -> tuple[PreTrainedModel, Tensor]:
    """The rebuilt model, and its logits."""
    model = rebuild(ctx, ModelSpec("model"), artifact)
    attach_runtime(model, artifact, activation, None)
    with torch.no_grad():
        return model, model(TOKENS, use_cache=False).logits


def routers(blocks: BlockModel) -> dict[str, Tensor]:
    """Path ▸ weight, as in the checkpoint."""
    found = {}
    for b in range(blocks.structure.count):
        block = blocks.load(b)
        found |= {blocks.structure.path(b, n): p.clone() for n, p in block.named_parameters() if n.endswith("mlp.gate.weight")}
    return found


@pytest.mark.xdist_group("matrix")
@pytest.mark.parametrize(("family", "name"), CELLS)
def test_cell_works(
    family: str, name: str, calibrations: dict[str, Calibrated], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ctx, statistics, linears = calibration_of(family, calibrations, tmp_path_factory)
    spec = spec_of(name)
    allowed = MATRIX["refusals"].get(name, {}).get(family)
    if allowed is not None:
        with pytest.raises(InputError, match=allowed):
            quantized(ctx, tmp_path / "q", spec, statistics)
        return
    artifact, summary = quantized(ctx, tmp_path / "q", spec, statistics)
    assert summary["coverage"] == {"asked": linears, "quantized": linears, "kept": []}
    assert summary["bits_stored"] >= summary["bits_nominal"] - 1e-9
    steps = {step["op"] for op in Recipe(artifact).replaced() for step in op.get("input", ())}
    assert METHODS[name].get("input") in (None, *steps)
    model, logits = outputs(ctx, artifact, spec.activation)
    assert torch.isfinite(logits).all()
    if family == "mixtral":
        before = open_blocks(ctx, ModelSpec("model"))
        unquantized = routers(before)
        assert len(unquantized) == before.structure.count
        for path, weight in unquantized.items():
            assert torch.equal(model.get_parameter(path), weight), path


def test_the_number_of_working_cells() -> None:
    refused = sum(len(families) for families in MATRIX["refusals"].values())
    assert len(CELLS) - refused == MATRIX["working"]


RWKV_LINEAR = "rwkv.blocks.0.feed_forward.receptance"


@pytest.fixture(scope="module")
def real_rwkv(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    folder = tmp_path_factory.mktemp("rwkv4")
    ctx = context(shared_path("models", "tiny-rwkv4-660K"), folder)
    linears = len(families.linear_shapes(open_blocks(ctx, ModelSpec("model")).checkpoint.config))
    return ctx, calibrated(ctx, folder, "hessian", "samples"), linears


@pytest.mark.xdist_group("matrix")
def test_every_rounding_works_on_the_real_rwkv(real_rwkv: Calibrated, tmp_path: Path) -> None:
    """A linear each, in one stage."""
    ctx, statistics, _ = real_rwkv
    names = [*MATRIX["weight_only"]["methods"], "clip_gptq"]
    linears = [s.name for s in families.linear_shapes(open_blocks(ctx, ModelSpec("model")).checkpoint.config)]
    rules = tuple(Rule(linear, method_of(n), weight_of(n)) for linear, n in zip(linears, names, strict=False))
    artifact, summary = quantized(ctx, tmp_path / "q", QuantizeSpec(ModelSpec("model"), rules), statistics)
    assert summary["coverage"]["quantized"] == len(names)
    _, logits = outputs(ctx, artifact, None)
    assert torch.isfinite(logits).all()


@pytest.mark.xdist_group("matrix")
@pytest.mark.parametrize("name", [n for n in MATRIX["tuners"]["methods"] if n != "clip_gptq"])
def test_every_tuner_works_on_the_real_rwkv(name: str, real_rwkv: Calibrated, tmp_path: Path) -> None:
    ctx, statistics, _ = real_rwkv
    artifact, summary = quantized(ctx, tmp_path / "q", spec_of(name, RWKV_LINEAR), statistics)
    assert summary["coverage"]["quantized"] == 1
    _, logits = outputs(ctx, artifact, None)
    assert torch.isfinite(logits).all()
