"""Element-wise operators tie aligned channels; a single index broadcasts; anything else they meet freezes."""

from functools import partial

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

import oracle
from graphs import Tiny, perceptron, sandwich
from oracle import Case

PASSES = {"a.w/0": range(6), "a.b/0": range(6), "z.w/1": range(6)}
FIXED = "axis that cannot shrink"
OPSETS = {"Gelu": 20, "BitwiseNot": 18, "BitwiseAnd": 18, "BitwiseOr": 18, "BitwiseXor": 18, "Mish": 18, "Swish": 24}
UNIT = ["Acos", "Asin", "Atanh"]
BOOLEAN = ["Not", "And", "Or", "Xor"]
INTEGER = ["BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor"]
UNARY = [
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "CastLike", "Ceil", "Celu", "Clip",
        "Cos",
    "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu",
    "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh",
    "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
]  # fmt: skip
BINARY = [
    "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "PRelu", "Sub", "Sum", "Where", "Xor",
]  # fmt: skip


def positive(t: Tiny, y: str) -> str:
    """Map values into the open unit interval, away from its ends."""
    return t.node("Add", t.node("Mul", t.node("Sigmoid", y), t.constant(0.8)), t.constant(0.1))


def prepare(t: Tiny, op: str, y: str) -> str:
    """Bring a tensor into the domain of an operator."""
    y = positive(t, y)
    if op == "Acosh":
        return t.node("Add", y, t.constant(1.0))
    if op in BOOLEAN:
        return t.node("Greater", y, t.constant(0.5))
    if op in INTEGER:
        kind = TensorProto.UINT8 if op == "BitShift" else TensorProto.INT32
        return t.node("Cast", t.node("Mul", y, t.constant(7.0)), to=kind)
    return y if op in UNIT else t.node("Mul", t.node("Sub", y, t.constant(0.4 * (op not in SIGNED))), t.constant(2.0))


SIGNED = ["Log", "Sqrt", "Reciprocal", "Div", "Pow", "Mod"]


def unary(op: str) -> ModelProto:
    """Apply a unary operator between two convolutions."""
    extra = {"Cast": {"to": TensorProto.DOUBLE}, "BitShift": {"direction": "LEFT"}}.get(op, {})

    def middle(t: Tiny, y: str) -> str:
        operands = [t.constant(-0.5), t.constant(0.7)] if op == "Clip" else []
        operands += [t.constant(1.0)] if op == "CastLike" else []
        return t.node("Cast", t.node(op, prepare(t, op, y), *operands, name="op", **extra), to=TensorProto.FLOAT)

    return sandwich(middle, opset=OPSETS.get(op, 17))


def binary(op: str) -> ModelProto:
    """Combine two convolutions' outputs."""
    extra = {"Mod": {"fmod": 1}, "BitShift": {"direction": "LEFT"}}.get(op, {})
    t = Tiny(opset=OPSETS.get(op, 17))
    x = t.input(1, 2, 4, 6)
    y, other = (t.conv(x, name, 2, 6) for name in "ab")
    operands = [prepare(t, op, y), prepare(t, op, other)]
    if op == "PRelu":
        operands[1] = t.node("GlobalAveragePool", operands[1])
    if op == "Where":
        operands.insert(0, t.node("Greater", y, t.constant(0.0)))
    if op in ("Max", "Mean", "Min", "Sum"):
        operands.append(t.node("Neg", y))
    result = t.node("Cast", t.node(op, *operands, name="op", **extra), to=TensorProto.FLOAT)
    return t.build(t.conv(result, "z", 6, 3))


def constant(*shape: int) -> ModelProto:
    """Add a constant of some shape to a convolution's output."""
    return sandwich(lambda t, y: t.node("Add", y, t.random(*shape, name="c"), name="op"))


def attention_gate() -> ModelProto:
    """Multiply by one number per channel that comes from the pooled channels (squeeze and excite)."""

    def middle(t: Tiny, y: str) -> str:
        gate = t.conv(t.node("GlobalAveragePool", y), "r", 6, 4)
        gate = t.conv(t.node("LeakyRelu", gate), "e", 4, 6)
        return t.node("Mul", y, t.node("HardSigmoid", gate), name="op")

    return sandwich(middle)


def spatial_gate() -> ModelProto:
    """Multiply by a single-channel map."""
    return sandwich(lambda t, y: t.node("Mul", y, t.node("Sigmoid", t.conv(y, "g", 6, 1)), name="op"))


def residual() -> ModelProto:
    """Add three branches to one stream."""

    def middle(t: Tiny, y: str) -> str:
        for name in "bc":
            y = t.node("Add", y, t.conv(t.node("LeakyRelu", y), name, 6, 6), name=f"add{name}")
        return y

    return sandwich(middle)


def meets_input() -> ModelProto:
    """Add the graph's input to channels."""
    t = Tiny()
    x = t.input(1, 6, 4, 6)
    return t.build(t.conv(t.node("Add", t.conv(x, "a", 6, 6), x, name="op"), "z", 6, 3))


def across_axes() -> ModelProto:
    """Align channels with a spatial axis by broadcasting from the right."""

    def middle(t: Tiny, y: str) -> str:
        vector = t.node("Squeeze", t.node("GlobalAveragePool", y), t.constant([0, 2, 3]))
        return t.node("Add", y, vector, name="op")

    return sandwich(middle, size=(4, 6))


def flattened_meets_vector() -> ModelProto:
    """Add a vector to flattened feature maps: its entries of one channel live or die together."""
    t = Tiny()
    y = t.node("Flatten", t.conv(t.input(1, 2, 1, 3), "a", 2, 4))
    return t.build(t.gemm(t.node("Add", y, t.random(12, name="c"), name="op"), "z", 12, 3))


def dropout(outputs: int) -> ModelProto:
    """Leave Dropout in an inference graph, with or without its mask."""

    def middle(t: Tiny, y: str) -> str:
        if outputs == 1:
            return t.node("Dropout", y, name="op")
        kept, mask = t.node("Dropout", y, name="op", outputs=2)
        return t.node("Mul", kept, t.node("Cast", mask, to=TensorProto.FLOAT))

    return sandwich(middle)


BOTH = {"a.w/0": range(6), "a.b/0": range(6), "b.w/0": range(6), "b.b/0": range(6), "z.w/1": range(6)}
CASES = [
    *(Case(op, "unary", partial(unary, op), PASSES, (6,)) for op in UNARY),
    *(Case(op, "two-branches", partial(binary, op), BOTH, (6,)) for op in BINARY),
    Case("Add", "scalar", partial(constant), PASSES, (6,)),
    Case("Add", "one-value", partial(constant, 1, 1, 1), PASSES, (6,)),
    Case("Add", "channel-vector", partial(constant, 6, 1, 1), PASSES | {"c/0": range(6)}, (6,)),
    Case("Add", "channel-vector-rank4", partial(constant, 1, 6, 1, 1), PASSES | {"c/1": range(6)}, (6,)),
    Case("Add", "spatial-vector", partial(constant, 6), PASSES, (6,), {"c/0": ("op", "Add", FIXED)}),
    Case("Add", "spatial-map", partial(constant, 4, 6), PASSES, (6,), {"c/1": ("op", "Add", FIXED)}),
    Case("Add", "full-map", partial(constant, 6, 4, 6), PASSES | {"c/0": range(6)}, (6,)),
    Case(
        "Mul", "attention-gate", attention_gate,
        PASSES | {"r.w/1": range(6), "r.w/0": range(6, 10), "r.b/0": range(6, 10), "e.w/1": range(6, 10),
                  "e.w/0": range(6), "e.b/0": range(6)}, (4, 6),
    ),
    Case("Mul", "spatial-gate", spatial_gate, PASSES | {"g.w/1": range(6)}, (6,)),
    Case(
        "Add", "residual", residual,
        PASSES | {f"{name}.{part}": range(6) for name in "bc" for part in ("w/0", "w/1", "b/0")}, (6,),
    ),
    Case("Add", "meets-input", meets_input, frozen={"a.w/0": ("op", "Add", FIXED), "z.w/1": ("z", "Conv", FIXED)}),
    Case("Add", "channels-meet-columns", across_axes, frozen={"a.w/0": ("op", "Add", FIXED)}),
    Case(
        "Add", "flattened-meets-vector", flattened_meets_vector,
        {name: [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3] for name in ("c/0", "z.w/0")} | {"a.w/0": range(4), "a.b/0": range(4)},
        (4,),
    ),
    Case("Dropout", "one-output", partial(dropout, 1), PASSES, (6,)),
    Case("Dropout", "mask", partial(dropout, 2), PASSES, (6,)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_channels_that_meet_are_tied_index_by_index(case):
    """Operands that align share one set of channels, from every weight that starts them to every weight that ends them."""
    oracle.assert_coupling(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pruned_equals_masked(case):
    """Removed channels vanish even where the operator maps zero to something else."""
    oracle.assert_case_prunes(case, thorough=case.name not in ("unary", "two-branches"))


def test_slope_of_higher_rank_freezes():
    """A PRelu whose slope would broadcast its input is outside the specification: the rule says so and freezes."""
    t = Tiny()
    y = t.node("Squeeze", t.gemm(t.input(1, 2), "a", 2, 6), t.constant([0]))
    y = t.node("PRelu", y, t.random(2, 6, name="slope"), name="op")
    model = t.build(t.linear(y, "z", 6, 3))
    coupling = oracle.couple_proto(model)
    reasons = {coupling.reasons[coupling.reason[c]].text for c in oracle.constant_axes(coupling)["a.w/1"]}
    assert reasons == {"a PRelu slope of higher rank than its input"}


@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_channels_of_two_axes_of_one_tensor_are_tied(op):
    """A matrix of channels by channels, added to its own transpose, ties its rows to its columns."""
    t = Tiny()
    y = t.linear(t.input(5, 4), "a", 4, 6)
    other = t.linear(t.input(5, 4, name="x2"), "b", 4, 6)
    product = t.node("MatMul", t.node("Transpose", y), other, name="product")
    total = t.node(op, product, t.node("Transpose", product), name="op")
    model = t.build(t.node("ReduceSum", t.linear(total, "z", 6, 3), t.constant([0]), name="sum"))
    axes = oracle.constant_axes(oracle.couple_proto(model))
    assert axes["a.w/1"].tolist() == axes["b.w/1"].tolist() == axes["z.w/0"].tolist()
    assert len(set(axes["a.w/1"].tolist())) == 6


def test_perceptron_activation_passes():
    """The same rule holds for matrices: rows are samples, columns channels."""
    model = perceptron(lambda t, y: t.node("Tanh", y))
    coupling = oracle.couple_proto(model)
    oracle.assert_prunes(model, coupling, oracle.one_left(coupling, np.random.default_rng(0)))
