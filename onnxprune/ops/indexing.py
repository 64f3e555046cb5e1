"""Operators that index by values: the axes they look up freeze, those they move along pass."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from onnxprune.labels import Layout, Ledger, Refusal, fixed, length
from onnxprune.model import Node
from onnxprune.ops import Change, Edit, channels_only, couples, rewrites

INDEXED = "it is indexed by computed values"
WRITTEN = "its indices say where they are written"
SEARCHES = {
    "NonZero": "NonZero counts through all elements",
    "NonMaxSuppression": "NonMaxSuppression compares boxes by all their numbers",
    "Unique": "Unique compares all elements",
    "MaxUnpool": "MaxUnpool reads flat indices through the channels",
    "Bernoulli": "random numbers are drawn for all elements in turn",
    "Multinomial": "random numbers are drawn for all elements in turn",
    "RandomNormalLike": "random numbers are drawn for all elements in turn",
    "RandomUniformLike": "random numbers are drawn for all elements in turn",
}


@couples(*SEARCHES)
def search(node: Node, ledger: Ledger) -> None:
    """Every element has a part in the result, so none may go; outputs carry no labels."""
    for index, name in enumerate(node.inputs):
        if name:
            ledger.freeze(ledger.input(node, index).axes, SEARCHES[node.op], name)


@couples("GatherElements")
def gather_elements(node: Node, ledger: Ledger) -> None:
    """Output (i, j) is data (i, indices (i, j)): on the other axes, as many of the data's first indices meet those."""
    data, indices = ledger.input(node, 0), ledger.input(node, 1)
    if len(data.axes) != len(indices.axes):
        raise Refusal("its data and indices are not of one rank")
    position = node.attributes.get("axis", 0) % len(data.axes)
    data = _looked_up(node, ledger, data, [position])
    axes = list(indices.axes)
    for other, axis in enumerate(indices.axes):
        if other != position:
            axes[other] = ledger.unify(ledger.take(data.axes[other], np.arange(length(axis))), axis)
    ledger.output(node, axes)


@couples("GatherND")
def gather_nd(node: Node, ledger: Ledger) -> None:
    """Leading axes are looked up by index tuples, behind ``batch_dims`` that align; trailing axes pass."""
    data, indices = ledger.input(node, 0), ledger.input(node, 1)
    first, end = node.attributes.get("batch_dims", 0), len(indices.axes) - 1
    behind = first + ledger.shape(node.inputs[1])[-1]
    data = _looked_up(node, ledger, data, range(first, behind))
    ledger.freeze([indices.axes[-1]], "it holds index tuples", node.inputs[1])
    batch = [ledger.unify(data.axes[axis], indices.axes[axis]) for axis in range(first)]
    ledger.output(node, (*batch, *indices.axes[first:end], *data.axes[behind:]))


@couples("ScatterElements", "Scatter")
def scatter_elements(node: Node, ledger: Ledger) -> None:
    """Update (i, j) goes to (i, indices (i, j)): on the other axes, as many of the data's first indices meet both."""
    data, indices, updates = (ledger.input(node, index) for index in range(3))
    shape = ledger.shape(node.inputs[1])
    if not len(data.axes) == len(indices.axes) == len(updates.axes):
        raise Refusal("its data, indices and updates are not of one rank")
    position = node.attributes.get("axis", 0) % len(shape)
    ledger.freeze([indices.axes[position], updates.axes[position]], WRITTEN, node.inputs[2])
    data, updates = _looked_up(node, ledger, data, [position]), ledger.mix(updates, [position])
    for other, size in enumerate(shape):
        if other != position and size < length(data.axes[other]):
            data = ledger.mix(data, [other])  # where updates end, other rows begin that none of them meets
    for other, size in enumerate(shape):
        if other != position:
            met = ledger.unify(indices.axes[other], updates.axes[other])
            ledger.unify(ledger.take(data.axes[other], np.arange(size)), met)
    ledger.output(node, data)


@couples("ScatterND")
def scatter_nd(node: Node, ledger: Ledger) -> None:
    """Leading axes are written to by index tuples; trailing axes of data and updates align."""
    data, indices, updates = (ledger.input(node, index) for index in range(3))
    depth, lead = ledger.shape(node.inputs[1])[-1], len(indices.axes) - 1
    ledger.freeze([*indices.axes, *updates.axes[:lead]], WRITTEN, node.inputs[2])
    data = _looked_up(node, ledger, data, range(depth))
    updates = ledger.mix(updates, range(lead))
    passing = [ledger.unify(*pair) for pair in zip(data.axes[depth:], updates.axes[lead:], strict=True)]
    ledger.output(node, (*data.axes[:depth], *passing))


@couples("TensorScatter")
def tensor_scatter(node: Node, ledger: Ledger) -> None:
    """Updates are written along ``axis`` of a cache, from a position per batch; the other axes align."""
    data, updates = ledger.input(node, 0), ledger.input(node, 1)
    position = node.attributes.get("axis", -2) % len(data.axes)
    ledger.freeze([updates.axes[position]], WRITTEN, node.inputs[1])
    data, updates = _looked_up(node, ledger, data, [position]), ledger.mix(updates, [position])
    axes = list(data.axes)
    for other, axis in enumerate(updates.axes):
        if other != position:
            axes[other] = ledger.unify(axes[other], axis)
    if node.has(2):
        axes[0] = ledger.unify(axes[0], ledger.input(node, 2).axes[0])
    ledger.output(node, axes)


@couples("OneHot")
def one_hot(node: Node, ledger: Ledger) -> None:
    """The new axis says which; the indices' own axes pass."""
    axes = list(ledger.input(node, 0).axes)
    position = node.attributes.get("axis", -1) % (len(axes) + 1)
    axes.insert(position, fixed(ledger.shape(node.outputs[0])[position]))
    ledger.output(node, axes)


@couples("Compress")
def compress(node: Node, ledger: Ledger) -> None:
    """A constant condition picks labels; a computed one could pick any, so its axis freezes, and all without ``axis``."""
    x, picked = ledger.input(node, 0), _picked(node, ledger.model.value)
    if "axis" not in node.attributes:
        raise Refusal("Compress of all elements as one axis")
    position = node.attributes["axis"] % len(x.axes)
    axes = list(x.axes)
    if picked is None:
        ledger.freeze(ledger.input(node, 1).axes, "it says which indices stay", node.inputs[1])
        axes = list(_looked_up(node, ledger, x, [position]).axes)
        axes[position] = fixed(ledger.shape(node.outputs[0])[position])
    else:
        axes[position] = ledger.take(axes[position], picked)
    ledger.output(node, axes)


@rewrites("Compress")
def compress_condition(node: Node, change: Change) -> list[Edit]:
    """The condition says for every kept channel what it said before."""
    picked = _picked(node, change.original)
    if picked is None or "axis" not in node.attributes:
        return []
    position = node.attributes["axis"] % len(change.before(node.inputs[0]))
    wanted = np.isin(change.kept(node.inputs[0], position), picked)
    return [] if len(wanted) == change.before(node.inputs[0])[position] else [Edit(1, wanted)]


@couples("ReverseSequence")
def reverse_sequence(node: Node, ledger: Ledger) -> None:
    """The reversed axis freezes; the batch's lengths align with it; the others pass."""
    x = ledger.input(node, 0)
    time, batch = node.attributes.get("time_axis", 0), node.attributes.get("batch_axis", 1)
    ledger.freeze([x.axes[time]], "sequences along it are reversed", node.inputs[0])
    axes = list(ledger.mix(x, [time]).axes)
    axes[batch] = ledger.unify(axes[batch], ledger.input(node, 1).axes[0])
    ledger.output(node, axes)


@couples("Trilu")
def triangle(node: Node, ledger: Ledger) -> None:
    """What is zero depends on the position in the last two axes; the others pass."""
    x = ledger.input(node, 0)
    channels_only(node, ledger, x.axes[-2:], "Trilu zeroes a triangle of it")
    ledger.output(node, x)


def _looked_up(node: Node, ledger: Ledger, data: Layout, positions: Collection[int]) -> Layout:
    """Freeze axes that are indexed; what stands on the others does not depend on where along them it was found."""
    ledger.freeze([data.axes[position] for position in positions], INDEXED, node.inputs[0])
    return ledger.mix(data, positions)


def _picked(node: Node, value: Callable[[str], np.ndarray | None]) -> np.ndarray | None:
    """Indices that a constant condition picks."""
    condition = value(node.inputs[1])
    return None if condition is None else np.flatnonzero(condition)
