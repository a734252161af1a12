"""`bitgrid explain` compares a stage with the nearest one that is stored: the right one, in bounded time, whatever lies in the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator import explain as module
from orchestrator.cell import Grid
from orchestrator.explain import Explanation, explain
from orchestrator.fingerprint import identity, stage_key
from orchestrator.planned import Plan
from orchestrator.stage import Stage
from orchestrator.store import Store
from quant.scheme import WeightScheme
from workers.artifact import RECORD
from workers.specs import Component, MethodSpec, ModelSpec, QuantizeSpec, Rule, StageKind

Choices = dict[str, Any]


def quantized(model: str = "model", method: str = "gptq", *, bits: int = 4, damp: float = 0.01, block: int = 128) -> Stage:
    rounding = Component(method, 1, (("block", block), ("damp", damp)))
    spec = QuantizeSpec(ModelSpec(model), (Rule("*", MethodSpec(rounding), WeightScheme(bits)),))
    return Stage(stage_key(StageKind.QUANTIZE, spec, {}), StageKind.QUANTIZE, spec, f"quantize {model} {method}")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store").open()


def put(store: Store, stage: Stage) -> Path:
    """Commit it, as far as explaining looks at it."""
    folder = store.folder(stage.kind, stage.key)
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(identity(stage.kind, stage.spec, stage.inputs)))
    (folder / RECORD).write_text("{}")
    return folder


def explained(store: Store, *stages: Stage) -> list[Explanation]:
    return list(explain(Plan(Grid((), {}), stages={s.key: s for s in stages}), store))


def test_the_nearest_has_the_fewest_other_fields_and_names_them(store: Store) -> None:
    stored = [{"bits": b, "damp": d, "block": k} for b in (2, 3, 4) for d in (0.01, 0.1) for k in (64, 128)]
    wanted = [{"bits": b, "damp": d, "block": k} for b in (3, 8) for d in (0.1, 0.05) for k in (64, 256)]
    wanted = [w for w in wanted if w not in stored]
    keys = {}
    for choices in stored:
        stage = quantized(**choices)
        put(store, stage)
        keys[stage.key] = choices

    def other(one: Choices, two: Choices) -> set[str]:
        return {n for n in one if one[n] != two[n]}

    for found, choices in zip(explained(store, *(quantized(**w) for w in wanted)), wanted, strict=True):
        assert found.reason == "differs from the nearest stored stage"
        assert {d.field.rpartition(".")[2] for d in found.differences} == other(keys[found.nearest or ""], choices)
        assert len(found.differences) == min(len(other(s, choices)) for s in stored)


def test_what_is_about_the_same_comes_before_what_differs_less(store: Store) -> None:
    same, twin = quantized("new", bits=2, damp=0.1), quantized("old")
    put(store, twin)
    put(store, quantized("old", "rtn"))
    (found,) = explained(store, quantized("new"))
    assert found.nearest == twin.key
    assert [d.field for d in found.differences] == ["spec.model.digest"]
    put(store, same)
    (found,) = explained(store, quantized("new"))
    assert found.nearest == same.key
    assert len(found.differences) == 2


def test_a_damaged_spec_is_passed_over_and_told(store: Store) -> None:
    for i, content in enumerate(("", "{", "[]", None)):
        file = put(store, quantized(bits=2 + i)) / "spec.json"
        if content is None:
            file.unlink()
        else:
            file.write_text(content)
    (found,) = explained(store, quantized(damp=0.5))
    assert (found.reason, found.nearest) == ("no quantize stage is in the store that can be read (4 cannot)", None)
    whole = quantized(block=64)
    put(store, whole)
    (found,) = explained(store, quantized(damp=0.5))
    assert (found.reason, found.nearest) == ("differs from the nearest stored stage that can be read (4 cannot)", whole.key)


def test_each_spec_is_flattened_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    flat, whole = module._flat, []

    def counting(value: Any, prefix: str = "") -> dict[str, Any]:
        if not prefix:
            whole.append(value)
        return flat(value, prefix)

    monkeypatch.setattr(module, "_flat", counting)
    for block in range(1, 21):
        put(store, quantized(block=block))
    assert len(explained(store, *(quantized(bits=2, block=block) for block in range(1, 16)))) == 15
    assert len(whole) == 20 + 15
