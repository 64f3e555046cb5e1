"""Cost of a model under any plan, as arithmetic on counts: nothing is rewritten, evaluating takes microseconds.

Every quantity is a sum of terms ``factor * kept(atom 1) * kept(atom 2) * ...``; a kept count is linear in the channels kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import numpy as np

from onnxprune.coupling import Coupling, distinct, first_row
from onnxprune.labels import Axis, Work, fixed
from onnxprune.model import Node

KINDS = ("mac", "weights", "params", "activations", "bandwidth", "bytes")


class Terms:
    """A sum of products: row i is ``factor[i]`` times the counts of ``atoms[i]``; atom 0 always counts one."""

    def __init__(self, factor: np.ndarray, atoms: np.ndarray) -> None:
        self.factor, self.atoms = factor, atoms

    def values(self, counts: np.ndarray) -> np.ndarray:
        """Value of every row, float64."""
        return self.factor * counts[self.atoms].prod(1)

    def change(self, counts: np.ndarray, atoms: np.ndarray, times: np.ndarray) -> float:
        """How much the sum grows when ``counts[atoms]`` grow by ``times``; looks at the rows concerned only."""
        order, begin = self._rows
        known = atoms[atoms + 1 < len(begin)]  # others occur in other kinds of cost only
        rows = distinct(np.concatenate([np.zeros(0, int), *(order[begin[a] : begin[a + 1]] for a in known)]))
        more = counts.copy()
        more[atoms] += times
        mine = self.atoms[rows]
        return float((self.factor[rows] * (more[mine].prod(1) - counts[mine].prod(1))).sum())

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


class Cost:
    """Cost of a coupled model, in multiply-accumulates and elements (``bytes``: of all constants).

    Attributes
    ----------
    works
        Nodes with multiply-accumulates, in graph order; ``layers`` and ``layer_weights`` have one term for each.
    """

    def __init__(self, coupling: Coupling) -> None:
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
        nodes = {work.node.key: work.node for work in self.works}
        activations = [(1.0, axes) for node in nodes.values() for axes in _activations(coupling, node)]
        self.terms = {
            "mac": mac,
            "weights": self._terms(weight_terms),
            "params": self._terms((1.0, axes) for _, axes in params),
            "activations": self._terms(activations),
            "bandwidth": self._terms([*weight_terms, *activations]),
            "bytes": self._terms((float(itemsize), axes) for itemsize, axes in params),
        }
        sizes = [len(array) for array in self._arrays]
        self._owner = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        self._labels = np.concatenate([*self._arrays, np.zeros(0, int)]).astype(np.int64)
        self._order = np.argsort(self._labels, kind="stable")
        self._begin = np.searchsorted(self._labels[self._order], np.arange(coupling.n_classes + 1))

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
        """All kinds of cost under ``keep``."""
        counts = self.counts(keep)
        return {kind: round(self.total(kind, counts)) for kind in KINDS}

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
