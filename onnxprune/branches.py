"""Control flow as the analysis sees it: both branches of an If lie side by side, and a Where picks the result.

Labels, costs and the proof then need no notion of a scope. Pruning itself edits the bodies in place, by tensor names, which
are unique over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import helper

from onnxprune.protos import bodies, copy_fields


def flatten(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace every If by its two branches and a Where; return the model itself where there is none."""
    if not any(_is_if(node) for node in model.graph.node):
        return model
    flat = onnx.ModelProto()
    copy_fields(model, flat, leave_out=("graph",))
    copy_fields(model.graph, flat.graph, leave_out=("node",))
    _lay_out(model.graph.node, flat.graph)
    taken = {""}
    for node in flat.graph.node:  # names are unique within a body alone; outputs are over all of them
        if node.name in taken:
            node.ClearField("name")
        taken.add(node.name)
    return flat


def merges(model: onnx.ModelProto) -> Iterator[str]:
    """Outputs of If nodes, each of which is a Where in the flat model."""
    for node in model.graph.node:
        for graph in _branches(node) if _is_if(node) else ():
            yield from merges(onnx.ModelProto(graph=graph))
        if _is_if(node):
            yield from node.output


def _lay_out(nodes, target: onnx.GraphProto) -> None:
    for node in nodes:
        if not _is_if(node):
            target.node.append(node)
            continue
        then, otherwise = _branches(node)
        for branch in (then, otherwise):
            target.initializer.extend(branch.initializer)
            target.value_info.extend(branch.value_info)
            _lay_out(branch.node, target)
        for index, output in enumerate(node.output):
            operands = [node.input[0], then.output[index].name, otherwise.output[index].name]
            target.node.append(helper.make_node("Where", operands, [output], name=node.name))


def _is_if(node: onnx.NodeProto) -> bool:
    """Whether a node is an If whose branches compute what they return (instead of passing an outer tensor on)."""
    if node.op_type != "If" or node.domain not in ("", "ai.onnx"):
        return False
    for branch in bodies(node):
        computed = {name for inner in branch.node for name in inner.output}
        if not computed.issuperset(value.name for value in branch.output):
            return False
    return True


def _branches(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    bodies = {attribute.name: attribute.g for attribute in node.attribute}
    return [bodies["then_branch"], bodies["else_branch"]]


def unique_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rename tensors of branches that also exist elsewhere; return the model itself where there are none.

    Raises
    ------
    RecursionError
        Bodies are nested too deeply.
    """
    if not any(_is_if(node) for node in model.graph.node):
        return model
    counts: dict[str, int] = {}
    for name in _defined(model.graph):
        counts[name] = counts.get(name, 0) + 1
    if all(count == 1 for count in counts.values()):
        return model
    renamed = onnx.ModelProto()
    renamed.CopyFrom(model)
    taken = set(counts)
    for node in renamed.graph.node:
        _rename_bodies(node, {}, taken, counts)
    return renamed


def _defined(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that a graph and the bodies in it define."""
    yield from dict.fromkeys([*(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer)])
    for node in graph.node:
        yield from filter(None, node.output)
        for body in bodies(node):
            yield from _defined(body)


def _rename_bodies(node: onnx.NodeProto, known: dict[str, str], taken: set[str], counts: dict[str, int]) -> None:
    for graph in bodies(node):
        names = dict(known)
        own = [value.name for value in graph.input] + [tensor.name for tensor in graph.initializer]
        own += [name for inner in graph.node for name in inner.output if name]
        for name in dict.fromkeys(own):
            names.pop(name, None)
            if counts.get(name, 0) > 1:
                number = next(n for n in range(1, len(taken) + 2) if f"{name}.{n}" not in taken)
                names[name] = f"{name}.{number}"
                taken.add(names[name])
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            value.name = names.get(value.name, value.name)
        for inner in graph.node:
            for field in (inner.input, inner.output):
                for index, name in enumerate(field):
                    field[index] = names.get(name, name)
            _rename_bodies(inner, names, taken, counts)
