"""Operators that only move data: labels move with it. An axis is a product of atoms, so no pattern matching is needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.labels import Axis, Ledger, Refusal, fixed, length, unlabelled
from onnxprune.model import Node, Shape
from onnxprune.ops import Change, Edit, couples, rewrites


@couples("Transpose")
def transpose(node: Node, ledger: Ledger) -> None:
    """Axes permute."""
    x = ledger.input(node, 0)
    order = node.attributes.get("perm") or range(len(x.axes))[::-1]
    ledger.output(node, [x.axes[position] for position in order])


@couples("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(node: Node, ledger: Ledger) -> None:
    """Atoms regroup in row-major order; the target is the output's known shape, not the operand's text.

    A Squeeze that names no axes drops whatever has length one at run time: with a dynamic batch nothing can name its axes.
    """
    dynamic = any(not isinstance(size, int) for dims in ledger.model.declared.values() for size in dims)
    if node.op == "Squeeze" and not node.has(1) and "axes" not in node.attributes and dynamic:
        raise Refusal("a Squeeze without axes and a dynamic batch: one channel left would be dropped")
    target = ledger.model.value(node.inputs[1]) if node.op == "Reshape" else None
    if target is not None and target.ndim != 1:
        raise Refusal("the shape it is to have is no vector")
    ledger.output(node, ledger.regroup(ledger.input(node, 0), ledger.shape(node.outputs[0])))


@rewrites("Reshape")
def reshape_target(node: Node, change: Change) -> list[Edit]:
    """Baked lengths follow; -1 and 0 stay wherever they still say the right thing."""
    target = change.value(node.inputs[1])
    if target is None:
        return []
    source, required = change.after(node.inputs[0]), change.after(node.outputs[0])
    keep_zero = not node.attributes.get("allowzero", 0)
    if _resolve(target, source, keep_zero) == required:
        return []
    edited = target.copy()
    for position, wanted in enumerate(target):
        copied = wanted == 0 and keep_zero and position < len(source) and source[position] == required[position]
        if wanted != -1 and not copied:
            edited[position] = required[position]
    if _resolve(edited, source, keep_zero) != required:
        edited = np.array(required, target.dtype)
    return [Edit(1, edited)]


def _resolve(target: np.ndarray, source: Shape, keep_zero: bool) -> Shape | None:
    """Shape that a Reshape operand means, or None where it does not fit."""
    sizes = [source[i] if size == 0 and keep_zero and i < len(source) else int(size) for i, size in enumerate(target)]
    total, known = int(np.prod(source)), int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) == 1 and known and total % known == 0:
        sizes[sizes.index(-1)] = total // known
    return tuple(sizes) if -1 not in sizes and int(np.prod(sizes)) == total else None


@rewrites("Squeeze")
def squeeze_axes(node: Node, change: Change) -> list[Edit]:
    """A Squeeze that names no axes would also drop a channel axis of which one channel is left."""
    if node.has(1) or "axes" in node.attributes:
        return []
    before, after = change.before(node.inputs[0]), change.after(node.inputs[0])
    axes = [axis for axis, size in enumerate(before) if size == 1]
    if after.count(1) == len(axes):
        return []
    return [Edit("axes", axes) if change.opset < 13 else Edit(1, np.array(axes, np.int64))]


@couples("Expand", "Tile")
def repeat(node: Node, ledger: Ledger) -> None:
    """Copies along a new axis are free to shrink (Expand); copies of channels carry the same labels (Tile)."""
    x, shape = ledger.input(node, 0), ledger.shape(node.outputs[0])
    source = ((),) * (len(shape) - len(x.axes)) + x.axes
    axes: list[Axis] = []
    for axis, size in zip(source, shape, strict=True):
        if length(axis) == size:
            axes.append(axis)
        elif not axis:
            axes.append((ledger.atom(size),))
        else:
            axes.append(ledger.take(axis, np.tile(np.arange(length(axis)), size // length(axis))))
    ledger.output(node, axes)


@rewrites("Expand")
def expand_shape(node: Node, change: Change) -> list[Edit]:
    """Lengths that would no longer broadcast to the output follow it."""
    target = change.value(node.inputs[1])
    required = change.after(node.outputs[0])
    if target is None or np.broadcast_shapes(tuple(target), (1,) * len(required)) == required:
        return []
    offset = len(required) - len(target)
    edited = target.copy()
    for position in range(len(target)):
        if target[position] != 1:
            edited[position] = required[offset + position]
    return [] if np.array_equal(edited, target) else [Edit(1, edited)]


@rewrites("Tile")
def tile_repeats(node: Node, change: Change) -> list[Edit]:
    """A single index repeated n times becomes n' repeats; repeated channels keep their repeats."""
    repeats = change.value(node.inputs[1])
    if repeats is None:
        return []
    source, required = change.after(node.inputs[0]), change.after(node.outputs[0])
    wanted = np.array([after // before for before, after in zip(source, required, strict=True)], repeats.dtype)
    return [] if np.array_equal(wanted, repeats) else [Edit(1, wanted)]


@couples("ConstantOfShape")
def constant_of_shape(node: Node, ledger: Ledger) -> None:
    """All elements are equal, so every axis is free to shrink."""
    ledger.output(node, [(ledger.atom(size),) if size > 1 else () for size in ledger.shape(node.outputs[0])])


@rewrites("ConstantOfShape")
def constant_shape(node: Node, change: Change) -> list[Edit]:
    """The shape operand states the new lengths."""
    shape = change.value(node.inputs[0])
    required = change.after(node.outputs[0])
    if shape is None or tuple(shape.tolist()) == required:
        return []
    return [Edit(0, np.array(required, shape.dtype))]


@couples("DepthToSpace")
def depth_to_space(node: Node, ledger: Ledger) -> None:
    """R x r consecutive (CRD) or strided (DCR) channels become one; they live or die together."""
    r = node.attributes["blocksize"]
    n, c, h, w = _nchw(node, ledger)
    if node.attributes.get("mode", "DCR") == "DCR":
        _rearrange(node, ledger, (n, r, r, c // (r * r), h, w), blocks=(1, 2), order=(0, 3, 4, 1, 5, 2))
    else:
        _rearrange(node, ledger, (n, c // (r * r), r, r, h, w), blocks=(2, 3), order=(0, 1, 4, 2, 5, 3))


@couples("SpaceToDepth")
def space_to_depth(node: Node, ledger: Ledger) -> None:
    """Every channel becomes r x r channels, block offset outermost; they live or die together."""
    r = node.attributes["blocksize"]
    n, c, h, w = _nchw(node, ledger)
    _rearrange(node, ledger, (n, c, h // r, r, w // r, r), blocks=(3, 5), order=(0, 3, 5, 1, 2, 4))


def _nchw(node: Node, ledger: Ledger) -> Shape:
    shape = ledger.shape(node.inputs[0])
    if len(shape) != 4:
        raise Refusal(f"{node.op} of a tensor that is not NCHW")
    return shape


def _rearrange(node: Node, ledger: Ledger, grid: Shape, blocks: tuple[int, int], order: Sequence[int]) -> None:
    """Reshape to ``grid``, permute, reshape to the output: as the operator's specification writes it."""
    x, shape = ledger.input(node, 0), ledger.shape(node.outputs[0])
    fine = ledger.regroup(x, grid)
    ledger.freeze([*x.axes[2:], *(fine.axes[block] for block in blocks)], "it becomes pixels", node.inputs[0])
    permuted = ledger.arrange([fine.axes[position] for position in order])
    channel = ledger.regroup(permuted, shape).axes[1]
    ledger.output(node, (x.axes[0], channel, *map(fixed, shape[2:])))


@couples("EyeLike")
def eye_like(node: Node, ledger: Ledger) -> None:
    """The identity matrix has the input's lengths, so they stay."""
    ledger.freeze(ledger.input(node, 0).axes, "its lengths shape an identity matrix", node.inputs[0])


@couples("Shape", "Size", "Range")
def no_labels(node: Node, ledger: Ledger) -> None:
    """Outputs carry no labels (shapes, sizes, counts)."""
    for index, name in enumerate(node.outputs):
        if name:
            ledger.output(node, unlabelled(ledger.shape(name)), index)
