"""Steps with a scope of their own: branches, loops and scans, which may hold one another, and local functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from onnx import GraphProto, TensorProto, TypeProto, ValueInfoProto, helper

from graphs import Tiny

from .net import Net
from .steps import activate, layer

LOCAL = "local"
MAX_NESTED = 3
STEPS_INSIDE = 60


class Deep(Net):
    """A random graph of several scopes.

    Attributes
    ----------
    nested
        Number of bodies around what is being built.
    sealed
        Whether a body of a function is being built, which reads nothing from outside.
    looping
        Number of loops around what is being built; nothing in them shrinks.
    """

    nested = looping = 0
    sealed = False

    def within(self, build: Callable[[], Sequence[str]], inputs: Sequence[ValueInfoProto] = ()) -> GraphProto:
        """Let ``build`` add nodes to a body, which may read what is outside; its weights lie inside or outside."""
        nodes, initializers, pool, stored = self.nodes, self.initializers, self.pool, dict(self.stored)
        self.enclosed, steps = self.number, self.steps
        self.steps = (*NESTING[:3] * 8, *steps[-STEPS_INSIDE:])
        self.nodes, self.initializers, self.pool = [], [], [*self.pool, *self.pool]
        self.nested += 1
        results = [self._own(name) for name in build()]
        self.nested -= 1
        inner, weights, number = self.nodes, self.initializers, self.number + 1
        self.nodes, self.initializers, self.pool, self.stored = nodes, initializers, pool, stored
        self.steps = steps
        self.enclosed = number - len(nodes)
        if self.chance(3) and not self.sealed:
            self.initializers, weights = [*self.initializers, *weights], []
        outputs = [self.declared(name) for name in results]
        return helper.make_graph(inner, f"body{number}", list(inputs), outputs, weights)

    def declared(self, name: str) -> ValueInfoProto:
        """Say what a tensor is; of lengths only those that no open one may have a part in."""
        kind = self.types[name].tensor_type
        dims = [dim.dim_value for dim in kind.shape.dim]
        return helper.make_tensor_value_info(name, kind.elem_type, [None] * len(dims) if self.dynamic else dims)

    def known(self, name: str, like: str) -> str:
        """Give a tensor the type and the channels of another."""
        self.types[name] = TypeProto.FromString(self.types[like].SerializeToString())
        return self.to(name, self.axis[like]) if like in self.axis else name

    def named(self, *words: str) -> list[str]:
        """Names for what a body is given."""
        self.enclosed += 1
        return [f"{word}{self.number}" for word in words]

    def plain(self, op: str, *inputs: str, outputs: int = 1, **attributes: object):
        """Add a node whose results' types are not inferred."""
        return Tiny.node(self, op, *inputs, name=f"{op.lower()}{self.number}", outputs=outputs, **attributes)

    def _own(self, name: str) -> str:
        """A tensor that this body computes."""
        inside = any(name in node.output for node in self.nodes)
        return name if inside else self.known(self.node("Identity", name), name)


def fit(g: Net, y: str, like: str, other: str) -> str:
    """Give a tensor the shape of another, by a layer if only channels differ; else use a third instead."""
    for x in (y, other):
        if g.axis[x] == g.axis[like] and g.shape(x) == g.shape(like):
            return x
        if g.alike(x, like, g.axis[like]):
            z = layer(g, x, g.channels(like))
            if g.shape(z) == g.shape(like) and g.axis[z] == g.axis[like]:
                return z
    return activate(g, like)


def condition(g: Deep, x: str) -> str:
    """A truth: constant, an input of the graph, or computed from values or lengths."""
    kind = g.pick("input", "constant", "mean", "sum", "length", "loop")
    if kind == "input" and not g.sealed:
        name = f"flag{len(g.inputs)}"
        g.types[name] = helper.make_tensor_type_proto(TensorProto.BOOL, ())
        return g.input(name=name, kind=TensorProto.BOOL)
    if kind == "constant":
        return g.constant(np.array(g.chance()))
    if kind == "length":
        size = g.node("Gather", g.node("Shape", x), g.constant(np.array(g.choose(len(g.shape(x))))), axis=0)
        return g.node("Less", size, g.constant(np.array(g.pick(2, 5, 8))))
    value = g.node("ReduceSum" if kind == "sum" else "ReduceMean", x, axes=list(range(len(g.shape(x)))), keepdims=0)
    return g.node("Greater", value, g.constant(0.25))


def choose_branch(g: Deep, x: str) -> str:
    """One of two branches, which give the same shape, perhaps beside another tensor each."""
    flag, two = condition(g, x), g.chance(4)
    made: list[str] = []

    def then() -> list[str]:
        y = g.step(x) if g.chance(3) else hidden(g, x)
        made.append(y if g.alike(y, x, g.axis[x]) else activate(g, x))
        return [made[0], activate(g, x)] if two else made

    def otherwise() -> list[str]:
        y = fit(g, g.step(x), made[0], x)
        if g.shape(y) != g.shape(made[0]):
            y = g.known(g.node("Mul", made[0], g.constant(0.5)), made[0])
        return [y, x] if two else [y]

    bodies = {"then_branch": g.within(then), "else_branch": g.within(otherwise)}
    result = g.plain("If", flag, outputs=1 + two, **bodies)
    y, *rest = result if two else [result]
    for name in rest:
        g.pool.append(g.known(name, x))
    return g.known(y, made[0])


def loop(g: Deep, x: str) -> str:
    """Repeat a body on a state a few times, perhaps until something holds; perhaps collect what it computes."""
    number, flag, state = g.named("i", "go", "state")
    g.types[number] = helper.make_tensor_type_proto(TensorProto.INT64, ())
    g.types[flag] = helper.make_tensor_type_proto(TensorProto.BOOL, ())
    g.known(state, x)
    collect = g.chance(3)
    collected: list[str] = []
    trips = g.constant(np.array(g.pick(2, 1, 3)))
    if g.chance(4) and len(g.shape(x)) > 2:  # as many as there are positions
        axis = g.pick(*(a for a in range(1, len(g.shape(x))) if a != g.axis[x]))
        trips = g.node("Gather", g.node("Shape", x), g.constant(np.array(axis)), axis=0)

    def build() -> list[str]:
        g.pool.append(state)
        y = fit(g, g.step(state), state, state)
        go = g.node("Identity", flag) if g.chance() else g.node("Less", number, g.constant(np.array(1)))
        collected.append(activate(g, y))
        return [go, y, *collected[: int(collect)]]

    g.looping += 1
    body = g.within(build, [g.declared(name) for name in (number, flag, state)])
    g.looping -= 1
    start = g.constant(np.array(True)) if g.chance() else ""
    result = g.plain("Loop", trips, start, x, outputs=1 + collect, body=body)
    if not collect:
        return g.known(result, x)
    y, stack = g.known(result[0], x), result[1]
    rank = len(g.shape(x))
    g.types[stack] = helper.make_tensor_type_proto(TensorProto.FLOAT, (1, *g.shape(x)))
    total = g.node("ReduceMean", g.to(stack, g.axis[x] + 1), axes=[0], keepdims=0)
    g.known(total, x)
    assert len(g.shape(total)) == rank
    return g.node("Add", y, total) if g.chance() else total


def scan(g: Deep, x: str) -> str:
    """Walk along positions, with a state or without."""
    places = [a for a in range(1, len(g.shape(x))) if a != g.axis[x]]
    if len(g.shape(x)) < 3 or not places:
        return x
    axis, keeping = g.pick(*places), g.chance()
    where = g.axis[x] - (axis < g.axis[x])
    shape = tuple(size for a, size in enumerate(g.shape(x)) if a != axis)
    piece, state = g.named("piece", "sum")
    for name in (piece, state):
        g.types[name] = helper.make_tensor_type_proto(TensorProto.FLOAT, shape)
        g.to(name, where)
    start = g.to(g.node("ReduceMean", x, axes=[axis], keepdims=0), where) if keeping else ""

    def build() -> list[str]:
        y = fit(g, g.step(piece), piece, piece)
        if not keeping:
            return [y]
        now = g.to(g.node("Mul", g.node("Add", state, y), g.constant(0.5)), where)
        return [now, g.to(g.node("Tanh", now), where)]

    g.looping += 1
    body = g.within(build, [g.declared(name) for name in ([state] if keeping else []) + [piece]])
    g.looping -= 1
    flags = {"num_scan_inputs": 1, "scan_input_axes": [axis], "scan_output_axes": [axis]}
    flags |= {"scan_input_directions": [1]} if g.chance(3) else {}
    result = g.plain("Scan", *([start] if keeping else []), x, outputs=1 + keeping, body=body, **flags)
    return g.known(result[-1] if keeping else result, x)


def call(g: Deep, x: str) -> str:
    """A local function, called once, twice in a row, or with weights as operands; it may hold bodies, not calls."""
    if g.sealed:
        return activate(g, x)
    name, formal = g.named("Part", "formal")
    g.known(formal, x)
    weights = [f"{name}.weight"] if len(g.shape(x)) > 1 and g.axis[x] == len(g.shape(x)) - 1 and g.chance() else []
    size = g.channels(x)
    for weight in weights:
        g.types[weight] = helper.make_tensor_type_proto(TensorProto.FLOAT, (size, size))

    def build() -> list[str]:
        g.pool, g.stored = [formal], {}
        y = g.to(g.node("MatMul", formal, weights[0]), g.axis[x]) if weights else formal
        return [activate(g, fit(g, g.step(y), formal, y))]

    was, g.in_nodes, g.sealed = g.in_nodes, True, True
    body = g.within(build)
    g.in_nodes, g.sealed = was, False
    opsets = [helper.make_opsetid("", g.opset)]
    results = [value.name for value in body.output]
    g.functions.append(helper.make_function(LOCAL, name, [formal, *weights], results, body.node, opsets))
    g.domains = [LOCAL]
    y = x
    for _ in range(g.choose(2) + 1):
        given = [g.random(size, size, name=f"{g.fresh()}.w", scale=size**-0.5) for _ in weights]
        y = g.known(g.plain(name, y, *given, domain=LOCAL), x)
    return y


def entrance(g: Deep, x: str) -> str:
    """Another input of the graph of the same shape, behind a layer."""
    if g.sealed or len(g.inputs) > 4 or g.shape(x)[0] != 1:
        return x
    name = g.source(*g.shape(x), axis=g.axis[x], name=f"x{len(g.inputs)}")
    y = layer(g, name, g.channels(x))
    return g.node("Add", x, y) if g.shape(y) == g.shape(x) else y


def hidden(g: Deep, x: str) -> str:
    """Two layers, between which channels are that nothing else reads: they must be free."""
    was, g.storing = g.storing, ("initializer",)
    stored, size = dict(g.stored), g.pick(4, 8, 5)
    place = "" if g.looping or g.sealed or g.in_nodes else "free"
    y, name = g.move(x, -1), f"{g.fresh()}.{place}"
    if len(g.shape(y)) > 1:
        y = g.node("Relu", g.to(g.linear(y, name, g.channels(y), size), len(g.shape(y)) - 1))
        y = g.to(g.linear(y, f"{name}.after", size, g.channels(x)), len(g.shape(y)) - 1)
    g.storing, g.stored = was, stored
    return g.move(y, g.axis[x])


SCOPES = (choose_branch, loop, scan, call, entrance, hidden)


def guarded(step: Callable[[Deep, str], str]) -> Callable[[Deep, str], str]:
    """A step that does nothing where scopes are nested deeply already."""

    def limited(g: Deep, x: str) -> str:
        return step(g, x) if g.nested < MAX_NESTED and len(g.shape(x)) < 6 else activate(g, x)

    return limited


NESTING = tuple(guarded(step) for step in SCOPES)
