"""Memory that activations take while a model runs, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from onnx import TensorProto, helper

from onnxprune.coupling import Coupling
from onnxprune.labels import Axis

VIEWS = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"))
"""Operators whose output is their input's memory, seen otherwise."""


def peak_memory(coupling: Coupling, keep: np.ndarray) -> int:
    """Most bytes that computed tensors hold at once, nodes run in the file's order; ``keep`` is a bool per class.

    A tensor lives from the node that computes it until its last reader, graph inputs from the beginning and graph outputs
    to the end; an operator needs its inputs and outputs at once. Weights and what follows from them alone (dequantised
    weights) do not count, nor what a runtime adds to speed an operator up (im2col buffers). Nothing is computed in place.
    Both branches of an If count, one laid out after the other, although only one runs: the figure is then an upper bound.
    """
    lives = list(_lives(coupling))
    change = np.zeros(len(coupling.model.nodes) + 2, np.int64)
    lengths: dict[Axis, int] = {}
    for name, begin, end in lives:
        size = _itemsize(coupling.model.types.get(name, TensorProto.FLOAT))
        for axis in coupling.axes(name):
            if axis not in lengths:
                lengths[axis] = len(coupling.kept(axis, keep)) if axis else 1
            size *= lengths[axis]
        change[begin] += size
        change[end + 1] -= size
    return int(np.cumsum(change).max(initial=0))


def _lives(coupling: Coupling) -> Iterator[tuple[str, int, int]]:
    """Every computed tensor that has memory of its own, and the places of the node that makes it and of its last reader."""
    model = coupling.model
    counted = [node for node in model.nodes if node.key not in model.static and node.key not in model.aliases]
    begin = dict.fromkeys(model.input_shapes, 0)
    end = dict.fromkeys(model.input_shapes, 0)
    memory: dict[str, str] = {}
    for place, node in enumerate(counted, 1):
        for read in (memory.get(name, name) for name in (*node.inputs, *node.captured)):
            if read in begin:
                end[read] = place
        source = memory.get(node.inputs[0], node.inputs[0]) if node.op in VIEWS and node.inputs else ""
        for name in filter(None, node.outputs):
            if source in begin:
                memory[name] = source
            elif name in model.shapes and name not in model.constants and name not in coupling.ledger.derived:
                begin[name] = end[name] = place
    end.update((name, len(counted)) for name in (memory.get(o, o) for o in model.outputs) if name in begin)
    for name, place in begin.items():
        if math.prod(model.shapes.get(name, (0,))):
            yield name, place, end[name]


def _itemsize(kind: int) -> int:
    return np.dtype(helper.tensor_dtype_to_np_dtype(kind)).itemsize if kind != TensorProto.STRING else 8
