"""Peak memory of activations equals a simulation on the shapes that onnxruntime reports, before and after pruning."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper

import architectures
import onnxprune
from graphs import Tiny

VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")


def captured(node: onnx.NodeProto) -> set[str]:
    """What the bodies of a node read from outside of them."""
    bodies = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    inside = {name for body in bodies for n in body.node for name in n.output}
    inside |= {value.name for body in bodies for value in (*body.input, *body.initializer)}
    return {name for body in bodies for n in body.node for name in n.input} - inside


def simulated(model: ModelProto) -> int:
    """Run a model with every tensor as an output, then replay it: bytes alive while each node runs, the largest of them."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    outputs = [value.name for value in model.graph.output]
    computed = [name for node in model.graph.node for name in node.output if name]
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in computed)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options)
    feeds = {i.name: np.ones(i.shape, np.float32) for i in session.get_inputs()}
    held = {**feeds, **dict(zip(computed, session.run(None, feeds), strict=True))}
    buffer = {name: name for name in held}
    for node in model.graph.node:
        if node.op_type in VIEWS and node.input[0] in buffer:
            buffer[node.output[0]] = buffer[node.input[0]]
    last = {
        buffer[name]: step
        for step, node in enumerate(model.graph.node)
        for name in (*node.input, *captured(node))
        if name in buffer
    }
    last.update({buffer[name]: len(model.graph.node) for name in outputs})
    alive, peak = set(feeds), 0
    constant = {tensor.name for tensor in model.graph.initializer}
    for step, node in enumerate(model.graph.node):
        if constant.issuperset(filter(None, node.input)) and not captured(node):
            constant.update(node.output)
            continue
        alive |= {buffer[name] for name in node.output if name}
        peak = max(peak, sum(held[name].nbytes for name in alive))
        alive = {name for name in alive if last.get(name, -1) > step}
    return peak


@pytest.mark.parametrize("name", ["edsr", "unet_transposed", "densenet", "mobilenet_v2", "fpn", "resnet_b"])
def test_peak_equals_the_simulation(name: str) -> None:
    """The report's figures, of the original and of the pruned model, are those of the files it is about."""
    model = architectures.ALL[name]()
    result = onnxprune.prune(model, target_mac=0.6, proof=False)
    assert result.report.before["peak_memory"] == simulated(model)
    assert result.report.after["peak_memory"] == simulated(result.model)


def quantised() -> ModelProto:
    """Convolutions in QDQ form whose weights, as numbers, are far larger than any tensor between them."""
    t = Tiny()

    def point(name: str, kind: type) -> list[str]:
        return [t.constant(np.float32(0.05), f"{name}.s"), t.constant(np.zeros((), kind), f"{name}.z")]

    y = t.input(1, 3, 4, 4)
    for name, inputs, outputs in (("a", 3, 32), ("b", 32, 32), ("c", 32, 4)):
        operands = point(f"{name}.x", np.uint8)
        y = t.node("DequantizeLinear", t.node("QuantizeLinear", y, *operands), *operands)
        whole = t.constant(t.rng.integers(-127, 128, (outputs, inputs, 3, 3)).astype(np.int8), f"{name}.w")
        kernel = t.node("DequantizeLinear", whole, *point(f"{name}.w", np.int8))
        y = t.node("Relu", t.node("Conv", y, kernel, name=name, pads=[1] * 4))
    return t.build(y)


def test_dequantised_weights_are_no_activations() -> None:
    """What follows from constants alone counts as the weights do, not at all; before and after pruning."""
    model = quantised()
    result = onnxprune.prune(model, target_mac=0.6, proof=False)
    assert result.report.before["peak_memory"] == simulated(model) == 4 * 16 * (32 + 32)
    assert result.report.after["peak_memory"] == simulated(result.model) < simulated(model)


def test_a_loop_that_reads_an_activation_computes_one() -> None:
    """A Loop whose inputs are constants, but whose body reads a computed tensor from outside, follows from no constants."""
    t, value = Tiny(), helper.make_tensor_value_info
    y = t.conv(t.input(1, 3, 4, 4), "a", 3, 8)
    nodes = [helper.make_node("Identity", ["go"], ["goes"]), helper.make_node("Add", ["sum", y], ["added"])]
    given = [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("sum", 1, [1, 8, 4, 4])]
    body = helper.make_graph(
        nodes, "body", given, [value("goes", TensorProto.BOOL, []), value("added", 1, [1, 8, 4, 4])]
    )
    begin = t.constant(np.zeros((1, 8, 4, 4), np.float32))
    y = t.node("Loop", t.constant(np.array(2)), t.constant(np.array(True)), begin, body=body)
    model = t.build(t.conv(y, "z", 8, 3))
    assert onnxprune.inspect(model).before["peak_memory"] == simulated(model) == 4 * 16 * (8 + 8)


def test_a_skip_connection_stays_in_memory() -> None:
    """A tensor that is read again later counts until then; a view of it costs nothing."""
    t = Tiny()
    x = t.input(1, 2, 4, 4)
    early = t.conv(x, "a", 2, 8)
    y = t.conv(t.conv(early, "b", 8, 4), "c", 4, 8)
    y = t.node("Reshape", t.node("Add", y, early), t.constant(np.array([1, -1])))
    assert onnxprune.inspect(t.build(y)).before["peak_memory"] == 4 * 16 * (8 + 8 + 8)
