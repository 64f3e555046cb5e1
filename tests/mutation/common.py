"""What all changes share: where to look in a model, and what to put there."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from onnxprune.protos import bodies

T = TypeVar("T")


class Unfit(Exception):  # noqa: N818 (it is no error: another seed will do)
    """The model has nothing that this change could change."""


def pick(rng: random.Random, things: Sequence[T]) -> T:
    """Draw one; :class:`Unfit` where there is none."""
    if not things:
        raise Unfit
    return rng.choice(things)


def graphs(model: ModelProto) -> list[Any]:
    """The main graph, all bodies in it, and all local functions."""

    def within(graph: Any) -> Iterator[Any]:
        yield graph
        for node in graph.node:
            for body in bodies(node):
                yield from within(body)

    return [found for start in (model.graph, *model.functions) for found in within(start)]


def graph_of(model: ModelProto, rng: random.Random) -> GraphProto:
    """Mostly the main graph, sometimes one of the others."""
    return model.graph if rng.random() < 0.7 else rng.choice(graphs(model))


def node_of(model: ModelProto, rng: random.Random) -> NodeProto:
    """Draw a node of any graph."""
    return pick(rng, graph_of(model, rng).node)


def tensor_of(model: ModelProto, rng: random.Random) -> TensorProto:
    """Draw an initializer, or the tensor of an attribute."""
    graph = graph_of(model, rng)
    stored = list(getattr(graph, "initializer", ()))
    return pick(rng, stored + [a.t for node in graph.node for a in node.attribute if a.HasField("t")])


def names(graph: Any) -> list[str]:
    """Every name that a graph's nodes read or compute, and what it never had."""
    known = {name for node in graph.node for name in (*node.input, *node.output) if name}
    return [*sorted(known), "nowhere"]


def replace(repeated: Any, things: Sequence[Any]) -> None:
    """Give a repeated field of messages other content, which may be part of the old."""
    copies = [copy(thing) for thing in things]
    del repeated[:]
    repeated.extend(copies)


def copy(message: T) -> T:
    """Copy a message."""
    twin = type(message)()
    twin.CopyFrom(message)  # type: ignore[attr-defined]
    return twin


INTEGERS = (0, 1, -1, 2, 3, -2, 7, 64, 100, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-7, 0.5, 1e38, float("inf"), float("-inf"), float("nan"))
WORDS = (
    "",
    "linear",
    "SAME_UPPER",
    "VALID",
    "bilinear",
    "constant",
    "\u00e9\u4e2d",
    "a" * 2000,
    "a\nb",
    "../../etc/passwd",
    "*",
    "0",
)


def integer(rng: random.Random, old: int = 0) -> int:
    """Draw an integer near ``old``, or a notorious one."""
    near = (old + 1, old - 1, -old, 2 * old, old // 2)
    return max(-(2**63), min(2**63 - 1, rng.choice((*near, rng.choice(INTEGERS)))))


def random_values(tensor: TensorProto) -> bytes:
    """Bytes of a tensor, wherever it keeps them."""
    return tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
