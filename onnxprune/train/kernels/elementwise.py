"""Operators that work on each element alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import onnx
import torch
from torch import Tensor
from torch.nn import functional

from onnxprune.errors import ModelError
from onnxprune.train.kernels import Call, computes

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": functional.hardswish,
    "Identity": lambda x: x,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": functional.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": functional.softplus,
    "Softsign": functional.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}
for _name, _function in _UNARY.items():
    computes(_name)(lambda call, x, function=_function: function(x))


_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}
for _name, _both in _BINARY.items():
    computes(_name)(lambda call, a, b, function=_both: function(a, aligned(call, a, b)))


def aligned(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Up to opset 6 the attribute ``axis`` says where the second operand's axes begin among the first's."""
    if call.opset > 6 or "axis" not in call.attributes:
        return b
    return b.reshape(*b.shape, *[1] * (a.ndim - call.get("axis") % a.ndim - b.ndim))


@computes("Div")
def div(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Integers divide to integers, towards zero."""
    b = aligned(call, a, b)
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@computes("Mod")
def mod(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """With ``fmod`` the sign is the dividend's, else the divisor's."""
    return torch.fmod(a, b) if call.get("fmod", 0) else torch.remainder(a, b)


@computes("Pow")
def power(call: Call, x: Tensor, exponent: Tensor) -> Tensor:
    """The result has the base's type."""
    return torch.pow(x, aligned(call, x, exponent)).to(x.dtype)


@computes("Max", "Min", "Sum", "Mean")
def several(call: Call, *inputs: Tensor) -> Tensor:
    """Any number of operands, broadcast to one another."""
    if call.op in ("Max", "Min"):
        return reduce(torch.maximum if call.op == "Max" else torch.minimum, inputs)
    total = reduce(torch.add, inputs)
    return total if call.op == "Sum" else total / len(inputs)


@computes("Clip")
def clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Bounds are attributes up to opset 10, inputs later."""
    low = call.get("min") if low is None else low
    high = call.get("max") if high is None else high
    if low is None and high is None:
        return x
    return torch.clamp(x, *(bound if bound is None else torch.as_tensor(bound).to(x) for bound in (low, high)))


@computes("IsInf")
def is_infinite(call: Call, x: Tensor) -> Tensor:
    """Attributes say which sign counts."""
    plus, minus = torch.isposinf(x), torch.isneginf(x)
    counted = [x for x, name in ((plus, "detect_positive"), (minus, "detect_negative")) if call.get(name, 1)]
    return reduce(torch.logical_or, counted, torch.zeros_like(x, dtype=torch.bool))


@computes("BitShift")
def bit_shift(call: Call, x: Tensor, by: Tensor) -> Tensor:
    """``direction`` is LEFT or RIGHT."""
    shift = torch.bitwise_left_shift if call.get("direction") == "LEFT" else torch.bitwise_right_shift
    return shift(x, by)


@computes("Where")
def where(call: Call, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Take ``a`` where the condition holds, else ``b``."""
    return torch.where(condition, a, b)


@computes("Dropout")
def dropout(call: Call, x: Tensor, *rest: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """An exported network is in inference mode: nothing is dropped."""
    return (x, torch.ones_like(x, dtype=torch.bool)) if len(call.outputs) > 1 else x


TYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float32,
    onnx.TensorProto.BFLOAT16: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.UINT16: torch.uint16,
    onnx.TensorProto.UINT32: torch.uint32,
    onnx.TensorProto.UINT64: torch.uint64,
    onnx.TensorProto.BOOL: torch.bool,
}
"""Type in which values of an ONNX type are computed: half precision in float32, which training needs."""


@computes("Cast")
def cast(call: Call, x: Tensor) -> Tensor:
    """Floats become integers by truncation."""
    if call.get("to") not in TYPES:
        raise ModelError(f"{call.title}: a cast to {onnx.TensorProto.DataType.Name(call.get('to'))}")
    return x.to(TYPES[call.get("to")])


@computes("CastLike")
def cast_like(call: Call, x: Tensor, like: Tensor) -> Tensor:
    """The second input gives the type."""
    return x.to(like.dtype)
