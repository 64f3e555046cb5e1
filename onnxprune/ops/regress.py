"""Linear operators as regressions: which inputs every output value is a weighted sum of.

A rule turns a node into a :class:`Regression`: ``target[g, n] = regressors[g, n] @ matrix[g] + bias[g]``, where n counts
output positions and g blocks that share no weights (groups of a convolution). What is fitted to calibration data is that
matrix; the rule says how it is read from and written to the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from onnxprune.model import Node, Shape

Rule = Callable[[Node, Shape], "Regression | None"]
_RULES: dict[str, Rule] = {}


@dataclass(frozen=True, eq=False)
class Regression:
    """One linear operator.

    Attributes
    ----------
    data, weight, bias
        Input indices; ``bias`` is None where the operator takes none.
    blocks
        Number of blocks.
    positions
        ``positions(y.shape)``: rows that an output has, samples (axis 0) slowest.
    regressors
        ``regressors(x, y.shape, picked)``: float32 of shape ``(blocks, len(picked), p)``.
    targets
        ``targets(y, picked)``: float32 of shape ``(blocks, len(picked), q)``; also reads anything shaped like the output.
    matrix, restore
        From a weight to float64 of shape ``(blocks, p, q)`` and back.
    columns
        From the classes on the weight's input axis, ``(size,)`` or ``(blocks, size)``, to those of regressors,
        ``(blocks, p)``.
    channel
        Axis of the output on which the q targets lie.
    input_axis
        Axis of the weight along which inputs lie.
    bias_scale
        What the operator multiplies its bias input by.
    sources
        ``sources(x.shape, y.shape, picked)``: position of the input, samples slowest, that every tap of a row reads,
        int64 ``(len(picked), taps)``; -1 in the padding.
    """

    data: int
    weight: int
    bias: int | None
    blocks: int
    positions: Callable[[Shape], int]
    regressors: Callable[[np.ndarray, Shape, np.ndarray], np.ndarray]
    targets: Callable[[np.ndarray, np.ndarray], np.ndarray]
    matrix: Callable[[np.ndarray], np.ndarray]
    restore: Callable[[np.ndarray], np.ndarray]
    columns: Callable[[np.ndarray], np.ndarray]
    channel: int
    input_axis: int
    bias_scale: float = 1.0
    sources: Callable[[Shape, Shape, np.ndarray], np.ndarray] = lambda x, y, picked: picked[:, None]


def regresses(*ops: str) -> Callable[[Rule], Rule]:
    """Register how operators are fitted. A rule takes a node and its weight's shape; None: this form is not covered."""

    def decorate(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(ops, rule))
        return rule

    return decorate


def regression(node: Node, weight_shape: Callable[[int], Shape | None]) -> Regression | None:
    """View a node as a regression; None where no rule covers it.

    Parameters
    ----------
    weight_shape
        Gives the shape of an input that is a constant of floats, else None.
    """
    rule = _RULES.get(node.op) if node.domain in ("", "ai.onnx") else None
    if rule is None:
        return None
    for index in (1, 0):
        shape = weight_shape(index) if node.has(index) else None
        if shape is not None and (index == 1 or node.op == "MatMul"):
            return rule(node, shape) if index else _left_product(node, shape)
    return None


@regresses("Conv")
def convolution(node: Node, shape: Shape) -> Regression:
    """Every output position sees a patch of its group's inputs; columns run over taps, then channels."""
    groups, kernel = node.attributes.get("group", 1), shape[2:]
    outputs, inputs, taps = shape[0] // groups, shape[1], prod(kernel)

    def sources(x: Shape, y: Shape, picked: np.ndarray) -> np.ndarray:
        strides, dilations, begins = _geometry(node, kernel, x[2:], y[2:], transposed=False)
        return _sources(picked, x, y, kernel, lambda o, k, d: o * strides[d] + k * dilations[d] - begins[d])

    def matrix(w: np.ndarray) -> np.ndarray:
        return w.reshape(groups, outputs, inputs, taps).transpose(0, 3, 2, 1).reshape(groups, -1, outputs)

    def restore(m: np.ndarray) -> np.ndarray:
        return m.reshape(groups, taps, inputs, outputs).transpose(0, 3, 2, 1).reshape(shape)

    return _spatial(node, groups, taps, sources, matrix, restore, input_axis=1)


@regresses("ConvTranspose")
def transposed_convolution(node: Node, shape: Shape) -> Regression:
    """Only the taps of its phase reach an output position: the others' regressors are zero there, so phases part."""
    groups, kernel = node.attributes.get("group", 1), shape[2:]
    inputs, outputs, taps = shape[0] // groups, shape[1], prod(kernel)

    def sources(x: Shape, y: Shape, picked: np.ndarray) -> np.ndarray:
        strides, dilations, begins = _geometry(node, kernel, x[2:], y[2:], transposed=True)

        def source(o: np.ndarray, k: int, d: int) -> np.ndarray:
            reached = o + begins[d] - k * dilations[d]
            return np.where(reached % strides[d] == 0, reached // strides[d], -1)

        return _sources(picked, x, y, kernel, source)

    def matrix(w: np.ndarray) -> np.ndarray:
        return w.reshape(groups, inputs, outputs, taps).transpose(0, 3, 1, 2).reshape(groups, -1, outputs)

    def restore(m: np.ndarray) -> np.ndarray:
        return m.reshape(groups, taps, inputs, outputs).transpose(0, 2, 3, 1).reshape(shape)

    return _spatial(node, groups, taps, sources, matrix, restore, input_axis=0)


@regresses("Gemm")
def gemm(node: Node, shape: Shape) -> Regression | None:
    """Rows of A times B; C is the bias where it is a vector."""
    transposed = bool(node.attributes.get("transB", 0))
    alpha = float(node.attributes.get("alpha", 1.0))
    flip = bool(node.attributes.get("transA", 0))

    def regressors(x: np.ndarray, _: Shape, picked: np.ndarray) -> np.ndarray:
        return _float(alpha * (x.T if flip else x)[picked])[None]

    return Regression(
        data=0, weight=1, bias=2, blocks=1,
        positions=lambda y: y[0],
        regressors=regressors,
        targets=lambda y, picked: _float(y[picked])[None],
        matrix=lambda w: (w.T if transposed else w)[None],
        restore=lambda m: m[0].T if transposed else m[0],
        columns=lambda classes: classes[None],
        channel=1, input_axis=int(transposed), bias_scale=float(node.attributes.get("beta", 1.0)),
    )  # fmt: skip


@regresses("MatMul")
def product(node: Node, shape: Shape) -> Regression | None:
    """All leading axes of the data are rows."""
    if len(shape) != 2:
        return None
    return Regression(
        data=0, weight=1, bias=None, blocks=1,
        positions=lambda y: prod(y[:-1]),
        regressors=lambda x, _, picked: _float(x.reshape(-1, x.shape[-1])[picked])[None],
        targets=lambda y, picked: _float(y.reshape(-1, y.shape[-1])[picked])[None],
        matrix=lambda w: w[None],
        restore=lambda m: m[0],
        columns=lambda classes: classes[None],
        channel=-1, input_axis=0,
    )  # fmt: skip


def _left_product(node: Node, shape: Shape) -> Regression | None:
    """The weight stands on the left: columns of the data are rows of the regression."""
    if len(shape) != 2:
        return None

    def rows(array: np.ndarray, picked: np.ndarray) -> np.ndarray:
        turned = np.moveaxis(array, -2, -1)
        return _float(turned.reshape(-1, turned.shape[-1])[picked])[None]

    return Regression(
        data=1, weight=0, bias=None, blocks=1,
        positions=lambda y: prod(y[:-2]) * y[-1],
        regressors=lambda x, _, picked: rows(x, picked),
        targets=rows,
        matrix=lambda w: w.T[None],
        restore=lambda m: m[0].T,
        columns=lambda classes: classes[None],
        channel=-2, input_axis=1,
    )  # fmt: skip


# -- patches -----------------------------------------------------------------------------------------------------------


def _spatial(
    node: Node,
    groups: int,
    taps: int,
    sources: Callable[[Shape, Shape, np.ndarray], np.ndarray],
    matrix: Callable[[np.ndarray], np.ndarray],
    restore: Callable[[np.ndarray], np.ndarray],
    input_axis: int,
) -> Regression:
    """Build the regression of a convolution; ``sources`` finds the input position of every tap, -1 outside."""

    def regressors(x: np.ndarray, y: Shape, picked: np.ndarray) -> np.ndarray:
        inner = x.shape[1] // groups
        found = _take(x, sources(x.shape, y, picked))  # (n, taps, channels)
        parts = found.reshape(len(picked), taps, groups, inner).transpose(2, 0, 1, 3)
        return parts.reshape(groups, len(picked), taps * inner)

    def targets(y: np.ndarray, picked: np.ndarray) -> np.ndarray:
        area = prod(y.shape[2:])
        values = y.reshape(*y.shape[:2], area)[picked // area, :, picked % area]
        return np.moveaxis(_float(values).reshape(len(picked), groups, -1), 1, 0)

    def columns(classes: np.ndarray) -> np.ndarray:
        rows = classes.reshape(groups, -1) if input_axis == 0 or classes.ndim > 1 else classes[None].repeat(groups, 0)
        return np.tile(rows, (1, taps))

    return Regression(
        data=0, weight=1, bias=2, blocks=groups,
        positions=lambda y: y[0] * prod(y[2:]),
        regressors=regressors, targets=targets, matrix=matrix, restore=restore, columns=columns,
        channel=1, input_axis=input_axis, sources=sources,
    )  # fmt: skip


def _geometry(
    node: Node, kernel: Sequence[int], x: Shape, y: Shape, *, transposed: bool
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Strides, dilations and padding before the first index (ONNX operators Conv-11 and ConvTranspose-11)."""
    rank = len(kernel)
    strides = node.attributes.get("strides", [1] * rank)
    dilations = node.attributes.get("dilations", [1] * rank)
    pads = node.attributes.get("pads", [0] * 2 * rank)
    auto = node.attributes.get("auto_pad", "NOTSET")
    auto = auto.decode() if isinstance(auto, bytes) else auto
    if auto.startswith("SAME") or (transposed and "output_shape" in node.attributes):
        extra = node.attributes.get("output_padding", [0] * rank)
        pads = []
        for d in range(rank):
            long, short = (x[d], y[d]) if not transposed else (y[d], x[d])
            reach = strides[d] * (short - 1) + (kernel[d] - 1) * dilations[d] + 1
            total = max(0, reach - long + (extra[d] if transposed else 0))
            pads.append(total // 2 if auto == "SAME_UPPER" else total - total // 2)
    elif auto == "VALID":
        pads = [0] * 2 * rank
    return strides, dilations, pads[:rank]


def _sources(
    picked: np.ndarray, x: Shape, y: Shape, kernel: Sequence[int], source: Callable[[np.ndarray, int, int], np.ndarray]
) -> np.ndarray:
    """Flat input position, over samples and pixels, that every tap of every picked output reads; -1 outside."""
    sample, *places = np.unravel_index(picked, (y[0], *y[2:]))
    flat = sample[:, None]
    inside = np.ones((len(picked), 1), bool)
    for d, size in enumerate(kernel):
        index = np.stack([source(places[d], k, d) for k in range(size)], 1)
        valid = (index >= 0) & (index < x[2 + d])
        flat = (flat[:, :, None] * x[2 + d] + np.clip(index, 0, x[2 + d] - 1)[:, None]).reshape(len(picked), -1)
        inside = (inside[:, :, None] & valid[:, None]).reshape(len(picked), -1)
    return np.where(inside, flat, -1)


def _take(x: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Channels at flat positions, float32 of shape ``(*source.shape, channels)``; zero at -1."""
    n, c = x.shape[:2]
    pixels = np.zeros((n * prod(x.shape[2:]) + 1, c), np.float32)
    pixels[:-1] = np.moveaxis(x.reshape(n, c, -1), 1, 2).reshape(-1, c)
    return pixels[source]  # -1 is the last row, which is zero


def _float(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32)
