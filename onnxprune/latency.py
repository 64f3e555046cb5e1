"""Latency of a model under any plan: one table per layer over its channel counts, and what lies between the layers.

Tables are measured here (``onnxprune.stopwatch``) or come from a device as a CSV file. They say which layers are worth
shrinking; what a pruned model really takes is measured end to end before anything is written.
"""

from __future__ import annotations

import csv
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.cost import Cost, Layered, Terms
from onnxprune.errors import FileError, UsageError
from onnxprune.labels import length

MICROSECONDS = 1e3
"""In a millisecond: absolute latency targets are kept in microseconds, so that more than 1 is never a share."""


def parse(text: str | float) -> float:
    """Read a latency target: a share (at most 1) as it is; ``12ms``, ``800us``, ``1.5s``, or 12 (ms), as microseconds.

    Raises
    ------
    UsageError
        It is neither, or is too short a time to be measured.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(us|ms|s)?\s*", str(text), re.IGNORECASE)
    value = float(found[1]) if found else 0.0
    unit = (found[2] or "").lower() if found else ""
    if not unit and 0 < value <= 1:
        return value
    value *= {"us": 1.0, "ms": MICROSECONDS, "s": MICROSECONDS**2, "": MICROSECONDS}[unit]
    if not 1 < value < float("inf"):
        raise UsageError(f"target latency {text}: give a share like 0.7, or a time like 12ms, 800us, 1.5s")
    return value


@dataclass(frozen=True, eq=False)
class Table:
    """Milliseconds of one layer over its channels, linear between the counts that were measured.

    Attributes
    ----------
    inputs, outputs
        Counts, ascending. One count alone: the layer scales with its MAC.
    ms
        Float64 of shape ``(len(inputs), len(outputs))``.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ms: np.ndarray

    @property
    def whole(self) -> float:
        """Milliseconds at the largest counts."""
        return float(self.ms[-1, -1])

    def at(self, inputs: float, outputs: float) -> float:
        """Milliseconds at some counts; beyond the smallest ones the first slope goes on, down to nothing."""
        columns = [_between(self.outputs, row, outputs) for row in self.ms]
        return max(0.0, _between(self.inputs, columns, inputs))

    def to_json(self) -> dict[str, object]:
        """Return plain data."""
        return {"inputs": list(self.inputs), "outputs": list(self.outputs), "ms": self.ms.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Sequence]) -> Table:
        """Read what :meth:`to_json` returned; :class:`ValueError` where it is something else."""
        inputs, outputs, ms = tuple(data["inputs"]), tuple(data["outputs"]), np.array(data["ms"], np.float64)
        counts = [
            all(isinstance(n, int) for n in side) and list(side) == sorted(set(side)) for side in (inputs, outputs)
        ]
        if not all(counts) or ms.shape != (len(inputs), len(outputs)) or not ms.size or not (ms >= 0).all():
            raise ValueError("no table of latencies")
        return cls(inputs, outputs, ms)


def _between(places: Sequence[int], values: Sequence[float] | np.ndarray, place: float) -> float:
    if len(places) == 1:
        return float(values[0])
    left = int(np.clip(np.searchsorted(places, place, "right") - 1, 0, len(places) - 2))
    share = (place - places[left]) / (places[left + 1] - places[left])
    return float(values[left] + share * (values[left + 1] - values[left]))


class Latency:
    """Milliseconds of a model as a cost: the tables of its layers, and a rest that scales with the activations they move.

    Parameters
    ----------
    tables
        Per layer of ``cost.works``; None where nothing is known of it.
    rest
        Milliseconds of everything else at full size.
    """

    def __init__(self, cost: Cost, tables: Sequence[Table | None], rest: float) -> None:
        self.tables = tables
        self.macs = cost.layers.values(cost.counts(np.ones(cost.coupling.n_classes, bool)))
        self.layers = Layered((cost.layers, cost.channels[0], cost.channels[1]), self._layers)
        moved = cost.terms["activations"]
        assert isinstance(moved, Terms)
        total = max(float(moved.values(cost.counts(np.ones(cost.coupling.n_classes, bool))).sum()), 1.0)
        self.rest = Terms(moved.factor * (rest / total), moved.atoms)

    def values(self, counts: np.ndarray) -> np.ndarray:
        """Milliseconds of every layer and of every activation tensor, float64."""
        return np.concatenate([self.layers.values(counts), self.rest.values(counts)])

    def change(self, counts: np.ndarray, atoms: np.ndarray, times: np.ndarray) -> float:
        """How much the whole grows when ``counts[atoms]`` grow by ``times``."""
        return self.layers.change(counts, atoms, times) + self.rest.change(counts, atoms, times)

    def touched(self, atoms: np.ndarray) -> np.ndarray:
        """Layers, and behind them activations, in which any of the atoms occurs."""
        return np.concatenate([self.layers.touched(atoms), len(self.tables) + self.rest.touched(atoms)])

    def _layers(
        self, places: slice | np.ndarray, macs: np.ndarray, inputs: np.ndarray, outputs: np.ndarray
    ) -> np.ndarray:
        chosen = range(len(self.tables))[places] if isinstance(places, slice) else places
        found = np.zeros(len(macs))
        for row, place in enumerate(chosen):
            table = self.tables[place]
            if table is None:
                continue
            if table.ms.size == 1:
                found[row] = table.whole * macs[row] / max(self.macs[place], 1.0)
            else:
                found[row] = table.at(inputs[row], outputs[row])
        return found


def with_latency(cost: Cost, tables: Sequence[Table | None], whole: float | None) -> Cost:
    """The same cost with ``latency`` as one more kind, in milliseconds.

    Parameters
    ----------
    whole
        Milliseconds of the whole model; the tables are scaled down where they add up to more. None: they are all there is.
    """
    full = cost.counts(np.ones(cost.coupling.n_classes, bool))
    known = float(Latency(cost, tables, 0.0).values(full).sum())
    if whole is not None and known > whole:
        share = whole / known
        tables = [None if t is None else Table(t.inputs, t.outputs, t.ms * share) for t in tables]
    rest = max(0.0, whole - known) if whole is not None else 0.0
    return cost.with_terms("latency", Latency(cost, tables, rest))


COLUMNS = ("layer", "inputs", "outputs", "ms")


def read_tables(path: str | os.PathLike, cost: Cost) -> tuple[list[Table | None], list[str]]:
    """Read tables from a CSV file with the columns layer, inputs, outputs, ms; return them and the names it lacks.

    ``layer`` is a node's name or first output. One row per layer tells its milliseconds as the model is; several give them
    for every combination of some counts of input and output channels.

    Raises
    ------
    FileError, UsageError
        The file cannot be read, is no such table, or names no layer of the model.
    """
    rows = _rows(path)
    names = {name: place for place, work in enumerate(cost.works) for name in (work.node.key, work.node.title)}
    points: dict[int, dict[tuple[int, int], float]] = {}
    for name, inputs, outputs, ms in rows:
        if name not in names:
            continue
        own = points.setdefault(names[name], {})
        if (inputs, outputs) in own:
            raise UsageError(f"{path}: {name} has two rows for {inputs} inputs and {outputs} outputs")
        own[inputs, outputs] = ms
    if not points:
        first = cost.works[0].node.title if cost.works else "none"
        raise UsageError(f"{path}: names no layer of the model; its layers are {first} ..., see onnxprune inspect")
    tables: list[Table | None] = []
    for place, work in enumerate(cost.works):
        known = points.get(place)
        tables.append(None if known is None else _grid(known, f"{path}: {work.node.title}"))
        table, channels = tables[-1], work.channels
        if table is None:
            continue
        if channels is None and table.ms.size > 1:
            raise UsageError(
                f"{path}: {work.node.title} ({work.node.op}) takes one row, since its channels are not known"
            )
        sizes = None if channels is None else (length(channels.inputs), length(channels.outputs))
        if sizes is not None and (table.inputs[-1], table.outputs[-1]) != sizes:
            raise UsageError(
                f"{path}: {work.node.title} has {sizes[0]} input and {sizes[1]} output channels; the table ends at "
                f"{table.inputs[-1]} and {table.outputs[-1]}"
            )
    return tables, [work.node.title for place, work in enumerate(cost.works) if place not in points]


def _rows(path: str | os.PathLike) -> list[tuple[str, int, int, float]]:
    try:
        with pathlib.Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise UsageError(f"{path}: the first line must be {','.join(COLUMNS)}")
            rows = []
            for number, row in enumerate(reader, 2):
                try:
                    ms = float(row["ms"])
                    entry = (row["layer"], int(row["inputs"]), int(row["outputs"]), ms)
                except (TypeError, ValueError) as error:
                    raise UsageError(f"{path}: line {number} does not read layer,inputs,outputs,ms") from error
                if not (ms >= 0 and np.isfinite(ms)) or min(entry[1:3]) < 1:
                    raise UsageError(f"{path}: line {number}: counts are at least 1, milliseconds 0 or more")
                rows.append(entry)
    except OSError as error:
        raise FileError(f"{path}: the latency table cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: is not a CSV file ({error})") from error
    return rows


def _grid(points: Mapping[tuple[int, int], float], where: str) -> Table:
    inputs, outputs = (tuple(sorted({point[side] for point in points})) for side in (0, 1))
    if missing := [(i, o) for i in inputs for o in outputs if (i, o) not in points]:
        raise UsageError(f"{where}: no row for {missing[0][0]} inputs and {missing[0][1]} outputs, as for the others")
    return Table(inputs, outputs, np.array([[points[i, o] for o in outputs] for i in inputs]))
