"""Operators that few networks have: recurrent layers, Einsum, quantised weights, indexing, attention as one operator."""

from __future__ import annotations

import numpy as np

from .net import CHANNELS, Net
from .steps import layer, vector_of


def recurrent(g: Net, x: str) -> str:
    """An LSTM, GRU or RNN over the positions, in one direction or two; all its states or the last."""
    op, hidden, directions = g.pick("LSTM", "GRU", "RNN"), g.pick(4, 6, 3), g.pick(1, 2)
    x, name = g.tokens(x), g.fresh()
    n, t, size = g.shape(x)
    rows = {"LSTM": 4, "GRU": 3, "RNN": 1}[op] * hidden
    weights = [g.random(directions, rows, size, name=f"{name}.w", scale=size**-0.5)]
    weights.append(g.random(directions, rows, hidden, name=f"{name}.r", scale=hidden**-0.5))
    if g.chance():
        weights.append(g.random(directions, 2 * rows, name=f"{name}.b", scale=0.3))
    flags: dict[str, object] = {"direction": "bidirectional"} if directions == 2 else {}
    flags |= {"linear_before_reset": g.choose(2)} if op == "GRU" else {}
    states, last = g.node(op, g.transpose(x, (1, 0, 2)), *weights, outputs=2, hidden_size=hidden, **flags)
    if g.chance(3):
        y = g.to(g.node("Transpose", last, perm=[1, 0, 2]), 2)
        return g.reshape(y, (n, directions * hidden), 1)
    if directions == 1 and g.chance():
        return g.to(g.node("Transpose", g.node("Squeeze", states, axes=[1]), perm=[1, 0, 2]), 2)
    y = g.to(g.node("Transpose", states, perm=[2, 0, 1, 3]), 3)
    return g.reshape(y, (n, t, directions * hidden), 2)


def einsum(g: Net, x: str) -> str:
    """A product, a layer or attention to itself, written as Einsum."""
    if not g.has("Einsum"):
        return layer(g, x)
    x, name, columns = g.tokens(x), g.fresh(), g.pick(*CHANNELS)
    size, kind = g.channels(x), g.pick("right", "left", "itself", "same")
    if kind == "same":
        return g.to(g.node("Einsum", x, equation="bij->bij"), 2)
    if kind == "itself":
        scores = g.node("Softmax", g.to(g.node("Einsum", x, x, equation="bij,bkj->bik"), 2), axis=2)
        return g.to(g.node("Einsum", scores, x, equation="bik,bkj->bij"), 2)
    shape = (size, columns) if kind == "right" else (columns, size)
    weight = g.random(*shape, name=f"{name}.w", scale=size**-0.5)
    if kind == "right":
        return g.to(g.node("Einsum", x, weight, equation="bij,jk->bik"), 2)
    return g.to(g.node("Einsum", weight, x, equation="kj,bij->bki"), 1)


def quantised(g: Net, x: str) -> str:
    """Numbers that are rounded to eight bits and back, or a convolution whose weight is stored so."""
    if g.opset < 13:
        return layer(g, x)
    if g.chance():
        scale, zero = g.constant(np.float32(1 / 32)), g.constant(np.array(128, np.uint8))
        axis = g.axis[x]
        return g.to(g.node("DequantizeLinear", g.node("QuantizeLinear", x, scale, zero), scale, zero), axis)
    x, channels = g.front(x), g.pick(*CHANNELS)
    shape = (channels, g.channels(x), *[1] * (len(g.shape(x)) - 2))
    stored = g.constant(g.rng.integers(-127, 128, shape).astype(np.int8))
    scales = 0.01 * (0.5 + g.rng.random(channels)).astype(np.float32)
    weight = g.node("DequantizeLinear", stored, g.constant(scales), axis=0)
    return g.to(g.node("Conv", x, weight, vector_of(g, channels, 0)), 1)


def indexed(g: Net, x: str) -> str:
    """Pick or blank elements one by one, mostly along positions."""
    shape, where = g.shape(x), g.axis[x]
    others = [a for a in range(1, len(shape)) if a != where]
    axis = g.pick(*others) if others and not g.chance(4) else where
    kind = g.pick("GatherElements", "Compress", "Trilu", "ReverseSequence", "MeanVarianceNormalization")
    if not g.has(kind) or (g.dynamic and kind in ("GatherElements", "ReverseSequence")):
        return x
    if kind == "GatherElements":
        return g.to(g.node(kind, x, g.constant(g.rng.integers(0, shape[axis], shape)), axis=axis), where)
    if kind == "Compress":
        kept = g.rng.random(shape[axis]) < 0.7
        kept[0] = True
        y = g.node(kind, x, g.constant(kept), axis=axis)
        g.types[y].tensor_type.shape.dim[axis].dim_value = int(kept.sum())  # inference leaves it open
        return g.to(y, where)
    if kind == "ReverseSequence":
        lengths = g.constant(np.full(shape[0], shape[1]))
        return g.to(g.node(kind, x, lengths, batch_axis=0, time_axis=1), where)
    if kind == "Trilu":
        return g.to(g.node(kind, x, upper=g.choose(2)), where) if len(shape) > 2 else x
    return g.to(g.node(kind, g.front(x), axes=g.pick([0, 2, 3], [2, 3], [1, 2, 3])), 1) if len(shape) == 4 else x


def fused_attention(g: Net, x: str) -> str:
    """Multi-head attention as the one operator that recent opsets have."""
    if not g.has("Attention"):
        return layer(g, x)
    x = g.tokens(x)
    size = g.channels(x)
    heads = g.divisor(size)
    q, k, v = (layer(g, x, size) for _ in range(3))
    return layer(g, g.to(g.node("Attention", q, k, v, q_num_heads=heads, kv_num_heads=heads), 2), size)


RARE = (recurrent, einsum, quantised, indexed, fused_attention)
