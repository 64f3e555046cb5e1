"""What coupling found out: classes of labels, groups of channels, and what is frozen and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnxprune.errors import ModelError
from onnxprune.labels import Atom, Axis, Contraction, Ledger, Reason, is_fixed, length
from onnxprune.model import Model

ATTENTION = ("auto", "dims", "heads")
"""What shrinks in attention: dimensions inside every head, whole heads, or (auto) dimensions where they can."""


def distinct(values: np.ndarray) -> np.ndarray:
    """Distinct integers, ascending. ``numpy.unique`` hashes, which is several times slower on long arrays."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(ordered) else ordered


def first_row(labels: np.ndarray) -> np.ndarray:
    """Labels of an atom in its first row: all rows keep equally many."""
    return labels.reshape(-1, labels.shape[-1])[0]


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One axis of one constant; ``ends`` where channels end in it.

    ``classes`` int64 of shape ``(size,)``, or ``(rows, size)`` where every block of axis 0 has channels of its own there
    (weights of a grouped convolution).
    """

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


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """Channels that are removed in units: so many of each cell at once, so that every tensor stays rectangular.

    A cell holds the channels that stand in the same rows; which of them stay is free, how many is not.

    Attributes
    ----------
    groups
        The groups it consists of: one, unless balances of different groups depend on each other.
    cells
        Classes of each cell, int64 of any length.
    shares
        How many channels of each cell go with a unit.
    owners
        Which of the groups each cell belongs to.
    """

    groups: tuple[Group, ...]
    cells: tuple[np.ndarray, ...]
    shares: tuple[int, ...]
    owners: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of channels."""
        return sum(group.size for group in self.groups)

    @property
    def unit(self) -> int:
        """Number of channels in a unit."""
        return sum(self.shares)

    @property
    def n_units(self) -> int:
        """Number of units that there are."""
        return min(len(cell) // share for cell, share in zip(self.cells, self.shares, strict=True))

    @property
    def removable(self) -> int:
        """Number of units that can be removed while every group keeps a channel."""
        lost = np.bincount(self.owners, self.shares)  # channels of each group in a unit
        return min(self.n_units, *(int((g.size - 1) // n) for g, n in zip(self.groups, lost, strict=True)))

    def units(self, order: np.ndarray) -> np.ndarray:
        """Classes of every unit, int64 of shape ``(n_units, unit)``: those that ``order`` (per class) ranks lowest first."""
        ranked = [
            cell[np.argsort(order[cell], kind="stable")][: self.n_units * share].reshape(-1, share)
            for cell, share in zip(self.cells, self.shares, strict=True)
        ]
        return np.concatenate(ranked, 1)


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

    def frozen_axis(self, axis: Axis) -> bool:
        """Whether an axis keeps all its indices."""
        return all(self.frozen[classes].all() for classes in self.atoms(axis))

    def atoms(self, axis: Axis) -> list[np.ndarray]:
        """Classes of each labelled atom of an axis, with a dimension for each of its rows."""
        return [self.classes[atom.labels] for atom in axis if atom.labels is not None]

    def kept(self, axis: Axis, keep: np.ndarray) -> np.ndarray:
        """Kept indices of an axis under ``keep`` (bool per class), ascending; those of the first row where rows differ."""
        mask = np.ones(1, bool)
        for atom in axis:
            own = np.ones(atom.size, bool) if atom.labels is None else keep[self.classes[first_row(atom.labels)]]
            mask = np.logical_and.outer(mask, own).ravel()
        return np.flatnonzero(mask)

    def shape(self, axes: Iterable[Axis], keep: np.ndarray) -> tuple[int, ...]:
        """Length that each axis has under ``keep``."""
        return tuple(len(self.kept(axis, keep)) if axis else 1 for axis in axes)

    def extract(self, axes: tuple[Axis, ...], keep: np.ndarray, array: np.ndarray) -> np.ndarray:
        """What is left of a tensor under ``keep``; axes that cannot shrink may be of another length than the layout's."""
        if array.ndim != len(axes):  # data decide the rank: nothing of it can shrink
            return array
        known = zip(axes, array.shape, strict=True)
        axes = tuple((Atom(size),) if is_fixed(axis) and length(axis) != size else axis for axis, size in known)
        shape = self.shape(axes, keep)
        if shape == array.shape:
            return array
        atoms = [atom for axis in _unfolded(axes) for atom in axis]
        grid = array.reshape([atom.size for atom in atoms])
        for place, atom in enumerate(atoms):
            if atom.rows:
                grid = np.take_along_axis(grid, self._in_rows(atoms, place, self.kept_in_rows(atom, keep)), place)
        for place, atom in enumerate(atoms):
            if atom.labels is not None and not atom.rows:
                grid = grid.take(np.flatnonzero(keep[self.classes[atom.labels]]), place)
        return grid.reshape(shape)

    def kept_in_rows(self, atom: Atom, keep: np.ndarray) -> np.ndarray:
        """Kept indices of an atom in each of its rows, int64 of shape ``(*rows, kept)``."""
        mask = keep[self.classes[atom.labels]]
        return np.nonzero(mask)[-1].reshape(*mask.shape[:-1], -1)

    def mask(self, axes: tuple[Axis, ...], position: int, keep: np.ndarray) -> np.ndarray:
        """Which elements one axis keeps, bool: broadcasts to a tensor of these axes."""
        unfolded = _unfolded(axes)
        atoms = [atom for axis in unfolded for atom in axis]
        own = [place for place, atom in enumerate(atoms) if atom in unfolded[position] and atom.labels is not None]
        grid = np.ones([1] * len(atoms), bool)
        for place in own:
            grid = grid & self._in_rows(atoms, place, keep[self.classes[atoms[place].labels]])
        shape, place = [], 0
        for axis in unfolded:
            if any(grid.shape[place + i] > 1 for i in range(len(axis))):
                whole = [*grid.shape[:place], *(atom.size for atom in axis), *grid.shape[place + len(axis) :]]
                grid = np.broadcast_to(grid, whole)
                shape.append(length(axis))
            else:
                shape.append(1)
            place += len(axis)
        return grid.reshape(shape)

    @staticmethod
    def _in_rows(atoms: list[Atom], place: int, values: np.ndarray) -> np.ndarray:
        """Give values per row of ``atoms[place]`` one dimension for each atom."""
        atom = atoms[place]
        dims = [atoms.index(row) for row in atom.rows]
        order = np.argsort([*dims, place])
        shape = [1] * len(atoms)
        for dim, size in zip((*dims, place), values.shape, strict=True):
            shape[dim] = size
        return values.transpose(order).reshape(shape)

    @cached_property
    def balances(self) -> tuple[np.ndarray, ...]:
        """Grids of classes, all of whose rows must keep equally many, without those that always do."""
        grids = {}
        for labels in self.ledger.balances:
            grid = self.classes[labels].reshape(-1, labels.shape[-1])
            ordered = np.sort(grid, 1)
            if not self.frozen[grid].all() and (ordered != ordered[0]).any():
                grids[grid.tobytes(), grid.shape] = grid
        return tuple(grids.values())

    def unbalanced(self, keep: np.ndarray) -> bool:
        """Whether some tensor would not stay rectangular under ``keep``."""
        return any(np.ptp(keep[grid].sum(1)) for grid in self.balances)

    @cached_property
    def bundles(self) -> tuple[Bundle, ...]:
        """The prunable groups, in units that leave every tensor rectangular."""
        return tuple(bundle for bundle, _ in self._bundled if bundle.cells)

    @cached_property
    def uneven(self) -> tuple[np.ndarray, ...]:
        """Classes that cannot be removed because their rows cannot shrink evenly."""
        if not self.balances:
            return ()
        return tuple(
            np.concatenate([group.classes for group in bundle.groups]) for bundle, even in self._bundled if not even
        )

    @cached_property
    def _bundled(self) -> list[tuple[Bundle, bool]]:
        return list(_bundles(self))

    def axes(self, tensor: str) -> tuple[Axis, ...]:
        """Axes of a computed tensor."""
        return self.ledger.layout(tensor).axes

    @cached_property
    def contractions(self) -> tuple[Contraction, ...]:
        """Where axes of computed tensors end, or channels of a state."""
        return tuple(
            c for c in self.ledger.contractions if c.state or self.model.constant(c.node.inputs[c.input]) is None
        )

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
    def lasting(self) -> frozenset[str]:
        """Shape arithmetic that no dynamic length has a part in: as a constant it would be right at every size.

        What cannot shrink is given other lengths; what comes out the same does not depend on them.
        """
        model = self.model
        if model.is_static or model.arithmetic is None:
            return model.static
        measured = {n.inputs[0] for n in model.nodes if n.op in ("Shape", "Size") and n.key in model.static}
        same = set(model.static_values)
        for grown in (lambda n: n + 1, lambda n: 2 * n + 1, lambda n: 3 * n):
            other = {
                name: tuple(self._grown(axis, grown) for axis in self.axes(name))
                for name in measured
                if model.constant(name) is None
            }
            try:
                values = model.arithmetic({**model.shapes, **other})
            except ModelError:
                return frozenset()
            same = {name for name in same if np.array_equal(values[name], model.static_values[name])}
        return frozenset(same)

    def _grown(self, axis: Axis, grown: Callable[[int], int]) -> int:
        """Length of an axis all of whose atoms grow that hold something that stays: it may stand for a dynamic length."""
        if not axis:
            return grown(1)
        sizes = []
        for atom in axis:
            stays = atom.labels is None or self.frozen[self.classes[atom.labels]].any()
            sizes.append(grown(atom.size) if stays else atom.size)
        return math.prod(sizes)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Groups in graph order: the prunable ones, and the frozen ones that multiply-accumulates depend on."""
        return tuple(_groups(self))


def _marks(n: int, first: int = 0) -> np.ndarray:
    """Hashes of the numbers from ``first`` on, int64 (splitmix64 by Steele, Lea and Flood, 2014)."""
    z = np.arange(first + 1, first + n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))).view(np.int64)


def _groups(coupling: Coupling) -> Iterable[Group]:
    """Classes that occur equally often on the same axes form a group; equal occurrence is found by hashing."""
    ledger, n = coupling.ledger, coupling.n_classes
    arrays = list({a.tobytes(): a for a in (coupling.classes[labels.ravel()] for labels in ledger.atoms)}.values())
    if not arrays:
        return
    marks = _marks(len(arrays))
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
            met[key] = distinct(of_class[member.classes.ravel()]).tolist()
        for group in met[key]:
            members.setdefault(group, {})[member.tensor, member.axis] = None
    order = np.argsort(of_class[mine], kind="stable")
    for number, classes in enumerate(np.split(mine[order], np.cumsum(np.bincount(of_class[mine]))[:-1])):
        index = coupling.reason[classes[0]]
        reason = coupling.reasons[index] if index >= 0 else None
        yield Group(f"g{number + 1}", classes, tuple(members[number]), reason)


def _bundles(coupling: Coupling) -> Iterable[tuple[Bundle, bool]]:
    """Bundle the groups that must shrink together; False where they cannot, because other rows than theirs would not."""
    groups = [group for group in coupling.groups if group.frozen is None]
    of_class = np.full(coupling.n_classes, -1)
    for number, group in enumerate(groups):
        of_class[group.classes] = number
    n_marks = 0
    cell_of = np.zeros(coupling.n_classes, np.int64)
    linked = np.arange(len(groups))
    touching: dict[int, list[np.ndarray]] = {}
    for grid in coupling.balances:
        with np.errstate(over="ignore"):
            np.add.at(cell_of, grid, _marks(len(grid), n_marks)[:, None])
        n_marks += len(grid)
        owners = of_class[grid]
        present = [number for number in distinct(owners.ravel()).tolist() if number >= 0]
        for number in present:
            touching.setdefault(number, []).append(grid)
        uneven = [number for number in present if np.ptp((owners == number).sum(1))]
        if len(uneven) > 1:
            linked[np.isin(linked, linked[uneven])] = linked[uneven].min()
    for first in distinct(linked).tolist():
        mine = np.flatnonzero(linked == first).tolist()
        own = tuple(groups[number] for number in mine)
        grids = [grid for number in mine for grid in touching.get(number, ())]
        if not grids:
            yield Bundle(own, (own[0].classes,), (1,), (0,)), True
            continue
        classes = np.concatenate([group.classes for group in own])
        key = np.stack([cell_of[classes], of_class[classes]], 1)
        kinds, cell, sizes = np.unique(key, axis=0, return_inverse=True, return_counts=True)
        owners = tuple(mine.index(number) for number in kinds[:, 1])
        cells = tuple(classes[cell.ravel() == number] for number in range(len(sizes)))
        for shares in (np.ones(len(sizes), int), sizes // np.gcd.reduce(sizes)):
            weight = np.zeros(coupling.n_classes)
            weight[classes] = (shares / sizes)[cell.ravel()]
            if all(np.ptp(weight[grid].sum(1)) < 1e-9 for grid in grids):
                yield Bundle(own, cells, tuple(shares.tolist()), owners), True
                break
        else:
            yield Bundle(own, (), (), ()), False


def _unfolded(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Axes whose atoms include all rows of the others: a whole is seen as the grid that another atom's rows are part of."""
    rows = {row for axis in axes for atom in axis for row in atom.rows}
    lost = rows - {atom for axis in axes for atom in axis}
    if not lost:
        return axes
    grids = {row.joint.whole: (row.joint.outer, row.joint.inner) for row in lost if row.joint is not None}
    return tuple(tuple(part for atom in axis for part in grids.get(atom, (atom,))) for axis in axes)
