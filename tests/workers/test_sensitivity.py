"""The sensitivity table equals brute force on the whole model, and automatic bits follow from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from quant.scheme import WeightScheme
from tests.workers.stage_runs import CALIBRATION, calibrated, commit, quantize_spec, quantized, tiny_context
from workers.blocks import linear_view
from workers.calibrate import calibration_tokens
from workers.errors import InputError, NumericalError
from workers.prepare import run_prepare
from workers.rebuild import load_model
from workers.recipe import Recipe
from workers.specs import AutoBits, ModelSpec, PrepareSpec, QuantizeSpec
from workers.stream import open_blocks

SPEC = PrepareSpec(ModelSpec("model"), "sensitivity", 1, CALIBRATION, (("sequences", 3),))
WIDTHS = (2, 3, 8)
AUTO = AutoBits(5.0, tuple(WeightScheme(b) for b in WIDTHS))


@pytest.fixture(params=["llama", "gpt2"])
def made(request: pytest.FixtureRequest, tmp_path: Path):
    ctx = tiny_context(request.param, tmp_path)
    inputs = {AUTO.role(i): quantized(ctx, tmp_path / f"w{b}", quantize_spec(weight=WeightScheme(b)), {})[0] for i, b in enumerate(WIDTHS)}
    (tmp_path / "table" / "payload").mkdir(parents=True)
    run_prepare(SPEC, inputs, tmp_path / "table" / "payload", ctx)
    return ctx, inputs, commit(tmp_path / "table")


def test_losses_equal_brute_force(made, tmp_path: Path) -> None:
    ctx, inputs, table = made
    tokens = calibration_tokens(ctx, open_blocks(ctx, ModelSpec("model")), CALIBRATION)[:3]
    rows = {(r["module"], r["candidate"]): r for r in pq.read_table(table / "payload" / "sensitivity.parquet").to_pylist()}
    model = load_model(ctx, ModelSpec("model"))
    with torch.no_grad():
        p = torch.log_softmax(model(tokens).logits[:, :-1].double(), -1)
        for name, artifact in inputs.items():
            recipe = Recipe(artifact)
            for op in recipe.replaced():
                view = linear_view(model, op["module"])
                before = view.weight().clone()
                view.write(recipe.stored(op).dequantize())
                q = torch.log_softmax(model(tokens).logits[:, :-1].double(), -1)
                view.write(before)
                # float32 logits of size about 10: log-probabilities are off by 1e-6 at most, and so is their mean difference.
                assert rows[op["module"], name]["loss"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3, abs=2e-6)
    assert len(rows) == len(WIDTHS) * len(recipe.replaced())


def test_bits_stay_within_the_budget_and_lose_less_than_any_single_width(made, tmp_path: Path) -> None:
    ctx, _, table = made
    spec: QuantizeSpec = replace(quantize_spec(weight=AUTO.candidates[0]), auto=AUTO)
    artifact, summary = quantized(ctx, tmp_path / "auto", spec, {"sensitivity": table})
    assert summary["bits_stored"] <= AUTO.budget
    assert summary["bits_stored"] == pytest.approx(summary["auto"]["bits_stored"])
    rows = pq.read_table(artifact / "payload" / "layers.parquet").to_pylist()
    assert {r["module"]: r["bits_nominal"] for r in rows} == summary["auto"]["bits"]
    assert len({r["bits_nominal"] for r in rows}) > 1
    singles = {}
    for i, width in enumerate(WIDTHS):
        alone = [r for r in pq.read_table(table / "payload" / "sensitivity.parquet").to_pylist() if r["candidate"] == AUTO.role(i)]
        if 8 * sum(r["bytes"] for r in alone) <= AUTO.budget * sum(r["weights"] for r in alone):
            singles[width] = sum(r["loss"] for r in alone)
    assert set(singles) == {2, 3}
    assert summary["auto"]["sum_of_losses"] < min(singles.values())
    assert not any("budget" in n for n in ctx.notes)


def test_sizes_that_come_out_above_the_budget_are_noted(made, tmp_path: Path) -> None:
    """A table that took every linear for half as large stands for methods whose sizes depend on what is quantized before."""
    ctx, _, table = made
    rows = pq.read_table(table / "payload" / "sensitivity.parquet").to_pylist()
    (tmp_path / "halved" / "payload").mkdir(parents=True)
    halved = pa.Table.from_pylist([{**r, "bytes": r["bytes"] // 2} for r in rows])
    pq.write_table(halved, tmp_path / "halved" / "payload" / "sensitivity.parquet")
    spec: QuantizeSpec = replace(quantize_spec(weight=AUTO.candidates[0]), auto=AUTO)
    _, summary = quantized(ctx, tmp_path / "auto", spec, {"sensitivity": commit(tmp_path / "halved")})
    assert summary["auto"]["bits_stored"] <= AUTO.budget < summary["bits_stored"]
    (note,) = [n for n in ctx.notes if "budget" in n]
    assert note.startswith(f"automatic bits are above their budget: {summary['bits_stored']:.4f} stored bits per weight")


def test_a_loss_that_is_not_finite_names_the_linear_and_the_width(made, tmp_path: Path) -> None:
    ctx, _, table = made
    rows = pq.read_table(table / "payload" / "sensitivity.parquet").to_pylist()
    rows[4] = {**rows[4], "loss": float("nan")}
    (tmp_path / "nan" / "payload").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "nan" / "payload" / "sensitivity.parquet")
    spec: QuantizeSpec = replace(quantize_spec(weight=AUTO.candidates[0]), auto=AUTO)
    width = WIDTHS[[AUTO.role(i) for i in range(len(WIDTHS))].index(rows[4]["candidate"])]
    says = rf"{rows[4]['module']} alone at {width} bits makes the model's predictions not finite .*leave {width} out of scheme\.auto\.bits"
    with pytest.raises(NumericalError, match=says):
        quantized(ctx, tmp_path / "auto", spec, {"sensitivity": commit(tmp_path / "nan")})


def test_what_cannot_be_done_is_said(made, tmp_path: Path) -> None:
    ctx, inputs, table = made
    spec = replace(quantize_spec(weight=AUTO.candidates[0]), auto=replace(AUTO, budget=1.0))
    with pytest.raises(InputError, match=r"budget=1.0 stored bits per weight: the smallest widths take 2\.\d+; give at least ") as low:
        quantized(ctx, tmp_path / "low", spec, {"sensitivity": table})
    said = float(str(low.value).partition("at least ")[2].partition(",")[0])
    quantized(ctx, tmp_path / "least", replace(spec, auto=replace(AUTO, budget=said)), {"sensitivity": table})
    with pytest.raises(InputError, match="automatic bits need a sensitivity table"):
        quantized(ctx, tmp_path / "none", spec, {})
    scaled, _ = quantized(ctx, tmp_path / "scaled", quantize_spec("rtn", "smoothquant"), calibrated(ctx, tmp_path, "absmax"))
    (tmp_path / "again" / "payload").mkdir(parents=True)
    with pytest.raises(InputError, match="methods without transforms"):
        run_prepare(SPEC, {**inputs, AUTO.role(0): scaled}, tmp_path / "again" / "payload", ctx)
    with pytest.raises(InputError, match="prepare kind 'sensitvity'; allowed: sensitivity"):
        run_prepare(replace(SPEC, kind="sensitvity"), inputs, tmp_path / "again" / "payload", ctx)
