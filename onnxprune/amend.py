"""Amend: new values for weights of a model, and biases that it did not have; and how to take those out again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune import external
from onnxprune.errors import ModelError
from onnxprune.protos import as_text, constant_tensor, list_as_inputs


@dataclass(frozen=True, slots=True, eq=False)
class AddedBias:
    """A constant that a node reads in addition to, or instead of, what it read.

    Attributes
    ----------
    node
        First output of the node that reads it.
    index
        Input at which it does; None where an Add node was put behind the node to add it.
    replaces
        What the node read there (a vector that other nodes read, too), or an empty string.
    """

    node: str
    index: int | None
    replaces: str
    value: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Return what a plan says of it."""
        return {"node": self.node, "input": self.index, "replaces": self.replaces, "size": int(self.value.size)}


def amend(model: onnx.ModelProto, values: Mapping[str, np.ndarray], added: Mapping[str, AddedBias]) -> onnx.ModelProto:
    """Return a copy of a model with other values for some constants, and with further biases."""
    amended = onnx.ModelProto()
    amended.CopyFrom(model)
    graph = amended.graph
    for tensor in graph.initializer:
        if tensor.name in values:
            _set_value(tensor, values[tensor.name])
    for node in graph.node:
        if node.op_type == "Constant" and node.output[0] in values:
            tensor = constant_tensor(node)
            assert tensor is not None
            if not _set_value(tensor, values[node.output[0]]):
                continue
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("value", tensor))
    places = {node.output[0]: place for place, node in enumerate(graph.node) if node.output}
    for name, bias in sorted(added.items(), key=lambda item: -places[item[1].node]):
        node = graph.node[places[bias.node]]
        graph.initializer.append(numpy_helper.from_array(np.asarray(bias.value, order="C"), name))
        if bias.index is None:
            node.output[0] = f"{bias.node}/unbiased"
            graph.node.insert(
                places[bias.node] + 1, helper.make_node("Add", [node.output[0], name], [bias.node], name=name)
            )
        else:
            while len(node.input) <= bias.index:
                node.input.append("")
            node.input[bias.index] = name
    if model.ir_version < 4:
        list_as_inputs(model.graph, graph)
    return amended


def strip(model: onnx.ModelProto, added: Mapping[str, Mapping[str, Any]]) -> onnx.ModelProto:
    """Return a copy of a model without the biases that a plan says were added.

    Raises
    ------
    ModelError
        The model does not have them where the plan says.
    """
    if not added:
        return model
    stripped = onnx.ModelProto()
    stripped.CopyFrom(model)
    graph = stripped.graph
    held = {tensor.name for tensor in graph.initializer} | {name for node in graph.node for name in node.output}
    try:
        for name, entry in added.items():
            key, index, old = str(entry["node"]), entry["input"], str(entry["replaces"])
            made = {node.output[0]: place for place, node in enumerate(graph.node) if node.output}
            node = graph.node[made[key]]
            if index is None:
                if node.op_type != "Add" or list(node.input) != [f"{key}/unbiased", name]:
                    raise KeyError(key)
                graph.node[made[f"{key}/unbiased"]].output[0] = key
                del graph.node[made[key]]
                _rename_copies(graph, key)
            else:
                if node.input[index] != name:
                    raise KeyError(key)
                node.input[index] = old
                while node.input and not node.input[-1]:
                    del node.input[-1]
            place = next(place for place, tensor in enumerate(graph.initializer) if tensor.name == name)
            if old.endswith(f"@{key}") and old not in held:  # the slice that a node alone reads of a shared vector
                graph.initializer[place].name = old
            else:
                del graph.initializer[place]
            for position in [p for p, value in enumerate(graph.input) if value.name == name]:
                del graph.input[position]
    except (KeyError, IndexError, StopIteration, TypeError) as error:
        raise ModelError(
            f"the plan says that the bias {name} was added, but the model does not have it there"
        ) from error
    return stripped


def _rename_copies(graph: onnx.GraphProto, key: str) -> None:
    """Name what a node alone reads by its first output again, which an Add node behind it had taken."""
    suffix = f"@{key}/unbiased"
    (node,) = (node for node in graph.node if key in node.output)
    renamed = {name: f"{name.removesuffix(suffix)}@{key}" for name in node.input if name.endswith(suffix)}
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for place, name in enumerate(node.input):
        node.input[place] = renamed.get(name, name)


def _set_value(tensor: onnx.TensorProto, value: np.ndarray) -> bool:
    """Give a tensor another value of its own type, keeping documentation and metadata; say whether it changed a bit."""
    kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    fresh = numpy_helper.from_array(np.asarray(value, kind, order="C").reshape(tuple(tensor.dims)), tensor.name)
    if fresh.raw_data == numpy_helper.from_array(external.array(tensor)).raw_data:
        return False  # the tensor may hold its numbers in another field
    if tensor.HasField("doc_string"):
        fresh.doc_string = as_text(tensor.doc_string)
    fresh.metadata_props.extend(tensor.metadata_props)
    if external.belongs_outside(tensor):
        fresh.data_location = tensor.data_location
    tensor.CopyFrom(fresh)
    return True
