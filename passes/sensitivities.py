"""Sensitivities: a measured table of what pruning each bundle alone does to the output, as ranking errors."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnxprune.coupling import Bundle
from onnxprune.errors import FileError, ModelError
from onnxprune.passes.rank import Ranking


def bundle_id(bundle: Bundle) -> str:
    """Ids of the groups that a bundle consists of."""
    return "+".join(group.id for group in bundle.groups)


def _finite(value: float | str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"error {number}")
    return number


@dataclass(frozen=True, slots=True, eq=False)
class Sensitivities:
    """Relative error of the output by bundle id and number of units removed, and the number of channels by bundle id."""

    errors: Mapping[str, Mapping[int, float]]
    sizes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | os.PathLike, sha256: str = "") -> Sensitivities:
        """Read the JSON file that the command ``sensitivity`` writes.

        Parameters
        ----------
        sha256
            Hash of the model that the table is wanted for; empty where the model is no file.

        Raises
        ------
        FileError, ModelError
            The file cannot be read, is not such a table, or is the table of another model.
        """
        try:
            table = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            measured = str(table.get("model", {}).get("sha256") or "")
            errors: dict[str, dict[int, float]] = {}
            sizes: dict[str, int] = {}
            for row in table["rows"]:
                if row.get("size") is not None:
                    sizes[str(row["group"])] = int(row["size"])
                if row["error"] is not None:
                    errors.setdefault(str(row["group"]), {})[int(row["removed"])] = _finite(row["error"])
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"{path}: the sensitivity table cannot be read ({error})") from error
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ModelError(f"{path}: is not a table that onnxprune sensitivity wrote ({error!r})") from error
        if sha256 and measured and sha256 != measured:
            raise ModelError(
                f"{path}: was measured on another model (sha256 {measured[:12]}, this one's is {sha256[:12]}); "
                "run onnxprune sensitivity on this model"
            )
        return cls(errors, sizes)

    def applied(self, rankings: Sequence[Ranking]) -> list[Ranking]:
        """Rankings whose errors add up to what was measured at every point of the table, and keep their course between.

        Raises
        ------
        ModelError
            The table lacks a group of the model, or has another one by its name.
        """
        return [replace(ranking, errors=self._errors(ranking)) for ranking in rankings]

    def _errors(self, ranking: Ranking) -> np.ndarray:
        name = bundle_id(ranking.bundle)
        if self.sizes.get(name, ranking.bundle.size) != ranking.bundle.size:
            raise ModelError(
                f"group {name} has {ranking.bundle.size} channels, {self.sizes[name]} in the sensitivity table; measure "
                "with the same --attention, --ignore and --only"
            )
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
