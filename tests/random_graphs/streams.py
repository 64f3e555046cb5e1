"""Residual streams of several alignments, and weights with several roles."""

from __future__ import annotations

import numpy as np

from .moves import shuffle_channels
from .net import Net
from .steps import activate, layer


def streams(g: Net, x: str) -> str:
    """Add branches that cut, pad, permute or group the same channels at different places."""
    x, size = g.front(x), g.pick(12, 8, 16, 9)
    x = layer(g, x, size)
    y = recut(g, x)
    for _ in range(g.choose(3) + 1):
        z = recut(g, g.pick(x, y))
        y = g.to(g.node(g.pick("Add", "Mul", "Sub", "Max"), y, z), 1)
        y = activate(g, y) if g.chance(3) else y
    return y


def recut(g: Net, x: str) -> str:
    """The same number of channels, in another order, from other places or by groups."""
    size, rank = g.channels(x), len(g.shape(x)) - 2
    kind = g.pick("parts", "shift", "roll", "shuffle", "grouped", "depthwise", "permuted", "layer", "wide")
    if kind == "parts":
        first = g.choose(size - 1) + 1
        cut = [g.to(part, 1) for part in split(g, x, [first, size - first])]
        own = g.pick(0, 1)
        kinds = g.pick(activate, depthwise, lambda g, part: layer(g, part, g.channels(part)))
        cut[own] = kinds(g, cut[own])
        return g.to(g.node("Concat", *cut[:: g.pick(1, -1)], axis=1), 1)
    if kind == "shift":
        by = g.choose(size - 2) + 1
        kept = g.to(g.node("Slice", x, starts=[by], ends=[size], axes=[1]), 1)
        front = g.choose(by + 1)
        pads = [0, front, *[0] * rank, 0, by - front, *[0] * rank]
        return g.to(g.node("Pad", kept, pads=pads), 1)
    if kind == "roll":
        by = g.choose(size - 1) + 1
        parts = [g.node("Slice", x, starts=[a], ends=[b], axes=[1]) for a, b in ((by, size), (0, by))]
        return g.to(g.node("Concat", *parts, axis=1), 1)
    if kind == "shuffle":
        return shuffle_channels(g, x, g.divisor(size))
    if kind == "grouped":
        return layer(g, x, size, g.divisor(size))
    if kind == "depthwise":
        return depthwise(g, x)
    if kind == "permuted":
        return g.to(g.node("Gather", x, g.constant(g.rng.permutation(size)), axis=1), 1)
    if kind == "wide":  # more than is needed: the rest goes elsewhere
        more = g.pick(4, 3, 6)
        cut = [g.to(part, 1) for part in split(g, layer(g, x, size + more), [more, size])]
        g.pool.append(cut[0])
        return cut[1]
    return layer(g, x, size)


def depthwise(g: Net, x: str) -> str:
    """A convolution of every channel by itself."""
    return layer(g, x, g.channels(x), g.channels(x))


def split(g: Net, x: str, sizes: list[int]) -> list[str]:
    """Cut the channels at the given places."""
    how = {"split": sizes}
    return g.node("Split", x, outputs=len(sizes), axis=1, **how)


def tied(g: Net, x: str) -> str:
    """One matrix forwards and backwards, as embeddings are tied; and a vector that shifts here and scales there."""
    x, wide, name = g.tokens(x), g.pick(6, 8, 12), g.fresh()
    size = g.channels(x)
    matrix = g.random(size, wide, name=f"{name}.tied", scale=size**-0.5)
    y = activate(g, g.to(g.node("MatMul", x, matrix), 2))
    shift = g.random(wide, name=f"{name}.both", scale=0.4)
    y = g.node("Add", y, shift)
    y = g.step(y) if g.chance(3) else activate(g, y)
    if g.channels(y) != wide or len(g.shape(y)) != 3 or g.axis[y] != 2:
        return y
    y = g.node("Mul", y, shift) if g.chance() else y
    return g.to(g.node("MatMul", y, g.node("Transpose", matrix, perm=[1, 0])), 2)


def measured_out(g: Net, x: str) -> str:
    """Cut, enlarge or fill by lengths that are measured when the graph runs."""
    shape, where = g.shape(x), g.axis[x]
    axis = g.pick(*range(1, len(shape)))
    length = g.node("Gather", g.node("Shape", x), g.constant([axis]), axis=0)
    g.values[length] = np.array([shape[axis]])
    kind = g.pick("halves", "expand", "whole", "last")
    if kind == "expand":
        row = g.node("ReduceMax", x, axes=[axis], keepdims=1)
        return g.to(g.node("Add", x, g.node("Expand", row, g.like(x))), where)
    if kind == "whole" or g.opset < 10:
        return g.to(g.node("Div", x, g.node("Sqrt", g.node("Cast", length, to=1))), where)
    if kind == "last" or shape[axis] % 2:
        return g.to(g.node("Slice", x, g.constant([0]), length, g.constant([axis])), where)
    half = g.node("Div", length, g.constant([2]))
    g.values[half] = np.array([shape[axis] // 2])
    first = g.to(g.node("Slice", x, g.constant([0]), half, g.constant([axis])), where)
    second = g.to(g.node("Slice", x, half, length, g.constant([axis])), where)
    return g.to(g.node("Add", first, activate(g, second)), where)


STREAMS = (streams, tied, measured_out)
