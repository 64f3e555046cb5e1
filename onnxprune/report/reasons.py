"""What cannot be removed, and why: every frozen multiply-accumulate carries one of a closed list of kinds of reasons."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

import numpy as np

from onnxprune.cost import Cost
from onnxprune.coupling import Coupling, distinct
from onnxprune.labels import Axis, Reason, Work, is_fixed, length
from onnxprune.model import Node

KINDS = {
    "output": "an output of the graph",
    "input": "meets an input of the graph, or positions",
    "positions": "an operator moves along it, as over the pixels of an image",
    "mixed": "every index has a part in every result (Softmax)",
    "indices": "its indices are data: something searches, picks or writes them",
    "coordinates": "its indices are numbers of different meaning, as x and y",
    "reshape": "reshaped, strided or padded across the channels' boundaries",
    "other-factor": "another factor of the same axis shrinks instead",
    "uneven": "groups or heads could not shrink evenly",
    "arithmetic": "its length is computed with, where nothing can correct it",
    "constant-only": "a weight is computed from all of it",
    "unused": "no operator consumes the channels",
    "user": "an option says so",
    "unknown-operator": "no rule for the operator",
    "unknown-shape": "a shape is unknown",
    "refused-case": "the operator's rule does not cover this case",
    "single": "the layer has one channel, and one stays",
    "unlabelled": "no rule says what of the layer could shrink",
}
"""Every kind, and what it means."""

TEXTS = {
    "output": ("it is an output of the graph",),
    "input": ("it meets an axis that cannot shrink (*)", "it is concatenated and cannot shrink"),
    "positions": (
        "* slides over it", "it becomes pixels", "it is resampled", "a recurrence runs along it", "it is cropped or padded",
        "regions are cut out of it", "it is sampled at computed places", "sequences along it are reversed",
    ),
    "mixed": (
        "* mixes its indices", "* reads neighbouring channels", "a Fourier transform combines its indices",
        "Trilu zeroes a triangle of it", "random numbers are drawn for all elements in turn", "* compares all elements",
        "* compares boxes by all their numbers",
    ),
    "indices": (
        "* returns its indices", "* returns flat indices through the channels", "* reads flat indices through the channels",
        "* counts through all elements", "it is indexed by computed values", "its indices say where they are written",
        "one index is taken out alone", "none of it is picked",
        "it says which indices stay", "its lengths shape an identity matrix",
        "its values are read as they are",
    ),
    "coordinates": (
        "it holds coordinates", "it holds a region's coordinates", "it holds a transformation", "it holds offsets",
        "it holds index tuples", "it weighs what is read at an offset", "it counts directions",
    ),
    "reshape": (
        "it is reshaped across channel boundaries", "it is reshaped without an element",
        "its axis factors do not divide those it meets",
        "it is gathered into several axes", "a stride of * over * channels", "a stride keeps its rhythm",
        "it is padded with values other than zero or cropped",
    ),
    "other-factor": ("another factor of the same axis shrinks instead",),
    "uneven": (
        "its groups or heads cannot shrink evenly", "the depth multiplier is one number for all channels",
        "the number of * groups stays", "a quantisation block goes as a whole", "its last quantisation block is not full",
    ),
    "arithmetic": (
        "its length enters the computation on values", "its * operand is computed by arithmetic that would not follow",
    ),
    "constant-only": ("a weight is computed from all of it",),
    "unused": ("no operator consumes these channels",),
    "user": ("--attention *", "--ignore *", "--only *"),
    "unknown-operator": ("no rule for operator *",),
    "unknown-shape": ("the shape of * is unknown",),
    "single": ("it has one channel",),
    "unlabelled": ("no rule says which of its channels could go*",),
}  # fmt: skip
"""The texts of reasons by kind, with * for any words. Those of a rule's refusal need no entry."""

UNLABELLED = "no rule says which of its channels could go"
SINGLE = "it has one channel"
MEETS = "it meets an axis that cannot shrink"


@dataclass(frozen=True, slots=True)
class FrozenRow:
    """Why channels cannot be removed, and the multiply-accumulates of the operators that this concerns.

    Attributes
    ----------
    kind
        One of :data:`KINDS`.
    layers
        Names of the operators whose multiply-accumulates are ``mac``; one may stand in several rows.
    """

    node: str
    op: str
    tensor: str
    reason: str
    mac: int
    kind: str
    layers: tuple[str, ...]


def kind(text: str) -> str:
    """Kind of a reason; what no text of our own says was said by an operator's rule."""
    return next((own for own, texts in TEXTS.items() if any(fnmatchcase(text, t) for t in texts)), "refused-case")


def frozen_rows(cost: Cost) -> tuple[FrozenRow, ...]:
    """List what is frozen and why, costliest first.

    Every layer of which no channel can go is concerned by some row. So is every node with a weight that a rule refused;
    its multiply-accumulates are not known and count nothing.
    """
    coupling = cost.coupling
    causes = _Causes(cost)
    macs = cost.layers.values(cost.counts(np.ones(coupling.n_classes, bool)))
    found: dict[tuple[str, str, str, str, str], set[int]] = {}
    for index, work in enumerate(cost.works):
        reasons = _reasons(coupling, work.axes)
        told = [causes.told(coupling.reasons[reason]) for reason in reasons.tolist() if reason >= 0]
        for row in told if len(reasons) else [causes.unlabelled(work)]:
            found.setdefault(row, set()).add(index)
    told_of = {key[:2] for key in found}
    rows = [row for row in causes.refused() if (row.node, row.op) not in told_of]
    for (node, op, tensor, text, its_kind), works in found.items():
        layers = tuple(dict.fromkeys(cost.works[index].node.title for index in sorted(works)))
        rows.append(FrozenRow(node, op, tensor, text, round(sum(macs[index] for index in works)), its_kind, layers))
    return tuple(sorted(rows, key=lambda row: -row.mac))


def _reasons(coupling: Coupling, axes: Iterable[Axis]) -> np.ndarray:
    """Reasons of all channels on some axes, distinct; -1 stands for what is not frozen."""
    parts = [coupling.reason[classes].ravel() for axis in axes for classes in coupling.atoms(axis)]
    return distinct(np.concatenate([np.zeros(0, int), *parts]))


class _Causes:
    """What lies behind an axis without labels: often a rule that refused a node before it."""

    def __init__(self, cost: Cost) -> None:
        self._ledger, self._model = cost.coupling.ledger, cost.coupling.model
        self._layers = {work.node.key for work in cost.works}

    def told(self, reason: Reason) -> tuple[str, str, str, str, str]:
        """Node, operator, tensor, text and kind of a reason."""
        text, own = reason.text, kind(reason.text)
        node = self._nodes.get((reason.node, reason.op)) if own == "input" else None
        refused = node and self._refused(node.inputs)
        if refused:
            text, own = f"{MEETS}: at {refused[0].title}, {refused[1]}", kind(refused[1])
        return reason.node, reason.op, reason.tensor, text, own

    def unlabelled(self, work: Work) -> tuple[str, str, str, str, str]:
        """Why a layer has no labels at all."""
        node = work.node
        weight = "" if work.weight is None else node.inputs[work.weight]
        refused = self._refused((weight, *node.inputs))
        if refused:
            return node.title, node.op, weight, f"{UNLABELLED}: at {refused[0].title}, {refused[1]}", kind(refused[1])
        text = SINGLE if all(length(axis) == 1 for axis in work.axes) else UNLABELLED
        return node.title, node.op, weight, text, kind(text)

    def refused(self) -> Iterable[FrozenRow]:
        """Nodes with a weight that a rule refused."""
        for node in self._model.nodes:
            text = self._ledger.refusals.get(node.key)
            if text is not None and any(map(self._is_weight, node.inputs)):
                yield FrozenRow(node.title, node.op, "", text, 0, kind(text), (node.title,))

    def _is_weight(self, name: str) -> bool:
        constant = self._model.constant(name) if name else None
        return constant is not None and not constant.is_vector and (constant.floating or constant.itemsize <= 1)

    @cached_property
    def _nodes(self) -> dict[tuple[str, str], Node]:
        return {(node.title, node.op): node for node in self._model.nodes}

    def _refused(self, names: Iterable[str]) -> tuple[Node, str] | None:
        """The nearest node before these tensors whose rule refused, on a way without labels or layers."""
        waiting, seen = [*names], set()
        for name in waiting:
            node = self._model.producer.get(name)
            if node is None or name in seen:
                continue
            seen.add(name)
            if node.key in self._ledger.refusals:
                return node, self._ledger.refusals[node.key]
            if node.key not in self._layers and all(is_fixed(axis) for axis in self._ledger.layout(name).axes):
                waiting += node.inputs
        return None
