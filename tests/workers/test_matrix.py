"""Every cell of tests/matrix.yaml works, and nothing is refused for a reason that is not listed there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from quant.scheme import ActivationScheme, WeightScheme
from tests.workers.stage_runs import calibrated, component, quantize_spec, quantized, tiny_context
from workers import families
from workers.context import Context
from workers.errors import InputError
from workers.rebuild import attach_runtime, rebuild
from workers.specs import Component, ModelSpec, from_json
from workers.stream import open_blocks

MATRIX: dict[str, Any] = yaml.safe_load((Path(__file__).resolve().parents[1] / "matrix.yaml").read_text())
PARTS = ("weight_only", "transforms")
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


def transform(given: dict[str, dict[str, Any]]) -> Component:
    ((name, params),) = given.items()
    return component(name, **params)


@pytest.mark.xdist_group("matrix")
@pytest.mark.parametrize(("family", "name"), CELLS)
def test_cell_works(
    family: str, name: str, calibrations: dict[str, Calibrated], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ctx, statistics, linears = calibration_of(family, calibrations, tmp_path_factory)
    method = METHODS[name]
    weight = from_json(WeightScheme, MATRIX["schemes"][method["scheme"]])
    transforms = [t if isinstance(t, str) else transform(t) for t in method.get("transforms", ())]
    activation = from_json(ActivationScheme, method["activation"]) if "activation" in method else None
    feeds, params = method.get("feeds", False), method.get("params", {})
    spec = quantize_spec(method["rounding"], *transforms, weight=weight, activation=activation, feeds=feeds, **params)
    allowed = MATRIX["refusals"].get(name, {}).get(family)
    if allowed is not None:
        with pytest.raises(InputError, match=allowed):
            quantized(ctx, tmp_path / "q", spec, statistics)
        return
    artifact, summary = quantized(ctx, tmp_path / "q", spec, statistics)
    assert summary["coverage"] == {"asked": linears, "quantized": linears, "kept": []}
    assert summary["bits_stored"] >= summary["bits_nominal"] - 1e-9
    model = rebuild(ctx, ModelSpec("model"), artifact)
    attach_runtime(model, artifact, activation, None)
    with torch.no_grad():
        assert torch.isfinite(model(TOKENS, use_cache=False).logits).all()


def test_the_number_of_working_cells() -> None:
    refused = sum(len(families) for families in MATRIX["refusals"].values())
    assert len(CELLS) - refused == MATRIX["working"]


def test_the_router_of_experts_is_untouched(tmp_path: Path) -> None:
    ctx = tiny_context("mixtral", tmp_path)
    artifact, _ = quantized(ctx, tmp_path / "q", quantize_spec(weight=WeightScheme(4)), {})
    before, after = open_blocks(ctx, ModelSpec("model")), rebuild(ctx, ModelSpec("model"), artifact)
    for b in range(before.structure.count):
        path = before.structure.path(b, "mlp.gate.weight")
        before.load(b)
        assert torch.equal(before.model.get_parameter(path), after.get_parameter(path))
