"""Normalisations: per channel they tie, over channels they take their statistics from the kept ones."""

from __future__ import annotations

from onnxprune.labels import Axis, Joint, Layout, Ledger, Refusal, fixed, is_fixed
from onnxprune.model import Node
from onnxprune.ops import couples


@couples("BatchNormalization")
def batch_normalization(node: Node, ledger: Ledger) -> None:
    """Scale, bias, mean and variance tie to axis 1."""
    if node.attributes.get("training_mode", 0):
        raise Refusal("BatchNormalization in training mode mixes the batch")
    _per_channel(node, ledger, parameters=(1, 2, 3, 4))


@couples("InstanceNormalization")
def instance_normalization(node: Node, ledger: Ledger) -> None:
    """Scale and bias tie to axis 1; statistics run over all later axes."""
    _per_channel(node, ledger, parameters=(1, 2))
    _statistics(node, ledger, range(2, len(ledger.shape(node.inputs[0]))))


@couples("LayerNormalization", "RMSNormalization")
def layer_normalization(node: Node, ledger: Ledger) -> None:
    """Scale and bias tie to the trailing axes, over which the statistics run."""
    x = ledger.input(node, 0)
    rank = len(x.axes)
    first = node.attributes.get("axis", -1) % rank
    joints, axes = list(x.joints), list(x.axes)
    for index in (i for i in (1, 2) if node.has(i)):
        parameter = ledger.input(node, index)
        joints += parameter.joints
        offset = rank - len(parameter.axes)
        for position, axis in enumerate(parameter.axes, offset):
            axes[position] = ledger.unify(axes[position], axis, joints)
    _statistics(node, ledger, range(first, rank))
    ledger.output(node, axes, joints=joints)
    for index in range(1, len(node.outputs)):
        if node.outputs[index]:
            ledger.output(node, (*axes[:first], *[()] * (rank - first)), index)


@couples("GroupNormalization")
def group_normalization(node: Node, ledger: Ledger) -> None:
    """Statistics run within each group of channels; every group keeps equally many (opset 21: scale per channel)."""
    x = ledger.input(node, 0)
    groups = node.attributes["num_groups"]
    scale = ledger.shape(node.inputs[1])[0]
    size = ledger.shape(node.inputs[0])[1]
    if scale != size:
        raise Refusal("GroupNormalization with one scale per group")
    _per_channel(node, ledger, parameters=(1, 2))
    rows = ledger.regroup(Layout((x.axes[1],), x.joints), (groups, size // groups)).axes[0]
    ledger.freeze([rows], "the number of normalisation groups stays")
    _statistics(node, ledger, range(1, len(x.axes)))


@couples("LpNormalization")
def lp_normalization(node: Node, ledger: Ledger) -> None:
    """A removed channel adds nothing to the norm that divides the others."""
    x = ledger.input(node, 0)
    ledger.contract(node, 0, node.attributes.get("axis", -1) % len(x.axes))
    ledger.output(node, x)


@couples("LRN")
def lrn(node: Node, ledger: Ledger) -> None:
    """Each channel is divided by its neighbours' energy, so none may vanish."""
    x = ledger.input(node, 0)
    ledger.freeze([x.axes[1]], "LRN reads neighbouring channels", node.inputs[0])
    ledger.output(node, x)


@couples("Softmax", "LogSoftmax", "Hardmax", "CumSum")
def mixes_axis(node: Node, ledger: Ledger) -> None:
    """The mixed axis freezes; the others pass. Before opset 13 Softmax flattens from ``axis`` on."""
    x = ledger.input(node, 0)
    rank = len(x.axes)
    if node.op == "CumSum":
        value = ledger.model.value(node.inputs[1])
        if value is None:
            raise Refusal("CumSum over a computed axis")
        first = int(value.ravel()[0]) % rank
        mixed = x.axes[first : first + 1]
    elif ledger.model.opset < 13:
        mixed = x.axes[node.attributes.get("axis", 1) % rank :]
    else:
        first = node.attributes.get("axis", -1) % rank
        mixed = x.axes[first : first + 1]
    ledger.freeze(mixed, f"{node.op} mixes its indices", node.inputs[0])
    ledger.output(node, x)


def _per_channel(node: Node, ledger: Ledger, parameters: tuple[int, ...]) -> None:
    x = ledger.input(node, 0)
    joints: list[Joint] = list(x.joints)
    channel: Axis = x.axes[1] if len(x.axes) > 1 else fixed(1)
    for index in parameters:
        parameter = ledger.input(node, index)
        joints += parameter.joints
        channel = ledger.unify(channel, parameter.axes[0], joints)
    ledger.output(node, (x.axes[0], channel, *x.axes[2:]), joints=joints)


def _statistics(node: Node, ledger: Ledger, axes: range) -> None:
    x = ledger.input(node, 0)
    for axis in axes:
        if not is_fixed(x.axes[axis]):
            ledger.contract(node, 0, axis, redefined=True)
