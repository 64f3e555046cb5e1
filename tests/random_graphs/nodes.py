"""A random graph under construction: every decision is one byte, every tensor's shape is known at once."""

from __future__ import annotations

from functools import cache
from math import gcd, prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import ModelProto, TensorProto, TypeProto, helper, numpy_helper

import oracle
from graphs import IR_VERSION, Tiny, length

STORED = ("initializer",) * 12 + ("shared", "identity", "transpose", "scaled", "constant")


@cache
def schema(op: str, opset: int) -> onnx.defs.OpSchema | None:
    """Definition of an operator in an opset; None where there is none."""
    try:
        found = onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None
    return None if found.deprecated else found


class Nodes(Tiny):
    """A graph that grows from random decisions.

    Attributes
    ----------
    decisions
        Bytes that decide what comes next; where none is left, the simplest.
    axis
        Channel axis of every floating-point tensor.
    pool
        Tensors that later steps may read again.
    storing
        Ways of storing a weight, as often as they are to be chosen.
    enclosed
        Number of nodes in finished bodies of control flow.
    """

    def __init__(self, decisions: bytes, opset: int, seed: int) -> None:
        super().__init__(opset=opset, seed=seed)
        self.decisions = iter(decisions)
        self.axis: dict[str, int] = {}
        self.pool: list[str] = []
        self.dynamic = False
        self.stretching = False  # lengths of positions are open, too
        self.in_nodes = False  # operands are Constant nodes
        self.types: dict[str, TypeProto] = {}
        self.values: dict[str, np.ndarray] = {}
        self.stored: dict[tuple[int, ...], str] = {}
        self.storing: tuple[str, ...] = STORED
        self.enclosed = self.n_constants = 0

    @property
    def number(self) -> int:
        """Number of nodes so far, bodies included: names with it are unique over all scopes."""
        return self.enclosed + len(self.nodes)

    @property
    def global_pools(self) -> tuple[str, ...]:
        """Pools over all positions that onnxruntime has."""
        return ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")[: 3 if self.opset < 22 else 2]

    # -- deciding ------------------------------------------------------------------------------------------------------

    def choose(self, n: int) -> int:
        """Choose one of 0 .. n-1; 0 is the simplest, so that smaller bytes mean simpler graphs."""
        return next(self.decisions, 0) % n

    def pick(self, *options: Any) -> Any:
        """Choose one of some options."""
        return options[self.choose(len(options))]

    def chance(self, one_in: int = 2) -> bool:
        """Be true once in a while; False is simplest."""
        return self.choose(one_in) == one_in - 1

    def divisor(self, *sizes: int) -> int:
        """Choose a common divisor, one first."""
        common = gcd(*sizes)
        return self.pick(*(d for d in range(1, common + 1) if common % d == 0))

    # -- adding --------------------------------------------------------------------------------------------------------

    def has(self, op: str) -> bool:
        """Whether the opset has an operator."""
        return schema(op, self.opset) is not None

    def shape(self, x: str) -> tuple[int, ...]:
        """Shape of a tensor at the batch size that the net is built for."""
        return tuple(dim.dim_value for dim in self.types[x].tensor_type.shape.dim)

    def channels(self, x: str) -> int:
        """Length of the channel axis."""
        return self.shape(x)[self.axis[x]]

    def source(self, *shape: int, axis: int, name: str = "x") -> str:
        """Add an input of the graph; its batch is dynamic where the net's is, its positions where they are."""
        self.types[name] = helper.make_tensor_type_proto(TensorProto.FLOAT, shape)
        self.axis[name] = axis
        free = [bool(a) and a != axis and self.stretching for a in range(len(shape))]
        dims = [f"D{a}_{size}" if open_ else size for a, (size, open_) in enumerate(zip(shape, free, strict=True))]
        return self.input(*("N", *dims[1:]) if self.dynamic else dims, name=name)

    def constant(self, values: ArrayLike, name: str | None = None) -> str:
        """Add an initializer (or a Constant node)."""
        self.n_constants += 1
        name = super().constant(values, name or f"constant{self.n_constants}")
        tensor = self.initializers[-1]
        self.types[name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        if prod(tensor.dims) <= 64:
            self.values[name] = numpy_helper.to_array(tensor)
        if self.in_nodes:
            self.nodes.append(helper.make_node("Constant", [], [name], value=self.initializers.pop()))
        return name

    def random(self, *shape: int, name: str, offset: float = 0.0, scale: float = 1.0) -> str:
        """Add a weight: plain, shared with another node, behind Identity, Transpose or Mul, or as a Constant node."""
        how = self.pick(*self.storing)
        how = how if shape else self.storing[0]
        if how == "shared" and shape in self.stored and not offset:
            return self.stored[shape]
        stored = shape[::-1] if how == "transpose" else shape
        was, self.in_nodes = self.in_nodes, self.in_nodes or how == "constant"
        weight = super().random(*stored, name=name, offset=offset, scale=scale)
        self.in_nodes = was
        if how == "identity":
            weight = self.node("Identity", weight)
        elif how == "transpose":
            weight = self.node("Transpose", weight, perm=list(range(len(shape)))[::-1])
        elif how == "scaled":
            weight = self.node(
                "Mul", weight, self.constant(0.5 + self.rng.random(self.pick((), shape)).astype(np.float32))
            )
        if not offset:
            self.stored[shape] = weight
        return weight

    def node(
        self, op: str, *inputs: str, name: str | None = None, outputs: int = 1, domain: str = "", **attributes: Any
    ):
        """Add a node; what the opset takes as an operand and not as an attribute becomes a constant."""
        known = schema(op, self.opset)
        assert known is not None, op
        operands = list(inputs)
        positions = {operand.name.lower(): index for index, operand in enumerate(known.inputs)}
        for key in [key for key in attributes if key not in known.attributes]:
            operands += [""] * (positions[key] + 1 - len(operands))
            operands[positions[key]] = self.constant(attributes.pop(key))
        name = name or f"{op.lower()}{self.number}"
        result = super().node(op, *operands, name=name, outputs=outputs, domain=domain, **attributes)
        read = [operand for operand in operands if operand]
        found = onnx.shape_inference.infer_node_outputs(
            known, self.nodes[-1], {operand: self.types[operand] for operand in read},
            {operand: numpy_helper.from_array(self.values[operand]) for operand in read if operand in self.values},
            opset_imports=[helper.make_opsetid("", self.opset)], ir_version=IR_VERSION,
        )  # fmt: skip
        self.types |= found
        for output, type_ in found.items():
            if not type_.tensor_type.HasField("shape"):  # functions are not always inferred
                type_.tensor_type.shape.CopyFrom(self.types[read[0]].tensor_type.shape)
            rank = len(type_.tensor_type.shape.dim)
            like = [operand for operand in read if self.axis.get(operand, rank) < rank]
            same = [operand for operand in like if len(self.shape(operand)) == rank]
            if same or like:
                self.axis[output] = self.axis[(same or like)[0]]
        return result

    def to(self, x: str, axis: int) -> str:
        """Say where the channels of a tensor are."""
        self.axis[x] = axis
        return x

    def fresh(self) -> str:
        """Return a name for a layer."""
        return f"l{self.number}"


def input_shapes(model: ModelProto, batch: int = 1) -> dict[str, list[int]]:
    """Shapes that inputs are built for: open lengths are those in their names, and one for the batch."""
    return {i.name: [length(dim, batch) for dim in i.type.tensor_type.shape.dim] for i in model.graph.input}


def feeds(model: ModelProto, seed: int = 0, batch: int = 1) -> dict[str, np.ndarray]:
    """Normal random numbers and random truths for all inputs."""
    rng = np.random.default_rng(seed)
    values = {
        name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in input_shapes(model, batch).items()
    }
    flags = {i.name for i in model.graph.input if i.type.tensor_type.elem_type == TensorProto.BOOL}
    return {name: np.asarray(value > 0) if name in flags else value for name, value in values.items()}


def measured(model: ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor outside of bodies that a model computes on random input, an open batch being one long."""
    values = feeds(model, seed)
    open_model = ModelProto.FromString(model.SerializeToString())
    del open_model.graph.output[:]
    names = [name for node in model.graph.node for name in node.output if name]
    open_model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return values | constants | dict(zip(names, oracle.run(open_model, values), strict=True))
