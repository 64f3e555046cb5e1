"""Read a model into the graph that onnxprune reasons about, with every tensor's static shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper, shape_inference

from onnxprune import runtime
from onnxprune.errors import ModelError, UsageError
from onnxprune.model import Constant, Model, Node, Shape
from onnxprune.protos import INTEGERS, constant_tensor

SMALL = 4096  # elements: integer constants up to this size stay readable to shape inference and shape arithmetic
TRIED_SIZES = (64, 32, 16, 128, 224, 256, 8)  # for dynamic axes nobody gave a size for
_RUNTIME_DOMAINS = ("", "ai.onnx.ml", "com.microsoft")  # whose operators onnxruntime brings
# fmt: off
_NEVER_STATIC = frozenset((
    "If", "Loop", "Scan", "SequenceMap", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike",
    "Bernoulli", "Multinomial", "DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear",
))
# fmt: on


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
    _check_opset(model)
    constants = _constants(model)
    declared = _declared_inputs(model, constants)
    shapes, notes = _input_shapes(model, declared, input_shapes or {})
    skeleton = _skeleton(model, constants, shapes)
    known, types = _infer_shapes(skeleton)
    nodes = _nodes(skeleton)
    aliases = _aliases(nodes, constants)
    known.update({name: constant.shape for name, constant in constants.items()})
    known.update({name: constants[root].shape for name, root in aliases.items()})
    arithmetic, static = _complete(model, skeleton, nodes, constants, aliases, shapes, known, types)
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
        static=frozenset(static),
        arithmetic=arithmetic,
        declared=declared,
        notes=tuple(notes),
        n_nodes=len(model.graph.node),
    )


def _check_opset(model: onnx.ModelProto) -> None:
    versions = [opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")]
    if not versions:
        raise ModelError("the model imports no standard operator set")
    if versions[0] < 7:
        raise ModelError(
            f"opset {versions[0]} is too old; convert the model to opset 7 or newer (onnx.version_converter)"
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
        itemsize = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dtype)).itemsize
    except KeyError as error:
        raise ModelError(f"{name}: unknown data type {dtype}") from error
    floating = dtype not in INTEGERS and dtype != onnx.TensorProto.STRING
    return Constant(name, tuple(tensor.dims), itemsize, floating, lambda: numpy_helper.to_array(tensor))


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
    shapeless = {v.name for v in model.graph.input if not v.type.tensor_type.HasField("shape")} & declared.keys()
    for name in sorted(shapeless - given.keys()):
        raise ModelError(f"input {name} declares no shape; give one with --input-shape {name}:1,3,224,224")
    for name, shape in given.items():
        if name not in declared:
            raise UsageError(f"--input-shape {name}: no such input; inputs are {', '.join(declared)}")
        if name in shapeless:
            continue
        fits = len(shape) == len(declared[name]) and all(
            size > 0 and (not isinstance(want, int) or want <= 0 or want == size)
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
        if not sized or _runs(model, shapes):
            text = "; ".join(f"{n} taken as {list(s)}" for n, s in shapes.items() if any(k == n for k, _ in open_axes))
            return shapes, [f"dynamic input {text} (--input-shape changes it)"] if text else []
    names = ", ".join(f"{name} {list(declared[name])}" for name in sorted({name for name, _ in sized}))
    raise ModelError(f"no size was found that runs for the dynamic input {names}; give one with --input-shape")


def _runs(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> bool:
    try:
        session = runtime.Session(model.SerializeToString())
        session.run(runtime.random_feeds(session.inputs, shapes))
    except ModelError:
        return False
    return True


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
    data_types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        tensor = constant_tensor(node) if node.op_type == "Constant" else None
        if tensor is not None:
            data_types[node.output[0]] = tensor.data_type
    for name, constant in constants.items():
        if constant.size <= 8 or (not constant.floating and constant.size <= SMALL):
            graph.initializer.append(_tensor(constant, name))
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(name, data_types[name], constant.shape))
    return skeleton


def _infer_shapes(skeleton: onnx.ModelProto) -> tuple[dict[str, Shape], dict[str, int]]:
    try:
        inferred = shape_inference.infer_shapes(skeleton, data_prop=True)
    except (shape_inference.InferenceError, RuntimeError, ValueError, TypeError):  # running the model will judge it
        inferred = skeleton
    shapes, types = {}, {}
    for value in (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input):
        types[value.name] = value.type.tensor_type.elem_type
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            if all(dim.HasField("dim_value") for dim in dims):
                shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes, types


def _nodes(skeleton: onnx.ModelProto) -> list[Node]:
    gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.CRITICAL
    try:
        graph = gs.import_onnx(skeleton)
        if not _is_sorted(skeleton.graph):
            graph.toposort(recurse_subgraphs=False, recurse_functions=False)
    except Exception as error:
        raise ModelError(f"the graph is invalid: {str(error).splitlines()[0] if str(error) else error!r}") from error
    nodes = [
        Node(
            name=node.name,
            op=node.op,
            domain="" if node.domain in (None, "ai.onnx") else node.domain,
            inputs=tuple(tensor.name for tensor in node.inputs),
            outputs=tuple(tensor.name for tensor in node.outputs),
            attributes=node.attrs,
            captured=tuple(_captured(node)),
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


def _captured(node: gs.Node) -> Iterator[str]:
    """Names that the node's bodies read from outside."""
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            own = {tensor.name for inner in value.nodes for tensor in inner.outputs} | {i.name for i in value.inputs}
            for inner in value.nodes:
                yield from (t.name for t in inner.inputs if t.name and t.name not in own)
                yield from (name for name in _captured(inner) if name not in own)
            yield from (tensor.name for tensor in value.outputs if tensor.name not in own)


def _aliases(nodes: Sequence[Node], constants: Mapping[str, Constant]) -> dict[str, str]:
    aliases: dict[str, str] = {}
    for node in nodes:
        if node.op == "Identity" and not node.domain:
            root = aliases.get(node.inputs[0], node.inputs[0])
            if root in constants:
                aliases[node.outputs[0]] = root
    return aliases


def _static_nodes(
    nodes: Sequence[Node], constants: Mapping[str, Constant], aliases: Mapping[str, str], shapes: Mapping[str, Shape]
) -> list[Node]:
    """Nodes whose outputs follow from shapes and small constants: shape arithmetic."""

    def is_static(name: str) -> bool:
        constant = constants.get(aliases.get(name, name))
        if constant is None:
            return name in found
        return constant.size <= 1 or (not constant.floating and constant.size <= SMALL)

    found: set[str] = set()
    static = []
    for node in nodes:
        if node.outputs[0] in aliases or node.domain or node.op in _NEVER_STATIC:
            continue
        if node.op in ("Shape", "Size"):
            follows = node.inputs[0] in shapes
        elif node.op == "ConstantOfShape" and _is_float_fill(node):
            follows = False
        else:
            follows = bool(node.inputs) and all(is_static(name) for name in node.inputs if name)
        sizes = [math.prod(shapes[name]) for name in node.outputs if name in shapes]
        if follows and max(sizes, default=0) <= SMALL:
            static.append(node)
            found.update(name for name in node.outputs if name)
    return static


def _is_float_fill(node: Node) -> bool:
    value = node.attributes.get("value")
    return value is None or np.issubdtype(value.dtype, np.floating)


def _complete(
    model: onnx.ModelProto, skeleton: onnx.ModelProto, nodes: Sequence[Node], constants: Mapping[str, Constant],
    aliases: Mapping[str, str], shapes: Mapping[str, Shape], known: dict[str, Shape], types: dict[str, int],
) -> tuple[runtime.Arithmetic | None, set[str]]:  # fmt: skip
    """Find the shapes that inference could not, and the graph's shape arithmetic.

    The arithmetic is evaluated and handed back to inference as constants, as long as that finds more; what is still unknown
    then is measured by running the model once.
    """
    by_output = {name: proto for proto in skeleton.graph.node for name in proto.output if name}
    wanted = [name for node in nodes for name in node.outputs if name]
    measured = False
    while True:
        static = _static_nodes(nodes, constants, aliases, known)
        arithmetic = None
        if static:
            read = dict.fromkeys(name for node in static for name in node.inputs if name)
            leaves = [_tensor(constants[aliases.get(n, n)], n) for n in read if aliases.get(n, n) in constants]
            arithmetic = runtime.Arithmetic([by_output[node.key] for node in static], leaves, model.opset_import)
        names = {name for node in static for name in node.outputs if name}
        missing = [name for name in wanted if name not in known]
        if not missing or measured:
            return arithmetic, names
        values = arithmetic(known) if arithmetic else {}
        found, kinds = _infer_shapes(_folded(skeleton, values))
        found.update({name: value.shape for name, value in values.items()})
        if not found.keys() - known.keys():
            found, measured = _measured_or_unknown(model, nodes, missing, shapes), True
        known.update({name: shape for name, shape in found.items() if name not in known})
        types.update({name: kind for name, kind in kinds.items() if name not in types})


def _folded(skeleton: onnx.ModelProto, values: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The skeleton with computed values in the place of the nodes that compute them."""
    folded = onnx.ModelProto()
    folded.CopyFrom(skeleton)
    del folded.graph.node[:]
    folded.graph.node.extend(node for node in skeleton.graph.node if node.output[0] not in values)
    folded.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    return folded


def _measured_or_unknown(
    model: onnx.ModelProto, nodes: Sequence[Node], missing: Sequence[str], shapes: Mapping[str, Shape]
) -> dict[str, Shape]:
    """Measure shapes; where operators of somebody's own domain keep the model from running here, they stay unknown."""
    try:
        return _run_for_shapes(model, missing, shapes)
    except ModelError:
        local = {(function.domain, function.name) for function in model.functions}
        if any(node.domain not in _RUNTIME_DOMAINS and (node.domain, node.op) not in local for node in nodes):
            return {}
        raise


def _run_for_shapes(model: onnx.ModelProto, names: Sequence[str], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Find shapes that inference could not, by running the model once with those tensors as outputs."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return runtime.measure_shapes(probe.SerializeToString(), names, shapes)
