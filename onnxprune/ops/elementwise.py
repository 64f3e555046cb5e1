"""Operators that act on each element alone: aligned axes are tied, a single index broadcasts."""

from __future__ import annotations

from collections.abc import Sequence

from onnxprune.labels import Axis, Layout, Ledger, Refusal
from onnxprune.model import Node
from onnxprune.ops import couples

UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitCast BitwiseNot Cast CastLike Ceil Celu Clip Cos Cosh Elu Erf Exp "
    "Floor Gelu HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu "
    "Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
).split()
BROADCAST = (
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual "
    "Max Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor"
).split()


@couples(*UNARY)
def unary(node: Node, ledger: Ledger) -> None:
    """Every axis passes; further inputs (Clip's bounds) are scalars."""
    ledger.output(node, ledger.input(node, 0))


@couples("Dropout")
def dropout(node: Node, ledger: Ledger) -> None:
    """Every axis passes to both outputs."""
    for index in range(len(node.outputs)):
        ledger.output(node, ledger.input(node, 0), index)


@couples(*BROADCAST)
def broadcast(node: Node, ledger: Ledger) -> None:
    """Axes align from the right; indices that meet live or die together."""
    operands = [ledger.input(node, i) for i in range(len(node.inputs)) if node.has(i)]
    rank = max(len(operand.axes) for operand in operands)
    if node.op == "PRelu" and len(operands[0].axes) < rank:
        raise Refusal("a PRelu slope of higher rank than its input")
    ledger.output(node, aligned(ledger, operands))


def aligned(ledger: Ledger, operands: Sequence[Layout]) -> list[Axis]:
    """Axes of what is computed from operands that broadcast."""
    rank = max(len(operand.axes) for operand in operands)
    axes: list[Axis] = [()] * rank
    for operand in operands:
        offset = rank - len(operand.axes)
        for position, axis in enumerate(operand.axes, offset):
            axes[position] = ledger.unify(axes[position], axis)
    return axes
