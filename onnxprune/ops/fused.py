"""Operators that onnxruntime's optimisers fuse from several: each states what its parts do."""

from __future__ import annotations

import numpy as np

from onnxprune.labels import Axis, Ledger, fixed, is_fixed, unlabelled
from onnxprune.model import Node
from onnxprune.ops import couples, rewrites
from onnxprune.ops.attention import MICROSOFT
from onnxprune.ops.elementwise import broadcast
from onnxprune.ops.linear import convolution_groups, convolve, gemm, multiply
from onnxprune.ops.norm import layer_normalization

# Operators with other names that are what their parts are.
couples("Gelu", "QuickGelu", "FastGelu", "BiasGelu", "BiasAdd", domain=MICROSOFT)(broadcast)
couples("FusedGemm", domain=MICROSOFT)(gemm)
couples("SimplifiedLayerNormalization")(layer_normalization)  # onnxruntime keeps it in the standard's domain
rewrites("FusedConv", "NhwcConv", "NhwcFusedConv", domain=MICROSOFT)(convolution_groups)


@couples("FusedConv", "NhwcConv", "NhwcFusedConv", domain=MICROSOFT)
def fused_conv(node: Node, ledger: Ledger) -> None:
    """Convolution, then the sum with a residual tensor, then an activation; Nhwc: channels stand last."""
    rank = len(ledger.shape(node.inputs[0]))
    convolve(node, ledger, rank - 1 if node.op.startswith("Nhwc") else 1)
    if node.has(3):
        both = zip(ledger.layout(node.outputs[0]).axes, ledger.input(node, 3).axes, strict=True)
        ledger.output(node, [ledger.unify(mine, residual) for mine, residual in both])


@couples("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def fused_matmul(node: Node, ledger: Ledger) -> None:
    """numpy.matmul of operands whose first axis moved behind the batch, or whose last two axes changed places."""
    orders = []
    for name, side in zip(node.inputs, "AB", strict=True):
        order = list(range(len(ledger.shape(name))))
        if node.attributes.get(f"transBatch{side}", 0) and len(order) > 2:
            order.insert(-1, order.pop(0))
        if node.attributes.get(f"trans{side}", 0) and len(order) > 1:
            order[-2:] = order[:-3:-1]
        orders.append(order)
    multiply(node, ledger, orders[0], orders[1])


@couples("BiasSplitGelu", domain=MICROSOFT)
def bias_split_gelu(node: Node, ledger: Ledger) -> None:
    """The left half of the channels is multiplied with the right half's activation: they go together."""
    *leading, channels = ledger.input(node, 0).axes
    channels = ledger.unify(channels, ledger.input(node, 1).axes[0])
    half = ledger.shape(node.outputs[0])[-1]
    left, right = (ledger.take(channels, np.arange(half) + begin) for begin in (0, half))
    ledger.output(node, (*leading, ledger.unify(left, right)))


@couples("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_layer_normalization(node: Node, ledger: Ledger) -> None:
    """All inputs add up; statistics of the sum run over the last axis; outputs 1 and 2 are statistics, 3 is the sum."""
    axes = list(ledger.input(node, 0).axes)
    last = len(axes) - 1
    for index in (i for i in range(1, 5) if node.has(i)):
        operand = ledger.input(node, index).axes
        for place, axis in enumerate(operand, len(axes) - len(operand)):
            axes[place] = ledger.unify(axes[place], axis)
    _statistics(node, ledger, axes, [last])
    whole = ledger.mix(ledger.arrange(axes), [last]).axes
    for index, name in enumerate(node.outputs):
        if name:
            ledger.output(node, (*whole[:-1], ()) if index in (1, 2) else whole, index)


@couples("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_normalization(node: Node, ledger: Ledger) -> None:
    """Rows of tables, picked by computed indices, add up; statistics run over their columns; output 2 is the sum."""
    channels: Axis = ()
    for index in (i for i in (2, 3, 4) if node.has(i)):
        rows, columns = ledger.input(node, index).axes
        ledger.freeze([rows], "it is indexed by computed values", node.inputs[index])
        channels = ledger.unify(channels, columns)
    for index in (5, 6):
        channels = ledger.unify(channels, ledger.input(node, index).axes[0])
    ledger.contract(node, 2, 1, redefined=True, state=True)
    for index, name in enumerate(node.outputs):
        if name:
            shape = ledger.shape(name)
            ledger.output(node, unlabelled(shape) if index == 1 else (*map(fixed, shape[:2]), channels), index)


@couples("GroupNorm", "SkipGroupNorm", domain=MICROSOFT)
def group_norm(node: Node, ledger: Ledger) -> None:
    """Statistics run within each group of channels, after a skip tensor and a bias are added; output 1 is that sum."""
    axes = list(ledger.input(node, 0).axes)
    rank = len(axes)
    place = rank - 1 if node.attributes.get("channels_last", 1) else 1
    for index in (i for i in range(1, 5) if node.has(i)):
        operand = ledger.input(node, index).axes
        where = range(rank) if len(operand) == rank else (0, place)[-len(operand) :]
        for position, axis in zip(where, operand, strict=True):
            axes[position] = ledger.unify(axes[position], axis)
    rows, _ = ledger.grid(axes[place], node.attributes["groups"])
    ledger.freeze([rows], "the number of normalisation groups stays")
    _statistics(node, ledger, axes, range(1, rank))
    whole = ledger.mix(ledger.arrange(axes), range(1, rank))
    for index, name in enumerate(node.outputs):
        if name:
            ledger.output(node, whole, index)


def _statistics(node: Node, ledger: Ledger, axes: list[Axis], over: range | list[int]) -> None:
    """Statistics over these axes are those of the kept channels."""
    for position in over:
        if not is_fixed(axes[position]):
            ledger.contract(node, 0, position, redefined=True)
