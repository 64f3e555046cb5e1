"""``onnxprune diff``: what differs between two models."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnxprune
from commands import ok, run
from onnxprune.difference import difference

DENOISE = pathlib.Path(__file__).parents[1] / "fixtures" / "denoise" / "denoise.onnx"


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    """The denoiser."""
    return onnx.load(DENOISE)


def changed(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy to change."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def test_a_model_is_like_itself(model: onnx.ModelProto) -> None:
    """Nothing differs, and both cost the same."""
    found = difference(model, DENOISE)
    assert found.same
    assert not any(pair.changed for pair in found.layers)
    assert all(a == b for a, b in found.cost.values())
    assert "the models are the same" in ok("diff", DENOISE, DENOISE).output


def test_a_pruned_model(model: onnx.ModelProto, tmp_path: pathlib.Path) -> None:
    """What pruning did: the layers' sizes of its own report, constants of other shapes, and no node more or less."""
    result = onnxprune.prune(model, target_mac=0.5)
    found = difference(model, result.model)
    rows = {layer.node: layer for layer in result.report.layers}
    for pair in found.layers:
        assert pair.a is not None
        assert pair.b is not None
        row = rows[pair.name]
        assert (pair.a.channels_before, pair.b.channels_before) == (row.channels_before, row.channels_after)
        assert (pair.a.mac_before, pair.b.mac_before) == (row.mac_before, row.mac_after)
    assert found.cost["mac"] == (result.report.before["mac"], result.report.after["mac"])
    assert {one.change for one in found.constants} == {"shape"}
    assert {one.name for one in found.constants} == set(result.plan.initializers)
    assert not any(found.nodes.values())
    onnx.save(result.model, tmp_path / "b.onnx")
    text = ok("diff", DENOISE, tmp_path / "b.onnx", "--json", tmp_path / "d.json").output
    assert json.loads((tmp_path / "d.json").read_text()) == json.loads(
        json.dumps(difference(DENOISE, tmp_path / "b.onnx").to_json())
    )
    assert f"layers that differ ({sum(pair.changed for pair in found.layers)})" in text


def test_values(model: onnx.ModelProto) -> None:
    """Other values are told with their distance, relative to the values that were."""
    other = changed(model)
    tensor = other.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(1.25 * numpy_helper.to_array(tensor), tensor.name))
    found = difference(model, other)
    assert [(one.name, one.change) for one in found.constants] == [(tensor.name, "values")]
    assert found.constants[0].distance == pytest.approx(0.25, rel=1e-6)
    assert not found.same
    assert not any(pair.changed for pair in found.layers)


def test_nodes_inputs_and_opsets(model: onnx.ModelProto) -> None:
    """Nodes that came, went or compute something else, constants that came, and other ends of the graph are named."""
    other = changed(model)
    last = other.graph.node[-1]
    output = other.graph.output[0].name
    for k, name in enumerate(last.output):
        if name == output:
            last.output[k] = "before_scale"
    other.graph.node.append(onnx.helper.make_node("Mul", ["before_scale", "two"], [output], name="scale"))
    other.graph.initializer.append(numpy_helper.from_array(np.float32(2), "two"))
    other.opset_import[0].version += 1
    other.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "other"
    found = difference(model, other)
    assert found.nodes["added"] == ("scale",)
    assert found.nodes["removed"] == ()
    assert len(found.nodes["changed"]) == 1
    assert [(one.name, one.change, one.shape_a, one.shape_b) for one in found.constants] == [("two", "added", None, ())]
    assert found.graph == ("outputs", "opset_import")
    back = difference(other, model)
    assert back.nodes["removed"] == ("scale",)
    assert [one.change for one in back.constants] == ["removed"]


def test_layers_of_one_model_alone(model: onnx.ModelProto) -> None:
    """A layer that the other model lacks stands in its place, with nothing on the other side."""
    shorter = changed(model)
    first, second = [node for node in shorter.graph.node if node.op_type == "Conv"][1:3]
    middle = next(node for node in shorter.graph.node if first.output[0] in node.input)
    second.input[0] = first.input[0]
    for node in (first, middle):
        shorter.graph.node.remove(node)
    found = difference(model, shorter)
    alone = [pair for pair in found.layers if pair.b is None]
    assert [pair.name for pair in alone] == [first.name]
    assert found.layers.index(alone[0]) == 1
    turned = difference(shorter, model)
    assert [pair.name for pair in turned.layers] == [pair.name for pair in found.layers]
    assert turned.layers[1].a is None


def test_bodies_and_tensors_in_attributes() -> None:
    """What a branch computes, and a tensor in an attribute, count."""

    def branching(op: str, value: float) -> onnx.ModelProto:
        info = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in ("x", "y")]
        branches = [
            onnx.helper.make_graph([onnx.helper.make_node(kind, ["filled"], [f"in_{kind}"])], kind, [],
                                   [onnx.helper.make_tensor_value_info(f"in_{kind}", onnx.TensorProto.FLOAT, [2])])
            for kind in (op, "Abs")
        ]  # fmt: skip
        fill = numpy_helper.from_array(np.array([value], np.float32))
        nodes = [
            onnx.helper.make_node("Shape", ["x"], ["size"], name="size"),
            onnx.helper.make_node("ConstantOfShape", ["size"], ["constant"], name="fill", value=fill),
            onnx.helper.make_node("Add", ["x", "constant"], ["filled"], name="add"),
            onnx.helper.make_node("If", ["yes"], ["y"], name="if", then_branch=branches[0], else_branch=branches[1]),
        ]
        yes = numpy_helper.from_array(np.array(True), "yes")
        graph = onnx.helper.make_graph(nodes, "g", info[:1], info[1:], [yes])
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)

    assert difference(branching("Sigmoid", 1), branching("Sigmoid", 1)).same
    assert difference(branching("Sigmoid", 1), branching("Tanh", 1)).nodes["changed"] == ("if",)
    assert difference(branching("Sigmoid", 1), branching("Sigmoid", 5)).nodes["changed"] == ("fill",)


def test_shapes_are_for_the_inputs_that_a_model_has(model: onnx.ModelProto) -> None:
    """``input_shapes`` of an input that only one model has are no error."""
    other = changed(model)
    old, new = other.graph.input[0].name, "renamed"
    other.graph.input[0].name = new
    for node in other.graph.node:
        for k, name in enumerate(node.input):
            if name == old:
                node.input[k] = new
    found = difference(model, other, onnxprune.Options(input_shapes={old: (1, 1, 32, 32)}))
    assert found.cost["mac"][0] * 4 == found.cost["mac"][1]
    assert found.graph == ("inputs",)
    refused = run("diff", DENOISE, DENOISE, "--input-shape", "noisyy:1,1,32,32")
    assert refused.exit_code == 2
    assert "noisyy" in refused.output


def test_a_missing_file_is_told(tmp_path: pathlib.Path) -> None:
    """A file that is not there ends with exit code 7."""
    assert run("diff", DENOISE, tmp_path / "absent.onnx").exit_code == 7
