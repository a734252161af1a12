"""The evaluate stage end to end on tiny models, and the task options of `conf/` against the task code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from quant.scheme import ActivationScheme, KVScheme
from tests.tiny_models import tiny_model
from tests.workers.fake_models import CountingBuilder
from tests.workers.stage_runs import commit, quantize_spec, quantized, tiny_context
from workers.context import Context
from workers.errors import InputError
from workers.evaluate import SCORED_BY, TASKS, run_evaluate
from workers.residency import Residency
from workers.specs import EvaluateSpec, ModelSpec, TaskSpec, TextSpec, freeze
from workers.tasks import divergence

CONF = Path(__file__).resolve().parents[2] / "conf"
TEXT = TextSpec("text", join="")
A8 = ActivationScheme(8)


def task(kind: str, version: int = 1, **params: Any) -> TaskSpec:
    return TaskSpec(kind, version, TEXT, freeze({"window": 16, "limit": 6, **params}))


def evaluated(
    context: Context,
    folder: Path,
    kind: str,
    inputs: Mapping[str, Path] | None = None,
    residency: Residency | None = None,
    activation: ActivationScheme | None = None,
    kv: KVScheme | None = None,
    windows: str = "first",
) -> tuple[Path, dict[str, Any]]:
    """(committed artifact, summary)."""
    (folder / "payload").mkdir(parents=True)
    spec = EvaluateSpec(ModelSpec("model"), replace(task(kind), windows=windows), activation, kv)
    summary = run_evaluate(spec, inputs or {}, folder / "payload", context, residency or Residency())
    return commit(folder), summary


def items(artifact: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = pq.read_table(artifact / "payload" / "items.parquet").to_pydict()
    return found


def test_baseline_and_variant_are_scored_on_the_same_items(tmp_path: Path) -> None:
    context = tiny_context("llama", tmp_path)
    residency = Residency()
    base, summary = evaluated(context, tmp_path / "base", "perplexity", residency=residency)
    artifact, _ = quantized(context, tmp_path / "q", quantize_spec(), {})
    variant, other = evaluated(context, tmp_path / "variant", "perplexity", {"quantize": artifact}, residency)
    assert summary["n_items"] == 6
    assert summary["n_tokens"] == 6 * 15
    assert summary["primary"] == "ppl"
    assert other["scores"]["ppl"] != summary["scores"]["ppl"]
    assert items(base)["id"] == items(variant)["id"]
    assert items(base)["weight"] == items(variant)["weight"] == [16.0] * 6
    assert residency.holds() == ["model", "q"]


@pytest.mark.parametrize(("windows", "documents"), [("first", [0, 0, 0, 0, 0, 1]), ("spread", [0, 10, 20, 30, 40, 50])])
@pytest.mark.parametrize("kind", sorted(TASKS))
def test_items_tell_the_document_they_are_of(kind: str, windows: str, documents: list[int], tmp_path: Path) -> None:
    # 60 rows of 80 characters, which are tokens here, in 300 windows of 16.
    artifact, summary = evaluated(tiny_context("llama", tmp_path), tmp_path / "e", kind, windows=windows)
    assert items(artifact)["document"] == documents
    assert summary["n_documents"] == len(set(documents))


def test_quantizing_costs_what_the_evaluation_says(tmp_path: Path) -> None:
    """More bits, less divergence: a wrong role or a stale model would break the order."""
    from quant.scheme import WeightScheme

    context = tiny_context("llama", tmp_path)
    residency = Residency()
    reference, _ = evaluated(context, tmp_path / "ref", "divergence", residency=residency)
    kl = []
    for bits in (2, 4, 8):
        artifact, _ = quantized(context, tmp_path / f"q{bits}", quantize_spec(weight=WeightScheme(bits)), {})
        _, summary = evaluated(context, tmp_path / f"e{bits}", "divergence", {"quantize": artifact, "reference": reference}, residency)
        kl.append(summary["scores"]["kl"])
    assert kl[0] > 5 * kl[1] > 25 * kl[2] > 0


@pytest.mark.parametrize(
    ("weights", "parts"),
    [(True, {}), (True, {"activation": ActivationScheme(4)}), (False, {"activation": ActivationScheme(4)}), (False, {"kv": KVScheme(3)})],
    ids=["weights", "weights+activation", "activation", "kv"],
)
def test_stored_and_side_by_side_references_agree(tmp_path: Path, weights: bool, parts: dict[str, Any]) -> None:
    found = []
    for name, budget in (("stored", 10**9), ("beside", 0)):
        context = tiny_context("llama", tmp_path, reference_bytes=budget)
        residency = Residency()
        reference, _ = evaluated(context, tmp_path / name / "ref", "divergence", residency=residency)
        assert (reference / "payload" / divergence.STORED).exists() is (name == "stored")
        inputs = {"reference": reference}
        if weights:
            inputs["quantize"], _ = quantized(context, tmp_path / name / "q", quantize_spec(), {})
        artifact, _ = evaluated(context, tmp_path / name / "e", "divergence", inputs, residency, **parts)
        found.append(items(artifact))
        assert any("beside" in n for n in context.notes) is (name == "beside")
    for metric in divergence.METRICS:
        assert found[0][metric] == pytest.approx(found[1][metric], abs=1e-6)
    assert sum(found[0]["kl"]) > 1e-6


def test_runtime_parts_leave_the_resident_model_as_it_was(tmp_path: Path) -> None:
    context = tiny_context("llama", tmp_path)
    residency = Residency()
    before = evaluated(context, tmp_path / "a", "perplexity", residency=residency)[1]["scores"]
    changed = evaluated(context, tmp_path / "b", "perplexity", residency=residency, activation=ActivationScheme(3))[1]["scores"]
    after = evaluated(context, tmp_path / "c", "perplexity", residency=residency)[1]["scores"]
    assert before == after
    assert changed != before


def test_streamed_evaluation_gives_the_same_scores(tmp_path: Path) -> None:
    scores = [
        evaluated(tiny_context("llama", tmp_path, streamed=streamed), tmp_path / str(streamed), "perplexity")[1]["scores"]
        for streamed in (False, True)
    ]
    assert scores[0] == scores[1]


def test_divergence_of_a_variant_needs_its_reference(tmp_path: Path) -> None:
    context = tiny_context("llama", tmp_path)
    with pytest.raises(InputError, match="input `reference`"):
        evaluated(context, tmp_path / "e", "divergence", residency=Residency(CountingBuilder()), activation=A8)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (task("perplexity", version=2), "version 2 is asked for, this worker has version 1"),
        (task("accuracy"), "allowed: divergence, perplexity"),
        (task("perplexity", windows=3), "task.params.windows is unknown .* window, limit, max_windows"),
        (task("divergence", window=None), "task.params.window=None; give a whole number"),
        (task("divergence", max_windows=3), "task.params.max_windows is unknown"),
        (task("perplexity", window="16"), "give a whole number"),
        (task("perplexity", window=129), "window=129 is above the model's 128 positions"),
        (task("perplexity", window=10_000), "4800 tokens, fewer than one window"),
    ],
)
def test_wrong_tasks_say_what_is_allowed(tmp_path: Path, wanted: TaskSpec, said: str) -> None:
    with pytest.raises(InputError, match=said):
        run_evaluate(EvaluateSpec(ModelSpec("model"), wanted), {}, tmp_path, tiny_context("llama", tmp_path), Residency())


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    class SmallVocabulary(CountingBuilder):
        def load_model(self, context: Context, model: ModelSpec) -> Any:
            made = super().load_model(context, model)
            made.config = type("Config", (), {"vocab_size": 11})()
            return made

    context = tiny_context("llama", tmp_path)
    with pytest.raises(InputError, match="the tokenizer is another model's"):
        evaluated(context, tmp_path / "e", "perplexity", residency=Residency(SmallVocabulary()))


@pytest.mark.parametrize("path", sorted((CONF / "task").glob("*.yaml")), ids=lambda p: p.stem)
def test_task_option_is_what_the_task_code_says(path: Path) -> None:
    option = yaml.safe_load(path.read_text())
    code = TASKS[option["kind"]]
    assert option["version"] == code.VERSION
    assert option["needs_reference"] is (code is divergence)
    assert option["primary"] == code.PRIMARY
    assert {name: m["higher_is_better"] for name, m in option["metrics"].items()} == code.METRICS
    assert set(option["params"]) == {f.name for f in fields(code.Params)}
    text_fields = {"file", "asset", "hub", "path"} | {f.name for f in fields(TextSpec)} - {"digest"}
    assert set(option["text"]) == text_fields


def test_every_task_is_scored() -> None:
    assert SCORED_BY.keys() == TASKS.keys()


def test_tiny_model_folder_is_never_changed_by_evaluation(tmp_path: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in tiny_model("llama").iterdir()}
    evaluated(tiny_context("llama", tmp_path), tmp_path / "e", "perplexity")
    assert {p.name: p.stat().st_mtime_ns for p in tiny_model("llama").iterdir()} == before
    assert torch.is_grad_enabled()
