"""What networks are made of: blocks of several layers."""

from __future__ import annotations

import numpy as np

from .moves import shuffle_channels
from .net import Net
from .steps import activate, layer, normalise


def block(g: Net, x: str) -> str:
    """A layer, a normalisation and an activation."""
    return activate(g, normalise(g, layer(g, x)))


def residual(g: Net, x: str) -> str:
    """Add a branch of steps, each with an alignment of its own, or join it in another way."""
    y = x
    for _ in range(g.choose(2) + 1):
        y = g.step(y)
    return join(g, layer(g, x) if g.chance(3) else x, y)


def join(g: Net, x: str, y: str) -> str:
    """Join two tensors where their shapes allow it, behind a layer if only channels differ; else return the second."""
    axis = g.axis[x]
    if x == y or not g.alike(x, y, axis):
        return y
    if g.chance(3):
        return g.to(g.node("Concat", x, y, axis=axis), axis)
    if g.shape(x) != g.shape(y):
        y = layer(g, y, g.channels(x))
    op = g.pick("Add", "Mul", "Sub", "Max", "Min", "Mean", "Sum")
    return g.to(g.node(op, x, y, *([x] if op in ("Max", "Mean", "Sum") and g.chance() else [])), axis)


def join_older(g: Net, x: str) -> str:
    """Join an older tensor."""
    return join(g, x, g.pick(*g.pool[::-1]))


def grouped(g: Net, x: str) -> str:
    """Cut the channels into groups that convolve by themselves; behind a concatenation they lie across its parts."""
    x = g.front(x)
    if g.chance():
        x = g.to(g.node("Concat", x, layer(g, x, g.channels(x)), axis=1), 1)
    groups = g.divisor(g.channels(x))
    return layer(g, x, groups * g.pick(2, 1, 3) if groups < 8 else groups, groups)


def misaligned(g: Net, x: str) -> str:
    """Join branches that cut the same channels into different numbers of groups or heads."""
    x, size = g.front(x), g.pick(12, 24)
    branches = []
    for groups in (g.pick(2, 4, 3), g.pick(4, 3, 6)):
        y = layer(g, x, size)
        y = layer(g, y, size, groups) if not g.chance(3) else shuffle_channels(g, y, groups)
        branches.append(activate(g, y))
    if g.chance():
        return g.to(g.node("Add", *branches), 1)
    return layer(g, g.to(g.node("Concat", *branches, axis=1), 1), 12, g.pick(3, 4, 1))


def gate(g: Net, x: str) -> str:
    """Squeeze and excite: scale channels by numbers computed from all of them."""
    x = g.front(x)
    rank, size = len(g.shape(x)) - 2, g.channels(x)
    mean = {"axes": list(range(2, rank + 2)), "keepdims": 1}
    y = g.node("ReduceMean", x, **mean) if g.chance() else g.node("GlobalAveragePool", x)
    y = activate(g, g.conv(y, g.fresh(), size, g.pick(3, 2), rank=rank))
    y = g.node("Sigmoid", g.conv(y, g.fresh(), g.channels(y), size, rank=rank))
    return g.to(g.node("Mul", *(x, y)[:: g.pick(1, -1)]), 1)


def glance(g: Net, x: str) -> str:
    """Spatial attention: scale positions by a layer over the channels' mean and maximum."""
    x = g.front(x)
    seen = [g.node(op, x, axes=[1], keepdims=1) for op in ("ReduceMean", "ReduceMax")]
    y = g.conv(g.node("Concat", *seen, axis=1), g.fresh(), 2, 1, rank=len(g.shape(x)) - 2)
    return g.to(g.node("Mul", x, g.node("Sigmoid", y)), 1)


def perceptron(g: Net, x: str) -> str:
    """Two layers behind a gate: from one fused layer, or from two."""
    wide, size = g.pick(6, 4, 8), g.channels(x)
    if g.chance():
        both = layer(g, x, 2 * wide)
        a, b = (g.to(part, g.axis[x]) for part in g.node("Split", both, outputs=2, axis=g.axis[x], **halves(g, wide)))
    else:
        a, b = layer(g, x, wide), layer(g, x, wide)
    y = layer(g, g.to(g.node("Mul", activate(g, a), b), g.axis[x]), size)
    return g.to(g.node("Add", x, y), g.axis[x]) if g.shape(y) == g.shape(x) else y


def windows(g: Net, x: str) -> str:
    """A layer within halves of the positions, which join the batch meanwhile."""
    x = g.front(x)
    n, size, rows, *rest = g.shape(x)
    if rows % 2:
        return layer(g, x)
    order = [0, 2, 1, *range(3, 4 + len(rest))]
    y = g.transpose(g.reshape(x, (n, size, 2, rows // 2, *rest), 1), order)
    y = activate(g, layer(g, g.reshape(y, (2 * n, size, rows // 2, *rest), 1)))
    y = g.transpose(g.reshape(y, (n, 2, g.channels(y), rows // 2, *rest), 2), order)
    return g.reshape(y, (n, g.channels(y), rows, *rest), 1)


def halves(g: Net, size: int) -> dict[str, object]:
    """Split in two, as the opset says it."""
    return {"num_outputs": 2} if g.opset > 17 else {"split": [size, size]}


def twice(g: Net, x: str) -> str:
    """Apply the same weight twice, one after the other, or to two tensors."""
    x = g.front(x)
    size, name = g.channels(x), g.fresh()
    weight = g.random(size, size, *[1] * (len(g.shape(x)) - 2), name=f"{name}.w", scale=size**-0.5)
    y = activate(g, g.node("Conv", x, weight))
    return g.node("Conv", y, weight) if g.chance() else g.node("Add", y, g.node("Conv", activate(g, x), weight))


def attention(g: Net, x: str) -> str:
    """Multi-head attention: three projections, or one that is cut by Gather, Split or Slice."""
    x = g.tokens(x)
    n, t, size = g.shape(x)
    heads = g.divisor(size)
    width = size // heads
    how = g.pick("three", "gather", "split", "slice", "flat split")
    if how == "three":
        q, k, v = (folded(g, layer(g, x, size), heads) for _ in range(3))
    elif how == "flat split":
        cut = g.node("Split", layer(g, x, 3 * size), outputs=3, axis=2, **({"num_outputs": 3} if g.opset > 17 else {}))
        q, k, v = (folded(g, g.to(part, 2), heads) for part in cut)
    else:
        y = g.reshape(layer(g, x, 3 * size), (n, t, 3, heads, width), 4)
        q, k, v = cut_three(g, g.to(g.node("Transpose", y, perm=[2, 0, 3, 1, 4]), 4), how)
    scale = g.constant(np.float32(width**-0.5))
    if g.chance(4):  # from the length that it measures
        length = g.node("Gather", g.node("Shape", q), g.constant(np.array(3)), axis=0)
        scale = g.node("Reciprocal", g.node("Sqrt", g.node("Cast", length, to=1)))
    scores = g.node("MatMul", g.node("Mul", q, scale), g.node("Transpose", k, perm=[0, 1, 3, 2]))
    if g.chance(3):
        scores = g.node("Add", scores, g.random(*g.pick((t, t), (heads, t, t)), name=f"{g.fresh()}.bias"))
    y = g.node("MatMul", g.node("Softmax", scores, axis=3), v)
    y = g.reshape(g.to(g.node("Transpose", y, perm=[0, 2, 1, 3]), 3), (n, t, size), 2)
    y = layer(g, y, size)
    return y if g.chance() else g.to(g.node("Add", x, y), 2)


def folded(g: Net, x: str, heads: int) -> str:
    """See channels as (heads, width), heads in front."""
    n, t, size = g.shape(x)
    return g.transpose(g.reshape(x, (n, t, heads, size // heads), 3), (0, 2, 1, 3))


def cut_three(g: Net, y: str, how: str) -> list[str]:
    """Cut the first of five axes into its three."""
    if how == "gather":
        return [g.to(g.node("Gather", y, g.constant(np.array(i)), axis=0), 3) for i in range(3)]
    if how == "split":
        parts = g.node("Split", y, outputs=3, axis=0, **({"num_outputs": 3} if g.opset > 17 else {"split": [1, 1, 1]}))
    else:
        parts = [g.node("Slice", y, starts=[i], ends=[i + 1], axes=[0]) for i in range(3)]
    return [g.to(g.node("Squeeze", part, axes=[0]), 3) for part in parts]


BLOCKS = (
    residual, grouped, attention, misaligned, join_older,
    gate, glance, perceptron, twice, windows, block,
)  # fmt: skip
