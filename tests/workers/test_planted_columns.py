"""In a real model, planted columns are found exactly, and planted key channels ask for ranges per channel."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from quant.methods.base import StoredTensor
from quant.methods.claq import FEW, MANY, tails
from quant.scheme import Granularity, KVScheme, WeightScheme
from quant.tensors.codebook import CodebookTensor
from quant.tensors.columns import ColumnsTensor
from quant.tensors.sparse import SparseTensor
from tests.planted import Planted
from tests.workers.stage_runs import commit, component
from tests.workers.test_planted import MODEL, Case, planted
from workers import kv_runs
from workers.quantize import run_quantize
from workers.rebuild import attach_runtime, load_model
from workers.recipe import Recipe
from workers.specs import Component, MethodSpec, ModelSpec, QuantizeSpec, Rule
from workers.tasks.base import log_probs
from workers.tasks.divergence import compare

COLUMNS = [3, 97, 200]
FIRST = "model.layers.0."
READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
"""Linears whose inputs the norms put out."""


def first_block(case: Case, rounding: Component, weight: WeightScheme) -> dict[str, StoredTensor]:
    """What is stored of `READERS`."""
    folder = case.work / rounding.name
    (folder / "payload").mkdir(parents=True)
    rules = tuple(Rule(FIRST + name, MethodSpec(rounding), weight) for name in READERS)
    run_quantize(QuantizeSpec(ModelSpec("model"), rules), case.statistics, folder / "payload", case.context)
    recipe = Recipe(commit(folder))
    return {op["module"].removeprefix(FIRST): recipe.stored(op) for op in recipe.replaced()}


def case_of(work: Path, made: Planted) -> Case:
    return Case(made.save(MODEL, work / "model"), work)


@pytest.fixture(scope="module")
def large_weights(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Columns 32 times as large, inputs as much smaller."""
    made = Planted.of(MODEL)
    made.activations(COLUMNS, -5)
    return case_of(tmp_path_factory.mktemp("columns"), made)


@pytest.fixture(scope="module")
def large_inputs(tmp_path_factory: pytest.TempPathFactory) -> Case:
    made = Planted.of(MODEL)
    made.activations(COLUMNS, 5)
    return case_of(tmp_path_factory.mktemp("inputs"), made)


def test_spqr_keeps_the_large_columns_and_nothing_outside_their_group(large_weights: Case) -> None:
    """Their inputs are the smallest, so that all three come last, into one group. Its other columns, whose range they stretch, have
    outliers too, but fewer."""
    weight = WeightScheme(3, granularity=Granularity.GROUP, group_size=16)
    stored = first_block(large_weights, Component("spqr", 1), weight)
    assert set(stored) == set(READERS)
    for name, tensor in stored.items():
        assert isinstance(tensor, SparseTensor)
        assert tensor.g_idx is not None
        found = torch.bincount(tensor.outlier_columns.long(), minlength=256)
        together = tensor.g_idx == tensor.g_idx[COLUMNS[0]]
        assert together[COLUMNS].all()
        assert not found[~together].any(), name
        assert int(found[COLUMNS].min()) > 1.15 * int(found.index_fill(0, torch.tensor(COLUMNS), 0).max()), name


def test_claq_gives_the_large_columns_bits_and_reserve(large_weights: Case) -> None:
    """OR reserves more in a tenth of the columns, whatever is planted: in 26 of 256, and the planted are three of them. They rank first
    in it, since the three columns to which AP gives bits rank by the same score. With a tenth planted, see test_claq.py."""
    params = {"adaptive_bits": 2 + 2 * 3 / 256, "outlier_reservation": True, "variant": "corrected"}
    for name, tensor in first_block(large_weights, Component("claq", 2, tuple(sorted(params.items()))), WeightScheme(2)).items():
        assert isinstance(tensor, CodebookTensor)
        assert (tensor.widths == 4).nonzero()[:, 0].tolist() == COLUMNS, name
        assert tensor.outliers is not None
        counts = tensor.outliers.counts
        few, many = (sum(tails(tensor.shape[0], fraction)) for fraction in (FEW, MANY))
        assert (counts[COLUMNS] == many).all(), name
        assert int((counts > few).sum()) == 26, name


@pytest.mark.parametrize("case", ["large_weights", "large_inputs"])
def test_owq_keeps_the_planted_columns(case: str, request: pytest.FixtureRequest) -> None:
    """The rounding errors of columns with large inputs, which no row's range sees, weigh a thousand times the others'. Large weights
    stretch it; on a range without them they are clipped, which costs most.

    At 3 bits large weights are found before attention only: two inputs of the feed-forward module, 140 and 246, are so large (15 times
    the median mean square) that plain rounding of their columns costs more than clipping two of the planted ones, whose inputs are half
    of the median. A step is twice as wide as at 4 bits, its error four times as large."""
    gptq = component("gptq", outlier_columns=3, outlier_metric="owq")
    bits = 4 if case == "large_weights" else 6
    for name, tensor in first_block(request.getfixturevalue(case), gptq, WeightScheme(bits)).items():
        assert isinstance(tensor, ColumnsTensor)
        assert tensor.kept.tolist() == COLUMNS, name


def kv_kl(case: Case, kv: KVScheme) -> float:
    model, tokens = load_model(case.context, ModelSpec("model")), case.tokens[:4]
    if kv_runs.through_cache(kv):
        out = torch.cat(list(kv_runs.logits(model, kv, {}, case.context, nullcontext)([tokens])))
    else:
        attach_runtime(model, None, None, kv)
        with torch.no_grad():
            out = model(tokens, use_cache=False).logits
    return float(compare(log_probs(case.reference[:4, :-1]), out, tokens).kl.mean())


def test_planted_key_channels_hurt_ranges_per_token_and_not_per_channel(tmp_path_factory: pytest.TempPathFactory) -> None:
    plain = case_of(tmp_path_factory.mktemp("plain"), Planted.of(MODEL))
    folder = tmp_path_factory.mktemp("keys")
    keys = Case(planted("keys", folder / "model"), folder)
    per_token, kivi = KVScheme(2, group_size=32), KVScheme(2, group_size=32, kind="kivi", residual_length=32)
    # A power of two on a channel moves its range and nothing else.
    assert kv_kl(keys, kivi) == pytest.approx(kv_kl(plain, kivi), rel=1e-4)
    assert kv_kl(keys, per_token) > 1.5 * kv_kl(plain, per_token)
    assert kv_kl(keys, per_token) > 2 * kv_kl(keys, kivi)
