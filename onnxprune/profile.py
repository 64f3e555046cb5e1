"""Hardware profiles: which channel counts a target computes well, and how many channels it computes in truth.

A profile is a TOML file; those in ``onnxprune/profiles`` go by name. Every table maps a kind of operator to one number, or
to two: for input channels and for output channels.
"""

from __future__ import annotations

import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from onnxprune.errors import UsageError
from onnxprune.files import read_toml
from onnxprune.labels import Work, is_fixed, length

FOLDER = pathlib.Path(__file__).parent / "profiles"
PARENTS = {
    "Conv": "*", "FirstConv": "Conv", "GroupedConv": "Conv", "DepthwiseConv": "Conv", "ConvTranspose": "Conv", "MatMul": "*",
    "Recurrent": "*",
}  # fmt: skip
"""Kinds of operators, and whose numbers a kind takes that a table leaves out.

FirstConv reads an input of the graph; a GroupedConv's numbers hold for the channels of each group; MatMul covers Gemm.
"""

MOST, MOST_FORBIDDEN = 1 << 20, 1 << 16
"""More channels than any layer has, and how many counts a list may forbid."""

Sides = tuple[int, int]
"""A number for input channels and one for output channels."""


@dataclass(frozen=True)
class Profile:
    """What a target asks of channel counts.

    Attributes
    ----------
    multiples
        Per kind of operator: a count that pruning changes becomes a multiple of this.
    min_channels
        Least count that pruning leaves.
    array
        Size of the array of multipliers: effective MAC count channels rounded up to it.
    forbidden
        Counts that pruning must not leave, for inputs and for outputs.
    hard
        The target does not take other counts at all; those that the model has already are reported.
    sources
        Where the numbers come from.
    """

    name: str
    multiples: Mapping[str, Sides] = field(default_factory=dict)
    min_channels: Mapping[str, Sides] = field(default_factory=dict)
    array: Mapping[str, Sides] = field(default_factory=dict)
    forbidden: Mapping[str, tuple[frozenset[int], frozenset[int]]] = field(default_factory=dict)
    hard: bool = False
    about: str = ""
    sources: tuple[str, ...] = ()

    def multiple(self, kind: str) -> Sides:
        """What kept channels of a kind of operator are multiples of."""
        return _of(self.multiples, kind, (1, 1))

    def least(self, kind: str) -> Sides:
        """Least channels of a kind of operator."""
        return _of(self.min_channels, kind, (1, 1))

    def padding(self, kind: str) -> Sides:
        """What the hardware rounds channels of a kind of operator up to."""
        return _of(self.array, kind, (1, 1))

    def never(self, kind: str) -> tuple[frozenset[int], frozenset[int]]:
        """Counts that are forbidden for a kind of operator."""
        return _of(self.forbidden, kind, (frozenset(), frozenset()))


def _of(table: Mapping[str, Any], kind: str, default: Any) -> Any:
    while kind not in table and kind in PARENTS:
        kind = PARENTS[kind]
    return table.get(kind, default)


def kind_of(work: Work) -> str:
    """Kind of operator by which profiles tell numbers apart; empty where its channels are not known."""
    channels = work.channels
    if channels is None:
        return ""
    if channels.kind not in ("Conv", "ConvTranspose") or length(channels.inputs) == length(channels.summed):
        return "FirstConv" if channels.kind == "Conv" and is_fixed(channels.inputs) else channels.kind
    return "DepthwiseConv" if not channels.summed else "GroupedConv"


def names() -> list[str]:
    """Profiles that onnxprune knows by name."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Profile:
    """Read a profile, by its name or from a TOML file.

    Raises
    ------
    UsageError
        No profile has this name, or the file holds something else than a profile.
    FileError
        The file cannot be read.
    """
    path = FOLDER / f"{name}.toml" if name in names() else pathlib.Path(name)
    if path.suffix != ".toml":
        raise UsageError(f"--profile {name}: unknown; choose from {', '.join(names())}, or give a .toml file")
    return _parsed(read_toml(path), path)


def _parsed(data: Mapping[str, Any], path: pathlib.Path) -> Profile:
    known = {"about", "sources", "hard", "multiples", "min_channels", "array", "forbidden"}
    if strangers := sorted(data.keys() - known):
        raise UsageError(f"{path}: unknown entry {strangers[0]}; a profile has {', '.join(sorted(known))}")
    tables = {name: _table(data.get(name, {}), f"{path}: [{name}]") for name in ("multiples", "min_channels", "array")}
    sources, hard = data.get("sources", []), data.get("hard", False)
    if not isinstance(hard, bool):
        raise UsageError(f"{path}: hard is true or false, not {hard!r}")
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise UsageError(f"{path}: sources is a list of texts")
    return Profile(
        path.stem, **tables, forbidden=_forbidden(data.get("forbidden", {}), f"{path}: [forbidden]"), hard=hard,
        about=str(data.get("about", "")), sources=tuple(sources),
    )  # fmt: skip


def _entries(table: Any, where: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(table, dict):
        raise UsageError(f"{where} is not a table")
    for kind, value in table.items():
        if kind != "*" and kind not in PARENTS:
            raise UsageError(f"{where} {kind}: no such kind of operator; kinds are *, {', '.join(PARENTS)}")
        yield kind, value


def _table(table: Any, where: str) -> dict[str, Sides]:
    found = {}
    for kind, value in _entries(table, where):
        sides = value if isinstance(value, list) else [value, value]
        if len(sides) != 2 or not all(type(n) is int and 0 < n <= MOST for n in sides):
            raise UsageError(
                f"{where} {kind}: {value!r:.80} is neither a number above 0 nor two, for inputs and outputs, {MOST} at most"
            )
        found[kind] = (sides[0], sides[1])
    return found


def _forbidden(table: Any, where: str) -> dict[str, tuple[frozenset[int], frozenset[int]]]:
    found = {}
    for kind, value in _entries(table, where):
        if not isinstance(value, dict) or not value.keys() <= {"inputs", "outputs"}:
            raise UsageError(f"{where} {kind}: give inputs and outputs, each a list of counts or ranges like '33-47'")
        inputs, outputs = (_counts(value.get(side, []), f"{where} {kind} {side}") for side in ("inputs", "outputs"))
        found[kind] = (inputs, outputs)
    return found


def _counts(items: Any, where: str) -> frozenset[int]:
    spans = [_span(item, where) for item in (items if isinstance(items, list) else [items])]
    if sum(map(len, spans)) > MOST_FORBIDDEN:
        raise UsageError(
            f"{where}: more than {MOST_FORBIDDEN} counts; forbid fewer, multiples and min_channels say the rest"
        )
    return frozenset(itertools.chain.from_iterable(spans))


def _span(item: Any, where: str) -> range:
    """Counts that a number, or a text like ``33-47``, means."""
    found = re.fullmatch(r"(\d{1,7})(?:-(\d{1,7}))?", str(item))
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if not low <= high < MOST:
        raise UsageError(f"{where}: {item!r:.80} is neither a count nor a range like '33-47'")
    return range(low, high + 1)
