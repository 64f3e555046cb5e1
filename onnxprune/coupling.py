"""What coupling found out: classes of labels, groups of channels, and what is frozen and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnxprune.labels import Axis, Contraction, Ledger, Reason
from onnxprune.model import Model


def distinct(values: np.ndarray) -> np.ndarray:
    """Distinct integers, ascending. ``numpy.unique`` hashes, which is several times slower on long arrays."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(ordered) else ordered


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One axis of one constant: ``classes[i]`` is the class of index i; ``ends`` where channels end in it."""

    tensor: str
    axis: int
    classes: np.ndarray
    ends: bool


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Channels that occupy the same axes; ``classes`` int64 of shape ``(size,)``, ascending."""

    id: str
    classes: np.ndarray
    members: tuple[tuple[str, int], ...]
    frozen: Reason | None

    @property
    def size(self) -> int:
        """Number of channels."""
        return len(self.classes)


@dataclass(frozen=True, eq=False)
class Coupling:
    """The result of coupling.

    Attributes
    ----------
    classes
        Class of every label, int64 of shape ``(ledger.n_labels,)``. A class is a channel.
    reason
        Per class an index into ``reasons`` where it is frozen, else -1.
    """

    model: Model
    ledger: Ledger
    classes: np.ndarray
    reason: np.ndarray
    reasons: tuple[Reason, ...]

    @property
    def n_classes(self) -> int:
        """Number of channels, frozen ones included."""
        return len(self.reason)

    @property
    def frozen(self) -> np.ndarray:
        """Whether each class is frozen, bool of shape ``(n_classes,)``."""
        return self.reason >= 0

    def atoms(self, axis: Axis) -> list[np.ndarray]:
        """Classes of each labelled atom of an axis."""
        return [self.classes[atom.labels] for atom in axis if atom.labels is not None]

    def kept(self, axis: Axis, keep: np.ndarray) -> np.ndarray:
        """Kept indices of an axis under ``keep`` (bool per class), ascending."""
        mask = np.ones(1, bool)
        for atom in axis:
            own = np.ones(atom.size, bool) if atom.labels is None else keep[self.classes[atom.labels]]
            mask = np.logical_and.outer(mask, own).ravel()
        return np.flatnonzero(mask)

    def axes(self, tensor: str) -> tuple[Axis, ...]:
        """Axes of a computed tensor."""
        return self.ledger.layout(tensor).axes

    @cached_property
    def contractions(self) -> tuple[Contraction, ...]:
        """Where axes of computed tensors end."""
        return tuple(c for c in self.ledger.contractions if self.model.constant(c.node.inputs[c.input]) is None)

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """Labelled axes of constants."""
        ended: set[int] = set()
        for c in self.ledger.contractions:
            name = c.node.inputs[c.input]
            if self.model.constant(name) is not None or name in self.ledger.derived:
                ended.update(id(atom) for atom in self.ledger.input(c.node, c.input, ()).axes[c.axis])
        return tuple(
            Member(name, axis, self.classes[atom.labels], id(atom) in ended)
            for (name, _), axes in self.ledger.constants.items()
            for axis, atom in sorted(axes.items())
        )

    @cached_property
    def read_whole(self) -> frozenset[str]:
        """Constants that something reads without labels (a body of control flow, a shape operand, the graph's outputs)."""
        model, labelled = self.model, {(key, name) for name, key in self.ledger.constants}
        shared = {name for name, key in self.ledger.constants if not key}
        found = {model.aliases.get(name, name) for name in model.outputs if model.constant(name)}
        for node in model.nodes:
            found.update(model.aliases.get(name, name) for name in node.captured)
            if node.key in model.aliases:
                continue
            for name in node.inputs:
                root = model.aliases.get(name, name)
                if root in model.constants and root not in shared and (node.key, root) not in labelled:
                    found.add(root)
        return frozenset(found)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Groups in graph order: the prunable ones, and the frozen ones that multiply-accumulates depend on."""
        return tuple(_groups(self))


def _groups(coupling: Coupling) -> Iterable[Group]:
    """Classes that occur equally often on the same axes form a group; equal occurrence is found by hashing."""
    ledger, n = coupling.ledger, coupling.n_classes
    arrays = list({array.tobytes(): array for array in (coupling.classes[labels] for labels in ledger.atoms)}.values())
    if not arrays:
        return
    rng = np.random.default_rng(0)
    marks = rng.integers(0, 2**62, len(arrays), dtype=np.int64)
    owner = np.repeat(np.arange(len(arrays)), [len(array) for array in arrays])
    signature = np.zeros(n, np.int64)
    with np.errstate(over="ignore"):  # a sum counts how often a channel occurs on each axis, too
        np.add.at(signature, np.concatenate(arrays), marks[owner])
    listed = ~coupling.frozen
    for work in ledger.works:
        for axis in work.axes:
            for classes in coupling.atoms(axis):
                listed[classes] = True
    in_constant = np.zeros(n, bool)
    for member in coupling.members:
        in_constant[member.classes] = True
    mine = np.flatnonzero(listed & in_constant)
    if not len(mine):
        return
    keys = np.stack([signature[mine], coupling.reason[mine]], 1)
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    of_class = np.full(n, -1)
    rank = np.argsort(np.argsort(first))
    of_class[mine] = rank[inverse.ravel()]
    members: dict[int, dict[tuple[str, int], None]] = {}
    met: dict[bytes, list[int]] = {}
    for member in coupling.members:
        key = member.classes.tobytes()
        if key not in met:
            met[key] = distinct(of_class[member.classes]).tolist()
        for group in met[key]:
            members.setdefault(group, {})[member.tensor, member.axis] = None
    order = np.argsort(of_class[mine], kind="stable")
    for number, classes in enumerate(np.split(mine[order], np.cumsum(np.bincount(of_class[mine]))[:-1])):
        index = coupling.reason[classes[0]]
        reason = coupling.reasons[index] if index >= 0 else None
        yield Group(f"g{number + 1}", classes, tuple(members[number]), reason)
