"""Reductions: space drops out, channels end."""

from __future__ import annotations

from onnxprune.labels import Axis, Ledger, Refusal, fixed, is_fixed
from onnxprune.model import Node
from onnxprune.ops import couples

ZERO_IS_NEUTRAL = ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum")
KEPT_ONLY = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp")


@couples(*ZERO_IS_NEUTRAL, *KEPT_ONLY)
def reduction(node: Node, ledger: Ledger) -> None:
    """Reduced channels end; a mean or maximum over them is taken over the kept ones."""
    x = ledger.input(node, 0)
    reduced = _axes(node, ledger, len(x.axes))
    for axis in reduced:
        if not is_fixed(x.axes[axis]):
            ledger.contract(node, 0, axis, redefined=node.op in KEPT_ONLY)
    _drop(node, ledger, reduced)


@couples("ArgMax", "ArgMin")
def argument(node: Node, ledger: Ledger) -> None:
    """The searched axis freezes: its indices are the answer."""
    x = ledger.input(node, 0)
    axis = node.attributes.get("axis", 0) % len(x.axes)
    ledger.freeze([x.axes[axis]], f"{node.op} returns its indices", node.inputs[0])
    _drop(node, ledger, {axis})


@couples("TopK")
def top_k(node: Node, ledger: Ledger) -> None:
    """The searched axis freezes; the others pass to values and indices."""
    x = ledger.input(node, 0)
    axis = node.attributes.get("axis", -1) % len(x.axes)
    ledger.freeze([x.axes[axis]], "TopK returns its indices", node.inputs[0])
    shape = ledger.shape(node.outputs[0])
    axes = [*x.axes[:axis], fixed(shape[axis]), *x.axes[axis + 1 :]]
    for index in range(len(node.outputs)):
        ledger.output(node, axes, index)


def _axes(node: Node, ledger: Ledger, rank: int) -> set[int]:
    axes = node.attributes.get("axes")
    if axes is None and node.has(1):
        value = ledger.model.value(node.inputs[1])
        if value is None:
            raise Refusal("reduction over computed axes")
        axes = value.ravel().tolist()
    if not axes:
        return set() if node.attributes.get("noop_with_empty_axes", 0) else set(range(rank))
    return {int(axis) % rank for axis in axes}


def _drop(node: Node, ledger: Ledger, reduced: set[int]) -> None:
    x = ledger.input(node, 0)
    keep = node.attributes.get("keepdims", 1)
    axes: list[Axis] = []
    for position, axis in enumerate(x.axes):
        if position not in reduced:
            axes.append(axis)
        elif keep:
            axes.append(())
    ledger.output(node, axes)
