"""Apply: remove the channels that a plan does not keep from the original model, physically.

Only what must change is touched: sliced initializers, group attributes, shape constants and value_info. Everything else,
byte for byte, stays. Postcondition: the graph runs; ``prove`` says whether it is right.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune import external
from onnxprune.coupling import Coupling
from onnxprune.errors import ModelError, ProofError
from onnxprune.model import Shape
from onnxprune.passes.follow import PINNED, View, follow
from onnxprune.plan import Plan, owner
from onnxprune.protos import as_text, bodies, constant_tensor, copy_fields, list_as_inputs, reads
from onnxprune.slices import Slices, take


def apply(model: onnx.ModelProto, coupling: Coupling, plan: Plan, keep: np.ndarray) -> onnx.ModelProto:
    """Return a pruned copy of ``model``.

    Parameters
    ----------
    plan
        What to slice.
    keep
        The plan as a mask over classes, bool of shape ``(n_classes,)``: what shapes follow from it.

    Raises
    ------
    ProofError
        An operator's needs cannot be met (coupling should have frozen it).
    """
    edits = follow(coupling, keep)
    if failures := [*edits.failures, *((node, PINNED) for node, _ in edits.unpinned)]:
        node, text = failures[0]
        raise ProofError(f"{node.title} ({node.op}): {text}", tuple(f"{n.title}: {t}" for n, t in failures))
    pruned = onnx.ModelProto()
    copy_fields(model, pruned, leave_out=("graph",))
    copy_fields(model.graph, pruned.graph, leave_out=("initializer", "node"))
    operands = _operands(coupling, edits.inputs)
    copies = {owner(coupling, full): full for full in plan.initializers if full not in coupling.model.constants}

    def edit(source: onnx.GraphProto, target: onnx.GraphProto) -> None:
        for tensor in source.initializer:
            _add_tensor(target, tensor, plan, operands)
            _add_copies(pruned.graph, tensor, tensor.name, plan, copies)
        for node in source.node:
            added = target.node.add()
            added.CopyFrom(node)
            key = next((name for name in node.output if name), "")
            if node.op_type == "Constant" and key in coupling.model.constants:
                _edit_constant(pruned.graph, added, plan, operands, copies)
                continue
            for index, name in enumerate(node.input):
                added.input[index] = copies.get((coupling.model.aliases.get(name, name), key), name)
            for name, value in edits.attributes.get(key, {}).items():
                _set_attribute(added, name, value)
            for index in sorted(index for edited, index in edits.inputs if edited == key):
                _set_operand(pruned.graph, added, index, operands, edits.inputs[key, index])
            for body, now in zip(bodies(node), bodies(added), strict=True):
                now.ClearField("initializer")
                now.ClearField("node")
                edit(body, now)

    edit(model.graph, pruned.graph)
    _drop_dead(pruned.graph, coupling, keep, plan)
    _drop_unread(model, pruned.graph)
    if model.ir_version < 4:
        list_as_inputs(model.graph, pruned.graph)
    _update_shapes(pruned.graph, coupling, keep)
    return pruned


def _operands(coupling: Coupling, edited: Mapping[tuple[str, int], np.ndarray]) -> dict[str, np.ndarray]:
    """Constants that can change in place, because every reader wants the same new value."""
    model, in_place = coupling.model, {}
    captured = {name for node in model.nodes for name in node.captured}
    inputs = {node.key: node.inputs for node in model.nodes}
    for (key, index), value in edited.items():
        name = inputs[key][index] if index < len(inputs[key]) else ""
        if name not in model.constants or name in model.outputs:
            continue
        wanted = [edited.get((node.key, position)) for node, position in model.consumers[name]]
        if name not in captured and all(other is not None and np.array_equal(other, value) for other in wanted):
            in_place[name] = value
    return in_place


def _add_tensor(
    graph: onnx.GraphProto,
    tensor: onnx.TensorProto,
    plan: Plan,
    operands: Mapping[str, np.ndarray],
) -> None:
    """Add an initializer: sliced, with a new value, or as it is."""
    if tensor.name in operands:
        graph.initializer.append(_with_value(tensor, operands[tensor.name], tensor.name))
    elif tensor.name in plan.initializers:
        graph.initializer.append(_sliced(tensor, plan.initializers[tensor.name], tensor.name))
    else:
        graph.initializer.append(tensor)


def _add_copies(
    graph: onnx.GraphProto, tensor: onnx.TensorProto, name: str, plan: Plan, copies: Mapping[tuple[str, str], str]
) -> None:
    """Add the slices that single readers need of a shared vector."""
    for (root, _), full in copies.items():
        if root == name:
            graph.initializer.append(_sliced(tensor, plan.initializers[full], full))


def _edit_constant(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    plan: Plan,
    operands: Mapping[str, np.ndarray],
    copies: Mapping[tuple[str, str], str],
) -> None:
    name = node.output[0]
    tensor = constant_tensor(node)
    _add_copies(graph, tensor, name, plan, copies)
    if name in operands:
        tensor = _with_value(tensor, operands[name], tensor.name)
    elif name in plan.initializers:
        tensor = _sliced(tensor, plan.initializers[name], tensor.name)
    else:
        return
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("value", tensor))


def _sliced(tensor: onnx.TensorProto, slices: Slices, name: str) -> onnx.TensorProto:
    if external.is_outside(tensor):
        return external.sliced(tensor, slices, name)
    return _with_value(tensor, take(external.array(tensor), slices, name), name)


def _with_value(tensor: onnx.TensorProto, value: np.ndarray, name: str) -> onnx.TensorProto:
    """Return a tensor with another value that keeps everything else (documentation, metadata) of ``tensor``."""
    changed = numpy_helper.from_array(np.asarray(value, order="C"), name)
    if changed.data_type != tensor.data_type:
        raise ModelError(f"{name}: data type {tensor.data_type} cannot be sliced")
    if tensor.doc_string:
        changed.doc_string = as_text(tensor.doc_string)
    if external.belongs_outside(tensor):
        changed.data_location = tensor.data_location
    changed.metadata_props.extend(tensor.metadata_props)
    return changed


def _set_attribute(node: onnx.NodeProto, name: str, value: object) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    if value is not None:
        kept.append(helper.make_attribute(name, value))
    copies = [onnx.AttributeProto.FromString(attribute.SerializeToString()) for attribute in kept]
    del node.attribute[:]
    node.attribute.extend(copies)


def _set_operand(
    graph: onnx.GraphProto, node: onnx.NodeProto, index: int, operands: Mapping[str, np.ndarray], value: np.ndarray
) -> None:
    """Give a shape operand its new value: in place where every reader agrees, else as a copy for this reader."""
    name = node.input[index] if index < len(node.input) else ""
    if name in operands:
        return
    while len(node.input) <= index:
        node.input.append("")
    node.input[index] = f"{name or index}@{node.output[0]}"
    graph.initializer.append(numpy_helper.from_array(np.asarray(value, order="C"), node.input[index]))


def _drop_dead(graph: onnx.GraphProto, coupling: Coupling, keep: np.ndarray, plan: Plan) -> None:
    """Remove nodes that no output depends on and that read what shrank: nobody keeps their operands right."""
    view = View(coupling, keep)
    live = {node.key for node in coupling.model.nodes} | coupling.model.constants.keys()
    gone: set[str] = set()

    def shrank(name: str) -> bool:
        known = name in coupling.ledger.layouts
        sliced = coupling.model.aliases.get(name, name) in plan.initializers
        return name in gone or sliced or (known and view.after(name) != view.before(name))

    def drop(graph: onnx.GraphProto) -> None:
        dead = []
        for index, node in enumerate(graph.node):
            if not live.isdisjoint(node.output):
                for body in bodies(node):
                    if any(not live.isdisjoint(inner.output) for inner in body.node):
                        drop(body)
                gone.update(_drop_results(node, gone))
            elif any(map(shrank, reads(node))):
                dead.append(index)
                gone.update(node.output)
        for index in reversed(dead):
            del graph.node[index]

    known = -1
    while len(gone) > known:  # onnxruntime takes nodes in any order: what reads a dead one may stand before it
        known = len(gone)
        drop(graph)


def _drop_results(node: onnx.NodeProto, gone: set[str]) -> list[str]:
    """Leave out results of an If that a branch does not compute any longer; return their names."""
    lost = {index for body in bodies(node) for index, output in enumerate(body.output) if output.name in gone}
    names = [node.output[index] for index in sorted(lost)]
    for index in sorted(lost, reverse=True):
        del node.output[index]
        for body in bodies(node):
            del body.output[index]
    return names


def _drop_unread(original: onnx.ModelProto, graph: onnx.GraphProto) -> None:
    """Remove what only fed operands that have been replaced; what nobody read in the original stays, and so do inputs.

    Before IR version 4 an initializer must be listed as an input, and means nothing by it.
    """
    stays = {value.name for value in (*graph.output, *(graph.input if original.ir_version >= 4 else ()))}
    read_before = {name for node in original.graph.node for name in reads(node)}
    while True:
        unread = read_before - {name for node in graph.node for name in reads(node)} - stays
        nodes = [i for i, node in enumerate(graph.node) if unread.issuperset(filter(None, node.output))]
        tensors = [i for i, tensor in enumerate(graph.initializer) if tensor.name in unread]
        for index in reversed(nodes):
            del graph.node[index]
        for index in reversed(tensors):
            del graph.initializer[index]
        if not nodes:
            return


def _update_shapes(graph: onnx.GraphProto, coupling: Coupling, keep: np.ndarray) -> None:
    """Correct the declared shape of every tensor whose axes shrank (and of initializers listed as inputs, IR 3)."""
    for node in graph.node:
        for body in bodies(node):
            _update_shapes(body, coupling, keep)
    view, model = View(coupling, keep), coupling.model
    dims = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        tensor = constant_tensor(node) if node.op_type == "Constant" else None
        if tensor is not None:
            dims[node.output[0]] = tuple(tensor.dims)
    for value in (*graph.value_info, *graph.input, *graph.output):
        name = value.name
        after: Shape | None = dims.get(name)
        if after is None and name in coupling.ledger.layouts:
            after = view.after(name)
        if after is None or name not in model.shapes or not value.type.HasField("tensor_type"):
            continue
        for dim, old, new in zip(value.type.tensor_type.shape.dim, model.shapes[name], after, strict=False):
            if old != new and dim.HasField("dim_value"):
                dim.dim_value = new
