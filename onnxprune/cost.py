"""Cost of a model under any plan, as arithmetic on counts: nothing is rewritten, evaluating takes microseconds.

Every quantity is a sum of terms ``factor * kept(atom 1) * kept(atom 2) * ...``; a kept count is linear in the channels kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from functools import cached_property
from typing import Protocol

import numpy as np

from onnxprune.coupling import Coupling, distinct, first_row
from onnxprune.labels import Axis, Work, fixed
from onnxprune.model import Node
from onnxprune.profile import Profile, kind_of

KINDS = ("mac", "weights", "params", "activations", "bandwidth", "bytes")


class Amount(Protocol):
    """A cost as a function of counts."""

    def values(self, counts: np.ndarray) -> np.ndarray:
        """Its parts, float64."""

    def change(self, counts: np.ndarray, atoms: np.ndarray, times: np.ndarray) -> float:
        """How much it grows when ``counts[atoms]`` grow by ``times``."""

    def touched(self, atoms: np.ndarray) -> np.ndarray:
        """Parts in which any of the atoms occurs, ascending."""


class Terms:
    """A sum of products: row i is ``factor[i]`` times the counts of ``atoms[i]``; atom 0 always counts one."""

    def __init__(self, factor: np.ndarray, atoms: np.ndarray) -> None:
        self.factor, self.atoms = factor, atoms

    def values(self, counts: np.ndarray) -> np.ndarray:
        """Value of every row, float64."""
        return self.factor * counts[self.atoms].prod(1)

    def change(self, counts: np.ndarray, atoms: np.ndarray, times: np.ndarray) -> float:
        """How much the sum grows when ``counts[atoms]`` grow by ``times``; looks at the rows concerned only."""
        rows = self.touched(atoms)
        more = counts.copy()
        more[atoms] += times
        mine = self.atoms[rows]
        return float((self.factor[rows] * (more[mine].prod(1) - counts[mine].prod(1))).sum())

    def touched(self, atoms: np.ndarray) -> np.ndarray:
        """Rows in which any of the atoms occurs, ascending."""
        order, begin = self._rows
        known = atoms[atoms + 1 < len(begin)]  # others occur in other kinds of cost only
        return distinct(np.concatenate([np.zeros(0, int), *(order[begin[a] : begin[a + 1]] for a in known)]))

    def rows(self, places: np.ndarray) -> Terms:
        """Some of the rows."""
        return Terms(self.factor[places], self.atoms[places])

    def slope(self, counts: np.ndarray) -> np.ndarray:
        """Derivative of the sum by every count."""
        slope = np.zeros(len(counts))
        share = self.values(counts)[:, None] / counts[self.atoms]
        np.add.at(slope, self.atoms, share)
        return slope

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows in which each atom stands: ``order[begin[a]:begin[a + 1]]``."""
        flat = self.atoms.ravel()
        place = np.argsort(flat, kind="stable")
        most = int(flat.max(initial=0)) + 2
        width = max(1, self.atoms.shape[1])
        return place // width, np.searchsorted(flat[place], np.arange(most + 1))


class Layered:
    """A cost of every layer that follows from several sums of one row each: ``value(places, *sums)`` for some layers."""

    def __init__(self, sides: tuple[Terms, ...], value: Callable[..., np.ndarray]) -> None:
        self.sides, self.value = sides, value

    def values(self, counts: np.ndarray) -> np.ndarray:
        """Value of every layer, float64."""
        return self.value(slice(None), *(side.values(counts) for side in self.sides))

    def change(self, counts: np.ndarray, atoms: np.ndarray, times: np.ndarray) -> float:
        """How much the sum grows when ``counts[atoms]`` grow by ``times``."""
        places = self.touched(atoms)
        more = counts.copy()
        more[atoms] += times
        rows = [side.rows(places) for side in self.sides]
        before, after = (self.value(places, *(row.values(c) for row in rows)) for c in (counts, more))
        return float((after - before).sum())

    def touched(self, atoms: np.ndarray) -> np.ndarray:
        """Layers in which any of the atoms occurs, ascending."""
        return distinct(np.concatenate([side.touched(atoms) for side in self.sides]))


class Cost:
    """Cost of a coupled model, in multiply-accumulates and elements (``bytes``: of all constants).

    Parameters
    ----------
    profile
        Hardware that rounds channels up: ``effective_mac`` then count what it computes.

    Attributes
    ----------
    works
        Nodes with multiply-accumulates, in graph order; ``layers`` and ``layer_weights`` have one term for each.
    channels
        Of each of them input channels, output channels, and input channels that an output channel sums over; zero where
        they are not known.
    """

    def __init__(self, coupling: Coupling, profile: Profile | None = None) -> None:
        self.coupling = coupling
        self._known: dict[bytes, int] = {}
        self._arrays: list[np.ndarray] = []
        self.works: list[Work] = coupling.ledger.works
        self.layers = self._terms((work.factor, work.axes) for work in self.works)
        weights = [self._weight(work) for work in self.works]
        self.layer_weights = self._terms((0.0, ()) if w is None else (1.0, w[1]) for w in weights)
        params = [(constant.itemsize, axes) for constant, axes in _constants(coupling)]
        mac, distinct = self.layers, dict(w for w in weights if w is not None)
        weight_terms = [(1.0, axes) for axes in distinct.values()]
        self.weights = self._terms(weight_terms)
        nodes = {work.node.key: work.node for work in self.works}
        activations = [(1.0, axes) for node in nodes.values() for axes in _activations(coupling, node)]
        known = [work.channels for work in self.works]
        self.channels: tuple[Terms, Terms, Terms] = (
            self._terms((0.0, ()) if c is None else (1.0, (c.inputs,)) for c in known),
            self._terms((0.0, ()) if c is None else (1.0, (c.outputs,)) for c in known),
            self._terms((0.0, ()) if c is None else (1.0, (c.summed,)) for c in known),
        )
        self.terms: dict[str, Amount] = {
            "mac": mac,
            "weights": self.weights,
            "params": self._terms((1.0, axes) for _, axes in params),
            "activations": self._terms(activations),
            "bandwidth": self._terms([*weight_terms, *activations]),
            "bytes": self._terms((float(itemsize), axes) for itemsize, axes in params),
        }
        if profile is not None and profile.array:
            self.terms["effective_mac"] = Layered((mac, *self.channels), Rounding(self.works, profile))
        sizes = [len(array) for array in self._arrays]
        self._owner = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        self._labels = np.concatenate([*self._arrays, np.zeros(0, int)]).astype(np.int64)
        self._order = np.argsort(self._labels, kind="stable")
        self._begin = np.searchsorted(self._labels[self._order], np.arange(coupling.n_classes + 1))

    def with_terms(self, kind: str, amount: Amount) -> Cost:
        """The same cost with one more kind."""
        more = copy(self)
        more.terms = {**self.terms, kind: amount}
        return more

    def counts(self, keep: np.ndarray) -> np.ndarray:
        """Kept indices of every atom under ``keep`` (bool per class); element 0 is one."""
        counts = np.bincount(self._owner, weights=keep[self._labels], minlength=len(self._arrays) + 1)
        counts[0] = 1.0
        return counts

    def increment(self, channels: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """Atoms in which channels occur, and how often in all."""
        runs = [self._order[self._begin[c] : self._begin[c + 1]] for c in np.atleast_1d(channels)]
        return np.unique(self._owner[np.concatenate(runs)], return_counts=True)

    def total(self, kind: str, counts: np.ndarray) -> float:
        """Cost of one kind for given counts."""
        return float(self.terms[kind].values(counts).sum())

    def of(self, keep: np.ndarray) -> dict[str, int]:
        """All kinds of cost that are counted under ``keep``: not latency, which is measured."""
        counts = self.counts(keep)
        return {kind: round(self.total(kind, counts)) for kind in self.kinds if kind != "latency"}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every kind of cost that is known."""
        return tuple(self.terms)

    def _weight(self, work: Work) -> tuple[str, tuple[Axis, ...]] | None:
        if work.weight is None:
            return None
        name = work.node.inputs[work.weight]
        axes = work.packed or self.coupling.ledger.input(work.node, work.weight, ()).axes
        return self.coupling.model.aliases.get(name, name), axes

    def _terms(self, rows: Iterable[tuple[float, Iterable[Axis]]]) -> Terms:
        factors, atoms = [], []
        for constant, axes in rows:
            factor, row = float(constant), []
            for axis in axes:
                for atom in axis:
                    if atom.labels is None:
                        factor *= atom.size
                    else:
                        row.append(self._atom(self.coupling.classes[first_row(atom.labels)]))
            factors.append(factor)
            atoms.append(row)
        width = max((len(row) for row in atoms), default=0)
        padded = np.array([row + [0] * (width - len(row)) for row in atoms], np.int64).reshape(len(atoms), width)
        return Terms(np.array(factors), padded)

    def _atom(self, classes: np.ndarray) -> int:
        key = classes.tobytes()
        if key not in self._known:
            self._arrays.append(classes)
            self._known[key] = len(self._arrays)
        return self._known[key]


class Rounding:
    """Multiply-accumulates with the channels of every product rounded up to a profile's array of multipliers.

    A grouped convolution is a product for each group; a depthwise one fills the array along its outputs alone.
    """

    def __init__(self, works: Sequence[Work], profile: Profile) -> None:
        kinds = [kind_of(work) for work in works]
        self.array = np.array([profile.padding(kind) if kind else (1, 1) for kind in kinds], float).reshape(-1, 2)
        self.single = np.array([kind == "DepthwiseConv" for kind in kinds], bool)

    def __call__(
        self, places: slice | np.ndarray, macs: np.ndarray, inputs: np.ndarray, outputs: np.ndarray, summed: np.ndarray
    ) -> np.ndarray:
        """Effective MAC of some layers, float64, from their MAC and channels."""
        groups = np.where(self.single[places], 1.0, inputs / np.maximum(summed, 1e-9))
        array = self.array[places]
        inner, outer = np.maximum(summed, 1e-9), np.maximum(outputs / np.maximum(groups, 1e-9), 1e-9)
        factors = (np.ceil(n / size - 1e-9) * size / n for n, size in ((inner, array[:, 0]), (outer, array[:, 1])))
        rounded = np.prod([*factors], axis=0)
        return np.where(summed > 0, macs * rounded, macs)


def _activations(coupling: Coupling, node: Node) -> Iterable[tuple[Axis, ...]]:
    """Input and output tensors of a node with multiply-accumulates, weights and biases left out."""
    for name in (*node.inputs, *node.outputs):
        if name and coupling.model.constant(name) is None and name not in coupling.ledger.derived:
            yield coupling.axes(name)


def _constants(coupling: Coupling):
    """Every constant with its axes; a vector that unrelated layers share is counted with its first reader's axes."""
    layouts: dict[str, tuple[Axis, ...]] = {}
    for name, key in coupling.ledger.constants:
        if name not in layouts:
            constant = coupling.model.constants[name]
            known = coupling.ledger.constants[name, key]
            layouts[name] = tuple((known[a],) if a in known else fixed(n) for a, n in enumerate(constant.shape))
    for name, constant in coupling.model.constants.items():
        yield constant, layouts.get(name) or tuple(fixed(size) for size in constant.shape)
