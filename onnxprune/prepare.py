"""What must be rewritten before a graph can be pruned: calls of functions, zero states, and weights that it computes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

import onnx
from onnx import helper, inliner, numpy_helper

from onnxprune.branches import unique_names
from onnxprune.errors import ModelError
from onnxprune.ops.elementwise import BROADCAST, UNARY
from onnxprune.protos import constant_tensor, copy_fields, every_node, list_as_inputs, reads
from onnxprune.runtime import Session
from onnxprune.shapes import infer
from onnxprune.states import without_zero_states

_MOVES = (
    "Transpose Reshape Flatten Squeeze Unsqueeze Expand Tile Slice Gather Concat Split Pad Constant ConstantOfShape "
    "QuantizeLinear DequantizeLinear DepthToSpace SpaceToDepth"
).split()
_PASSES = frozenset((*UNARY, *BROADCAST, *_MOVES))
"""Operators through which labels of a weight travel; any other combines its channels with one another."""
_PRODUCTS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
_NEVER = frozenset(
    "If Loop Scan RandomNormal RandomUniform RandomNormalLike RandomUniformLike Bernoulli Multinomial Dropout".split()
)


def prepare(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Leave out initial states that are zero, and fold weights computed from all channels of others.

    Removing a channel must not change the weights of the others, as it would where a graph standardises its weights: those
    become constants. Returns the model itself where nothing is to do, and notes that say what was done.
    """
    notes = []
    model = given = unique_names(model)
    model, n_states = without_zero_states(model)
    if n_states:
        notes.append(f"{n_states} initial states of recurrent layers were left out, because they are zero")
    flat = _flat_parameters(model)
    if flat:
        model = _in_rows(model, flat)
        notes.append(f"{len(flat)} scales and zero points of MatMulNBits got an axis for outputs and one for blocks")
    folded = _computed_weights(model)
    if folded:
        model = _fold(model, folded)
        notes.append(
            f"{len(folded)} weights that the graph computes (weight standardisation) were folded into constants"
        )
    filled = _filled_weights(model)
    if filled:
        model = _fold(model, filled)
        notes.append(f"{len(filled)} weights that the graph fills with one number were stored as constants")
    if model is not given and model.ir_version < 4:
        list_as_inputs(given.graph, model.graph)
    return model, tuple(notes)


def inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put the bodies of local functions in the place of their calls; return the model itself where there is no call.

    Raises
    ------
    ModelError
        Functions call each other in a circle, or so often that the graph would grow beyond :data:`MAX_INLINED`.
    """
    local = {(function.domain, function.name) for function in model.functions}
    if not local or not any((node.domain, node.op_type) in local for node in every_node(model.graph)):
        return model
    if _inlined_size(model) > MAX_INLINED:
        raise ModelError("the graph is invalid: its local functions call each other so often that it has no end")
    try:
        return inliner.inline_local_functions(model)
    except (onnx.checker.ValidationError, RuntimeError) as error:
        raise ModelError(f"the graph is invalid: a local function cannot be inlined ({_told(error)})") from error


def _told(error: Exception) -> str:
    """First line of what onnx says, without the place in its sources."""
    return str(error).splitlines()[0].rpartition("failed: ")[2]


MAX_INLINED = 2 << 30
"""Bytes that a graph may take with its functions inlined, every node counted as at least :data:`NODE_BYTES`."""

NODE_BYTES = 1024


def _inlined_size(model: onnx.ModelProto) -> int:
    """Bytes of the graph once every call of a local function is replaced by its body."""
    functions = {(function.domain, function.name): function for function in model.functions}
    calls = {key: {(n.domain, n.op_type) for n in every_node(f)} & functions.keys() for key, f in functions.items()}
    sizes: dict[tuple[str, str], int] = {}

    def size(graph: onnx.GraphProto | onnx.FunctionProto) -> int:
        return sum(
            sizes.get((node.domain, node.op_type), 0) + NODE_BYTES + node.ByteSize() for node in every_node(graph)
        )

    try:
        for key in TopologicalSorter(calls).static_order():
            sizes[key] = size(functions[key])
    except CycleError as error:
        circle = " -> ".join(name for _, name in error.args[1])
        raise ModelError(f"the graph is invalid: local functions call each other in a circle ({circle})") from error
    return size(model.graph)


def _flat_parameters(model: onnx.ModelProto) -> dict[str, int]:
    """Scales and zero points of MatMulNBits that lie in one row, and how many outputs they belong to."""
    dims = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    return {
        name: attribute.i
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "N"
        for name in node.input[2:4]
        if len(dims.get(name, ())) == 1 and dims[name][0] % attribute.i == 0
    }


def _in_rows(model: onnx.ModelProto, flat: Mapping[str, int]) -> onnx.ModelProto:
    """Give vectors a row for every output: the operator reads them alike, and either axis can then shrink."""
    shaped = onnx.ModelProto()
    shaped.CopyFrom(model)
    for tensor in shaped.graph.initializer:
        if tensor.name in flat:
            tensor.dims[:] = (flat[tensor.name], tensor.dims[0] // flat[tensor.name])
    for value in (*shaped.graph.input, *shaped.graph.value_info):
        if value.name in flat:
            value.type.tensor_type.ClearField("shape")
    return shaped


def _computed_weights(model: onnx.ModelProto) -> list[str]:
    """Tensors that follow from floating-point constants alone, through an operator that combines channels."""
    held: dict[str, onnx.TensorProto | None] = {tensor.name: tensor for tensor in model.graph.initializer}
    held.update({node.output[0]: constant_tensor(node) for node in model.graph.node if node.op_type == "Constant"})
    constants = {name for name, tensor in held.items() if tensor is not None and _has_channels(tensor)}
    others = held.keys() - constants
    combined: dict[str, bool] = dict.fromkeys(constants, False)
    for node in model.graph.node:
        own, results = [name for name in node.input if name], [name for name in node.output if name]
        known = own and all(name in combined or name in others for name in own)
        if not known or node.op_type in _NEVER or node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in ("Shape", "Size") or combined.keys().isdisjoint(own):
            others.update(results)
            continue
        mixed = node.op_type not in _PASSES or any(combined.get(name, False) for name in own)
        combined.update(dict.fromkeys(results, mixed))
    read = {name for node in model.graph.node for name in reads(node)}
    outside = [output.name for output in model.graph.output]
    for node in model.graph.node:
        if not all(name in combined or name in others for name in filter(None, node.output)):
            outside += reads(node)
    found = dict.fromkeys(name for name in outside if combined.get(name, False))
    for node in model.graph.node:  # what else such a node computes would go with it
        if not found.keys().isdisjoint(node.output):
            found.update(dict.fromkeys(name for name in node.output if name in read))
    return list(found)


def _filled_weights(model: onnx.ModelProto) -> list[str]:
    """Operands of convolutions and products that ConstantOfShape makes of a stored shape."""
    stored = {tensor.name for tensor in model.graph.initializer}
    stored.update(node.output[0] for node in model.graph.node if node.op_type == "Constant")
    made = {
        node.output[0] for node in model.graph.node if node.op_type == "ConstantOfShape" and node.input[0] in stored
    }
    read = (name for node in model.graph.node if node.op_type in _PRODUCTS for name in node.input[:2])
    return list(dict.fromkeys(name for name in read if name in made))


def _has_channels(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor holds several floating-point numbers."""
    return math.prod(tensor.dims) > 1 and helper.tensor_dtype_to_np_dtype(tensor.data_type).kind in "fV"


def _fold(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """Put the values of tensors in the place of the nodes that compute them."""
    computed, needed = set(names), set(names)
    nodes: list[onnx.NodeProto] = []
    for node in reversed(model.graph.node):
        if not needed.isdisjoint(node.output):
            nodes.insert(0, node)
            needed.update(node.input, node.output)
    folded = onnx.ModelProto()
    copy_fields(model, folded, leave_out=("graph",))
    copy_fields(model.graph, folded.graph, leave_out=("initializer", "node"))
    live = [node for node in model.graph.node if computed.isdisjoint(node.output)]
    while True:
        read = {name for node in live for name in reads(node)} | {output.name for output in model.graph.output}
        kept = [node for node in live if not needed.issuperset(node.output) or not read.isdisjoint(node.output)]
        if len(kept) == len(live):
            break
        live = kept
    folded.graph.node.extend(live)
    unread = needed - read
    folded.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name not in unread)
    folded.graph.initializer.extend(_values(model, nodes, names))
    return folded


def _values(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], names: Sequence[str]
) -> Iterator[onnx.TensorProto]:
    """Compute tensors, of the type that the graph has them in."""
    read = {name for node in nodes for name in node.input}
    part = onnx.ModelProto(ir_version=max(model.ir_version, 4))
    part.opset_import.extend(model.opset_import)
    part.graph.name = "weights"
    part.graph.node.extend(nodes)
    part.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in read)
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = Session(part, optimize=False)
    _, types = infer(part) if session.promoted else ({}, {})
    for name, value in zip(names, session.run({}, names), strict=True):
        dtype = helper.tensor_dtype_to_np_dtype(types[name]) if session.promoted else value.dtype
        yield numpy_helper.from_array(value.astype(dtype), name)
