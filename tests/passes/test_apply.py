"""What is not pruned is untouched, and every way of writing constants is sliced in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import architectures
import onnxprune
import oracle
from architectures import variants
from onnxprune.slices import take

FIXTURES = Path(__file__).parents[2] / "fixtures"
NAMES = ("edsr_reshape", "sid", "resnet_a", "resnext", "mobilenet_v2", "c2f_detector", "dynamic_reshape_constant")


def pruned(model: ModelProto, share: float = 0.6) -> onnxprune.Result:
    """Prune and prove."""
    result = onnxprune.prune(model, target_mac=share)
    assert result.report.proof is not None
    assert result.plan.initializers
    return result


def arrays(model: ModelProto) -> dict[str, np.ndarray]:
    """Values of all initializers."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def decorated(model: ModelProto) -> ModelProto:
    """The same model with documentation and metadata wherever ONNX has a place for them."""
    model.producer_name, model.producer_version, model.domain = "maker", "1.2", "org.example"
    model.model_version, model.doc_string = 7, "a model"
    model.graph.doc_string = "a graph"
    onnx.helper.set_model_props(model, {"author": "someone", "task": "pictures"})
    model.graph.metadata_props.add(key="graph", value="yes")
    for index, node in enumerate(model.graph.node):
        node.doc_string = f"node {index}"
        node.metadata_props.add(key="line", value=str(index))
    for tensor in model.graph.initializer:
        tensor.doc_string = f"about {tensor.name}"
        tensor.metadata_props.add(key="origin", value=tensor.name)
    for value in (*model.graph.input, *model.graph.output):
        value.doc_string = f"about {value.name}"
    model.opset_import.append(helper.make_opsetid("org.example", 3))
    return model


def without_group(node: onnx.NodeProto) -> bytes:
    """A node without the number of its groups, which may shrink."""
    bare = onnx.NodeProto()
    bare.CopyFrom(node)
    kept = [onnx.AttributeProto.FromString(a.SerializeToString()) for a in node.attribute if a.name != "group"]
    del bare.attribute[:]
    bare.attribute.extend(kept)
    return bare.SerializeToString(deterministic=True)


@pytest.mark.parametrize("name", NAMES)
def test_everything_around_the_weights_stays(name: str) -> None:
    """Names, node order, attributes, opsets, versions, metadata, documentation and the signature are as they were."""
    model = decorated(architectures.ALL[name]())
    result = pruned(model).model
    assert [without_group(node) for node in result.graph.node] == [without_group(node) for node in model.graph.node]
    assert [tensor.name for tensor in result.graph.initializer] == [tensor.name for tensor in model.graph.initializer]
    for part in ("input", "output", "metadata_props", "quantization_annotation"):
        assert list(getattr(result.graph, part)) == list(getattr(model.graph, part))
    for one, other in zip(result.graph.initializer, model.graph.initializer, strict=True):
        assert (one.data_type, one.doc_string, list(one.metadata_props)) == (
            (other.data_type, other.doc_string, list(other.metadata_props))
        )
    for bare in (model, result):
        bare.graph.ClearField("node")
        bare.graph.ClearField("initializer")
    assert result.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


@pytest.mark.parametrize("name", NAMES)
def test_untouched_initializers_are_byte_identical(name: str) -> None:
    """An initializer that the plan does not name keeps its bytes; one that it names keeps what indices it says."""
    model = architectures.ALL[name]()
    result = pruned(model)
    before = {tensor.name: tensor for tensor in model.graph.initializer}
    shrunk = 0
    for tensor in result.model.graph.initializer:
        slices = result.plan.initializers.get(tensor.name)
        if slices is None and tensor.data_type == TensorProto.FLOAT:
            assert tensor.SerializeToString() == before[tensor.name].SerializeToString()
        elif slices is not None:
            shrunk += 1
            expected = oracle.sliced(numpy_helper.to_array(before[tensor.name]), slices)
            np.testing.assert_array_equal(numpy_helper.to_array(tensor), expected)
    assert shrunk > 0


def test_sliced_tensor_gains_no_empty_field() -> None:
    """A sliced initializer holds the fields that it held before: no documentation where there was none."""
    model = architectures.ALL["edsr"]()
    assert not any(tensor.HasField("doc_string") for tensor in model.graph.initializer)
    assert not any(tensor.HasField("doc_string") for tensor in pruned(model).model.graph.initializer)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_not_mutated(name: str) -> None:
    """The model passed in is the same before and after."""
    model = architectures.ALL[name]()
    before = model.SerializeToString(deterministic=True)
    pruned(model)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("name", NAMES)
def test_same_input_same_bytes(name: str) -> None:
    """Pruning the same model twice gives the same bytes and the same plan."""
    first, second = (pruned(architectures.ALL[name]()) for _ in range(2))
    assert first.model.SerializeToString() == second.model.SerializeToString()
    assert first.plan.to_json() == second.plan.to_json()


def outputs(model: ModelProto, **shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Run a model on seeded noise; shapes of dynamic inputs are given."""
    constants = {tensor.name for tensor in model.graph.initializer}
    rng = np.random.default_rng(3)
    feed = {}
    for value in model.graph.input:
        if value.name not in constants:
            shape = shapes.get(value.name) or tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            feed[value.name] = rng.standard_normal(shape).astype(dtype)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)


@pytest.mark.parametrize("name", ["edsr", "resnet_a", "squeeze_excite_gemm", "layer_norm_mlp"])
@pytest.mark.parametrize(
    "vary",
    [
        pytest.param(variants.initializers_as_inputs, id="ir3"),
        pytest.param(variants.constants_as_nodes, id="constant_nodes"),
        pytest.param(variants.with_dynamic_batch, id="dynamic_batch"),
    ],
)
def test_variants_prune_to_the_same_function(name: str, vary: variants.Variant) -> None:
    """However its constants are written, a network loses the same channels and computes the same afterwards."""
    model = architectures.ALL[name]()
    plain, varied = pruned(model), pruned(vary(model))
    assert varied.plan.groups == plain.plan.groups
    onnx.checker.check_model(varied.model, full_check=True)
    shapes = {value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim) for value in model.graph.input}
    for one, other in zip(outputs(varied.model, **shapes), outputs(plain.model), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * float(other.std()))


def test_inputs_that_list_initializers_shrink_with_them() -> None:
    """IR 3: the graph input of a sliced initializer declares the new shape; the real input stays as it was."""
    model = variants.initializers_as_inputs(architectures.ALL["resnet_a"]())
    result = pruned(model).model
    assert result.ir_version == 3
    declared = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in result.graph.input}
    for tensor in result.graph.initializer:
        assert declared[tensor.name] == list(tensor.dims), tensor.name
    assert result.graph.input[0] == model.graph.input[0]


def test_constant_nodes_stay_nodes() -> None:
    """Sliced Constant nodes stay where they are, and no initializer appears."""
    model = variants.constants_as_nodes(architectures.ALL["resnet_b"]())
    result = pruned(model).model
    assert not result.graph.initializer
    assert [node.name for node in result.graph.node] == [node.name for node in model.graph.node]


def test_value_info_follows() -> None:
    """Declared shapes of intermediate tensors are those of the pruned graph."""
    model = onnx.shape_inference.infer_shapes(architectures.ALL["resnet_a"]())
    assert len(model.graph.value_info) > 50
    result = pruned(model).model
    assert [value.name for value in result.graph.value_info] == [value.name for value in model.graph.value_info]
    assert list(result.graph.value_info) != list(model.graph.value_info)
    onnx.checker.check_model(result, full_check=True)
    bare = ModelProto()
    bare.CopyFrom(result)
    del bare.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=True)
    expected = {value.name: value.type for value in inferred.graph.value_info}
    assert {value.name: value.type for value in result.graph.value_info} == expected


def test_dynamic_dims_stay_dynamic() -> None:
    """Names of dynamic axes stay, in the signature and in value_info."""
    model = onnx.shape_inference.infer_shapes(onnx.load(FIXTURES / "denoise" / "denoise.onnx"))
    result = pruned(model).model
    dims = [[d.dim_param for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info]
    assert any(name for names in dims for name in names)
    assert [[d.dim_param for d in v.type.tensor_type.shape.dim] for v in result.graph.value_info] == dims
    assert list(result.graph.input) == list(model.graph.input)
    for batch, size in ((1, 32), (3, 48)):
        (clean,) = outputs(result, noisy=(batch, 1, size, size))
        assert clean.shape == (batch, 1, size, size)


def to_float16(model: ModelProto) -> ModelProto:
    """The model with every float in half precision."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return model


@pytest.mark.parametrize("name", ["edsr", "resnet_b_no_norm", "sid"])
def test_half_precision_stays(name: str) -> None:
    """A float16 model is pruned and proved in float16."""
    result = pruned(to_float16(architectures.ALL[name]()))
    assert result.report.proof is not None
    assert result.report.proof.ok
    kinds = {tensor.data_type for tensor in result.model.graph.initializer}
    assert TensorProto.FLOAT16 in kinds
    assert TensorProto.FLOAT not in kinds
    assert all(np.isfinite(output).all() for output in outputs(result.model))


def sharing(second: str = "bias") -> ModelProto:
    """Two convolutions of 16 channels whose biases are one initializer; the first one's channels matter more."""
    rng = np.random.default_rng(0)
    graph_weights = {
        "w1": rng.standard_normal((16, 3, 3, 3)) * rng.uniform(0.1, 2, (16, 1, 1, 1)),
        "w2": rng.standard_normal((16, 16, 3, 3)) * rng.uniform(0.1, 2, (16, 1, 1, 1)),
        "w3": rng.standard_normal((3, 16, 3, 3)),
        "bias": rng.standard_normal(16),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "bias"], ["a"], name="first", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "w2", second], ["c"], name="second", pads=[1] * 4),
        helper.make_node("Conv", ["c", "w3"], ["y"], name="third", pads=[1] * 4),
    ]
    if second != "bias":
        nodes.insert(0, helper.make_node("Identity", ["bias"], [second], name="alias"))
    image = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 3, 8, 8)) for name in ("x", "y")]
    stored = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in graph_weights.items()]
    graph = helper.make_graph(nodes, "sharing", image[:1], image[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("second", ["bias", "alias"])
def test_shared_vector_gets_a_copy_per_reader(second: str) -> None:
    """Where two layers keep different channels of one vector, the second reader gets NAME@OUTPUT."""
    model = sharing(second)
    result = pruned(model)
    keys = [name for name in result.plan.initializers if name.startswith("bias")]
    assert keys == ["bias", "bias@c"]
    assert result.plan.initializers["bias"] != result.plan.initializers["bias@c"]
    value, got = arrays(model)["bias"], arrays(result.model)
    for key in keys:
        np.testing.assert_array_equal(got[key], value[result.plan.initializers[key][0]])
    reader = next(node for node in result.model.graph.node if node.name == "second")
    assert reader.input[2] == "bias@c"


def test_take_refuses_what_does_not_fit() -> None:
    """Slices beyond a tensor's axes or lengths are a ModelError that names the tensor."""
    array = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(take(array, {0: [1], 1: [2, 0]}, "w"), [[5, 3]])
    for slices in ({2: [0]}, {0: [2]}, {1: [0, 3]}):
        with pytest.raises(onnxprune.ModelError, match="does not fit w of shape"):
            take(array, slices, "w")
