"""Methods win back what planted outliers cost. The shares are frozen from what was measured, with room for other processors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from quant.scheme import ActivationScheme, Granularity, WeightScheme
from tests.planted import Planted, logits
from tests.workers.stage_runs import commit, component, quantize_spec, quantized
from workers import datasets
from workers.calibrate import run_calibrate
from workers.context import Context
from workers.quantize import run_quantize
from workers.rebuild import attach_runtime, rebuild
from workers.request import Hints, Location
from workers.specs import CalibrateSpec, CalibrationSpec, Component, MethodSpec, ModelSpec, QuantizeSpec, Rule, TextSpec
from workers.tasks.base import log_probs
from workers.tasks.divergence import compare

ASSETS = Path(datasets.__file__).parent / "assets"
MODEL = ASSETS / "wikitext_llama"
TEXT = TextSpec("calibration", field="text")
CALIBRATION = CalibrationSpec(TEXT, samples=16, sequence_length=128)
W8 = WeightScheme(8, symmetric=True)
A8 = ActivationScheme(8)
PLANTS: dict[str, Callable[[Planted], None]] = {
    # One channel of 256: of the wide models that have such outliers they are a smaller share still.
    "activations": lambda p: p.activations((97,), 6),
    "inner": lambda p: p.inner((5, 400), 4),
    "values": lambda p: p.values((0, 17), 4),
    "keys": lambda p: p.keys((2, 9), 3),
}


@dataclass
class Case:
    """A model in a folder, and what quantizing it costs."""

    folder: Path
    work: Path

    @cached_property
    def context(self) -> Context:
        texts = {"calibration": Location("file", str(ASSETS / "self_text" / "calibration.jsonl"))}
        return Context({"model": Location("folder", str(self.folder))}, texts, Hints(device="cpu"), torch.device("cpu"))

    @cached_property
    def statistics(self) -> dict[str, Path]:
        stages = {}
        for kind in ("hessian", "absmax", "absmean", "samples", "minmax"):
            (self.work / kind / "payload").mkdir(parents=True)
            stages[kind] = (CalibrateSpec(ModelSpec("model"), CALIBRATION, kind), self.work / kind / "payload")
        run_calibrate(stages, self.context)
        return {kind: commit(self.work / kind) for kind in stages}

    @cached_property
    def tokens(self) -> Tensor:
        evaluation = {**self.context.texts, "calibration": Location("file", str(ASSETS / "self_text" / "evaluation.jsonl"))}
        tokenizer = datasets.load_tokenizer(self.context.models["model"])
        return datasets.calibration_tokens(evaluation["calibration"], CALIBRATION, tokenizer).long()[:8]

    @cached_property
    def reference(self) -> Tensor:
        return logits(self.folder, self.tokens)

    def kl(
        self,
        rounding: Component,
        *transforms: Component,
        weight: WeightScheme = W8,
        activation: ActivationScheme | None = A8,
        reads: bool = False,
        seed: int | None = None,
    ) -> float:
        """Mean KL divergence from the unquantized model, nats per token."""
        name = "-".join([*(t.name for t in transforms), rounding.name, str(weight.bits), str(activation)])
        (self.work / name / "payload").mkdir(parents=True)
        spec = QuantizeSpec(
            ModelSpec("model"),
            (Rule("*", MethodSpec(rounding, transforms), weight),),
            activation=activation if reads else None,
            seed=seed,
        )
        run_quantize(spec, self.statistics, self.work / name / "payload", self.context)
        artifact = commit(self.work / name)
        model = rebuild(self.context, ModelSpec("model"), artifact)
        attach_runtime(model, artifact, activation, None)
        with torch.no_grad():
            out = model(self.tokens, use_cache=False).logits
        return float(compare(log_probs(self.reference[:, :-1]), out, self.tokens).kl.mean())


def planted(name: str, folder: Path) -> Path:
    made = Planted.of(MODEL)
    PLANTS[name](made)
    return made.save(MODEL, folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("plain")
    return Case(Planted.of(MODEL).save(MODEL, folder / "model"), folder)


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("outliers")
    return Case(planted("activations", folder / "model"), folder)


@pytest.mark.parametrize("name", PLANTS)
def test_the_unquantized_function_is_bit_identical(name: str, plain: Case, tmp_path: Path) -> None:
    assert torch.equal(logits(planted(name, tmp_path / "model"), plain.tokens), plain.reference)


@pytest.mark.parametrize("weight", [WeightScheme(3), WeightScheme(2, granularity=Granularity.GROUP, group_size=64)], ids=["w3", "w2_g64"])
def test_gptq_loses_less_than_rounding_on_calibration_data(weight: WeightScheme, plain: Case, tmp_path: Path) -> None:
    """Its proxy loss tr((W-Q) H (W-Q)ᵀ) lies below RTN's on the same grid on 95 % of linears at least."""
    losses = {}
    for name in ("rtn", "gptq"):
        artifact, _ = quantized(plain.context, tmp_path / name, quantize_spec(name, weight=weight), plain.statistics)
        rows = pq.read_table(artifact / "payload" / "layers.parquet").to_pylist()
        losses[name] = {r["module"]: r["output_error"] for r in rows}
    assert losses["rtn"].keys() == losses["gptq"].keys()
    better = [losses["gptq"][n] < losses["rtn"][n] for n in losses["rtn"]]
    assert sum(better) >= 0.95 * len(better) > 0


@pytest.fixture(scope="module")
def lost(plain: Case, outliers: Case) -> tuple[float, float]:
    """KL of W8A8 RTN without outliers and with them."""
    rtn = Component("rtn", 1)
    return plain.kl(rtn), outliers.kl(rtn)


def test_activation_outliers_hurt_round_to_nearest(lost: tuple[float, float]) -> None:
    without, with_them = lost
    assert with_them > 10 * without


# 3 % of 256 channels: seven more at most.
REASSEMBLY = component("qllm_reassembly", variant="paper", ratio=0.03)


RTN = Component("rtn", 1)


@dataclass(frozen=True)
class Winner:
    share: float
    """Of the loss, that it wins back at least."""
    transforms: tuple[Component, ...] = ()
    rounding: Component = RTN
    activation: ActivationScheme = A8
    seed: int | None = None


WINNERS = {
    # Merging costs the rest: 0.77 of it was won back, however many more channels may be split.
    "qllm_reassembly": Winner(0.7, (REASSEMBLY,)),
    "smoothquant": Winner(0.9, (Component("smoothquant", 1),)),
    "os_plus": Winner(0.9, (component("os_plus", steps=6),)),
    "quarot": Winner(0.9, (component("quarot"),), seed=0),
    "llm_int8": Winner(0.9, rounding=Component("llm_int8", 1), activation=ActivationScheme(8, outlier_threshold=6.0)),
}


@pytest.mark.parametrize("name", WINNERS)
def test_methods_win_most_of_it_back(name: str, outliers: Case, lost: tuple[float, float]) -> None:
    winner = WINNERS[name]
    without, with_them = lost
    reads = name in ("qllm_reassembly", "os_plus")
    got = outliers.kl(winner.rounding, *winner.transforms, activation=winner.activation, reads=reads, seed=winner.seed)
    won = (with_them - got) / (with_them - without)
    assert won >= winner.share, f"{name} won back {won:.3f}: {got:.3g} of {with_them:.3g}, {without:.3g} without outliers"


def test_reassembly_wins_nearly_all_of_it_back_at_four_bits(plain: Case, outliers: Case) -> None:
    """0.98 of it."""
    rtn, weight, activation = Component("rtn", 1, (("grid", "omni"),)), WeightScheme(4), ActivationScheme(4, symmetric=False)
    without, with_them = (case.kl(rtn, weight=weight, activation=activation) for case in (plain, outliers))
    got = outliers.kl(rtn, REASSEMBLY, weight=weight, activation=activation, reads=True)
    assert with_them > 10 * without
    assert (with_them - got) / (with_them - without) >= 0.9
