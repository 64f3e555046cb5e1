"""The table of sensitivities: a row per bundle of groups and kept share, as JSON and back, and as CSV."""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from onnxprune.errors import FileError, UsageError
from onnxprune.report.rows import checked


@dataclass(frozen=True, slots=True)
class SensitivityRow:
    """What pruning one bundle alone, to one share, does.

    Attributes
    ----------
    group, name
        Ids of the bundle's groups, joined by ``+``, and what ``inspect`` calls them.
    size, kept
        Channels before and after.
    share
        Share of the channels that was to be kept.
    removed
        Units removed: as many channels at once as keep every tensor rectangular, mostly one.
    mac
        Share of the model's multiply-accumulates that is left.
    quality, drop, quality_compensated, drop_compensated
        The metric after pruning, and how much worse it got; None where it was not measured.
    error
        Squared error of the outputs over their variance, compensated where there is calibration data.
    note
        Why something was not measured.
    """

    group: str
    name: str
    size: int
    share: float
    kept: int
    removed: int
    mac: float
    quality: float | None = None
    drop: float | None = None
    quality_compensated: float | None = None
    drop_compensated: float | None = None
    error: float | None = None
    note: str = ""

    @property
    def figure(self) -> float | None:
        """What says best how sensitive the bundle is: compensated drop, drop, or error."""
        return next((v for v in (self.drop_compensated, self.drop, self.error) if v is not None), None)


COLUMNS = tuple(SensitivityRow.__dataclass_fields__)


@dataclass(frozen=True)
class SensitivityTable:
    """Rows in the order of the groups, shares descending.

    Attributes
    ----------
    model
        ``path`` (None for a model in memory) and ``sha256``.
    metric, before, samples
        What was measured, its value for the original, and on how many samples; None where no data was given.
    run
        Digest of the model, the data, the options and this program's version: what rows of one table share.
    """

    model: Mapping[str, str | None]
    options: Mapping[str, Any]
    metric: str | None
    before: float | None
    samples: int | None
    run: str
    rows: tuple[SensitivityRow, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_json(self, error: tuple[int, str] | None = None) -> dict[str, Any]:
        """Return plain data (``schema`` 1); ``error`` is what ended the measurement early."""
        return {
            "schema": 1,
            "onnxprune": version("onnxprune"),
            "model": dict(self.model),
            "options": dict(self.options),
            "metric": self.metric,
            "before": self.before,
            "samples": self.samples,
            "run": self.run,
            "rows": [{name: getattr(row, name) for name in COLUMNS} for row in self.rows],
            "notes": list(self.notes),
            "error": error and {"code": error[0], "message": error[1]},
        }

    def to_csv(self) -> str:
        """Return the rows as CSV, numbers exact; nothing where a figure was not measured."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([getattr(row, name) for name in COLUMNS] for row in self.rows)
        return text.getvalue()

    @classmethod
    def read(cls, path: str | os.PathLike) -> SensitivityTable:
        """Read what :meth:`to_json` wrote to a file.

        Raises
        ------
        FileError, UsageError
            The file cannot be read, or is something else.
        """
        try:
            content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            header = {name: content[name] for name in ("model", "options", "metric", "before", "samples", "run")}
            if not isinstance(content["model"], dict) or not isinstance(content["options"], dict):
                raise ValueError("model and options are tables")
            rows = tuple(checked(SensitivityRow(**row)) for row in content["rows"])
            return checked(cls(**header, rows=rows, notes=tuple(content["notes"])))
        except OSError as error:
            raise FileError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f"{path}: is no table of onnxprune sensitivity ({error}); choose another name") from error
