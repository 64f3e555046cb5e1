"""HTML from values: everything is escaped, and every figure says which value of the JSON report it shows."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from onnxprune.report.text import number

EMPTY = ("br", "col", "img", "input", "meta")


class Html(str):
    """Markup, which is not escaped again."""

    __slots__ = ()


def tag(name: str, /, *content: str | None, **attributes: Any) -> Html:
    """Make an element; attributes that are None or False are left out, ``class_`` is ``class``, ``_`` within is ``-``."""
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    inner = join(*content)
    return Html(f"<{name}{written}>" if name in EMPTY else f"<{name}{written}>{inner}</{name}>")


def join(*content: str | None) -> Html:
    """Put markup and text one after the other."""
    parts = (part if isinstance(part, Html) else html.escape(part) for part in content if part is not None)
    return Html("".join(parts))


# -- figures -------------------------------------------------------------------------------------------------------------

FORMATS = {
    "count": number,
    "channels": lambda value: f"{value:d}",
    "share": lambda value: f"{100 * value:.1f} %",
    "ms": lambda value: f"{value:.2f} ms",
    "plain": lambda value: f"{value:.4g}",
    "error": lambda value: f"{value:.1e}",
}
"""How figures are written, by kind."""


def value_at(report: Mapping[str, Any], path: str) -> Any:
    """Find what a path (``layers.3.mac_after``) names, or the quotient of two (``A / B``); None where nothing is."""
    first, _, second = path.partition(" / ")
    if second:
        top, bottom = value_at(report, first), value_at(report, second)
        return top / bottom if top is not None and bottom else None
    value: Any = report
    for key in path.split("."):
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = value[int(key)]
        else:
            value = value.get(key) if isinstance(value, Mapping) else None
    return value


def figure(report: Mapping[str, Any], path: str, kind: str) -> Html:
    """Show a value of the report, and remember on the page where it stands there."""
    value = value_at(report, path)
    if value is None:
        return Html("&ndash;")
    return tag("data", FORMATS[kind](value), value=f"{value:.9g}", data_at=path, data_as=kind)


def breaking(text: str) -> Html:
    """Show a name, which may be broken behind its separators."""
    return Html(re.sub(r"(?<=[/._:])(?=\w)", "<wbr>", html.escape(text)))


def slug(title: str) -> str:
    """Make an identifier of a heading."""
    return re.sub(r"\W+", "-", title.lower()).strip("-")
