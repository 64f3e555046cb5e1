"""Segments: short runs of the original's nodes and of the pruned graph's, as models of their own.

Every segment starts from fresh random input, so that an error shows where it is made instead of fading on its way to the
output. Weights are fed, not stored, so that they are never copied and can be tampered with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxprune.coupling import Coupling
from onnxprune.labels import Axis, length
from onnxprune.model import Model, Node, Shape
from onnxprune.protos import is_float, reads

MAX_NODES = 32
MAX_BYTES = 64 << 20  # of intermediate tensors, beyond which a segment ends
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
SMALL = 1 << 18  # elements of a segment below which one thread is faster than several
MIXING = frozenset(
    (
        "Conv ConvTranspose Gemm MatMul Einsum LSTM GRU RNN "
        "FusedConv FusedGemm FusedMatMul Attention MultiHeadAttention GroupQueryAttention"
    ).split()
)
DISCONTINUOUS = frozenset(["Ceil", "Floor", "Round", "Sign", "Mod", "QuantizeLinear", "DynamicQuantizeLinear"])


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Consecutive nodes; ``entries`` are read but not computed here, ``compared`` are the floats computed here.

    ``threads`` is what a session needs: 1 where threads would cost more than they save, else 0 (all).
    """

    nodes: tuple[Node, ...]
    entries: tuple[str, ...]
    compared: tuple[str, ...]
    threads: int


def segments(model: Model, needed: Collection[str]) -> Iterator[Segment]:
    """Cut the graph into segments of the nodes whose keys are ``needed``.

    A segment starts at every convolution or product, so that a rectifier before it cannot hide a channel of its input. It
    ends behind a node whose output jumps (comparisons, rounding, integers): rounding errors would otherwise flip
    it in one graph and not in the other. What follows starts from the same random values in both.
    """
    run: list[Node] = []
    size = 0
    for node in model.nodes:
        if node.key not in needed:
            continue
        if run and node.op in MIXING:
            yield _segment(model, run)
            run, size = [], 0
        run.append(node)
        size += sum(4 * int(np.prod(model.shapes.get(name, ()))) for name in node.outputs if name)
        if len(run) >= MAX_NODES or size >= MAX_BYTES or _jumps(model, node):
            yield _segment(model, run)
            run, size = [], 0
    if run:
        yield _segment(model, run)


def halves(model: Model, segment: Segment) -> tuple[Segment, Segment]:
    """Cut a segment in the middle."""
    middle = len(segment.nodes) // 2
    return _segment(model, segment.nodes[:middle]), _segment(model, segment.nodes[middle:])


def _jumps(model: Model, node: Node) -> bool:
    return node.op in DISCONTINUOUS or any(
        model.types.get(name, TensorProto.FLOAT) not in FLOATS for name in node.outputs if name
    )


def _segment(model: Model, run: Sequence[Node]) -> Segment:
    own = {name for node in run for name in node.outputs if name}
    read = dict.fromkeys(name for node in run for name in (*node.inputs, *node.captured) if name)
    entries = tuple(n for n in read if n not in own and model.constant(n) is None and n not in model.static)
    compared = tuple(
        name
        for node in run
        for name in node.outputs
        if name and model.types.get(name, TensorProto.FLOAT) in FLOATS and node.op not in DISCONTINUOUS
    )
    elements = sum(int(np.prod(model.shapes.get(name, ()))) for name in (*entries, *compared))
    return Segment(tuple(run), entries, compared, threads=1 if elements < SMALL else 0)


def plain_graph(
    original: onnx.ModelProto,
    model: Model,
    protos: Sequence[onnx.NodeProto],
    outputs: Sequence[str],
    entries: Sequence[str],
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Make a model of nodes, with its constants as inputs; return the constants beside it."""
    read = dict.fromkeys(name for proto in protos for name in reads(proto) if name)
    own = {name for proto in protos for name in proto.output}
    constants, baked = {}, []
    inputs = [helper.make_tensor_value_info(n, model.types.get(n, TensorProto.FLOAT), model.shapes[n]) for n in entries]
    for name in read:
        if name in own or name in entries:
            continue
        value = model.value(name)
        if value is None:
            continue
        if is_float(value.dtype) and value.ndim > 0:
            constants[name] = value
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            inputs.append(helper.make_tensor_value_info(name, kind, value.shape))
        else:
            baked.append(numpy_helper.from_array(value, name))
    graph = helper.make_graph(protos, "segment", inputs, [onnx.ValueInfoProto(name=name) for name in outputs], baked)
    proto = helper.make_model(graph, opset_imports=original.opset_import, ir_version=max(original.ir_version, 8))
    proto.functions.extend(original.functions)
    return proto, constants


def masked_nodes(
    coupling: Coupling, keep: np.ndarray, protos: Sequence[onnx.NodeProto], nodes: Sequence[Node]
) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Return the original's nodes with every ending axis masked immediately before the operator that ends it.

    Masking is ``Where(mask, x, 0)``: a product would keep NaN. Where statistics run over the axis (means, norms, maxima)
    the operator is redefined instead: it sees the kept channels alone, and its output is spread back onto all of them.
    """
    out: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray] = {}
    endings: dict[str, list] = {}
    for contraction in coupling.contractions:
        endings.setdefault(contraction.node.key, []).append(contraction)
    for proto, node in zip(protos, nodes, strict=True):
        copy = onnx.NodeProto()
        copy.CopyFrom(proto)
        mine = endings.get(node.key, ())
        if any(c.redefined and _shrinks(coupling, keep, node, c.input) for c in mine):
            out += _redefined(coupling, keep, copy, node, constants)
            continue
        for c in mine:
            mask = coupling.mask(coupling.ledger.input(node, c.input, ()).axes, c.axis, keep)
            if mask.all():
                continue
            name = f"{node.key}/masked{c.input}.{c.axis}"
            constants[f"{name}/keep"] = mask
            source, dtype = copy.input[c.input], _dtype(coupling.model, node.inputs[c.input])
            if coupling.model.opset < 9:  # before Where
                constants[f"{name}/keep"] = constants[f"{name}/keep"].astype(dtype)
                out.append(helper.make_node("Mul", [f"{name}/keep", source], [name]))
            else:
                constants[f"{name}/zero"] = np.zeros((), dtype)
                out.append(helper.make_node("Where", [f"{name}/keep", source, f"{name}/zero"], [name]))
            copy.input[c.input] = name
        out.append(copy)
    return out, constants


def _shrinks(coupling: Coupling, keep: np.ndarray, node: Node, index: int) -> bool:
    axes = coupling.ledger.input(node, index, ()).axes
    return any(len(coupling.kept(axis, keep)) < length(axis) for axis in axes)


def _redefined(
    coupling: Coupling, keep: np.ndarray, proto: onnx.NodeProto, node: Node, constants: dict[str, np.ndarray]
) -> list[onnx.NodeProto]:
    """The operator on the kept channels alone, its output spread back with zeros."""
    before, after = [], []
    for index, name in enumerate(node.inputs):
        constant = coupling.model.constant(name) if name else None
        if not name or name in coupling.model.static or (constant is not None and not constant.floating):
            continue
        kept = _places(coupling, keep, coupling.ledger.input(node, index, ()).axes, coupling.model.shapes[name])
        if kept is not None:
            fresh = f"{node.key}/kept{index}"
            before += _picked(proto.input[index], kept, fresh, constants)
            proto.input[index] = fresh
    for index, name in enumerate(node.outputs):
        kept = _places(coupling, keep, coupling.axes(name), coupling.model.shapes[name]) if name else None
        if kept is not None:
            fresh = proto.output[index] = f"{node.key}/spread{index}"
            place = np.zeros(coupling.model.shapes[name], kept.dtype)
            place.ravel()[kept.ravel()] = np.arange(kept.size)
            after += _picked(fresh, place, name, constants)
    return [*before, proto, *after]


def _places(coupling: Coupling, keep: np.ndarray, axes: tuple[Axis, ...], shape: Shape) -> np.ndarray | None:
    """Flat index of every element that is kept, in the shape they then have; None where all are."""
    flat = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
    kept = coupling.extract(axes, keep, flat)
    return None if kept is flat else kept


def _picked(source: str, places: np.ndarray, name: str, constants: dict[str, np.ndarray]) -> list[onnx.NodeProto]:
    """Nodes that pick elements of a tensor by their flat indices."""
    constants[f"{name}/places"], constants[f"{name}/flat"] = places, np.array([-1], np.int64)
    return [
        helper.make_node("Reshape", [source, f"{name}/flat"], [f"{name}/all"]),
        helper.make_node("Gather", [f"{name}/all", f"{name}/places"], [name]),
    ]


def _dtype(model: Model, name: str) -> np.dtype:
    constant = model.constant(name)
    if constant is not None:
        return constant.load().dtype
    return np.dtype(helper.tensor_dtype_to_np_dtype(model.types.get(name, TensorProto.FLOAT)))


DRAWS = 4
"""Kinds of random values that a segment is tried on, until its operators are within their domains."""


def random_entries(
    model: Model, entries: Sequence[str], rng: np.random.Generator, draw: int
) -> Mapping[str, np.ndarray]:
    """Random values for a segment's entries: floats by ``draw``, integers 0 or 1 (or 0 alone), random booleans.

    Draw 0 is normal around 0.25; the others suit operators that are not defined everywhere: above 0.5 (Log, Sqrt), within
    (0.05, 0.95) (Acos, Atanh), above 1 (Acosh).
    """
    values = {}
    for name in entries:
        shape, dtype = model.shapes[name], _dtype(model, name)
        if dtype == np.bool_:
            value = rng.random(shape) < 0.5
        elif np.issubdtype(dtype, np.integer):
            value = rng.integers(0, 2 - draw % 2, shape)
        elif draw == 2:
            value = rng.uniform(0.05, 0.95, shape)
        else:
            noise = rng.standard_normal(shape, np.float32)
            value = (noise + 0.25, np.abs(noise) + 0.5, noise, np.abs(noise) + 1)[draw]
        values[name] = np.asarray(value, dtype)  # numpy turns operations on arrays of shape () into scalars
    return values
