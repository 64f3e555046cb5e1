"""Compose: two plans, the second made for the first's result, as one plan for the original."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxprune.coupling import Coupling
from onnxprune.errors import ModelError
from onnxprune.labels import Atom
from onnxprune.plan import Plan, expected_slices, make_plan, refuse_impossible
from onnxprune.slices import Slices, take

_NOT_ITS_RESULT = "the second plan was not made for the first one's result"


@dataclass(frozen=True, slots=True, eq=False)
class _Use:
    """A constant of the original as one reader has it (all, where ``key`` is empty), and its slices in both plans."""

    name: str
    key: str
    axes: Mapping[int, Atom]
    steps: tuple[Slices, Slices]


def compose(first: Plan, second: Plan, coupling: Coupling) -> Plan:
    """Return the plan that makes of the original what ``second`` makes of ``first``'s result.

    Parameters
    ----------
    coupling
        The original's, with the options of ``first``.

    Raises
    ------
    ModelError
        ``second`` was not made for ``first``'s result, or removes channels that are coupled with others in the original.
    """
    uses = list(_uses(coupling, first, second))
    keep = np.ones(coupling.n_classes, bool)
    for use in uses:
        for axis, atom in use.axes.items():
            alive = _alive(coupling, use, axis, use.steps)
            classes = coupling.classes[atom.labels].reshape(-1, atom.size)
            present = np.asarray(alive.reshape(len(classes), -1, atom.size).any(axis=1))
            present[~present.any(axis=1)] = True  # of blocks that are gone, others tell
            keep[classes[~present]] = False
    refuse_impossible(coupling, keep)
    expected = expected_slices(coupling, keep)
    for use in uses:
        once = (expected.get(f"{use.name}@{use.key}", expected.get(use.name, {})),)
        for axis in use.axes:
            if not np.array_equal(_alive(coupling, use, axis, use.steps), _alive(coupling, use, axis, once)):
                raise ModelError(
                    f"together the plans remove channels of {use.name} axis {axis} that the original couples with "
                    "others they keep; prune the original in one step"
                )
    made = make_plan(coupling, keep, first.sha256)
    return replace(made, added=_added(coupling, first, second), attention=first.attention)


def _uses(coupling: Coupling, first: Plan, second: Plan) -> Iterator[_Use]:
    """Every constant of the original with what the plans make of it, by whichever name it has between them."""
    behind = {entry["node"] for entry in first.added.values() if entry["input"] is None}
    instead = {
        (entry["node"], entry["replaces"].removesuffix(f"@{entry['node']}")): name
        for name, entry in first.added.items()
        if entry["replaces"]
    }
    known = set[str]()
    for name in first.added:
        known |= {full for full in second.initializers if full == name or full.startswith(f"{name}@")}
    for (name, key), axes in coupling.ledger.constants.items():
        own = f"{name}@{key}"
        once = own if own in first.initializers else name
        between = instead.get((key, name), once)
        reader = key
        while reader in behind:
            reader += "/unbiased"
        full = f"{between}@{reader}"
        twice = full if full in second.initializers else between
        known.add(twice)
        steps = first.initializers.get(once, {}), second.initializers.get(twice, {})
        if not axes.keys() >= steps[0].keys() | steps[1].keys():
            raise ModelError(f"the plans slice {name} on an axis that cannot shrink in the original")
        yield _Use(name, key, axes, steps)
    if strange := sorted(second.initializers.keys() - known):
        raise ModelError(f"the second plan slices {strange[0]}, which the original has not as such; {_NOT_ITS_RESULT}")


def _alive(coupling: Coupling, use: _Use, axis: int, steps: tuple[Slices, ...]) -> np.ndarray:
    """What is left after all steps, bool of shape ``(blocks of axis 0, length)``: one block unless rows differ."""
    length = use.axes[axis].size
    flat = not use.axes[axis].rows and not any(_in_rows(slices.get(axis)) for slices in steps)
    n_rows = 1 if flat else coupling.model.constants[use.name].shape[0]
    places = np.arange(n_rows * length).reshape(n_rows, length)
    for slices in steps:
        # Axis 0 counts only where it tells which blocks there are.
        wanted: Slices = {1: slices[axis]} if axis in slices else {}
        if not flat and 0 in slices:
            wanted[0] = slices[0]
        try:
            places = take(places, wanted, use.name)
        except (IndexError, ModelError) as error:
            raise ModelError(f"the plan does not fit {use.name}; {_NOT_ITS_RESULT}") from error
    alive = np.zeros(n_rows * length, bool)
    alive[places.ravel()] = True
    return alive.reshape(n_rows, length)


def _in_rows(kept: list | None) -> bool:
    return kept is not None and any(isinstance(row, list) for row in kept)


def _added(coupling: Coupling, first: Plan, second: Plan) -> dict[str, Any]:
    """Biases that either step added, the second's first: that is the order in which they come out again."""
    for name, entry in second.added.items():
        if name in first.added or entry["replaces"] in first.added:
            raise ModelError(
                f"the bias {name} takes the place of one that was added before; prune the original in one step"
            )
    merged = dict[str, Any]()
    for plan in (second, first):
        for name, entry in plan.added.items():
            kept = second.initializers.get(name, {}) if plan is first else {}
            size = int(np.prod([len(each) for each in kept.values()])) if kept else entry["size"]
            replaces = entry["replaces"]
            if replaces in coupling.model.constants:  # its reader may need another slice than those that still have it
                replaces = f"{replaces}@{entry['node']}"
            merged[name] = {**entry, "size": size, "replaces": replaces}
    return merged
