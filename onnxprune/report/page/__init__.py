"""One self-contained HTML page from a JSON report: no network, light and dark, for screens and for paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from onnxprune.errors import UsageError
from onnxprune.report.page import sections, sweep
from onnxprune.report.page.markup import Html, join, tag
from onnxprune.report.pareto import require_matplotlib

__all__ = ["page", "require_library"]


NEEDED = (
    "input", "output", "options", "cost", "input_shapes", "targets", "floor", "groups", "layers", "frozen", "proof",
    "timings", "notes", "environment",
)  # fmt: skip
"""Keys that tell a report of a model from other JSON of this program."""


def require_library() -> None:
    """Raise :class:`UsageError` where matplotlib, which draws the charts, is not installed."""
    require_matplotlib("an HTML report")


def page(report: Mapping[str, Any]) -> str:
    """Write the page of a report.

    Parameters
    ----------
    report
        What ``--json`` writes (``schema`` 1), of prune, apply, verify, iterate, inspect or sweep.

    Raises
    ------
    UsageError
        It is no such report, or matplotlib is missing.
    """
    require_library()
    known = report if isinstance(report, Mapping) and report.get("schema") == 1 else {}
    if sweep.is_sweep(known):
        try:
            title, content = sweep.content(report)
        except ValueError as error:
            raise UsageError(f"no table of a sweep, or one of an older version: it {error}") from error
        return _document(title, report, content)
    missing = [key for key in NEEDED if key not in known] or [
        f"layers[].{key}" for key in ("groups", "path") for row in known["layers"][:1] if key not in row
    ]
    if missing:
        raise UsageError(
            f"no report of a model, or one of an older version (it has no {missing[0]}); give what prune, apply, verify, "
            "iterate, inspect or sweep --json write"
        )
    shown = [made for section in sections.SECTIONS if (made := section(report)) is not None]
    return _document(sections.title(report), report, [sections.header(report), tag("main", *shown)])


def _document(title: str, report: Mapping[str, Any], content: Sequence[Html]) -> str:
    """Put head, style and script around the content."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content=f"onnxprune {report.get('onnxprune', '')}"),
        tag("title", f"{title} - onnxprune"),
        tag("style", _asset("page.css")),
    )
    body = tag("body", *content, tag("script", _asset("page.js")))
    return join(Html("<!doctype html>\n"), tag("html", head, body, lang="en")) + "\n"


def _asset(name: str) -> Html:
    return Html("\n" + resources.files(__name__).joinpath(name).read_text(encoding="utf-8"))
