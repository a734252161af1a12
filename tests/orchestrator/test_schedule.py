"""The scheduler and its loop on virtual time: order, retries, failures, stopping."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import ClusterError, StoreError
from orchestrator.executors.base import Event
from orchestrator.retries import Adjustment, Policy
from orchestrator.schedule import drive, run_stages
from orchestrator.scheduler import Scheduler
from orchestrator.signals import StopRequest
from orchestrator.stage import Stage, Status
from tests.orchestrator.virtual_time import (
    BLOCKED,
    CANCELLED,
    FAILED,
    OK,
    StopAfter,
    Verdict,
    VirtualExecutor,
    VirtualHooks,
    calibrate,
    evaluate,
    failure,
    plan,
    quantize,
    run,
)
from workers.request import ErrorClass, Hints


def always(error_class: ErrorClass, *keys: str) -> Callable[[str, int], Verdict]:
    return lambda key, attempt: failure(error_class) if key in keys else None


CHAIN = plan(calibrate("c"), quantize("q", inputs=["c"]), evaluate("e", variant="q"), evaluate("base"))


def test_stages_run_in_order_of_their_inputs() -> None:
    statuses, hooks, _ = run(CHAIN)
    assert set(statuses.values()) == {OK}
    assert [k for k in hooks.commits if k != "base"] == ["c", "q", "e"]


def test_inputs_in_the_store_need_no_stage() -> None:
    assert run(plan(quantize("q", inputs=["c"])), done=("c",))[0] == {"q": OK}
    with pytest.raises(ValueError, match="neither planned nor done"):
        run(plan(quantize("q", inputs=["c"])))


def test_a_cycle_is_refused() -> None:
    with pytest.raises(ValueError, match="cycle"):
        run(plan(quantize("a", inputs=["b"]), quantize("b", inputs=["a"])))


def test_failure_blocks_only_what_needs_it() -> None:
    statuses, hooks, _ = run(CHAIN | plan(quantize("other")), always(ErrorClass.USER, "c"))
    assert statuses == {"c": FAILED, "q": BLOCKED, "e": BLOCKED, "base": OK, "other": OK}
    assert hooks.blocked_by() == {"q": "c", "e": "c"}
    assert hooks.attempts == [("c", ErrorClass.USER, 1, False)]


@pytest.mark.parametrize("error_class", [ErrorClass.NUMERICAL, ErrorClass.USER, ErrorClass.INTERNAL, ErrorClass.DISK_FULL])
def test_errors_that_would_repeat_are_not_retried(error_class: ErrorClass) -> None:
    statuses, hooks, _ = run(plan(quantize("q")), always(error_class, "q"))
    assert statuses == {"q": FAILED}
    assert len(hooks.attempts) == 1


def test_infrastructure_failures_are_retried_with_growing_waits() -> None:
    statuses, hooks, executor = run(plan(quantize("q")), always(ErrorClass.INFRASTRUCTURE, "q"), policy=Policy(max_retries=3))
    assert statuses == {"q": FAILED}
    assert [a[2:] for a in hooks.attempts] == [(1, True), (2, True), (3, True), (4, False)]
    starts = [t for t, _, _ in executor.starts]
    waits = [b - a - 1.0 for a, b in itertools.pairwise(starts)]
    # Jitter takes at most half; the loop looks again every half second.
    assert all(0.5 * 2**i <= w <= 2**i + 0.5 for i, w in enumerate(waits))


def test_a_stage_that_kills_its_worker_fails_alone() -> None:
    stages = CHAIN | plan(quantize("poison"), evaluate("after", variant="poison"))
    statuses, hooks, _ = run(stages, lambda key, attempt: "killed by signal 9" if key == "poison" else None)
    assert statuses == dict.fromkeys(CHAIN, OK) | {"poison": FAILED, "after": BLOCKED}
    assert {a[0] for a in hooks.attempts} == {"poison"}
    assert len(hooks.attempts) == 1 + Policy().max_retries


def test_a_lost_worker_repeats_only_stages_without_an_outcome() -> None:
    stages = plan(calibrate("a", statistic="hessian"), calibrate("b", statistic="absmax"), calibrate("c", statistic="absmean"))
    statuses, hooks, executor = run(stages, lambda key, attempt: "lost" if (key, attempt) == ("b", 1) else None, slots=1)
    assert set(statuses.values()) == {OK}
    assert sorted(hooks.commits) == ["a", "b", "c"]
    assert [k for _, k, _ in executor.starts].count("a") == 1
    # What was in the lost request runs by itself afterwards, so that the guilty stage shows.
    assert sorted(r[0] for r in hooks.requests) == [("a", "b", "c"), ("b",), ("c",)]


def test_repeated_losses_are_treated_as_lack_of_memory() -> None:
    _, hooks, _ = run(plan(quantize("q")), lambda key, attempt: "killed by signal 9" if attempt < 4 else None)
    assert [a.halvings for _, a in hooks.requests] == [0, 0, 1, 2]
    # No other failure is a loss.
    kinds: list[Verdict] = [failure(ErrorClass.INFRASTRUCTURE), "killed by signal 9", failure(ErrorClass.INFRASTRUCTURE), None]
    _, hooks, _ = run(plan(quantize("q")), lambda key, attempt: kinds[attempt - 1])
    assert [a.halvings for _, a in hooks.requests] == [0, 0, 0, 0]
    # At once where the executor says so.
    _, hooks, _ = run(plan(quantize("q")), lambda key, attempt: "killed, the node was low on memory (OOM)" if attempt < 3 else None)
    assert [a.halvings for _, a in hooks.requests] == [0, 1, 2]


def test_losses_after_the_last_step_for_memory_repeat_it() -> None:
    losses = {5: "killed by signal 9", 6: "killed by signal 9"}
    verdicts = dict.fromkeys(range(1, 5), failure(ErrorClass.MEMORY)) | losses
    statuses, hooks, _ = run(plan(quantize("q")), lambda key, attempt: verdicts.get(attempt))
    assert statuses == {"q": OK}
    assert [a for _, a in hooks.requests[4:]] == [Adjustment(halvings=2, streamed=True, exclusive=True)] * 3


def test_memory_ladder() -> None:
    statuses, hooks, _ = run(plan(quantize("q")), always(ErrorClass.MEMORY, "q"))
    assert statuses == {"q": FAILED}
    ladder = [a.apply(Hints(batch_tokens=4096)) for _, a in hooks.requests]
    assert [(h.batch_tokens, h.streamed) for h in ladder] == [(4096, False), (2048, False), (1024, False), (1024, True), (1024, True)]
    assert [a.apply(Hints()).batch_tokens for _, a in hooks.requests] == [None, 512, 256, 256, 256]
    assert [a.exclusive for _, a in hooks.requests] == [False, False, False, False, True]
    # Alone on one slot it always is.
    hooks = run(plan(quantize("q")), always(ErrorClass.MEMORY, "q"), slots=1)[1]
    steps = [(a.halvings, a.streamed, a.exclusive) for _, a in hooks.requests]
    assert steps == [(0, False, False), (1, False, False), (2, False, False), (2, True, False)]


def test_an_exclusive_stage_runs_alone() -> None:
    others = plan(*(evaluate(f"e{i}") for i in range(8)))
    stages = plan(quantize("q")) | others
    statuses, _, executor = run(stages, lambda key, attempt: failure(ErrorClass.MEMORY) if key == "q" and attempt < 5 else None)
    assert set(statuses.values()) == {OK}
    last = max(t for t, k, _ in executor.starts if k == "q")
    assert all(abs(t - last) >= 1 for t, k, _ in executor.starts if k != "q")


def test_a_cuda_error_gets_a_fresh_worker() -> None:
    error = failure(ErrorClass.INTERNAL, "CUDA error: an illegal memory access was encountered")
    statuses, _, executor = run(plan(quantize("q")), lambda key, attempt: error if attempt == 1 else None)
    assert statuses == {"q": OK}
    assert executor.recycled == [executor.starts[0][2]]


def test_out_of_cuda_memory_keeps_the_worker() -> None:
    error = failure(ErrorClass.MEMORY, "CUDA error: out of memory")
    assert run(plan(quantize("q")), lambda key, attempt: error if attempt == 1 else None)[2].recycled == []


def test_corrupt_input_is_made_again_first() -> None:
    corrupt = failure(ErrorClass.CORRUPT, corrupt_key="q")
    stages = plan(quantize("q"), evaluate("e1", variant="q"), evaluate("e2", variant="q"))
    statuses, hooks, _ = run(stages, lambda key, attempt: corrupt if key != "q" and attempt == 1 else None)
    assert set(statuses.values()) == {OK}
    assert hooks.set_aside == ["q"], "both met the same corruption; the fresh artifact must not be set aside"
    assert hooks.commits.count("q") == 2


def test_two_corrupt_artifacts_of_which_one_needs_the_other() -> None:
    """`b` is set aside while its input is made again: it was finished when that was set aside, and waits for it all the same."""
    stages = plan(
        calibrate("c"), quantize("a", inputs=["c"], seconds=2.5), quantize("b", inputs=["c"]), quantize("d", inputs=["b"], seconds=1.6)
    )
    first = {"a": failure(ErrorClass.CORRUPT, corrupt_key="c"), "d": failure(ErrorClass.CORRUPT, corrupt_key="b")}

    def verdict(key: str, attempt: int) -> Verdict:
        now = {k: status for k, status, _ in hooks.transitions}
        assert all(now[i] is OK for i in stages[key].inputs.values()), f"{key} started before its inputs"
        return first.get(key) if attempt == 1 else None

    hooks = VirtualHooks(stages)
    statuses = run(stages, verdict, slots=3, hooks=hooks)[0]
    assert set(statuses.values()) == {OK}
    assert hooks.set_aside == ["c", "b"]


def test_what_an_input_that_cannot_be_made_again_leaves_behind() -> None:
    """`c` is set aside and fails; `b`, which needs it, is then set aside too and can not be made again."""
    stages = plan(
        calibrate("c"), quantize("a", inputs=["c"], seconds=2.5), quantize("b", inputs=["c"]), quantize("d", inputs=["b"], seconds=5.0)
    )
    first = {"a": failure(ErrorClass.CORRUPT, corrupt_key="c"), "d": failure(ErrorClass.CORRUPT, corrupt_key="b")}
    again = {"c": failure(ErrorClass.USER)}
    statuses, hooks, _ = run(stages, lambda key, attempt: first.get(key) if attempt == 1 else again.get(key), slots=3)
    assert statuses == {"c": FAILED, "a": BLOCKED, "b": BLOCKED, "d": BLOCKED}
    assert hooks.set_aside == ["c", "b"]


def test_corrupt_artifact_of_an_earlier_run() -> None:
    corrupt = failure(ErrorClass.CORRUPT, corrupt_key="old")
    stages = plan(evaluate("e", variant="old"))
    hooks = VirtualHooks(stages, makers=plan(quantize("old", inputs=["older"])))
    statuses, _, _ = run(stages, lambda key, attempt: corrupt if (key, attempt) == ("e", 1) else None, done=("old",), hooks=hooks)
    assert statuses == {"e": OK, "old": OK}
    assert hooks.commits == ["old", "e"]


def test_an_input_that_stays_corrupt_fails_in_the_end() -> None:
    corrupt = failure(ErrorClass.CORRUPT, corrupt_key="q")
    statuses, hooks, _ = run(plan(quantize("q"), evaluate("e", variant="q")), lambda key, attempt: corrupt if key == "e" else None)
    assert statuses == {"q": OK, "e": FAILED}
    assert hooks.commits.count("q") == 1 + Policy().max_retries


def test_unknown_corrupt_artifact_fails_the_stage() -> None:
    corrupt = failure(ErrorClass.CORRUPT, corrupt_key="nobody's")
    assert run(plan(evaluate("e")), lambda key, attempt: corrupt)[0] == {"e": FAILED}


@pytest.mark.parametrize(
    ("error", "error_class"),
    [(OSError(errno.ENOSPC, "No space left on device"), ErrorClass.DISK_FULL), (StoreError("refused"), ErrorClass.USER)],
)
def test_a_commit_that_fails_fails_its_stage_only(error: Exception, error_class: ErrorClass) -> None:
    hooks = VirtualHooks(CHAIN, commit_error=lambda key: error if key == "q" else None)
    statuses, _, _ = run(CHAIN, hooks=hooks)
    assert statuses == {"c": OK, "q": FAILED, "e": BLOCKED, "base": OK}
    assert hooks.attempts == [("q", error_class, 1, False)]


def test_a_request_that_cannot_be_made_fails_its_stage_only() -> None:
    hooks = VirtualHooks(CHAIN, request_error=lambda key: OSError(errno.ENOSPC, "full") if key == "q" else None)
    assert run(CHAIN, hooks=hooks)[0] == {"c": OK, "q": FAILED, "e": BLOCKED, "base": OK}


def test_stop_once_keeps_running_stages() -> None:
    stages = CHAIN
    executor = VirtualExecutor(2, stages)
    statuses, hooks, _ = run(stages, executor=executor, stop=StopAfter(executor, 0.6))
    assert statuses == {"c": OK, "base": OK, "q": CANCELLED, "e": CANCELLED}
    assert sorted(hooks.commits) == ["base", "c"]


@pytest.mark.parametrize(
    ("verdict", "retries"),
    [
        (failure(ErrorClass.INFRASTRUCTURE), 1),
        ("killed by signal 9", 1),
        ("killed by signal 9", 0),
        (failure(ErrorClass.CORRUPT, corrupt_key="q"), 0),
    ],
)
def test_what_fails_while_stopping_is_left_for_the_next_run(verdict: Verdict, retries: int) -> None:
    stages = plan(evaluate("e", variant="q", seconds=2), evaluate("later", variant="q"))
    executor = VirtualExecutor(1, stages, lambda key, attempt: verdict)
    hooks = VirtualHooks(stages, makers=plan(quantize("q")))
    stop = StopAfter(executor, 0.6)
    statuses, _, _ = run(stages, hooks=hooks, executor=executor, stop=stop, done=("q",), policy=Policy(max_retries=retries))
    assert statuses == {"e": CANCELLED, "later": CANCELLED}
    assert [a[2:] for a in hooks.attempts] == [(1, True)], "no final failure: the store must not call it FAILED"


def test_a_stage_that_its_worker_cancelled_is_no_failure() -> None:
    statuses, hooks, _ = run(CHAIN, always(ErrorClass.CANCELLED, "q"))
    assert statuses == {"c": OK, "q": CANCELLED, "e": CANCELLED, "base": OK}
    assert hooks.attempts == []


def test_stop_twice_ends_now() -> None:
    stages = plan(quantize("long", seconds=100), quantize("next", inputs=["long"]))
    executor = VirtualExecutor(1, stages)
    statuses, _, _ = run(stages, executor=executor, stop=StopAfter(executor, 1, 3))
    assert set(statuses.values()) == {CANCELLED}
    assert executor.killed
    assert executor.now < 5


def test_a_lost_slot_is_not_used_again_and_blames_no_stage() -> None:
    stages = plan(*(quantize(f"q{i}") for i in range(6)))
    executor = VirtualExecutor(2, stages)
    executor.lose_slot.add(1)
    statuses, hooks, _ = run(stages, executor=executor)
    assert set(statuses.values()) == {OK}
    assert hooks.attempts == []
    assert {slot for _, _, slot in executor.starts} == {0}


def test_losing_every_slot_is_an_error() -> None:
    stages = plan(quantize("q"))
    executor = VirtualExecutor(1, stages)
    executor.lose_slot.add(0)
    with pytest.raises(ClusterError, match="node is gone"):
        run(stages, executor=executor)


def test_losing_the_cluster_leaves_no_stage_running() -> None:
    class Losing(VirtualExecutor):
        def poll(self, timeout_s: float) -> list[Event]:
            if self.now > 3:
                raise ClusterError("its head is gone")
            return super().poll(timeout_s)

    stages = plan(quantize("short"), quantize("long", seconds=100), evaluate("e", variant="long"))
    hooks = VirtualHooks(stages)
    with pytest.raises(ClusterError, match="head is gone"):
        run_stages(stages, Losing(2, stages), hooks, Policy(), StopRequest())
    assert {key: status for key, status, _ in hooks.transitions} == {"short": OK, "long": CANCELLED, "e": CANCELLED}


def test_stages_added_later_join_what_runs() -> None:
    first, second = plan(quantize("q")), plan(evaluate("e", variant="q"), quantize("q"))
    executor, hooks = VirtualExecutor(1, first | second), VirtualHooks(first | second)
    scheduler = Scheduler(1, Policy(), hooks.status, clock=executor.clock)
    for stages in (first, second):
        scheduler.add(stages)
        drive(scheduler, executor, hooks, StopRequest())
    assert hooks.commits == ["q", "e"]


def test_stages_added_below_a_ready_one_make_it_urgent() -> None:
    scheduler = Scheduler(1, Policy(), lambda *_: None)
    scheduler.add(plan(quantize("a"), quantize("b")))
    scheduler.add(plan(evaluate("e", variant="b", seconds=50)))
    assert [s.key for s in scheduler.assign()[0].stages] == ["b"]


@pytest.mark.parametrize(("error_class", "end"), [(ErrorClass.USER, BLOCKED), (ErrorClass.CANCELLED, CANCELLED)])
def test_stages_added_below_one_that_ended_without_success_end_as_if_they_had_been_there(error_class: ErrorClass, end: Status) -> None:
    first = plan(quantize("q"))
    executor, hooks = VirtualExecutor(1, first, always(error_class, "q")), VirtualHooks(first)
    scheduler = Scheduler(1, Policy(), hooks.status, clock=executor.clock)
    scheduler.add(first)
    drive(scheduler, executor, hooks, StopRequest())
    scheduler.add(plan(evaluate("e", variant="q")))
    assert scheduler.finished
    assert hooks.transitions[-1] == ("e", end, "q" if end is BLOCKED else None)


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, Stage]:
    stages: dict[str, Stage] = {}
    for i in range(draw(st.integers(1, 12))):
        inputs = draw(st.lists(st.sampled_from(sorted(stages)), unique=True, max_size=3)) if stages else []
        model = draw(st.sampled_from("mn"))
        seconds = draw(st.floats(0.1, 5))
        kind = draw(st.sampled_from("cqe"))
        if kind == "e":
            stage = evaluate(f"s{i}", model, inputs[0] if inputs else None, seconds)
        elif kind == "c" and not inputs:
            stage = calibrate(f"s{i}", model, seconds=seconds)
        else:
            stage = quantize(f"s{i}", model, inputs, seconds)
        stages[stage.key] = stage
    return stages


FAILURES: list[Verdict] = [
    None,
    failure(ErrorClass.INFRASTRUCTURE),
    failure(ErrorClass.MEMORY),
    failure(ErrorClass.USER),
    failure(ErrorClass.INTERNAL, "CUDA error: device-side assert triggered"),
    "the worker was killed",
]


@settings(max_examples=60, deadline=None)
@given(stages=graphs(), slots=st.integers(1, 3), data=st.data())
def test_whatever_fails_every_stage_ends_once_and_in_order(stages: dict[str, Stage], slots: int, data: st.DataObject) -> None:
    script = {
        key: data.draw(st.lists(st.sampled_from([*FAILURES, *_corrupt_inputs(stage)]), max_size=6), label=key)
        for key, stage in stages.items()
    }

    def verdict(key: str, attempt: int) -> Verdict:
        now = {k: status for k, status, _ in hooks.transitions}
        assert all(now[i] is OK for i in stages[key].inputs.values()), f"{key} started before its inputs"
        return script[key][attempt - 1] if attempt <= len(script[key]) else None

    hooks = VirtualHooks(stages)
    statuses = run(stages, verdict, slots=slots, hooks=hooks)[0]
    assert all(s in (OK, FAILED, BLOCKED) for s in statuses.values())
    for key in stages:
        ends = [(s, b) for k, s, b in hooks.transitions if k == key and s.finished]
        # Only an artifact that was set aside is made, and ends, again.
        assert len(ends) <= 1 + hooks.set_aside.count(key)
        assert hooks.commits.count(key) == sum(s is OK for s, _ in ends)
    # A success whose artifact was then set aside may fail when made again, so blame is exact only without corruption.
    if not hooks.set_aside:
        for key, stage in stages.items():
            above = {statuses[i] for i in stage.inputs.values()}
            assert (statuses[key] is BLOCKED) == bool(above & {FAILED, BLOCKED})
        assert all(statuses[b] is FAILED for b in hooks.blocked_by().values() if b is not None)


def _corrupt_inputs(stage: Stage) -> list[Verdict]:
    return [failure(ErrorClass.CORRUPT, corrupt_key=key) for key in stage.inputs.values()]


def test_adjustments_are_neutral_by_default() -> None:
    assert Adjustment().apply(Hints(batch_tokens=123)) == Hints(batch_tokens=123)
