"""Segments: short runs of the original's nodes and of the pruned graph's, as models of their own.

Every segment starts from fresh random input, so that an error shows where it is made instead of fading on its way to the
output. Weights are fed, not stored, so that they are never copied and can be tampered with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxprune.coupling import Coupling
from onnxprune.labels import Axis, Contraction, length
from onnxprune.model import Model, Node, Shape
from onnxprune.ops.quantised import OPERANDS
from onnxprune.passes.closeness import FLOAT8, INTEGERS, NARROW, ROUNDED
from onnxprune.protos import BITS, is_float, reads

MAX_NODES = 32
MAX_BYTES = 64 << 20  # of intermediate tensors, beyond which a segment ends
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
CASTS_NARROW = 21  # opset from which Cast knows all narrow types
SMALL = 1 << 18  # elements of a segment below which one thread is faster than several
MIXING = frozenset(
    (
        "Conv ConvTranspose Gemm MatMul Einsum LSTM GRU RNN "
        "FusedConv FusedGemm FusedMatMul Attention MultiHeadAttention GroupQueryAttention "
        "QLinearConv QLinearMatMul QGemm ConvInteger MatMulInteger MatMulIntegerToFloat DynamicQuantizeMatMul "
        "MatMulNBits QAttention"
    ).split()
)
EXACT = frozenset(
    (
        "QLinearConv QLinearMatMul QGemm ConvInteger MatMulInteger QLinearAdd QLinearMul QLinearWhere QLinearConcat "
        "QLinearSigmoid QLinearLeakyRelu QLinearSoftmax QLinearGlobalAveragePool QLinearAveragePool"
    ).split()
)
"""Operators from integers to integers: no rounding before them differs."""

DISCONTINUOUS = frozenset(["Ceil", "Floor", "Round", "Sign", "Mod", "QuantizeLinear", "DynamicQuantizeLinear"])


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Consecutive nodes; ``entries`` are read but not computed here, ``compared`` are the values computed here.

    Values are floats and what they are quantised to; indices, lengths and conditions are left out.

    ``threads`` is what a session needs: 1 where threads would cost more than they save, else 0 (all).
    """

    nodes: tuple[Node, ...]
    entries: tuple[str, ...]
    compared: tuple[str, ...]
    threads: int


def segments(model: Model, needed: Collection[str]) -> Iterator[Segment]:
    """Cut the graph into segments of the nodes whose keys are ``needed``.

    A segment starts at every convolution or product, so that a rectifier before it cannot hide a channel of its input. It
    ends behind a node whose output jumps (comparisons, rounding, integers made of floats): rounding errors would otherwise
    flip it in one graph and not in the other. What follows starts from the same random values in both.
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
        node.op not in EXACT and model.types.get(name, TensorProto.FLOAT) not in FLOATS for name in node.outputs if name
    )


def _segment(model: Model, run: Sequence[Node]) -> Segment:
    own = {name for node in run for name in node.outputs if name}
    read = dict.fromkeys(name for node in run for name in (*node.inputs, *node.captured) if name)
    entries = tuple(n for n in read if n not in own and model.constant(n) is None and n not in model.static)
    compared = tuple(
        name
        for node in run
        for name in node.outputs
        if name and _comparable(model.types.get(name, TensorProto.FLOAT), node)
    )
    elements = sum(int(np.prod(model.shapes.get(name, ()))) for name in (*entries, *compared))
    return Segment(tuple(run), entries, compared, threads=1 if elements < SMALL else 0)


def _comparable(kind: int, node: Node) -> bool:
    return kind in INTEGERS or (kind in FLOATS and node.op not in DISCONTINUOUS)


FED, READ = "/fed", "/read"
"""What the float32 stand-in of a tensor of a narrow type is called, at the entry and at the exit of a segment."""


def plain_graph(
    original: onnx.ModelProto,
    model: Model,
    protos: Sequence[onnx.NodeProto],
    outputs: Sequence[str],
    entries: Sequence[str],
    sliced: Collection[str],
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Make a model of nodes, with its constants as inputs; return the constants beside it.

    Tensors of types that numpy cannot pass to onnxruntime (four bits, float8) enter and leave as float32, through a Cast.

    Parameters
    ----------
    sliced
        Integer constants that hold channels; all others say how data move, and stay constants.
    """
    read = dict.fromkeys(name for proto in protos for name in reads(proto) if name)
    own = {name for proto in protos for name in proto.output}
    constants, baked, inputs, nodes, results = {}, [], [], [], []

    def enter(name: str, kind: int, shape: Shape) -> None:
        if kind in NARROW:
            nodes.append(helper.make_node("Cast", [name + FED], [name], to=kind))
            name, kind = name + FED, TensorProto.FLOAT
        inputs.append(helper.make_tensor_value_info(name, kind, shape))

    for name in entries:
        enter(name, model.types.get(name, TensorProto.FLOAT), model.shapes[name])
    for name in read:
        if name in own or name in entries:
            continue
        value = model.value(name)
        if value is None:
            continue
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        castable = kind not in NARROW or model.opset >= CASTS_NARROW
        if value.ndim and castable and (is_float(value.dtype) or model.aliases.get(name, name) in sliced):
            constants[name] = crossing(value, kind)
            enter(name, kind, value.shape)
        else:
            baked.append(numpy_helper.from_array(value, name))
    nodes += protos
    for name in outputs:
        results.append(name)
        if model.types.get(name) in NARROW:
            results[-1] = name + READ
            nodes.append(helper.make_node("Cast", [name], [name + READ], to=TensorProto.FLOAT))
    graph = helper.make_graph(nodes, "segment", inputs, [onnx.ValueInfoProto(name=name) for name in results], baked)
    proto = helper.make_model(graph, opset_imports=original.opset_import, ir_version=max(original.ir_version, 8))
    proto.functions.extend(original.functions)
    return proto, constants


def crossing(value: np.ndarray, kind: int) -> np.ndarray:
    """What numpy passes to onnxruntime for a value of ONNX type ``kind``."""
    return value.astype(np.float32) if kind in NARROW else value


def masked_nodes(
    coupling: Coupling, keep: np.ndarray, protos: Sequence[onnx.NodeProto], nodes: Sequence[Node]
) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Return the original's nodes with every ending axis masked immediately before the operator that ends it.

    Masking is ``Where(mask, x, 0)``, with the zero point for 0 where x is quantised: a product would keep NaN. Where
    statistics run over the axis (means, norms, maxima, ranges) the operator is redefined instead: it sees the kept
    channels alone, and its output is spread back onto all of them.
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
                out += _zero(coupling, proto, c, f"{name}/zero", np.zeros((), dtype), constants)
                out += _where(f"{name}/keep", source, f"{name}/zero", name, dtype)
            copy.input[c.input] = name
        out.append(copy)
    return out, constants


def _where(keep: str, source: str, zero: str, name: str, dtype: np.dtype) -> list[onnx.NodeProto]:
    """Select; narrow integers by way of 32 bits, because onnxruntime 1.24 has no kernel that selects them."""
    if dtype not in (np.int8, np.int16, np.uint16):
        return [helper.make_node("Where", [keep, source, zero], [name])]
    wide = [f"{name}/wide{i}" for i in range(3)]
    return [
        helper.make_node("Cast", [source], wide[:1], to=TensorProto.INT32),
        helper.make_node("Cast", [zero], wide[1:2], to=TensorProto.INT32),
        helper.make_node("Where", [keep, *wide[:2]], wide[2:]),
        helper.make_node("Cast", wide[2:], [name], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype))),
    ]


def _zero(
    coupling: Coupling, proto: onnx.NodeProto, c: Contraction, name: str, plain: np.ndarray,
    constants: dict[str, np.ndarray],
) -> list[onnx.NodeProto]:  # fmt: skip
    """Nodes that make what stands for zero on an input; a zero point for each channel lies along its own axis."""
    if c.zero is None:
        constants[name] = plain
        return []
    points = coupling.model.shapes[c.node.inputs[c.zero]]
    if len(points) != 1 or points[0] == 1:
        return [helper.make_node("Identity", [proto.input[c.zero]], [name])]
    rank = len(coupling.model.shapes[c.node.inputs[c.input]])
    axis = next(axis for weight, _, zero, axis in OPERANDS[c.node.op] if (weight, zero) == (c.input, c.zero)) % rank
    constants[f"{name}/shape"] = np.array([-1 if a == axis else 1 for a in range(rank)], np.int64)
    return [helper.make_node("Reshape", [proto.input[c.zero], f"{name}/shape"], [name])]


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
        labelled = constant is None or (node.key, constant.name) in coupling.ledger.readers
        if not name or name in coupling.model.static or not labelled:
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


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Where random values of quantised entries lie: by default anywhere in the range of their type.

    Attributes
    ----------
    spare
        Bits of eight-bit integers that stay unused. Processors without VNNI add products of bytes in pairs of 16 bits, which
        saturate, so that a result depends on which channels are neighbours; with one bit to spare no pair does.
    near
        By entry its zero point, to which values lie close: what is made of them then does not exceed the output's range.
    """

    spare: int = 0
    near: Mapping[str, int] = field(default_factory=dict)


NEAR = 8
"""Largest distance of a value from the zero point that it lies close to."""

DRAWS = 4
"""Kinds of random values that a segment is tried on, until its operators are within their domains."""


def random_entries(
    model: Model, entries: Sequence[str], rng: np.random.Generator, draw: int, span: Span
) -> dict[str, np.ndarray]:
    """Random values for a segment's entries: floats by ``draw``, quantised ones by ``span``, random booleans.

    Draw 0 is normal around 0.25; the others suit operators that are not defined everywhere: above 0.5 (Log, Sqrt), within
    (0.05, 0.95) (Acos, Atanh), above 1 (Acosh). Integers of 32 and 64 bits may be indices: they are 0 or 1 (or 0 alone).
    """
    values = {}
    for name in entries:
        shape, dtype = model.shapes[name], _dtype(model, name)
        kind = model.types.get(name, TensorProto.FLOAT)
        if dtype == np.bool_:
            value = rng.random(shape) < 0.5
        elif kind in ROUNDED and kind not in FLOAT8:
            count = 1 << BITS.get(kind, 8 * dtype.itemsize)
            low = 0 if dtype.name.startswith("u") else -(count // 2)
            if name in span.near:
                value = (span.near[name] + rng.integers(-NEAR, NEAR + 1, shape)).clip(low, low + count - 1)
            else:
                value = rng.integers(low, low + count, shape) >> (span.spare if count == 256 else 0)
        elif np.issubdtype(dtype, np.integer):
            value = rng.integers(0, 2 - draw % 2, shape)
        elif draw == 2:
            value = rng.uniform(0.05, 0.95, shape)
        else:
            noise = rng.standard_normal(shape, np.float32)
            value = (np.abs(noise) if draw else noise) + (0.25, 0.5, 0, 1)[draw]
        values[name] = crossing(np.asarray(value, dtype), kind)  # numpy turns operations on shape () into scalars
    return values
