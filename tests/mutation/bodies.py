"""Changes of control flow and local functions; nodes are wrapped into them where a model has none."""

from __future__ import annotations

import random

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxprune.protos import bodies

from .common import Unfit, copy, graphs, integer, names, pick


def _wrapped(model: ModelProto, rng: random.Random, way: str) -> NodeProto:
    """Put a node of the main graph into a branch, a loop or a function of its own, and return what calls it."""
    places = [i for i, n in enumerate(model.graph.node) if len(n.output) == 1 and n.output[0] and n.input]
    place = pick(rng, places)
    node = copy(model.graph.node[place])
    out, inner = node.output[0], f"{node.output[0]}.inner"
    node.output[0] = inner
    result = helper.make_tensor_value_info(inner, TensorProto.FLOAT, None)
    before = []
    if way == "If":
        branch = helper.make_graph([node], "then", [], [result])
        other = copy(branch)
        if rng.random() < 0.3:
            other.node[0].op_type = rng.choice(("Relu", "Identity", "Neg"))
        condition = f"{out}.condition"
        before = [
            helper.make_node("Constant", [], [condition], value=numpy_helper.from_array(np.array(rng.random() < 0.5)))
        ]
        if rng.random() < 0.3:
            model.graph.input.append(helper.make_tensor_value_info(condition, TensorProto.BOOL, []))
            before = []
        caller = helper.make_node("If", [condition], [out], then_branch=branch, else_branch=other)
    elif way == "Loop":
        trips = numpy_helper.from_array(np.array(rng.choice((0, 1, 1, 3, 10**12)), np.int64), f"{out}.trips")
        model.graph.initializer.append(trips)
        going = [helper.make_tensor_value_info(f"{out}.{n}", k, []) for n, k in (("i", 7), ("go", 9))]
        carried = helper.make_tensor_value_info(f"{out}.state", TensorProto.FLOAT, None)
        first = node.input[0]
        node.input[0] = carried.name
        same = helper.make_node("Identity", [f"{out}.go"], [f"{out}.goes"])
        goes = helper.make_tensor_value_info(f"{out}.goes", TensorProto.BOOL, [])
        body = helper.make_graph([node, same], "body", [*going, carried], [goes, result])
        caller = helper.make_node("Loop", [trips.name, "", first], [out], body=body)
    else:
        read = list(dict.fromkeys(name for name in node.input if name))
        attributes = [a.name for a in node.attribute]
        function = helper.make_function(
            "local", f"Function{place}", read, [inner], [node], list(model.opset_import), []
        )
        if attributes and rng.random() < 0.3:
            function.attribute.append(attributes[0])
            reference = function.node[0].attribute[0]
            reference.ref_attr_name = reference.name
        model.functions.append(function)
        model.opset_import.append(helper.make_opsetid("local", 1))
        caller = helper.make_node(function.name, read, [out], domain="local")
    model.graph.node[place].CopyFrom(caller)
    for added in before:
        model.graph.node.insert(place, added)
    return model.graph.node[place + len(before)]


def branch(model: ModelProto, rng: random.Random) -> None:
    """Put a node into both branches of an If."""
    _wrapped(model, rng, "If")


def loop(model: ModelProto, rng: random.Random) -> None:
    """Put a node into the body of a Loop."""
    _wrapped(model, rng, "Loop")


def function(model: ModelProto, rng: random.Random) -> None:
    """Put a node into a local function."""
    _wrapped(model, rng, "function")


def wreck(model: ModelProto, rng: random.Random) -> None:
    """Take something from a body: an output, an input, all of it, or its names."""
    holders = [n for g in graphs(model) for n in g.node if any(True for _ in bodies(n))]
    node = rng.choice(holders) if holders and rng.random() < 0.6 else _wrapped(model, rng, rng.choice(("If", "Loop")))
    body = pick(rng, list(bodies(node)))
    way = rng.randrange(8)
    if way == 0 and body.output:
        del body.output[rng.randrange(len(body.output))]
    elif way == 1 and body.input:
        del body.input[rng.randrange(len(body.input))]
    elif way == 2:
        body.Clear()
    elif way == 3 and body.output:
        rng.choice(body.output).name = rng.choice(names(model.graph))
    elif way == 4 and body.node:
        del body.node[:]
    elif way == 5:
        del node.attribute[rng.randrange(len(node.attribute))]
    elif way == 6 and body.node and body.node[0].output:
        body.node[0].output[0] = rng.choice(names(model.graph))
    else:
        body.initializer.extend([copy(t) for t in model.graph.initializer[:1]])
        body.input.append(helper.make_tensor_value_info("stray", TensorProto.FLOAT, [integer(rng) % 1000]))


def nest(model: ModelProto, rng: random.Random) -> None:
    """Wrap several times, nodes that are wrapped already among them."""
    for _ in range(rng.choice((2, 3, 6))):
        _wrapped(model, rng, rng.choice(("If", "Loop", "function")))


def wreck_function(model: ModelProto, rng: random.Random) -> None:
    """Break a local function: it calls itself, is gone, is there twice, or has other inputs and outputs."""
    if not model.functions:
        _wrapped(model, rng, "function")
    found = pick(rng, model.functions)
    way = rng.randrange(7)
    if way == 0:
        call = helper.make_node(found.name, list(found.input), list(found.output), domain=found.domain)
        found.node.append(call)
    elif way == 1:
        model.functions.remove(found)
    elif way == 2:
        model.functions.append(copy(found))
    elif way == 3 and found.input:
        del found.input[rng.randrange(len(found.input))]
    elif way == 4 and found.output:
        del found.output[rng.randrange(len(found.output))]
    elif way == 5:
        found.domain = rng.choice(("", "com.microsoft", "other"))
    else:
        found.name = rng.choice(("Conv", "Relu", "", "MatMul"))


def splice(model: ModelProto, rng: random.Random) -> None:
    """Repeat the whole graph behind itself under other names: its weights are then read twice, or are there twice."""
    graph, twin = model.graph, copy(model.graph)
    if not graph.output or not graph.input:
        raise Unfit
    own = {name for node in twin.node for name in node.output if name}
    if rng.random() < 0.5:
        own |= {tensor.name for tensor in twin.initializer}
        for tensor in twin.initializer:
            tensor.name = f"{tensor.name}.twin"
        graph.initializer.extend(twin.initializer)
    for node in twin.node:
        node.input[:] = [f"{name}.twin" if name in own else name for name in node.input]
        node.output[:] = [f"{name}.twin" if name in own else name for name in node.output]
    last = graph.output[0].name
    graph.node.extend(twin.node)
    joined = helper.make_node(rng.choice(("Add", "Mul", "Concat", "Sub")), [last, f"{last}.twin"], ["joined"])
    if joined.op_type == "Concat":
        joined.attribute.append(helper.make_attribute("axis", rng.choice((0, 1, -1))))
    graph.node.append(joined)
    graph.output.append(helper.make_tensor_value_info("joined", TensorProto.FLOAT, None))


CHANGES = {
    "body: branch": branch, "body: loop": loop, "body: function": function, "body: wreck": wreck, "body: nest": nest,
    "body: wreck function": wreck_function, "body: twin": splice,
}  # fmt: skip
