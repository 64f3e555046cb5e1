"""Encodings are sliced with the model: quantizing and then slicing is slicing and then quantizing with what was written."""

from __future__ import annotations

import copy
import json
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnxprune
from commands import ok, run
from onnxprune.errors import FileError, ModelError, UsageError
from onnxprune.plan import Plan

OUT = {"conv": 0, "depthwise": 0, "grouped": 0, "up": 1, "fc": 1, "head": 0, "last": 1, "conv_bias": 0}
"""Axis of output channels, by weight."""

VERSIONS = ("0.4.0", "0.5.0", "0.6.1", "1.0.0", "2.0.0")


def model_of(nodes: list[onnx.NodeProto], arrays: dict[str, np.ndarray], shape: list[int]) -> onnx.ModelProto:
    """Put a graph from ``x`` to ``y`` together."""
    value = helper.make_tensor_value_info
    tensors = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", [value("x", 1, shape)], [value("y", 1, None)], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    """Every kind of weight: convolutions plain, depthwise, grouped and transposed; square products either way round."""
    rng, node = np.random.default_rng(5), helper.make_node
    arrays = {
        "conv": rng.standard_normal((12, 3, 3, 3)),
        "conv_bias": rng.standard_normal(12),
        "depthwise": rng.standard_normal((12, 1, 3, 3)),
        "grouped": rng.standard_normal((16, 6, 1, 1)),
        "up": rng.standard_normal((16, 10, 2, 2)),
        "fc": rng.standard_normal((10, 10)),
        "head": rng.standard_normal((10, 10)),
        "last": rng.standard_normal((10, 5)),
    }
    nodes = [
        node("Conv", ["x", "conv", "conv_bias"], ["a"], pads=[1] * 4),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "depthwise"], ["c"], group=12, pads=[1] * 4),
        node("Conv", ["c", "grouped"], ["d"], group=2),
        node("ConvTranspose", ["d", "up"], ["e"], strides=[2, 2]),
        node("GlobalAveragePool", ["e"], ["f"]),
        node("Flatten", ["f"], ["g"]),
        node("Gemm", ["g", "fc"], ["h"]),
        node("Relu", ["h"], ["i"]),
        node("Gemm", ["i", "head"], ["j"], transB=1),
        node("Relu", ["j"], ["k"]),
        node("MatMul", ["k", "last"], ["y"]),
    ]
    return model_of(nodes, arrays, [1, 3, 4, 4])


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Initializers by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def per_channel(version: str, name: str, array: np.ndarray) -> Any:
    """Encodings of a weight as AIMET writes them, with a scale of its own for each output channel."""
    axis = OUT[name]
    scales = np.random.default_rng(len(name)).uniform(0.01, 0.1, array.shape[axis]).tolist()
    offsets = list(range(-len(scales), 0))
    if version == "1.0.0":
        return {"name": name, "dtype": "INT", "enc_type": "PER_CHANNEL", "bw": 8, "is_sym": False, "scale": scales,
                "offset": offsets}  # fmt: skip
    if version == "2.0.0":
        return {"name": name, "output_dtype": "int8", "axis": axis - array.ndim, "y_scale": scales,
                "y_zero_point": offsets}  # fmt: skip
    one = {"bitwidth": 8, "is_symmetric": "True"} | ({} if version == "0.4.0" else {"dtype": "int"})
    return [
        one | {"scale": s, "offset": o, "min": o * s, "max": (o + 255) * s}
        for s, o in zip(scales, offsets, strict=True)
    ]


def file_of(version: str, params: dict[str, Any], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    """Put encodings by tensor name into the form of a version."""
    activations = activations or {}
    head: dict[str, Any] = {"version": version, "producer": {"tool": "a test"}}
    if version == "2.0.0":
        return head | {"encodings": [*activations.values(), *params.values()]}
    if version == "1.0.0":
        tables: dict[str, Any] = {
            "activation_encodings": list(activations.values()),
            "param_encodings": list(params.values()),
        }
    else:
        tables = {"activation_encodings": activations, "param_encodings": params}
    return head | tables | {"quantizer_args": {"param_bitwidth": 8}}


def of(encodings: dict[str, Any], name: str) -> Any:
    """The encodings of a tensor in a file of any version."""
    for part in ("encodings", "param_encodings", "activation_encodings"):
        table = encodings.get(part, [])
        found = [table[name]] if name in table else [e for e in table if isinstance(e, dict) and e["name"] == name]
        if found:
            return found[0]
    raise KeyError(name)


def grid(entry: Any, name: str, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset of every element of a weight."""
    if isinstance(entry, list):
        scale, offset = [one["scale"] for one in entry], [one["offset"] for one in entry]
    else:
        scale, offset = (entry.get(a, entry.get(b)) for a, b in (("scale", "y_scale"), ("offset", "y_zero_point")))
    place = [-1 if axis == OUT[name] else 1 for axis in range(array.ndim)]
    return np.array(scale).reshape(place), np.array(offset).reshape(place)


def quantized(entry: Any, name: str, array: np.ndarray) -> np.ndarray:
    """Integers that a weight becomes."""
    scale, offset = grid(entry, name, array)
    return np.round(array / scale) - offset


def kept(plan: Plan, name: str, array: np.ndarray) -> np.ndarray:
    """A weight's elements that stay, by the plan alone; rows of a grouped convolution one after the other."""
    for axis, indices in sorted(plan.initializers.get(name, {}).items(), reverse=True):
        rows = indices if isinstance(indices[0], list) else [indices]
        array = np.concatenate([np.take(b, r, axis) for b, r in zip(np.split(array, len(rows)), rows, strict=True)])
    return array


@pytest.mark.parametrize("version", VERSIONS)
def test_quantizing_commutes_with_slicing(version: str, network: onnx.ModelProto) -> None:
    """Per channel: the pruned weights become the same integers by the sliced encodings as before by the whole ones."""
    result = onnxprune.prune(network, target_mac=0.5)
    before, after = weights(network), weights(result.model)
    whole = file_of(version, {name: per_channel(version, name, before[name]) for name in OUT})
    given = copy.deepcopy(whole)
    sliced = onnxprune.slice_encodings(given, result.plan, network, result.model)
    assert given == whole
    assert sliced.notes == ()
    cut = [name for name in OUT if before[name].shape != after[name].shape]
    assert len(cut) >= 6
    for name in OUT:
        expected = kept(result.plan, name, quantized(of(whole, name), name, before[name]))
        np.testing.assert_array_equal(quantized(of(sliced.encodings, name), name, after[name]), expected, err_msg=name)


@pytest.mark.parametrize("version", VERSIONS)
def test_everything_else_stays(version: str, network: onnx.ModelProto) -> None:
    """Encodings of whole tensors, unknown names (with a note), unknown keys and the order of keys stay as they are."""
    result = onnxprune.prune(network, target_mac=0.5)
    before = weights(network)
    single = {"1.0.0": {"enc_type": "PER_TENSOR", "bw": 8, "scale": [0.1], "offset": [-3]}, "2.0.0": {"y_scale": 0.1}}
    one: Any = single.get(version, [{"bitwidth": 8, "scale": 0.1, "offset": -3}])
    named = [{"name": name, **one} if isinstance(one, dict) else one for name in ("x", "b", "ghost", "fc")]
    x, b, ghost, fc = named
    conv = per_channel(version, "conv", before["conv"])
    if isinstance(conv, dict):
        conv = {"mine": [1] * 12, **conv}
    given = file_of(version, {"fc": fc, "conv": conv}, {"x": x, "b": b, "ghost": ghost})
    sliced = onnxprune.slice_encodings(given, result.plan, network, result.model)
    assert sliced.notes == ("encodings of ghost stay as they are: the model has no such tensors",)
    assert list(sliced.encodings) == list(given)
    assert {k: sliced.encodings[k] for k in given if "encodings" not in k} == {
        k: given[k] for k in given if "encodings" not in k
    }
    for name in ("x", "b", "ghost", "fc"):
        assert of(sliced.encodings, name) == of(given, name)
    if isinstance(conv, dict):
        assert list(of(sliced.encodings, "conv")) == list(conv)
        assert of(sliced.encodings, "conv")["mine"] == [1] * 12


# -- blocks --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def perceptron() -> onnx.ModelProto:
    """Two products with 12 hidden channels between them."""
    rng, node = np.random.default_rng(6), helper.make_node
    arrays = {"first": rng.standard_normal((6, 12)), "second": rng.standard_normal((12, 5))}
    nodes = [
        node("MatMul", ["x", "first"], ["a"]), node("Relu", ["a"], ["b"]), node("MatMul", ["b", "second"], ["y"]),
    ]  # fmt: skip
    return model_of(nodes, arrays, [2, 6])


def plan_for(hidden: list[int]) -> Plan:
    """Which hidden channels stay."""
    return Plan({"first": {1: hidden}, "second": {0: hidden}}, ())


def blocks(kind: str) -> dict[str, Any]:
    """Encodings of ``second`` in blocks of 4 of its 12 input channels, of 5 output channels; no two alike."""
    scale = np.arange(15).reshape(5, 3) / 16 + 1  # output channel, block
    whole = (np.arange(15).reshape(5, 3) + 1).tolist()
    channel = (np.arange(5) / 8 + 1).tolist()
    if kind == "PER_BLOCK":
        return {"name": "second", "enc_type": kind, "block_size": 4, "scale": scale.ravel().tolist(),
                "offset": np.arange(15).tolist()}  # fmt: skip
    if kind == "LPBQ":
        return {"name": "second", "enc_type": kind, "block_size": 4, "scale": channel, "offset": [-128] * 5,
                "per_block_int_scale": np.ravel(whole).tolist()}  # fmt: skip
    if kind == "2.0.0 blocks":
        return {"name": "second", "axis": 0, "block_size": 4, "y_scale": scale.T.tolist(),
                "y_zero_point": np.arange(15).reshape(3, 5).tolist()}  # fmt: skip
    return {"name": "second", "axis": -2, "block_size": 4, "per_channel_float_scale": [channel],
            "per_block_int_scale": np.transpose(whole).tolist()}  # fmt: skip


KINDS = ("PER_BLOCK", "LPBQ", "2.0.0 blocks", "2.0.0 LPBQ")


def block_scales(entry: dict[str, Any]) -> np.ndarray:
    """Scale of each block, float64 of shape (blocks, output channels)."""
    if "enc_type" in entry:
        per_block = np.array(entry.get("per_block_int_scale", entry["scale"])).reshape(5, -1).T
        return per_block * (entry["scale"] if entry["enc_type"] == "LPBQ" else 1)
    return np.array(entry.get("y_scale", entry.get("per_block_int_scale"))) * np.array(
        entry.get("per_channel_float_scale", 1)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_go_as_a_whole(kind: str, perceptron: onnx.ModelProto) -> None:
    """Where the channels of blocks 0 and 2 stay, so do their scales, for each output channel."""
    plan = plan_for([0, 1, 2, 3, 8, 9, 10, 11])
    result = onnxprune.apply(perceptron, plan)
    given = blocks(kind)
    sliced = onnxprune.slice_encodings({"encodings": [given]}, plan, perceptron, result.model).encodings["encodings"][0]
    np.testing.assert_array_equal(block_scales(sliced), block_scales(given)[[0, 2]])
    assert sliced.keys() == given.keys()
    lengths = {key: len(np.ravel(sliced[key])) for key in ("offset", "y_zero_point") if key in sliced}
    assert lengths == ({} if kind == "2.0.0 LPBQ" else {"offset": 10} if kind == "PER_BLOCK" else
                       {"offset": 5} if kind == "LPBQ" else {"y_zero_point": 10})  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [[0, 1, 2, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5, 8, 9]], ids=["torn", "joined"])
def test_blocks_are_not_torn(kind: str, hidden: list[int], perceptron: onnx.ModelProto) -> None:
    """Half a block, or halves of two that would meet in one, is refused; the message names tensor, block and axis."""
    plan = plan_for(hidden)
    result = onnxprune.apply(perceptron, plan)
    with pytest.raises(ModelError, match=r"encodings of second of shape \[12, 5\].* parts of blocks of 4 along axis 0"):
        onnxprune.slice_encodings({"encodings": [blocks(kind)]}, plan, perceptron, result.model)


WRONG = [
    ([{"scale": 1.0}] * 7, r"there are 7 of them, and no axis is as long"),
    ("text", "unknown form"),
    ({"enc_type": "PER_CHANNEL", "scale": [1.0] * 5, "offset": [0] * 4}, "offset has 4 entries, 5 were expected"),
    ({"enc_type": "VECTOR", "scale": [1.0] * 5}, "enc_type VECTOR"),
    ({"enc_type": "LPBQ", "block_size": 5, "scale": [1.0] * 5}, "blocks of 5 do not divide its axis 0"),
    ({"enc_type": "LPBQ", "scale": [1.0] * 5}, "block_size None"),
    ({"enc_type": "PER_BLOCK", "block_size": 4, "scale": [1.0] * 14}, "scale has 14 entries, 15 were expected"),
    ({"y_scale": [1.0] * 5}, "do not say of which axis"),
    ({"axis": 2, "y_scale": [1.0] * 5}, "do not say of which axis"),
    ({"axis": 1, "y_scale": [1.0] * 6}, "y_scale has 6 entries, 5 were expected"),
    ({"axis": 0, "block_size": 4, "y_scale": [1.0] * 5}, "y_scale has 1 axes, the tensor 2"),
    ({"axis": 0, "block_size": 4, "y_scale": [[1.0] * 5] * 2}, "y_scale has 2 entries along axis 0, 3 were expected"),
    ({"axis": 1, "y_scale": {"x": [1], "x_scale": [1.0]}}, "itself quantized"),
    ({"axis": 0, "block_size": 4, "y_scale": [[1.0] * 5, [1.0] * 5, [1.0] * 4]}, "lists of y_scale differ in length"),
    ({"axis": 0, "block_size": 4, "y_scale": [[1.0] * 5, 1.0, [1.0] * 5]}, "lists of y_scale differ in length"),
    ({"axis": 0, "block_size": 4, "y_scale": [[[1.0], [2.0, 3.0]]] * 3}, "lists of y_scale differ in length"),
    ({"axis": 0, "block_size": 4, "y_scale": [[], [], []]}, "y_scale has 0 entries along axis 1, 5 were expected"),
    (
        {"axis": 0, "block_size": 4, "y_scale": reduce(lambda inner, _: [inner], range(5000), 1.0)},
        "y_scale has 5000 axes",
    ),
    ({"axis": True, "y_scale": [1.0] * 5}, "do not say of which axis"),
    ({"axis": 0, "block_size": True, "y_scale": [[1.0] * 5] * 12}, "block_size True is no length"),
    ({"axis": 0, "y_scale": [[1.0], [2.0, 3.0]] * 6}, "y_scale holds lists, numbers were expected"),
    ({"enc_type": ["PER_CHANNEL"], "scale": [1.0] * 5}, "enc_type"),
]


@pytest.mark.parametrize(("entry", "why"), WRONG, ids=[why for _, why in WRONG])
def test_what_cannot_be_told_is_refused(entry: Any, why: str, perceptron: onnx.ModelProto) -> None:
    """A length that fits no axis, or a form that is not known: an error that names the tensor, and no guess."""
    plan = plan_for([0, 1, 2, 3])
    result = onnxprune.apply(perceptron, plan)
    with pytest.raises(ModelError, match=rf"the encodings of second of shape \[12, 5\] cannot be sliced: .*{why}"):
        onnxprune.slice_encodings({"param_encodings": {"second": entry}}, plan, perceptron, result.model)


def test_a_length_that_several_axes_have_is_refused() -> None:
    """Of a square weight whose reader does not say what is what, nobody can tell which axis is meant."""
    node, rng = helper.make_node, np.random.default_rng(1)
    arrays = {"w": rng.standard_normal((8, 8)), "v": rng.standard_normal((8, 3))}
    nodes = [
        node("Identity", ["w"], ["w2"]), node("MatMul", ["x", "w2"], ["a"]), node("Relu", ["a"], ["b"]),
        node("MatMul", ["b", "v"], ["y"]),
    ]  # fmt: skip
    model = model_of(nodes, arrays, [2, 8])
    result = onnxprune.prune(model, target_mac=0.5)
    with pytest.raises(ModelError, match=r"encodings of w of shape \[8, 8\].*several axes are as long"):
        onnxprune.slice_encodings({"param_encodings": {"w": [{"scale": 1.0}] * 8}}, result.plan, model, result.model)


def transposed(inputs: int, each: int, groups: int) -> onnx.ModelProto:
    """A grouped transposed convolution between two plain ones; ``each`` outputs in every group."""
    rng, node = np.random.default_rng(4), helper.make_node
    arrays = {
        "first": rng.standard_normal((inputs, 3, 1, 1)), "up": rng.standard_normal((inputs, each, 2, 2)),
        "last": rng.standard_normal((5, each * groups, 1, 1)),
    }  # fmt: skip
    nodes = [
        node("Conv", ["x", "first"], ["a"]), node("Relu", ["a"], ["b"]),
        node("ConvTranspose", ["b", "up"], ["c"], group=groups, strides=[2, 2]), node("Relu", ["c"], ["d"]),
        node("Conv", ["d", "last"], ["y"]),
    ]  # fmt: skip
    return model_of(nodes, arrays, [1, 3, 4, 4])


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0"])
@pytest.mark.parametrize(
    ("inputs", "each", "groups", "count"),
    [
        pytest.param(32, 8, 4, 32, id="inputs-or-outputs"),
        pytest.param(16, 16, 4, 16, id="inputs-or-outputs-of-a-group"),
        pytest.param(32, 6, 4, 24, id="outputs-of-all-groups"),
        pytest.param(16, 1, 2, 2, id="as-many-as-the-kernel"),
    ],
)
def test_channels_of_grouped_transposed_convolutions_are_not_guessed(
    version: str, inputs: int, each: int, groups: int, count: int
) -> None:
    """Their weight has the outputs of one group on axis 1: as many scales as inputs may be of outputs; refused."""
    model = transposed(inputs, each, groups)
    result = onnxprune.prune(model, target_mac=0.5)
    assert weights(result.model)["up"].shape != weights(model)["up"].shape
    scales = [1.0] * count
    entry: Any = {"enc_type": "PER_CHANNEL", "scale": scales} if version == "1.0.0" else [{"scale": s} for s in scales]
    with pytest.raises(ModelError, match=r"encodings of up of shape .* cannot be told"):
        onnxprune.slice_encodings({"param_encodings": {"up": entry}}, result.plan, model, result.model)


@pytest.mark.parametrize(
    ("inputs", "each", "groups", "axis"),
    [pytest.param(12, 1, 12, 0, id="depthwise"), pytest.param(24, 10, 2, 0, id="inputs"),
     pytest.param(24, 10, 2, 1, id="outputs-of-a-group")],
)  # fmt: skip
def test_channels_of_grouped_transposed_convolutions_that_can_be_told(
    inputs: int, each: int, groups: int, axis: int
) -> None:
    """Where only one axis can be meant, or channels pass one by one, entries go with that axis."""
    model = transposed(inputs, each, groups)
    result = onnxprune.prune(model, target_mac=0.5)
    left = weights(result.model)["up"].shape[axis]
    given = [{"scale": float(i)} for i in range((inputs, each)[axis])]
    try:
        sliced = onnxprune.slice_encodings({"param_encodings": {"up": given}}, result.plan, model, result.model)
    except ModelError as error:
        assert "its groups keep different channels" in str(error)
        assert axis == 1
        return
    found = [int(one["scale"]) for one in sliced.encodings["param_encodings"]["up"]]
    assert found == np.ravel(result.plan.initializers["up"].get(axis, np.arange(len(given)))).tolist()
    assert len(found) == left


# -- activations and copies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
def test_activations_per_channel_are_sliced(version: str, network: onnx.ModelProto) -> None:
    """Encodings of a layer's output keep the channels that the layer keeps."""
    result = onnxprune.prune(network, target_mac=0.5)
    scales = [1.0 + channel for channel in range(12)]
    entry: Any = {"0.6.1": [{"scale": scale} for scale in scales],
                  "1.0.0": {"name": "b", "enc_type": "PER_CHANNEL", "scale": scales, "offset": [0] * 12},
                  "2.0.0": {"name": "b", "axis": 1, "y_scale": scales}}[version]  # fmt: skip
    sliced = onnxprune.slice_encodings(file_of(version, {}, {"b": entry}), result.plan, network, result.model)
    found = of(sliced.encodings, "b")
    have = [one["scale"] for one in found] if isinstance(found, list) else found.get("scale", found.get("y_scale"))
    assert have == [scales[index] for index in result.plan.initializers["conv_bias"][0]]
    assert len(have) < 12


def test_copies_of_a_shared_vector_get_encodings_of_their_own() -> None:
    """Where two layers slice one vector differently, each copy has the entries of its own channels."""
    node, rng = helper.make_node, np.random.default_rng(2)
    arrays = {
        "w1": rng.standard_normal((8, 3, 1, 1)), "w2": rng.standard_normal((8, 8, 1, 1)),
        "w3": rng.standard_normal((2, 8, 1, 1)), "bias": np.ones(8),
    }  # fmt: skip
    nodes = [
        node("Conv", ["x", "w1", "bias"], ["a"]), node("Relu", ["a"], ["b"]), node("Conv", ["b", "w2", "bias"], ["c"]),
        node("Relu", ["c"], ["d"]), node("Conv", ["d", "w3"], ["y"]),
    ]  # fmt: skip
    model = model_of(nodes, arrays, [1, 3, 4, 4])
    result = onnxprune.prune(model, target_mac=0.5)
    copies = {name: slices[0] for name, slices in result.plan.initializers.items() if name.startswith("bias")}
    assert len(copies) == 2
    given = {"param_encodings": {"bias": [{"scale": float(i)} for i in range(8)]}}
    sliced = onnxprune.slice_encodings(given, result.plan, model, result.model).encodings["param_encodings"]
    assert sliced == {name: [{"scale": float(i)} for i in indices] for name, indices in copies.items()}
    assert set(sliced) <= set(weights(result.model))


def test_tensors_that_are_gone_are_dropped(network: onnx.ModelProto) -> None:
    """What the pruned model no longer has needs no encodings."""
    result = onnxprune.prune(network, target_mac=0.5)
    pruned = onnx.ModelProto()
    pruned.CopyFrom(result.model)
    pruned.graph.node[1].output[0] = pruned.graph.node[2].input[0] = "renamed"
    given = file_of("0.6.1", {}, {"b": [{"scale": 1.0}], "x": [{"scale": 1.0}]})
    sliced = onnxprune.slice_encodings(given, result.plan, network, pruned)
    assert list(sliced.encodings["activation_encodings"]) == ["x"]


# -- files ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, network: onnx.ModelProto) -> Path:
    """A folder with the network and its encodings."""
    onnx.save(network, tmp_path / "in.onnx")
    content = file_of("1.0.0", {name: per_channel("1.0.0", name, array) for name, array in weights(network).items()})
    (tmp_path / "in.json").write_text(json.dumps(content))
    return tmp_path


def test_prune_and_apply_write_the_same(files: Path) -> None:
    """Both commands slice the encodings beside the model; the notes of the report tell of strangers."""
    content = json.loads((files / "in.json").read_text())
    content["activation_encodings"].append({"name": "ghost"})
    (files / "in.json").write_text(json.dumps(content))
    common = ("--encodings", files / "in.json", "--encodings-out")
    ok("prune", files / "in.onnx", files / "a.onnx", "--target-mac", 0.5, *common, files / "a.json", "--plan-out",
       files / "plan.json", "--no-latency", "--json", files / "report.json")  # fmt: skip
    ok("apply", files / "in.onnx", files / "b.onnx", "--plan", files / "plan.json", *common, files / "b.json")
    written = (files / "a.json").read_text()
    assert written == (files / "b.json").read_text()
    plan = json.loads((files / "plan.json").read_text())
    entry = of(json.loads(written), "conv")
    assert entry["scale"] == [of(content, "conv")["scale"][index] for index in plan["initializers"]["conv"]["0"]]
    assert any("ghost" in note for note in json.loads((files / "report.json").read_text())["notes"])


def test_a_refusal_writes_nothing(files: Path) -> None:
    """Where encodings cannot be sliced there is no model either."""
    content = json.loads((files / "in.json").read_text())
    content["param_encodings"][0]["offset"] = [0]
    (files / "in.json").write_text(json.dumps(content))
    found = run("prune", files / "in.onnx", files / "a.onnx", "--target-mac", 0.5, "--encodings", files / "in.json",
                "--encodings-out", files / "a.json", "--plan-out", files / "plan.json")  # fmt: skip
    assert found.exit_code == 3
    assert "the encodings of conv of shape" in found.output
    assert sorted(path.name for path in files.iterdir()) == ["in.json", "in.onnx"]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--encodings", "in.json"), 2, "--encodings and --encodings-out go together"),
        (("--encodings-out", "out.json"), 2, "--encodings and --encodings-out go together"),
        (("--encodings", "in.json", "--encodings-out", "in.json"), 2, "in.json: is also another file"),
        (("--encodings", "in.json", "--encodings-out", "no/out.json"), 7, "does not exist"),
        (("--encodings", "none.json", "--encodings-out", "out.json"), 7, "none.json: the encodings cannot be read"),
        (("--encodings", "in.onnx", "--encodings-out", "out.json"), 2, "in.onnx: is not valid JSON"),
    ],
)
def test_wrong_files_are_refused(
    words: tuple[str, ...], code: int, text: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One JSON in, another out; what cannot be read or written is told before the model is written."""
    monkeypatch.chdir(files)
    found = run("prune", "in.onnx", "out.onnx", "--target-mac", 0.5, *words)
    assert (found.exit_code, text in found.output) == (code, True), found.output
    assert not Path("out.onnx").exists()


@pytest.mark.parametrize(
    "content", [[], {"version": "1.0.0"}, {"encodings": 3}, {"encodings": [{"scale": 1}]}, {"encodings": {"\ud800": 1}}]
)
def test_other_json_is_refused(content: Any, files: Path, network: onnx.ModelProto) -> None:
    """JSON of another form is not taken for encodings."""
    (files / "in.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"in\.json"):
        onnxprune.slice_encodings(files / "in.json", Plan({}, ()), network, network)


@pytest.mark.parametrize("given", [[1], 3, None, True, [{"name": "conv"}]])
def test_what_is_neither_a_file_nor_its_content_is_refused(given: Any, network: onnx.ModelProto) -> None:
    """A list or a number in place of a path or of what a file holds is a usage error, not one of Python's."""
    with pytest.raises(UsageError, match="the encodings: are no quantization encodings"):
        onnxprune.slice_encodings(given, Plan({}, ()), network, network)


def test_a_missing_file_is_told(network: onnx.ModelProto) -> None:
    """As of any file that is read."""
    with pytest.raises(FileError, match=r"nowhere\.json"):
        onnxprune.slice_encodings("nowhere.json", Plan({}, ()), network, network)


def test_fitted_weights_are_told_of(files: Path) -> None:
    """Compensation changes weights, which their encodings then no longer describe."""
    rng = np.random.default_rng(0)
    np.savez(files / "calib.npz", x=rng.standard_normal((16, 3, 4, 4)).astype(np.float32))
    ok("prune", files / "in.onnx", files / "a.onnx", "--target-mac", 0.5, "--calib", files / "calib.npz", "--encodings",
       files / "in.json", "--encodings-out", files / "a.json", "--json", files / "r.json", "--no-latency")  # fmt: skip
    assert any(note.startswith("weights were fitted") for note in json.loads((files / "r.json").read_text())["notes"])
