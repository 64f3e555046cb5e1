"""Plan: which channels stay. A data type, its JSON, and how it maps to a coupled model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxprune.coupling import ATTENTION, Coupling
from onnxprune.errors import ModelError, ProofError
from onnxprune.slices import Slices

MOST_MARKS, MOST_AXES = 100, 64
"""More ``@`` than the name of a tensor has, and more axes than an array can have."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Channels that stay.

    Attributes
    ----------
    initializers
        By tensor name: axis to kept indices. ``NAME@FIRST_OUTPUT`` is the slice that one reader of a shared vector needs.
    groups
        ``(id, size, keep)`` per group, ``keep`` a tuple of bool.
    sha256, inputs
        The model that the plan was made for: hash of its file (or empty), and its input shapes.
    attention
        What shrinks in attention, as the option of that name says.
    """

    initializers: Mapping[str, Slices]
    groups: tuple[tuple[str, int, tuple[bool, ...]], ...]
    sha256: str = ""
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    added: Mapping[str, Any] = field(default_factory=dict)
    attention: str = "auto"

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data (``schema`` 1)."""
        return {
            "schema": 1,
            "model": {"sha256": self.sha256, "inputs": {name: list(shape) for name, shape in self.inputs.items()}},
            "initializers": {
                name: {str(axis): list(kept) for axis, kept in axes.items()} for name, axes in self.initializers.items()
            },
            "groups": [{"id": name, "size": size, "keep": list(keep)} for name, size, keep in self.groups],
            "added": dict(self.added),
            "attention": self.attention,
        }

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Parse a plan; :class:`ModelError` where it is not one."""
        try:
            data = json.loads(text)
            if data["schema"] != 1:
                raise ModelError(f"plan schema {data['schema']!r:.40} is unknown to this version; it reads schema 1")
            initializers = {
                _name(full): {_axis(axis): _indices(kept) for axis, kept in axes.items()}
                for full, axes in data["initializers"].items()
            }
            groups = tuple((str(g["id"]), int(g["size"]), tuple(map(bool, g["keep"]))) for g in data.get("groups", ()))
            if any(size != len(keep) for _, size, keep in groups):
                raise ModelError("a group of the plan keeps or removes another number of channels than it has")
            model = data.get("model", {})
            inputs = {name: _shape(sizes) for name, sizes in model.get("inputs", {}).items()}
            added = {name: _added(entry) for name, entry in data.get("added", {}).items()}
            attention = data.get("attention", "auto")
            if attention not in ATTENTION:
                raise ValueError(f"attention {attention!r:.40}")
            return cls(initializers, groups, str(model.get("sha256", "")), inputs, added, attention)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ModelError(f"not a plan written by onnxprune ({error!r})") from error


def _name(full: str) -> str:
    """A tensor's name; each of its ``@`` may be what a reader's name follows, so that not just any number is taken."""
    if full.count("@") > MOST_MARKS:
        raise ModelError(f"the plan names a tensor {full[:20]}... with more than {MOST_MARKS} @, which no model has")
    return full


def _axis(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"axis {text!r:.40}")
    return int(text)


def _shape(sizes: list) -> tuple[int, ...]:
    if not isinstance(sizes, list) or len(sizes) > MOST_AXES or not all(type(size) is int for size in sizes):
        raise ValueError(f"input shape {sizes!r:.40}")
    return tuple(sizes)


def _added(entry: dict[str, Any]) -> dict[str, Any]:
    texts, place = (entry["node"], entry["replaces"]), entry["input"]
    if not all(isinstance(text, str) for text in texts) or not (place is None or type(place) is int):
        raise ValueError(f"added {entry!r:.80}")
    return entry


def _indices(kept: list) -> list:
    """Indices, or rows of them: nothing deeper, and not both."""
    if any(isinstance(row, list) for row in kept):
        return [[int(index) for index in row] for row in kept]
    return [int(index) for index in kept]


def make_plan(coupling: Coupling, keep: np.ndarray, sha256: str = "") -> Plan:
    """Write down which indices of which constant stay under ``keep`` (bool per class)."""
    groups = tuple((g.id, g.size, tuple(keep[g.classes].tolist())) for g in coupling.groups)
    return Plan(expected_slices(coupling, keep), groups, sha256, dict(coupling.model.input_shapes))


def expected_slices(coupling: Coupling, keep: np.ndarray) -> dict[str, Slices]:
    """Kept indices per constant and axis under ``keep``.

    A vector that exporters shared between unrelated layers gets a slice per reader where they differ; the first reader's
    keeps the name, unless something reads the vector whole.
    """
    initializers: dict[str, Slices] = {}
    readers: dict[str, list[tuple[str, Slices]]] = {}
    for (name, key), axes in coupling.ledger.constants.items():
        slices = {}
        for axis, atom in sorted(axes.items()):
            kept = coupling.kept_in_rows(atom, keep)
            if kept.shape[-1] < atom.size:
                slices[axis] = kept.tolist()
        readers.setdefault(name, []).append((key, slices))
    for name, uses in readers.items():
        whole = name in coupling.read_whole
        first = {} if whole else uses[0][1]
        if first:
            initializers[name] = first
        for key, slices in uses if whole else uses[1:]:
            if slices != first:
                initializers[f"{name}@{key}"] = slices
    return initializers


def keep_of(coupling: Coupling, plan: Plan) -> np.ndarray:
    """Keep mask per class that a plan's initializers mean for this model (bool of shape ``(n_classes,)``).

    Raises
    ------
    ModelError
        The plan names tensors, axes or indices that the model does not have.
    """
    keep = np.ones(coupling.n_classes, bool)
    for full, slices in plan.initializers.items():
        name, key = owner(coupling, full)
        uses = [axes for (n, k), axes in coupling.ledger.constants.items() if n == name and (not key or k == key)]
        if not uses:
            raise ModelError(f"the plan slices {full}, which this model does not have or does not use")
        shape = coupling.model.constants[name].shape
        for axis, kept in slices.items():
            size = shape[axis] if 0 <= axis < len(shape) else 0
            rows = kept if kept and isinstance(kept[0], list) else [kept]
            for row in rows:
                if not row or min(row) < 0 or max(row) >= size or len(set(row)) < len(row):
                    raise ModelError(
                        f"the plan keeps indices of {full} axis {axis} that do not exist or repeat ({size} there)"
                    )
            atom = uses[0].get(axis)
            if atom is not None and atom.labels is not None:
                classes = coupling.classes[atom.labels].reshape(-1, size)
                if len(rows) not in (1, len(classes)):
                    raise ModelError(f"the plan keeps {len(rows)} rows of {full} axis {axis}, which has {len(classes)}")
                for own, row in zip(classes, rows * (len(classes) // len(rows)), strict=True):
                    keep[np.delete(own, row)] = False
    refuse_impossible(coupling, keep)
    return keep


def owner(coupling: Coupling, full: str) -> tuple[str, str]:
    """Constant behind a plan's tensor name, and the reader (its first output) that a slice of a shared vector is for."""
    if full in coupling.model.constants:
        return full, ""
    pieces = full.split("@")
    splits = (("@".join(pieces[:i]), "@".join(pieces[i:])) for i in range(1, len(pieces)))
    return next((pair for pair in splits if pair in coupling.ledger.constants), (full, ""))


def refuse_impossible(coupling: Coupling, keep: np.ndarray) -> None:
    """A plan that removes frozen channels is wrong however well it fits, and rows that keep unequal numbers fit nothing."""
    if coupling.unbalanced(keep):
        raise ModelError("the plan keeps unequal numbers of channels in groups or heads that must stay equally wide")
    for member in coupling.members:
        cut = member.classes[~keep[member.classes] & coupling.frozen[member.classes]].ravel()
        if len(cut):
            reason = coupling.reasons[coupling.reason[cut[0]]]
            where = f"{member.tensor} axis {member.axis}"
            raise ProofError(f"the plan removes channels of {where} that must stay: {reason.text}", (where,))


def keep_of_groups(coupling: Coupling, plan: Plan) -> np.ndarray:
    """Keep mask per class that a plan's groups mean for the model it was made for.

    Raises
    ------
    ModelError
        The model has other groups.
    """
    if [(g.id, g.size) for g in coupling.groups] != [(name, size) for name, size, _ in plan.groups]:
        raise ModelError(
            "the plan's groups are not this model's; was it made for another model, or by another version?"
        )
    keep = np.ones(coupling.n_classes, bool)
    for group, (_, _, kept) in zip(coupling.groups, plan.groups, strict=True):
        keep[group.classes] = kept
    refuse_impossible(coupling, keep)
    return keep
