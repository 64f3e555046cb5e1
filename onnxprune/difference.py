"""What differs between two related models: layers, costs, nodes, constants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from onnxprune import external, onnx_io, pipeline
from onnxprune.errors import UsageError
from onnxprune.options import ModelLike, Options
from onnxprune.protos import bodies, constant_tensor, named_tensors
from onnxprune.report import COST_KINDS, Layer, layers
from onnxprune.report.difference import ConstantChange, Difference, LayerPair


def difference(a: ModelLike, b: ModelLike, options: Options | None = None) -> Difference:
    """Compare two models whose nodes and constants go by the same names where they are the same.

    Parameters
    ----------
    a, b
        Paths or models.
    options
        Only ``input_shapes`` counts; each model takes those of its own inputs.

    Raises
    ------
    UsageError
        A shape is for an input that neither model has.
    """
    each = _shapes((a, b), options or Options())
    loaded = [pipeline.load(model, own, pipeline.Clock()) for model, own in zip((a, b), each, strict=True)]
    protos = [one.source for one in loaded]
    tensors = [{tensor.name: tensor for tensor in named_tensors(proto.graph)} for proto in protos]
    every = [np.ones(one.coupling.n_classes, bool) for one in loaded]
    first, second = (layers(one.cost, keep) for one, keep in zip(loaded, every, strict=True))
    costs = [one.cost.of(keep) for one, keep in zip(loaded, every, strict=True)]
    files = [{"path": str(one.path) if one.path else None, "sha256": one.sha256 or None} for one in loaded]
    return Difference(
        a=files[0],
        b=files[1],
        cost={kind: (costs[0][kind], costs[1][kind]) for kind in COST_KINDS},
        layers=tuple(_paired(first, second)),
        graph=tuple(_graph(*protos)),
        nodes=_nodes(protos[0].graph, protos[1].graph),
        constants=tuple(_constants(*tensors)),
        n_constants=len(tensors[0].keys() | tensors[1].keys()),
    )


def _shapes(models: Sequence[ModelLike], options: Options) -> list[Options]:
    """Options for each model, with the shapes of its own inputs; one that no model has is an error."""
    if not options.input_shapes:
        return [options for _ in models]
    protos = [model if isinstance(model, onnx.ModelProto) else onnx_io.load(model) for model in models]
    known = [{value.name for value in proto.graph.input} for proto in protos]
    for name in options.input_shapes.keys() - set().union(*known):
        raise UsageError(f"input shape of {name}: neither model has such an input")
    shapes = [{name: shape for name, shape in options.input_shapes.items() if name in own} for own in known]
    return [replace(options, input_shapes=own) for own in shapes]


def _paired(first: Iterable[Layer], second: Iterable[Layer]) -> list[LayerPair]:
    """Layers in A's order, those that B alone has after the one before them in B."""
    others = _by_key(second)
    rows = [LayerPair(key, layer.op, layer, others.get(key)) for key, layer in _by_key(first).items()]
    places = {row.name: index for index, row in enumerate(rows)}
    behind: dict[int, list[LayerPair]] = {}
    last = -1
    for name, layer in others.items():
        if name in places:
            last = places[name]
        else:
            behind.setdefault(last, []).append(LayerPair(name, layer.op, None, layer))
    return [*behind.get(-1, ()), *(each for k, row in enumerate(rows) for each in (row, *behind.get(k, ())))]


def _by_key(rows: Iterable[Layer]) -> dict[str, Layer]:
    """Layers by name where that is theirs alone, else by the tensor they compute."""
    rows = tuple(rows)
    times = Counter(row.node for row in rows)
    return {row.node if times[row.node] == 1 else row.outputs[0]: row for row in rows}


def _graph(first: onnx.ModelProto, second: onnx.ModelProto) -> Iterable[str]:
    ends = [
        {part: [v for v in getattr(model.graph, part[:-1]) if v.name not in known] for part in ("inputs", "outputs")}
        for model in (first, second)
        for known in [{tensor.name for tensor in model.graph.initializer}]
    ]
    yield from (part for part in ends[0] if ends[0][part] != ends[1][part])
    yield from (p for p in ("opset_import", "functions") if list(getattr(first, p)) != list(getattr(second, p)))


def _nodes(first: onnx.GraphProto, second: onnx.GraphProto) -> dict[str, tuple[str, ...]]:
    named = [_by_name(graph) for graph in (first, second)]
    a, b = named
    return {
        "added": tuple(name for name in b if name not in a),
        "removed": tuple(name for name in a if name not in b),
        "changed": tuple(name for name in a if name in b and _bare(a[name]) != _bare(b[name])),
    }


def _by_name(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Nodes by name where that is theirs alone, else by the first tensor they compute."""
    times = Counter(node.name for node in graph.node)
    nodes = [node for node in graph.node if _computes(node)]
    return {
        node.name if node.name and times[node.name] == 1 else next(filter(None, node.output), ""): node
        for node in nodes
    }


def _bare(node: onnx.NodeProto) -> tuple[Any, ...]:
    """What a node computes from what, without the values that are compared as constants."""
    plain = [a for a in node.attribute if not a.HasField("g") and not a.graphs]
    attributes = sorted((a.name, a.SerializeToString(deterministic=True)) for a in plain)
    inner = []
    for body in bodies(node):
        ends = [[value.name for value in side] for side in (body.input, body.output)]
        inner.append((ends, [_bare(each) for each in body.node if _computes(each)]))
    return node.domain, node.op_type, tuple(node.input), tuple(node.output), tuple(attributes), inner


def _computes(node: onnx.NodeProto) -> bool:
    return node.op_type != "Constant" or constant_tensor(node) is None


def _constants(a: Mapping[str, onnx.TensorProto], b: Mapping[str, onnx.TensorProto]) -> Iterable[ConstantChange]:
    for name in dict.fromkeys((*a, *b)):
        first, second = (tuple(side[name].dims) if name in side else None for side in (a, b))
        if first is None or second is None:
            yield ConstantChange(name, "added" if first is None else "removed", first, second)
        elif a[name].data_type != b[name].data_type:
            yield ConstantChange(name, "type", first, second)
        elif first != second:
            yield ConstantChange(name, "shape", first, second)
        else:
            x, y = (external.array(side[name]) for side in (a, b))
            if not np.array_equal(x, y, equal_nan=x.dtype.kind == "f"):
                yield ConstantChange(name, "values", first, second, _distance(x, y))


def _distance(a: np.ndarray, b: np.ndarray) -> float | None:
    if a.dtype.kind not in "fiu":
        return None
    x, y = a.astype(np.float64), b.astype(np.float64)
    whole, apart = float(np.linalg.norm(x)), float(np.linalg.norm(y - x))
    return apart / whole if whole and np.isfinite(apart) else None
