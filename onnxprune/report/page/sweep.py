"""The page of a sweep: quality against MAC, and its table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from onnxprune.report import pareto
from onnxprune.report.page import charts
from onnxprune.report.page.markup import Html, breaking, figure, join, tag
from onnxprune.report.page.sections import reproduction, section
from onnxprune.report.page.tables import Column, table
from onnxprune.report.rows import Row, from_plain
from onnxprune.report.text import NAMES

Sweep = Mapping[str, Any]

WAYS = ("model", "preset", "criterion", "compensation")
"""In what runs may differ, but for their target; a column each, where they do."""


def is_sweep(report: Mapping[str, Any]) -> bool:
    """Whether it is what ``sweep --json`` writes, with at least one row."""
    rows = report.get("rows")
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, Mapping) and "pareto" in row for row in rows)


def content(report: Sweep) -> tuple[str, list[Html]]:
    """Make the whole page, from top to bottom; returns its title, too. :class:`ValueError` where rows are not rows."""
    rows = from_plain(report)
    runs, models = len(rows), len({row.model for row in rows})
    title = f"{runs} run{'s' * (runs != 1)} of {models} model{'s' * (models != 1)}"
    failed = sum(not row.ok for row in rows)
    stopped = report.get("error") and report["error"]["message"]
    notes = [f"{failed} of {runs} runs failed"] * bool(failed) + [stopped] * bool(stopped)
    header = tag(
        "header",
        tag("h1", title, " ", tag("small", "sweep")),
        tag("ul", *(tag("li", note) for note in notes), class_="notes") if notes else None,
    )
    facts = [(f"{name} version", text) for name, text in (report.get("environment") or {}).items()]
    facts += [
        (f"option {name}", value if isinstance(value, str) else json.dumps(value))
        for name, value in report["options"].items()
    ]
    facts += list(dict.fromkeys((row.model, f"sha256 {row.sha256}") for row in rows if row.sha256))
    parts = [_chart(rows), _table(report, rows), reproduction(report.get("command"), facts)]
    return title, [header, tag("main", *(part for part in parts if part is not None))]


def _chart(rows: list[Row]) -> Html | None:
    shown = [row for row in rows if row.mac is not None and row.quality]
    if not shown:
        return None
    metric = shown[0].quality[0].metric
    drawn = charts.chart(
        lambda axes: pareto.plot(axes, shown, grey=charts.BEFORE, hollow=charts.PAGE), f"{metric} against MAC", (7.6, 4)
    )
    return section(
        "Quality against MAC", drawn, about="Filled: no other run of the model has as few MAC and loses as little."
    )


def _table(report: Sweep, rows: list[Row]) -> Html:
    metrics = list(dict.fromkeys(measured.metric for row in rows for measured in row.quality))
    same = {name: values.pop() for name in WAYS if len(values := {getattr(row, name) for row in rows}) == 1}
    columns = [
        *(None if name in same else Column(name, text=True) for name in WAYS),
        Column("target", text=True), Column("asked for"), Column("MAC"), Column("params"), Column("bandwidth"),
        *(Column(name) for metric in metrics for name in (metric, f"{metric} drop")),
        Column("Pareto", text=True), Column("proof", text=True), Column("result", text=True),
    ]  # fmt: skip
    cells: list[list[str]] = []
    for index, row in enumerate(rows):
        at = f"rows.{index}"
        places = {measured.metric: place for place, measured in enumerate(row.quality)}
        measures = [
            figure(report, f"{at}.quality.{places[metric]}.{part}", "plain") if metric in places else ""
            for metric in metrics for part in ("after", "drop")
        ]  # fmt: skip
        seconds = join(figure(report, f"{at}.seconds", "plain"), " s")
        cells.append([
            *(breaking(getattr(row, name)) for name in WAYS), NAMES.get(row.kind, row.kind),
            figure(report, f"{at}.target.requested", "share" if row.target <= 1 else "count"),
            *(figure(report, f"{at}.{kind}", "share") for kind in ("mac", "params", "bandwidth")),
            *measures, "yes" if row.pareto else "", {True: "holds", False: "FAILED", None: ""}[row.proof],
            seconds if row.ok else row.error,
        ])  # fmt: skip
    about = "A row per run: what was asked for, and what is left of the original."
    about += f" All: {', '.join(f'{name} {value}' for name, value in same.items())}." if same else ""
    return section("Runs", table(columns, cells, "runs"), about=about)
