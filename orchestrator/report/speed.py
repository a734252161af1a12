"""Speed and memory in the report, where the sweep timed its variants: one table per model, device and workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from orchestrator.report import numbers
from orchestrator.report.markup import Markup, Td, join, table, tag
from orchestrator.report.overview import FAILED_STATES, Line, ModelTable
from orchestrator.report.tables import spec_of
from orchestrator.results import StageResult
from workers.specs import MeasureSpec, from_json

NONE = "–"
HEADINGS = ("variant", "ms per token", "tokens per s", "prompt, ms", "weights", "peak memory", "linears")


@dataclass(frozen=True)
class Speed:
    """A variant with its measurement, or with the state of a stage that has none."""

    line: Line
    stage: StageResult

    @property
    def known(self) -> bool:
        return bool(self.stage.summary)

    @property
    def linears(self) -> str:
        """Which kernel ran how many quantized linears."""
        return ", ".join(f"{n} {backend}" for backend, n in sorted(self.stage.summary.get("backends", {}).items())) or NONE

    def cells(self, intervals: bool) -> tuple[str, ...]:
        """Below `HEADINGS`, without the variant's name."""
        s = self.stage.summary
        per_token = _ms(s["decode_p50_s"]) + (f" [{_ms(s['decode_low_s'])}, {_ms(s['decode_high_s'])}]" if intervals else "")
        rate, prompt = numbers.number(s["decode_tokens_per_s"]), _ms(s["prefill_p50_s"])
        return per_token, rate, prompt, numbers.size(s["weights_bytes"]), numbers.size(s["peak_memory_bytes"]), self.linears


def speeds(model: ModelTable) -> list[Speed]:
    """In the order of the table; empty where nothing is timed."""
    return [Speed(x, x.variant.measure) for x in model.lines if x.variant.measure is not None]


def conditions(found: Sequence[Speed]) -> str:
    """What was timed and on what: `AMD EPYC, 2 threads; 1 sequence, prompt of 128 tokens, 32 decoded`."""
    spec = from_json(MeasureSpec, spec_of(found[0].stage))
    threads = next((s.stage.summary["threads"] for s in found if s.known), None)
    where = spec.device + (f", {numbers.count(threads, 'thread')}" if threads else "")
    workload = spec.workload
    return f"{where}; {numbers.count(workload.batch, 'sequence')}, prompt of {workload.prompt} tokens, {workload.tokens} decoded"


def speed_section(model: ModelTable) -> Markup:
    """Empty where nothing is timed."""
    found = speeds(model)
    if not found:
        return Markup("")
    caption = tag(
        "p",
        f"On {conditions(found)}. Each with the weights that it stores, by the kernel named on the right; dense: its linears were "
        "dequantized first, so that the time is that of the unquantized format; simulated: and their inputs rounded as in the evaluation, "
        "whose time says nothing of the format's speed. Medians, with the 95 % interval of the median over generations. Peak memory of a "
        "CPU is that of the whole process.",
        class_="caption",
    )
    rows = [[Td(s.line.name), *(_cells(s) if s.known else _missing(s))] for s in found]
    classes = ["baseline" if s.line.variant.is_baseline else "" for s in found]
    return join((tag("h3", "Speed and memory"), caption, table(list(HEADINGS), rows, label=f"{model.model}: speed", row_classes=classes)))


def speed_table(model: ModelTable) -> Table | None:
    """For the terminal."""
    found = speeds(model)
    if not found:
        return None
    out = Table(title=f"{model.model}: speed on {conditions(found)}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for i, heading in enumerate(HEADINGS):
        out.add_column(heading, justify="right" if i else "left", no_wrap=not i, overflow="fold")
    for s in found:
        cells = s.cells(intervals=False) if s.known else (s.stage.status.value.lower(), *[""] * (len(HEADINGS) - 2))
        out.add_row(Text(s.line.name), *map(Text, cells))
    return out


def _cells(speed: Speed) -> list[Td]:
    s = speed.stage.summary
    sorts = [s[k] for k in ("decode_p50_s", "decode_tokens_per_s", "prefill_p50_s", "weights_bytes", "peak_memory_bytes")]
    return [Td(text, sort=repr(sort)) for text, sort in zip(speed.cells(intervals=True), [*sorts, speed.linears], strict=True)]


def _missing(speed: Speed) -> list[Td]:
    state = speed.stage.status.value
    first = Td("FAILED" if state in FAILED_STATES else state.lower(), sort="", class_="bad" if state in FAILED_STATES else "state")
    return [first, *(Td("–", sort="") for _ in HEADINGS[2:])]


def _ms(seconds: float) -> str:
    return numbers.number(1000 * seconds)
