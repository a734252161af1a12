"""Speed and memory in the report, where the sweep timed its variants: one table per model, device and workload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from orchestrator.report import numbers
from orchestrator.report.markup import Markup, Td, join, table, tag
from orchestrator.report.overview import FAILED_STATES, Line, ModelTable
from orchestrator.results import StageResult
from workers.specs import MeasureSpec, from_json

NONE = "–"


@dataclass(frozen=True)
class Speed:
    """A variant with its measurement, or with the state of a stage that has none."""

    line: Line
    stage: StageResult

    @property
    def known(self) -> bool:
        return bool(self.stage.summary)

    def of(self, name: str) -> float | None:
        """A figure of the measurement; None where the device does not tell, or an older record does not have it."""
        found = self.stage.summary.get(name)
        return None if found is None else float(found)

    @property
    def per_token(self) -> str:
        low, high = (_ms(self.of(f"decode_{end}_s")) for end in ("low", "high"))
        return f"{_ms(self.of('decode_p50_s'))} [{low}, {high}]"

    @property
    def quantize_s(self) -> float | None:
        stage = self.line.variant.quantize
        return None if stage is None else stage.seconds

    @property
    def quantize_bytes(self) -> float | None:
        stage = self.line.variant.quantize
        return None if stage is None else stage.summary.get("peak_memory_bytes")

    @property
    def quantize_device(self) -> str | None:
        """Where that is another device than the timed one, as of a stage that an earlier sweep ran."""
        stage = self.line.variant.quantize
        name: str | None = None if stage is None else ((stage.record or {}).get("environment") or {}).get("device_name")
        timed = self.stage.summary.get("device")
        return None if timed is None or name == timed else name

    @property
    def kernels(self) -> str:
        """Which ran how many quantized linears, which read the cache where that is quantized, and whether a step was one launch."""
        s = self.stage.summary
        parts = [f"{n} {backend}" for backend, n in sorted(s.get("backends", {}).items())]
        parts += [f"cache {s['kv_backend']}"] if s.get("kv_backend") else []
        return ", ".join(parts + (["CUDA graph"] if s.get("graph") else [])) or NONE


@dataclass(frozen=True)
class Column:
    heading: str
    text: Callable[[Speed], str]
    sort: Callable[[Speed], object]
    narrow: bool = False
    """Shown in the terminal too, which has room for some columns."""


def _figure(heading: str, name: str, written: Callable[[float | None], str], narrow: bool = False) -> Column:
    return Column(heading, lambda s: written(s.of(name)), lambda s: s.of(name), narrow)


def _quantized(written: str, speed: Speed) -> str:
    return written if speed.quantize_device is None or written == NONE else f"{written} on {speed.quantize_device}"


def _ms(seconds: float | None) -> str:
    return NONE if seconds is None else numbers.number(1000 * seconds)


COLUMNS = (
    Column("ms per token", lambda s: s.per_token, lambda s: s.of("decode_p50_s")),
    _figure("p95", "decode_p95_s", _ms, True),
    _figure("tokens per s", "decode_tokens_per_s", numbers.number, True),
    _figure("prompt, ms", "prefill_p50_s", _ms, True),
    _figure("prompt, p95", "prefill_p95_s", _ms),
    _figure("J per token", "token_energy_j", numbers.number, True),
    _figure("J in all", "run_energy_j", numbers.number),
    _figure("bits stored", "bits_stored", numbers.bits),
    _figure("weights on disk", "disk_bytes", numbers.size),
    _figure("weights", "weights_bytes", numbers.size, True),
    _figure("cache", "kv_bytes", numbers.size),
    _figure("peak memory", "peak_memory_bytes", numbers.size, True),
    _figure("peak reserved", "peak_reserved_bytes", numbers.size),
    Column("quantized in", lambda s: _quantized(numbers.duration(s.quantize_s), s), lambda s: s.quantize_s),
    Column("with at most", lambda s: _quantized(numbers.size(s.quantize_bytes), s), lambda s: s.quantize_bytes),
    Column("kernels", lambda s: s.kernels, lambda s: s.kernels, True),
)
SHORT = Column("ms per token", lambda s: _ms(s.of("decode_p50_s")), lambda s: None, True)
"""Without its interval, for the terminal."""


def columns(found: Sequence[Speed]) -> list[Column]:
    """Those in which a measurement has something; all where there is none yet."""
    return [c for c in COLUMNS if any(s.known and c.text(s) != NONE for s in found)] or list(COLUMNS)


def speeds(model: ModelTable) -> list[Speed]:
    """In the order of the table; empty where nothing is timed."""
    return [Speed(x, x.variant.measure) for x in model.lines if x.variant.measure is not None]


def stated(spec: MeasureSpec, threads: int | None) -> str:
    """What was timed and on what: `AMD EPYC, 2 threads; 1 sequence, prompt of 128 tokens, 32 decoded`. threads: where they are known."""
    where = spec.device + (f", {numbers.count(threads, 'thread')}" if threads else "")
    workload = spec.workload
    return f"{where}; {numbers.count(workload.batch, 'sequence')}, prompt of {workload.prompt} tokens, {workload.tokens} decoded"


def conditions(found: Sequence[Speed]) -> str:
    """As `stated`, of all of them."""
    spec = from_json(MeasureSpec, found[0].stage.spec)
    return stated(spec, next((s.stage.summary["threads"] for s in found if s.known), None))


def speed_section(model: ModelTable) -> Markup:
    """Empty where nothing is timed."""
    found = speeds(model)
    if not found:
        return Markup("")
    caption = tag(
        "p",
        f"On {conditions(found)}. Each with the weights that it stores, by the kernel named on the right; dense: its linears were "
        "dequantized first, so that the time is that of the unquantized format; simulated: and their inputs rounded as in the evaluation, "
        "whose time says nothing of the format's speed. Medians, with the 95 % interval of the median over generations; p95: 95 in 100 "
        "steps, or prompts, took no longer; tokens per s: of all sequences, over all steps of a generation. Energy is that of the whole "
        "device, a token's with its share of the prompt. Peak memory of a CPU is that of the whole process; reserved: with what torch "
        "keeps for reuse. Quantized in: time and peak memory of the quantize stage, and its device where that is another one.",
        class_="caption",
    )
    shown = columns(found)
    rows = [[Td(s.line.name), *(_cells(s, shown) if s.known else _missing(s, len(shown)))] for s in found]
    classes = ["baseline" if s.line.variant.is_baseline else "" for s in found]
    headings = ["variant", *(c.heading for c in shown)]
    return join((tag("h3", "Speed and memory"), caption, table(headings, rows, label=f"{model.model}: speed", row_classes=classes)))


def speed_table(model: ModelTable) -> Table | None:
    """For the terminal. Names give way first, then the words of headings; no number is broken where there is room for all of them."""
    found = speeds(model)
    if not found:
        return None
    out = Table(title=Text(f"{model.model}: speed on {conditions(found)}"), title_justify="left", box=None, padding=(0, 2, 0, 0))
    shown = [SHORT, *(c for c in columns(found) if c.narrow)]
    cells = [[c.text(s) for c in shown] if s.known else [s.stage.status.value.lower(), *[""] * (len(shown) - 1)] for s in found]
    out.add_column("variant", overflow="fold")
    for c, texts in zip(shown, zip(*cells, strict=True), strict=True):
        out.add_column(c.heading, justify="right", overflow="fold", min_width=max(map(len, " ".join((c.heading, *texts)).split())))
    for s, row in zip(found, cells, strict=True):
        out.add_row(Text(s.line.name), *map(Text, row))
    return out


def _cells(speed: Speed, shown: Sequence[Column]) -> list[Td]:
    return [Td(c.text(speed), sort="" if (sort := c.sort(speed)) is None else repr(sort)) for c in shown]


def _missing(speed: Speed, count: int) -> list[Td]:
    state = speed.stage.status.value
    first = Td("FAILED" if state in FAILED_STATES else state.lower(), sort="", class_="bad" if state in FAILED_STATES else "state")
    return [first, *(Td(NONE, sort="") for _ in range(count - 1))]
