"""What a sweep shows: plain lines where there is no terminal, totals, the time left; and what signals ask for."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.progress import LINES_AT_MOST, Progress, Tally, clock_time
from orchestrator.signals import run_child, stop_on_signals
from orchestrator.stage import Stage, Status
from tests.orchestrator.virtual_time import evaluate, failure, plan, quantize
from workers.request import ErrorClass


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=200)


def run(progress: Progress, clock: Clock, stage: Stage, seconds: float, end: Status = Status.SUCCEEDED) -> None:
    progress.status(stage, Status.RUNNING, None)
    clock.now += seconds
    progress.status(stage, end, None)


def test_plain_output_has_a_line_per_stage_and_a_total() -> None:
    stages, console, clock = plan(quantize("q"), evaluate("e", variant="q"), evaluate("bad")), plain(), Clock()
    with Progress(stages, console, clock) as progress:
        run(progress, clock, stages["q"], 3)
        progress.failed_attempt(stages["bad"], failure(ErrorClass.NUMERICAL, "NaN in layer 3\nmore"), 1, False)
        run(progress, clock, stages["bad"], 1, Status.FAILED)
        progress.status(stages["e"], Status.DEP_FAILED, "bad")
    assert shown(console).splitlines() == [
        "[1/3] quantize q: 3 s",
        "attempt 1 of evaluate bad, given up: FakeError: NaN in layer 3",
        "failed evaluate bad",
        "[3/3] evaluate e: blocked by bad",
        "3/3 stages, 1 failed, 1 blocked in 4 s",
    ]


def test_plain_output_of_a_long_sweep_is_short() -> None:
    stages, console, clock = plan(*(evaluate(f"e{i}") for i in range(LINES_AT_MOST + 1))), plain(), Clock()
    with Progress(stages, console, clock) as progress:
        for stage in stages.values():
            run(progress, clock, stage, 0.5)
    assert len(shown(console).splitlines()) < 15


def test_labels_are_not_markup() -> None:
    stages, console, clock = plan(evaluate("gptq[damp=0.1]")), plain(), Clock()
    with Progress(stages, console, clock) as progress:
        run(progress, clock, stages["gptq[damp=0.1]"], 1)
    assert "gptq[damp=0.1]" in shown(console)


def test_a_terminal_shows_what_runs() -> None:
    stages = plan(quantize("q"))
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress(stages, console, Clock()) as progress:
        progress.status(stages["q"], Status.RUNNING, None)
    assert "quantize q" in shown(console)


def test_time_left_follows_the_measured_speed_and_the_workers_at_hand() -> None:
    stages, clock = plan(*(evaluate(f"e{i}", seconds=10) for i in range(6))), Clock()
    tally = Tally(stages, clock)
    assert tally.left_s() is None
    for key in ("e0", "e1"):
        tally.status(stages[key], Status.RUNNING)
    clock.now = 20.0
    for key in ("e0", "e1"):
        assert tally.status(stages[key], Status.SUCCEEDED) == 20
    # Twice as slow as estimated: four stages of 20 s on two workers.
    assert tally.left_s() == pytest.approx(40)
    tally.status(stages["e2"], Status.RUNNING)
    clock.now += 5
    assert tally.left_s() == pytest.approx(37.5)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1:00"), (185, "3:05"), (7385, "2:03:05")])
def test_clock_time(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_ask_once_to_stop_and_twice_to_end(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals(plain()) as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert (stop.requested, stop.killed) == (True, False)
        os.kill(os.getpid(), number)
        assert stop.killed
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_another_thread_gets_no_handlers_and_no_error() -> None:
    before, asked = signal.getsignal(signal.SIGINT), []

    def use() -> None:
        with stop_on_signals(plain()) as stop:
            asked.append(stop.requested)
            assert signal.getsignal(signal.SIGINT) is before

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert asked == [False]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_tells_a_child_to_stop_and_waits_for_it(number: signal.Signals, tmp_path: Path) -> None:
    code = "import signal, sys, time; from pathlib import Path\n"
    code += "def stop(*_): time.sleep(0.5); Path('cleaned').touch(); sys.exit()\n"
    code += "signal.signal(signal.SIGTERM, stop); Path('begun').touch(); time.sleep(60)"

    def interrupt() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.signal(number, signal.default_int_handler)  # whoever runs the tests may ignore it
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            run_child([sys.executable, "-c", code], tmp_path)
        assert (tmp_path / "cleaned").exists()
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_a_terminal_s_interrupt_does_not_reach_a_child_of_its_own() -> None:
    """All of the terminal's group get it; the child would end in a traceback of wherever it is."""
    code = "import sys; from pathlib import Path; from orchestrator.signals import run_child\n"
    code += "try: run_child([sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(60)'], Path.cwd())\n"
    code += "except KeyboardInterrupt: print('interrupted')"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "1\n"
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.communicate(timeout=30)[0] == "interrupted\n"
