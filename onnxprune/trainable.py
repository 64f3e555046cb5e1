"""Trainable: which constants of a graph are weights that training may change, and why the others are not.

A constant is a weight by the place where it is read, not by its type: epsilons, bounds, masks and running statistics are
floating-point numbers, too. A constant that is read in several places is a weight only if it is one in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import onnx

from onnxprune import external
from onnxprune.protos import INTEGERS, bodies, captures, constant_tensor

LARGEST = 1e4  # magnitude: what exceeds it stands for infinity (masks of attention)

OPERAND = "an operand of the operator, not a weight"
NUMBER = "a single number: part of the network's definition"
MASK = "looks like a mask"
NORMALISES = "normalises the input"
STATISTICS = "running statistics"
QUANTISED = "quantised"
STATE = "an initial state"
BODY = "in a body of control flow"
OUTPUT = "an output of the graph"
UNREAD = "nothing reads it"
UNUSED = "no output depends on it"

_WEIGHT, _FACTOR = "weight", "factor"  # roles: a weight whatever its value; one unless its value says otherwise


def _slots(text: str) -> dict[str, tuple[int, ...]]:
    return {op: tuple(map(int, indices.split("+"))) for op, indices in (word.split(":") for word in text.split())}


WEIGHTS = _slots(
    "Conv:1+2 ConvTranspose:1+2 DeformConv:1+3 FusedConv:1+2 NhwcConv:1+2 NhwcFusedConv:1+2 "
    "Gemm:0+1+2 FusedGemm:0+1+2 MatMul:0+1 FusedMatMul:0+1 TransposeMatMul:0+1 "
    "BatchNormalization:1+2 InstanceNormalization:1+2 LayerNormalization:1+2 GroupNormalization:1+2 RMSNormalization:1 "
    "SimplifiedLayerNormalization:1+2 SkipLayerNormalization:2+3+4 SkipSimplifiedLayerNormalization:2+3 "
    "EmbedLayerNormalization:2+3+4+5+6 GroupNorm:1+2 SkipGroupNorm:1+2+4 PRelu:1 "
    "Gather:0 GatherElements:0 GatherND:0 LSTM:1+2+3+7 GRU:1+2+3 RNN:1+2+3 "
    "Attention:1+2 PackedAttention:1+2 MultiHeadAttention:3 PackedMultiHeadAttention:3 "
    "BiasGelu:1 FastGelu:1 BiasAdd:1 BiasSplitGelu:1"
)
"""Inputs that are weights, by operator."""

FACTORS = _slots(
    "Add:0+1 Sub:0+1 Mul:0+1 Div:0+1 Where:1+2 MultiHeadAttention:5 "
    "SkipLayerNormalization:0+1 SkipSimplifiedLayerNormalization:0+1 SkipGroupNorm:0+3"
)
"""Inputs that are weights unless their value says otherwise."""

_EVERY = ("Einsum", "Sum", "Mean", "Concat")  # operators all of whose inputs are alike
_QUANTISERS = frozenset(
    "QuantizeLinear DequantizeLinear DynamicQuantizeLinear ConvInteger MatMulInteger QLinearConv QLinearMatMul "
    "QLinearAdd QLinearMul QLinearConcat QLinearAveragePool QLinearGlobalAveragePool QLinearSigmoid QLinearLeakyRelu "
    "QGemm QAttention MatMulIntegerToFloat DynamicQuantizeMatMul DynamicQuantizeLSTM MatMulNBits MatMulBnb4 "
    "GatherBlockQuantized QEmbedLayerNormalization".split()
)
_BOUNDS = _slots("Clip:1+2 Pow:1 Pad:2 Resize:1+2 Upsample:1 OneHot:1+2 Range:0+1+2 Dropout:1 BatchNormalization:3+4")
"""Inputs that only say how an operator works: no value flows through them, in constant subgraphs either."""

_MOVES = frozenset(
    "Identity Cast Transpose Reshape Flatten Squeeze Unsqueeze Expand Tile Slice Split Pad Resize DepthToSpace "
    "SpaceToDepth".split()
)
_NORMALISES = _MOVES | frozenset(("Add", "Sub", "Mul", "Div"))
_NEVER = frozenset("If Loop Scan Shape Size NonZero RandomNormalLike RandomUniformLike Bernoulli Multinomial".split())


def trainable(model: onnx.ModelProto) -> dict[str, str]:
    """Say of every floating-point constant whether training may change it.

    Parameters
    ----------
    model
        A model whose local functions have been inlined.

    Returns
    -------
    dict
        By name, an empty string where a constant is trainable, else the reason why not, in words. Constant nodes go by their
        output. Integer weights of quantised layers are in it, too, and constants of bodies of control flow.
    """
    return _Graph(model.graph).verdicts()


class _Graph:
    """A graph seen as a flow of constants into the places where they are read."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.outputs = {value.name for value in graph.output}
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            tensor = constant_tensor(node) if node.op_type == "Constant" else None
            if tensor is not None:
                self.tensors[node.output[0]] = tensor
        self.nodes = [node for node in graph.node if node.output and node.output[0] not in self.tensors]
        self._roles: dict[str, frozenset[str]] = {}

    def verdicts(self) -> dict[str, str]:
        """Every constant and the reason why it is none that training may change, or an empty string."""
        found = {name: BODY for node in self.graph.node for name in _inside(node)}
        for name, tensor in self.tensors.items():
            roles = self.roles(name)
            if tensor.data_type not in (*INTEGERS, onnx.TensorProto.STRING):
                found[name] = self._verdict(name, tensor, roles)
            elif QUANTISED in roles:
                found[name] = QUANTISED
        return found

    def _verdict(self, name: str, tensor: onnx.TensorProto, roles: frozenset[str]) -> str:
        if name in self.outputs:
            return OUTPUT
        if not roles:
            read = name in self.captured or any(name in node.input for node in self.nodes)
            return UNUSED if read else UNREAD
        reasons = sorted(roles - {_WEIGHT, _FACTOR})
        if reasons:
            return reasons[0]
        value = external.array(tensor)
        if value.dtype.itemsize < 2:
            return QUANTISED
        return _by_value(value.astype(np.float64)) if _FACTOR in roles else ""

    def roles(self, name: str) -> frozenset[str]:
        """What a constant, or what is computed from constants, is in each place that an output depends on."""
        if name not in self._roles:
            found = set[str]({BODY} if name in self.captured else ())
            for node, index in self.consumers.get(name, ()):
                found |= self._role(node, index)
            self._roles[name] = frozenset(found)
        return self._roles[name]

    def _role(self, node: onnx.NodeProto, index: int) -> frozenset[str]:
        op = node.op_type
        if op in _QUANTISERS:
            return frozenset((QUANTISED,))
        if op == "BatchNormalization" and index in (3, 4):
            return frozenset((STATISTICS,))
        if index in _BOUNDS.get(op, ()) or node.domain not in ("", "ai.onnx", "com.microsoft"):
            return frozenset((OPERAND,))
        if (op in _MOVES and index == 0) or not self.derived.isdisjoint(node.output):
            return self._passed(node)
        if op == "Attention" and node.domain != "com.microsoft":  # the standard's: query, key, value, mask
            return frozenset((_FACTOR,))
        if index in WEIGHTS.get(op, ()) or op == "Einsum":
            return frozenset((_WEIGHT,))
        if op in ("LSTM", "GRU", "RNN"):
            return frozenset((STATE,))
        if index not in FACTORS.get(op, ()) and op not in _EVERY:
            return frozenset((OPERAND,))
        others = [name for name in node.input if name not in self.derived and name not in self.tensors]
        normalises = op in ("Add", "Sub", "Mul", "Div") and any(name in self.input_like for name in others)
        return frozenset((NORMALISES if normalises else _FACTOR,))

    def _passed(self, node: onnx.NodeProto) -> frozenset[str]:
        """Roles of what a node computes; through anything but a mere Identity the value counts, too."""
        roles = frozenset[str]().union(*(self.roles(name) for name in node.output if name))
        roles |= {OUTPUT} if not self.outputs.isdisjoint(node.output) else set()
        if node.op_type == "Identity":
            return roles
        return frozenset(_FACTOR if role == _WEIGHT else role for role in roles) or frozenset((OPERAND,))

    @cached_property
    def consumers(self) -> dict[str, list[tuple[onnx.NodeProto, int]]]:
        """Every place where live nodes read a tensor."""
        made = {name: node for node in self.nodes for name in node.output if name}
        waiting, live, table = list(self.outputs), set[str](), dict[str, list[tuple[onnx.NodeProto, int]]]()
        while waiting:
            node = made.get(waiting.pop())
            if node is None or node.output[0] in live:
                continue
            live.add(node.output[0])
            waiting += [*node.input, *captures(node)]
            for index, name in enumerate(node.input):
                table.setdefault(name, []).append((node, index))
        return table

    @cached_property
    def captured(self) -> frozenset[str]:
        """Tensors that bodies of control flow read."""
        return frozenset(name for node in self.nodes for name in captures(node))

    @cached_property
    def derived(self) -> frozenset[str]:
        """Tensors computed from constants alone."""
        known = set(self.tensors)
        self._spread(known, lambda node: node.op_type not in _NEVER and all(i in known for i in node.input if i))
        return frozenset(known - self.tensors.keys())

    @cached_property
    def input_like(self) -> frozenset[str]:
        """Inputs of the graph, and what only moves, shifts and scales them by constants."""
        inputs = {value.name for value in self.graph.input} - self.tensors.keys()
        constant = self.derived | self.tensors.keys()

        def follows(node: onnx.NodeProto) -> bool:
            dynamic = [name for name in node.input if name and name not in constant]
            return node.op_type in _NORMALISES and len(dynamic) == 1 and dynamic[0] in inputs

        self._spread(inputs, follows)
        return frozenset(inputs)

    def _spread(self, known: set[str], follows) -> None:
        """Add what nodes compute for which ``follows`` holds, until nothing changes; files need not be sorted."""
        size = -1
        while size < len(known):
            size = len(known)
            for node in self.nodes:
                if any(node.input) and follows(node):
                    known.update(filter(None, node.output))


def _by_value(value: np.ndarray) -> str:
    if value.size <= 1:
        return NUMBER
    return "" if bool((np.abs(value) < LARGEST).all()) else MASK  # NaN compares false


def _inside(node: onnx.NodeProto) -> Iterator[str]:
    """Names of floating-point constants of a node's bodies."""
    for body in bodies(node):
        held = {tensor.name: tensor for tensor in body.initializer}
        for inner in body.node:
            tensor = constant_tensor(inner) if inner.op_type == "Constant" else None
            if tensor is not None:
                held[inner.output[0]] = tensor
            yield from _inside(inner)
        yield from (n for n, t in held.items() if t.data_type not in (*INTEGERS, onnx.TensorProto.STRING))
