"""Operators that compute on integers: what their namesakes do, with a scale and a zero point beside every operand.

A removed channel counts as one that holds its tensor's zero point, which is what zero is there. Scales and zero points of
outputs are single numbers; those of weights may be one for each output channel, which they go with.
"""

from __future__ import annotations

from functools import partial
from math import prod

from onnxprune.labels import Axis, Channels, Ledger, Refusal, fixed, is_fixed
from onnxprune.model import Node
from onnxprune.ops import Change, Edit, channels_only, couples, rewrites
from onnxprune.ops.attention import MICROSOFT
from onnxprune.ops.elementwise import aligned
from onnxprune.ops.linear import Operands, convolution_groups, convolve, groups_left, multiply, multiply_matrices
from onnxprune.ops.quantize import by_blocks
from onnxprune.ops.regions import join

# -- convolutions and products ----------------------------------------------------------------------------------------


_CONVOLUTIONS = {
    "QLinearConv": (Operands(0, 3, 8, zero_a=2, zero_b=5), (4, 5)),
    "ConvInteger": (Operands(0, 1, 4, zero_a=2, zero_b=3), (3,)),
}
_PRODUCTS = {
    "MatMulInteger": (Operands(0, 1, zero_a=2, zero_b=3), (3,), (2,)),
    "QLinearMatMul": (Operands(0, 3, zero_a=2, zero_b=5), (4, 5), (1, 2)),
    "MatMulIntegerToFloat": (Operands(0, 1, zero_a=4, zero_b=5), (3, 5, 6), (2, 4)),
}
"""By operator its factors, which inputs may hold a number for each output channel, and which one for each row."""


@couples("QLinearConv", "ConvInteger")
@couples("QLinearConv", domain=MICROSOFT)
def integer_convolution(node: Node, ledger: Ledger) -> None:
    """Convolution of integers; onnxruntime's own may have its channels last."""
    operands, vectors = _CONVOLUTIONS[node.op]
    channel = len(ledger.shape(node.inputs[0])) - 1 if node.attributes.get("channels_last", 0) else 1
    convolve(node, ledger, channel, operands)
    _per_output(node, ledger, channel, *vectors)


rewrites("QLinearConv")(partial(groups_left, weight=3))
rewrites("QLinearConv", domain=MICROSOFT)(partial(groups_left, weight=3))
rewrites("ConvInteger")(convolution_groups)


@couples("MatMulInteger", "QLinearMatMul")
@couples("MatMulIntegerToFloat", domain=MICROSOFT)
def integer_product(node: Node, ledger: Ledger) -> None:
    """numpy.matmul of integers."""
    operands, vectors, of_rows = _PRODUCTS[node.op]
    if any(_several(node, ledger, index) for index in of_rows):
        raise Refusal("scales or zero points for each row")
    a, b = (range(len(ledger.shape(node.inputs[index]))) for index in (operands.a, operands.b))
    multiply(node, ledger, a, b, operands)
    _per_output(node, ledger, -1, *vectors)


@couples("DynamicQuantizeMatMul", domain=MICROSOFT)
def dynamic_product(node: Node, ledger: Ledger) -> None:
    """The left operand is quantised on the way, over the range of those of its elements that are kept."""
    rank = len(ledger.shape(node.inputs[0]))
    multiply(node, ledger, range(rank), range(len(ledger.shape(node.inputs[1]))), Operands(zero_b=3))
    x = ledger.input(node, 0)
    for position in (p for p in range(rank) if not is_fixed(x.axes[p])):
        ledger.contract(node, 0, position, redefined=True)
    _per_output(node, ledger, -1, 2, 3, 4)


@couples("QGemm", domain=MICROSOFT)
def qgemm(node: Node, ledger: Ledger) -> None:
    """Gemm of integers, to integers or (without an output's scale) to floats."""
    multiply_matrices(node, ledger, Operands(0, 3, 6, zero_a=2, zero_b=5))
    _per_output(node, ledger, 1, 4, 5)


@couples("MatMulNBits", domain=MICROSOFT)
def matmul_nbits(node: Node, ledger: Ledger) -> None:
    """The weight holds blocks of inputs for every output, packed; a block of inputs goes as a whole.

    Zero points of less than eight bits share bytes, so that the blocks of a byte go together, too.
    """
    if node.has(4):
        raise Refusal("inputs in an order of their own (g_idx)")
    size, bits, shape = node.attributes["block_size"], node.attributes["bits"], ledger.shape(node.inputs[1])
    *rows, channels = ledger.input(node, 0).axes
    out, blocks = ledger.input(node, 1, (0, 1)).axes[:2]
    for index in (i for i in (3, 2) if node.has(i)):
        parameter = ledger.input(node, index).axes
        if len(parameter) != 2:
            raise Refusal("scales or zero points in a single row")
        out = ledger.unify(out, parameter[0])
        packed = ledger.shape(node.inputs[index])[1] < shape[1]
        by_blocks(ledger, blocks, parameter[1], 8 // bits if packed else 1)
    by_blocks(ledger, channels, blocks, size)
    ledger.contract(node, 0, len(rows))
    ledger.contract(node, 1, 1)
    if node.has(5):
        out = ledger.unify(out, ledger.input(node, 5).axes[0])
    ledger.work(
        node,
        (*rows, channels, out),
        weight=1,
        packed=(out, channels),
        channels=Channels("MatMul", channels, out, channels),
    )
    ledger.output(node, (*rows, out))


@rewrites("MatMulNBits", domain=MICROSOFT)
def matmul_nbits_size(node: Node, change: Change) -> list[Edit]:
    """The operator's attributes say how long both axes of its weight are."""
    lengths = {"K": change.after(node.inputs[0])[-1], "N": change.after(node.outputs[0])[-1]}
    return [Edit(name, size) for name, size in lengths.items() if node.attributes[name] != size]


def _several(node: Node, ledger: Ledger, index: int | None) -> bool:
    """Whether an input holds several numbers."""
    return index is not None and node.has(index) and prod(ledger.shape(node.inputs[index])) > 1


def _per_output(node: Node, ledger: Ledger, position: int, *vectors: int) -> None:
    """Scales, zero points and biases of outputs go with them."""
    axes = list(ledger.layout(node.outputs[0]).axes)
    for index in (i for i in vectors if node.has(i)):
        *others, axis = ((), *ledger.input(node, index).axes)
        if any(others):
            raise Refusal("scales or zero points for each matrix of a batch")
        axes[position] = ledger.unify(axes[position], axis)
    ledger.output(node, axes)


# -- element by element, pools, and what joins ------------------------------------------------------------------------


@couples("QLinearSigmoid", "QLinearLeakyRelu", domain=MICROSOFT)
def qlinear_unary(node: Node, ledger: Ledger) -> None:
    """Every axis passes."""
    ledger.output(node, ledger.input(node, 0))


@couples("QLinearAdd", "QLinearMul", domain=MICROSOFT)
def qlinear_binary(node: Node, ledger: Ledger) -> None:
    """Axes align from the right."""
    ledger.output(node, aligned(ledger, [ledger.input(node, index) for index in (0, 3)]))


@couples("QLinearWhere", domain=MICROSOFT)
def qlinear_where(node: Node, ledger: Ledger) -> None:
    """Axes align from the right, those of the condition, too."""
    ledger.output(node, aligned(ledger, [ledger.input(node, index) for index in (0, 1, 4)]))


@couples("QLinearSoftmax", domain=MICROSOFT)
def qlinear_softmax(node: Node, ledger: Ledger) -> None:
    """The mixed axis freezes; before opset 13, which the node states, all from ``axis`` on."""
    x = ledger.input(node, 0)
    axis = node.attributes.get("axis", -1) % len(x.axes)
    mixed = [axis] if node.attributes["opset"] >= 13 else list(range(axis, len(x.axes)))
    ledger.freeze([x.axes[position] for position in mixed], f"{node.op} mixes its indices", node.inputs[0])
    ledger.output(node, ledger.mix(x, mixed))


@couples("QLinearGlobalAveragePool", "QLinearAveragePool", domain=MICROSOFT)
def qlinear_pool(node: Node, ledger: Ledger) -> None:
    """Batch and channels pass, wherever these stand."""
    x, shape = ledger.input(node, 0), ledger.shape(node.outputs[0])
    passing = (0, len(shape) - 1 if node.attributes.get("channels_last", 0) else 1)
    space = [position for position in range(len(shape)) if position not in passing]
    channels_only(node, ledger, tuple(x.axes[position] for position in space), "pooling slides over it")
    axes: list[Axis] = [x.axes[p] if p in passing else fixed(size) for p, size in enumerate(shape)]
    ledger.output(node, axes)


@couples("QLinearConcat", domain=MICROSOFT)
def qlinear_concat(node: Node, ledger: Ledger) -> None:
    """Behind the output's scale and zero point every input stands with its own."""
    join(node, ledger, range(2, len(node.inputs), 3))
