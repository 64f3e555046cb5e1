"""Recurrent layers: input channels end in W, units end in R, and directions choose their units freely."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper
from onnx.reference import ReferenceEvaluator

import onnxprune
import oracle
from graphs import Tiny
from onnxprune.cost import Cost
from onnxprune.passes.apply import apply
from onnxprune.plan import make_plan
from onnxprune.states import without_zero_states
from oracle import Case

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, BATCH, CHANNELS, UNITS = 5, 2, 4, 6
FIXED = "axis that cannot shrink"
Build = Callable[[Tiny], str]


def recurrent(
    t: Tiny, op: str, x: str, name: str = "op", *, channels: int = CHANNELS, units: int = UNITS, directions: int = 1,
    bias: bool = True, lengths: str = "", h: str = "", c: str = "", peepholes: bool = False,
    w: str = "", r: str = "", outputs: int = 1, **attributes,
) -> str:  # fmt: skip
    """Add a recurrent layer ``name`` with weights ``name.w`` and ``name.r``, of which one or more outputs are used."""
    rows = GATES[op] * units
    inputs = [
        x,
        w or t.random(directions, rows, channels, name=f"{name}.w", scale=channels**-0.5),
        r or t.random(directions, rows, units, name=f"{name}.r", scale=units**-0.5),
        t.random(directions, 2 * rows, name=f"{name}.b", scale=0.3) if bias else "",
        lengths, h, c,
        t.random(directions, 3 * units, name=f"{name}.p", scale=0.3) if peepholes else "",
    ]  # fmt: skip
    while not inputs[-1]:
        inputs.pop()
    if directions == 2:
        attributes = {"direction": "bidirectional"} | attributes
    return t.node(op, *inputs, name=name, outputs=outputs, hidden_size=units, **attributes)


def joined(t: Tiny, y: str, directions: int = 1) -> str:
    """Lay the units of all directions end to end, as exporters do."""
    if directions == 1:
        return t.node("Squeeze", y, t.constant([1]))
    return t.node("Reshape", t.node("Transpose", y, perm=[0, 2, 1, 3]), t.constant([0, 0, -1]))


def layer(op: str, directions: int = 1, state: Mapping[str, Build] | None = None, **options) -> ModelProto:
    """Build input -> linear ``a`` -> recurrent layer -> linear ``z`` -> output."""
    t = Tiny()
    x = t.linear(t.input(STEPS, BATCH, 2), "a", 2, options.get("channels", CHANNELS))
    operands = {name: build(t) for name, build in (state or {}).items()}
    y = recurrent(t, op, x, directions=directions, **operands, **options)
    return t.build(t.linear(joined(t, y, directions), "z", directions * options.get("units", UNITS), 3))


def stacked(
    op: str, directions: int = 1, between: Callable[[Tiny, str], str] = lambda t, y: y, state: Build | None = None
) -> ModelProto:
    """Build two recurrent layers, the second of 5 units (or 6 where both start from one tensor of states)."""
    t = Tiny()
    states = state(t) if state else ""

    def part(number: int) -> str:
        bounds = [number * directions], [(number + 1) * directions], [0]
        return t.node("Slice", states, *map(t.constant, bounds)) if states else ""

    units = UNITS if state else 5
    y = recurrent(t, op, t.input(STEPS, BATCH, 2), channels=2, directions=directions, h=part(0))
    y = between(t, joined(t, y, directions))
    y = recurrent(t, op, y, "two", channels=directions * UNITS, units=units, directions=directions, h=part(1))
    return t.build(t.linear(joined(t, y, directions), "z", directions * units, 3))


def last_state(op: str, directions: int = 1, output: int = 1) -> ModelProto:
    """Read the state after the last step alone, one direction after the other."""
    t = Tiny()
    y = recurrent(t, op, t.input(STEPS, BATCH, 2), channels=2, directions=directions, outputs=3 if op == "LSTM" else 2)
    parts = [t.node("Gather", y[output], t.constant(index), axis=0) for index in range(directions)]
    both = t.node("Concat", *parts, axis=-1) if directions > 1 else parts[0]
    return t.build(t.linear(both, "z", directions * UNITS, 3))


def last_states(op: str, directions: int = 1) -> ModelProto:
    """Put the last states of two layers into one tensor, and read the second layer's, as PyTorch's users do."""
    t = Tiny()
    used = {"directions": directions, "outputs": 3 if op == "LSTM" else 2}
    y, h, *_ = recurrent(t, op, t.input(STEPS, BATCH, 2), channels=2, **used)
    _, h2, *_ = recurrent(t, op, joined(t, y, directions), "two", channels=directions * UNITS, **used)
    states = t.node("Concat", h, h2, axis=0)
    parts = [t.node("Gather", states, t.constant(index - directions), axis=0) for index in range(directions)]
    both = t.node("Concat", *parts, axis=-1) if directions > 1 else parts[0]
    return t.build(t.linear(both, "z", directions * UNITS, 3))


def all_outputs() -> ModelProto:
    """Add an LSTM's outputs of every step, its last output and its last cell state."""
    t = Tiny()
    y, h, c = recurrent(t, "LSTM", t.input(STEPS, BATCH, 2), channels=2, outputs=3)
    return t.build(t.linear(t.node("Add", t.node("Add", joined(t, y), h), c), "z", UNITS, 3))


def summed() -> ModelProto:
    """Add both directions: they must then keep the same units."""
    t = Tiny()
    y = recurrent(t, "GRU", t.input(STEPS, BATCH, 2), channels=2, directions=2)
    y = t.node("ReduceSum", y, t.constant([1]), keepdims=0)
    return t.build(t.linear(y, "z", UNITS, 3))


def residual() -> ModelProto:
    """Add a recurrent layer's input to its output."""
    t = Tiny()
    x = t.linear(t.input(STEPS, BATCH, 2), "a", 2, UNITS)
    y = joined(t, recurrent(t, "GRU", x, channels=UNITS))
    return t.build(t.linear(t.node("Add", x, y), "z", UNITS, 3))


def shared(directions: int = 1) -> ModelProto:
    """Use one set of weights in two layers."""
    t = Tiny()
    x = t.linear(t.input(STEPS, BATCH, 2), "a", 2, CHANNELS)
    y = recurrent(t, "GRU", x, directions=directions)
    inputs = [t.node("Tanh", x), *("op.w", "op.r", "op.b")]
    again = t.node("GRU", *inputs, name="two", hidden_size=UNITS, **dict(bidirectional(directions)))
    y = t.node("Concat", joined(t, y, directions), joined(t, again, directions), axis=-1)
    return t.build(t.linear(y, "z", 2 * directions * UNITS, 3))


def bidirectional(directions: int) -> Mapping[str, str]:
    """Attributes of a layer of one or two directions."""
    return {"direction": "bidirectional"} if directions == 2 else {}


def rearranged(op: str = "LSTM", directions: int = 1) -> ModelProto:
    """Cut weights into gates, put those into another order and stack directions: exporters leave this to the runtime."""
    t = Tiny()
    x = t.linear(t.input(STEPS, BATCH, 2), "a", 2, CHANNELS)
    order = (0, 3, 1, 2)[: GATES[op]]

    def weight(name: str, columns: int) -> str:
        sides = []
        for side in range(directions):
            whole = t.random(GATES[op] * UNITS, columns, name=f"{name}{side}", scale=columns**-0.5)
            gates = [t.node("Slice", whole, *map(t.constant, ([g * UNITS], [(g + 1) * UNITS], [0]))) for g in order]
            sides.append(t.node("Unsqueeze", t.node("Concat", *gates, axis=0), t.constant([0])))
        return t.node("Concat", *sides, axis=0) if directions > 1 else sides[0]

    y = recurrent(t, op, x, w=weight("op.w", CHANNELS), r=weight("op.r", UNITS), directions=directions)
    return t.build(t.linear(joined(t, y, directions), "z", directions * UNITS, 3))


def transposed_weights() -> ModelProto:
    """Store W and R with their last axes swapped, behind Transpose."""
    t = Tiny()
    x = t.linear(t.input(STEPS, BATCH, 2), "a", 2, CHANNELS)
    w, r = (
        t.node("Transpose", t.random(1, n, 3 * UNITS, name=f"op.{role}", scale=0.4), perm=[0, 2, 1])
        for role, n in (("w", CHANNELS), ("r", UNITS))
    )
    y = recurrent(t, "GRU", x, w=w, r=r)
    return t.build(t.linear(joined(t, y), "z", UNITS, 3))


def computed_weight() -> ModelProto:
    """Compute R from a second input."""
    t = Tiny()
    x = t.linear(t.input(STEPS, BATCH, 2), "a", 2, CHANNELS)
    r = t.node("Tanh", t.input(1, UNITS, UNITS, name="weights"))
    return t.build(t.linear(joined(t, recurrent(t, "RNN", x, r=r)), "z", UNITS, 3))


def steps_of_channels() -> ModelProto:
    """Let a recurrence run along channels."""
    t = Tiny()
    x = t.linear(t.input(CHANNELS, BATCH, 2), "a", 2, 5)
    y = recurrent(t, "GRU", t.node("Transpose", x, perm=[2, 1, 0]), channels=CHANNELS)
    return t.build(t.linear(joined(t, y), "z", UNITS, 3))


def to_output() -> ModelProto:
    """Give a recurrent layer's units to the graph's output."""
    t = Tiny()
    return t.build(recurrent(t, "LSTM", t.input(STEPS, BATCH, 2), channels=2))


def batch_of_channels() -> ModelProto:
    """Let channels take the place of the batch: each is a sequence of its own."""
    t = Tiny()
    x = t.linear(t.input(STEPS, 2, 2), "a", 2, CHANNELS)
    lengths = t.constant(np.array([5, 3, 4, 1], np.int32), "op.lengths")
    y = recurrent(t, "RNN", t.node("Transpose", x, perm=[0, 2, 1]), channels=2, lengths=lengths)
    y = t.node("Transpose", joined(t, y), perm=[0, 2, 1])
    return t.build(t.linear(y, "z", CHANNELS, 3))


# -- initial states --------------------------------------------------------------------------------------------------


def constant_state(t: Tiny, directions: int = 1, name: str = "op.h") -> str:
    """Learned states."""
    return t.random(directions, BATCH, UNITS, name=name)


def expanded_state(t: Tiny, directions: int = 1, name: str = "op.h") -> str:
    """States that are learned once and expanded to the batch of the input."""
    batch = t.node("Gather", t.node("Shape", "x"), t.constant([1]))
    shape = t.node("Concat", t.constant([directions]), batch, t.constant([UNITS]), axis=0)
    return t.node("Expand", t.random(directions, 1, UNITS, name=name), shape)


def filled_states(t: Tiny, n_states: int = 2, name: str = "states") -> str:
    """Zeros for all layers in one tensor, of the input's batch."""
    batch = t.node("Gather", t.node("Shape", "x"), t.constant([1]))
    shape = t.node("Concat", t.constant([n_states]), batch, t.constant([UNITS]), axis=0)
    return t.node("ConstantOfShape", shape, name=name)


def computed_state(t: Tiny, directions: int = 1, name: str = "h") -> str:
    """States computed from another input, directions side by side."""
    y = t.linear(t.input(BATCH, 3, name=f"{name}.x"), name, 3, directions * UNITS)
    y = t.node("Reshape", y, t.constant([BATCH, directions, -1]))
    return t.node("Transpose", y, perm=[1, 0, 2])


def input_state(t: Tiny) -> str:
    """States that are an input of the graph."""
    return t.input(1, BATCH, UNITS, name="state")


def some_lengths(t: Tiny) -> str:
    """Lengths of the sequences of a batch."""
    return t.constant(np.array([5, 3], np.int32), "op.lengths")


# -- expectations ----------------------------------------------------------------------------------------------------


def units(
    op: str, directions: int = 1, first: int = CHANNELS, name: str = "op", n: int = UNITS, bias: bool = True
) -> dict[str, Sequence[int]]:
    """Labels of a layer's weights, from ``first`` on: every direction has its own, once per gate."""
    own = first + np.arange(directions * n).reshape(directions, n)
    free = {f"{name}.w/1": np.tile(own, GATES[op]), f"{name}.r/1": np.tile(own, GATES[op]), f"{name}.r/2": own}
    if bias:
        free[f"{name}.b/1"] = np.tile(own, 2 * GATES[op])
    return {axis: labels.ravel().tolist() for axis, labels in free.items()}


def tied(free: Mapping[str, Sequence[int]], first: int = CHANNELS) -> dict[str, Sequence[int]]:
    """The same where both directions keep the same units."""
    return {axis: [first + (i - first) % UNITS if i >= first else i for i in own] for axis, own in free.items()}


def whole(op: str, directions: int = 1, **options) -> dict[str, Sequence[int]]:
    """Labels of ``layer``."""
    after = {"z.w/0": range(CHANNELS, CHANNELS + directions * UNITS)}
    return {"a.w/1": range(CHANNELS), "op.w/2": range(CHANNELS)} | units(op, directions, **options) | after


def one_by_one(op: str, directions: int = 1) -> dict[str, Sequence[int]]:
    """Labels of ``stacked``: the second layer's channels are the first layer's units."""
    first, second = directions * UNITS, directions * 5
    return {
        **units(op, directions, 0), "two.w/2": range(first),
        **units(op, directions, first, "two", 5), "z.w/0": range(first, first + second),
    }  # fmt: skip


STATE = range(CHANNELS, CHANNELS + UNITS)
OTHER = range(CHANNELS + UNITS, CHANNELS + 2 * UNITS)
STATES = range(CHANNELS, CHANNELS + 2 * UNITS)
LAYERS = ("op.r/2", "two.w/2", "two.r/2")
PEEPHOLES = np.tile(np.arange(2 * UNITS).reshape(2, UNITS) + CHANNELS, 3).ravel().tolist()


def case(op: str, name: str, build: Callable[[], ModelProto], free, groups=(CHANNELS, UNITS), **options) -> Case:
    """A case whose masked reference zeroes the columns of W and R."""
    return Case(op, name, build, free, groups, **{"zero": ("op.w/2", "op.r/2")} | options)


CASES = [
    *(case(op, "forward", partial(layer, op), whole(op)) for op in GATES),
    *(case(op, "reverse", partial(layer, op, direction="reverse"), whole(op)) for op in GATES),
    *(case(op, "bidirectional", partial(layer, op, 2), whole(op, 2)) for op in GATES),
    case("LSTM", "no-bias", partial(layer, "LSTM", 2, bias=False), whole("LSTM", 2, bias=False)),
    case("GRU", "no-bias", partial(layer, "GRU", bias=False), whole("GRU", bias=False)),
    *(case(op, "lengths", partial(layer, op, 2, {"lengths": some_lengths}), whole(op, 2)) for op in GATES),
    case("GRU", "linear-before-reset", partial(layer, "GRU", 2, linear_before_reset=1), whole("GRU", 2)),
    case("LSTM", "peepholes", partial(layer, "LSTM", peepholes=True), whole("LSTM") | {"op.p/1": [*STATE] * 3}),
    case("LSTM", "peepholes-bidirectional", partial(layer, "LSTM", 2, peepholes=True),
         whole("LSTM", 2) | {"op.p/1": PEEPHOLES}),
    case("LSTM", "input-forget", partial(layer, "LSTM", peepholes=True, input_forget=1),
         whole("LSTM") | {"op.p/1": [*STATE] * 3}),
    case("LSTM", "clip", partial(layer, "LSTM", clip=0.5), whole("LSTM")),
    case("LSTM", "activations", partial(layer, "LSTM", 2, activations=["Sigmoid", "Tanh", "Relu"] * 2), whole("LSTM", 2)),
    case("RNN", "two-activations", partial(layer, "RNN", 2, activations=["Relu", "Tanh"]), whole("RNN", 2)),
    case("RNN", "activation-with-offset",  # what is zero before it is not zero after it
         partial(layer, "RNN", activations=["Affine"], activation_alpha=[0.5], activation_beta=[0.7]), whole("RNN")),
    *(
        case("LSTM", f"constant-states-{d}", partial(layer, "LSTM", d, {
            "h": partial(constant_state, directions=d), "c": partial(constant_state, directions=d, name="op.c")}),
             whole("LSTM", d) | {"op.h/2": own, "op.c/2": own})
        for d, own in ((1, STATE), (2, STATES))
    ),
    case("GRU", "expanded-state", partial(layer, "GRU", 1, {"h": expanded_state}), whole("GRU") | {"op.h/2": STATE}),
    case("GRU", "expanded-state-bidirectional", partial(layer, "GRU", 2, {"h": partial(expanded_state, directions=2)}),
         tied(whole("GRU", 2)) | {"op.h/2": STATE}),
    *(
        case(op, f"computed-state-{d}", partial(layer, op, d, {"h": partial(computed_state, directions=d)}),
             whole(op, d) | {"h.w/1": own})
        for op, d, own in (("GRU", 1, STATE), ("RNN", 2, STATES), ("LSTM", 2, STATES))
    ),
    *(
        case(op, f"stacked-{d}", partial(stacked, op, d), one_by_one(op, d), (UNITS, 5), zero=LAYERS)
        for op, d in (("LSTM", 1), ("LSTM", 2), ("GRU", 2), ("RNN", 1))
    ),
    case("LSTM", "stacked-dropout", partial(stacked, "LSTM", 2, lambda t, y: t.node("Dropout", y)),
         one_by_one("LSTM", 2), (UNITS, 5), zero=LAYERS),
    case(
        "GRU", "stacked-states-in-one-tensor", partial(stacked, "GRU", state=filled_states),
        {**units("GRU", 1, 0), "two.w/2": range(UNITS), **units("GRU", 1, 0, "two"), "z.w/0": range(UNITS)}, (UNITS,),
        zero=LAYERS,
    ),
    *(
        case(op, f"state-{output}-{d}", partial(last_state, op, d, output),
             units(op, d, 0) | {"z.w/0": range(d * UNITS)}, (UNITS,), zero=("op.r/2",))
        for op, d, output in (("LSTM", 1, 1), ("LSTM", 2, 2), ("GRU", 2, 1), ("RNN", 1, 1))
    ),
    *(
        case(op, f"states-of-two-layers-{d}", partial(last_states, op, d), {
            **units(op, d, 0), "two.w/2": range(d * UNITS), **units(op, d, d * UNITS, "two"),
            "z.w/0": range(d * UNITS, 2 * d * UNITS)}, (UNITS,), zero=LAYERS)
        for op, d in (("LSTM", 2), ("GRU", 1))
    ),
    case("LSTM", "all-outputs", all_outputs, units("LSTM", 1, 0) | {"z.w/0": range(UNITS)}, (UNITS,), zero=("op.r/2",)),
    case("GRU", "both-directions-added", summed,
         {axis: [i % UNITS for i in own] for axis, own in units("GRU", 2, 0).items()} | {"z.w/0": range(UNITS)},
         (UNITS,), zero=("op.r/2",)),
    case("GRU", "residual", residual,
         {"a.w/1": range(UNITS), "op.w/2": range(UNITS)} | units("GRU", 1, 0) | {"z.w/0": range(UNITS)}, (UNITS,)),
    *(
        case("GRU", f"shared-weights-{d}", partial(shared, d),
             whole("GRU", d, bias=False) | {f"op.b{reader}/1": bias for reader in readers} | {"z.w/0": [*own] * 2})
        for d, own, bias, readers in (
            (1, STATE, [*STATE] * 6, ("@op", "@two")), (2, STATES, units("GRU", 2)["op.b/1"], ("",)))
    ),
    case("GRU", "weights-behind-transpose", transposed_weights, {
        "a.w/1": range(CHANNELS), "op.w/1": range(CHANNELS), "op.w/2": [*STATE] * 3, "op.r/1": STATE, "op.r/2": [*STATE] * 3,
        "op.b/1": [*STATE] * 6, "z.w/0": STATE}, zero=("op.w/1", "op.r/1")),
    case("LSTM", "gates-rearranged", rearranged, {
        "a.w/1": range(CHANNELS), "op.w0/1": range(CHANNELS), "op.w0/0": [*STATE] * 4, "op.r0/0": [*STATE] * 4,
        "op.r0/1": STATE, "op.b/1": [*STATE] * 8, "z.w/0": STATE}, zero=("op.w0/1", "op.r0/1")),
    case("LSTM", "gates-rearranged-bidirectional", partial(rearranged, directions=2), {
        "a.w/1": range(CHANNELS), "op.w0/1": range(CHANNELS), "op.w1/1": range(CHANNELS),
        "op.w0/0": [*STATE] * 4, "op.r0/0": [*STATE] * 4, "op.w1/0": [*OTHER] * 4, "op.r1/0": [*OTHER] * 4,
        "op.r0/1": STATE, "op.r1/1": OTHER, "op.b/1": units("LSTM", 2)["op.b/1"], "z.w/0": STATES},
         zero=("op.w0/1", "op.r0/1", "op.w1/1", "op.r1/1")),
    case("RNN", "batch-of-channels", batch_of_channels,
         {"a.w/1": range(CHANNELS), "op.lengths/0": range(CHANNELS), "z.w/0": range(CHANNELS)}, (CHANNELS,), zero=()),
    case("RNN", "one-unit", partial(layer, "RNN", 2, units=1), {"a.w/1": range(CHANNELS), "op.w/2": range(CHANNELS)},
         (CHANNELS,), frozen={"op.b/1": ("op", "RNN", "")}),
    case("RNN", "one-channel", partial(layer, "RNN", channels=1),
         units("RNN", first=0) | {"z.w/0": range(UNITS)}, (UNITS,), zero=("op.r/2",)),
    case("RNN", "computed-weight", computed_weight, {"a.w/1": range(CHANNELS), "op.w/2": range(CHANNELS)}, (CHANNELS,),
         zero=("op.w/2",), frozen={"op.w/1": ("op", "RNN", FIXED), "z.w/0": ("op", "RNN", FIXED)}),
    case("GRU", "state-is-an-input", partial(layer, "GRU", 1, {"h": input_state}),
         {"a.w/1": range(CHANNELS), "op.w/2": range(CHANNELS)}, (CHANNELS,), zero=("op.w/2",),
         frozen={"op.r/2": ("op", "GRU", FIXED), "z.w/0": ("op", "GRU", FIXED)}),
    case("GRU", "runs-along-channels", steps_of_channels, units("GRU", 1, 0) | {"z.w/0": range(UNITS)}, (UNITS,),
         zero=("op.r/2",), frozen={"a.w/1": ("op", "GRU", "a recurrence runs along it")}),
    case("LSTM", "output", to_output, {}, (), zero=(),
         frozen={"op.r/2": ("op", "output", "output of the graph")}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_units_form_exactly_these_groups(case):
    """A unit is its rows of W and R, its biases and peepholes, its column of R, its states and its outputs."""
    oracle.assert_coupling(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pruned_equals_masked(case):
    """Removing units equals zeroing the columns of R and of the consumers' weights that read them."""
    oracle.assert_case_prunes(case)


def test_directions_keep_units_of_their_own():
    """Which units go is up to each direction; both lose equally many, and the attribute says how many are left."""
    model = layer("LSTM", 2)
    coupling = oracle.couple_proto(model)
    pruned = oracle.prune_to(model, coupling, oracle.random_keep(coupling, np.random.default_rng(3)))
    forward, backward = pruned.plan.initializers["op.r"][2]
    assert forward != backward
    assert len(forward) == len(backward)
    node = next(node for node in pruned.model.graph.node if node.op_type == "LSTM")
    assert next(a.i for a in node.attribute if a.name == "hidden_size") == len(forward)
    assert pruned.proof.ok


def test_proof_needs_the_masked_state():
    """The original's kept units read the removed ones' states: only masked columns of R make both graphs equal."""
    model = layer("GRU")
    coupling = oracle.couple_proto(model)
    coupling.ledger.contractions[:] = [c for c in coupling.ledger.contractions if not c.state]
    keep = oracle.random_keep(coupling, np.random.default_rng(0))
    assert not oracle.prune_to(model, coupling, keep).proof.ok


@pytest.mark.parametrize("op", GATES)
def test_work_counts_multiply_accumulates(op):
    """Every step multiplies the elements of W and of R, in both directions."""
    cost = Cost(oracle.couple_proto(layer(op, 2)))
    macs = dict.fromkeys((work.node.op for work in cost.works), 0.0)
    for work, mac in zip(
        cost.works, cost.layers.values(cost.counts(np.ones(cost.coupling.n_classes, bool))), strict=True
    ):
        macs[work.node.op] += mac
    assert macs[op] == STEPS * BATCH * 2 * GATES[op] * UNITS * (CHANNELS + UNITS)


def test_activations_count_once():
    """A layer with two products reads its input and writes its outputs once."""
    cost = Cost(oracle.couple_proto(to_output()))
    every = np.ones(cost.coupling.n_classes, bool)
    assert cost.of(every)["activations"] == STEPS * BATCH * (2 + UNITS)


def test_unused_outputs_may_be_left_out():
    """Where only the last state is read, a file may leave the output of every step without a name."""
    model = last_state("LSTM")
    node = next(node for node in model.graph.node if node.op_type == "LSTM")
    del node.output[2]
    node.output[0] = ""
    assert onnxprune.prune(model, target_mac=0.6).report.proof.ok


@pytest.mark.parametrize("op", GATES)
def test_batch_may_come_first(op):
    """With ``layout`` 1 pruned equals masked, too; onnxruntime cannot run it, so onnx's own evaluator judges."""
    t = Tiny()
    y, last = recurrent(
        t, op, t.linear(t.input(BATCH, STEPS, 2), "a", 2, CHANNELS), outputs=2, layout=1,
        h=t.random(BATCH, 1, UNITS, name="op.h"),
    )  # fmt: skip
    y = t.node("Add", t.node("Squeeze", y, t.constant([2])), last)
    model = t.build(t.linear(y, "z", UNITS, 3))
    coupling = oracle.couple_proto(model)
    assert sorted(group.size for group in coupling.groups if group.frozen is None) == [CHANNELS, UNITS]
    keep = oracle.random_keep(coupling, np.random.default_rng(0))
    plan = make_plan(coupling, keep)
    masked = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in masked.graph.initializer:
        for axis in {"op.w": (2,), "op.r": (2,), "z.w": (0,)}.get(tensor.name, ()):
            values = numpy_helper.to_array(tensor).copy()
            np.moveaxis(values, axis, 0)[
                np.delete(np.arange(values.shape[axis]), plan.initializers[tensor.name][axis])
            ] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    feeds = oracle.feeds_for(coupling)
    results = [ReferenceEvaluator(m).run(None, feeds) for m in (apply(model, coupling, plan, keep), masked)]
    oracle.assert_close(*results)


# -- states that are zero --------------------------------------------------------------------------------------------


def zero_constant(t: Tiny, n_states: int) -> str:
    """Zeros as they stand."""
    return t.constant(np.zeros((n_states, BATCH, UNITS)), "states")


def zero_expanded(t: Tiny, n_states: int) -> str:
    """A single zero, expanded."""
    return t.node("Expand", t.constant(np.float32(0)), t.constant([n_states, BATCH, UNITS]))


def zero_filled(t: Tiny, n_states: int) -> str:
    """The default of ConstantOfShape, of the input's batch."""
    return filled_states(t, n_states)


ZEROS = (zero_constant, zero_expanded, zero_filled)


@pytest.mark.parametrize("zeros", ZEROS)
def test_zero_states_are_left_out(zeros):
    """States that are zero go, with all that only made them; layers and directions are then free of each other."""
    model = stacked("GRU", 2, state=partial(zeros, n_states=4))
    stateless, n_states = without_zero_states(model)
    oracle.check(stateless)
    assert n_states == 2
    assert {node.op_type for node in stateless.graph.node} == {"GRU", "Transpose", "Reshape", "MatMul"}
    read = {name for node in stateless.graph.node for name in node.input}
    assert {tensor.name for tensor in stateless.graph.initializer} <= read
    assert oracle.signature(stateless) == oracle.signature(model)
    feeds = oracle.feeds_for(oracle.couple_proto(model))
    assert np.array_equal(oracle.run(model, feeds)[0], oracle.run(stateless, feeds)[0])
    assert [(bundle.n_units, bundle.unit) for bundle in oracle.couple_proto(stateless).bundles] == [(UNITS, 2)] * 2


@pytest.mark.parametrize("state", [constant_state, expanded_state, computed_state, input_state])
def test_other_states_stay(state):
    """A model whose states are learned, computed or given is left as it is."""
    model = layer("GRU", state={"h": state})
    assert without_zero_states(model) == (model, 0)


def test_cell_state_stays_without_the_output_state():
    """An LSTM may lose one of its initial states and keep the other."""
    model = layer("LSTM", state={"h": partial(zero_constant, n_states=1), "c": partial(constant_state, name="op.c")})
    stateless, n_states = without_zero_states(model)
    node = next(node for node in stateless.graph.node if node.op_type == "LSTM")
    assert n_states == 1
    assert list(node.input[4:]) == ["", "", "op.c"]
    feeds = oracle.feeds_for(oracle.couple_proto(model))
    assert np.array_equal(oracle.run(model, feeds)[0], oracle.run(stateless, feeds)[0])


def test_zeros_that_others_read_stay():
    """What makes the zeros stays where something else reads them."""
    t = Tiny()
    zeros = zero_filled(t, 1)
    y = joined(t, recurrent(t, "GRU", t.input(STEPS, BATCH, 2), channels=2, h=zeros))
    model = t.build(t.linear(t.node("Add", y, zeros), "z", UNITS, 3))
    stateless, n_states = without_zero_states(model)
    assert n_states == 1
    assert {node.op_type for node in stateless.graph.node} >= {"Shape", "ConstantOfShape"}
    oracle.check(stateless)


@pytest.mark.parametrize("zeros", ZEROS)
def test_prune_leaves_zero_states_out_and_says_so(zeros):
    """Pruning works on the model without zero states, and its notes tell."""
    result = onnxprune.prune(stacked("LSTM", 2, state=partial(zeros, n_states=4)), target_mac=0.6)
    assert result.report.proof.ok
    assert any("2 initial states" in note for note in result.report.notes)
