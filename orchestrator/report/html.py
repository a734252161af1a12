"""The report: one self-contained HTML page, and its table as CSV and Parquet."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.report import figures as draw
from orchestrator.report import sections
from orchestrator.report.markup import join, tag
from orchestrator.report.overview import ModelTable, model_tables
from orchestrator.report.plot import Figure
from orchestrator.report.sites import site_section
from orchestrator.report.speed import speed_section
from orchestrator.report.tables import Row, long_table, write_csv, write_parquet
from orchestrator.results import SweepResult

# The page may load nothing: all it needs is inside.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
SCHEMA = 6
"""Version of what the files show; a change writes every report once."""


@dataclass(frozen=True)
class ReportFiles:
    html: Path
    csv: Path
    parquet: Path

    @classmethod
    def of(cls, folder: Path) -> ReportFiles:
        return cls(folder / "report.html", folder / "table.csv", folder / "table.parquet")

    def all_there(self) -> bool:
        return all(f.is_file() for f in (self.html, self.csv, self.parquet))


def write_report(result: SweepResult, folder: Path) -> ReportFiles:
    """Writes `report.html`, `table.csv` and `table.parquet` into `folder` (made if absent), replacing older ones.

    Works for partial and empty sweeps. The same result gives the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = long_table(result)
    files = ReportFiles.of(folder)
    _replace(files.csv, lambda path: write_csv(rows, path))
    _replace(files.parquet, lambda path: write_parquet(rows, path))
    page = _page(result, rows)
    _replace(files.html, lambda path: path.write_text(page, encoding="utf-8", errors="backslashreplace"))  # file names may be no UTF-8
    return files


def _page(result: SweepResult, rows: tuple[Row, ...]) -> str:
    from plotly.offline import get_plotlyjs

    models = model_tables(result, rows)
    here = Path(__file__)
    style, script = (here.with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    parts = [sections.headline(result, rows, models)]
    colours = draw.method_colours(models)
    for i, model in enumerate(models):
        parts.append(sections.model_section(model, i, *_figures(model, colours, i)))
        parts += [speed_section(model), site_section(result, model, i)]
    if not models:
        parts.append(tag("p", "No variant was planned; see the reasons below."))
    parts += [sections.troubles(result), sections.cost_section(result), sections.provenance(result)]
    links = [(f"#model-{i}", m.model) for i, m in enumerate(models)]
    links += [("#troubles", "Failures and skips"), ("#cost", "Cost"), ("#provenance", "Provenance")]
    nav = tag("nav", tag("ul", *(tag("li", tag("a", name, href=href)) for href, name in links)), aria_label="Sections")
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{tag('title', f'{result.name} · bitgrid')}<style>{style}</style>"
    )
    body = join((tag("header", parts[0]), nav, tag("main", *parts[1:]), tag("footer", f"bitgrid sweep {result.key}", class_="soft")), "\n")
    scripts = f"<script>{get_plotlyjs()}</script>\n<script>{script}</script>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n{scripts}\n</body></html>\n'


def _figures(model: ModelTable, colours: dict[str, str], number: int) -> tuple[list[Figure], list[Figure]]:
    """Figures of the scores, and of the layers."""
    scores = []
    for i, task in enumerate(model.tasks):
        scores += [draw.quality_over_bits(model, task, colours, 100 * number + i), draw.pareto(model, task, colours, 100 * number + i)]
    layers = [draw.layer_errors(model, column, colours, number) for column in ("weight_error", "output_error")]
    return [f for f in scores if f is not None], [f for f in layers if f is not None]


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """A reader sees the old file or the new one, never half of one; of two writers the last one's."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
