"""Models in other floating-point types are pruned and proved as they are; what is no float is not touched."""

from __future__ import annotations

import json
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import architectures
import onnxprune
from architectures import variants
from graphs import KINDS, Tiny, in_type
from onnxprune.protos import is_float
from oracle import assert_close, constants_of, masked_reference, run, sliced

OTHERS = (TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.FLOAT16)
NETWORKS = [
    "edsr",
    "resnet_a",
    "mobilenet_v2",
    "densenet",
    "unet_transposed",
    "unet_resize",
    "layer_norm_mlp",
    "audio_1d",
]
Layer = Callable[[Tiny, str], str]


def in_single(model: ModelProto) -> ModelProto:
    """Convert back to float32, which onnxruntime has kernels for."""
    single = ModelProto()
    single.CopyFrom(model)
    for value in (*single.graph.input, *single.graph.output, *single.graph.value_info):
        if value.type.tensor_type.elem_type in OTHERS:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    tensors = [*single.graph.initializer]
    tensors += [a.t for node in single.graph.node for a in node.attribute if a.HasField("t")]
    for tensor in tensors:
        array = numpy_helper.to_array(tensor)
        if is_float(array.dtype):
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
    stored = {tensor.name for tensor in single.graph.initializer}
    for node in single.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i in OTHERS:
                attribute.i = TensorProto.FLOAT
        if node.op_type == "Cast" and node.input[0] in stored:
            node.op_type = "Identity"  # which the masked reference looks through
            del node.attribute[:]
    return single


def image(model: ModelProto) -> dict[str, np.ndarray]:
    """Random values for a model's inputs."""
    rng = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.input:
        shape = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feeds[value.name] = (rng.standard_normal(shape) if is_float(dtype) else rng.integers(0, 2, shape)).astype(dtype)
    return feeds


def assert_pruned(model: ModelProto, target: float = 0.7) -> onnxprune.Result:
    """The model prunes, is proved, verified and replayed; every tensor keeps its type; integers stay byte for byte."""
    onnx.checker.check_model(model, full_check=True)
    result = onnxprune.prune(model, target_mac=target)
    onnx.checker.check_model(result.model, full_check=True)
    assert result.report.proof is not None
    assert result.report.proof.ok
    assert result.report.proof.insensitive == ()
    assert result.report.target is not None
    assert result.report.target.achieved <= target
    plan = onnxprune.Plan.from_json(json.dumps(result.plan.to_json()))
    assert onnxprune.apply(model, plan).model == result.model
    assert onnxprune.verify(model, result.model, plan).weights == "exact"
    before, after = dict(constants_of(model)), dict(constants_of(result.model))
    for name, array in after.items():
        whole = before[name.partition("@")[0]]
        assert array.dtype == whole.dtype
        if is_float(array.dtype):
            wanted = sliced(whole, result.plan.initializers.get(name, {}))
            assert array.shape == wanted.shape
            assert array.tobytes() == np.ascontiguousarray(wanted).tobytes()
    for part in ("input", "output"):
        assert list(getattr(result.model.graph, part)) == list(getattr(model.graph, part))
    return result


def assert_equals_masked(model: ModelProto, result: onnxprune.Result, tolerance: float) -> None:
    """The pruned model, in float32 with the very values it holds, equals the masked original."""
    feeds = image(in_single(model))
    assert_close(run(in_single(result.model), feeds), masked_reference(in_single(model), result.plan, feeds), tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_other_types(name: str, kind: str) -> None:
    """Networks of any floating-point type prune and are proved; values that stay are the same to the bit."""
    model = architectures.ALL[name]()
    if kind == "bfloat16":
        model = variants.to_opset(model, 22)
    model = in_type(model, kind)
    result = assert_pruned(model)
    if name != "layer_norm_mlp":  # whose statistics run over what is left
        assert_equals_masked(model, result, 1e-4)


@pytest.mark.parametrize("name", ["edsr", "mobilenet_v2"])
def test_half_precision_runs_as_it_is(name: str) -> None:
    """A float16 model, run in float16, is as close to the masked original as float16 can be."""
    model = in_type(architectures.ALL[name](), "float16")
    result = assert_pruned(model)
    feeds = image(model)
    have, want = run(result.model, feeds), masked_reference(model, result.plan, feeds)
    assert {value.dtype for value in have} == {np.dtype(np.float16)}
    assert_close([value.astype(np.float32) for value in have], [value.astype(np.float32) for value in want], 0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_constant_nodes(kind: str) -> None:
    """Constant nodes hold 16 and 64 bit weights, too."""
    model = architectures.ALL["edsr"]()
    if kind == "bfloat16":
        model = variants.to_opset(model, 22)
    model = in_type(variants.constants_as_nodes(model), kind)
    assert_equals_masked(model, assert_pruned(model), 1e-4)


def test_same_channels_in_every_type() -> None:
    """The type does not decide what goes: the plans of a network agree in all types that hold its weights exactly."""
    model = variants.to_opset(architectures.ALL["edsr"](), 22)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            rounded = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16).astype(np.float16).astype(np.float32)
            rounded = rounded.astype(ml_dtypes.bfloat16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    plans = [onnxprune.prune(model, target_mac=0.7).plan.initializers]
    plans += [
        onnxprune.prune(in_type(model, kind), target_mac=0.7).plan.initializers for kind in ("bfloat16", "float64")
    ]
    assert plans[0] == plans[1] == plans[2]


# -- several types in one model ----------------------------------------------------------------------------------------


def begin(kind: int = TensorProto.FLOAT, opset: int = 22) -> tuple[Tiny, str]:
    """Begin a graph with Conv ``a`` (8 channels) and a Relu, in float32."""
    t = Tiny(opset=opset)
    x = t.input(1, 2, 4, 6, kind=kind)
    if kind != TensorProto.FLOAT:
        x = t.node("Cast", x, to=TensorProto.FLOAT)
    return t, t.node("Relu", t.conv(x, "a", 2, 8, 3))


def half_conv(t: Tiny, y: str, name: str, channels: int, dtype: np.dtype) -> str:
    """Convolve in another type: cast there, convolve with weights of that type, cast back."""
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    for role, shape in (("w", (channels, 8, 3, 3)), ("b", (channels,))):
        values = (0.2 * t.rng.standard_normal(shape)).astype(dtype)
        t.initializers.append(numpy_helper.from_array(values, f"{name}.{role}"))
    y = t.node("Conv", t.node("Cast", y, to=kind), f"{name}.w", f"{name}.b", name=name, pads=[1] * 4)
    return t.node("Cast", t.node("Relu", y), to=TensorProto.FLOAT)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_mixed_precision(kind: str) -> None:
    """Convolutions in a narrower or wider type between casts lose channels as the others do."""
    t, y = begin()
    model = t.build(t.conv(half_conv(t, y, "b", 8, np.dtype(KINDS[kind])), "z", 8, 3))
    result = assert_pruned(model)
    assert result.plan.initializers.keys() >= {"a.w", "b.w"}
    types = {name: array.dtype for name, array in constants_of(result.model)}
    assert types["b.w"] == KINDS[kind]
    assert types["a.w"] == types["z.w"] == np.float32
    assert_equals_masked(model, result, 1e-4)


def test_all_types_in_one_model() -> None:
    """Four types after one another, with a shortcut from the first to the last."""
    t, first = begin()
    y = first
    for name, kind in zip("bcd", KINDS, strict=True):
        y = half_conv(t, y, name, 8, np.dtype(KINDS[kind]))
    model = t.build(t.conv(t.node("Add", first, y), "z", 8, 3))
    result = assert_pruned(model)
    assert_equals_masked(model, result, 1e-4)


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.FLOAT16, TensorProto.INT32])
def test_inputs_of_other_types(kind: int) -> None:
    """Images as bytes, integers or halves, cast in the graph, enter as they did."""
    t, y = begin(kind)
    model = t.build(t.conv(t.node("Relu", t.conv(y, "b", 8, 8, 3)), "z", 8, 3))
    result = assert_pruned(model)
    feeds = image(model)
    assert_close(run(result.model, feeds), masked_reference(model, result.plan, feeds))


def stored_narrow(t: Tiny, y: str) -> str:
    """Convolve in float32 with weights that are stored in 16 bits and cast."""
    kind = np.dtype(ml_dtypes.bfloat16)
    w = t.constant((0.2 * t.rng.standard_normal((8, 8, 3, 3))).astype(kind), "b.w")
    return t.node("Conv", y, t.node("Cast", w, to=TensorProto.FLOAT), name="b", pads=[1] * 4)


def integer_path(t: Tiny, y: str) -> str:
    """Look rows up by integers, choose by booleans, mask by a table of booleans."""
    rows = t.node("Gather", y, t.constant(np.array([3, 1, 2, 0])), axis=2)
    choice = t.constant(np.arange(24).reshape(1, 1, 4, 6) % 3 == 0, "choice")
    return t.conv(t.node("Where", choice, rows, t.node("Neg", y)), "b", 8, 8, 3)


def boolean_per_channel(t: Tiny, y: str) -> str:
    """Turn every other channel around."""
    flags = t.constant(np.arange(8).reshape(1, 8, 1, 1) % 2 == 0, "flags")
    return t.conv(t.node("Where", flags, y, t.node("Neg", y)), "b", 8, 8, 3)


def classes(t: Tiny, y: str) -> str:
    """Put the largest of the scores out as an integer, beside them."""
    t.node("ArgMax", t.conv(y, "scores", 8, 5), axis=1, name="best")
    return t.conv(y, "b", 8, 8, 3)


def clipped_by_integers(t: Tiny, y: str) -> str:
    """Compute with integers made of floats, and return."""
    steps = t.node("Cast", t.node("Mul", y, t.constant(10.0)), to=TensorProto.INT32)
    low, high = (t.constant(np.array(value, np.int32)) for value in (1, 20))
    return t.conv(t.node("Cast", t.node("Max", t.node("Min", steps, high), low), to=TensorProto.FLOAT), "b", 8, 8, 3)


@pytest.mark.parametrize(
    ("layer", "follow"),
    [
        (stored_narrow, "b.w"), (integer_path, None), (boolean_per_channel, "flags"), (clipped_by_integers, None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_integers_and_booleans(layer: Layer, follow: str | None) -> None:
    """Integers and booleans that belong to channels go with them; all others stay byte for byte."""
    t, y = begin()
    model = t.build(t.conv(t.node("Relu", layer(t, y)), "z", 8, 3))
    result = onnxprune.prune(model, target_mac=0.6)
    assert result.report.proof is not None
    assert result.report.proof.ok
    onnx.checker.check_model(result.model, full_check=True)
    before = {tensor.name: tensor for tensor in model.graph.initializer}
    changed = {tensor.name for tensor in result.model.graph.initializer if tensor != before[tensor.name]}
    kinds = {name for name in changed if before[name].data_type != TensorProto.FLOAT}
    assert kinds == ({follow} if follow else set())
    assert_equals_masked(model, result, 1e-4)


def test_integer_output() -> None:
    """An integer output (the best class) keeps its type and its value where its scores are whole."""
    t, y = begin()
    classes(t, y)
    t.conv(t.node("Relu", "b"), "z", 8, 3)
    outputs = [
        helper.make_tensor_value_info("z", TensorProto.FLOAT, (1, 3, 4, 6)),
        helper.make_tensor_value_info("best", TensorProto.INT64, (1, 1, 4, 6)),
    ]
    graph = helper.make_graph(t.nodes, "classes", t.inputs, outputs, t.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    result = assert_pruned(model, 0.8)
    assert result.plan.initializers.get("scores.w", {}).keys() <= {1}
    feeds = image(model)
    assert_close(run(result.model, feeds), masked_reference(model, result.plan, feeds))


# -- segments that onnxruntime could run in bfloat16, and cannot be fed -------------------------------------------------


def test_bfloat16_that_is_only_moved() -> None:
    """A part of a bfloat16 model that only moves data (channels last at the input) does not stop the proof."""
    t = Tiny(opset=22)
    y = t.node("Transpose", t.input(1, 4, 6, 2), perm=[0, 3, 1, 2])
    y = t.node("Relu", t.conv(t.node("Relu", t.conv(y, "a", 2, 8, 3)), "b", 8, 8, 3))
    model = in_type(t.build(t.conv(y, "z", 8, 3)), "bfloat16")
    assert_equals_masked(model, assert_pruned(model), 1e-4)


@pytest.mark.parametrize("kind", ["float16", "float64"])
def test_other_types_that_are_only_moved(kind: str) -> None:
    """The same in types that can be fed."""
    t = Tiny(opset=22)
    y = t.node("Transpose", t.input(1, 4, 6, 2), perm=[0, 3, 1, 2])
    y = t.node("Relu", t.conv(t.node("Relu", t.conv(y, "a", 2, 8, 3)), "b", 8, 8, 3))
    model = in_type(t.build(t.conv(y, "z", 8, 3)), kind)
    assert_equals_masked(model, assert_pruned(model), 1e-4)
