"""Convolutions and matrix products: they end the input's channels and start new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from onnxprune.labels import Axis, Channels, Ledger, Refusal, fixed, is_fixed, length
from onnxprune.model import Node
from onnxprune.ops import Change, Edit, channels_only, couples, rewrites


@dataclass(frozen=True, slots=True)
class Operands:
    """Which inputs of a product are its factors and its bias, and which hold their zero points (None: zero is zero)."""

    a: int = 0
    b: int = 1
    bias: int = 2
    zero_a: int | None = None
    zero_b: int | None = None

    def contract(self, node: Node, ledger: Ledger, axis_a: int, axis_b: int) -> None:
        """Along these axes the product sums."""
        for index, axis, zero in ((self.a, axis_a, self.zero_a), (self.b, axis_b, self.zero_b)):
            ledger.contract(node, index, axis, zero=zero if zero is not None and node.has(zero) else None)


PLAIN = Operands()

CONVOLUTIONS = frozenset(("Conv", "ConvTranspose", "FusedConv", "QLinearConv", "ConvInteger"))
"""Operators whose output has its channels on axis 1, unless they say that channels stand last."""

PRODUCTS = frozenset(
    (
        "Gemm", "MatMul", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
        "MatMulNBits",
    )
)  # fmt: skip


@couples("Conv")
def conv(node: Node, ledger: Ledger) -> None:
    """Input channels end in the weight's axis 1, output channels start on its axis 0; depthwise channels pass."""
    convolve(node, ledger, 1)


def convolve(node: Node, ledger: Ledger, channel: int, operands: Operands = PLAIN) -> None:
    """Convolve a tensor whose axis ``channel`` holds the channels."""
    place = operands.b
    x, w = ledger.input(node, operands.a), ledger.input(node, place, axes=(0,))
    groups = node.attributes.get("group", 1)
    shape, kernel = ledger.shape(node.outputs[0]), ledger.shape(node.inputs[place])
    if groups < 1 or kernel[0] % groups or length(x.axes[channel]) != groups * kernel[1]:
        raise Refusal(f"a weight of {list(kernel)} in {groups} groups does not fit {length(x.axes[channel])} channels")
    pixels = [axis for axis in range(1, len(shape)) if axis != channel]
    channels_only(node, ledger, (*(x.axes[p] for p in pixels), *w.axes[2:]), "a convolution slides over it")
    out = w.axes[0]
    if groups == 1:
        inner = ledger.input(node, place, axes=(1,)).axes[1]
        ledger.unify(x.axes[channel], inner)
        made = None
    else:
        rows_in, columns_in = ledger.grid(x.axes[channel], groups)
        rows_out, made = ledger.grid(out, groups)
        if ledger.decisions is not None and columns_in and is_fixed(rows_in) and not is_fixed(rows_out):
            ledger.freeze([rows_out], "another factor of the same axis shrinks instead")  # one output per group
            rows_out = fixed(groups)
        ledger.unify(rows_in, rows_out)
        inner = ledger.per_row(node, place, 1, rows_out)
        ledger.unify(columns_in, inner)
        if not columns_in:  # depthwise: a channel's whole depth multiplier goes with it
            ledger.freeze([made], "the depth multiplier is one number for all channels")
    if groups == 1 or kernel[1] > 1:
        operands.contract(node, ledger, channel, 1)
    out = _bias(node, ledger, out, operands.bias)
    factor = shape[0] * prod(shape[p] for p in pixels) * prod(kernel[2:])
    channels = Channels("Conv", x.axes[channel], out, inner, made)
    ledger.work(node, (out, inner), factor, weight=place, channels=channels)
    axes = [fixed(size) for size in shape]
    axes[0], axes[channel] = x.axes[0], out
    ledger.output(node, axes)


@couples("ConvTranspose")
def conv_transpose(node: Node, ledger: Ledger) -> None:
    """Input channels end in the weight's axis 0; output channels start on its axis 1, once per group."""
    x, w = ledger.input(node, 0), ledger.input(node, 1, axes=(0,))
    groups = node.attributes.get("group", 1)
    source, shape, kernel = ledger.shape(node.inputs[0]), ledger.shape(node.outputs[0]), ledger.shape(node.inputs[1])
    if groups < 1 or kernel[0] != source[1] or kernel[0] % groups:
        raise Refusal(f"a weight of {list(kernel)} in {groups} groups does not fit {source[1]} channels")
    channels_only(node, ledger, (*x.axes[2:], *w.axes[2:]), "a convolution slides over it")
    rows, columns = ledger.grid(ledger.unify(x.axes[1], w.axes[0]), groups)
    out = each = ledger.per_row(node, 1, 1, rows)
    if groups > 1:
        if not columns:
            ledger.freeze([out], "the depth multiplier is one number for all channels")
        out = (*rows, *out)
    if groups == 1 or source[1] > groups:
        ledger.contract(node, 0, 1)
        ledger.contract(node, 1, 0)
    out = _bias(node, ledger, out)
    factor = source[0] * prod(source[2:]) * prod(kernel[2:])
    channels = Channels("ConvTranspose", x.axes[1], out, columns, each if groups > 1 else None)
    ledger.work(node, (w.axes[0], each), factor, weight=1, channels=channels)
    ledger.output(node, (x.axes[0], out, *map(fixed, shape[2:])))


@rewrites("Conv", "ConvTranspose")
def convolution_groups(node: Node, change: Change) -> list[Edit]:
    """A grouped convolution that lost whole groups says so in its attribute."""
    return groups_left(node, change, 1)


def groups_left(node: Node, change: Change, weight: int) -> list[Edit]:
    """Number of groups that a convolution keeps, whose weight is input ``weight``."""
    groups = node.attributes.get("group", 1)
    if groups == 1:
        return []
    x, w = node.inputs[0], node.inputs[weight]
    last = node.op.startswith("Nhwc") or node.attributes.get("channels_last", 0)
    if node.op == "ConvTranspose":
        left = change.after(node.outputs[0])[1] // change.after(w)[1]
    else:
        left = change.after(x)[-1 if last else 1] // change.after(w)[1]
    return [Edit("group", left)] if left != groups else []


@couples("Gemm")
def gemm(node: Node, ledger: Ledger) -> None:
    """The shared dimension ends; rows come from A, columns from B; C broadcasts onto both."""
    multiply_matrices(node, ledger)


def multiply_matrices(node: Node, ledger: Ledger, operands: Operands = PLAIN) -> None:
    """Multiply two matrices, either of which may be transposed, and add a third."""
    a, b = ledger.input(node, operands.a), ledger.input(node, operands.b)
    transposed_a, transposed_b = node.attributes.get("transA", 0), node.attributes.get("transB", 0)
    rows, ended = a.axes[::-1] if transposed_a else a.axes
    inner, columns = b.axes[::-1] if transposed_b else b.axes
    ended = ledger.unify(ended, inner)
    operands.contract(node, ledger, 0 if transposed_a else 1, 1 if transposed_b else 0)
    ledger.work(node, (rows, inner, columns), weight=operands.b, channels=Channels("MatMul", inner, columns, inner))
    if node.has(operands.bias):
        c = ledger.input(node, operands.bias)
        padded: tuple[Axis, ...] = ((), (), *c.axes)[-2:]
        rows, columns = ledger.unify(rows, padded[0]), ledger.unify(columns, padded[1])
    ledger.output(node, (rows, columns))


@couples("MatMul")
def matmul(node: Node, ledger: Ledger) -> None:
    """numpy.matmul: the shared dimension ends, leading dimensions broadcast, either side may be the weight."""
    a, b = (range(len(ledger.shape(name))) for name in node.inputs[:2])
    multiply(node, ledger, a, b)


def multiply(
    node: Node, ledger: Ledger, order_a: Sequence[int], order_b: Sequence[int], operands: Operands = PLAIN
) -> None:
    """Multiply two operands whose axes are first put in these orders."""
    if not order_a or not order_b:
        raise Refusal(f"{node.op} of a scalar")
    a = [ledger.input(node, operands.a).axes[position] for position in order_a]
    b = [ledger.input(node, operands.b).axes[position] for position in order_b]
    inner = max(len(b) - 2, 0)
    inner_b = b[inner]
    ledger.unify(a[-1], inner_b)
    operands.contract(node, ledger, order_a[-1], order_b[inner])
    batch = _broadcast(ledger, a[:-2], b[:-2])
    rows = a[-2:-1]
    columns = b[-1:] if len(b) > 1 else []
    weight = next((i for i in (operands.b, operands.a) if ledger.is_weight(node.inputs[i])), None)
    if weight is None:
        ledger.attend(batch, (*rows, inner_b, *columns))
    channels = Channels("MatMul", inner_b, columns[0] if columns else (), inner_b)
    ledger.work(node, (*batch, *rows, inner_b, *columns), weight=weight, channels=channels)
    ledger.output(node, (*batch, *rows, *columns))


def _bias(node: Node, ledger: Ledger, out: Axis, index: int = 2) -> Axis:
    if not node.has(index):
        return out
    axes = ledger.input(node, index).axes
    if len(axes) != 1:
        raise Refusal(f"a bias of {len(axes)} axes")
    return ledger.unify(out, axes[0])


def _broadcast(ledger: Ledger, a: list[Axis], b: list[Axis]) -> list[Axis]:
    rank = max(len(a), len(b))
    pad = [[()] * (rank - len(side)) + side for side in (a, b)]
    return [ledger.unify(x, y) for x, y in zip(*pad, strict=True)]
