"""Compare two models in structure: what is the same but for the values of weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import onnx

from onnxprune import external
from onnxprune.protos import INTEGERS, bodies, captures, constant_tensor, named_tensors

Place = tuple[int, int]
"""A node's position among those that compute something, and which of its inputs."""


def compare(expected: onnx.ModelProto, given: onnx.ModelProto) -> tuple[tuple[str, ...], bool]:
    """Compare two models in everything but the values of floating-point initializers.

    Constants are compared reader by reader: whether two readers share one tensor, or have copies called ``NAME@READER``,
    makes no difference. Returns the differences in words, and whether the values are equal, too.
    """
    want, have = _Graph(expected.graph), _Graph(given.graph)
    differences = [f"initializer {name} is missing" for name in sorted(want.tensors.keys() - have.known)]
    differences += [f"initializer {name} was added" for name in sorted(have.tensors.keys() - want.known)]
    exact = True
    for name, a, b in _pairs(want, have):
        found, same = _compare_tensors(name, a, b)
        exact &= same
        differences += found
    if want.nodes != have.nodes or want.read.keys() != have.read.keys():
        pairs = zip(want.nodes, have.nodes, strict=False)
        first = next((a.name or a.output[0] for a, b in pairs if a != b), "their number")
        differences.append(f"nodes differ ({first})")
    for part in ("inputs", "outputs"):
        if getattr(want, part) != getattr(have, part):
            differences.append(f"the graph's {part} differ")
    for part in ("opset_import", "functions"):
        if list(getattr(expected, part)) != list(getattr(given, part)):
            differences.append(f"{part} differ")
    if list(expected.graph.sparse_initializer) != list(given.graph.sparse_initializer):
        differences.append("sparse initializers differ")
    return tuple(dict.fromkeys(differences)), exact and not differences


class _Graph:
    """A graph with its constants apart: nodes read them by the name that all copies for single readers have in common."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.tensors = {tensor.name: tensor for tensor in named_tensors(graph)}
        self.inputs = [value for value in graph.input if value.name not in self.tensors]
        self.outputs = list(graph.output)
        self.read: dict[Place, str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.known = set(self.tensors)
        for node in graph.node:
            if node.op_type != "Constant" or constant_tensor(node) is None:
                self._add(node)
        self.captured = {name for node in graph.node for name in captures(node)}

    def _add(self, node: onnx.NodeProto) -> None:
        bare, suffix = onnx.NodeProto(), f"@{next(filter(None, node.output), '')}"
        bare.CopyFrom(_without_tensors(node))
        for index, name in enumerate(node.input):
            if name in self.tensors:
                self.read[len(self.nodes), index] = name
                bare.input[index] = name.removesuffix(suffix)
                self.known |= {bare.input[index], bare.input[index] + suffix}
        self.nodes.append(bare)

    @cached_property
    def apart(self) -> set[str]:
        """Constants that bodies of control flow read, or nobody."""
        return {name for name in self.tensors if name in self.captured} | (self.tensors.keys() - self.read.values())


def _pairs(want: _Graph, have: _Graph) -> Iterator[tuple[str, onnx.TensorProto, onnx.TensorProto]]:
    """Constants that must be alike: what the same node reads in both graphs, and by name what none reads by itself."""
    seen = {(want.read[place], have.read[place]) for place in want.read.keys() & have.read.keys()}
    seen |= {(name, name) for name in want.apart & have.tensors.keys()}
    for a, b in sorted(seen):
        yield b, want.tensors[a], have.tensors[b]


def _compare_tensors(name: str, a: onnx.TensorProto, b: onnx.TensorProto) -> tuple[list[str], bool]:
    if tuple(a.dims) != tuple(b.dims) or a.data_type != b.data_type:
        return [f"{name} has shape {list(b.dims)}, expected {list(a.dims)}"], False
    was, value = external.array(a), external.array(b)
    if np.array_equal(was, value) or was.tobytes() == value.tobytes():  # NaN equals nothing, and may stay as it was
        return [], True
    if a.data_type in INTEGERS:
        return [f"{name} holds other integers"], False
    finite = bool(np.isfinite(value.astype(np.float64)).all())
    return ([] if finite else [f"{name} holds NaN or infinity"]), False


def _without_tensors(node: onnx.NodeProto) -> onnx.NodeProto:
    """A node without the tensors of its bodies, which are compared by name."""
    if not any(True for _ in bodies(node)):
        return node
    bare = onnx.NodeProto()
    bare.CopyFrom(node)
    for body in bodies(bare):
        del body.initializer[:]
        inner = [_without_tensors(each) for each in body.node]
        for each in inner:
            if each.op_type == "Constant" and constant_tensor(each) is not None:
                del each.attribute[:]
        del body.node[:]
        body.node.extend(inner)
    return bare
