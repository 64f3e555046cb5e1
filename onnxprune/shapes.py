"""Static shapes of every tensor, and the graph's shape arithmetic.

onnx's shape inference stops where a shape is computed (Shape, Gather, Concat, Reshape). That arithmetic is evaluated here
and handed back to inference, window by window along the graph; what is unknown even then is measured by running the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

from onnxprune import runtime
from onnxprune.errors import ModelError
from onnxprune.model import Constant, Node, Shape
from onnxprune.protos import every_node, is_float

SMALL = 4096  # elements: integer constants up to this size stay readable to shape inference and shape arithmetic
FEW = 8  # elements: floating-point constants up to this size (scales of a Resize) inference may read
WINDOW = 96  # nodes without a shape that inference is asked for at a time
_INFERENCE = (shape_inference.InferenceError, RuntimeError, ValueError, TypeError)
RUNTIME_DOMAINS = ("", "ai.onnx.ml", "com.microsoft")  # whose operators onnxruntime brings
# fmt: off
_NEVER_STATIC = frozenset((
    "If", "Loop", "Scan", "SequenceMap", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike",
    "Bernoulli", "Multinomial", "DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear",
))
# fmt: on
_CRASHING = frozenset(
    ("EyeLike", "OneHot", "OneHotEncoder", "RegexFullMatch", "LabelEncoder", "DictVectorizer", "TreeEnsemble")
)
"""On which onnx's inference may end the process: it trusts that what they read has a type, or elements.

``tools/inference.py`` finds them.
"""

_UNKNOWN = "onnxprune.unknown"


def infer(model: onnx.ModelProto) -> tuple[dict[str, Shape], dict[str, int]]:
    """Shapes (those without a symbol in them) and element types that onnx's own inference finds."""
    shapes, types, _ = infer_strictly(model)
    return shapes, types


def infer_strictly(model: onnx.ModelProto) -> tuple[dict[str, Shape], dict[str, int], str]:
    """As :func:`infer`, and where the graph contradicts itself: shapes that do not go together."""
    problem, model = "", _without_crashes(model)
    try:
        # Without data_prop, which takes memory for each element that a vector is declared to have; Completion computes.
        inferred = shape_inference.infer_shapes(model, strict_mode=True)
    except _INFERENCE as error:
        problem = str(error)
        try:
            inferred = shape_inference.infer_shapes(model)
        except _INFERENCE:
            inferred = model
    shapes, types = {}, {}
    for value in (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input):
        types[value.name] = value.type.tensor_type.elem_type
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            if all(dim.HasField("dim_value") for dim in dims):
                shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes, types, problem


def _without_crashes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Hide from inference what may end the process; return the model itself where there is nothing of that."""
    if not any(node.op_type in _CRASHING for node in every_node(model.graph)):
        return model
    hidden = onnx.ModelProto()
    hidden.CopyFrom(model)
    hidden.opset_import.append(helper.make_opsetid(_UNKNOWN, 1))
    for node in every_node(hidden.graph):
        if node.op_type in _CRASHING:
            node.domain = _UNKNOWN
    return hidden


def _counts(constant: Constant) -> bool:
    """Whether a constant may hold lengths, indices or conditions: few numbers, and not of a type to quantise to."""
    if constant.floating or constant.size > SMALL:
        return False
    return constant.itemsize > 2 or constant.load().dtype == np.bool_


class Completion:
    """Finds the shapes that inference alone could not.

    Attributes
    ----------
    shapes, types
        What is known; grows.
    values
        Tensors computed from shapes and integer constants alone.
    """

    def __init__(
        self, model: onnx.ModelProto, nodes: Sequence[Node], constants: Mapping[str, Constant], aliases: Mapping[str, str],
        shapes: dict[str, Shape], types: dict[str, int],
    ) -> None:  # fmt: skip
        self._model, self._nodes, self._constants, self._aliases = model, nodes, constants, aliases
        self._protos = {name: proto for proto in model.graph.node for name in proto.output if name}
        self.shapes, self.types = shapes, types
        self.values: dict[str, np.ndarray] = {}
        self._small_constants = {name for name, c in constants.items() if c.size <= 1 or _counts(c)}
        self._arithmetic_nodes = self._possibly_static()
        self._waiting = list(self._arithmetic_nodes)
        self._open = list(nodes)

    def run(self, measure: Callable[[Sequence[str]], Mapping[str, tuple[Shape, int]]]) -> runtime.Arithmetic | None:
        """Find all shapes; return the shape arithmetic, to be evaluated again on other shapes.

        Parameters
        ----------
        measure
            Runs the model and returns the shape and ONNX element type of tensors.

        Raises
        ------
        ModelError
            Only running the model could tell, and it does not run.
        """
        window = WINDOW
        self._evaluate()
        while unshaped := self._unshaped():
            if self._infer(unshaped[:window]):
                self._evaluate()
            elif window < len(unshaped):
                window = len(unshaped)
            else:
                measured = self._measured_or_unknown(self._missing(unshaped), measure)
                self.shapes.update({name: shape for name, (shape, _) in measured.items()})
                self.types.update({name: kind for name, (_, kind) in measured.items()})
                self._evaluate()
                break
        static = [node for node in self._arithmetic_nodes if node.key in self.values]
        return self._arithmetic(static, {}) if static else None

    def _unshaped(self) -> list[Node]:
        shapes = self.shapes
        self._open = [node for node in self._open if any(name and name not in shapes for name in node.outputs)]
        return self._open

    def _missing(self, nodes: Sequence[Node]) -> list[str]:
        return [name for node in nodes for name in node.outputs if name and name not in self.shapes]

    def _small(self, name: str) -> bool:
        return self._aliases.get(name, name) in self._small_constants

    def _possibly_static(self) -> list[Node]:
        """Nodes that follow from shapes and small constants, in order."""
        possible: set[str] = set()
        found = []
        for node in self._nodes:
            if node.outputs[0] in self._aliases or node.domain or node.op in _NEVER_STATIC:
                continue
            if self._fills_with_floats(node):
                continue
            measures = node.op in ("Shape", "Size")
            if measures or (node.inputs and all(not n or n in possible or self._small(n) for n in node.inputs)):
                found.append(node)
                possible.update(node.outputs)
        return found

    def _fills_with_floats(self, node: Node) -> bool:
        """Whether a node makes a tensor of equal floats: data, although only its size is computed."""
        if node.op == "ConstantOfShape":
            value = node.attributes.get("value")
            return value is None or is_float(value.dtype)
        constant = self._constants.get(self._aliases.get(node.inputs[0], node.inputs[0])) if node.inputs else None
        return node.op in ("Expand", "Tile") and constant is not None and constant.floating

    def _evaluate(self) -> None:
        """Compute the values that known shapes allow; none is larger than ``SMALL``."""
        ready: list[Node] = []
        found: set[str] = set()
        for node in self._waiting:
            if node.op in ("Shape", "Size"):
                follows = node.inputs[0] in self.shapes
            else:
                follows = all(not n or n in found or n in self.values or self._small(n) for n in node.inputs)
            sizes = [math.prod(self.shapes[name]) for name in node.outputs if name in self.shapes]
            if follows and max(sizes, default=0) <= SMALL:
                ready.append(node)
                found.update(name for name in node.outputs if name)
        if not ready:
            return
        values = self._arithmetic(ready, self.values)(self.shapes)
        self.values.update(values)
        self.shapes.update({name: value.shape for name, value in values.items() if name not in self.shapes})
        self.types.update({name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in values.items()})
        self._waiting = [node for node in self._waiting if node.key not in self.values]

    def _arithmetic(self, nodes: Sequence[Node], values: Mapping[str, np.ndarray]) -> runtime.Arithmetic:
        own = {name for node in nodes for name in node.outputs}
        read = dict.fromkeys(name for node in nodes for name in node.inputs if name and name not in own)
        leaves = []
        for name in read:
            constant = self._constants.get(self._aliases.get(name, name))
            value = values.get(name) if constant is None else constant.load()
            if value is not None:
                leaves.append(numpy_helper.from_array(value, name))
        return runtime.Arithmetic([self._protos[node.key] for node in nodes], leaves, self._model.opset_import)

    def _infer(self, nodes: Sequence[Node]) -> bool:
        """Ask onnx's inference about some nodes; return whether it found anything."""
        part = onnx.ModelProto(ir_version=self._model.ir_version)
        part.opset_import.extend(self._model.opset_import)
        part.functions.extend(self._model.functions)
        part.graph.name = "part"
        computed: set[str] = set()
        for node in nodes:
            part.graph.node.append(self._protos[node.key])
            computed.update(node.outputs)
        read = (name for node in nodes for name in (*node.inputs, *node.captured) if name and name not in computed)
        for name in dict.fromkeys(read):
            value = self.values.get(name)
            constant = self._constants.get(self._aliases.get(name, name))
            if value is None and constant is not None and (constant.size <= FEW or self._small(name)):
                value = constant.load()
            if value is not None:
                part.graph.initializer.append(numpy_helper.from_array(value, name))
            elif name in self.shapes:
                kind = self.types.get(self._aliases.get(name, name), onnx.TensorProto.FLOAT)
                part.graph.input.append(helper.make_tensor_value_info(name, kind, self.shapes[name]))
        found, types = infer(part)
        new = {name: shape for name, shape in found.items() if name in computed and name not in self.shapes}
        self.shapes.update(new)
        self.types.update(
            {name: kind for name, kind in types.items() if name not in self.types or not self.types[name]}
        )
        return bool(new)

    def _measured_or_unknown(
        self, missing: Sequence[str], measure: Callable[[Sequence[str]], Mapping[str, tuple[Shape, int]]]
    ) -> Mapping[str, tuple[Shape, int]]:
        """Measure shapes; where operators of somebody's own domain keep the model from running here, they stay unknown."""
        try:
            return measure(missing)
        except ModelError:
            local = {(function.domain, function.name) for function in self._model.functions}
            if any(node.domain not in RUNTIME_DOMAINS and (node.domain, node.op) not in local for node in self._nodes):
                return {}
            raise
