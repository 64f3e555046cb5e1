"""Small facts about ONNX protobufs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import numpy_helper

INTEGERS = (2, 3, 4, 5, 6, 7, 9, 12, 13, 21, 22, 25, 26)  # TensorProto data types: integers and bool
BITS = {21: 4, 22: 4, 23: 4, 25: 2, 26: 2}  # of an element, where several share a byte: (u)int4, float4, (u)int2


def constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """Tensor of a Constant node, whichever attribute holds it; None for strings and sparse tensors."""
    for attribute in node.attribute:
        if attribute.name == "value":
            return attribute.t
        if attribute.name in ("value_float", "value_floats"):
            floats = attribute.f if attribute.name == "value_float" else attribute.floats
            return numpy_helper.from_array(np.array(floats, np.float32))
        if attribute.name in ("value_int", "value_ints"):
            integers = attribute.i if attribute.name == "value_int" else attribute.ints
            return numpy_helper.from_array(np.array(integers, np.int64))
    return None


def copy_fields(source: Message, target: Message, leave_out: tuple[str, ...]) -> None:
    """Copy a protobuf message without some of its fields, so that weights are not copied twice."""
    for field, value in source.ListFields():
        if field.name in leave_out:
            continue
        if field.is_repeated:
            getattr(target, field.name).extend(value)
        elif field.message_type is not None:
            getattr(target, field.name).CopyFrom(value)
        else:
            setattr(target, field.name, as_text(value) if field.type == field.TYPE_STRING else value)


def as_text(value: str | bytes) -> str:
    """What a field of text holds: protobuf gives bytes where that is no UTF-8, and takes none back."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def reads(proto: onnx.NodeProto) -> Iterator[str]:
    """Names that a node and its bodies read."""
    yield from proto.input
    for attribute in proto.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for node in graph.node:
                yield from reads(node)
            yield from (output.name for output in graph.output)


def is_float(dtype: np.dtype) -> bool:
    """Whether an array type holds floating-point numbers; numpy does not know that of bfloat16."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def list_as_inputs(given: onnx.GraphProto, graph: onnx.GraphProto) -> None:
    """Before IR version 4 every initializer stands among the inputs: drop those that are gone, list the new ones."""
    gone = {tensor.name for tensor in given.initializer} - {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in gone]
    listed = {value.name for value in inputs}
    inputs += [
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in graph.initializer
        if tensor.name not in listed
    ]
    graph.ClearField("input")
    graph.input.extend(inputs)


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Graphs that a node holds: branches of an If, bodies of loops."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def every_node(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """Yield every node, those of bodies included."""
    for node in graph.node:
        yield node
        for body in bodies(node):
            yield from every_node(body)


def captures(node: onnx.NodeProto) -> Iterator[str]:
    """Names that the bodies of a node read from outside."""
    for body in bodies(node):
        own = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
        own.update(name for inner in body.node for name in inner.output)
        read = [name for inner in body.node for name in (*inner.input, *captures(inner))]
        yield from (name for name in (*read, *(output.name for output in body.output)) if name and name not in own)


def named_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initializers, and Constant nodes' tensors under their output's name; bodies included."""
    yield from graph.initializer
    for node in graph.node:
        tensor = constant_tensor(node) if node.op_type == "Constant" else None
        if tensor is not None:
            named = onnx.TensorProto()
            named.CopyFrom(tensor)
            named.name = node.output[0]
            yield named
        for body in bodies(node):
            yield from named_tensors(body)
