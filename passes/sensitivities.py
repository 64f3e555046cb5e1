"""Sensitivities: a measured table of what pruning each bundle alone does to the output, as ranking errors."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxprune.coupling import Bundle
from onnxprune.errors import FileError, ModelError
from onnxprune.passes.rank import Ranking


def bundle_id(bundle: Bundle) -> str:
    """Ids of the groups that a bundle consists of."""
    return "+".join(group.id for group in bundle.groups)


@dataclass(frozen=True, slots=True, eq=False)
class Sensitivities:
    """Relative error of the output by bundle id and number of units removed."""

    errors: Mapping[str, Mapping[int, float]]

    @classmethod
    def read(cls, path: str | os.PathLike) -> Sensitivities:
        """Read the JSON file that the command ``sensitivity`` writes.

        Raises
        ------
        FileError, ModelError
            The file cannot be read, or is not such a table.
        """
        try:
            rows = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))["rows"]
            errors: dict[str, dict[int, float]] = {}
            for row in rows:
                if row["error"] is not None:
                    errors.setdefault(str(row["group"]), {})[int(row["removed"])] = float(row["error"])
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"{path}: the sensitivity table cannot be read ({error})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: is not a table that onnxprune sensitivity wrote ({error!r})") from error
        return cls(errors)

    def applied(self, rankings: Sequence[Ranking]) -> list[Ranking]:
        """Rankings whose errors add up to what was measured at every point of the table, and keep their course between.

        Raises
        ------
        ModelError
            The table lacks a group of the model.
        """
        return [replace(ranking, errors=self._errors(ranking)) for ranking in rankings]

    def _errors(self, ranking: Ranking) -> np.ndarray:
        name = bundle_id(ranking.bundle)
        points = sorted((removed, error) for removed, error in self.errors.get(name, {}).items() if removed > 0)
        if not points:
            raise ModelError(f"the sensitivity table has no row for group {name}; measure this model again")
        errors, begin, reached, scale = ranking.errors.astype(np.float64), 0, 0.0, 1.0
        for removed, error in points:
            end = min(removed, len(errors))
            predicted = errors[begin:end].sum()
            if end <= begin:
                continue
            scale = max(error - reached, 0.0) / predicted if predicted > 0 else 0.0
            errors[begin:end] *= scale
            begin, reached = end, max(error, reached)
        errors[begin:] *= scale
        return np.maximum.accumulate(errors)
