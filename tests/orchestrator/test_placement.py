"""Where and in what order the scheduler puts stages, on virtual time: sharing, chains, affinity, balance."""

from __future__ import annotations

from random import Random

import pytest

from orchestrator.retries import Policy
from orchestrator.stage import Stage
from tests.orchestrator.virtual_time import OK, VirtualExecutor, calibrate, evaluate, plan, quantize, run


def test_statistics_of_one_calibration_share_a_request() -> None:
    stages = plan(
        calibrate("h", statistic="hessian"),
        calibrate("a", statistic="absmax"),
        calibrate("other text", text="another"),
        calibrate("other model", model="n"),
    )
    _, hooks, _ = run(stages, slots=1)
    assert sorted(len(r[0]) for r in hooks.requests) == [1, 1, 2]
    assert ("h", "a") in [r[0] for r in hooks.requests]


def test_the_longest_chain_starts_first() -> None:
    short = plan(*(evaluate(f"s{i}") for i in range(4)))
    chain = plan(quantize("q", seconds=4), evaluate("e", variant="q", seconds=4))
    _, _, executor = run(short | chain)
    assert executor.now == pytest.approx(8, abs=0.5)


def test_evaluations_of_a_variant_stay_together_and_no_slot_idles() -> None:
    variants = [f"q{i}" for i in range(4)]
    stages = plan(*(quantize(v) for v in variants), *(evaluate(f"{v} t{i}", variant=v) for v in variants for i in range(3)))
    executor = VirtualExecutor(2, stages, load_model_s=3, load_variant_s=1)
    statuses, _, _ = run(stages, executor=executor)
    assert set(statuses.values()) == {OK}
    assert executor.model_loads == 2
    # Two loads of the model, 4 quantize, 12 evaluate, 4 loads of a variant: 26 s for two slots, and at most one stolen stage.
    assert executor.now <= 13 + 2.5


def test_an_idle_slot_takes_over_from_one_with_a_queue() -> None:
    stages = plan(quantize("q"), *(evaluate(f"e{i}", variant="q", seconds=10) for i in range(4)))
    executor = VirtualExecutor(2, stages, load_model_s=1, load_variant_s=1)
    run(stages, executor=executor)
    assert {slot for _, k, slot in executor.starts if k.startswith("e")} == {0, 1}


def test_models_share_the_slots_by_their_work() -> None:
    """Were all slots on one model, then all on the next, each of them would load every model."""
    stages = plan(*(evaluate(f"{m} {i}", m) for m, count in (("a", 80), ("b", 40), ("c", 40)) for i in range(count)))
    executor = VirtualExecutor(8, stages, load_model_s=2)
    run(stages, executor=executor)
    assert executor.model_loads <= 2 * 8
    assert executor.now <= (160 + 2 * 8) / 8 * 1.2


@pytest.mark.parametrize("estimate_error", [1.0, 3.0])
def test_affinity_saves_model_loads_and_costs_no_time(estimate_error: float) -> None:
    """A 576 point grid of 3 models, 24 variants each, 8 tasks; priority alone is the same scheduler with slack 1."""
    random = Random(1)
    stages: dict[str, Stage] = {}
    for model, size in (("small", 0.25), ("middle", 1.0), ("large", 1.9)):
        stages |= plan(*(calibrate(f"{model} {s}", model, s, seconds=size * t) for s, t in (("absmax", 60), ("hessian", 160))))
        for method in range(6):
            for bits in range(4):
                key = f"{model} {method} {bits}"
                stages |= plan(quantize(key, model, [f"{model} hessian"] if method % 2 else [], size * 15 * (1 + 10 * method)))
                stages |= plan(*(evaluate(f"{key} {t}", model, key, size * (40 + 90 * t)) for t in range(8)))
    real = {k: s.resources.seconds * random.uniform(1 / estimate_error, estimate_error) for k, s in stages.items()}
    both, priority = (
        run(
            stages,
            executor=VirtualExecutor(16, stages, load_model_s=30, load_variant_s=15, duration=lambda s: real[s.key]),
            policy=Policy(slack=slack),
        )[2]
        for slack in (Policy().slack, 1.0)
    )
    assert both.model_loads * 3 < priority.model_loads
    assert both.now <= 1.02 * priority.now
