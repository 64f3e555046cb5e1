"""Files that nobody would export: each was found by tools/mutants.py, and is refused in a line or pruned as it should be."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from numpy.typing import ArrayLike
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxprune
from commands import ok
from graphs import Tiny, perceptron, sandwich
from onnxprune import ops
from oracle import assert_pruned, couple_proto

ROOT = pathlib.Path(__file__).resolve().parents[1]


def convolutions() -> ModelProto:
    """Build Conv ``a``, Relu, Conv ``z``."""
    return sandwich(lambda t, x: t.node("Relu", x, name="r"))


def refused(model: ModelProto, *texts: str) -> None:
    """Pruning is refused with a message of one line that has these texts, and leaves the model as it was."""
    given = model.SerializeToString()
    with pytest.raises(onnxprune.OnnxPruneError) as caught:
        onnxprune.prune(model, target_mac=0.6)
    assert model.SerializeToString() == given
    assert caught.value.exit_code in (3, 4, 5)
    assert len(str(caught.value).splitlines()) == 1
    for text in texts:
        assert text in str(caught.value)


def _twice(graph: onnx.GraphProto) -> None:
    graph.node[0].attribute.append(helper.make_attribute("group", 1))


def _reference(graph: onnx.GraphProto) -> None:
    graph.node[0].attribute[0].ref_attr_name = "outer"


def _type(graph: onnx.GraphProto) -> None:
    del graph.node[0].attribute[:]
    graph.node[0].attribute.append(helper.make_attribute("group", [1, 2]))


def _no_inputs(graph: onnx.GraphProto) -> None:
    del graph.node[1].input[:]


def _empty_input(graph: onnx.GraphProto) -> None:
    graph.node[0].input[1] = ""


def _no_writer(graph: onnx.GraphProto) -> None:
    graph.node[1].input[0] = "nowhere"


def _no_output(graph: onnx.GraphProto) -> None:
    graph.output[0].name = "nowhere"


def _same_name(graph: onnx.GraphProto) -> None:
    graph.initializer[0].name = graph.initializer[1].name


def _no_name(graph: onnx.GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), ""))


def _output_twice(graph: onnx.GraphProto) -> None:
    graph.output.append(graph.output[0])


def _segment(graph: onnx.GraphProto) -> None:
    graph.initializer[0].segment.begin = 0


def _too_small(graph: onnx.GraphProto) -> None:
    graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((6, 2, 9, 9), np.float32), "a.w"))
    graph.node[0].attribute[-1].ints[:] = (9, 9)


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (_twice, ("Conv a has two attributes called group",)),
        (_reference, ("Conv a refers to 'outer' of a function",)),
        (_type, ("Conv a has an attribute group of type 7, not INT",)),
        (_no_inputs, ("Relu r has 0 inputs, where 1 to 1 are allowed",)),
        (_empty_input, ("Conv a lacks its input W",)),
        (_no_writer, ("Relu r reads nowhere, which nothing writes",)),
        (_no_output, ("nothing writes its output nowhere",)),
        (_same_name, ("two initializers called a.b",)),
        (_no_name, ("an initializer has no name",)),
        (_output_twice, ("two outputs called z",)),
        (_segment, ("a.w: holds a segment",)),
        (_too_small, ()),
    ],
)
def test_graph_that_means_nothing_is_refused(change: Callable[[onnx.GraphProto], None], texts: tuple[str, ...]) -> None:
    """What a rule takes for granted is looked at before: names, counts of inputs, attributes and their types."""
    model = convolutions()
    change(model.graph)
    refused(model, *texts)


def test_contrib_operator_needs_its_inputs() -> None:
    """Operators of onnxruntime's own have schemas, too."""
    t = Tiny(domains=["com.microsoft"])
    y = t.node("FusedConv", t.input(1, 2, 4, 6), t.random(6, 2, 1, 1, name="a.w"), name="a", domain="com.microsoft")
    model = t.build(t.conv(y, "z", 6, 3))
    assert_pruned(model)
    del model.graph.node[0].input[1:]
    refused(model, "FusedConv a has 1 inputs, where 2 to 4 are allowed")


def test_weight_of_another_rank_is_refused() -> None:
    """A vector in the place of a kernel: onnxruntime loads that and cannot run it."""
    model = convolutions()
    model.graph.node[2].input[:] = ["r", "z.b"]
    refused(model)


def test_shapes_that_contradict_each_other_are_refused() -> None:
    """Where onnx's inference finds a contradiction, onnxruntime says what it is."""
    model = perceptron(lambda t, x: x)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((3, 6), np.float32), "a.w"))
    refused(model, "onnxruntime cannot load the model")


def test_weight_and_tensor_that_swap_are_refused() -> None:
    """A weight that slides over the input, with a bias that does not fit: inference does not look at the bias."""
    model = convolutions()
    model.graph.node[0].input[:2] = ["a.w", "x"]
    refused(model)


def test_norm_that_does_not_fit_is_no_gain() -> None:
    """Parameters of a BatchNormalization for other channels, which old opsets let pass, are no gain of a weight."""
    model = sandwich(lambda t, x: t.batch_norm(x, "n", 6), opset=8)
    for tensor in model.graph.initializer:
        if tensor.name.startswith("n."):
            tensor.CopyFrom(numpy_helper.from_array(np.ones(8, np.float32), tensor.name))
    refused(model)


def test_bias_that_is_one_number_is_refused() -> None:
    """A bias has an axis."""
    model = convolutions()
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.array(1, np.float32), "a.b"))
    refused(model)


def test_declared_shape_of_a_constant_node_follows() -> None:
    """Where a Constant node's output is declared, the declaration shrinks with it."""
    model = convolutions()
    weight = model.graph.initializer[0]
    model.graph.node.insert(0, helper.make_node("Constant", [], ["a.w"], value=weight))
    model.graph.value_info.append(helper.make_tensor_value_info("a.w", TensorProto.FLOAT, [6, 2, 1, 1]))
    del model.graph.initializer[0]
    assert_pruned(model)


def test_name_that_is_no_text_is_refused() -> None:
    """A byte of a name was flipped: protobuf reads that, and gives bytes in the place of text."""
    data = convolutions().SerializeToString().replace(b"\x01r", b"\x01\xec")
    refused(onnx.ModelProto.FromString(data), "is no UTF-8 text")


@pytest.mark.parametrize("name", ["a_graph", "a_length"])
def test_names_of_graphs_and_lengths_are_text(name: str) -> None:
    """Like those of nodes."""
    model = convolutions()
    model.graph.name = "a_graph"
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "a_length"
    refused(onnx.ModelProto.FromString(_damaged(model, name)), "is no UTF-8 text")


def _damaged(model: ModelProto, text: str) -> bytes:
    return model.SerializeToString().replace(text.encode(), b"\xee" + text.encode()[1:])


def test_documentation_in_another_encoding_does_no_harm(tmp_path: pathlib.Path) -> None:
    """What is no UTF-8 in texts for people is replaced where it must be copied; the model is pruned, and can be read."""
    model = convolutions()
    model.producer_name = model.doc_string = model.graph.doc_string = "a caf\u00e9"
    for part in (model.graph.input[0], model.graph.node[0], model.graph.initializer[0]):
        part.doc_string = "a caf\u00e9"
    model.metadata_props.add(key="a", value="a caf\u00e9")
    (tmp_path / "in.onnx").write_bytes(model.SerializeToString().replace("\u00e9".encode(), b"\xe9!"))
    ok("prune", tmp_path / "in.onnx", tmp_path / "out.onnx", "--target-mac", 0.6, "--plan-out", tmp_path / "plan.json")
    ok("verify", tmp_path / "in.onnx", tmp_path / "out.onnx", "--plan", tmp_path / "plan.json")
    assert onnx.load(tmp_path / "out.onnx").producer_name.startswith("a caf")


def test_number_that_is_nan_stays_as_it_was() -> None:
    """A factor of NaN makes a network that nobody wants; what pruning makes of it verifies all the same."""
    assert_pruned(sandwich(lambda t, x: t.node("Mul", x, t.constant(np.float32(np.nan)))))


def test_scales_of_a_wrong_shape_are_refused() -> None:
    """Scales that do not broadcast to their weight say nothing of its values."""
    model = convolutions()
    weight = model.graph.initializer[0]
    codes = numpy_helper.from_array(np.ones((6, 2, 1, 1), np.int8), "a.codes")
    scales = numpy_helper.from_array(np.ones((6, 3), np.float32), "a.scales")
    model.graph.initializer.remove(weight)
    model.graph.initializer.extend([codes, scales])
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["a.codes", "a.scales"], ["a.w"], axis=0))
    refused(model)


def test_sum_without_one_of_its_terms_is_refused() -> None:
    """A term without a name would end onnxruntime, and this process with it."""
    model = sandwich(lambda t, x: t.node("Sum", x, x, name="s"))
    model.graph.node[1].input[1] = ""
    refused(model, "Sum s lacks one of its inputs data_0")


def test_norm_by_one_number_is_refused() -> None:
    """Scale and bias of an InstanceNormalization are vectors."""

    def middle(t: Tiny, x: str) -> str:
        return t.node(
            "InstanceNormalization", x, *(t.random(6, name=f"n.{role}") for role in ("scale", "shift")), name="n"
        )

    model = sandwich(middle)
    for tensor in model.graph.initializer:
        if tensor.name == "n.scale":
            tensor.CopyFrom(numpy_helper.from_array(np.array(1, np.float32), tensor.name))
    refused(model)


def test_branch_that_gives_too_little_is_refused() -> None:
    """An If has as many outputs as each of its branches."""
    model = convolutions()
    value = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Relu", ["a"], ["inner"])], "branch", [], [value])
    other = helper.make_graph([], "other", [], [])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node[1].CopyFrom(
        helper.make_node("If", ["yes"], ["r"], name="r", then_branch=branch, else_branch=other)
    )
    refused(model, "If r has 1 outputs, and its else_branch has 0")


def test_function_that_is_called_with_too_much_is_refused() -> None:
    """A local function that takes fewer inputs than its call gives cannot be inlined."""
    model = convolutions()
    body = [helper.make_node("Relu", ["x"], ["y"])]
    function = helper.make_function("local", "F", [], ["y"], body, [helper.make_opsetid("", 17)])
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node[1].CopyFrom(helper.make_node("F", ["a"], ["r"], domain="local"))
    refused(model, "a local function cannot be inlined")


def test_constant_that_is_an_output_stays() -> None:
    """A vector that is an output of the graph, beside rows that choose freely, is frozen and no more."""
    t = Tiny()
    y = t.conv(t.input(1, 4, 4, 6), "a", 4, 12, group=2)
    model = t.build(t.conv(y, "z", 12, 3))
    model.graph.output.append(helper.make_tensor_value_info("a.b", TensorProto.FLOAT, [12]))
    coupling = couple_proto(model)
    assert coupling.bundles
    assert_pruned(model)


@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_one_number_are_pruned(bias: bool) -> None:
    """A topology whose weights ConstantOfShape makes prunes as if they were stored."""
    model = sandwich(lambda t, x: t.conv(x, "b", 6, 8, 3, bias=bias), after=8)
    for place, (name, shape) in enumerate((("a.w", (6, 2, 1, 1)), ("b.w", (8, 6, 3, 3)), ("z.w", (3, 8, 1, 1)))):
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.array(shape, np.int64), f"{name}.shape"))
        value = numpy_helper.from_array(np.array([0.01 * (place + 1)], np.float32))
        model.graph.node.insert(0, helper.make_node("ConstantOfShape", [f"{name}.shape"], [name], value=value))
    result = assert_pruned(model, 0.5)
    assert "3 weights that the graph fills with one number were stored as constants" in result.report.notes
    assert result.report.floor["mac"] < 0.2


def test_layer_without_channels_is_refused() -> None:
    """A layer that makes no channel, before an operator that moves channels to pixels, leaves nothing to remove."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    model = t.build(t.node("SpaceToDepth", y, name="s", blocksize=2))
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "a.w")
    weight.CopyFrom(numpy_helper.from_array(np.zeros((0, 2, 1, 1), np.float32), "a.w"))
    refused(model, "target out of reach")


def test_directions_that_its_attribute_does_not_know_freeze_a_recurrence() -> None:
    """Weights of two directions of an operator that says it goes forward: nothing follows from them."""
    t = Tiny()
    x = t.input(5, 2, 4)
    w, r = t.random(2, 18, 4, name="w"), t.random(2, 18, 6, name="r")
    model = t.build(t.node("GRU", x, w, r, name="g", hidden_size=6, direction="bidirectional"))
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.append(helper.make_attribute("hidden_size", 6))
    assert "of 2 directions" in frozen(model)


@pytest.mark.parametrize("op", ["Gather", "ScatterElements", "GatherElements"])
def test_indices_that_do_not_fit_freeze(op: str) -> None:
    """An index beyond the channels, or operands of unequal ranks, freeze what they meet."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    if op == "Gather":
        model = t.build(t.node("Gather", y, t.constant([5]), name="g", axis=1))
        _set(model, model.graph.node[-1].input[1], [6])
        assert "outside of its 6 channels" in frozen(model)
        return
    indices = t.constant(np.zeros((1, 6, 4, 6), np.int64))
    more = [t.constant(np.zeros((1, 6, 4, 6), np.float32))] if op == "ScatterElements" else []
    model = t.build(t.node(op, y, indices, *more, name="g", axis=1))
    _set(model, model.graph.node[-1].input[1], np.zeros((1, 6, 4, 6, 1)) if more else np.zeros(6))
    assert "not of one rank" in frozen(model)


def test_norm_with_more_axes_than_it_normalises_freezes() -> None:
    """A bias that has all axes of a LayerNormalization over the last one."""
    model = perceptron(lambda t, x: t.node("LayerNormalization", x, t.random(6, name="s"), t.random(6, name="b")))
    vector = next(tensor for tensor in model.graph.initializer if tensor.name == "b")
    vector.CopyFrom(numpy_helper.from_array(np.ones((4, 6), np.float32), "b"))
    assert "more axes than it normalises" in frozen(model)


def test_shape_that_is_no_vector_freezes_a_reshape() -> None:
    """The operand of a Reshape with an axis too many."""
    model = perceptron(lambda t, x: t.node("Reshape", x, t.constant([4, 6])))
    _set(model, model.graph.node[1].input[1], [[4, 6]])
    assert "is no vector" in frozen(model)


def gru_of_flat_biases() -> ModelProto:
    """Build a GRU whose biases have one axis."""
    t = Tiny()
    x = t.input(5, 2, 4)
    w, r, b = t.random(1, 18, 4, name="w"), t.random(1, 18, 6, name="r"), t.random(1, 36, name="b")
    model = t.build(t.node("GRU", x, w, r, b, name="g", hidden_size=6))
    biases = next(tensor for tensor in model.graph.initializer if tensor.name == "b")
    biases.CopyFrom(numpy_helper.from_array(np.zeros(36, np.float32), "b"))
    return model


def two_scales_of_one_number() -> ModelProto:
    """Build a DequantizeLinear whose input has no axis, with two scales for it."""
    t = Tiny()
    t.input(1, 2, 4, 6)
    one, scales = t.constant(np.array(3, np.int8)), t.constant(np.ones(2, np.float32))
    return t.build(t.node("Mul", "x", t.node("DequantizeLinear", one, scales, name="q", axis=-1)))


@pytest.mark.parametrize("build", [gru_of_flat_biases, two_scales_of_one_number])
def test_what_no_rule_can_read_is_refused_where_it_does_not_run(build: Callable[[], ModelProto]) -> None:
    """A rule that fails on a model that onnxruntime cannot run either blames the model, whatever is asked for."""
    model = build()
    refused(model, "onnxruntime cannot", "ended with IndexError")
    with pytest.raises(onnxprune.ModelError, match="ended with IndexError"):
        onnxprune.inspect(model)


def test_rule_that_fails_on_a_model_that_runs_is_our_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a rule is not hidden where the model is sound."""
    monkeypatch.setitem(ops._COUPLE, ("", "Relu"), lambda node, ledger: ledger.input(node, 7))
    with pytest.raises(IndexError):
        onnxprune.prune(convolutions(), target_mac=0.6)


def test_channels_of_which_none_is_picked_stay() -> None:
    """A Slice that ends where it begins."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    model = t.build(t.node("Slice", y, t.constant([2]), t.constant([3]), t.constant([1]), name="s"))
    _set(model, model.graph.node[1].input[2], [2])
    assert "none of it is picked" in frozen(model)


def test_attribute_that_an_operator_does_not_know_is_refused() -> None:
    """A tensor of a Constant under another attribute's name is none, though onnxruntime takes it."""
    model = perceptron(lambda t, x: t.node("Reshape", x, t.constant([4, 6])))
    tensor = numpy_helper.from_array(np.array([4, 6], np.int64))
    node = helper.make_node("Constant", [], ["target"], name="k")
    node.attribute.append(helper.make_attribute("group", tensor))
    model.graph.node.insert(0, node)
    model.graph.node[2].input[1] = "target"
    refused(model, "Constant k has an attribute group, which it does not know in this opset")


def test_quantising_by_nan_is_refused() -> None:
    """A scale of activations that is NaN is named."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    scale, zero = t.constant(np.float32(0.1), "scale"), t.constant(np.int8(0))
    y = t.node("DequantizeLinear", t.node("QuantizeLinear", y, scale, zero), scale, zero)
    model = t.build(t.conv(y, "z", 6, 3))
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "scale")
    tensor.CopyFrom(numpy_helper.from_array(np.array(np.nan, np.float32), "scale"))
    refused(model, "scale: a scale is NaN")


def test_branches_are_not_looked_at_before_the_opset() -> None:
    """An If with one branch, in a model that imports no standard operators."""
    model = convolutions()
    model.graph.node.append(helper.make_node("If", ["r"], ["i"], then_branch=model.graph))
    model.opset_import[0].domain = "ai.onnx.ml"
    refused(model, "no standard operator set")


def test_rotation_that_is_neither_way_freezes() -> None:
    """Any value of ``interleaved`` but 0 and 1: programs disagree about it."""
    t = Tiny(opset=23)
    y = t.linear(t.input(1, 5, 4), "q", 4, 8)
    tables = [t.random(1, 5, 2, name=name) for name in ("cos", "sin")]
    model = t.build(t.linear(t.node("RotaryEmbedding", y, *tables, num_heads=2, interleaved=1, name="r"), "z", 8, 3))
    attribute = next(a for a in model.graph.node[1].attribute if a.name == "interleaved")
    attribute.i = -1
    assert "interleaved is -1" in frozen(model)


def test_weight_that_does_not_fit_its_groups_freezes() -> None:
    """Four groups over six channels."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    model = t.build(t.node("Conv", y, t.random(6, 3, 1, 1, name="w"), name="g", group=2))
    attribute = next(a for a in model.graph.node[-1].attribute if a.name == "group")
    attribute.i = 4
    assert "in 4 groups does not fit 6 channels" in frozen(model)


def test_dead_nodes_in_any_order() -> None:
    """A node that nobody reads stands before the one that it reads, which reads what shrinks: both go."""
    model = convolutions()
    model.graph.node.insert(0, helper.make_node("Gather", ["sizes", "one"], ["dead"], name="g"))
    model.graph.node.append(helper.make_node("Shape", ["r"], ["sizes"], name="s"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "one"))
    result = onnxprune.prune(model, target_mac=0.6)
    assert {node.name for node in result.model.graph.node} == {"a", "r", "z"}


def test_constant_that_may_be_given_stays() -> None:
    """An initializer that is listed as an input keeps its value, though the node that read it goes."""
    model = convolutions()
    model.graph.initializer.append(numpy_helper.from_array(np.array(2), "two"))
    model.graph.input.append(helper.make_tensor_value_info("two", TensorProto.INT64, []))
    model.graph.node.append(helper.make_node("Shape", ["r"], ["sizes"], name="s"))
    model.graph.node.append(helper.make_node("Div", ["sizes", "two"], ["dead"], name="d"))
    result = onnxprune.prune(model, target_mac=0.6)
    assert {node.name for node in result.model.graph.node} == {"a", "r", "z"}
    assert {"two"} < {tensor.name for tensor in result.model.graph.initializer}
    assert [value.name for value in result.model.graph.input] == [value.name for value in model.graph.input]


def test_dead_nodes_that_read_what_shrinks_by_another_name() -> None:
    """A bias has a second name by an Identity, and a node that nobody reads adds it to what stays: it goes."""
    t = Tiny()
    bias = t.node("Identity", t.random(6, name="a.b"), name="i")
    a = t.node("Conv", t.input(1, 2, 4, 6), t.random(6, 2, 3, 3, name="a.w"), bias, name="a", pads=[1] * 4)
    t.node("Add", bias, t.random(6, name="whole"), name="dead")
    result = onnxprune.prune(t.build(t.conv(t.node("Relu", a, name="r"), "z", 6, 3)), target_mac=0.6)
    assert {node.name for node in result.model.graph.node} == {"i", "a", "r", "z"}


@pytest.mark.parametrize("n_parts", [-1, 0, 1, 1 << 40])
def test_parts_of_a_split_that_are_not_there(n_parts: int) -> None:
    """Fewer parts than outputs would end the process within onnx's shape inference, many would take memory without end."""
    t = Tiny(opset=18)
    first, second = t.node("Split", t.input(1, 4, 4, 6), axis=1, num_outputs=2, name="s", outputs=2)
    model = t.build(t.conv(t.node("Add", first, second), "z", 2, 3))
    next(a for a in model.graph.node[0].attribute if a.name == "num_outputs").i = n_parts
    refused(model, f"Split s has 2 outputs, and its num_outputs is {n_parts}")


def test_axis_beyond_32_bits() -> None:
    """Such a number, cut to 32 bits, would end the process within onnx's shape inference."""
    t = Tiny()
    inputs = [t.input(1, 2, 4, 6), t.random(2, 4, 6, name="scale")]
    y, mean, _ = t.node("LayerNormalization", *inputs, axis=1, name="l", outputs=3)
    model = t.build(t.conv(t.node("Add", y, mean), "z", 2, 3))
    model.graph.node[0].attribute[0].i = 1 << 31
    refused(model, "LayerNormalization l has an axis of 2147483648")


def test_batch_axes_below_none() -> None:
    """Such a number would end the process within onnx's shape inference."""
    t = Tiny()
    y = t.node("GatherND", t.input(1, 2, 4, 6), t.constant(np.array([[0]])), batch_dims=0, name="g")
    model = t.build(t.conv(y, "z", 2, 3))
    model.graph.node[0].attribute[0].i = -7
    refused(model, "GatherND g has a batch_dims of -7")


@pytest.mark.parametrize("op", ["EyeLike", "RegexFullMatch", "ai.onnx.ml.LabelEncoder", "ai.onnx.ml.DictVectorizer"])
def test_types_that_nobody_knows(op: str) -> None:
    """Operators whose shape inference ends the process where it does not know what they read: the model is refused."""
    domain, _, op = op.rpartition(".")
    t = Tiny(opset=20, domains=["nobody", *filter(None, [domain])])
    model = t.build(t.conv(t.node("Relu", t.conv(t.input(1, 2, 4, 6), "a", 2, 4)), "z", 4, 3))
    known = {"LabelEncoder": {"keys_strings": ["a"], "values_int64s": [1]}, "DictVectorizer": {"int64_vocabulary": [1]}}
    model.graph.node.append(helper.make_node("Unknown", ["x"], ["u"], domain="nobody"))
    model.graph.node.append(helper.make_node(op, ["u"], ["e"], domain=domain, name="e", **known.get(op, {})))
    model.graph.output.append(helper.make_tensor_value_info("e", TensorProto.FLOAT, None))
    refused(model)


def test_model_that_does_not_run_is_to_blame_itself() -> None:
    """Two nodes of one name are refused by onnxruntime: that is said of the model, not of what pruning made of it."""
    model = convolutions()
    model.graph.node[1].name = model.graph.node[0].name
    refused(model, "two nodes with same node name")
    with pytest.raises(onnxprune.ModelError):
        onnxprune.prune(model, target_mac=0.6)


def frozen(model: ModelProto) -> str:
    """What inspecting says about frozen tensors."""
    return " ".join(each["reason"] for each in onnxprune.inspect(model).to_json()["frozen"])


def _set(model: ModelProto, name: str, indices: ArrayLike) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.array(indices, np.int64), name))


def test_shape_of_a_weight_that_is_read_off_another_verifies() -> None:
    """Pruning stores the shape of a filled weight where it was read off a tensor before; verifying knows that it may."""
    t = Tiny(opset=23)
    x = t.node("MatMul", t.input(4, 5), t.random(5, 8, name="q.w"), name="q")
    rows = t.node("Shape", t.random(8, 3, name="z.w"), name="rows")
    y = t.node("MatMul", x, t.node("ConstantOfShape", rows, name="filled"), name="z")
    assert_pruned(t.build(y))


# -- the tools ---------------------------------------------------------------------------------------------------------


def tool(name: str, *arguments: object) -> str:
    """Run a tool; it must find nothing wrong."""
    command = [sys.executable, ROOT / "tools" / name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_few_mutants_prune_or_are_refused() -> None:
    """Mutants of the tests' own models prune and prove, or are refused in a line; none does anything else."""
    assert "40 mutants in" in tool("mutants.py", "--mutants", 40, "--seed", 1, "--family", "case")


def test_few_models_of_onnx_prune_or_are_refused() -> None:
    """Stored models of single operators, and a topology whose weights are one number each."""
    few = (
        "--kind",
        "simple",
        "--kind",
        "pytorch-operator",
        "--kind",
        "light",
        "--only",
        "test_*",
        "--only",
        "*squeezenet",
    )
    *_, total = tool("onnx_models.py", *few).splitlines()
    assert int(total.split()[0]) >= 30, total


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the tool forks, which this system cannot")
def test_few_nodes_end_shape_inference() -> None:
    """Nodes of operators on which onnx's shape inference would end the process do not reach it."""
    few = [
        word
        for op in ("EyeLike", "OneHot", "RegexFullMatch", "LabelEncoder", "GatherND", "Split")
        for word in ("--only", op)
    ]
    *_, total = tool("inference.py", *few).splitlines()
    assert total.endswith("100 nodes each: 0 end the process"), total


@pytest.mark.slow
def test_all_models_of_onnx_prune_or_are_refused() -> None:
    """So does every model of the onnx package, and every topology prunes."""
    tool("onnx_models.py")


@pytest.mark.slow
def test_many_mutants_prune_or_are_refused() -> None:
    """So do 20,000, those of real architectures among them."""
    tool("mutants.py", "--mutants", 20000)
