"""The masked reference of quantised models, in numpy: what reads a removed channel has a zero point for its weight.

``(x - x0) * (w - w0)`` is zero where w is its zero point w0, so that the original then computes, in its own integers, what
is left when the channel is gone. Written apart from the tool: it knows the plan's JSON and nothing of labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper

import oracle
from graphs import Tiny
from onnxprune.plan import Plan

MICROSOFT = "com.microsoft"

ENDS: Mapping[str, Sequence[tuple[int, int | None, int]]] = {
    "QLinearConv": ((3, 5, 1),),
    "ConvInteger": ((1, 3, 1),),
    "QLinearMatMul": ((3, 5, -2), (0, 2, -1)),
    "MatMulInteger": ((1, 3, -2), (0, 2, -1)),
    "MatMulIntegerToFloat": ((1, 5, -2),),
    "QGemm": ((3, 5, -2),),
    "QAttention": ((1, 7, -2),),
    "Conv": ((1, None, 1),),
    "MatMul": ((1, None, -2), (0, None, -1)),
    "Gemm": ((1, None, -2),),
}
"""By operator: inputs of a weight and its zero point, and the axis that is summed over (of Gemm: unless transposed)."""


def zeroed(model: ModelProto, plan: Plan, silent: Sequence[str] = ()) -> ModelProto:
    """Return the original with zero points for the weights that read removed channels.

    ``silent``: further ``weight/axis`` with a zero point of 0, where what makes a channel says nothing instead.
    """
    masked = ModelProto()
    masked.CopyFrom(model)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, _, axis in (each.partition("/") for each in silent):
        _set(values, name, _masked(plan, name, int(axis), values[name], np.zeros_like(values[name])))
    made = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        flags = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "MatMulNBits":
            _set(values, node.input[2], _masked(plan, node.input[1], 1, values[node.input[2]], np.zeros((1, 1))))
        for index, zero, summed in ENDS.get(node.op_type, ()):
            name, axis, shape = node.input[index], summed, {}
            if flags.get("transB", 0):
                axis = -1
            source = made.get(name)
            if source is not None and source.op_type == "DequantizeLinear":
                shape = {a.name: a.i for a in source.attribute}
                name, point = source.input[0], source.input[2] if len(source.input) > 2 else ""
            else:
                point = node.input[zero] if zero is not None and len(node.input) > zero else ""
            if name not in values:
                continue
            weight = values[name]
            axis %= weight.ndim
            points = values[point] if point else np.zeros((), weight.dtype)
            per = shape.get("axis", 1) if shape else {"QLinearConv": 0, "ConvInteger": 0}.get(node.op_type, -1)
            per = 0 if node.op_type == "QGemm" and flags.get("transB", 0) else per
            whole = spread(points, weight.shape, per, shape.get("block_size", 0))
            _set(values, name, _masked(plan, name, axis, weight, whole))
    for tensor in masked.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(values[tensor.name], order="C"), tensor.name))
    return masked


def spread(parameter: np.ndarray, shape: Sequence[int], axis: int, block: int) -> np.ndarray:
    """Give every element of a weight its scale or zero point, as the specification of DequantizeLinear says."""
    if parameter.size == 1:
        return np.full(shape, parameter.ravel()[0], parameter.dtype)
    axis %= len(shape)
    if parameter.ndim == 1:
        return np.broadcast_to(parameter.reshape([-1 if a == axis else 1 for a in range(len(shape))]), shape)
    index = np.arange(shape[axis]) // max(1, block)
    return np.broadcast_to(parameter.take(index, axis), shape)


def _set(values: dict[str, np.ndarray], name: str, value: np.ndarray) -> None:
    values[name] = value.astype(values[name].dtype)


def _masked(plan: Plan, name: str, axis: int, weight: np.ndarray, points: np.ndarray) -> np.ndarray:
    kept = plan.initializers.get(name, {}).get(axis)
    if kept is None:
        return weight
    rows = kept if isinstance(kept[0], list) else [kept]
    blocks = []
    for part, own, row in zip(np.split(weight, len(rows)), np.split(points, len(rows)), rows, strict=True):
        mask = np.isin(np.arange(weight.shape[axis]), row).reshape([-1 if a == axis else 1 for a in range(weight.ndim)])
        blocks.append(np.where(mask, part, own))
    return np.concatenate(blocks)


def assert_integers_prune(
    model: ModelProto, keep: np.ndarray | None = None, steps: int = 0, silent: Sequence[str] = ()
) -> oracle.Pruned:
    """Pruning is proved, keeps every type and untouched byte, and equals the masked original.

    Parameters
    ----------
    steps
        How far integer outputs may lie apart: 0 where all that flows is integers, 1 where floats are rounded to them.
    """
    coupling = oracle.couple_proto(model)
    keep = oracle.random_keep(coupling, np.random.default_rng(1)) if keep is None else keep
    pruned = oracle.prune_to(model, coupling, keep)
    oracle.check(pruned.model)
    assert oracle.signature(pruned.model) == oracle.signature(model)
    assert pruned.proof.ok, pruned.proof.failures
    assert not pruned.proof.insensitive, pruned.proof.insensitive
    before = {tensor.name: tensor for tensor in model.graph.initializer}
    for tensor in pruned.model.graph.initializer:
        whole = before[tensor.name.partition("@")[0]]
        assert tensor.data_type == whole.data_type
        slices = pruned.plan.initializers.get(tensor.name, {})
        assert np.array_equal(numpy_helper.to_array(tensor), oracle.sliced(numpy_helper.to_array(whole), slices))
        assert slices or tensor == whole
    feeds = oracle.feeds_for(coupling)
    masked = zeroed(model, pruned.plan, silent)
    for have, want in zip(oracle.run(pruned.model, feeds), oracle.run(masked, feeds), strict=True):
        assert have.shape == want.shape
        if np.issubdtype(want.dtype, np.integer):
            assert np.ptp(want) > 0
            assert np.abs(have.astype(np.int64) - want.astype(np.int64)).max() <= steps
        else:
            oracle.assert_close([have], [want], 1e-4)
    return pruned


class Integers(Tiny):
    """A graph under construction, in which tensors of eight bits flow.

    Weights of eight bits use seven: pairs of products then stay within 16 bits, in which processors without VNNI add them.
    """

    def __init__(self, opset: int = 21, seed: int = 0) -> None:
        super().__init__(opset=opset, seed=seed, domains=(MICROSOFT,))

    def own(self, op: str, *inputs: str, **attributes):
        """Add one of onnxruntime's own operators."""
        return self.node(op, *inputs, domain=MICROSOFT, **attributes)

    def point(self, scale: float, zero: int, name: str, dtype: type = np.uint8) -> list[str]:
        """Add a scale and a zero point for a whole tensor."""
        return [
            self.constant(np.array(scale, np.float32), f"{name}.s"),
            self.constant(np.array(zero).astype(dtype), f"{name}.z"),
        ]

    def enter(self, y: str, scale: float, zero: int, name: str, dtype: type = np.uint8) -> list[str]:
        """Quantise; return the tensor, its scale and its zero point."""
        operands = self.point(scale, zero, name, dtype)
        return [self.node("QuantizeLinear", y, *operands, name=f"{name}.q"), *operands]

    def integers(self, *shape: int, name: str, dtype: type = np.int8) -> str:
        """Add integers of seven bits."""
        low, high = (0, 128) if np.dtype(dtype).kind == "u" else (-63, 64)
        return self.constant(self.rng.integers(low, high, shape).astype(dtype), name)

    def weight(self, *shape: int, name: str, dtype: type = np.int8, per: int | None = None, scale: float = 0.01):
        """Add a weight with its scale and zero point, or (``per``) one for every index of an axis."""
        weight = self.integers(*shape, name=name, dtype=dtype)
        size = () if per is None else (shape[per],)
        zero = self.rng.integers(40, 90, size) if np.dtype(dtype).kind == "u" else np.zeros(size)
        return [
            weight,
            self.constant((scale * (0.5 + self.rng.random(size))).astype(np.float32), f"{name}.s"),
            self.constant(np.asarray(zero).astype(dtype), f"{name}.z"),
        ]

    def qconv(self, x: Sequence[str], name: str, shape: Sequence[int], *, per: int | None = 0, dtype: type = np.int8,
              bias: bool = True, out: float = 0.4, domain: str = "", **attributes) -> list[str]:  # fmt: skip
        """Add a convolution ``name`` of integers; return the tensor, its scale and its zero point."""
        weight = self.weight(*shape, name=f"{name}.w", per=per, dtype=dtype)
        after = self.point(out, 120, name)
        inputs = [*x, *weight, *after]
        if bias:
            inputs.append(self.constant(self.rng.integers(-2000, 2001, shape[0]).astype(np.int32), f"{name}.b"))
        return [self.node("QLinearConv", *inputs, name=name, domain=domain, **attributes), *after]

    def qmatmul(self, x: Sequence[str], name: str, shape: Sequence[int], *, per: int | None = None, out: float = 0.3):
        """Add a product ``name`` of integers; return the tensor, its scale and its zero point."""
        after = self.point(out, 120, name)
        weight = self.weight(*shape, name=f"{name}.w", per=per)
        return [self.node("QLinearMatMul", *x, *weight, *after, name=name), *after]


def maps(middle, channels: int = 6, after: int | None = None, *, last: bool = False) -> ModelProto:
    """Quantised pixels -> convolution ``a`` (2 to ``channels``) -> ``middle`` -> convolution ``z`` (``after`` to 3).

    ``last``: channels stand last in between.
    """
    t = Integers()
    y = t.qconv(t.enter(t.input(1, 2, 4, 6), 0.02, 128, "x"), "a", (channels, 2, 1, 1))
    if last:
        y[0] = t.node("Transpose", y[0], perm=[0, 2, 3, 1])
    y = middle(t, y)
    if last:
        y[0] = t.node("Transpose", y[0], perm=[0, 3, 1, 2])
    return t.build(t.qconv(y, "z", (3, after or channels, 1, 1))[0])


def rows(middle, features: int = 6, after: int | None = None) -> ModelProto:
    """Quantised rows -> product ``a`` (2 to ``features``) -> ``middle`` -> product ``z`` (``after`` to 3)."""
    t = Integers()
    y = t.qmatmul(t.enter(t.input(5, 4), 0.02, 128, "x"), "a", (4, features))
    return t.build(t.qmatmul(middle(t, y), "z", (after or features, 3), out=0.02)[0])


def floats(middle, features: int = 6, after: int | None = None, opset: int = 21) -> ModelProto:
    """Rows of floats -> product ``a`` (4 to ``features``) -> ``middle``, from floats to floats -> product ``z``."""
    t = Integers(opset)
    y = middle(t, t.node("Relu", t.linear(t.input(5, 4), "a", 4, features)))
    return t.build(t.linear(y, "z", after or features, 3))


def residual() -> ModelProto:
    """A residual network of convolutions on integers that ends in a QGemm; per-channel zero points all differ."""
    t = Integers()
    u8 = np.uint8
    y = t.qconv(t.enter(t.input(1, 3, 8, 8), 0.02, 128, "x"), "a", (12, 3, 3, 3), dtype=u8, pads=[1] * 4)
    inner = t.qconv(y, "b", (10, 12, 3, 3), dtype=u8, out=1.0, pads=[1] * 4)
    branch = t.qconv(inner, "c", (12, 10, 1, 1), dtype=u8, out=2.0)
    after = t.point(1.5, 118, "sum")
    y = [t.own("QLinearAdd", *y, *branch, *after, name="sum"), *after]
    after = t.point(0.5, 110, "pool")
    y = [t.own("QLinearGlobalAveragePool", *y, *after, name="pool", channels_last=0), *after]
    y[0] = t.node("Flatten", y[0])
    weight = t.weight(12, 5, name="z.w", per=1)
    bias = t.constant(t.rng.integers(-500, 501, 5).astype(np.int32), "z.b")
    after = t.point(0.2, 128, "z")
    return t.build(t.own("QGemm", *y, *weight, bias, *after, name="z"))


def dynamic() -> ModelProto:
    """Two layers of products whose inputs are quantised on the way."""
    t = Integers()
    y = t.linear(t.input(6, 8), "a", 8, 14)
    for name, before, after in (("b", 14, 12), ("z", 12, 5)):
        weight, scale, zero = t.weight(before, after, name=f"{name}.w", per=1, dtype=np.uint8)
        q, q_scale, q_zero = t.node("DynamicQuantizeLinear", y, name=f"{name}.q", outputs=3)
        sums = t.node("MatMulInteger", q, weight, q_zero, zero, name=name)
        y = t.node("Mul", t.node("Cast", sums, to=TensorProto.FLOAT), t.node("Mul", q_scale, scale))
    return t.build(y)


def few_bits() -> ModelProto:
    """Two layers of products by weights of four bits, in blocks of 16 inputs."""
    t = Integers()
    y = t.node("Relu", t.linear(t.input(6, 8), "a", 8, 96))
    for name, before, after in (("b", 96, 64), ("z", 64, 5)):
        blocks = before // 16
        t.constant(t.rng.integers(0, 256, (after, blocks, 8)).astype(np.uint8), f"{name}.w")
        t.constant(((0.5 + t.rng.random((after, blocks))) / 16).astype(np.float32), f"{name}.s")
        zeros = t.constant(t.rng.integers(0, 256, (after, blocks // 2)).astype(np.uint8), f"{name}.z")
        sizes = {"K": before, "N": after, "bits": 4, "block_size": 16}
        y = t.own("MatMulNBits", y, f"{name}.w", f"{name}.s", zeros, name=name, **sizes)
    return t.build(y)
