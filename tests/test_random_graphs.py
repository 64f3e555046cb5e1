"""Properties of random graphs from all operators: they prune and prove, or refuse with a reason."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from math import prod

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import GraphProto, ModelProto, helper

import onnxprune
import oracle
from onnxprune import BudgetError
from onnxprune.coupling import Coupling
from onnxprune.protos import bodies, every_node
from random_graphs import deep_graphs, feeds, graphs, input_shapes, measured, seeded_deep_net, seeded_net, valid

EXAMPLES = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
)
SEEN = 120
"""How many of the supported operators the graphs of the coverage test must have."""
MIXING = ("Conv", "ConvTranspose", "Gemm", "MatMul")
OTHERS = frozenset(["Einsum", "LSTM", "GRU", "RNN", "Attention", "If", "Loop", "Scan"])
SCOPES = frozenset(["If", "Loop", "Scan"])
FREE = re.compile(r"l\d+\.free\.w$")
"""Weights whose outputs nothing but the next layer reads."""
JUMPING = frozenset(
    ["Ceil", "Floor", "Round", "Sign", "Mod", "Cast", "CastLike", "Hardmax", "TopK", "Where", "QuantizeLinear"]
)


def macs_of(model: ModelProto) -> int | None:
    """Count multiply-accumulates of the nodes that outputs depend on, from the shapes that onnxruntime computes.

    None where other operators than convolutions and products multiply.
    """
    if model.functions or any(node.op_type in OTHERS for node in model.graph.node):
        return None
    values = measured(model)
    live = {output.name for output in model.graph.output}
    total = 0
    for node in reversed(model.graph.node):
        if live.isdisjoint(node.output):
            continue
        live.update(node.input)
        a, b, *_ = [values[name].shape for name in node.input[:2]] if node.op_type in MIXING else [(), ()]
        out = values[node.output[0]].shape
        if node.op_type in ("Conv", "ConvTranspose"):
            positions = out if node.op_type == "Conv" else a
            total += prod(b) * positions[0] * prod(positions[2:])
        elif node.op_type in MIXING:
            flipped = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
            total += prod(out) * a[0 if flipped else -1]
    return total


def check_prune(model: ModelProto, target: float, preset: str) -> str:
    """Prune to a share of the MAC: the result is valid, proved and within the target, or the target is out of reach."""
    counted, given_bytes = macs_of(model), model.SerializeToString()
    shapes = input_shapes(model)
    inspected = onnxprune.inspect(model, input_shapes=shapes)
    before = inspected.before["mac"]
    assert counted in (None, before)
    try:
        result = onnxprune.prune(model, target_mac=target, preset=preset, input_shapes=shapes)
    except BudgetError as error:
        assert error.floor > target * before * (1 - 1e-9)
        assert f"{100 * error.floor / before:.4g} % remains" in str(error)
        if error.floor < before:
            return "out of reach"
        assert inspected.frozen
        assert all(row.reason for row in inspected.frozen)
        return "nothing prunable"
    finally:
        assert model.SerializeToString() == given_bytes
    report, counted = result.report, macs_of(result.model)
    assert counted in (None, report.after["mac"])
    assert report.after["mac"] <= target * before * (1 + 1e-9)
    assert report.proof is None if target == 1 else report.proof.ok
    oracle.check(result.model)
    assert oracle.signature(result.model) == oracle.signature(model)
    return "pruned" if result.plan.initializers else "met"


def alone(coupling: Coupling) -> Iterator[Coupling]:
    """The same coupling with a single prunable unit of selection (a group, or a bundle of groups) each time."""
    kind = "bundles" if hasattr(coupling, "bundles") else "groups"
    for part in getattr(coupling, kind):
        if getattr(part, "frozen", None) is None:
            single = copy.copy(coupling)
            vars(single)[kind] = (part,)
            yield single


def check_units(model: ModelProto, seed: int, most: int) -> int:
    """Whatever is free can be removed by itself: one channel of a single group, then of several groups, then most of all."""
    loaded, rng = oracle.load(model, input_shapes(model)), np.random.default_rng(seed)
    coupling = loaded.coupling
    if loaded.proto is not model:
        assert_same(model, loaded.proto)
    must = [name for name, _ in coupling.ledger.constants if FREE.match(name)]
    bound = [name for name in must if coupling.frozen[oracle.constant_axes(coupling)[f"{name}/1"]].any()]
    assert not bound, f"frozen without need: {bound}"
    keeps = [oracle.random_keep(single, rng, share=0.0) for single in alone(coupling)]
    keeps = [keeps[i] for i in rng.permutation(len(keeps))[:most]]
    keeps += [oracle.random_keep(coupling, rng, share=0.0, spare=0.5), oracle.random_keep(coupling, rng, share=0.7)]
    keeps = [keep for keep in keeps if not keep.all()]
    for keep in keeps:
        pruned = oracle.prune_loaded(loaded, keep)
        assert pruned.proof.ok, pruned.proof.failures
        oracle.check(pruned.model)
        if masks(loaded.proto, coupling, keep):
            compare(loaded.proto, pruned)
    return len(keeps)


def masks(model: ModelProto, coupling: Coupling, keep: np.ndarray) -> bool:
    """Whether zeros in weights say what pruning means: all that shrinks ends in a constant, and nothing jumps on the way."""
    nodes = list(every_node(model.graph))
    if any(node.op_type in JUMPING | OTHERS - SCOPES for node in nodes):
        return False
    makers, values = {name: node for node in nodes for name in node.output}, dict(oracle.constants_of(model))
    for c in coupling.contractions:
        axis = coupling.axes(c.node.inputs[c.input])[c.axis]
        if len(coupling.kept(axis, keep)) == coupling.model.shapes[c.node.inputs[c.input]][c.axis]:
            continue
        if c.redefined or c.node.op not in MIXING:
            return False
        weight = c.node.inputs[1 - c.input]
        while weight not in values:
            if weight not in makers or makers[weight].op_type not in ("Identity", "Transpose"):
                return False
            weight = makers[weight].input[0]
    return True


def compare(model: ModelProto, pruned: oracle.Pruned) -> None:
    """The pruned graph as a whole equals the original whose weights are masked, also at another batch size."""
    for given_ in several(model):
        agree(oracle.run(pruned.model, given_), oracle.masked_reference(model, pruned.plan, given_))


def assert_same(model: ModelProto, prepared: ModelProto) -> None:
    """What a model is rewritten to before it is pruned computes the same."""
    for given_ in several(model):
        agree(oracle.run(prepared, given_), oracle.run(model, given_))


def several(model: ModelProto) -> Iterator[dict[str, np.ndarray]]:
    """Inputs of every batch size that a model takes, of one and two."""
    for batch in (1, 2) if any(dim == "N" for dim in dims(model)) else (1,):
        given_ = feeds(model, batch, batch)
        try:
            oracle.run(model, given_)
        except oracle.BROKEN:
            continue  # a batch size is written into it
        yield given_


def dims(model: ModelProto) -> Iterator[str]:
    """Names of the open lengths of inputs."""
    for value in model.graph.input:
        yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)


def agree(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Outputs are equal up to rounding."""
    for have, want in zip(actual, expected, strict=True):
        assert have.shape == want.shape
        np.testing.assert_allclose(have, want, rtol=1e-3, atol=1e-3 * np.abs(want).max(initial=1e-3))


@EXAMPLES
@given(graphs(), st.floats(0.2, 1.0), st.sampled_from("abcd"))
def test_random_graphs_prune_or_say_why_not(model: ModelProto, target: float, preset: str) -> None:
    """A random target is met by a valid, proved model with the same signature, or is out of reach."""
    check_prune(model, target, preset)


@EXAMPLES
@given(graphs(), st.integers(0, 9))
def test_what_is_free_can_be_removed_alone(model: ModelProto, seed: int) -> None:
    """Every group that coupling calls free can lose a channel while all others stay: it proves, and equals masking."""
    check_units(model, seed, most=4)


@pytest.mark.parametrize("seed", [10, 16, 24, 50, 57, 58, 72, 91, 114, 125, 136, 147])
def test_graphs_of_several_scopes_prune_or_say_why_not(seed: int) -> None:
    """Control flow in control flow, functions, streams of several alignments: both properties hold."""
    net = seeded_deep_net(seed)
    model = net.build(*net.pool)
    assert not valid(model)
    check_prune(model, 0.4 + 0.05 * (seed % 10), "abcd"[seed % 4])
    check_units(model, seed, most=2)


@pytest.mark.slow
@settings(EXAMPLES, max_examples=300)
@given(deep_graphs(), st.floats(0.2, 1.0), st.sampled_from("abcd"), st.integers(0, 9))
def test_many_graphs_of_several_scopes(model: ModelProto, target: float, preset: str, seed: int) -> None:
    """The same for many (``tools/fuzz.py --deep`` runs as many as wanted)."""
    check_prune(model, target, preset)
    check_units(model, seed, most=6)


def test_random_graphs_reach_nearly_every_operator() -> None:
    """Graphs from fixed seeds are valid, and nearly all operators occur (printed: those that do not)."""
    seen: set[str] = set()
    for seed in range(400):
        net = seeded_net(seed)
        seen.update(node.op_type for node in net.nodes)
        assert seed >= 40 or not valid(net.build(*net.pool))
    supported = {op for domain, op in onnxprune.ops.supported() if not domain}
    print("never seen:", *sorted(supported - seen))
    assert len(supported & seen) >= SEEN


def nestings(graph: GraphProto, outer: str = "") -> Iterator[tuple[str, str]]:
    """Operators with bodies, and those whose bodies they stand in."""
    for node in graph.node:
        for body in bodies(node):
            yield outer, node.op_type
            yield from nestings(body, node.op_type)


def test_deep_graphs_nest_nearly_everything_in_everything() -> None:
    """Control flow of each kind occurs in nearly every other; also functions, several inputs and outputs, open lengths."""
    seen, inputs, outputs, functions, open_ = set[tuple[str, str]](), 1, 1, 0, set[bool]()
    for seed in range(200):
        net = seeded_deep_net(seed)
        graph = helper.make_graph(net.nodes, "deep", [], [])
        seen.update(nestings(graph))
        inputs, outputs = max(inputs, len(net.inputs)), max(outputs, len(net.pool))
        functions += len(net.functions)
        open_.add(
            any(dim.dim_param.startswith("D") for value in net.inputs for dim in value.type.tensor_type.shape.dim)
        )
    pairs = {(outer, inner) for outer in ("", *SCOPES) for inner in SCOPES}
    print("never seen:", pairs - seen)
    assert len(pairs & seen) >= 11
    assert inputs > 2
    assert outputs > 2
    assert functions > 9
    assert len(open_) == 2
