"""Random valid graphs out of all operators: a Hypothesis strategy, and graphs from seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import onnx
from hypothesis import assume
from hypothesis import strategies as st
from onnx import ModelProto

import oracle

from .blocks import BLOCKS
from .moves import MOVES
from .net import Net, Step
from .nodes import measured
from .rare import RARE
from .steps import ELEMENTS, LAYERS, activate, layer, normalise

OPSETS = (17, 21, 13, 24, 11, 9)
STEPS: tuple[Step, ...] = (*LAYERS, *BLOCKS, *MOVES, *BLOCKS[:5], *ELEMENTS, normalise, *LAYERS[:2], *RARE)
BYTES = 48  # as many decisions as one step or a header takes, nearly always
SHAPES = ((2, 4, 6), (5, 4), (4, 4, 4), (3, 3, 2, 3), (6,), (1, 8, 4))


def random_net(header: bytes, decisions: Sequence[bytes]) -> Net:
    """Build a graph, one step per run of decisions, with its outputs in ``pool``: what nobody reads, behind a head each."""
    opset = OPSETS[header[0] % len(OPSETS)]
    g = Net(header[2:], opset, header[1], STEPS)
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
    read = {name for node in g.nodes for name in node.input}
    g.pool = [head(g, y) for y in [y for y in g.pool if y not in read][-3:] or g.pool[-1:]]
    return g


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
        return f"{type(error).__name__}: {str(error)[:300]}"
    floats = [value for value in values.values() if np.issubdtype(value.dtype, np.floating)]
    return "" if all(np.isfinite(value).all() for value in floats) else "not finite"


@st.composite
def graphs(draw: Callable) -> ModelProto:
    """Draw a valid graph that computes finite numbers."""
    run = st.binary(min_size=BYTES, max_size=BYTES)
    g = random_net(draw(run), draw(st.lists(run, max_size=8)))
    model = g.build(*g.pool)
    why = valid(model)
    rejected[why] += 1
    assume(not why)
    return model
