"""Operators on single elements: value as onnxruntime computes it, slope as differences say."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from agreement import Case, agrees, integers, normal, positive, slopes

X, Y, P = normal(3, 4, 5), normal(4, 5) + 0.1, positive(3, 4, 5)
BYTES = integers(5, 9, dtype=np.uint8)
BOOL = normal(3, 4) > 0
ODD = np.array([1.0, -np.inf, np.inf, np.nan], np.float32)

UNARY = (
    "Abs Atan Asinh Cos Cosh Elu Erf Exp HardSigmoid HardSwish Identity LeakyRelu Mish Neg Relu Selu Sigmoid Sin Sinh "
)
UNARY += "Softplus Softsign Tan Tanh Celu"
STEPS = "Ceil Floor Round Sign"
CASES = {
    **{op: Case(op, [X]) for op in UNARY.split()},
    **{op: Case(op, [3 * X], smooth=False) for op in STEPS.split()},
    **{op: Case(op, [P / 2]) for op in ("Acos", "Asin", "Atanh", "Log", "Reciprocal", "Sqrt")},
    "Acosh": Case("Acosh", [P + 1]),
    **{op: Case(op, [X, Y]) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean")},
    **{
        op: Case(op, [X, Y], smooth=False) for op in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal")
    },
    **{op: Case(op, [BOOL, BOOL[0]], smooth=False) for op in ("And", "Or", "Xor")},
    **{op: Case(op, [BYTES, BYTES[::-1]], smooth=False) for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")},
    "BitwiseNot": Case("BitwiseNot", [integers(5, -9, 12)], smooth=False),
    "BitShift_left": Case("BitShift", [BYTES, BYTES // 4], {"direction": "LEFT"}, smooth=False),
    "BitShift_right": Case("BitShift", [BYTES, BYTES // 4], {"direction": "RIGHT"}, smooth=False),
    "Not": Case("Not", [BOOL], smooth=False),
    "Max_three": Case("Max", [X, Y, normal(3, 1, 5)]),
    "Sum_one": Case("Sum", [X]),
    "Sum_opset7": Case("Sum", [X, Y], opset=8),
    "Div_integers": Case("Div", [integers(-7, 7, 5), integers(2, -2, 3)], smooth=False),
    "Mod_integers": Case("Mod", [integers(-7, 7, 5), integers(3, -3, 3)], smooth=False),
    "Mod_fmod": Case("Mod", [X, Y], {"fmod": 1}, smooth=False),
    "Pow": Case("Pow", [P, Y]),
    "Pow_square": Case("Pow", [X, np.array(2.0, np.float32)], smooth=False),
    "Pow_integer_exponent": Case("Pow", [X, np.array(3, np.int64)]),
    "LeakyRelu_slope": Case("LeakyRelu", [X], {"alpha": 0.3}),
    "PRelu": Case("PRelu", [X, normal(4, 1)]),
    "Clip_none": Case("Clip", [X]),
    "Clip_both": Case("Clip", [X, np.array(-0.5, np.float32), np.array(0.7, np.float32)], smooth=False),
    "Clip_upper": Case("Clip", [X, None, np.array(0.7, np.float32)], smooth=False),
    "Clip_opset6": Case("Clip", [X], {"min": -0.5, "max": 0.7}, opset=10),
    "Clip_integers": Case("Clip", [integers(-7, 7, 5), np.array(0), np.array(6)], opset=13, smooth=False),
    "HardSigmoid_numbers": Case("HardSigmoid", [X], {"alpha": 0.4, "beta": 0.6}),
    "Elu_alpha": Case("Elu", [X], {"alpha": 0.3}),
    "Selu_numbers": Case("Selu", [X], {"alpha": 1.2, "gamma": 0.7}),
    "Celu_alpha": Case("Celu", [X], {"alpha": 0.3}),
    "ThresholdedRelu": Case("ThresholdedRelu", [X], {"alpha": 0.4}),
    "Shrink": Case("Shrink", [X], {"lambd": 0.4, "bias": 0.2}),
    "Swish": Case("Swish", [X], {"alpha": 1.5}, opset=24, reference=True),
    "Gelu": Case("Gelu", [X]),
    "Gelu_tanh": Case("Gelu", [X], {"approximate": "tanh"}),
    "IsNaN": Case("IsNaN", [ODD], smooth=False),
    "IsInf": Case("IsInf", [ODD], smooth=False),
    "IsInf_positive": Case("IsInf", [ODD], {"detect_negative": 0}, smooth=False),
    "IsInf_never": Case("IsInf", [ODD], {"detect_negative": 0, "detect_positive": 0}, smooth=False),
    "Where": Case("Where", [BOOL, normal(3, 4), normal(3, 1)]),
    "Dropout": Case("Dropout", [X], outputs=2),
    "Cast_integer": Case("Cast", [3 * X], {"to": 7}, smooth=False),
    "Cast_bool": Case("Cast", [integers(0, 2, -1)], {"to": 9}, smooth=False),
    "Cast_float": Case("Cast", [integers(0, 2, -1)], {"to": 1}, smooth=False),
    "CastLike": Case("CastLike", [integers(0, 2, -1), np.zeros(1, np.float32)], smooth=False),
}  # fmt: skip
SMOOTH = {name: case for name, case in CASES.items() if case.smooth}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_agrees(case: Case) -> None:
    """What PyTorch computes is what onnxruntime does, whether operands are constants or parameters."""
    agrees(case)


@pytest.mark.parametrize("case", SMOOTH.values(), ids=SMOOTH)
def test_slope_agrees(case: Case) -> None:
    """Gradients are what differences say."""
    slopes(case)
