"""The graph as onnxprune reasons about it: frozen nodes, constants and static shapes. Knows numpy only."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

Shape = tuple[int, ...]
OPERAND = 64  # elements: constants up to this size are shapes, axes, bounds


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """One operator of the graph, in topological order.

    Attributes
    ----------
    captured
        Outer tensors that the node's bodies (If, Loop, Scan) read.
    key
        First output: the only name that is unique in every valid graph.
    """

    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    captured: tuple[str, ...] = ()
    key: str = field(init=False)

    def __post_init__(self) -> None:
        """Find the key."""
        object.__setattr__(self, "key", next(filter(None, self.outputs), ""))

    @property
    def title(self) -> str:
        """The node's own name, or its first output where it has none."""
        return self.name or self.key

    def has(self, index: int) -> bool:
        """Whether the optional input ``index`` is given."""
        return index < len(self.inputs) and bool(self.inputs[index])


@dataclass(frozen=True, eq=False, slots=True)
class Constant:
    """An initializer or the output of a Constant node; its data is read on demand. ``itemsize``: bytes of an element."""

    name: str
    shape: Shape
    itemsize: float
    floating: bool
    load: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_vector(self) -> bool:
        """At most one axis is longer than one: exporters share such tensors between unrelated layers."""
        return sum(length > 1 for length in self.shape) <= 1


@dataclass(frozen=True, eq=False)
class Model:
    """A model without its weights' bytes.

    Attributes
    ----------
    constants
        Initializers and Constant nodes by tensor name.
    aliases
        Outputs of Identity nodes that read a constant, mapped to that constant's name.
    shapes
        Static shape of every tensor for which one is known, at ``input_shapes``.
    types
        ONNX element type of every tensor for which it is known.
    static
        Tensors computed from shapes and integer constants alone.
    arithmetic
        Evaluates ``static`` tensors for given shapes: ``arithmetic(shapes) -> values``.
    declared
        Input shapes as the file declares them; dynamic axes are strings or None.
    notes
        What had to be assumed while reading, for the user.
    """

    nodes: tuple[Node, ...]
    constants: Mapping[str, Constant]
    aliases: Mapping[str, str]
    input_shapes: Mapping[str, Shape]
    outputs: tuple[str, ...]
    shapes: Mapping[str, Shape]
    opset: int
    types: Mapping[str, int] = field(default_factory=dict)
    static: frozenset[str] = frozenset()
    arithmetic: Callable[[Mapping[str, Shape]], Mapping[str, np.ndarray]] | None = None
    declared: Mapping[str, tuple[int | str | None, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    n_nodes: int = 0

    @property
    def is_static(self) -> bool:
        """Whether the file declares every length of every input."""
        return all(isinstance(size, int) and size > 0 for dims in self.declared.values() for size in dims)

    def constant(self, name: str) -> Constant | None:
        """The constant behind ``name``, through Identity, or None."""
        return self.constants.get(self.aliases.get(name, name))

    def has_copies(self, name: str) -> bool:
        """Whether a constant is called ``NAME@READER``, as copies of ``name`` are."""
        return any_begins(self._names, f"{name}@")

    @cached_property
    def _names(self) -> list[str]:
        return sorted(self.constants)

    @cached_property
    def static_values(self) -> Mapping[str, np.ndarray]:
        """Values of ``static`` tensors at the model's own shapes."""
        return self.arithmetic(self.shapes) if self.arithmetic else {}

    def value(self, name: str) -> np.ndarray | None:
        """Known value of a shape-like tensor: a constant's, or one computed from shapes alone."""
        constant = self.constant(name)
        if constant is None:
            return self.static_values.get(name)
        if constant.size > OPERAND:
            return constant.load()
        known = self._operands.get(constant.name)
        if known is None:
            known = self._operands[constant.name] = constant.load()
            known.flags.writeable = False
        return known

    @cached_property
    def _operands(self) -> dict[str, np.ndarray]:
        """Small constants that have been read: rules ask for their values again and again."""
        return {}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[tuple[Node, int], ...]]:
        """Every ``(node, input index)`` that reads a tensor, in node order."""
        table: dict[str, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for index, name in enumerate(node.inputs):
                if name:
                    table.setdefault(name, []).append((node, index))
        return {name: tuple(edges) for name, edges in table.items()}

    @cached_property
    def producer(self) -> Mapping[str, Node]:
        """The node that computes a tensor."""
        return {name: node for node in self.nodes for name in node.outputs if name}


def any_begins(names: Sequence[str], prefix: str) -> bool:
    """Whether one of some sorted names begins with ``prefix``."""
    place = bisect_left(names, prefix)
    return place < len(names) and names[place].startswith(prefix)
