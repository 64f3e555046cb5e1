"""Weights that a graph computes are folded, local functions are seen through, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import FunctionProto, ModelProto, TensorProto, helper, numpy_helper

import architectures
import onnxprune
from architectures import variants
from commands import ok
from graphs import Tiny
from onnxprune.prepare import inline, prepare
from oracle import assert_close, assert_pruned, masked_reference, run

TARGET = 0.7
FOLDED = "folded into constants"
INLINED = "local functions were inlined"
Layer = Callable[[Tiny, str, str, int, int], str]


def net(*layers: Layer, batch: int | str = 1, opset: int = 17) -> ModelProto:
    """Build input -> ``layers`` ``a``, ``b``, .. with Relu (2 to 8 channels, then 8 to 8) -> Conv ``z`` -> output."""
    t = Tiny(opset=opset)
    y, channels = t.input(batch, 2, 4, 6), 2
    for name, layer in zip("abc", layers, strict=False):
        y, channels = t.node("Relu", layer(t, y, name, channels, 8)), 8
    return t.build(t.conv(y, "z", 8, 3))


def plain(t: Tiny, y: str, name: str, channels_in: int, channels: int) -> str:
    return t.conv(y, name, channels_in, channels, 3)


def image(model: ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
    """Random values for the inputs of a model."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.input:
        if value.name in {tensor.name for tensor in model.graph.initializer}:
            continue
        shape = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feeds[value.name] = np.ones(shape, bool) if dtype.kind == "b" else rng.standard_normal(shape).astype(dtype)
    return feeds


def initializers(model: ModelProto) -> dict[str, np.ndarray]:
    """Every initializer by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def operators(model: ModelProto) -> list[str]:
    """Operator of every node, in order."""
    return [node.op_type for node in model.graph.node]


def folded(model: ModelProto) -> ModelProto:
    """Prepare a model: the result is valid, computes the same, and a note says what was done."""
    prepared, notes = prepare(model)
    assert any(FOLDED in note for note in notes)
    onnx.checker.check_model(prepared, full_check=True)
    assert_close(run(prepared, image(model)), run(model, image(model)), 1e-6)
    return prepared


def assert_pruned_as_folded(model: ModelProto, target: float = TARGET) -> onnxprune.Result:
    """A model with computed weights prunes as its folded twin does, masked."""
    result = assert_pruned(model, target)
    feeds = image(model)
    assert_close(run(result.model, feeds), masked_reference(folded(model), result.plan, feeds))
    return result


# -- layers that compute their weights ---------------------------------------------------------------------------------


def _conv(t: Tiny, y: str, weight: str, name: str, channels: int) -> str:
    return t.node("Conv", y, weight, t.random(channels, name=f"{name}.b", scale=0.3), name=name, pads=[1] * 4)


def _reduced(t: Tiny, op: str, weight: str) -> str:
    """Reduce all axes but the first: by attribute, or (from opset 18 on) by an operand."""
    if t.opset < 18:
        return t.node(op, weight, axes=[1, 2, 3], keepdims=1)
    return t.node(op, weight, t.constant([1, 2, 3]), keepdims=1)


def standardised(t: Tiny, y: str, name: str, channels_in: int, channels: int) -> str:
    """Scaled weight standardisation (NFNet): subtract the mean, divide by the root of the variance, scale."""
    w = t.random(channels, channels_in, 3, 3, name=f"{name}.w", scale=0.3)
    gain = t.random(channels, 1, 1, 1, name=f"{name}.gain", offset=1.0, scale=0.2)
    centred = t.node("Sub", w, _reduced(t, "ReduceMean", w))
    variance = _reduced(t, "ReduceMean", t.node("Pow", centred, t.constant(2.0)))
    deviation = t.node("Sqrt", t.node("Add", variance, t.constant(1e-5)))
    return _conv(t, y, t.node("Mul", t.node("Div", centred, deviation), gain, name=f"{name}.computed"), name, channels)


def batch_normed(t: Tiny, y: str, name: str, channels_in: int, channels: int) -> str:
    """Weight standardisation as timm's StdConv exports it: a BatchNormalization in training mode on the reshaped weight."""
    w = t.random(channels, channels_in, 3, 3, name=f"{name}.w", scale=0.3)
    ones, zeros = (t.constant(np.full(channels, value, np.float32), f"{name}.{value}") for value in (1, 0))
    flat = t.node("Reshape", w, t.constant([1, channels, -1]))
    normed = t.node("BatchNormalization", flat, ones, zeros, zeros, ones, outputs=3, training_mode=1, epsilon=1e-6)
    back = t.node("Reshape", normed[0], t.constant([channels, channels_in, 3, 3]), name=f"{name}.computed")
    return _conv(t, y, back, name, channels)


def weight_norm(t: Tiny, y: str, name: str, channels_in: int, channels: int) -> str:
    """G v / |v|, the norm spelled out as old exporters do."""
    v = t.random(channels, channels_in, 3, 3, name=f"{name}.w", scale=0.3)
    g = t.random(channels, 1, 1, 1, name=f"{name}.g", offset=1.0, scale=0.2)
    square = t.node("ReduceSum", t.node("Pow", v, t.constant(2.0)), t.constant([1, 2, 3]), keepdims=1)
    direction = t.node("Div", v, t.node("Sqrt", square))
    return _conv(t, y, t.node("Mul", g, direction, name=f"{name}.computed"), name, channels)


def low_rank(t: Tiny, y: str, name: str, channels_in: int, channels: int) -> str:
    """W + B A (LoRA), reshaped to a kernel."""
    taps = 9 * channels_in
    update = t.node("MatMul", t.random(channels, 2, name=f"{name}.B"), t.random(2, taps, name=f"{name}.A", scale=0.1))
    whole = t.node("Add", t.random(channels, taps, name=f"{name}.w", scale=0.2), update)
    kernel = t.node("Reshape", whole, t.constant([channels, channels_in, 3, 3]), name=f"{name}.computed")
    return _conv(t, y, kernel, name, channels)


def spectral_norm(t: Tiny, y: str, name: str, channels_in: int, channels: int) -> str:
    """W / (u W v)."""
    w = t.random(channels, channels_in, 3, 3, name=f"{name}.w", scale=0.3)
    rows = t.node("Reshape", w, t.constant([channels, -1]))
    u, v = t.random(channels, name=f"{name}.u"), t.random(9 * channels_in, name=f"{name}.v")
    sigma = t.node("MatMul", u, t.node("MatMul", rows, v))
    return _conv(t, y, t.node("Div", w, sigma, name=f"{name}.computed"), name, channels)


def scaled_by_fan_in(t: Tiny, y: str, name: str, channels_in: int, channels: int) -> str:
    """Subtract the mean, and divide by the root of the fan-in, which the graph computes from the weight's shape."""
    w = t.random(channels, channels_in, 3, 3, name=f"{name}.w", scale=2.0)
    centred = t.node("Sub", w, _reduced(t, "ReduceMean", w))
    fan = t.node("ReduceProd", t.node("Slice", t.node("Shape", centred), t.constant([1]), t.constant([4])), keepdims=0)
    root = t.node("Sqrt", t.node("Cast", fan, to=TensorProto.FLOAT))
    return _conv(t, y, t.node("Div", centred, root, name=f"{name}.computed"), name, channels)


def merged_kernels(t: Tiny, y: str, name: str, channels_in: int, channels: int) -> str:
    """Two kernels convolved with each other (ACNet, ECB)."""
    w = t.random(channels, channels, 3, 3, name=f"{name}.w", scale=0.3)
    point = t.random(channels, channels_in, 1, 1, name=f"{name}.p", scale=0.5)
    whole = t.node("Conv", w, t.node("Transpose", point, perm=[1, 0, 2, 3]), name=f"{name}.computed")
    return _conv(t, y, whole, name, channels)


COMPUTED = [standardised, batch_normed, weight_norm, low_rank, spectral_norm, scaled_by_fan_in, merged_kernels]
computed = pytest.mark.parametrize("layer", COMPUTED, ids=lambda layer: layer.__name__)


@computed
def test_folding_leaves_the_weight_alone(layer: Layer) -> None:
    """Of all that computed a weight nothing is left but the weight, under the name that its reader knows, to the bit."""
    model = net(layer, layer)
    prepared = folded(model)
    assert operators(prepared) == ["Conv", "Relu", "Conv", "Relu", "Conv"]
    assert initializers(prepared).keys() == {"a.computed", "a.b", "b.computed", "b.b", "z.w", "z.b"}
    for name in ("a.computed", "b.computed"):
        probe = ModelProto()
        probe.CopyFrom(model)
        del probe.graph.output[:]
        probe.graph.output.append(onnx.ValueInfoProto(name=name))
        assert np.array_equal(run(probe, image(model))[0], initializers(prepared)[name])


@computed
@pytest.mark.parametrize("target", [0.6, 0.4])
def test_computed_weights_prune_on_both_axes(layer: Layer, target: float) -> None:
    """Input and output channels of computed weights go, and those that stay are what they were."""
    model = net(layer, layer, plain)
    result = assert_pruned_as_folded(model, target)
    after, before = initializers(result.model), initializers(folded(model))
    assert after["b.computed"].shape[1] == after["a.computed"].shape[0]
    assert after["b.computed"].shape != before["b.computed"].shape
    kept = {0: range(8), 1: range(8), **result.plan.initializers["b.computed"]}
    assert np.array_equal(after["b.computed"], before["b.computed"].take(kept[0], 0).take(kept[1], 1))


def test_shapes_that_the_file_declares_follow() -> None:
    """Declared shapes of a folded weight and of what computed it do not contradict the pruned model."""
    model = onnx.shape_inference.infer_shapes(net(standardised, batch_normed))
    assert model.graph.value_info
    result = assert_pruned_as_folded(model)
    weights = initializers(result.model)
    declared = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in result.model.graph.value_info
    }
    assert {name: list(weights[name].shape) for name in weights.keys() & declared} == {
        name: declared[name] for name in weights.keys() & declared
    }


def shared_raw_weight(second: str) -> ModelProto:
    """Centre ``w`` for Conv ``b``; read it raw, too: by Conv ``c``, by a Shape, or by other arithmetic for Conv ``c``."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input(1, 2, 4, 6), "a", 2, 8, 3))
    w = t.random(8, 8, 3, 3, name="w", scale=0.2)
    weight = t.node("Sub", w, t.node("ReduceMean", w, axes=[1, 2, 3], keepdims=1), name="b.computed")
    y = t.node("Relu", t.node("Conv", y, weight, name="b", pads=[1] * 4))
    if second == "Conv":
        y = t.node("Relu", t.node("Conv", y, w, name="c", pads=[1] * 4))
    elif second == "Sub":
        other = t.node("Sub", w, t.node("ReduceMax", w, axes=[1, 2, 3], keepdims=1), name="c.computed")
        y = t.node("Relu", t.node("Conv", y, other, name="c", pads=[1] * 4))
    else:
        y = t.node("Mul", y, t.node("Cast", t.node("ReduceMax", t.node("Shape", w)), to=TensorProto.FLOAT))
    return t.build(t.conv(y, "z", 8, 3))


@pytest.mark.parametrize(("second", "stays"), [("Conv", True), ("Sub", False), ("Shape", True)])
def test_raw_weight_stays_for_its_other_readers(second: str, stays: bool) -> None:
    """A weight that is read raw as well keeps its own tensor, and both readers see what they saw."""
    model = shared_raw_weight(second)
    assert ("w" in initializers(folded(model))) == stays
    assert_pruned_as_folded(model, 0.8)


def test_weight_from_mixed_sources_is_not_folded() -> None:
    """A weight that depends on the input (dynamic convolution) is no constant."""
    t = Tiny()
    x = t.input(1, 2, 4, 6)
    y = t.node("Relu", t.conv(x, "a", 2, 8, 3))
    w = t.random(8, 8, 1, 1, name="w")
    gate = t.node("ReduceMean", x, axes=[0, 1, 2, 3], keepdims=1)
    weight = t.node("Mul", t.node("Softmax", t.node("Mul", w, gate), axis=1), t.constant(2.0))
    model = t.build(t.conv(t.node("Conv", y, weight, name="b"), "z", 8, 3))
    assert prepare(model)[0] is model


@pytest.mark.parametrize("output", ["b.computed", "b.centre"])
def test_computed_weight_that_is_an_output(output: str) -> None:
    """An output of the graph that is a computed weight, or a part of one, stays an output of the same value."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input(1, 2, 4, 6), "a", 2, 8, 3))
    w = t.random(8, 8, 3, 3, name="w", scale=0.2)
    weight = t.node("Sub", w, t.node("ReduceMean", w, axes=[1, 2, 3], keepdims=1, name="b.centre"), name="b.computed")
    y = t.node("Relu", t.node("Conv", y, weight, name="b", pads=[1] * 4))
    y = t.node("Relu", t.conv(y, "c", 8, 8, 3))
    model = t.build(t.conv(y, "z", 8, 3), output)
    result = assert_pruned_as_folded(model, 0.95)
    assert list(result.model.graph.output) == list(model.graph.output)
    assert np.array_equal(run(result.model, image(model))[1], run(model, image(model))[1])


def test_branch_that_reads_a_computed_weight() -> None:
    """A weight computed outside and read by a branch of an If is folded for it."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input(1, 2, 4, 6), "a", 2, 8, 3))
    t.input(name="flag", kind=TensorProto.BOOL)
    w = t.random(8, 8, 3, 3, name="w", scale=0.2)
    weight = t.node("Sub", w, t.node("ReduceMean", w, axes=[1, 2, 3], keepdims=1), name="b.computed")
    bodies = []
    for op in ("Relu", "Tanh"):
        nodes = [
            helper.make_node("Conv", [y, weight], [f"{op}.c"], pads=[1] * 4),
            helper.make_node(op, [f"{op}.c"], [f"{op}.y"]),
        ]
        output = helper.make_tensor_value_info(f"{op}.y", TensorProto.FLOAT, (1, 8, 4, 6))
        bodies.append(helper.make_graph(nodes, op, [], [output]))
    y = t.node("If", "flag", then_branch=bodies[0], else_branch=bodies[1], name="if")
    model = t.build(t.conv(y, "z", 8, 3))
    folded(model)
    result = assert_pruned(model)
    assert initializers(result.model)["b.computed"].shape != (8, 8, 3, 3)


# -- the same network written differently ------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [standardised, batch_normed, low_rank], ids=lambda layer: layer.__name__)
def test_initializers_among_the_inputs(layer: Layer) -> None:
    """An IR 3 model lists its initializers as inputs: folded and pruned, it lists exactly those that it then has."""
    model = variants.initializers_as_inputs(net(layer, layer))
    prepared = folded(model)
    result = assert_pruned_as_folded(model)
    for each in (prepared, result.model):
        listed = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in each.graph.input}
        assert listed.pop("x") == [1, 2, 4, 6]
        assert listed == {name: list(array.shape) for name, array in initializers(each).items()}


@pytest.mark.parametrize("layer", COMPUTED, ids=lambda layer: layer.__name__)
def test_weights_in_constant_nodes(layer: Layer) -> None:
    """Constant nodes are as good as initializers: both forms of a model keep the same channels."""
    model = net(layer, layer)
    results = [assert_pruned_as_folded(each) for each in (model, variants.constants_as_nodes(model))]
    assert results[0].plan.initializers == results[1].plan.initializers
    feeds = image(model)
    assert_close(run(results[1].model, feeds), run(results[0].model, feeds), 0)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("layer", [standardised, weight_norm, low_rank], ids=lambda layer: layer.__name__)
def test_folded_weights_keep_their_type(layer: Layer, kind: str) -> None:
    """A folded weight has the type of what it was computed from, whatever onnxruntime has kernels for."""
    dtype = np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(kind, kind))
    model = net(layer, layer, opset=22)
    single = prepare(model)[0]
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(dtype)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    onnx.checker.check_model(model, full_check=True)
    prepared, _ = prepare(model)
    onnx.checker.check_model(prepared, full_check=True)
    assert {array.dtype for array in initializers(prepared).values()} == {dtype}
    for name, array in initializers(single).items():
        assert np.allclose(initializers(prepared)[name].astype(np.float32), array, atol=0.03)
    result = assert_pruned(model)
    assert {array.dtype for array in initializers(result.model).values()} == {dtype}


# -- what is none of folding's business --------------------------------------------------------------------------------


def shape_arithmetic(t: Tiny, y: str, name: str, channels_in: int, channels: int) -> str:
    """Flatten and restore with computed targets, some of them by way of floats."""
    shape = t.node("Shape", y)
    ends = [t.node("Gather", shape, t.constant([index]), axis=0) for index in range(4)]
    space = t.node("ReduceProd", t.node("Concat", *ends[2:], axis=0), axes=[0], keepdims=1)
    y = t.node("Reshape", y, t.node("Concat", *ends[:2], space, axis=0))
    floats = t.node("Mul", t.node("Cast", shape, to=TensorProto.FLOAT), t.constant(1.0))
    y = t.node("Reshape", y, t.node("Cast", floats, to=TensorProto.INT64))
    return t.conv(y, name, channels_in, channels, 3)


def integer_tables(t: Tiny, y: str, name: str, channels_in: int, channels: int) -> str:
    """Integers added up from integer constants say which channels follow which."""
    steps = t.constant(np.ones(channels_in, np.int64))
    order = t.node("Sub", t.node("CumSum", steps, t.constant(0)), steps)
    return t.conv(t.node("Gather", y, order, axis=1), name, channels_in, channels, 3)


def float_scales(t: Tiny, y: str, name: str, channels_in: int, channels: int) -> str:
    """Resize by a vector of floats that is put together from two."""
    scales = t.node("Concat", t.constant([1.0, 1.0]), t.constant([2.0, 2.0]), axis=0)
    return t.conv(t.node("Resize", y, "", scales), name, channels_in, channels, 3)


def fake_quantised(t: Tiny, y: str, name: str, channels_in: int, channels: int) -> str:
    """Round the weight to eight bits (quantisation-aware training): engines need these nodes."""
    w = t.random(channels, channels_in, 3, 3, name=f"{name}.w", scale=0.2)
    scale = t.constant(np.linspace(0.004, 0.008, channels, dtype=np.float32))
    zero = t.constant(np.zeros(channels, np.int8))
    w = t.node("DequantizeLinear", t.node("QuantizeLinear", w, scale, zero, axis=0), scale, zero, axis=0)
    return _conv(t, y, w, name, channels)


def added_kernels(t: Tiny, y: str, name: str, channels_in: int, channels: int) -> str:
    """Add a padded 1x1 kernel to a 3x3 one (RepVGG): channels stay apart."""
    point = t.random(channels, channels_in, 1, 1, name=f"{name}.p")
    padded = t.node("Pad", point, t.constant([0, 0, 1, 1, 0, 0, 1, 1]))
    w = t.node("Add", t.random(channels, channels_in, 3, 3, name=f"{name}.w", scale=0.2), padded)
    return _conv(t, y, w, name, channels)


def stored_in_half(t: Tiny, y: str, name: str, channels_in: int, channels: int) -> str:
    """Store the weight in 16 bits, cast it, and transpose it."""
    w = t.rng.standard_normal((channels_in, channels, 3, 3)).astype(np.float16)
    cast = t.node("Cast", t.constant(w, f"{name}.w"), to=TensorProto.FLOAT)
    return _conv(t, y, t.node("Transpose", cast, perm=[1, 0, 2, 3]), name, channels)


def positions(t: Tiny, y: str, name: str, channels_in: int, channels: int) -> str:
    """Add a ramp over the width, made by a Range of scalars."""
    ramp = t.node("Range", t.constant(0.0), t.constant(6.0), t.constant(1.0))
    return t.conv(t.node("Add", y, ramp), name, channels_in, channels, 3)


UNTOUCHED = [shape_arithmetic, integer_tables, float_scales, fake_quantised, added_kernels, stored_in_half, positions]


@pytest.mark.parametrize("layer", UNTOUCHED, ids=lambda layer: layer.__name__)
def test_only_what_mixes_channels_is_folded(layer: Layer) -> None:
    """Integers, shapes, scales, quantisation and whatever moves channels as they are stay in the graph."""
    model = net(plain, layer)
    assert prepare(model) == (model, ())
    assert prepare(model)[0] is model
    result = assert_pruned(model, 0.8)
    assert set(operators(result.model)) <= set(operators(model))


@pytest.mark.parametrize("layer", UNTOUCHED[:3], ids=lambda layer: layer.__name__)
def test_folding_passes_the_rest_by(layer: Layer) -> None:
    """Beside a weight that is folded, shape arithmetic stays node by node."""
    model = net(plain, layer, standardised)
    before = [node for node in net(plain, layer).graph.node if not node.name.startswith(("z", "relu"))]
    after = list(folded(model).graph.node)
    assert [node for node in before if node not in after] == []
    assert_pruned_as_folded(model)


def test_dead_nodes_that_read_weights_stay() -> None:
    """What nobody reads in the original is not tidied up, whatever it reads."""
    t = Tiny()
    y = t.node("Relu", standardised(t, t.input(1, 2, 4, 6), "a", 2, 8))
    t.node("ReduceMax", "a.computed", name="dead")
    t.node("Neg", "a.w", name="dead_too")
    prepared = folded(t.build(t.conv(y, "z", 8, 3)))
    assert {"dead", "dead_too"} <= {node.name for node in prepared.graph.node}
    assert {"a.w", "a.computed"} <= initializers(prepared).keys()


def test_dead_node_that_reads_half_of_what_is_folded() -> None:
    """Where a computed weight is cut in two, and only a dead node reads the one half, the graph stays whole."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input(1, 2, 4, 6), "a", 2, 8, 3))
    w = t.random(16, 8, 3, 3, name="w", scale=0.2)
    centred = t.node("Sub", w, t.node("ReduceMean", w, axes=[1, 2, 3], keepdims=1))
    first, second = t.node("Split", centred, name="half", outputs=2)
    t.node("Neg", second, name="dead")
    y = t.node("Relu", t.node("Conv", y, first, name="b", pads=[1] * 4))
    model = t.build(t.conv(y, "z", 8, 3))
    assert "dead" in {node.name for node in folded(model).graph.node}
    assert_pruned_as_folded(model)


def test_foreign_operator_on_a_weight() -> None:
    """Where somebody's own operator computes a weight, nothing is run: the model can be looked at all the same."""
    t = Tiny(domains=("acme",))
    y = t.node("Relu", t.conv(t.input(1, 2, 4, 6), "a", 2, 8, 3))
    w = t.node("Quant", t.random(8, 8, 3, 3, name="w"), domain="acme", name="q")
    t.conv(t.node("Conv", y, w, name="b", pads=[1] * 4), "z", 8, 3)
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, (1, 3, 4, 6))
    graph = helper.make_graph(t.nodes, "foreign", t.inputs, [output], t.initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("acme", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    assert prepare(model)[0] is model
    assert any("no rule for operator acme::Quant" in row.reason for row in onnxprune.inspect(model).frozen)


@pytest.mark.parametrize("name", ["edsr", "resnet_a", "mobilenet_v2", "squeeze_excite_gemm", "layer_norm_mlp"])
def test_ordinary_networks_are_not_touched(name: str) -> None:
    """Where nothing is to do, the model itself comes back, without a note."""
    model = architectures.ALL[name]()
    prepared, notes = prepare(inline(model))
    assert prepared is model
    assert notes == ()


# -- through the whole program -----------------------------------------------------------------------------------------


def test_plan_fits_a_sibling() -> None:
    """A plan replays on a network with other weights: its own are folded, and keep the same channels."""
    model, sibling = net(standardised, batch_normed), net(standardised, batch_normed)
    for tensor in sibling.graph.initializer:
        if tensor.name.endswith(".w"):
            tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor)[::-1].copy(), tensor.name))
    plan = onnxprune.prune(model, target_mac=TARGET).plan
    replayed = onnxprune.apply(sibling, plan)
    feeds = image(sibling)
    assert_close(run(replayed.model, feeds), masked_reference(folded(sibling), plan, feeds))
    with pytest.raises(AssertionError):
        assert_close(run(replayed.model, feeds), run(onnxprune.prune(model, target_mac=TARGET).model, feeds))


def test_verify_notices_another_weight_and_another_structure() -> None:
    """A pruned model whose computed weights were trained on is verified as changed; one with a channel more is refused."""
    model = net(standardised, batch_normed)
    result = onnxprune.prune(model, target_mac=TARGET)
    trained = ModelProto()
    trained.CopyFrom(result.model)
    tensor = next(tensor for tensor in trained.graph.initializer if tensor.name == "b.computed")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.1), tensor.name))
    assert onnxprune.verify(model, trained, result.plan).weights == "changed"
    with pytest.raises(onnxprune.ProofError):
        onnxprune.verify(model, model, result.plan)


def test_same_bytes_every_time() -> None:
    """Folding is deterministic."""
    first, second = (onnxprune.prune(net(standardised, low_rank), target_mac=TARGET).model for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_command_line(tmp_path: Path) -> None:
    """prune, verify, apply and evaluate take a model with computed weights; the summary says what was folded."""
    paths = {name: tmp_path / f"{name}.onnx" for name in ("in", "out", "again", "same")}
    plan, data = tmp_path / "plan.json", tmp_path / "data.npz"
    model = net(standardised, batch_normed, batch="N")
    onnx.save(model, paths["in"])
    rng = np.random.default_rng(0)
    np.savez(
        data,
        x=rng.standard_normal((3, 2, 4, 6)).astype(np.float32),
        target=rng.standard_normal((3, 3, 4, 6), np.float32),
    )
    said = ok(paths["in"], paths["out"], "--target-mac", TARGET, "--plan-out", plan, "--no-latency")
    assert FOLDED in said.stdout.replace("\n", " ")
    ok("verify", paths["in"], paths["out"], "--plan", plan)
    ok("apply", paths["in"], paths["again"], "--plan", plan)
    assert paths["again"].read_bytes() == paths["out"].read_bytes()
    for name in ("in", "out"):
        assert "mse" in ok("evaluate", paths[name], "--data", data, "--metric", "mse").stdout
    ok(paths["in"], paths["same"], "--target-mac", 1.0, "--no-latency")
    assert paths["same"].read_bytes() == paths["in"].read_bytes()


# -- functions ---------------------------------------------------------------------------------------------------------


def function(
    name: str, inputs: str, outputs: str, *nodes: onnx.NodeProto, domain: str = "local", attributes: Sequence[str] = ()
) -> FunctionProto:
    """Make a function; inputs and outputs are names with blanks between them."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_function(domain, name, inputs.split(), outputs.split(), list(nodes), opsets, list(attributes))


def calling(t: Tiny, *functions: FunctionProto, outputs: Sequence[str] = ("z",)) -> ModelProto:
    """Build a model of ``t`` with functions; every output is (1, 3, 4, 6)."""
    declared = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 3, 4, 6)) for name in outputs]
    graph = helper.make_graph(t.nodes, "calls", t.inputs, declared, t.initializers)
    domains = dict.fromkeys(each.domain for each in functions)
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, ir_version=8, opset_imports=opsets, functions=list(functions))


def begin() -> tuple[Tiny, str]:
    """Begin a graph with Conv ``a`` (8 channels) and a Relu."""
    t = Tiny()
    return t, t.node("Relu", t.conv(t.input(1, 2, 4, 6), "a", 2, 8, 3))


def constant(name: str, *shape: int, seed: int = 0) -> onnx.NodeProto:
    """Make a Constant node with random weights."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.3
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values, name))


def assert_function_pruned(model: ModelProto, target: float = 0.6) -> onnxprune.Result:
    """A model with functions prunes as its inlined twin does, masked."""
    result = assert_pruned(model, target)
    feeds = image(model)
    twin = onnx.inliner.inline_local_functions(model)
    assert_close(run(result.model, feeds), masked_reference(twin, result.plan, feeds))
    return result


SILU = function("silu", "x", "y", helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", ["x", "s"], ["y"]))
CONV = function(
    "conv",
    "x w b",
    "y",
    helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1] * 4),
    helper.make_node("Relu", ["c"], ["y"]),
)


def activations() -> ModelProto:
    """Call one activation at three widths."""
    t, y = begin()
    for name, channels_in, channels in (("b", 8, 8), ("c", 8, 6), ("d", 6, 4)):
        y = t.node("silu", t.conv(y, name, channels_in, channels, 3), domain="local")
    t.conv(y, "z", 4, 3)
    return calling(t, SILU)


def weights_as_arguments() -> ModelProto:
    """Call a function that convolves with the weights it is given, with and without bias, at two widths."""
    t, y = begin()
    y = t.node("conv", y, t.random(8, 8, 3, 3, name="b.w", scale=0.2), t.random(8, name="b.b"), domain="local")
    y = t.node("conv", y, t.random(6, 8, 3, 3, name="c.w", scale=0.2), domain="local")
    t.conv(y, "z", 6, 3)
    return calling(t, CONV)


def nested() -> ModelProto:
    """Call a function that calls another."""
    inner = helper.make_node("silu", ["c"], ["y"], domain="local")
    outer = function("outer", "x w", "y", helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4), inner)
    t, y = begin()
    for name in "bc":
        y = t.node("outer", y, t.random(8, 8, 3, 3, name=f"{name}.w", scale=0.2), domain="local")
    t.conv(y, "z", 8, 3)
    return calling(t, SILU, outer)


def two_domains() -> ModelProto:
    """Call two functions of one name; the other's name is that of a standard operator, too."""
    other = function("silu", "x", "y", helper.make_node("Tanh", ["x"], ["y"]), domain="other")
    t, y = begin()
    y = t.node("silu", t.conv(y, "b", 8, 8, 3), domain="local")
    y = t.node("silu", t.conv(y, "c", 8, 8, 3), domain="other")
    t.conv(y, "z", 8, 3)
    return calling(t, SILU, other)


def attribute_by_reference() -> ModelProto:
    """Call a function that hands an attribute on, with two values of it."""
    leaky = helper.make_node("LeakyRelu", ["x"], ["y"])
    leaky.attribute.add(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    t, y = begin()
    for name, slope in (("b", 0.3), ("c", 0.01)):
        y = t.node("leaky", t.conv(y, name, 8, 8, 3), domain="local", slope=slope)
    t.conv(y, "z", 8, 3)
    return calling(t, function("leaky", "x", "y", leaky, attributes=["slope"]))


def several_outputs() -> ModelProto:
    """Call a function with two outputs."""
    both = function("both", "x", "y s", *SILU.node)
    t, y = begin()
    t.conv(t.node("Add", *t.node("both", t.conv(y, "b", 8, 8, 3), domain="local", outputs=2)), "z", 8, 3)
    return calling(t, both)


def branches_inside() -> ModelProto:
    """Call a function that holds an If."""
    bodies = [
        helper.make_graph([helper.make_node(op, ["x"], [op])], op, [], [helper.make_tensor_value_info(op, 1, None)])
        for op in ("Relu", "Tanh")
    ]
    choice = helper.make_node("If", ["c"], ["y"], then_branch=bodies[0], else_branch=bodies[1])
    t, y = begin()
    t.input(name="flag", kind=TensorProto.BOOL)
    t.conv(t.node("choose", t.conv(y, "b", 8, 8, 3), "flag", domain="local"), "z", 8, 3)
    return calling(t, function("choose", "x c", "y", choice))


def call_is_the_output() -> ModelProto:
    """End with a call."""
    t, y = begin()
    t.node("silu", t.conv(t.conv(y, "b", 8, 8, 3), "c", 8, 3), name="z", domain="local")
    return calling(t, SILU)


KEPT = [
    activations,
    weights_as_arguments,
    nested,
    two_domains,
    attribute_by_reference,
    several_outputs,
    call_is_the_output,
]


@pytest.mark.parametrize("build", KEPT, ids=lambda build: build.__name__)
def test_calls_stay_where_bodies_do_not_change(build: Callable[[], ModelProto]) -> None:
    """Functions and their calls are kept as they are, however many widths they are called with."""
    model = build()
    result = assert_function_pruned(model)
    assert list(result.model.functions) == list(model.functions)
    assert list(result.model.graph.node) == list(model.graph.node)
    assert not any(INLINED in note for note in result.report.notes)


def test_function_around_an_if() -> None:
    """A function that holds an If is kept, and channels pass through both branches."""
    model = branches_inside()
    result = assert_pruned(model, 0.6)
    assert list(result.model.functions) == list(model.functions)
    assert initializers(result.model)["b.w"].shape[0] < 8
    for flag, op in ((True, "Relu"), (False, "Tanh")):
        t, y = begin()
        twin = t.build(t.conv(t.node(op, t.conv(y, "b", 8, 8, 3)), "z", 8, 3))
        feeds = image(twin)
        have = run(result.model, feeds | {"flag": np.array(flag)})
        assert_close(have, masked_reference(twin, result.plan, feeds))


def call_in_a_branch(name: str, *functions: FunctionProto) -> ModelProto:
    """Convolve and call a function in one branch, and convolve alone in the other."""
    t, y = begin()
    t.input(name="flag", kind=TensorProto.BOOL)
    bodies = []
    for label, op, domain in (("q", name, "local"), ("r", "Tanh", "")):
        inner = Tiny(seed=ord(label))
        inner.node(op, inner.conv(y, f"{label}.conv", 8, 8, 3), name=label, domain=domain)
        output = helper.make_tensor_value_info(label, TensorProto.FLOAT, (1, 8, 4, 6))
        bodies.append(helper.make_graph(inner.nodes, label, [], [output], inner.initializers))
    t.conv(t.node("If", "flag", then_branch=bodies[0], else_branch=bodies[1]), "z", 8, 3)
    return calling(t, *functions)


@pytest.mark.parametrize("inside", [False, True], ids=["activation", "weights_inside"])
def test_function_that_only_a_branch_calls(inside: bool) -> None:
    """It is inlined for the analysis as others are, and in the result where what it holds shrinks."""
    model = call_in_a_branch("block", *weights_inside(1).functions) if inside else call_in_a_branch("silu", SILU)
    result = assert_pruned(model, 0.5)
    assert list(result.model.functions) == ([] if inside else list(model.functions))
    plan, plain = result.plan.initializers, inline(model)
    assert {"q.conv.w", "r.conv.w", "a.w"} <= plan.keys()
    assert any(name.startswith("w__") for name in plan) == inside
    for flag in (True, False):
        feeds = image(model) | {"flag": np.array(flag)}
        assert_close(run(result.model, feeds), masked_reference(plain, result.plan, feeds))


def test_unused_function_stays() -> None:
    """A function that nobody calls is handed on."""
    t, y = begin()
    t.conv(t.conv(y, "b", 8, 8, 3), "z", 8, 3)
    model = calling(t, SILU)
    assert inline(model) is model
    assert list(assert_function_pruned(model).model.functions) == [SILU]


def weights_inside(calls: int) -> ModelProto:
    """Call a function that holds the weights of its convolution."""
    body = function(
        "block", "x", "y", constant("w", 8, 8, 3, 3), constant("b", 8),
        helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1] * 4), helper.make_node("Relu", ["c"], ["y"]),
    )  # fmt: skip
    t, y = begin()
    for _ in range(calls):
        y = t.node("block", y, domain="local")
    t.conv(y, "z", 8, 3)
    return calling(t, body)


def views() -> ModelProto:
    """Call functions that reshape to the sizes they hold."""
    there, back = (
        function(
            name, "x", "y", helper.make_node("Constant", [], ["s"], value_ints=shape),
            helper.make_node("Reshape", ["x", "s"], ["y"]),
        )
        for name, shape in (("there", [1, 8, 24]), ("back", [1, 8, 4, 6]))
    )  # fmt: skip
    t, y = begin()
    y = t.node("there", t.conv(y, "b", 8, 8, 3), domain="local")
    t.conv(t.node("back", t.node("Relu", y), domain="local"), "z", 8, 3)
    return calling(t, there, back)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: weights_inside(1), id="weights_called_once"),
        pytest.param(lambda: weights_inside(2), id="weights_called_twice"),
        pytest.param(views, id="reshape_targets"),
    ],
)
def test_functions_whose_bodies_change_are_inlined(build: Callable[[], ModelProto]) -> None:
    """Where what a function holds must shrink, each call gets a body of its own, and a note says so."""
    result = assert_function_pruned(build())
    assert not result.model.functions
    assert any(INLINED in note for note in result.report.notes)


def test_two_calls_may_keep_different_channels() -> None:
    """Bodies of two calls of one function are free to shrink each in its own way."""
    result = assert_function_pruned(weights_inside(2), 0.5)
    kept = [slices[0] for name, slices in result.plan.initializers.items() if name.startswith("w__")]
    assert len(kept) == 2
    assert kept[0] != kept[1]


def depthwise_by_function(last: str) -> ModelProto:
    """Call a function whose last node is a depthwise convolution, or one before."""
    nodes = [helper.make_node("Conv", ["x", "w"], ["y" if last == "Conv" else "c"], group=8)]
    if last != "Conv":
        nodes.append(helper.make_node(last, ["c"], ["y"]))
    t, y = begin()
    y = t.node("depthwise", t.conv(y, "b", 8, 8, 3), t.random(8, 1, 1, 1, name="dw.w"), domain="local")
    t.conv(y, "z", 8, 3)
    return calling(t, function("depthwise", "x w", "y", *nodes))


def view_of_arguments() -> ModelProto:
    """Call a function that reshapes its second argument to its first."""
    t, y = begin()
    y = t.node("view", t.constant([1, 8, 24], name="there"), t.conv(y, "b", 8, 8, 3), domain="local")
    t.conv(t.node("view", t.constant([1, 8, 4, 6], name="back"), t.node("Relu", y), domain="local"), "z", 8, 3)
    return calling(t, function("view", "s x", "y", helper.make_node("Reshape", ["x", "s"], ["y"])))


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: depthwise_by_function("Relu"), id="attribute_of_an_inner_node"),
        pytest.param(lambda: depthwise_by_function("Conv"), id="attribute_of_the_last_node"),
        pytest.param(view_of_arguments, id="operand_of_the_last_node"),
    ],
)
def test_edits_of_a_body_are_not_made_at_its_call(build: Callable[[], ModelProto]) -> None:
    """What the last node of a body needs (a group attribute, a target) is not written to the node that calls it."""
    assert_function_pruned(build())


def test_standardisation_inside_a_function() -> None:
    """A function that standardises a weight is inlined, and the weight folded."""
    centre = function(
        "centre",
        "w",
        "y",
        helper.make_node("ReduceMean", ["w"], ["m"], axes=[1, 2, 3]),
        helper.make_node("Sub", ["w", "m"], ["y"]),
    )
    t, y = begin()
    weight = t.node("centre", t.random(8, 8, 3, 3, name="w", scale=0.2), domain="local")
    t.conv(t.node("Relu", t.node("Conv", y, weight, name="b", pads=[1] * 4)), "z", 8, 3)
    model = calling(t, centre)
    result = assert_pruned(model)
    assert any(FOLDED in note for note in result.report.notes)
    feeds = image(model)
    assert_close(run(result.model, feeds), masked_reference(prepare(inline(model))[0], result.plan, feeds))


def test_function_named_like_an_operator() -> None:
    """A function called Relu that is a softmax over channels freezes them: names of another domain mean nothing."""
    t, y = begin()
    y = t.node("Relu", t.conv(y, "b", 8, 8, 3), domain="local")
    t.conv(t.node("Tanh", t.conv(y, "c", 8, 8, 3)), "z", 8, 3)
    model = calling(t, function("Relu", "x", "y", helper.make_node("Softmax", ["x"], ["y"], axis=1)))
    result = assert_function_pruned(model)
    assert 0 not in result.plan.initializers["b.w"]
    assert 0 in result.plan.initializers["c.w"]


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: net(standardised, plain), id="computed_weights"),
        pytest.param(lambda: weights_inside(1), id="functions"),
    ],
)
def test_nothing_removed_means_nothing_changed(build: Callable[[], ModelProto]) -> None:
    """Where the target is met already, the model is handed back as it was given, and no note says otherwise."""
    model = build()
    result = onnxprune.prune(model, target_mac=1.0)
    assert result.model == model
    assert result.report.notes == ("the model already meets the target; nothing was removed",)
