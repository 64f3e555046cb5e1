"""Convolutions and matrix products: they end the input's channels and start new ones."""

from __future__ import annotations

from math import prod

from onnxprune.labels import Axis, Joint, Layout, Ledger, Refusal, fixed
from onnxprune.model import Node
from onnxprune.ops import Change, Edit, channels_only, couples, rewrites


@couples("Conv")
def conv(node: Node, ledger: Ledger) -> None:
    """Input channels end in the weight's axis 1, output channels start on its axis 0; depthwise channels pass."""
    x, w = ledger.input(node, 0), ledger.input(node, 1, axes=(0, 1))
    groups = node.attributes.get("group", 1)
    shape, kernel = ledger.shape(node.outputs[0]), ledger.shape(node.inputs[1])
    channels_only(node, ledger, (*x.axes[2:], *w.axes[2:]), "a convolution slides over it")
    joints = [*x.joints, *w.joints]
    out = w.axes[0]
    if groups == 1:
        ledger.unify(x.axes[1], w.axes[1], joints)
    else:
        rows_in, columns_in = _rows(ledger, x.axes[1], groups, joints)
        rows_out, columns_out = _rows(ledger, out, groups, joints)
        ledger.unify(rows_in, rows_out, joints)
        ledger.unify(columns_in, w.axes[1], joints)
        if not columns_in:  # depthwise: a channel's whole depth multiplier goes with it
            ledger.freeze([columns_out], "the depth multiplier is one number for all channels")
    if groups == 1 or kernel[1] > 1:
        ledger.contract(node, 0, 1)
        ledger.contract(node, 1, 1)
    out = _bias(node, ledger, out, joints)
    ledger.work(node, (out, w.axes[1]), shape[0] * prod(shape[2:]) * prod(kernel[2:]), weight=1)
    ledger.output(node, (x.axes[0], out, *map(fixed, shape[2:])), joints=joints)


@couples("ConvTranspose")
def conv_transpose(node: Node, ledger: Ledger) -> None:
    """Input channels end in the weight's axis 0; output channels start on its axis 1, once per group."""
    x, w = ledger.input(node, 0), ledger.input(node, 1, axes=(0, 1))
    groups = node.attributes.get("group", 1)
    source, shape, kernel = ledger.shape(node.inputs[0]), ledger.shape(node.outputs[0]), ledger.shape(node.inputs[1])
    channels_only(node, ledger, (*x.axes[2:], *w.axes[2:]), "a convolution slides over it")
    joints = [*x.joints, *w.joints]
    out = w.axes[1]
    ended = ledger.unify(x.axes[1], w.axes[0], joints)
    if groups > 1:
        rows, columns = _rows(ledger, ended, groups, joints)
        if not columns:
            ledger.freeze([out], "the depth multiplier is one number for all channels")
        out = (*rows, *out)
    if groups == 1 or source[1] > groups:
        ledger.contract(node, 0, 1)
        ledger.contract(node, 1, 0)
    out = _bias(node, ledger, out, joints)
    factor = source[0] * prod(source[2:]) * prod(kernel[2:])
    ledger.work(node, (w.axes[0], w.axes[1]), factor, weight=1)
    ledger.output(node, (x.axes[0], out, *map(fixed, shape[2:])), joints=joints)


@rewrites("Conv", "ConvTranspose")
def convolution_groups(node: Node, change: Change) -> list[Edit]:
    """A grouped convolution that lost whole groups says so in its attribute."""
    groups = node.attributes.get("group", 1)
    if groups == 1:
        return []
    x, w = node.inputs[:2]
    if node.op == "Conv":
        left = change.after(x)[1] // change.after(w)[1]
    else:
        left = change.after(node.outputs[0])[1] // change.after(w)[1]
    return [Edit("group", left)] if left != groups else []


@couples("Gemm")
def gemm(node: Node, ledger: Ledger) -> None:
    """The shared dimension ends; rows come from A, columns from B; C broadcasts onto both."""
    a, b = ledger.input(node, 0), ledger.input(node, 1)
    transposed_a, transposed_b = node.attributes.get("transA", 0), node.attributes.get("transB", 0)
    rows, ended = a.axes[::-1] if transposed_a else a.axes
    inner, columns = b.axes[::-1] if transposed_b else b.axes
    joints = [*a.joints, *b.joints]
    ended = ledger.unify(ended, inner, joints)
    ledger.contract(node, 0, 0 if transposed_a else 1)
    ledger.contract(node, 1, 1 if transposed_b else 0)
    ledger.work(node, (rows, inner, columns), weight=1)
    if node.has(2):
        c = ledger.input(node, 2)
        padded: tuple[Axis, ...] = ((), (), *c.axes)[-2:]
        joints += c.joints
        rows, columns = ledger.unify(rows, padded[0], joints), ledger.unify(columns, padded[1], joints)
    ledger.output(node, (rows, columns), joints=joints)


@couples("MatMul")
def matmul(node: Node, ledger: Ledger) -> None:
    """numpy.matmul: the shared dimension ends, leading dimensions broadcast, either side may be the weight."""
    a, b = ledger.input(node, 0), ledger.input(node, 1)
    if not a.axes or not b.axes:
        raise Refusal("MatMul of a scalar")
    joints = [*a.joints, *b.joints]
    inner_b = b.axes[-2] if len(b.axes) > 1 else b.axes[-1]
    ledger.unify(a.axes[-1], inner_b, joints)
    ledger.contract(node, 0, len(a.axes) - 1)
    ledger.contract(node, 1, max(len(b.axes) - 2, 0))
    batch = _broadcast(ledger, a.axes[:-2], b.axes[:-2], joints)
    rows = (a.axes[-2],) if len(a.axes) > 1 else ()
    columns = (b.axes[-1],) if len(b.axes) > 1 else ()
    weight = next((i for i in (1, 0) if _is_weight(ledger, node.inputs[i])), None)
    ledger.work(node, (*batch, *rows, inner_b, *columns), weight=weight)
    ledger.output(node, (*batch, *rows, *columns), joints=joints)


def _rows(ledger: Ledger, axis: Axis, groups: int, joints: list[Joint]) -> tuple[Axis, Axis]:
    """See a channel axis as (groups, channels per group)."""
    size = prod(atom.size for atom in axis)
    if size % groups:
        raise Refusal(f"{size} channels do not divide into {groups} groups")
    grid = ledger.regroup(Layout((axis,), tuple(joints)), (groups, size // groups))
    joints[:] = dict.fromkeys([*grid.joints, *joints])
    return grid.axes[0], grid.axes[1]


def _bias(node: Node, ledger: Ledger, out: Axis, joints: list[Joint]) -> Axis:
    return ledger.unify(out, ledger.input(node, 2).axes[0], joints) if node.has(2) else out


def _broadcast(ledger: Ledger, a: tuple[Axis, ...], b: tuple[Axis, ...], joints: list[Joint]) -> list[Axis]:
    rank = max(len(a), len(b))
    pad = [((),) * (rank - len(side)) + side for side in (a, b)]
    return [ledger.unify(x, y, joints) for x, y in zip(*pad, strict=True)]


def _is_weight(ledger: Ledger, name: str) -> bool:
    return ledger.model.constant(name) is not None or name in ledger.derived
