"""Recurrent layers: a unit's gates, biases, states and outputs live or die together; directions have units of their own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnxprune.labels import Axis, Channels, Layout, Ledger, Refusal, fixed
from onnxprune.model import Node
from onnxprune.ops import Change, Edit, channels_only, couples, rewrites

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STATES = range(5, 7)  # inputs that hold the initial h and c


@couples(*GATES)
def recurrence(node: Node, ledger: Ledger) -> None:
    """Input channels end in W; units end in R, where the next step reads them. W, R, B and P hold a unit once per gate."""
    if [len(ledger.shape(node.inputs[index])) for index in range(3)] != [3, 3, 3]:
        raise Refusal("its input and weights do not all have three axes")
    x, gates = ledger.input(node, 0), GATES[node.op]
    n_directions, _, n_units = ledger.shape(node.inputs[2])
    if n_directions != (2 if node.attributes.get("direction") == "bidirectional" else 1):
        raise Refusal(f"its weights are of {n_directions} directions, which is not what its attribute says")
    batch_first = node.attributes.get("layout", 0)
    batch, steps = x.axes[:2] if batch_first else x.axes[1::-1]
    channels_only(node, ledger, (steps,), "a recurrence runs along it")
    direction, units = _units(ledger, n_directions, n_units)
    w = _tie(node, ledger, 1, direction, units, {1: gates})
    r = _tie(node, ledger, 2, direction, units, {1: gates, 2: 1})
    ledger.unify(x.axes[2], w.axes[2])
    for index, copies in ((3, 2 * gates), (7, 3)):  # biases of W and of R; peepholes
        if node.has(index):
            _tie(node, ledger, index, direction, units, {1: copies})
    if node.has(4):
        batch = ledger.unify(batch, ledger.input(node, 4).axes[0])
    for index in STATES:
        if node.has(index):
            initial = _tie(node, ledger, index, direction, units, {2: 1}, position=batch_first)
            batch = ledger.unify(batch, initial.axes[1 - batch_first])
    ledger.contract(node, 0, 2)
    ledger.contract(node, 1, 2)
    ledger.contract(node, 2, 2, state=True)
    for index, weights in ((1, w), (2, r)):
        channels = Channels("Recurrent", weights.axes[2], units, weights.axes[2])
        ledger.work(node, (steps, batch, *weights.axes), weight=index, channels=channels)
    state = (batch, direction, units) if batch_first else (direction, batch, units)
    every = (batch, steps, direction, units) if batch_first else (steps, direction, batch, units)
    for index, name in enumerate(node.outputs):
        if name:
            ledger.output(node, state if index else every, index)


@rewrites(*GATES)
def hidden_size(node: Node, change: Change) -> list[Edit]:
    """The attribute says how many units are left."""
    left = change.after(node.inputs[2])[2]
    return [Edit("hidden_size", left)] if node.attributes.get("hidden_size", left) != left else []


def _units(ledger: Ledger, n_directions: int, n_units: int) -> tuple[Axis, Axis]:
    """The directions, and the units of each: all keep equally many, which ones is up to each."""
    if n_directions == 1 or n_units == 1:
        return fixed(n_directions), ((ledger.atom(n_units),) if n_units > 1 else ())
    direction, unit = ledger.split(ledger.atom(n_directions * n_units), n_directions)
    return (direction,), (unit,)


def _tie(
    node: Node, ledger: Ledger, index: int, direction: Axis, units: Axis, copies: Mapping[int, int], position: int = 0
) -> Layout:
    """Tie the units to axes of an operand that hold all of them so many times over; axis ``position`` is the direction."""
    first = ledger.input(node, index, (position,)).axes[position]
    ledger.freeze([direction, first], "it counts directions", node.inputs[index])
    ledger.unify(direction, first)
    for axis, times in copies.items():
        own = ledger.per_row(node, index, axis, () if position else direction)
        ledger.unify(own, _repeated(ledger, units, times))
    return ledger.input(node, index)


def _repeated(ledger: Ledger, units: Axis, times: int) -> Axis:
    if not units or times == 1:
        return units or fixed(times)
    labels = units[0].labels
    assert labels is not None
    return (ledger.labelled(np.tile(labels, times), units[0].rows),)
