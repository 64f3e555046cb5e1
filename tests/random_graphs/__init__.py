"""Random valid graphs out of all operators, or of several scopes: Hypothesis strategies, and graphs from seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from hypothesis import assume
from hypothesis import strategies as st
from onnx import ModelProto

import oracle
from onnxprune.protos import reads

from .blocks import BLOCKS
from .moves import MOVES
from .net import Net, Step
from .nodes import feeds, input_shapes, measured
from .rare import RARE
from .scopes import NESTING, Deep
from .steps import ELEMENTS, LAYERS, activate, layer, normalise
from .streams import STREAMS

__all__ = [
    "deep_graphs", "feeds", "graphs", "input_shapes", "measured", "seeded_deep_net", "seeded_net", "valid",
]  # fmt: skip

OPSETS = (17, 21, 13, 24, 11, 9)
STEPS: tuple[Step, ...] = (*LAYERS, *BLOCKS, *MOVES, *BLOCKS[:5], *ELEMENTS, normalise, *LAYERS[:2], *RARE)
DEEP: tuple[Step, ...] = (*NESTING * 5, *STREAMS * 3, *STEPS)
BYTES = 48  # as many decisions as one step or a header takes, nearly always
DEEP_BYTES = 96
SHAPES = ((2, 4, 6), (5, 4), (4, 4, 4), (3, 3, 2, 3), (6,), (1, 8, 4))


def random_net(header: bytes, decisions: Sequence[bytes]) -> Net:
    """Build a graph, one step per run of decisions, with its outputs in ``pool``: what nobody reads, behind a head each."""
    opset = OPSETS[header[0] % len(OPSETS)]
    g = Net(header[2:], opset, header[1], STEPS)
    return grown(g, decisions)


def deep_net(header: bytes, decisions: Sequence[bytes]) -> Deep:
    """Build a graph that is deeper than others: scopes in scopes, streams that are cut differently, shared weights."""
    g = Deep(header[2:], OPSETS[header[0] % len(OPSETS)], header[1], DEEP)
    g.max_depth, g.max_steps, g.stretching = 6, 40, g.chance(3)
    g.storing = (*g.storing[:8], *["shared"] * 4, *g.storing[12:])
    return grown(g, decisions)


def grown(g: Any, decisions: Sequence[bytes]) -> Any:
    """Let a graph grow from its source to its heads."""
    g.dynamic, g.in_nodes = g.chance(3), g.chance(6)
    shape = g.pick(*SHAPES)
    axis = 2 if shape == (5, 4) else 1
    x = g.source(1 if g.dynamic or not g.chance(4) else 2, *shape, axis=axis)
    g.pool = [layer(g, x)]
    rest = g.decisions
    for own in decisions:
        g.decisions = iter(own)
        y = g.step(g.pool[-1] if not g.chance(5) else g.pick(*g.pool))
        g.pool += [y] if y not in g.pool else []
    g.decisions = rest
    read = {name for node in g.nodes for name in reads(node)}
    g.pool = [head(g, y) for y in [y for y in g.pool if y not in read][-3:] or g.pool[-1:]]
    return g


def seeded_deep_net(seed: int) -> Deep:
    """Build a graph of several scopes from a seed."""
    rng = np.random.default_rng(seed)
    return deep_net(rng.bytes(DEEP_BYTES), [rng.bytes(DEEP_BYTES) for _ in range(rng.integers(2, 7))])


def seeded_net(seed: int) -> Net:
    """Build a graph from a seed."""
    rng = np.random.default_rng(seed)
    return random_net(rng.bytes(BYTES), [rng.bytes(BYTES) for _ in range(rng.integers(9))])


def head(g: Net, x: str) -> str:
    """End in a layer behind a pool or over maps, or be an output as it is."""
    kind = g.pick("flat", "maps", "bare") if g.chance() else "flat"
    if kind == "flat":
        x = g.flat(activate(g, x))
        return g.gemm(g.move(x, 1), g.fresh(), g.channels(x), 3)
    return layer(g, x, 3) if kind == "maps" else x


rejected: Counter[str] = Counter()
"""How many graphs the strategy built (key ""), and why it did not use others."""


def valid(model: ModelProto) -> str:
    """Say why a graph is of no use; nothing where it is valid and all it computes is finite."""
    try:
        onnx.checker.check_model(model, full_check=True)
        values = measured(model)
    except oracle.BROKEN as error:
        return told(error)
    floats = [value for value in values.values() if np.issubdtype(value.dtype, np.floating)]
    return "" if all(np.isfinite(value).all() for value in floats) else "not finite"


def told(error: Exception) -> str:
    """The beginning of what an error says."""
    return f"{type(error).__name__}: {str(error)[:300]}"


@st.composite
def graphs(draw: Callable) -> ModelProto:
    """Draw a valid graph that computes finite numbers."""
    run = st.binary(min_size=BYTES, max_size=BYTES)
    return used(random_net(draw(run), draw(st.lists(run, max_size=8))))


@st.composite
def deep_graphs(draw: Callable) -> ModelProto:
    """Draw a valid graph of several scopes that computes finite numbers."""
    run = st.binary(min_size=DEEP_BYTES, max_size=DEEP_BYTES)
    return used(deep_net(draw(run), draw(st.lists(run, min_size=2, max_size=6))))


def used(g: Net) -> ModelProto:
    """Make the model of a graph, or tell Hypothesis that it is of no use."""
    model = None
    try:
        model = g.build(*g.pool)
        why = valid(model)
    except oracle.BROKEN as error:  # lengths that are computed are not known until it runs
        why = told(error)
    rejected[why] += 1
    assume(model is not None and not why)
    return model
