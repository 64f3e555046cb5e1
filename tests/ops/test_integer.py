"""Operators on integers: channels, scales and zero points go together, and what is left computes the same integers."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import pytest
from integers import MICROSOFT, Integers, assert_integers_prune, floats, maps, rows
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxprune
import oracle
from onnxprune.cost import Cost
from onnxprune.ops.quantised import quantised
from oracle import Case

# -- building ----------------------------------------------------------------------------------------------------------


def convolution(per: int | None = 0, dtype: type = np.int8, *, bias: bool = True, domain: str = "") -> ModelProto:
    """Convolve 6 channels to 8."""
    return maps(
        lambda t, y: t.qconv(
            y, "c", (8, 6, 3, 3), per=per, dtype=dtype, bias=bias, domain=domain, pads=[1] * 4, out=2.0
        ),
        6,
        8,
    )


def depthwise(per: int | None) -> ModelProto:
    """Convolve every channel on its own."""
    return maps(lambda t, y: t.qconv(y, "c", (6, 1, 3, 3), per=per, group=6, pads=[1] * 4))


def two_groups(per: int | None = 0) -> ModelProto:
    """Convolve two groups of four channels to six each."""
    return maps(lambda t, y: t.qconv(y, "c", (12, 4, 1, 1), per=per, group=2), 8, 12)


def channels_last() -> ModelProto:
    """Convolve with channels last, as onnxruntime rewrites convolutions."""
    return maps(lambda t, y: t.qconv(y, "c", (8, 6, 1, 1), domain=MICROSOFT, channels_last=1), 6, 8, last=True)


def conv_integer(per: int | None = None, group: int = 1) -> ModelProto:
    """Convolve to 32 bits, and quantise the sums anew."""

    def middle(t: Integers, y: list[str]) -> list[str]:
        weight, _, zero = t.weight(8, 8 // group, 3, 3, name="c.w", dtype=np.uint8, per=per)
        sums = t.node("ConvInteger", y[0], weight, y[2], zero, name="c", group=group, pads=[1] * 4)
        real = t.node("Mul", t.node("Cast", sums, to=TensorProto.FLOAT), t.constant(0.0004))
        return t.enter(real, 0.3, 120, "m")

    return maps(middle, 8, 8)


def product(per: int | None = None) -> ModelProto:
    """Multiply by a matrix of 6 rows and 8 columns."""
    return rows(lambda t, y: t.qmatmul(y, "c", (6, 8), per=per), 6, 8)


def product_from_left() -> ModelProto:
    """Multiply by a matrix from the left: rows start in it, columns pass."""

    def middle(t: Integers, y: list[str]) -> list[str]:
        y[0] = t.node("Transpose", y[0], perm=[1, 0])
        after = t.point(0.05, 120, "c")
        out = t.node("QLinearMatMul", *t.weight(8, 6, name="c.w", dtype=np.uint8), *y, *after, name="c")
        return [t.node("Transpose", out, perm=[1, 0]), *after]

    return rows(middle, 6, 8)


def product_of_two(op: str = "QLinearMatMul") -> ModelProto:
    """Multiply two computed matrices along their channels."""
    t = Integers()
    x = t.enter(t.input(5, 4), 0.02, 128, "x")
    p, q = t.qmatmul(x, "p", (4, 6)), t.qmatmul(x, "q", (4, 6))
    q[0] = t.node("Transpose", q[0], perm=[1, 0])
    if op == "MatMulInteger":
        return t.build(t.node(op, p[0], q[0], p[2], q[2], name="c"))
    return t.build(t.node(op, *p, *q, *t.point(0.3, 120, "c"), name="c"))


def matmul_integer(per: int | None = None, *, dynamic: bool = False) -> ModelProto:
    """Multiply to 32 bits and scale the sums, of a tensor that is quantised on the way (``dynamic``) or by constants."""

    def middle(t: Integers, y: str) -> str:
        weight, scale, zero = t.weight(6, 8, name="c.w", per=per)
        if dynamic:
            q, q_scale, q_zero = t.node("DynamicQuantizeLinear", y, name="q", outputs=3)
        else:
            q, q_scale, q_zero = t.enter(y, 0.02, 20, "q")
        sums = t.node("MatMulInteger", q, weight, q_zero, zero, name="c")
        return t.node("Mul", t.node("Cast", sums, to=TensorProto.FLOAT), t.node("Mul", q_scale, scale))

    return floats(middle, 6, 8)


def to_float(per: int | None = None) -> ModelProto:
    """Multiply integers to floats."""

    def middle(t: Integers, y: str) -> str:
        weight, scale, zero = t.weight(6, 8, name="c.w", per=per)
        q, q_scale, q_zero = t.enter(y, 0.02, 20, "q")
        bias = t.random(8, name="c.b")
        return t.own("MatMulIntegerToFloat", q, weight, q_scale, scale, q_zero, zero, bias, name="c")

    return floats(middle, 6, 8)


def dynamic_product(per: int | None = None) -> ModelProto:
    """Multiply floats that are quantised on the way."""

    def middle(t: Integers, y: str) -> str:
        return t.own(
            "DynamicQuantizeMatMul", y, *t.weight(6, 8, name="c.w", per=per), t.random(8, name="c.b"), name="c"
        )

    return floats(middle, 6, 8)


def qgemm(per: int | None = None, transposed: int = 0, *, integers: bool = True) -> ModelProto:
    """Gemm of integers, to integers or floats."""

    def middle(t: Integers, y: list[str]) -> list[str]:
        shape = (8, 6) if transposed else (6, 8)
        weight = t.weight(*shape, name="c.w", per=per)
        bias = t.constant(t.rng.integers(-2000, 2001, 8).astype(np.int32), "c.b")
        after = t.point(0.3, 120, "c") if integers else []
        out = t.own("QGemm", *y, *weight, bias, *after, name="c", transB=transposed, alpha=1.0)
        return [out, *after] if integers else t.enter(out, 0.3, 120, "m")

    return rows(middle, 6, 8)


def unary(op: str) -> ModelProto:
    """Activate."""

    def middle(t: Integers, y: list[str]) -> list[str]:
        after = t.point(1 / 128, 3, "e")
        return [t.own(op, *y, *after, name="e", **({"alpha": 0.2} if op == "QLinearLeakyRelu" else {})), *after]

    return maps(middle)


def binary(op: str, how: str) -> ModelProto:
    """Combine with a convolution beside it, or with a constant for every channel."""

    def middle(t: Integers, y: list[str]) -> list[str]:
        after = t.point(0.8, 100, "e")
        other = (
            t.qconv(y, "c", (6, 6, 1, 1)) if how == "two" else t.weight(6, 1, 1, name="k", dtype=np.uint8, scale=0.5)
        )
        return [t.own(op, *y, *other, *after, name="e"), *after]

    return maps(middle)


def where() -> ModelProto:
    """Choose between two convolutions by a condition for every pixel."""

    def middle(t: Integers, y: list[str]) -> list[str]:
        chosen = t.constant(t.rng.random((1, 1, 4, 6)) < 0.5, "chosen")
        after = t.point(0.8, 100, "e")
        return [t.own("QLinearWhere", chosen, *y, *t.qconv(y, "c", (6, 6, 1, 1)), *after, name="e"), *after]

    return maps(middle)


def softmax(axis: int, opset: int = 21) -> ModelProto:
    """Softmax over rows or over channels."""

    def middle(t: Integers, y: list[str]) -> list[str]:
        after = t.point(1 / 256, 0, "e")
        return [t.own("QLinearSoftmax", *y, *after, name="e", axis=axis, opset=opset), *after]

    return rows(middle)


def pool(op: str, *, last: bool = False) -> ModelProto:
    """Average over pixels."""

    def middle(t: Integers, y: list[str]) -> list[str]:
        attributes = {"channels_last": int(last)} | ({"kernel_shape": [2, 2]} if op == "QLinearAveragePool" else {})
        after = t.point(0.3, 110, "e")
        return [t.own(op, *y, *after, name="e", **attributes), *after]

    return maps(middle, last=last)


def concat() -> ModelProto:
    """Lay a convolution's channels behind those of another."""

    def middle(t: Integers, y: list[str]) -> list[str]:
        after = t.point(0.8, 100, "e")
        return [t.own("QLinearConcat", *after, *y, *t.qconv(y, "c", (5, 6, 1, 1)), name="e", axis=1), *after]

    return maps(middle, 6, 11)


def nbits(
    bits: int = 4, features: int = 64, *, zero: str = "packed", order: bool = False, bias: bool = False
) -> ModelProto:
    """Multiply by a weight of few bits, in blocks of 16 inputs."""

    def middle(t: Integers, y: str) -> str:
        blocks = -(-features // 16)
        t.constant(t.rng.integers(0, 256, (8, blocks, 2 * bits)).astype(np.uint8), "c.w")
        t.constant(((0.5 + t.rng.random((8, blocks))) / 2**bits).astype(np.float32), "c.s")
        inputs = [y, "c.w", "c.s"]
        if zero == "packed":
            inputs.append(t.constant(t.rng.integers(0, 256, (8, -(-blocks * bits // 8))).astype(np.uint8), "c.z"))
        elif zero == "floats":
            inputs.append(t.constant((2**bits * t.rng.random((8, blocks))).astype(np.float32), "c.z"))
        if order or bias:
            inputs += [""] * (4 - len(inputs))
            inputs.append(t.constant((np.arange(features) // 16).astype(np.int32), "c.g") if order else "")
        if bias:
            inputs.append(t.random(8, name="c.b"))
        return t.own("MatMulNBits", *inputs, name="c", K=features, N=8, bits=bits, block_size=16)

    return floats(middle, features, 8)


def attention(per: int | None = None) -> ModelProto:
    """Attention of two heads of four columns by one weight of integers."""
    t = Integers()
    y = t.node("Add", t.linear(t.input(2, 5, 4), "a", 4, 6), t.random(6, name="a.b"))
    q, q_scale, q_zero = t.enter(y, 0.02, 120, "q")
    weight, scale, zero = t.weight(6, 24, name="c.w", per=per)
    bias = t.random(24, name="c.b")
    y = t.own("QAttention", q, weight, bias, q_scale, scale, "", q_zero, zero, name="c", num_heads=2)
    return t.build(t.linear(y, "z", 8, 3))


def microsofts_own(op: str) -> ModelProto:
    """Quantise and dequantise by onnxruntime's own operators, per channel."""

    def middle(t: Integers, y: str) -> str:
        scale = t.constant((0.02 + 0.01 * t.rng.random(6)).astype(np.float32), "q.s")
        zero = t.constant(t.rng.integers(0, 60, 6).astype(np.uint8), "q.z")
        return t.own(
            "DequantizeLinear", t.own("QuantizeLinear", y, scale, zero, name="q", axis=1), scale, zero, name="d", axis=1
        )

    return floats(middle)


# -- cases -------------------------------------------------------------------------------------------------------------

START = dict.fromkeys(("a.w/0", "a.w.s/0", "a.w.z/0", "a.b/0"), range(6))
OUT = range(6, 14)
ROWS = {"a.w/1": range(6)}


def through(name: str, axis_in: int, axis_out: int, *more: str, end: str) -> dict:
    """What is free around a weight ``name``: inputs 0 to 5, outputs 6 to 13, and vectors that go with outputs."""
    return {f"{name}/{axis_in}": range(6)} | dict.fromkeys((f"{name}/{axis_out}", *more, end), OUT)


def mixed(node: str) -> dict:
    return {"a.w/1": (node, "QLinearSoftmax", "mixes its indices")}


PER = ("c.w.s/0", "c.w.z/0")
BLOCKS = [number for number in range(4) for _ in range(16)]
PAIRS = [number for number in range(2) for _ in range(32)]
EIGHT = range(4, 12)
STACKED = (*range(6, 14), *range(6, 14), *range(14, 22))

CASES = [
    Case("QLinearConv", "per-channel", convolution, START | through("c.w", 1, 0, *PER, "c.b/0", end="z.w/1"), (6, 8)),
    Case("QLinearConv", "per-tensor", partial(convolution, None),
         START | through("c.w", 1, 0, "c.b/0", end="z.w/1"), (6, 8)),
    Case("QLinearConv", "unsigned-per-channel", partial(convolution, 0, np.uint8),
         START | through("c.w", 1, 0, *PER, "c.b/0", end="z.w/1"), (6, 8)),
    Case("QLinearConv", "no-bias", partial(convolution, bias=False),
         START | through("c.w", 1, 0, *PER, end="z.w/1"), (6, 8)),
    Case("QLinearConv", "depthwise", partial(depthwise, 0),
         START | dict.fromkeys(("c.w/0", *PER, "c.b/0", "z.w/1"), range(6)), (6,)),
    Case("QLinearConv", "depthwise-per-tensor", partial(depthwise, None),
         START | dict.fromkeys(("c.w/0", "c.b/0", "z.w/1"), range(6)), (6,)),
    Case("QLinearConv", "two-groups", two_groups,
         dict.fromkeys(("a.w/0", "a.w.s/0", "a.w.z/0", "a.b/0", "c.w/1"), range(8))
         | dict.fromkeys(("c.w/0", *PER, "c.b/0", "z.w/1"), range(8, 20)), (4, 6)),
    Case("QLinearConv", "channels-last", channels_last, START | through("c.w", 1, 0, *PER, "c.b/0", end="z.w/1"), (6, 8)),
    Case("ConvInteger", "one-zero-point", conv_integer,
         dict.fromkeys(("a.w/0", "a.w.s/0", "a.w.z/0", "a.b/0", "c.w/1"), range(8))
         | dict.fromkeys(("c.w/0", "z.w/1"), range(8, 16)), (8, 8)),
    Case("ConvInteger", "per-channel", partial(conv_integer, 0),
         dict.fromkeys(("a.w/0", "a.w.s/0", "a.w.z/0", "a.b/0", "c.w/1"), range(8))
         | dict.fromkeys(("c.w/0", "c.w.z/0", "z.w/1"), range(8, 16)), (8, 8)),
    Case("ConvInteger", "two-groups", partial(conv_integer, None, 2),
         dict.fromkeys(("a.w/0", "a.w.s/0", "a.w.z/0", "a.b/0", "c.w/1"), range(8))
         | dict.fromkeys(("c.w/0", "z.w/1"), range(8, 16)), (4, 4)),
    Case("QLinearMatMul", "per-tensor", product, ROWS | through("c.w", 0, 1, end="z.w/0"), (6, 8)),
    Case("QLinearMatMul", "per-column", partial(product, 1), ROWS | through("c.w", 0, 1, *PER, end="z.w/0"), (6, 8)),
    Case("QLinearMatMul", "from-the-left", product_from_left, ROWS | through("c.w", 1, 0, end="z.w/0"), (6, 8)),
    Case("QLinearMatMul", "of-two", product_of_two,
         dict.fromkeys(("p.w/1", "q.w/1"), range(6)), (6,), zero=("p.w/1",)),
    Case("MatMulInteger", "per-tensor", matmul_integer, ROWS | through("c.w", 0, 1, end="z.w/0"), (6, 8)),
    Case("MatMulInteger", "per-column", partial(matmul_integer, 1), ROWS | through("c.w", 0, 1, *PER, end="z.w/0"), (6, 8)),
    Case("MatMulInteger", "of-two", partial(product_of_two, "MatMulInteger"),
         dict.fromkeys(("p.w/1", "q.w/1"), range(6)), (6,), zero=("p.w/1",)),
    Case("MatMulIntegerToFloat", "per-tensor", to_float, ROWS | through("c.w", 0, 1, "c.b/0", end="z.w/0"), (6, 8)),
    Case("MatMulIntegerToFloat", "per-column", partial(to_float, 1),
         ROWS | through("c.w", 0, 1, *PER, "c.b/0", end="z.w/0"), (6, 8)),
    Case("QGemm", "per-tensor", qgemm, ROWS | through("c.w", 0, 1, "c.b/0", end="z.w/0"), (6, 8)),
    Case("QGemm", "per-column", partial(qgemm, 1), ROWS | through("c.w", 0, 1, *PER, "c.b/0", end="z.w/0"), (6, 8)),
    Case("QGemm", "transposed", partial(qgemm, 0, 1), ROWS | through("c.w", 1, 0, *PER, "c.b/0", end="z.w/0"), (6, 8)),
    Case("QGemm", "to-floats", partial(qgemm, integers=False), ROWS | through("c.w", 0, 1, "c.b/0", end="z.w/0"), (6, 8)),
    *(
        Case(op, "activation", partial(unary, op), START | {"z.w/1": range(6)}, (6,))
        for op in ("QLinearSigmoid", "QLinearLeakyRelu")
    ),
    *(
        Case(op, "residual", partial(binary, op, "two"),
             START | dict.fromkeys(("c.w/0", "c.w/1", *PER, "c.b/0", "z.w/1"), range(6)), (6,))
        for op in ("QLinearAdd", "QLinearMul")
    ),
    *(
        Case(op, "constant", partial(binary, op, "constant"), START | dict.fromkeys(("k/0", "z.w/1"), range(6)), (6,))
        for op in ("QLinearAdd", "QLinearMul")
    ),
    Case("QLinearWhere", "pixels", where,
         START | dict.fromkeys(("c.w/0", "c.w/1", *PER, "c.b/0", "z.w/1"), range(6)), (6,)),
    Case("QLinearSoftmax", "channels", partial(softmax, -1), frozen=mixed("e")),
    Case("QLinearSoftmax", "all-from-rows", partial(softmax, 0, 11), frozen=mixed("e")),
    Case("QLinearSoftmax", "rows", partial(softmax, 0), ROWS | {"z.w/0": range(6)}, (6,)),
    *(
        Case(op, "channels-last" if last else "channels-first", partial(pool, op, last=last),
             START | {"z.w/1": range(6)}, (6,))
        for op in ("QLinearGlobalAveragePool", "QLinearAveragePool") for last in (False, True)
    ),
    Case("QLinearConcat", "two", concat,
         START | {"c.w/1": range(6), "z.w/1": range(11)} | dict.fromkeys(("c.w/0", *PER, "c.b/0"), range(6, 11)), (5, 6)),
    *(
        Case("MatMulNBits", f"{bits}-bits{'' if pairs else '-one-a-byte'}", partial(nbits, bits, zero=zero),
             {"a.w/1": PAIRS if pairs else BLOCKS, "c.w/1": [0, 0, 1, 1] if pairs else range(4)}
             | {"c.s/1": [0, 0, 1, 1] if pairs else range(4)}
             | ({"c.z/1": range(2) if pairs else range(4)} if zero else {})
             | dict.fromkeys(("c.w/0", "c.s/0", *(("c.z/0",) if zero else ()), "z.w/0"), EIGHT), (2 if pairs else 4, 8))
        for bits, zero, pairs in ((4, "packed", True), (4, "", False), (4, "floats", False), (8, "packed", False))
    ),
    Case("MatMulNBits", "bias", partial(nbits, zero="", bias=True),
         {"a.w/1": BLOCKS} | dict.fromkeys(("c.w/1", "c.s/1"), range(4))
         | dict.fromkeys(("c.w/0", "c.s/0", "c.b/0", "z.w/0"), EIGHT), (4, 8)),
    Case("MatMulNBits", "last-block-not-full", partial(nbits, features=56, zero=""),
         dict.fromkeys(("c.w/0", "c.s/0", "z.w/0"), EIGHT), (8,),
         {"a.w/1": ("c", "MatMulNBits", "its last quantisation block is not full")}),
    Case("MatMulNBits", "three-blocks-in-two-bytes", partial(nbits, features=48),
         dict.fromkeys(("c.w/0", "c.s/0", "c.z/0", "z.w/0"), EIGHT), (8,),
         {"c.w/1": ("c", "MatMulNBits", "its last quantisation block is not full")}),
    Case("QAttention", "per-tensor", attention,
         dict.fromkeys(("a.w/1", "a.b/0", "c.w/0"), range(6))
         | dict.fromkeys(("c.w/1", "c.b/0"), STACKED) | {"z.w/0": range(14, 22)}, (4, 6), zero=("c.w/1", "c.b/0")),
    Case("QAttention", "per-column", partial(attention, 1),
         dict.fromkeys(("a.w/1", "a.b/0", "c.w/0"), range(6))
         | dict.fromkeys(("c.w/1", "c.b/0", *PER), STACKED) | {"z.w/0": range(14, 22)}, (4, 6), zero=("c.w/1", "c.b/0")),
    Case("DequantizeLinear", "microsofts-own", partial(microsofts_own, "DequantizeLinear"),
         ROWS | dict.fromkeys(("q.s@q/0", "q.s@d/0", "q.z@q/0", "q.z@d/0", "z.w/0"), range(6)), (6,)),
    Case("QuantizeLinear", "microsofts-own", partial(microsofts_own, "QuantizeLinear"),
         ROWS | dict.fromkeys(("q.s@q/0", "q.s@d/0", "q.z@q/0", "q.z@d/0", "z.w/0"), range(6)), (6,)),
]  # fmt: skip

REDEFINED = [
    Case("DynamicQuantizeLinear", "per-tensor", partial(matmul_integer, dynamic=True),
         ROWS | through("c.w", 0, 1, end="z.w/0"), (6, 8), redefined=True),
    Case("DynamicQuantizeLinear", "per-column", partial(matmul_integer, 1, dynamic=True),
         ROWS | through("c.w", 0, 1, *PER, end="z.w/0"), (6, 8), redefined=True),
    Case("DynamicQuantizeMatMul", "per-tensor", dynamic_product,
         ROWS | through("c.w", 0, 1, "c.b/0", end="z.w/0"), (6, 8), redefined=True),
    Case("DynamicQuantizeMatMul", "per-column", partial(dynamic_product, 1),
         ROWS | through("c.w", 0, 1, *PER, "c.b/0", end="z.w/0"), (6, 8), redefined=True),
]  # fmt: skip
STEPS = {"ConvInteger": 1, "QGemm-to-floats": 1}
"""Where sums become floats before they are rounded again; everything else computes integers from integers."""

NOT_RUN = ("ConvInteger-per-channel",)
"""onnxruntime has no kernel for these."""

PLAIN = [case for case in CASES if str(case) not in NOT_RUN]
CASES += REDEFINED


@pytest.mark.parametrize("case", CASES, ids=str)
def test_channels_keep_their_scales_and_zero_points(case: Case) -> None:
    """Vectors of scales, zero points and biases go with their channels, blocks go whole, and what mixes channels freezes."""
    oracle.assert_coupling(case)


@pytest.mark.parametrize("case", [case for case in PLAIN if case.groups], ids=str)
def test_pruned_equals_masked_integer_for_integer(case: Case) -> None:
    """What is left computes the integers of the original whose removed channels hold their zero points."""
    model = case.build()
    coupling = oracle.couple_proto(model)
    oracle.assert_identity(model, coupling)
    steps = next((steps for name, steps in STEPS.items() if str(case).startswith(name)), 0)
    rng = np.random.default_rng(0)
    for keep in (oracle.random_keep(coupling, rng), oracle.one_left(coupling, rng)):
        assert_integers_prune(model, keep, steps, case.zero)


@pytest.mark.parametrize("case", REDEFINED, ids=str)
def test_ranges_of_what_is_kept(case: Case) -> None:
    """A range that is measured on the way is that of the kept channels; the proof lists the operator as redefined."""
    model = case.build()
    oracle.assert_case_prunes(Case(case.op, case.name, case.build, redefined=True))
    coupling = oracle.couple_proto(model)
    pruned = oracle.prune_to(model, coupling, oracle.random_keep(coupling, np.random.default_rng(3)))
    feeds = oracle.feeds_for(coupling)
    want = by_hand(model, pruned.plan.initializers, feeds["x"], bias=case.op == "DynamicQuantizeMatMul")
    oracle.assert_close(oracle.run(pruned.model, feeds), [want], 1e-5)


def by_hand(model: ModelProto, slices, x: np.ndarray, *, bias: bool) -> np.ndarray:
    """Compute the three products in numpy, with the slices of the plan, and the range as the specification measures it."""
    values = {name: oracle.sliced(value, slices.get(name, {})) for name, value in oracle.constants_of(model)}
    y = np.maximum(x @ values["a.w"], 0)
    low, high = min(np.float32(0), y.min()), y.max()
    scale = np.float32((high - low) / np.float32(255))
    q = np.clip(np.rint(y / scale) + np.rint(-low / scale), 0, 255)
    sums = (q - np.rint(-low / scale)) @ (values["c.w"].astype(np.float64) - values["c.w.z"])
    y = sums * scale * values["c.w.s"] + (values["c.b"] if bias else 0)
    return (y @ values["z.w"]).astype(np.float32)


@pytest.mark.parametrize("rows", [2, 5])
def test_zero_points_of_rows_are_refused(rows: int) -> None:
    """A zero point for every row freezes the product and says so; onnxruntime could not run it either."""
    from onnxprune.labels import Ledger, Refusal  # noqa: PLC0415
    from onnxprune.model import Model, Node  # noqa: PLC0415
    from onnxprune.ops.integer import integer_product  # noqa: PLC0415

    shapes = {"x": (rows, 6), "w": (6, 3), "rows": (rows,), "y": (rows, 3)}
    node = Node("p", "MatMulInteger", "", ("x", "w", "rows"), ("y",), {})
    model = Model((node,), {}, {}, {"x": (rows, 6)}, ("y",), shapes, 21)
    with pytest.raises(Refusal, match="for each row"):
        integer_product(node, Ledger(model))


def test_an_order_of_inputs_is_refused() -> None:
    """MatMulNBits with g_idx freezes what it touches: its inputs are not in order."""
    coupling = oracle.couple_proto(nbits(order=True, zero=""))
    assert coupling.ledger.refusals == {"c": "inputs in an order of their own (g_idx)"}


@pytest.mark.parametrize(
    ("integer", "real"),
    [
        pytest.param(convolution, (8 * 6 * 9) * 24, id="QLinearConv"),
        pytest.param(conv_integer, (8 * 8 * 9) * 24, id="ConvInteger"),
        pytest.param(product, 5 * 6 * 8, id="QLinearMatMul"),
        pytest.param(matmul_integer, 5 * 6 * 8, id="MatMulInteger"),
        pytest.param(to_float, 5 * 6 * 8, id="MatMulIntegerToFloat"),
        pytest.param(dynamic_product, 5 * 6 * 8, id="DynamicQuantizeMatMul"),
        pytest.param(qgemm, 5 * 6 * 8, id="QGemm"),
        pytest.param(nbits, 5 * 64 * 8, id="MatMulNBits"),
    ],
)
def test_products_of_integers_cost_what_those_of_floats_do(integer, real: int) -> None:
    """Multiply-accumulates and weights of an operator on integers are those of the same operator on floats."""
    cost = Cost(oracle.couple_proto(integer()))
    counts = cost.counts(np.ones(cost.coupling.n_classes, bool))
    keys = [work.node.key for work in cost.works]
    assert cost.layers.values(counts)[keys.index("c")] == real
    pixels = 24 if real > 10000 else 5
    assert cost.layer_weights.values(counts)[keys.index("c")] * pixels == real


@pytest.mark.parametrize("flat", [True, False], ids=["one-row", "row-per-output"])
def test_scales_in_one_row_are_given_a_row_per_output(flat: bool) -> None:
    """MatMulNBits' scales may lie in one row: they get two axes, of which either can shrink, and a note says so."""
    model = nbits()
    if flat:
        for tensor in model.graph.initializer:
            if tensor.name in ("c.s", "c.z"):
                tensor.dims[:] = [int(np.prod(tensor.dims))]
    result = onnxprune.prune(model, target_mac=0.5)
    shapes = {tensor.name: list(tensor.dims) for tensor in result.model.graph.initializer}
    node = next(node for node in result.model.graph.node if node.op_type == "MatMulNBits")
    lengths = {a.name: a.i for a in node.attribute}
    assert result.report.proof.ok
    assert shapes["c.s"] == [lengths["N"], lengths["K"] // 16] == shapes["c.w"][:2]
    assert any("got an axis for outputs" in note for note in result.report.notes) is flat
    assert onnxprune.verify(model, result.model, result.plan).weights == "exact"


def test_sizes_count_four_bits_as_half_a_byte() -> None:
    """A size target counts what the file holds: two four-bit numbers a byte."""
    import ml_dtypes  # noqa: PLC0415

    def middle(t: Integers, y: str) -> str:
        t.constant(t.rng.integers(-7, 8, (64, 64)).astype(ml_dtypes.int4), "c.w")
        t.constant(np.float32(0.05), "c.s")
        return t.node("MatMul", y, t.node("DequantizeLinear", "c.w", "c.s"), name="c")

    model = floats(middle, 64, 64)
    held = {tensor.name: len(tensor.raw_data) for tensor in model.graph.initializer}
    assert held["c.w"] == 64 * 64 // 2
    cost = Cost(oracle.couple_proto(model))
    assert cost.of(np.ones(cost.coupling.n_classes, bool))["bytes"] == sum(held.values())
    result = onnxprune.prune(model, target_size=0.7)
    assert result.model.ByteSize() <= 0.7 * model.ByteSize()
    assert onnx.checker.check_model(result.model, full_check=True) is None


def test_rows_of_layers_count_channels_wherever_they_stand() -> None:
    """The report's rows say how many channels an integer layer has, with channels first or last."""
    for model in (convolution(), channels_last()):
        rows = {row.node: row for row in onnxprune.inspect(model).layers}
        assert rows["c"].channels_before == 8


@pytest.mark.parametrize(
    ("bits", "zero"), [(2, "packed"), (2, ""), (4, "packed"), (4, ""), (4, "floats"), (8, "packed"), (8, "")]
)
def test_unpacked_weights_are_what_onnxruntime_multiplies_by(bits: int, zero: str) -> None:
    """The real numbers behind packed ones are the product with an identity matrix."""
    t = Integers()
    t.constant(t.rng.integers(0, 256, (8, 4, 2 * bits)).astype(np.uint8), "w")
    t.constant((0.5 + t.rng.random((8, 4))).astype(np.float32), "s")
    inputs = ["w", "s"]
    if zero:
        packed = t.rng.integers(0, 256, (8, 4 * bits // 8)).astype(np.uint8)
        inputs.append(
            t.constant(packed if zero == "packed" else (2**bits * t.rng.random((8, 4))).astype(np.float32), "z")
        )
    y = t.own("MatMulNBits", t.input(64, 64), *inputs, name="c", K=64, N=8, bits=bits, block_size=16)
    model = t.build(y)
    real = quantised(oracle.couple_proto(model).model)["w"].load()
    given = oracle.run(model, {"x": np.eye(64, dtype=np.float32)})[0]
    assert pytest.approx(given, rel=1e-5, abs=1e-5) == real.reshape(8, 64).T


@pytest.mark.parametrize("case", [case for case in CASES if case.op == "QLinearConv"][:3], ids=str)
def test_real_weights_are_scaled_distances_from_zero_points(case: Case) -> None:
    """Real numbers of a convolution's integers are what the specification's formula makes of each."""
    model = case.build()
    values = dict(oracle.constants_of(model))
    real = quantised(oracle.couple_proto(model).model)["c.w"].load()
    scale, zero = (values[name].reshape(-1, 1, 1, 1).astype(np.float64) for name in ("c.w.s", "c.w.z"))
    assert real == pytest.approx((values["c.w"].astype(np.float64) - zero) * scale, rel=1e-6)


def test_zero_points_of_an_integer_convolution_belong_to_its_outputs() -> None:
    """A ConvInteger may have a zero point for each channel that it makes, as many as it reads here."""
    t = Integers()
    t.constant(t.rng.integers(-128, 128, (3, 3, 1, 1)).astype(np.int8), "w")
    t.constant(np.array([1, -2, 3], np.int8), "z")
    x = t.input(1, 3, 4, 6, kind=TensorProto.INT8)
    model = t.build(t.node("Cast", t.node("ConvInteger", x, "w", t.constant(np.int8(0)), "z"), to=TensorProto.FLOAT))
    values = dict(oracle.constants_of(model))
    expected = values["w"].astype(np.float32) - values["z"].astype(np.float32)[:, None, None, None]
    assert np.array_equal(quantised(oracle.couple_proto(model).model)["w"].load(), expected)


@pytest.mark.parametrize("read", [False, True], ids=["constant", "run-time"])
def test_computed_weight_with_zero_points_for_each_channel(read: bool) -> None:
    """Where a weight is computed, its channels end at their own zero points; the proof masks them along the right axis."""
    model = convolution()
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "c.w")
    weight.name = "c.w.stored"
    model.graph.node.insert(0, helper.make_node("Cast", ["c.w.stored"], ["c.w"], to=weight.data_type))
    if read:  # a sum with nothing that depends on the input
        nothing = [
            helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
            helper.make_node("Mul", ["most", "none"], ["nothing"]),
            helper.make_node("Cast", ["nothing"], ["nothing.q"], to=TensorProto.INT32),
            helper.make_node("Cast", ["c.w.stored"], ["c.w.wide"], to=TensorProto.INT32),
            helper.make_node("Add", ["c.w.wide", "nothing.q"], ["c.w.sum"]),
            helper.make_node("Cast", ["c.w.sum"], ["c.w"], to=weight.data_type),
        ]
        del model.graph.node[0]
        model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "none"))
        for node in reversed(nothing):
            model.graph.node.insert(0, node)
    assert any(tensor.name == "c.w.z" and len(tensor.dims) == 1 for tensor in model.graph.initializer)
    result = oracle.assert_pruned(model)
    assert "c.w.stored" in result.plan.initializers


def test_packed_weights_of_batches_say_how_many_outputs_are_left() -> None:
    """Rows may lie on several axes; the last one counts the outputs."""
    t = Integers()
    t.constant(t.rng.integers(0, 256, (8, 4, 8)).astype(np.uint8), "w")
    t.constant((0.5 + t.rng.random((8, 4))).astype(np.float32), "s")
    y = t.own(
        "MatMulNBits", t.linear(t.input(2, 1, 4), "a", 4, 64), "w", "s", name="c", K=64, N=8, bits=4, block_size=16
    )
    model = t.build(t.linear(y, "z", 8, 3))
    pruned = oracle.assert_pruned(model, 0.6).model
    node = next(node for node in pruned.graph.node if node.name == "c")
    left = next(tensor.dims[0] for tensor in pruned.graph.initializer if tensor.name == "w")
    assert next(a.i for a in node.attribute if a.name == "N") == left < 8


def test_past_of_quantised_attention_keeps_its_heads() -> None:
    """Keys and values of former tokens that come from outside meet those of the weight: these stay, its inputs may go."""
    t = Integers()
    y = t.node("Add", t.linear(t.input(2, 5, 4), "a", 4, 6), t.random(6, name="a.b"))
    q, q_scale, q_zero = t.enter(y, 0.02, 120, "q")
    weight, scale, zero = t.weight(6, 24, name="c.w", per=None)
    past = t.input(2, 2, 2, 3, 4, name="past")
    operands = (q, weight, t.random(24, name="c.b"), q_scale, scale, "", q_zero, zero, past)
    y, _ = t.own("QAttention", *operands, name="c", num_heads=2, outputs=2)
    model = t.build(t.linear(y, "z", 8, 3))
    assert [bundle.size for bundle in oracle.couple_proto(model).bundles if bundle.removable] == [6]
    assert oracle.assert_pruned(model, 0.9).plan.initializers.keys() >= {"a.w", "c.w"}
