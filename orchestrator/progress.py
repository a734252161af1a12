"""What a sweep shows while it runs: a live display on a terminal, plain lines elsewhere. Knows stages and statuses only."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.stage import Stage, Status
from workers.request import Failure

LINES_AT_MOST = 200
"""Plain output: up to so many stages, every one gets a line."""
INTERVAL_S = 10.0
"""Plain output of longer sweeps: one line of totals in this time."""
RUNNING_SHOWN = 8


def clock_time(seconds: float) -> str:
    """`7 s`, `3:05`, `2:03:05`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


class Tally:
    """Counts and the time left. `clock` gives seconds."""

    def __init__(self, stages: Mapping[str, Stage], clock: Callable[[], float]) -> None:
        self._clock = clock
        self._statuses = dict.fromkeys(stages, Status.PENDING)
        self._counts = Counter(self._statuses.values())
        self._left_s = sum(s.resources.seconds for s in stages.values())
        """Estimated seconds of unfinished stages."""
        self.running: dict[str, tuple[Stage, float]] = {}
        """Key ▸ stage and start, oldest first."""
        self._most_running = 1
        self._estimated_s = 0.0
        self._measured_s = 0.0

    @property
    def total(self) -> int:
        return len(self._statuses)

    @property
    def done(self) -> int:
        return sum(n for status, n in self._counts.items() if status.finished)

    def status(self, stage: Stage, status: Status) -> float | None:
        """Note a transition; the seconds the stage ran, when it ended."""
        before = self._statuses.get(stage.key)
        self._statuses[stage.key] = status
        self._counts[status] += 1
        if before is not None:
            self._counts[before] -= 1
        self._left_s += stage.resources.seconds * ((before is None or before.finished) - status.finished)
        _, started = self.running.pop(stage.key, (stage, None))
        if status is Status.RUNNING:
            self.running[stage.key] = (stage, self._clock())
            self._most_running = max(self._most_running, len(self.running))
        seconds = None if started is None or not status.finished else self._clock() - started
        if status is Status.SUCCEEDED and seconds is not None:
            self._measured_s += seconds
            self._estimated_s += stage.resources.seconds
        return seconds

    def left_s(self) -> float | None:
        """Estimated seconds to the end: the estimates, corrected by how the finished stages compare with theirs."""
        if not self._measured_s or not self._estimated_s:
            return None
        scale = self._measured_s / self._estimated_s
        work, longest = self._left_s * scale, 0.0
        for stage, started in self.running.values():
            ran = min(self._clock() - started, stage.resources.seconds * scale)
            work -= ran
            longest = max(longest, stage.resources.seconds * scale - ran)
        return max(longest, work / self._most_running)

    def totals(self) -> str:
        parts = [f"{self.done}/{self.total} stages"]
        names = {Status.RUNNING: "running", Status.FAILED: "failed", Status.DEP_FAILED: "blocked", Status.CANCELLED: "cancelled"}
        parts += [f"{self._counts[s]} {name}" for s, name in names.items() if self._counts[s]]
        left = self.left_s()
        if left is not None and self.done < self.total:
            parts.append(f"about {clock_time(left)} left")
        return ", ".join(parts)


class Progress:
    """A context manager; `status` has the signature of the scheduler's listener."""

    def __init__(self, stages: Mapping[str, Stage], console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._started = self._last_line = clock()
        self._tally = Tally(stages, clock)
        self._lock = threading.Lock()  # the display refreshes from a thread of its own
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Progress:
        if self._console.is_terminal and self._tally.total:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()
        if self._tally.done:
            self._print(f"{self._tally.totals()} in {clock_time(self._clock() - self._started)}")

    def status(self, stage: Stage, status: Status, blocked_by: str | None) -> None:
        with self._lock:
            seconds = self._tally.status(stage, status)
            done, total = self._tally.done, self._tally.total
        if status is Status.FAILED:
            self._print(f"[red]failed[/] {escape(stage.label)}")
        if self._live.is_started or not status.finished or status in (Status.FAILED, Status.CANCELLED):
            return
        if total <= LINES_AT_MOST:
            how = f"blocked by {(blocked_by or '')[:12]}" if status is Status.DEP_FAILED else clock_time(seconds or 0.0)
            self._print(escape(f"[{done}/{total}] {stage.label}: {how}"))
        elif self._clock() - self._last_line >= INTERVAL_S:
            self._last_line = self._clock()
            self._print(self._tally.totals())

    def failed_attempt(self, stage: Stage, failure: Failure, attempt: int, will_retry: bool) -> None:
        """Say why. Retried attempts are shown too: they explain lost time."""
        then = "retried" if will_retry else "given up"
        first = (failure.message.strip().splitlines() or [""])[0]
        self._print(escape(f"attempt {attempt} of {stage.label}, {then}: {failure.type}: {first}"))

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        with self._lock:
            head = Table.grid(padding=(0, 1))
            head.add_row(
                ProgressBar(total=max(1, self._tally.total), completed=self._tally.done, width=30),
                Text(f"{self._tally.totals()}, {clock_time(self._clock() - self._started)} passed"),
            )
            rows = [
                Text(f"  {clock_time(self._clock() - started):>8}  {stage.label}", style="dim", overflow="ellipsis", no_wrap=True)
                for stage, started in list(self._tally.running.values())[:RUNNING_SHOWN]
            ]
        return Group(head, *rows)
