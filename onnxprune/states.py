"""Initial states of recurrent layers that are zero, which is what the operators take where none is given.

Exporters make zeros of the states' size, often once for all layers and directions. Since a tensor has one size, all who read
it would have to keep equally many units, and the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from onnxprune import external
from onnxprune.ops.recurrent import GATES, STATES
from onnxprune.protos import constant_tensor, copy_fields, reads

_MOVES = frozenset("Cast Expand Flatten Gather Identity Reshape Slice Split Squeeze Tile Transpose Unsqueeze".split())


def without_zero_states(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Leave out initial states that are zero, and what only made them.

    Returns
    -------
    tuple
        The model (itself where there is no such state), and how many states were left out.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    zero = [
        name
        for node in model.graph.node
        if node.op_type in GATES and node.domain in ("", "ai.onnx")
        for name in node.input[STATES.start : STATES.stop]
        if name and _is_zero(name, makers, tensors)
    ]
    if not zero:
        return model, 0
    nodes = [_without(node, zero) for node in model.graph.node]
    stateless = onnx.ModelProto()
    copy_fields(model, stateless, leave_out=("graph",))
    copy_fields(model.graph, stateless.graph, leave_out=("initializer", "node"))
    outputs = {output.name for output in model.graph.output}
    makes = _upstream(model.graph.node, zero)
    while True:
        read = outputs.union(*(reads(node) for node in nodes))
        live = [node for node in nodes if not makes.issuperset(node.output) or not read.isdisjoint(node.output)]
        if len(live) == len(nodes):
            break
        nodes = live
    stateless.graph.node.extend(nodes)
    stateless.graph.initializer.extend(t for t in tensors.values() if t.name in read or t.name not in makes)
    return stateless, len(zero)


def _is_zero(name: str, makers: Mapping[str, onnx.NodeProto], tensors: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a tensor is made of zeros alone, whatever its size."""
    tensor, node = tensors.get(name), makers.get(name)
    if node is not None and node.op_type in ("Constant", "ConstantOfShape"):
        tensor = constant_tensor(node)
        if tensor is None:  # the default of ConstantOfShape
            return node.op_type == "ConstantOfShape"
    if tensor is not None:
        return not external.array(tensor).any()
    return node is not None and node.op_type in _MOVES and _is_zero(node.input[0], makers, tensors)


def _without(node: onnx.NodeProto, zero: Sequence[str]) -> onnx.NodeProto:
    """The node without initial states that are among ``zero``."""
    if node.op_type not in GATES or node.domain not in ("", "ai.onnx"):
        return node
    inputs = ["" if index in STATES and name in zero else name for index, name in enumerate(node.input)]
    while not inputs[-1]:
        inputs.pop()
    copy = onnx.NodeProto()
    copy_fields(node, copy, leave_out=("input",))
    copy.input.extend(inputs)
    return copy


def _upstream(nodes: Sequence[onnx.NodeProto], names: Sequence[str]) -> set[str]:
    """All that tensors are computed from, and they themselves."""
    found = set(names)
    for node in reversed(nodes):
        if not found.isdisjoint(node.output):
            found.update(node.input)
    return found
