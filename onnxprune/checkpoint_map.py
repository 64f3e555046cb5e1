"""Which parameter of a checkpoint a plan's tensor is, and what the plan cuts of it."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxprune.checkpoint_files import Checkpoint
from onnxprune.errors import FileError, ModelError, UsageError
from onnxprune.model import any_begins
from onnxprune.plan import Plan
from onnxprune.slices import Slices, take


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter, and which axis of the plan's tensor each of its axes is (None: the same; of one axis: none)."""

    name: str
    axes: tuple[int | None, ...] | None = None


Mapped = Mapping[str, tuple[Target, ...]]
"""By tensor of the plan: the parameters that are sliced like it; none where it is not in the checkpoint."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What stays of a parameter.

    Attributes
    ----------
    slices
        Kept indices by axis of the parameter.
    tensors
        Names in the plan that say so.
    blocks
        Axis whose blocks the rows of a grouped convolution belong to; None where there are no such rows.
    """

    slices: Slices
    tensors: tuple[str, ...] = field(compare=False)
    blocks: int | None = None

    def of(self, elements: np.ndarray) -> np.ndarray:
        """Return what stays.

        Raises
        ------
        ModelError
            An index repeats or lies outside; the message says which.
        """
        for axis, kept in self.slices.items():
            rows = kept if _in_rows(kept) else [kept]
            size = elements.shape[axis] if 0 <= axis < elements.ndim else 0
            strays = [index for row in rows for index in row if not 0 <= index < size]
            if strays:
                raise ModelError(f"index {strays[0]} of axis {axis}")
            if any(not row or len(set(row)) < len(row) for row in rows):
                raise ModelError(f"nothing, or an index twice, of axis {axis}")
            if self.blocks is not None and elements.shape[self.blocks] % len(rows):
                raise ModelError(f"{len(rows)} rows of axis {axis}")
        front = self.blocks or 0
        order = [front, *(axis for axis in range(elements.ndim) if axis != front)]
        moved = {order.index(axis): kept for axis, kept in self.slices.items()}
        return np.moveaxis(take(np.moveaxis(elements, front, 0), moved, self.tensors[0]), 0, front)


def _in_rows(kept: list) -> bool:
    return bool(kept) and isinstance(kept[0], list)


def read_map(given: Mapping[str, Any] | str | os.PathLike | None) -> Mapped:
    """Read a map, from a JSON file or plain data of the same form.

    Raises
    ------
    UsageError
        It has another form than ``{tensor: name, [name, ...], {"name": ..., "axes": [...]} or null}``.
    FileError
        The file cannot be read.
    """
    if given is None:
        return {}
    where = "the map" if isinstance(given, Mapping) else str(given)
    if not isinstance(given, Mapping):
        try:
            given = json.loads(pathlib.Path(given).read_text(encoding="utf-8"))
        except OSError as error:
            raise FileError(f"{where}: the map cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}: the map is not valid JSON ({error})") from error
    if not isinstance(given, Mapping):
        raise UsageError(f"{where}: the map is no object of tensor names and parameter names")
    return {tensor: tuple(_targets(tensor, value, where)) for tensor, value in given.items()}


def _targets(tensor: str, value: Any, where: str) -> Iterator[Target]:
    for entry in value if isinstance(value, list) else [] if value is None else [value]:
        table = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(table, Mapping) or not isinstance(table.get("name"), str) or table.keys() - {"name", "axes"}:
            raise UsageError(
                f'{where}: {tensor} must be a name, a list of names, {{"name": ..., "axes": [...]}} or null, '
                f"not {json.dumps(entry)}"
            )
        axes: Any = table.get("axes")
        if axes is not None:
            known = [axis for axis in axes if axis is not None] if isinstance(axes, list) else [-1]
            if not all(type(axis) is int and axis >= 0 for axis in known) or len(set(known)) < len(known):
                raise UsageError(f"{where}: the axes of {tensor} must be different numbers (or null), such as [1, 0]")
        yield Target(table["name"], None if axes is None else tuple(axes))


def cuts(plan: Plan, checkpoint: Checkpoint, mapped: Mapped) -> dict[str, Cut]:
    """Say what is cut of which parameter, in the checkpoint's order.

    Raises
    ------
    ModelError
        A tensor of the plan is no parameter by its name, and not in the map either (all such are listed); or a parameter
        gets two different slices.
    UsageError
        The map names parameters that do not exist, or leaves out an axis that is sliced.
    """
    strangers = sorted(plan.initializers.keys() - checkpoint.parameters.keys())
    found: dict[str, Cut] = {}
    unknown, gone = [], []
    for tensor, slices in plan.initializers.items():
        if not slices and tensor not in mapped:
            continue
        if tensor not in mapped and (tensor not in checkpoint.parameters or any_begins(strangers, f"{tensor}@")):
            unknown.append(tensor)
        for target in mapped.get(tensor, (Target(tensor),)):
            if target.name not in checkpoint.parameters:
                gone.append(f"{target.name} (for {tensor})")
                continue
            for name in (target.name, *checkpoint.twins.get(target.name, ())):
                _add(found, name, _cut(tensor, slices, target))
    if unknown:
        raise ModelError(
            f"{len(unknown)} tensors of the plan are no parameters by their names (or shared by several): "
            f"{', '.join(unknown)}; say in --map which parameters they are, null for none"
        )
    if gone:
        raise UsageError(f"the map names parameters that the checkpoint does not have: {', '.join(gone)}")
    return {name: found[name] for name in checkpoint.parameters if name in found and found[name].slices}


def _cut(tensor: str, slices: Slices, target: Target) -> Cut:
    rows = any(map(_in_rows, slices.values()))
    if target.axes is None:
        return Cut(slices, (tensor,), 0 if rows else None)
    missing = sorted((slices.keys() | ({0} if rows else set())) - set(target.axes))
    if missing:
        raise UsageError(
            f"the map says which axis of {tensor} each axis of {target.name} is, but none is axis {missing[0]}"
        )
    own = {place: slices[axis] for place, axis in enumerate(target.axes) if axis in slices}
    return Cut(own, (tensor,), target.axes.index(0) if rows else None)


def _add(found: dict[str, Cut], name: str, cut: Cut) -> None:
    known = found.setdefault(name, cut)
    if known != cut:
        raise ModelError(
            f"{name} gets two different slices, of {known.tensors[0]} and {cut.tensors[0]}; it can have one only "
            "(--map decides which, null for the other)"
        )
    if cut.tensors[0] not in known.tensors:
        found[name] = Cut(known.slices, (*known.tensors, *cut.tensors), known.blocks)
