"""How random graphs move, repeat and reduce data: each step reads a tensor and returns a new one."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx

from .net import Net
from .steps import activate, layer, vector

REDUCTIONS = "Mean Sum Max L1 L2 Min LogSum LogSumExp Prod SumSquare".split()


def any_axis(g: Net, x: str) -> int:
    """Choose an axis, mostly the channels', never the batch."""
    return g.axis[x] if not g.chance(4) else g.pick(*range(1, len(g.shape(x))))


def transpose(g: Net, x: str) -> str:
    """Permute all axes but the batch, or move the channels last."""
    rest = list(range(1, len(g.shape(x))))
    if g.chance():
        return g.move(x, -1)
    return g.transpose(x, [0, *(rest.pop(g.choose(len(rest))) for _ in range(len(rest)))])


def concat(g: Net, x: str) -> str:
    """Lay a tensor beside an older one, a new layer's, a constant or itself."""
    axis = any_axis(g, x)
    shape, fitting = g.shape(x), [y for y in g.pool if y != x and g.alike(x, y, axis)]
    other = g.pick("layer", "older", "constant", "self")
    if other == "older" and fitting:
        parts = [x, g.pick(*fitting)]
    elif other == "constant" and not g.dynamic:
        wide = [1 if a == axis else size for a, size in enumerate(shape)]
        parts = [x, g.random(*wide, name=f"{g.fresh()}.k")]
    else:
        parts = [x, x if other == "self" or axis != g.axis[x] else layer(g, x)]
    return g.to(g.node("Concat", *parts[:: g.pick(1, -1)], axis=axis), g.axis[x])


def split(g: Net, x: str) -> str:
    """Cut an axis in parts, work on one, and join, gate or drop the others."""
    axis = any_axis(g, x)
    size, where = g.shape(x)[axis], g.axis[x]
    if size < 2:
        return x
    parts = g.pick(2, *(n for n in (3, 4) if size % n == 0))
    first = g.choose(size - 1) + 1 if g.chance() or size % parts else 0
    sizes = [first, size - first] if first else [size // parts] * parts
    explicit = {"split": sizes} if first or g.opset < 13 else {"num_outputs": parts} if g.opset > 17 else {}
    cut = g.node("Split", x, outputs=len(sizes), axis=axis, **explicit)
    join = g.pick("concat", "gate", "drop")
    for part in cut:
        g.to(part, where)
    if join == "gate" and not first:
        return g.node("Mul", cut[0], g.node("Sigmoid", cut[1]))
    changed = g.step(cut[0])
    if join == "drop" or not g.alike(changed, cut[0], axis):
        g.pool += cut[1:]
        return changed
    return g.to(g.node("Concat", changed, *cut[1:], axis=axis), where)


def pick_out(g: Net, x: str) -> str:
    """Slice with any step, or Gather with repeated indices, or one index alone."""
    axis, where = any_axis(g, x), g.axis[x]
    size = g.shape(x)[axis]
    kind = g.pick("slice", "gather", "backwards", "stride", "one")
    if size < 2:
        return x
    if kind == "gather":
        indices = [g.choose(2 * size) - size for _ in range(g.choose(size + 2) + 1)]
        return g.to(g.node("Gather", x, g.constant(indices), axis=axis), where)
    if kind == "one" and axis != where and len(g.shape(x)) > 2:
        return g.to(g.node("Gather", x, g.constant(np.array(g.choose(size))), axis=axis), where - (axis < where))
    begin = g.choose(size - 1)
    bounds = {"starts": [begin], "ends": [g.pick(2**31 - 1, size, -1 if begin < size - 1 else size)], "axes": [axis]}
    if kind in ("backwards", "stride") and g.opset > 9:
        more = ([-1], [-(2**31)], [-1]) if kind == "backwards" else ([0], [size], [2])
        bounds |= dict(zip(("starts", "ends", "steps"), more, strict=True))
    return g.to(g.node("Slice", x, **bounds), where)


def pad(g: Net, x: str) -> str:
    """Pad the channels or another axis, by zeros, other numbers or what is there."""
    axis, shape = any_axis(g, x), g.shape(x)
    mode = g.pick("constant", "constant", "reflect", "edge") if len(shape) == 4 else "constant"
    amounts = [0] * 2 * len(shape)
    most = 3 if mode == "constant" else min(3, shape[axis])
    amounts[axis], amounts[axis + len(shape)] = g.choose(most), g.choose(most)
    name = "value" if g.opset < 11 else "constant_value"
    number = 0.5 if g.opset < 11 else np.float32(0.5)
    filled = {name: number} if mode == "constant" and g.chance(3) else {}
    return g.node("Pad", x, pads=amounts, mode=mode, **filled)


def shuffle_channels(g: Net, x: str, groups: int) -> str:
    """Shuffle channels between groups."""
    shape, axis = list(g.shape(x)), g.axis[x]
    y = g.reshape(x, [*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :]], axis + 1)
    order = list(range(len(shape) + 1))
    order[axis : axis + 2] = axis + 1, axis
    return g.reshape(g.to(g.node("Transpose", y, perm=order), axis), shape, axis)


def fold(g: Net, x: str) -> str:
    """Reshape, Transpose, Reshape: a channel shuffle, a fold of channels into rows, or into positions."""
    shape, axis = list(g.shape(x)), g.axis[x]
    groups, kind = g.divisor(shape[axis]), g.pick("shuffle", "heads", "positions")
    if kind == "shuffle":
        return shuffle_channels(g, x, groups)
    y = g.reshape(x, [*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :]], axis + 1)
    order = list(range(len(shape) + 1))
    if kind == "heads":
        order.insert(1, order.pop(axis))
        y = g.transpose(y, order)
        return g.move(g.step(y), -1) if len(g.shape(y)) < 6 else y
    if axis > 1 or len(shape) < 3:
        return y
    y = g.node("Transpose", y, perm=[0, 2, 3, 1, *order[4:]])
    return g.reshape(y, [shape[0], shape[1] // groups, shape[2] * groups, *shape[3:]], 1)


def pixels(g: Net, x: str) -> str:
    """DepthToSpace or SpaceToDepth."""
    x = g.front(x)
    shape = g.shape(x)
    if len(shape) == 4 and shape[1] % 4 == 0 and shape[1] >= 4:
        mode = {"mode": g.pick("DCR", "CRD")} if g.opset > 10 else {}
        x = g.node("DepthToSpace", x, blocksize=2, **mode)
    if len(shape) == 4 and g.shape(x)[2] % 2 == g.shape(x)[3] % 2 == 0 and g.chance():
        x = g.node("SpaceToDepth", x, blocksize=2)
    return x


def refold(g: Net, x: str) -> str:
    """Flatten, Squeeze and Unsqueeze, or merge positions."""
    shape, axis = g.shape(x), g.axis[x]
    kind = g.pick("unsqueeze", "flatten", "tokens", "around")
    if kind == "flatten":
        return g.flat(x)
    if kind == "tokens":
        return g.tokens(x)
    if kind == "around" and not g.dynamic and 1 in shape:
        return g.to(g.node("Reshape", activate(g, g.node("Squeeze", x)), g.like(x)), axis)
    place = g.choose(len(shape)) + 1
    y = g.to(g.node("Unsqueeze", x, axes=[place]), axis + (place <= axis))
    return g.to(g.node("Squeeze", activate(g, y), axes=[place]), axis) if len(shape) > 4 or g.chance() else y


def repeat(g: Net, x: str) -> str:
    """Expand a vector or a mean, or repeat (Tile) the channels or another axis."""
    axis, shape = any_axis(g, x), g.shape(x)
    where = g.axis[x]
    if g.chance():
        if prod(shape) > 512:
            return x
        repeats = [1] * len(shape)
        repeats[axis] = 2
        return g.to(g.node("Tile", x, repeats=repeats), where)
    small = g.node("ReduceMean", x, axes=[axis], keepdims=1) if g.chance() else vector(g, x)
    return g.to(g.node("Add", x, g.node("Expand", small, g.like(x))), where)


def pool(g: Net, x: str) -> str:
    """Pool windows or everything."""
    x = g.front(x)
    space = g.shape(x)[2:]
    op = g.pick("MaxPool", "AveragePool", "LpPool", *g.global_pools)
    if op.startswith("Global"):
        return g.node(op, x)
    stride, kernel = g.pick(2, 1), [min(2, size) for size in space]
    padded = {"pads": [0] * len(space) + [int(size > 1) for size in space]} if g.chance() else {}
    mode = {"ceil_mode": 1} if op != "LpPool" and g.opset > 9 and not padded and g.chance() else {}
    if op == "MaxPool" and g.chance(8):  # its indices count through the channels
        values, indices = g.node(op, x, outputs=2, kernel_shape=kernel, strides=[stride] * len(space))
        return g.to(g.node("Add", values, g.node("Cast", indices, to=1)), 1)
    return g.node(op, x, kernel_shape=kernel, strides=[stride] * len(space), **padded, **mode)


def resize(g: Net, x: str) -> str:
    """Enlarge or shrink positions, by factors or to sizes."""
    x = g.front(x)
    shape = g.shape(x)
    if prod(shape) > 512:
        return x
    factors = [1.0, 1.0, *(g.pick(2.0, 1.0, 0.5 if size > 1 else 2.0) for size in shape[2:])]
    if g.opset < 11:
        return g.node("Upsample" if g.opset < 10 else "Resize", x, scales=[max(1.0, f) for f in factors])
    empty = g.constant(np.zeros(0, np.float32)) if g.opset < 13 else ""  # optional since opset 13
    if g.chance() and not g.dynamic:
        return g.node("Resize", x, empty, empty, sizes=[int(n * f) for n, f in zip(shape, factors, strict=True)])
    return g.node("Resize", x, empty, scales=factors, mode=g.pick("nearest", "linear"))


def reduce(g: Net, x: str) -> str:
    """Reduce positions or channels, and give the result back to the tensor or go on with it alone."""
    shape, where = g.shape(x), g.axis[x]
    axis, op = any_axis(g, x) if g.chance() else g.pick(*range(1, len(shape))), g.pick(*REDUCTIONS)
    if op.startswith("Log") or op == "Prod":
        x = g.node("Add", g.node("Abs", x), g.constant(0.5))
    keep = g.chance() or len(shape) < 3 or axis == where
    y = g.node(f"Reduce{op}", x, axes=[axis - g.choose(2) * len(shape)], keepdims=int(keep))
    if not keep:
        return g.to(y, where - (axis < where))
    back = g.pick("Mul", "Sub", "Add", "") if axis == where or len(shape) < 3 else g.pick("", "Mul", "Sub", "Add")
    return g.to(g.node(back, x, g.node("Tanh", y)) if back else y, where)


def mix(g: Net, x: str) -> str:
    """Softmax and what else mixes one axis, mostly not the channels'."""
    others = [a for a in range(1, len(g.shape(x))) if a != g.axis[x]]
    axis = g.pick(*others) if others and not g.chance(4) else g.axis[x]
    op = g.pick("Softmax", "LogSoftmax", "CumSum", "Hardmax", "TopK", "ArgMax", "ArgMin")
    if op == "CumSum":
        return g.node(op, x, axis=np.array(axis)) if g.opset > 10 else x
    if op == "TopK":
        kept = min(2, g.shape(x)[axis])
        values, _ = g.node(op, x, outputs=2, axis=axis, k=kept if g.opset < 10 else [kept])
        return g.to(values, g.axis[x])
    if op.startswith("Arg"):
        found = g.node("Cast", g.node(op, x, axis=axis, keepdims=1), to=1)
        return g.to(g.node("Mul", x, g.node("Sigmoid", found)), g.axis[x])
    return g.node(op, x, axis=axis)


def count(g: Net, x: str) -> str:
    """Numbers that come from lengths: positions, a size, a constant of some shape, an identity matrix."""
    shape, where = g.shape(x), g.axis[x]
    kind = g.pick("fill", "positions", "size", "eye")
    if kind == "eye" and len(shape) == 2:
        return g.to(g.node("Add", x, g.node("EyeLike", x)), where)
    if kind == "size":
        return g.to(g.node("Div", x, g.node("Sqrt", g.node("Cast", g.node("Size", x), to=1))), where)
    if kind == "positions" and g.has("Range"):
        axis = g.pick(*range(1, len(shape)))
        end = g.node("Gather", g.node("Shape", x), g.constant(np.array(axis)), axis=0)
        g.values[end] = np.array(shape[axis])
        numbers = g.node("Cast", g.node("Range", g.constant(np.array(0)), end, g.constant(np.array(1))), to=1)
        later = list(range(1, len(shape) - axis))
        numbers = g.node("Unsqueeze", numbers, axes=later) if later else numbers
        return g.to(g.node("Add", x, g.node("Sin", numbers)), where)
    value = onnx.numpy_helper.from_array(np.full(1, 0.5, np.float32))
    return g.to(g.node("Add", x, g.node("ConstantOfShape", g.like(x), value=value)), where)


MOVES = (transpose, concat, split, pick_out, pad, fold, pixels, refold, repeat, pool, resize, reduce, mix, count)
