"""Follow: what else must change when axes shrink: attributes, shape constants, shape arithmetic.

Shape arithmetic is evaluated again on the new shapes; only values that no longer agree with what the operators need are
patched, at the constant they come from. What cannot be patched is reported, so that coupling freezes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, count, islice
from math import comb

import numpy as np
from onnx import TensorProto

from onnxprune import ops
from onnxprune.coupling import Coupling
from onnxprune.labels import Reason
from onnxprune.model import Model, Node, Shape
from onnxprune.ops import Edit

PINNED = "its length enters the computation on values"
_PASSES_ELEMENTS = frozenset(("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Flatten"))


class View:
    """A coupling under a keep mask, as rewrite rules see it (see :class:`onnxprune.ops.Change`)."""

    def __init__(self, coupling: Coupling, keep: np.ndarray) -> None:
        self._coupling, self._keep = coupling, keep
        self._model = coupling.model
        self.opset = self._model.opset
        self._after: dict[str, Shape] = {}

    def before(self, name: str) -> Shape:
        """Shape in the original."""
        return self._model.shapes[name]

    def after(self, name: str) -> Shape:
        """Shape in the pruned graph."""
        if name not in self._after:
            layout = self._coupling.ledger.layouts.get(name)
            if layout is None and self._model.constant(name) is not None:
                layout = self._constant_layout(name)
            if layout is None:
                self._after[name] = self._model.shapes[name]
            else:
                self._after[name] = self._coupling.shape(layout.axes, self._keep)
        return self._after[name]

    def _constant_layout(self, name: str):
        node, index = self._model.consumers[name][0]
        return self._coupling.ledger.input(node, index, ())

    def kept(self, name: str, axis: int) -> np.ndarray:
        """Kept indices of an axis (of its first row, where rows keep different ones)."""
        constant = self._model.constant(name)
        layout = self._coupling.ledger.layout(name) if constant is None else self._constant_layout(name)
        return self._coupling.kept(layout.axes[axis], self._keep)

    def original(self, name: str) -> np.ndarray | None:
        """Value in the original."""
        return self._model.value(name)

    def value(self, name: str) -> np.ndarray | None:
        """Value in the pruned graph, unless somebody edits it."""
        return self._model.value(name) if name not in self._model.static else self.values.get(name)

    @cached_property
    def values(self) -> Mapping[str, np.ndarray]:
        """All shape arithmetic, evaluated on the new shapes."""
        if self._model.arithmetic is None:
            return {}
        leaves = {n.inputs[0] for n in self._model.nodes if n.op in ("Shape", "Size") and n.key in self._model.static}
        return self._model.arithmetic({name: self.after(name) for name in leaves})


@dataclass(frozen=True, eq=False)
class Edits:
    """Everything to edit besides slicing.

    Attributes
    ----------
    attributes
        By node key: attribute name to value; None removes it.
    inputs
        By (node key, input index): the constant that must stand there.
    failures
        Nodes whose needs cannot be met, with the cause.
    unpinned
        Nodes that compute with a length that would change and cannot be pinned, with the tensor that holds it.
    """

    attributes: dict[str, dict[str, object]] = field(default_factory=dict)
    inputs: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    failures: list[tuple[Node, str]] = field(default_factory=list)
    unpinned: list[tuple[Node, str]] = field(default_factory=list)


def follow(coupling: Coupling, keep: np.ndarray, nodes: Iterable[Node] | None = None) -> Edits:
    """Collect what every node (or each of ``nodes``) needs under ``keep`` (bool per class)."""
    view, edits = View(coupling, keep), Edits()
    for node in coupling.model.nodes if nodes is None else nodes:
        if node.key in coupling.model.static or node.key in coupling.model.aliases:
            continue
        refused = node.key in coupling.ledger.refusals  # its shapes may be unknown, and nothing around it shrinks
        for edit in () if refused else ops.rewrite(node, view):
            if isinstance(edit.where, str):
                edits.attributes.setdefault(node.key, {})[edit.where] = edit.value
            elif not _patch(coupling, view, node, edit, edits):
                edits.failures.append((node, f"its {node.op} operand is computed by arithmetic that would not follow"))
        for index in _changed_data(coupling.model, view, node, refused=refused):
            if node.inputs[index] in coupling.lasting and not _becomes_a_shape(coupling.model, node):
                edits.inputs[node.key, index] = coupling.model.static_values[node.inputs[index]]
            else:
                edits.unpinned.append((node, node.inputs[index]))
    return edits


def _changed_data(model: Model, view: View, node: Node, *, refused: bool) -> list[int]:
    """Inputs at which shape-derived numbers enter arithmetic on data (attention scales) and would change."""
    if (ops.reads_shapes(node) and not refused) or model.static.isdisjoint(node.inputs):
        return []
    values = model.static_values
    return [
        index
        for index, name in enumerate(node.inputs)
        if name in model.static and not np.array_equal(values[name], view.values[name])
    ]


def _becomes_a_shape(model: Model, node: Node) -> bool:
    """Whether integers that are computed here say, further on, how data moves: the count must then follow, not stay."""
    waiting, seen = [node], {node.key}
    while waiting:
        for name in waiting.pop().outputs:
            if model.types.get(name) not in (TensorProto.INT64, TensorProto.INT32):
                continue
            for reader, index in model.consumers.get(name, ()):
                if ops.reads_shapes(reader) and (index or reader.op == "ConstantOfShape"):
                    return True
                if reader.key not in seen:
                    seen.add(reader.key)
                    waiting.append(reader)
    return False


def unfollowed(coupling: Coupling) -> list[tuple[np.ndarray, Reason]]:
    """Labels whose removal would change values that nothing can correct.

    Trial plans remove channels here and not there: in the first one unit from every group, in the second any number, in the
    others that from half of the groups each, so that for any two groups one trial cuts the one and spares the other.
    Arithmetic that agrees under all of them follows by itself.
    """
    if coupling.model.arithmetic is None:
        return []
    rng = np.random.default_rng(0)
    order = rng.random(coupling.n_classes)
    runs = [bundle.units(order)[: bundle.removable] for bundle in coupling.bundles if bundle.removable]
    every = range(len(runs))
    for trial, cut in enumerate((every, every, *_trials(len(runs))) if runs else ()):
        keep = np.ones(coupling.n_classes, bool)
        for number in cut:
            keep[runs[number][: rng.integers(1, len(runs[number]) + 1) if trial else 1]] = False
        found = _failing(coupling, keep) + _unpinned(coupling, View(coupling, keep))
        if found:
            return found
    return []


def _trials(n: int) -> list[list[int]]:
    """Subsets of n numbers such that for any two numbers some subset holds the first without the second.

    Each number stands in half of the subsets, no two in the same ones: no family of fewer subsets does it (Sperner, 1928).
    """
    size = next(size for size in count(1) if comb(size, size // 2) >= n)
    places = islice(combinations(range(size), size // 2), n)
    trials: list[list[int]] = [[] for _ in range(size)]
    for number, subset in enumerate(places):
        for trial in subset:
            trials[trial].append(number)
    return [trial for trial in trials if trial]


def _failing(coupling: Coupling, keep: np.ndarray) -> list[tuple[np.ndarray, Reason]]:
    """Unfrozen labels around the nodes whose needs cannot be met under ``keep``, else of what their operands measure."""
    found = []
    static = coupling.model.static
    edits = follow(coupling, keep, [n for n in coupling.model.nodes if not static.isdisjoint(n.inputs)])
    for node, name in edits.unpinned:
        labels = _open_labels(coupling, sorted(_measured(coupling, name)))
        if labels is not None:
            found.append((labels, Reason(node.title, node.op, name, PINNED)))
    for node, text in edits.failures:
        around = {name for name in (*node.inputs, *node.outputs) if name in coupling.ledger.layouts}
        measured = set().union(*(_measured(coupling, name) for name in node.inputs if name in static))
        for names in (around, measured):
            labels = _open_labels(coupling, sorted(names))
            if labels is not None:
                found.append((labels, Reason(node.title, node.op, node.key, text)))
                break
    return found


def _open_labels(coupling: Coupling, names: Iterable[str]) -> np.ndarray | None:
    """Labels on the axes of these tensors; None where all of them are frozen."""
    axes = [axis for name in names for axis in coupling.axes(name)]
    labels = [atom.labels.ravel() for axis in axes for atom in axis if atom.labels is not None]
    labels = [part for part in labels if not coupling.frozen[coupling.classes[part]].all()]
    return np.concatenate(labels) if labels else None


def _unpinned(coupling: Coupling, view: View) -> list[tuple[np.ndarray, Reason]]:
    """Shape-derived numbers that are outputs, or that a body reads: what they count stays."""
    model, found = coupling.model, []
    uses = [("output", "output", name) for name in model.outputs]
    uses += [(node.title, node.op, name) for node in model.nodes for name in node.captured]
    for title, op, name in uses:
        if name in model.static and not np.array_equal(model.static_values[name], view.values[name]):
            labels = _open_labels(coupling, sorted(_measured(coupling, name)))
            if labels is not None:
                found.append((labels, Reason(title, op, name, PINNED)))
    return found


def _measured(coupling: Coupling, name: str) -> set[str]:
    """Tensors whose shape a static value depends on."""
    leaves = _shape_leaves(coupling.model, name)
    return {node.inputs[0] for node in leaves} & coupling.ledger.layouts.keys()


def _shape_leaves(model: Model, name: str) -> list[Node]:
    """Shape and Size nodes that a static value is computed from."""
    leaves, waiting, seen = [], [name], {name}
    while waiting:
        node = model.producer.get(waiting.pop())
        if node is None:
            continue
        if node.op in ("Shape", "Size"):
            leaves.append(node)
            continue
        waiting += [source for source in node.inputs if source and source not in seen]
        seen.update(node.inputs)
    return leaves


def _depends_on_shapes(model: Model, name: str) -> bool:
    """Whether a static value follows a computed tensor's shape; if not it is a constant that nobody folded."""
    return name not in model.static or any(
        model.constant(node.inputs[0]) is None for node in _shape_leaves(model, name)
    )


def _patch(coupling: Coupling, view: View, node: Node, edit: Edit, edits: Edits) -> bool:
    """Meet a required operand: directly where it is a constant, else at the constants its elements come from."""
    index, required = int(edit.where), np.asarray(edit.value)
    name = node.inputs[index] if node.has(index) else ""
    if not name or coupling.model.constant(name) is not None or not _depends_on_shapes(coupling.model, name):
        edits.inputs[node.key, index] = required
        return True
    patched = _patched_leaves(coupling, view, node, index, required, edits)
    if patched is None and name in coupling.lasting:  # nothing of it is dynamic, so a constant says the same
        patched = {(node.key, index): required}
    edits.inputs.update(patched or {})
    return patched is not None


def _patched_leaves(
    coupling: Coupling, view: View, node: Node, index: int, required: np.ndarray, edits: Edits
) -> dict[tuple[str, int], np.ndarray] | None:
    """Constants, by who reads them, that make a computed operand come out as required; None where there are none."""
    now = view.values.get(node.inputs[index])
    if now is None or now.shape != required.shape:
        return None
    patched: dict[tuple[str, int], np.ndarray] = {}
    for element in np.flatnonzero(now.ravel() != required.ravel()):
        leaf = _leaf(coupling, view, node, index, int(element))
        if leaf is None:
            return None
        reader, operand, position = leaf
        where = (reader.key, operand)
        source = edits.inputs.get(where, view.original(reader.inputs[operand]))
        patched.setdefault(where, source.copy()).reshape(-1)[position] = required.ravel()[element]
    return patched


def _leaf(coupling: Coupling, view: View, reader: Node, index: int, element: int) -> tuple[Node, int, int] | None:
    """Follow one element of an operand back to the constant it is copied from, along tensors nobody else reads."""
    name = reader.inputs[index]
    if coupling.model.constant(name) is not None:
        return reader, index, element
    node = coupling.model.producer.get(name)
    if node is None or len(coupling.model.consumers[name]) > 1:
        return None
    if node.op in _PASSES_ELEMENTS:
        return _leaf(coupling, view, node, 0, element)
    if node.op == "Concat":
        for operand, source in enumerate(node.inputs):
            value = view.original(source)
            if value is None or value.ndim != 1:
                return None
            if element < value.size:
                return _leaf(coupling, view, node, operand, element)
            element -= value.size
    return None
