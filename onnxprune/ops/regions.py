"""Operators that cut and join axes: Concat, Split, Slice, Gather, Pad."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnxprune.labels import Axis, Layout, Ledger, Refusal, fixed, is_fixed, length
from onnxprune.model import Node
from onnxprune.ops import Change, Edit, couples, rewrites


@couples("Concat")
def concat(node: Node, ledger: Ledger) -> None:
    """Output channel k is channel k - offset of the input it came from."""
    join(node, ledger, range(len(node.inputs)))


def join(node: Node, ledger: Ledger, indices: Iterable[int]) -> None:
    """Lay these inputs end to end along the node's axis."""
    parts = [ledger.input(node, index) for index in indices]
    position = node.attributes["axis"] % len(parts[0].axes)
    if position == 0 and all(is_fixed(part.axes[0]) for part in parts):
        ledger.output(node, ledger.stack(parts))
        return
    axes = list(parts[0].axes)
    for part in parts[1:]:
        for other, axis in enumerate(part.axes):
            if other != position:
                axes[other] = ledger.unify(axes[other], axis)
    axes[position] = ledger.concat([part.axes[position] for part in parts])
    ledger.output(node, axes)


@couples("Split")
def split(node: Node, ledger: Ledger) -> None:
    """Output i takes its run of the axis."""
    x = ledger.input(node, 0)
    position = node.attributes.get("axis", 0) % len(x.axes)
    begin = 0
    flat = _flattened(ledger, x.axes[position])
    for index, name in enumerate(node.outputs):
        if not name:
            raise Refusal("a Split with an unused output")
        size = ledger.shape(name)[position]
        run = ledger.take(flat, np.arange(begin, begin + size))
        ledger.output(node, (*x.axes[:position], run, *x.axes[position + 1 :]), index)
        begin += size


@rewrites("Split")
def split_sizes(node: Node, change: Change) -> list[Edit]:
    """Sizes follow; an equal split that is no longer equal gets explicit sizes."""
    position = node.attributes.get("axis", 0) % len(change.before(node.inputs[0]))
    sizes = [change.after(name)[position] for name in node.outputs]
    if node.has(1):
        known = change.value(node.inputs[1])
        return [] if known is None or known.tolist() == sizes else [Edit(1, np.array(sizes, known.dtype))]
    if "split" in node.attributes:
        return [] if list(node.attributes["split"]) == sizes else [Edit("split", sizes)]
    total = sum(sizes)
    each = -(-total // len(sizes))
    equal = [min(each, total - each * index) for index in range(len(sizes))]
    if sizes == equal and ("num_outputs" in node.attributes or len(set(sizes)) == 1):
        return []
    if change.opset < 13:
        return [Edit("split", sizes)]
    return [Edit("num_outputs", None), Edit(1, np.array(sizes, np.int64))]


@couples("Slice")
def slice_axes(node: Node, ledger: Ledger) -> None:
    """The picked indices' labels, in picked order; a stride over channels keeps the rhythm of what it skips."""
    x = ledger.input(node, 0)
    axes = list(x.axes)
    for position, (start, end, step) in _slices(node, ledger.model.value, len(axes)).items():
        axis = axes[position]
        size = length(axis)
        picked = np.arange(size)[slice(start, _stop(end, step), step)]
        if step not in (1, -1) and not is_fixed(axis):
            axes[position] = _strided(node, ledger, axis, picked, step)
        else:
            axes[position] = ledger.take(axis, picked)
    ledger.output(node, axes)


@rewrites("Slice")
def slice_bounds(node: Node, change: Change) -> list[Edit]:
    """Bounds become positions among the kept channels, where they do not already mean the same."""
    name = node.inputs[0]
    rank = len(change.before(name))
    try:
        before = _slices(node, change.original, rank)
        now = _slices(node, change.value, rank)
    except Refusal:
        return []
    starts, ends, changed = {}, {}, False
    for position, (start, end, step) in before.items():
        size = change.before(name)[position]
        picked = np.arange(size)[slice(start, _stop(end, step), step)]
        kept_in, kept_out = change.kept(name, position), change.kept(node.outputs[0], position)
        wanted = np.searchsorted(kept_in, picked[kept_out])
        s, e, _ = now[position]
        starts[position], ends[position] = s, e
        if np.array_equal(np.arange(len(kept_in))[slice(s, _stop(e, step), step)], wanted):
            continue
        changed = True
        starts[position] = int(wanted[0])
        ends[position] = int(wanted[-1]) + (1 if step > 0 else -1)
        if ends[position] < 0:
            ends[position] = -len(kept_in) - 1
    if not changed:
        return []
    if not node.has(1):
        return [Edit("starts", list(starts.values())), Edit("ends", list(ends.values()))]
    operands = [(1, starts), (2, ends)]
    kind = getattr(change.value(node.inputs[1]), "dtype", np.int64)
    return [Edit(index, np.array([*bounds.values()], kind)) for index, bounds in operands]


@couples("Gather")
def gather(node: Node, ledger: Ledger) -> None:
    """Constant indices pick labels; computed ones could pick any, so the gathered axis freezes."""
    x = ledger.input(node, 0)
    position = node.attributes.get("axis", 0) % len(x.axes)
    indices = ledger.model.value(node.inputs[1])
    axis = x.axes[position]
    picked: tuple[Axis, ...]
    if indices is None:
        ledger.freeze([axis], "it is indexed by computed values", node.inputs[0])
        x, picked = ledger.mix(x, [position]), ledger.layout(node.inputs[1]).axes
    elif indices.ndim == 1:
        picked = (ledger.take(axis, np.where(indices < 0, indices + length(axis), indices)),)
    elif indices.ndim == 0:
        ledger.take(axis, np.atleast_1d(indices) % max(length(axis), 1))
        picked = ()
    elif _regroups(indices, length(axis)):
        axes = (*x.axes[:position], ledger.take(axis, indices.ravel() % max(length(axis), 1)), *x.axes[position + 1 :])
        ledger.output(node, ledger.regroup(Layout(axes), ledger.shape(node.outputs[0])))
        return
    else:
        ledger.freeze([axis], "it is gathered into several axes", node.inputs[0])
        picked = tuple(fixed(size) for size in indices.shape)
    ledger.output(node, (*x.axes[:position], *picked, *x.axes[position + 1 :]))


@rewrites("Gather")
def gather_indices(node: Node, change: Change) -> list[Edit]:
    """Indices of removed channels go, the others count among the kept."""
    now, before = change.value(node.inputs[1]), change.original(node.inputs[1])
    if now is None or before is None:
        return []
    position = node.attributes.get("axis", 0) % len(change.before(node.inputs[0]))
    kept = change.kept(node.inputs[0], position)
    size = change.before(node.inputs[0])[position]
    if len(kept) == size:
        return []
    shape = change.after(node.outputs[0])[position : position + before.ndim]
    if before.ndim > 1 and _counts(before, size):
        selected = kept.reshape(shape)
    else:
        selected = before
        for axis in range(before.ndim):
            selected = selected.take(change.kept(node.outputs[0], position + axis), axis)
    wanted = np.searchsorted(kept, selected % size).astype(now.dtype)
    same = now.shape == wanted.shape and np.array_equal(np.where(now < 0, now + len(kept), now), wanted)
    return [] if same else [Edit(1, wanted)]


@couples("Pad")
def pad(node: Node, ledger: Ledger) -> None:
    """Channels added as zeros may go again; any other value, and padding that copies channels, freezes."""
    x, shape = ledger.input(node, 0), ledger.shape(node.outputs[0])
    amounts = _pads(node, ledger.model.value, len(x.axes))
    zero = node.attributes.get("mode", "constant") == "constant" and _pad_value(node, ledger) == 0
    axes: list[Axis] = []
    for axis, size, (front, back) in zip(x.axes, shape, amounts, strict=True):
        if front == back == 0:
            axes.append(axis)
        elif is_fixed(axis) and (axis or not zero):
            axes.append(fixed(size))
        elif front < 0 or back < 0 or not zero:
            ledger.freeze([axis], "it is padded with values other than zero or cropped", node.inputs[0])
            axes.append(fixed(size))
        else:
            runs = [(ledger.atom(n),) if n else None for n in (front, back)]
            axes.append(ledger.concat([run for run in (runs[0], axis, runs[1]) if run is not None]))
    ledger.output(node, axes)


@rewrites("Pad")
def pad_amounts(node: Node, change: Change) -> list[Edit]:
    """As many zero channels in front and behind as are kept there."""
    source = change.before(node.inputs[0])
    try:
        before = _pads(node, change.original, len(source))
        now = _pads(node, change.value, len(source))
    except Refusal:
        return []
    wanted = []
    for position, (front, back) in enumerate(before):
        kept = change.kept(node.outputs[0], position)
        untouched = len(kept) == change.before(node.outputs[0])[position]
        inner = front + source[position]
        wanted.append((front, back) if untouched else (int((kept < front).sum()), int((kept >= inner).sum())))
    if wanted == now:
        return []
    axes = _pad_axes(node, change.value, len(source))
    flat = [wanted[axis][0] for axis in axes] + [wanted[axis][1] for axis in axes]
    return [Edit(1, np.array(flat, np.int64))] if node.has(1) else [Edit("pads", flat)]


def _regroups(indices: np.ndarray, size: int) -> bool:
    """Whether a Gather with a matrix of indices is a Reshape, or picks along one axis."""
    return max(indices.shape) == indices.size or _counts(indices, size)


def _counts(indices: np.ndarray, size: int) -> bool:
    return np.array_equal(indices.ravel() % max(size, 1), np.arange(size))


def _flattened(ledger: Ledger, axis: Axis) -> Axis:
    atom = ledger.flat(axis)
    return (atom,) if atom is not None else ()


def _stop(end: int, step: int) -> int | None:
    """ONNX writes "to the very front" as a bound far below zero, Python as None."""
    return None if step < 0 and end < -(2**30) else end


def _slices(node: Node, value, rank: int) -> dict[int, tuple[int, int, int]]:
    """Read (start, end, step) per sliced axis, from attributes (opset < 10) or inputs."""
    if not node.has(1):
        starts, ends = node.attributes["starts"], node.attributes["ends"]
        axes, steps = node.attributes.get("axes"), None
    else:
        operands = [value(node.inputs[index]) if node.has(index) else None for index in range(1, 5)]
        if any(operand is None and node.has(index) for index, operand in enumerate(operands, 1)):
            raise Refusal("a Slice with computed bounds")
        starts, ends, axes, steps = (None if operand is None else operand.ravel().tolist() for operand in operands)
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    return {int(axis) % rank: (int(s), int(e), int(t)) for axis, s, e, t in zip(axes, starts, ends, steps, strict=True)}


def _strided(node: Node, ledger: Ledger, axis: Axis, picked: np.ndarray, step: int) -> Axis:
    size = length(axis)
    if step < 0 or size % step or len(picked) != size // step:
        ledger.freeze([axis], f"a stride of {step} over {size} channels", node.inputs[0])
        return fixed(len(picked))
    rows, columns = ledger.grid(axis, size // step)
    ledger.freeze([columns], "a stride keeps its rhythm", node.inputs[0])
    return rows


def _pads(node: Node, value, rank: int) -> list[tuple[int, int]]:
    """Read (front, back) per axis, from attributes (opset < 11) or inputs."""
    flat = node.attributes["pads"] if not node.has(1) else value(node.inputs[1])
    if flat is None:
        raise Refusal("a Pad with computed amounts")
    axes = _pad_axes(node, value, rank)
    amounts = [(0, 0)] * rank
    for index, axis in enumerate(axes):
        amounts[axis] = int(flat[index]), int(flat[index + len(axes)])
    return amounts


def _pad_axes(node: Node, value, rank: int) -> list[int]:
    axes = value(node.inputs[3]) if node.has(3) else None
    return list(range(rank)) if axes is None else [int(axis) % rank for axis in axes.ravel()]


def _pad_value(node: Node, ledger: Ledger) -> float | None:
    return _real(ledger, node.inputs[2]) if node.has(2) else node.attributes.get("value", 0.0)


def _real(ledger: Ledger, name: str) -> float | None:
    """A constant's first number; of a quantised one only whether it is zero."""
    made = ledger.model.producer.get(name)
    if made is None or made.op != "DequantizeLinear" or name in ledger.model.static:
        value = ledger.model.value(name)
        return None if value is None else float(value.ravel()[0])
    before = ledger.model.producer.get(made.inputs[0])
    if before is not None and before.op == "QuantizeLinear":
        return _real(ledger, before.inputs[0])
    source, zero = _real(ledger, made.inputs[0]), _real(ledger, made.inputs[2]) if made.has(2) else 0.0
    return None if source is None or zero is None else source - zero
