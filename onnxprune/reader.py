"""Read a model into the graph that onnxprune reasons about, with every tensor's static shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper

from onnxprune import external, runtime
from onnxprune import shapes as shape_search
from onnxprune.errors import ModelError, UsageError
from onnxprune.model import Constant, Model, Node, Shape
from onnxprune.protos import BITS, INTEGERS, bodies, captures, constant_tensor

MAX_ELEMENTS, MAX_LENGTH = 1 << 32, 1 << 26
"""Elements of a tensor, and length of an axis, beyond which nothing is tried."""

TRIED_SIZES = (64, 32, 16, 128, 224, 256, 8)  # for dynamic axes nobody gave a size for


def read(model: onnx.ModelProto, input_shapes: Mapping[str, Sequence[int]] | None = None) -> Model:
    """Parse a model with onnx-graphsurgeon, and find every tensor's static shape.

    Parameters
    ----------
    input_shapes
        Sizes for inputs with dynamic axes; others get batch 1 and a size that runs, which the result's notes state.

    Raises
    ------
    ModelError
        The graph is invalid or cannot run.
    UsageError
        ``input_shapes`` names an unknown input or contradicts the model.
    """
    _require_one_writer(model.graph)
    constants = _constants(model)
    declared = _declared_inputs(model, constants)
    shapes, notes = _input_shapes(model, declared, input_shapes or {})
    _refuse_giants(shapes)
    skeleton = _skeleton(model, constants, shapes)
    known, types, contradiction = shape_search.infer_strictly(skeleton)
    _refuse_giants(known)
    nodes = _nodes(skeleton)
    if contradiction:
        _require_loads(model)
    aliases = _aliases(nodes, constants)
    known.update({name: constant.shape for name, constant in constants.items()})
    known.update({name: constants[root].shape for name, root in aliases.items()})
    search = shape_search.Completion(skeleton, nodes, constants, aliases, known, types)
    arithmetic = search.run(lambda names: _run_for_shapes(model, names, shapes))
    _refuse_giants(known)
    unknown = [name for node in nodes for name in node.outputs if name and name not in known]
    if unknown:
        notes.append(
            f"{len(unknown)} tensors have no known shape, since the model does not run here; they stay as they are"
        )
    return Model(
        nodes=tuple(nodes),
        constants=constants,
        aliases=aliases,
        input_shapes=shapes,
        outputs=tuple(output.name for output in model.graph.output),
        shapes=known,
        opset=next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")),
        types=types,
        static=frozenset(search.values),
        arithmetic=arithmetic,
        declared=declared,
        notes=tuple(notes),
        n_nodes=len(model.graph.node),
    )


def _require_one_writer(graph: onnx.GraphProto) -> None:
    """Raise :class:`ModelError` where two nodes write one tensor, or a node writes an input or an initializer."""
    written = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    for node in graph.node:
        for name in filter(None, node.output):
            if name in written:
                raise ModelError(
                    f"the graph is invalid: {name} is written by {node.op_type} {node.name}, and not by it alone"
                )
            written.add(name)


def _require_loads(model: onnx.ModelProto) -> None:
    """Raise :class:`ModelError` where onnxruntime finds, as onnx did, that shapes contradict one another."""
    if runtime.fits(model) and all(node.domain in shape_search.RUNTIME_DOMAINS for node in model.graph.node):
        runtime.Session(model, optimize=False)


def _refuse_giants(shapes: Mapping[str, Shape]) -> None:
    """Raise :class:`ModelError` where a tensor is larger than anything that can be run or reasoned about here."""
    for name, shape in shapes.items():
        if min(shape, default=0) < 0:
            raise ModelError(f"the graph is invalid: {name} would have the shape {list(shape)}")
        if math.prod(shape) > MAX_ELEMENTS or max(shape, default=0) > MAX_LENGTH:
            raise ModelError(
                f"{name} would have the shape {list(shape)}, and no tensor may have more than {MAX_ELEMENTS} elements or "
                f"{MAX_LENGTH} on an axis; is the model damaged, or an --input-shape too large?"
            )


def _constants(model: onnx.ModelProto) -> dict[str, Constant]:
    found = {tensor.name: _constant(tensor.name, tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            tensor = constant_tensor(node)
            if tensor is not None:
                found[node.output[0]] = _constant(node.output[0], tensor)
    return found


def _constant(name: str, tensor: onnx.TensorProto) -> Constant:
    dtype = tensor.data_type
    try:
        itemsize = BITS.get(dtype, 8 * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dtype)).itemsize) / 8
    except KeyError as error:
        raise ModelError(f"{name}: unknown data type {dtype}") from error
    floating = dtype not in INTEGERS and dtype != onnx.TensorProto.STRING
    return Constant(name, tuple(tensor.dims), itemsize, floating, lambda: external.array(tensor))


def _tensor(constant: Constant, name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(constant.load(), name)


def _declared_inputs(model: onnx.ModelProto, constants: Mapping[str, Constant]) -> dict[str, tuple]:
    declared = {}
    for value in model.graph.input:
        if value.name in constants:
            continue  # IR 3 lists initializers among the inputs
        if not value.type.HasField("tensor_type"):
            raise ModelError(f"input {value.name} is not a tensor; onnxprune reads tensors only")
        dims = value.type.tensor_type.shape.dim
        declared[value.name] = tuple(
            dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None) for dim in dims
        )
    return declared


def _input_shapes(
    model: onnx.ModelProto, declared: Mapping[str, tuple], given: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Shape], list[str]]:
    for name, dims in declared.items():
        if 0 in dims:
            raise ModelError(
                f"input {name} is declared as {list(dims)}: with a size of 0 it holds nothing; export the model with its "
                "real sizes, or with names for those that vary"
            )
    shapeless = {v.name for v in model.graph.input if not v.type.tensor_type.HasField("shape")} & declared.keys()
    for name in sorted(shapeless - given.keys()):
        raise ModelError(f"input {name} declares no shape; give one with --input-shape {name}:1,3,224,224")
    for name, shape in given.items():
        if name not in declared:
            raise UsageError(f"--input-shape {name}: no such input; inputs are {', '.join(declared)}")
        if name in shapeless:
            continue
        fits = len(shape) == len(declared[name]) and all(
            0 < size <= MAX_LENGTH and (not isinstance(want, int) or want <= 0 or want == size)
            for size, want in zip(shape, declared[name], strict=True)
        )
        if not fits:
            raise UsageError(f"--input-shape {name}: {list(shape)} does not fit the declared {list(declared[name])}")
    fixed = {name: tuple(map(int, shape)) for name, shape in given.items()}
    open_axes = {
        (name, axis)
        for name, dims in declared.items()
        for axis, dim in enumerate(dims)
        if name not in fixed and (not isinstance(dim, int) or dim <= 0)
    }
    sized = {(name, axis) for name, axis in open_axes if axis != 0 or len(declared[name]) == 1}
    for size in TRIED_SIZES if sized else (1,):
        shapes = dict(fixed)
        for name, dims in declared.items():
            if name not in fixed:
                shapes[name] = tuple(
                    (size if (name, axis) in sized else 1) if (name, axis) in open_axes else dim
                    for axis, dim in enumerate(dims)
                )
        if not sized or not runtime.fits(model) or _runs(model, shapes):
            text = "; ".join(f"{n} taken as {list(s)}" for n, s in shapes.items() if any(k == n for k, _ in open_axes))
            return shapes, [f"dynamic input {text} (--input-shape changes it)"] if text else []
    names = ", ".join(f"{name} {list(declared[name])}" for name in sorted({name for name, _ in sized}))
    raise ModelError(f"no size was found that runs for the dynamic input {names}; give one with --input-shape")


def _runs(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> bool:
    """Whether a model runs on inputs of given shapes, which does not depend on the width of its floats."""
    # onnxruntime's time to load a graph in half precision is quadratic: 7 s for 10,000 nodes, 1 s in float32.
    single = runtime.in_float32(model, (*runtime.UNSUPPORTED, onnx.TensorProto.FLOAT16))
    for each in (model,) if single is None else (single, model):
        try:
            session = runtime.Session(each, optimize=False)
            session.run(runtime.random_feeds(session.inputs, shapes))
        except ModelError:
            continue
        return True
    return False


def _skeleton(
    model: onnx.ModelProto, constants: Mapping[str, Constant], shapes: Mapping[str, Shape]
) -> onnx.ModelProto:
    """The model without its weights: large constants become inputs, so that inference and parsing cost nothing."""
    skeleton = onnx.ModelProto(ir_version=max(model.ir_version, 4))
    skeleton.opset_import.extend(model.opset_import)
    skeleton.functions.extend(model.functions)
    graph = skeleton.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(n for n in model.graph.node if n.op_type != "Constant" or n.output[0] not in constants)
    for value in model.graph.output:
        graph.output.add().name = value.name
        if value.type.HasField("tensor_type"):
            graph.output[-1].type.tensor_type.elem_type = value.type.tensor_type.elem_type
        else:
            graph.output[-1].CopyFrom(value)
    for value in model.graph.input:
        if value.name in shapes:
            kind = value.type.tensor_type.elem_type
            graph.input.append(onnx.helper.make_tensor_value_info(value.name, kind, shapes[value.name]))
    foreign = {
        name for node in model.graph.node if node.domain not in ("", "ai.onnx", "com.microsoft") for name in node.output
    }
    graph.value_info.extend(value for value in model.graph.value_info if value.name in foreign)
    data_types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        tensor = constant_tensor(node) if node.op_type == "Constant" else None
        if tensor is not None:
            data_types[node.output[0]] = tensor.data_type
    for name, constant in constants.items():
        if constant.size <= shape_search.FEW or (not constant.floating and constant.size <= shape_search.SMALL):
            graph.initializer.append(_tensor(constant, name))
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(name, data_types[name], constant.shape))
    return skeleton


def _nodes(skeleton: onnx.ModelProto) -> list[Node]:
    gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.CRITICAL
    try:
        graph = gs.import_onnx(skeleton)
        if not _is_sorted(skeleton.graph):
            graph.toposort(recurse_subgraphs=False, recurse_functions=False)
    except Exception as error:
        raise ModelError(f"the graph is invalid: {str(error).splitlines()[0] if str(error) else error!r}") from error
    captured = {
        node.output[0]: tuple(captures(node)) for node in skeleton.graph.node if any(True for _ in bodies(node))
    }
    nodes = [
        Node(
            name=node.name,
            op=node.op,
            domain="" if node.domain in (None, "ai.onnx") else node.domain,
            inputs=tuple(tensor.name for tensor in node.inputs),
            outputs=tuple(tensor.name for tensor in node.outputs),
            attributes=node.attrs,
            captured=captured.get(node.outputs[0].name, ()) if node.outputs else (),
        )
        for node in graph.nodes
    ]
    # onnx-graphsurgeon's own clean-up compares lists of tensors by name: quadratic, 2 s on 8,000 nodes.
    needed = {tensor.name for tensor in graph.outputs}
    live = []
    for node in reversed(nodes):
        if not needed.isdisjoint(node.outputs):
            live.append(node)
            needed.update(node.inputs, node.captured)
            needed.discard("")
    return live[::-1]


def _is_sorted(graph: onnx.GraphProto) -> bool:
    """Whether every node reads only what stands before it (as the specification wants, and not every file keeps)."""
    computed = {name for node in graph.node for name in node.output if name}
    for node in graph.node:
        if not computed.isdisjoint(node.input):
            return False
        computed.difference_update(node.output)
    return True


def _aliases(nodes: Sequence[Node], constants: Mapping[str, Constant]) -> dict[str, str]:
    aliases: dict[str, str] = {}
    for node in nodes:
        if node.op == "Identity" and not node.domain:
            root = aliases.get(node.inputs[0], node.inputs[0])
            if root in constants:
                aliases[node.outputs[0]] = root
    return aliases


def _run_for_shapes(
    model: onnx.ModelProto, names: Sequence[str], shapes: Mapping[str, Shape]
) -> dict[str, tuple[Shape, int]]:
    """Find shapes that inference could not, by running the model once with those tensors as outputs, if it is small."""
    if not runtime.fits(model):
        return {}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return runtime.measure(probe, names, shapes)
