"""Quantisation: values change their type, channels pass, and what belongs to a channel goes with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import ModelProto, defs, numpy_helper

import architectures
import onnxprune
import oracle
from graphs import Tiny, perceptron, sandwich
from onnxprune import runtime
from onnxprune.ops.quantised import OPERANDS
from oracle import Case

LIMITS = {"int4": 7, "uint4": 15, "int8": 100, "uint8": 200, "int16": 20000, "uint16": 40000, "int32": 2000}


# -- building ----------------------------------------------------------------------------------------------------------


def parameters(
    t: Tiny, name: str, size: int | None, dtype: np.dtype, limit: float, *, zero: bool = True, share: str = ""
) -> list[str]:
    """Add a scale and a zero point, vectors where a size is given; ``share`` is another name for both."""
    shape, name = () if size is None else (size,), share or name
    if any(tensor.name == f"{name}.s" for tensor in t.initializers):
        return [f"{name}.s", f"{name}.z"] if zero else [f"{name}.s"]
    names = [t.constant(((1 + t.rng.random(shape)) / limit).astype(np.float32), f"{name}.s")]
    if zero:
        middle = limit / 2 if dtype.name.startswith("u") else 0
        zeros = middle + t.rng.integers(-limit // 4, limit // 4 + 1, shape) if dtype.name in LIMITS else np.zeros(shape)
        names.append(t.constant(np.asarray(zeros).astype(np.int64).astype(dtype), f"{name}.z"))
    return names


def weight(
    t: Tiny, name: str, shape: Sequence[int], dtype: type = np.int8, *, per: int | None = 0, zero: bool = True,
    share: str = "", axis: int | None = None, scale: float = 1.0,
) -> str:  # fmt: skip
    """Add an integer weight and its DequantizeLinear; ``per``: the axis that has a scale per index, None for one scale."""
    kind = np.dtype(dtype)
    limit = LIMITS.get(kind.name, 1)
    low = 0 if kind.name.startswith("u") else -limit
    values = t.rng.integers(low, limit + 1, shape) if kind.name in LIMITS else t.rng.standard_normal(shape)
    t.constant(values.astype(np.int64 if kind.name in LIMITS else np.float32).astype(kind), name)
    size = None if per is None else shape[per]
    operands = parameters(t, name, size, kind, limit / scale, zero=zero, share=share)
    position = per if axis is None else axis
    return t.node(
        "DequantizeLinear", name, *operands, name=f"{name}.dq", **({} if position is None else {"axis": position})
    )


def activation(
    t: Tiny, y: str, name: str, size: int | None = None, axis: int | None = None, dtype: type = np.uint8
) -> str:
    """Quantise and back."""
    operands = parameters(t, name, size, np.dtype(dtype), LIMITS.get(np.dtype(dtype).name, 4) / 3)
    attributes = {} if axis is None else {"axis": axis}
    quantised = t.node("QuantizeLinear", y, *operands, name=f"{name}.q", **attributes)
    return t.node("DequantizeLinear", quantised, *operands, name=f"{name}.dq", **attributes)


def quantised_conv(dtype: type = np.int8, per: int | None = 0, **how) -> ModelProto:
    """Convolve by a quantised weight ``w``, 6 to 8 channels."""

    def middle(t: Tiny, y: str) -> str:
        kernel = weight(t, "w", (8, 6, 3, 3), dtype, per=per, scale=0.3, **how)
        return t.node("Conv", y, kernel, name="c", pads=[1] * 4)

    return sandwich(middle, 6, 8, opset=21)


def quantised_bias() -> ModelProto:
    """Convolve by a weight and a 32-bit bias, both quantised per channel."""

    def middle(t: Tiny, y: str) -> str:
        kernel = weight(t, "w", (8, 6, 3, 3), scale=0.3)
        return t.node("Conv", y, kernel, weight(t, "b", (8,), np.int32, zero=False), name="c", pads=[1] * 4)

    return sandwich(middle, 6, 8, opset=21)


def quantised_activation(size: int | None = None, axis: int | None = None, dtype: type = np.uint8) -> ModelProto:
    """Quantise what a convolution returns."""
    return sandwich(lambda t, y: t.node("Relu", activation(t, y, "s", size, axis, dtype)), opset=21)


def quantised_depthwise(per: int | None) -> ModelProto:
    """Convolve every channel on its own."""

    def middle(t: Tiny, y: str) -> str:
        return t.node("Conv", y, weight(t, "w", (6, 1, 3, 3), per=per), name="c", group=6, pads=[1] * 4)

    return sandwich(middle, opset=21)


def quantised_groups(per: int, *, zero: bool = True) -> ModelProto:
    """Convolve two groups of four channels to six each."""

    def middle(t: Tiny, y: str) -> str:
        kernel = weight(t, "w", (12, 4, 3, 3), per=per, scale=0.3, zero=zero)
        return t.node("Conv", y, kernel, name="c", group=2, pads=[1] * 4)

    return sandwich(middle, 8, 12, opset=21)


def quantised_transpose(per: int | None) -> ModelProto:
    """Convolve transposed by a quantised weight."""
    return sandwich(
        lambda t, y: t.node("ConvTranspose", y, weight(t, "w", (6, 8, 1, 1), per=per), name="c"), 6, 8, opset=21
    )


def quantised_product(per: int | None, op: str = "MatMul") -> ModelProto:
    """Multiply by a quantised matrix: directly, transposed by a node, or transposed by a Gemm."""

    def middle(t: Tiny, y: str) -> str:
        shape = (6, 8) if op == "MatMul" else (8, 6)
        matrix = weight(t, "w", shape, per=per)
        if op == "Gemm":
            return t.node("Gemm", y, matrix, name="c", transB=1)
        if op == "Transpose":
            matrix = t.node("Transpose", matrix, perm=[1, 0])
        return t.node("MatMul", y, matrix, name="c")

    return perceptron(middle, 6, 8, opset=21)


def fake_quantised() -> ModelProto:
    """Round a float weight to eight bits in the graph (quantisation-aware training)."""

    def middle(t: Tiny, y: str) -> str:
        t.random(8, 6, 3, 3, name="w", scale=0.3)
        operands = parameters(t, "w", 8, np.dtype(np.int8), 100)
        rounded = t.node("QuantizeLinear", "w", *operands, name="w.q", axis=0)
        kernel = t.node("DequantizeLinear", rounded, *operands, name="w.dq", axis=0)
        return t.node("Conv", y, kernel, name="c", pads=[1] * 4)

    return sandwich(middle, 6, 8, opset=21)


def equal_scales() -> ModelProto:
    """Two layers whose equal scales the exporter stored once."""

    def middle(t: Tiny, y: str) -> str:
        y = t.node("Conv", y, weight(t, "v", (6, 6, 1, 1), share="one"), name="c")
        return t.node("Conv", t.node("Relu", y), weight(t, "w", (6, 6, 1, 1), share="one"), name="d")

    return sandwich(middle, opset=21)


def shared_weight() -> ModelProto:
    """One quantised weight for two convolutions in a row."""

    def middle(t: Tiny, y: str) -> str:
        kernel = weight(t, "w", (6, 6, 1, 1))
        return t.node("Conv", t.node("Relu", t.node("Conv", y, kernel, name="c")), kernel, name="d")

    return sandwich(middle, opset=21)


def residual() -> ModelProto:
    """Quantise both sides of an addition, each with its own scale, and the sum."""

    def middle(t: Tiny, y: str) -> str:
        y = activation(t, y, "p")
        branch = t.node("Conv", y, weight(t, "w", (6, 6, 3, 3), scale=0.3), name="c", pads=[1] * 4)
        return activation(t, t.node("Add", y, activation(t, branch, "q")), "r")

    return sandwich(middle, opset=21)


def blocked(dtype: type = np.int8, axis: int = 1, size: int = 3, *, zero: bool = True) -> ModelProto:
    """Quantise a weight of 8 outputs and 6 inputs by blocks along an axis."""

    def middle(t: Tiny, y: str) -> str:
        kind, shape = np.dtype(dtype), [8, 6, 1, 1]
        limit = LIMITS.get(kind.name, 1)
        low = 0 if kind.name.startswith("u") else -limit
        values = t.rng.integers(low, limit + 1, shape) if kind.name in LIMITS else t.rng.standard_normal(shape)
        t.constant(values.astype(np.int64 if kind.name in LIMITS else np.float32).astype(kind), "w")
        shape[axis] = -(-shape[axis] // size)
        operands = [t.constant(((0.5 + t.rng.random(shape)) / limit).astype(np.float32), "w.s")]
        if zero:
            zeros = (limit + low) / 2 + t.rng.integers(-limit // 4, limit // 4 + 1, shape)
            operands.append(t.constant((zeros * (kind.name in LIMITS)).astype(np.int64).astype(kind), "w.z"))
        kernel = t.node("DequantizeLinear", "w", *operands, name="w.dq", axis=axis, block_size=size)
        return t.node("Conv", y, kernel, name="c")

    return sandwich(middle, 6, 8, opset=21)


def blocked_activation(size: int = 2) -> ModelProto:
    """Quantise what a convolution returns by blocks of channels."""

    def middle(t: Tiny, y: str) -> str:
        operands = [
            t.constant((0.02 * (1 + t.rng.random((1, 6 // size, 4, 6)))).astype(np.float32), "q.s"),
            t.constant(t.rng.integers(90, 140, (1, 6 // size, 4, 6)).astype(np.uint8), "q.z"),
        ]
        q = t.node("QuantizeLinear", y, *operands, name="q", axis=1, block_size=size)
        return t.node("DequantizeLinear", q, *operands, name="d", axis=1, block_size=size)

    return sandwich(middle, opset=21)


# -- the masked reference ----------------------------------------------------------------------------------------------


def dequantised(model: ModelProto) -> ModelProto:
    """Put the real value of every quantised weight in its place, under the name of what it is computed from."""
    real = ModelProto()
    real.CopyFrom(model)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node}
    roots, values = {}, {}
    for node in model.graph.node:
        source = node.input[0]
        if node.op_type != "DequantizeLinear":
            continue
        before = makers.get(source)
        root = before.input[0] if before is not None and before.op_type == "QuantizeLinear" else source
        if root in arrays:
            probe = ModelProto()
            probe.CopyFrom(model)
            del probe.graph.output[:]
            probe.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
            values[root] = oracle.run(probe, oracle.feeds_for(oracle.couple_proto(model)))[0]
            roots[node.output[0]] = root
    for node in real.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            node.input[:] = [roots.get(name, name) for name in node.input]
    quantising = {"QuantizeLinear", "DequantizeLinear"}
    gone = {*roots, *values}
    live = [n for n in real.graph.node if n.op_type not in quantising or gone.isdisjoint((n.input[0], n.output[0]))]
    tensors = [tensor for tensor in real.graph.initializer if tensor.name not in values]
    for field, items in ((real.graph.node, live), (real.graph.initializer, tensors)):
        copies = [type(item).FromString(item.SerializeToString()) for item in items]
        del field[:]
        field.extend(copies)
    real.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    return real


def assert_quantised_prunes(
    model: ModelProto, keep: np.ndarray | None = None, zero: Sequence[str] = ()
) -> oracle.Pruned:
    """Pruning is proved, gives a valid model with the types it had, and equals the masked original."""
    coupling = oracle.couple_proto(model)
    keep = oracle.random_keep(coupling, np.random.default_rng(1)) if keep is None else keep
    pruned = oracle.prune_to(model, coupling, keep)
    onnx.checker.check_model(pruned.model, full_check=True)
    assert oracle.signature(pruned.model) == oracle.signature(model)
    assert pruned.proof.ok, pruned.proof.failures
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert all(types[tensor.name.partition("@")[0]] == tensor.data_type for tensor in pruned.model.graph.initializer)
    feeds = oracle.feeds_for(coupling)
    oracle.assert_close(
        oracle.run(pruned.model, feeds), oracle.masked_reference(dequantised(model), pruned.plan, feeds, zero), 1e-4
    )
    return pruned


# -- cases -------------------------------------------------------------------------------------------------------------

IN = {"a.w/0": range(6), "a.b/0": range(6)}
OUT = range(6, 14)


def through(axis_in: int, axis_out: int, per: int | None = None, *, zero: bool = True) -> Mapping[str, Sequence[int]]:
    """What is free around a quantised weight whose axis ``per`` has scales: inputs 0 to 5, outputs 6 to 13."""
    axes: dict[str, Sequence[int]] = {f"w/{axis_in}": range(6), f"w/{axis_out}": OUT}
    if per is not None:
        names = ("w.s/0", "w.z/0") if zero else ("w.s/0",)
        axes |= dict.fromkeys(names, axes[f"w/{per % 2}"])
    return axes


CONV = IN | {"z.w/1": OUT}
PRODUCT = IN | {"z.w/0": OUT}
IN_ROWS = {"a.w/1": range(6), "a.b/0": range(6)}
TRIPLES = [0, 0, 0, 1, 1, 1]
PAIRS = [6, 6, 7, 7, 8, 8, 9, 9]
GROUPS = [*range(4), *range(4)]  # one scale for an index of both groups ties it in them
DTYPES = ("int8", "uint8", "int16", "uint16", "int4", "uint4", "float8_e4m3fn", "float8_e5m2")


def dtype_of(name: str) -> type:
    return getattr(ml_dtypes if name in ("int4", "uint4") or "float8" in name else np, name)


CASES = [
    *(
        Case("DequantizeLinear", f"{name}-axis{per}", partial(quantised_conv, dtype_of(name), per),
             CONV | through(1, 0, per), (6, 8))
        for name in DTYPES for per in (0, 1)
    ),
    Case("DequantizeLinear", "one-scale", partial(quantised_conv, per=None), CONV | through(1, 0), (6, 8)),
    Case("DequantizeLinear", "negative-axis", partial(quantised_conv, axis=-4), CONV | through(1, 0, 0), (6, 8)),
    Case("DequantizeLinear", "no-zero-point", partial(quantised_conv, zero=False),
         CONV | through(1, 0, 0, zero=False), (6, 8)),
    Case("DequantizeLinear", "axis-of-one-scale-means-nothing", partial(quantised_conv, per=None, axis=1),
         CONV | through(1, 0), (6, 8)),
    Case("DequantizeLinear", "bias", quantised_bias, CONV | through(1, 0, 0) | {"b/0": OUT, "b.s/0": OUT}, (6, 8)),
    Case("DequantizeLinear", "depthwise", partial(quantised_depthwise, 0),
         IN | dict.fromkeys(("w/0", "w.s/0", "w.z/0", "z.w/1"), range(6)), (6,)),
    Case("DequantizeLinear", "depthwise-one-scale", partial(quantised_depthwise, None),
         IN | dict.fromkeys(("w/0", "z.w/1"), range(6)), (6,)),
    *(
        Case("DequantizeLinear", f"transposed-axis{per}", partial(quantised_transpose, per),
             CONV | through(0, 1, per), (6, 8))
        for per in (0, 1)
    ),
    *(
        Case("DequantizeLinear", f"{op}-axis{per}", partial(quantised_product, per, op),
             IN_ROWS | {"z.w/0": OUT} | (through(0, 1, per) if op == "MatMul" else through(1, 0, per)), (6, 8))
        for op in ("MatMul", "Gemm", "Transpose") for per in (0, 1)
    ),
    Case("DequantizeLinear", "two-groups-axis0", partial(quantised_groups, 0),
         dict.fromkeys(("a.w/0", "a.b/0", "w/1"), range(8))
         | dict.fromkeys(("w/0", "w.s/0", "w.z/0", "z.w/1"), range(8, 20)), (4, 6)),
    Case("DequantizeLinear", "two-groups-no-zero-point", partial(quantised_groups, 0, zero=False),
         dict.fromkeys(("a.w/0", "a.b/0", "w/1"), range(8))
         | dict.fromkeys(("w/0", "w.s/0", "z.w/1"), range(8, 20)), (4, 6)),
    Case("DequantizeLinear", "two-groups-axis1", partial(quantised_groups, 1),
         {"a.w/0": GROUPS, "a.b/0": GROUPS, "w/1": range(4), "w/0": range(4, 16), "z.w/1": range(4, 16)}
         | dict.fromkeys(("w.s/0", "w.z/0"), range(4)), (4, 6)),
    Case("DequantizeLinear", "equal-scales", equal_scales,
         IN | {"v/1": range(6), "v/0": range(6, 12), "one.s@v.dq/0": range(6, 12), "one.z@v.dq/0": range(6, 12),
               "w/1": range(6, 12), "w/0": range(12, 18), "one.s@w.dq/0": range(12, 18), "one.z@w.dq/0": range(12, 18),
               "z.w/1": range(12, 18)}, (6, 6, 6)),
    Case("DequantizeLinear", "shared-weight", shared_weight,
         IN | dict.fromkeys(("w/0", "w/1", "w.s/0", "w.z/0", "z.w/1"), range(6)), (6,)),
    *(
        Case("DequantizeLinear", f"{name}-blocks-of-inputs{'' if zero else '-no-zero-point'}",
             partial(blocked, dtype_of(name), zero=zero),
             dict.fromkeys(("a.w/0", "a.b/0", "w/1"), TRIPLES)
             | dict.fromkeys(("w.s/1", "w.z/1") if zero else ("w.s/1",), range(2))
             | dict.fromkeys(("w/0", "w.s/0", "w.z/0", "z.w/1") if zero else ("w/0", "w.s/0", "z.w/1"), OUT), (2, 8))
        for name in DTYPES for zero in (True, False)
    ),
    *(
        Case("DequantizeLinear", f"{name}-blocks-of-outputs", partial(blocked, dtype_of(name), 0, 2),
             dict.fromkeys(("a.w/0", "a.b/0", "w/1", "w.s/1", "w.z/1"), range(6))
             | dict.fromkeys(("w/0", "z.w/1"), PAIRS) | dict.fromkeys(("w.s/0", "w.z/0"), range(6, 10)), (4, 6))
        for name in DTYPES
    ),
    Case("DequantizeLinear", "last-block-not-full", partial(blocked, size=4),
         dict.fromkeys(("w/0", "w.s/0", "w.z/0", "z.w/1"), OUT), (8,),
         {"w/1": ("w.dq", "DequantizeLinear", "its last quantisation block is not full")}),
    Case("QuantizeLinear", "activation-blocks", blocked_activation,
         {key: [0, 0, 1, 1, 2, 2] for key in ("a.w/0", "a.b/0", "z.w/1")}
         | dict.fromkeys(("q.s/1", "q.z/1"), range(3)), (3,)),
    Case("QuantizeLinear", "one-block", partial(blocked_activation, 6),
         frozen={"a.w/0": ("q", "QuantizeLinear", "a quantisation block goes as a whole")}),
    Case("QuantizeLinear", "activation", quantised_activation, IN | {"z.w/1": range(6)}, (6,)),
    *(
        Case("QuantizeLinear", f"activation-axis{axis}", partial(quantised_activation, 6, axis),
             IN | dict.fromkeys(("s.s@s.q/0", "s.z@s.q/0", "s.s@s.dq/0", "s.z@s.dq/0", "z.w/1"), range(6)), (6,))
        for axis in (None, 1, -3)
    ),
    *(
        Case("QuantizeLinear", f"activation-of-{name}", partial(quantised_activation, dtype=dtype_of(name)),
             IN | {"z.w/1": range(6)}, (6,))
        for name in DTYPES
    ),
    Case("QuantizeLinear", "activation-of-rows", partial(quantised_activation, 4, 2), IN | {"z.w/1": range(6)}, (6,)),
    Case("QuantizeLinear", "weight", fake_quantised,
         CONV | through(1, 0) | {f"w.{role}@w.{op}/0": OUT for role in "sz" for op in ("q", "dq")}, (6, 8)),
    Case("QuantizeLinear", "residual", residual,
         IN | dict.fromkeys(("w/0", "w/1", "w.s/0", "w.z/0", "z.w/1"), range(6)), (6,)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_channels_keep_their_scale_and_zero_point(case: Case) -> None:
    """A scale and a zero point per channel live and die with it; one for all ties nothing; blocks go whole."""
    oracle.assert_coupling(case)


@pytest.mark.parametrize("case", [case for case in CASES if case.groups], ids=str)
def test_pruned_equals_masked(case: Case) -> None:
    """Slicing integers, scales and zero points equals zeroing the real weights of what was removed."""
    model = case.build()
    oracle.check(model)
    oracle.assert_identity(model, oracle.couple_proto(model))
    assert_quantised_prunes(model)


@pytest.mark.parametrize("name", DTYPES)
def test_down_to_one_channel(name: str) -> None:
    """One channel is left of every group, in types of any width: four-bit numbers are packed anew."""
    model = quantised_conv(dtype_of(name))
    coupling = oracle.couple_proto(model)
    pruned = assert_quantised_prunes(model, oracle.one_left(coupling, np.random.default_rng(0)))
    shapes = {tensor.name: list(tensor.dims) for tensor in pruned.model.graph.initializer}
    assert shapes["w"] == [1, 1, 3, 3]
    assert shapes["w.s"] == shapes["w.z"] == [1]


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("per", [None, 0, 1, 2])
def test_recurrent_weights(per: int | None, directions: int) -> None:
    """Where a scale belongs to a unit of both directions, that unit goes in both; else each direction chooses its own."""
    t = Tiny()
    w, r = (weight(t, name, (directions, 18, n), per=per) for name, n in (("w", 2), ("r", 6)))
    both = {"direction": "bidirectional"} if directions == 2 else {}
    y = t.node("GRU", t.input(5, 1, 2), w, r, name="op", outputs=2, hidden_size=6, **both)[1]
    y = t.node("Reshape", t.node("Transpose", y, perm=[1, 0, 2]), t.constant([1, -1]))
    model = t.build(t.node("MatMul", y, t.random(6 * directions, 3, name="z.w"), name="z"))
    pruned = assert_quantised_prunes(model, zero=["r/2"])
    chosen = {tuple(units) for units in np.atleast_2d(pruned.plan.initializers["r"][2])}
    assert len(chosen) == (2 if directions == 2 and per in (None, 0) else 1)


# -- models that onnxruntime quantised ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantise(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelProto]:
    """Return what quantises a model as onnxruntime.quantization.quantize_static does, in the QDQ format."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    folder: Path = tmp_path_factory.mktemp("quantised")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self, feeds: Sequence[Mapping[str, np.ndarray]]) -> None:
            self.feeds = iter(feeds)

        def get_next(self):
            return next(self.feeds, None)

    def make(model: ModelProto, *, per_channel: bool, **options) -> ModelProto:
        logging.disable(logging.WARNING)
        coupling = oracle.couple_proto(model)
        feeds = [oracle.feeds_for(coupling, seed) for seed in range(2)]
        onnx.save(model, folder / "in.onnx")
        try:
            quantization.quantize_static(
                folder / "in.onnx", folder / "out.onnx", Reader(feeds), per_channel=per_channel,
                quant_format=quantization.QuantFormat.QDQ, **options,
            )  # fmt: skip
        finally:
            logging.disable(logging.NOTSET)
        return onnx.load(folder / "out.onnx")

    return make


@pytest.mark.parametrize("per_channel", [True, False], ids=["per_channel", "per_tensor"])
@pytest.mark.parametrize("name", ["resnet_a_no_norm", "edsr", "mobilenet_v1"])
def test_quantised_networks_prune_as_far_as_float_ones(
    quantise: Callable[..., ModelProto], name: str, per_channel: bool
) -> None:
    """Quantisation freezes nothing: the floor is the float model's, and the pruned model is proved and runs."""
    model = architectures.ALL[name]()
    quantised = quantise(model, per_channel=per_channel)
    floors = [onnxprune.inspect(each, preset="a").floor["mac"] for each in (model, quantised)]
    assert floors[1] == pytest.approx(floors[0], rel=1e-6)
    result = onnxprune.prune(quantised, target_mac=0.6)
    assert result.report.proof is not None
    assert result.report.proof.ok
    onnx.checker.check_model(result.model, full_check=True)
    types = {tensor.name: tensor.data_type for tensor in quantised.graph.initializer}
    assert all(types[tensor.name.partition("@")[0]] == tensor.data_type for tensor in result.model.graph.initializer)
    assert [node.op_type for node in result.model.graph.node] == [node.op_type for node in quantised.graph.node]
    assert onnxprune.verify(quantised, result.model, result.plan).weights == "exact"
    feeds = oracle.feeds_for(oracle.couple_proto(quantised))
    assert all(np.isfinite(value).all() for value in oracle.run(result.model, feeds))


@pytest.mark.parametrize("per_channel", [True, False], ids=["per_channel", "per_tensor"])
def test_quantised_residual_block_equals_masked(quantise: Callable[..., ModelProto], per_channel: bool) -> None:
    """A residual block as onnxruntime quantises it, biases included, equals its masked original."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input(1, 2, 6, 6), "a", 2, 6, 3))
    branch = t.conv(t.node("Relu", t.conv(y, "b", 6, 8, 3)), "c", 8, 6, 3)
    y = t.node("Relu", t.node("Add", y, branch))
    model = quantise(t.build(t.conv(y, "z", 6, 3)), per_channel=per_channel)
    pruned = assert_quantised_prunes(model)
    shapes = {tensor.name: list(tensor.dims) for tensor in pruned.model.graph.initializer}
    whole = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    assert {name.partition("_")[0] for name in whole if shapes.get(name) != whole[name]} >= {"a.w", "b.w", "c.w", "z.w"}


def test_scales_and_zero_points_are_those_of_the_schemas() -> None:
    """The table names, for every operand of weights, the inputs that the operator's schema calls after it."""
    for op, operands in OPERANDS.items():
        schema = defs.get_schema(op, 24) if defs.has(op, 24) else runtime.schema(op, "com.microsoft")
        names = [formal.name.lower() for formal in schema.inputs]
        for weight, scale, zero, _ in operands:
            stem = names[weight]
            assert scale is None or names[scale] == f"{stem}_scale", op
            assert names[zero] in (f"{stem}_zero_point", f"{stem}_zp"), op
