"""Tables that can be sorted and filtered on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxprune.report.page.markup import Html, join, tag

MANY = 12
"""Rows from which on a table can be filtered."""


@dataclass(frozen=True)
class Column:
    """A column: text stands left, figures right."""

    title: str
    text: bool = False
    sort: bool = True


def table(columns: Sequence[Column | None], rows: Sequence[Sequence[str | None]], name: str) -> Html:
    """Make a table; columns that are None are left out, with their cells."""
    shown = [index for index, column in enumerate(columns) if column is not None]
    titles = [
        tag(
            "th",
            tag("button", c.title, type="button") if c.sort and c.title else c.title,
            class_=c.text and "t",
            scope="col",
        )
        for c in columns
        if c is not None
    ]
    head = tag("tr", *titles)
    body = [
        tag("tr", *(tag("td", row[index], class_="t" if columns[index].text else None) for index in shown))  # type: ignore[union-attr]
        for row in rows
    ]
    field = tag("input", type="search", placeholder="filter, for example a name", aria_label=f"filter {name}")
    count = tag("output", f"{len(rows)} rows")
    bar = tag("div", field, count, class_="filter") if len(rows) >= MANY else None
    inner = tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")
    return tag("div", join(bar, inner), class_="table", id=f"table-{name}")
