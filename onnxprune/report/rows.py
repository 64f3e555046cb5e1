"""The table of a sweep: a row per run, as CSV and as JSON and back, and which rows are Pareto-optimal."""

from __future__ import annotations

import csv
import io
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from typing import Any, TypeVar

from onnxprune.errors import FileError, UsageError
from onnxprune.passes.validate import Quality, drop

T = TypeVar("T")
QUALITY = ("before", "after", "drop", "samples")


@dataclass(frozen=True, slots=True)
class Measured:
    """One metric before and after pruning; ``drop`` is how much worse it got, whichever way the metric points."""

    metric: str
    before: float
    after: float
    drop: float
    samples: int

    @classmethod
    def of(cls, pair: tuple[Quality, Quality]) -> Measured:
        """Put the two qualities of a run side by side."""
        before, after = pair
        return cls(before.metric, before.value, after.value, drop(before, after), before.samples)


@dataclass(frozen=True, slots=True)
class Row:
    """One run of a sweep.

    Attributes
    ----------
    kind, target
        What was budgeted, and the budget: at most 1 is a share, more is absolute.
    mac, params, bandwidth
        Share of the original that is left; None where the run failed.
    proof
        Whether the proof holds; None where none was made.
    pareto
        Whether no other run of the model is as small and loses as little; None where no quality was measured.
    seconds
        Wall-clock time. Rows that differ in nothing else are equal.
    code, error
        Exit code and message of a run that failed, else 0 and nothing.
    run
        What was run, as a digest of the model's bytes, the data's, all options and this program's version.
    """

    model: str
    preset: str
    criterion: str
    compensation: str
    kind: str
    target: float
    mac: float | None = None
    params: float | None = None
    bandwidth: float | None = None
    quality: tuple[Measured, ...] = ()
    proof: bool | None = None
    pareto: bool | None = None
    seconds: float = field(default=0.0, compare=False)
    output: str = ""
    code: int = 0
    error: str = ""
    sha256: str = ""
    run: str = ""

    @property
    def ok(self) -> bool:
        """Whether the run came to its end."""
        return not self.code

    @property
    def line(self) -> tuple[str, ...]:
        """What it shares with the runs that differ from it in the target alone."""
        return (self.model, self.preset, self.criterion, self.compensation)


_FITS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str) and value == value.encode(errors="ignore").decode(),
    "int": lambda value: type(value) is int and abs(value) < 1 << 63,
    "float": lambda value: isinstance(value, float) or _FITS["int"](value),
    "bool": lambda value: isinstance(value, bool),
    "None": lambda value: value is None,
}
"""What a field may hold that is declared so: texts are Unicode, numbers such as machines compute with."""


def checked(row: T) -> T:
    """Return a row that was read from a file; :class:`ValueError` where a plain field of it is not what it declares."""
    for each in fields(row):  # type: ignore[arg-type]
        fits = [_FITS[kind] for kind in str(each.type).split(" | ") if kind in _FITS]
        value = getattr(row, each.name)
        if fits and not any(fit(value) for fit in fits):
            raise ValueError(f"{each.name} is {value!r:.40}")
    return row


_NUMBERS = ("target", "mac", "params", "bandwidth", "seconds")
_TRUTHS = ("proof", "pareto")
_FIELDS = tuple(Row.__dataclass_fields__)


def mark(rows: Sequence[Row]) -> list[Row]:
    """Mark the Pareto-optimal rows of every model, by MAC share and by the drop of the first metric.

    A row is Pareto-optimal where no other of its model is at least as good in both and better in one; of equal rows all
    are.
    """
    marked = []
    front = {name: _front(rows, name) for name in {row.model for row in rows}}
    for row in rows:
        point = _point(row)
        marked.append(replace(row, pareto=None if point is None else point in front[row.model]))
    return marked


def _point(row: Row) -> tuple[float, float] | None:
    return (row.mac, row.quality[0].drop) if row.mac is not None and row.quality else None


def _front(rows: Iterable[Row], model: str) -> set[tuple[float, float]]:
    """Walk the points from the smallest model up: each that loses less than all before it belongs to the front."""
    front: set[tuple[float, float]] = set()
    least = float("inf")
    for mac, lost in sorted({point for row in rows if row.model == model and (point := _point(row)) is not None}):
        if lost < least:
            front.add((mac, lost))
            least = lost
    return front


# -- CSV -------------------------------------------------------------------------------------------------------------


def to_csv(rows: Sequence[Row]) -> str:
    """Write rows as CSV; every metric has columns of its own, such as ``psnr_drop``, and numbers are exact."""
    metrics = list(dict.fromkeys(measured.metric for row in rows for measured in row.quality))
    columns = [
        name
        for each in _FIELDS
        for name in ([f"{metric}_{part}" for metric in metrics for part in QUALITY] if each == "quality" else [each])
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {name: _cell(getattr(row, name)) for name in _FIELDS if name != "quality"}
        for measured in row.quality:
            cells |= {f"{measured.metric}_{part}": _cell(getattr(measured, part)) for part in QUALITY}
        writer.writerow(cells)
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def from_csv(text: str) -> list[Row]:
    """Read rows that :func:`to_csv` wrote; :class:`ValueError` where the text is something else."""
    reader = csv.DictReader(io.StringIO(text), strict=True)
    names = list(reader.fieldnames or ())
    if not set(_FIELDS) - {"quality"} <= set(names):
        raise ValueError("lacks columns")
    metrics = [name.removesuffix("_before") for name in names if name.endswith("_before")]
    rows = []
    for cells in reader:
        if None in cells or None in cells.values():
            raise ValueError("has lines of another length than its header")
        given: dict[str, Any] = {name: cells[name] for name in _FIELDS if name != "quality"}
        given |= {name: float(cells[name]) if cells[name] else None for name in _NUMBERS}
        given |= {name: cells[name] == "true" if cells[name] else None for name in _TRUTHS}
        quality = tuple(_measured(metric, cells) for metric in metrics if cells[f"{metric}_before"])
        rows.append(checked(Row(**{**given, "code": int(cells["code"]), "quality": quality})))
    return rows


def _measured(metric: str, cells: Mapping[str, str]) -> Measured:
    before, after, lost, samples = (cells[f"{metric}_{part}"] for part in QUALITY)
    return checked(Measured(metric, float(before), float(after), float(lost), int(samples)))


# -- JSON ------------------------------------------------------------------------------------------------------------


def to_json(rows: Sequence[Row], options: Mapping[str, Any], error: tuple[int, str] | None = None) -> dict[str, Any]:
    """Return plain data (``schema`` 1): the rows, the options that all share, and what ended the sweep early."""
    return {
        "schema": 1,
        "onnxprune": version("onnxprune"),
        "options": dict(options),
        "rows": [_row_json(row) for row in rows],
        "error": error and {"code": error[0], "message": error[1]},
    }


def _row_json(row: Row) -> dict[str, Any]:
    plain: dict[str, Any] = {name: getattr(row, name) for name in _FIELDS if name not in ("kind", "code")}
    return plain | {
        "target": {"kind": row.kind, "requested": row.target},
        "quality": [
            {"metric": measured.metric, **{part: getattr(measured, part) for part in QUALITY}}
            for measured in row.quality
        ],
        "output": row.output or None,
        "error": {"code": row.code, "message": row.error} if row.code else None,
    }


def from_json(text: str) -> list[Row]:
    """Read rows that :func:`to_json` wrote; :class:`ValueError` where the text is something else."""
    return from_plain(json.loads(text))


def from_plain(content: Any) -> list[Row]:
    """Take rows from what :func:`to_json` returned; :class:`ValueError` where it is something else."""
    try:
        rows = [
            Row(
                **{name: each[name] for name in _FIELDS if name in each and name not in ("target", "output", "error")}
                | {
                    "kind": each["target"]["kind"],
                    "target": each["target"]["requested"],
                    "quality": tuple(checked(Measured(**measured)) for measured in each["quality"]),
                    "output": each["output"] or "",
                    "code": each["error"]["code"] if each["error"] else 0,
                    "error": each["error"]["message"] if each["error"] else "",
                }
            )
            for each in content.get("rows", ())
        ]
        return [checked(row) for row in rows]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError("holds no rows of a sweep") from error


def read(path: pathlib.Path) -> list[Row]:
    """Read the table of an earlier sweep, CSV or JSON by what is in it; nothing where the file does not exist.

    Raises
    ------
    UsageError
        The file is no table of a sweep.
    FileError
        It cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is no table of a sweep; choose another name") from error
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return from_json(text) if text.lstrip().startswith("{") else from_csv(text)
    except (ValueError, KeyError, RecursionError, csv.Error) as error:
        raise UsageError(f"{path}: is no table of a sweep ({error}); choose another name") from error


def with_error(path: str | None, code: int, message: str) -> dict[str, Any] | None:
    """Return the JSON table that a file holds with an error added, so that finished rows outlive it; None without one."""
    try:
        if not path or path == "-" or not pathlib.Path(path).is_file():
            return None
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("schema") != 1 or not content.get("rows"):
        return None
    return content | {"error": {"code": code, "message": message}}
