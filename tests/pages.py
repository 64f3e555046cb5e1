"""Reading HTML pages: their tags, their text, and their figures beside the JSON report's."""

from __future__ import annotations

import html.parser
import re
from typing import Any

UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


class Parsed(html.parser.HTMLParser):
    """A page: its figures (path, kind, value, text), its tags with their attributes, its text, and tags left open."""

    EMPTY = ("br", "col", "img", "input", "meta", "path", "rect", "use", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag, and a figure."""
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "data":
            self.figures.append([str(given["data-at"]), str(given["data-as"]), str(given["value"]), ""])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag that closes itself."""
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Check that tags nest."""
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect text."""
        self.text.append(data)
        if self.open and self.open[-1] == "data":
            self.figures[-1][3] += data


def looked_up(report: Any, path: str) -> float:
    """The value at a path of a JSON report, or the quotient of two."""
    if " / " in path:
        top, bottom = path.split(" / ")
        return looked_up(report, top) / looked_up(report, bottom)
    for key in path.split("."):
        report = report[int(key)] if isinstance(report, list) else report[key]
    return float(report)


def read(text: str) -> tuple[float, float]:
    """A written figure as a number, and half a unit of its last digit."""
    found = re.fullmatch(r"(-?)([\d.]+)(?:e([+-]\d+))? ?([KMGT%]|ms|s)?", text)
    assert found, text
    sign, digits, exponent, unit = found.groups()
    factor = 10.0 ** int(exponent or 0) * (0.01 if unit == "%" else UNITS.get(unit or "", 1))
    decimals = len(digits.partition(".")[2])
    return float(sign + digits) * factor, 0.5 * 10.0**-decimals * factor


def mismatches(page_text: str, report: Any) -> list[str]:
    """Figures of a page that are not the report's."""
    wrong = []
    for path, _, value, text in Parsed(page_text).figures:
        wanted = looked_up(report, path)
        shown, half = read(text)
        if abs(shown - wanted) > half * 1.001 + 1e-12 or abs(float(value) - wanted) > 1e-8 * abs(wanted):
            wrong.append(f"{path}: {text} ({value}), JSON {wanted}")
    return wrong
