"""Normalisations: per channel they tie, over channels they take their statistics from the kept ones."""

from __future__ import annotations

from collections.abc import Collection

from onnxprune.labels import Axis, Layout, Ledger, Refusal, fixed, is_fixed
from onnxprune.model import Node
from onnxprune.ops import couples


@couples("BatchNormalization")
def batch_normalization(node: Node, ledger: Ledger) -> None:
    """Scale, bias, mean and variance tie to axis 1."""
    if node.attributes.get("training_mode", 0):
        raise Refusal("BatchNormalization in training mode mixes the batch")
    _per_channel(node, ledger, ledger.input(node, 0), parameters=(1, 2, 3, 4))


@couples("InstanceNormalization")
def instance_normalization(node: Node, ledger: Ledger) -> None:
    """Scale and bias tie to axis 1; statistics run over all later axes."""
    x = ledger.input(node, 0)
    _per_channel(node, ledger, _statistics(node, ledger, x, range(2, len(x.axes))), parameters=(1, 2))


@couples("LayerNormalization", "RMSNormalization")
def layer_normalization(node: Node, ledger: Ledger) -> None:
    """Scale and bias tie to the trailing axes, over which the statistics run."""
    x = ledger.input(node, 0)
    rank = len(x.axes)
    first = node.attributes.get("axis", -1) % rank
    axes = list(_statistics(node, ledger, x, range(first, rank)).axes)
    for index in (i for i in (1, 2) if node.has(i)):
        parameter = ledger.input(node, index)
        offset = rank - len(parameter.axes)
        if offset < first:
            raise Refusal("its scale or bias has more axes than it normalises")
        for position, axis in enumerate(parameter.axes, offset):
            axes[position] = ledger.unify(axes[position], axis)
    ledger.output(node, axes)
    for index in range(1, len(node.outputs)):
        if node.outputs[index]:
            ledger.output(node, (*axes[:first], *[()] * (rank - first)), index)


@couples("MeanVarianceNormalization")
def mean_variance_normalization(node: Node, ledger: Ledger) -> None:
    """Statistics run over some axes, by default all but the channels."""
    x = ledger.input(node, 0)
    axes = [axis % len(x.axes) for axis in node.attributes.get("axes", (0, 2, 3))]
    ledger.output(node, _statistics(node, ledger, x, axes))


@couples("GroupNormalization")
def group_normalization(node: Node, ledger: Ledger) -> None:
    """Statistics run within each group of channels; every group keeps equally many. Before opset 21 groups have scales."""
    x = ledger.input(node, 0)
    rows, _ = ledger.grid(x.axes[1], node.attributes["num_groups"])
    ledger.freeze([rows], "the number of normalisation groups stays")
    x = _statistics(node, ledger, x, range(1, len(x.axes)))
    if ledger.shape(node.inputs[1])[0] == ledger.shape(node.inputs[0])[1]:
        _per_channel(node, ledger, x, parameters=(1, 2))
        return
    for index in (1, 2):
        ledger.unify(rows, ledger.input(node, index).axes[0])
    ledger.output(node, x)


@couples("LpNormalization")
def lp_normalization(node: Node, ledger: Ledger) -> None:
    """A removed channel adds nothing to the norm that divides the others."""
    x = ledger.input(node, 0)
    axis = node.attributes.get("axis", -1) % len(x.axes)
    ledger.contract(node, 0, axis)
    ledger.output(node, ledger.mix(x, [axis]))


@couples("LRN")
def lrn(node: Node, ledger: Ledger) -> None:
    """Each channel is divided by its neighbours' energy, so none may vanish."""
    x = ledger.input(node, 0)
    ledger.freeze([x.axes[1]], "LRN reads neighbouring channels", node.inputs[0])
    ledger.output(node, ledger.mix(x, [1]))


@couples("Softmax", "LogSoftmax", "Hardmax", "CumSum", "CumProd")
def mixes_axis(node: Node, ledger: Ledger) -> None:
    """The mixed axis freezes; the others pass. Before opset 13 Softmax flattens from ``axis`` on."""
    x = ledger.input(node, 0)
    rank = len(x.axes)
    if node.op in ("CumSum", "CumProd"):
        value = ledger.model.value(node.inputs[1])
        if value is None:
            raise Refusal(f"{node.op} over a computed axis")
        mixed = [int(value.ravel()[0]) % rank]
    elif ledger.model.opset < 13:
        mixed = list(range(node.attributes.get("axis", 1) % rank, rank))
    else:
        mixed = [node.attributes.get("axis", -1) % rank]
    ledger.freeze([x.axes[position] for position in mixed], f"{node.op} mixes its indices", node.inputs[0])
    ledger.output(node, ledger.mix(x, mixed))


def _per_channel(node: Node, ledger: Ledger, x: Layout, parameters: tuple[int, ...]) -> None:
    if not x.axes:
        raise Refusal("a single number has no channels")
    channel: Axis = x.axes[1] if len(x.axes) > 1 else fixed(1)
    for index in parameters:
        parameter = ledger.input(node, index)
        if len(parameter.axes) != 1:
            raise Refusal(f"its parameter {node.inputs[index]} is no vector")
        channel = ledger.unify(channel, parameter.axes[0])
    ledger.output(node, (x.axes[0], channel, *x.axes[2:]))


def _statistics(node: Node, ledger: Ledger, x: Layout, axes: Collection[int]) -> Layout:
    for axis in axes:
        if not is_fixed(x.axes[axis]):
            ledger.contract(node, 0, axis, redefined=True)
    return ledger.mix(x, axes)
