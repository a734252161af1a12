"""Pieces of HTML. Every text is escaped here, once; a `Markup` is already safe."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class Markup(str):
    """HTML that may stand in the page as it is."""


def text(value: object) -> Markup:
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def join(parts: Iterable[object], between: str = "") -> Markup:
    return Markup(between.join(text(p) for p in parts))


def tag(name: str, *content: object, **attributes: object) -> Markup:
    """`tag("td", "a & b", class_="left")`; an attribute that is None is left out, `_` becomes `-`."""
    given = "".join(f' {k.rstrip("_").replace("_", "-")}="{html.escape(str(v))}"' for k, v in attributes.items() if v is not None)
    return Markup(f"<{name}{given}>{join(content)}</{name}>")


@dataclass(frozen=True)
class Td:
    """A cell of a table body."""

    content: object
    sort: object = None
    """What sorting compares; the text itself when None, last when empty."""
    class_: str | None = None
    title: str | None = None
    style: str | None = None
    data: tuple[tuple[str, object], ...] = ()
    """Further data attributes: the exact numbers behind the text."""

    def render(self, name: str) -> Markup:
        more = {f"data_{k}": v for k, v in self.data}
        scope = "row" if name == "th" else None
        return tag(name, self.content, class_=self.class_, title=self.title, style=self.style, data_sort=self.sort, scope=scope, **more)


def table(
    headings: Sequence[object], rows: Sequence[Sequence[Td | object]], *, label: str, class_: str = "", row_classes: Sequence[str] = ()
) -> Markup:
    """A sortable table in its own scrolling container; heading row and first column stay in sight."""
    heads = join(tag("th", tag("button", h, type="button"), scope="col") for h in headings)
    body = []
    for i, row in enumerate(rows):
        cells = [c if isinstance(c, Td) else Td(c) for c in row]
        html_cells = join(c.render("td" if j else "th") for j, c in enumerate(cells))
        body.append(tag("tr", html_cells, class_=(row_classes[i] if i < len(row_classes) else "") or None))
    inner = tag("table", tag("thead", tag("tr", heads)), tag("tbody", join(body, "\n")), class_=class_ or None, aria_label=label)
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=label)


def details(summary: object, *content: object) -> Markup:
    return tag("details", tag("summary", summary), *content)
