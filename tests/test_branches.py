"""Both branches of an If are pruned and proved; what cannot be laid out side by side freezes, and the rest still prunes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np
import onnx
import pytest
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

import onnxprune
from graphs import Tiny
from onnxprune import onnx_io
from onnxprune.branches import flatten, unique_names
from onnxprune.prepare import prepare
from oracle import assert_close, assert_pruned, masked_reference, run

SHAPE = (1, 8, 4, 6)
Pick = Mapping[str, bool]
Build = Callable[[Tiny, str], str]


# -- building ----------------------------------------------------------------------------------------------------------


def begin(*flags: str, batch: int | str = 1) -> tuple[Tiny, str]:
    """Begin a graph with Conv ``a`` (8 channels) and a Relu; ``flags`` are scalar inputs."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input(batch, 2, 4, 6), "a", 2, 8, 3))
    for flag in flags:
        t.input(name=flag, kind=TensorProto.BOOL)
    return t, y


def end(t: Tiny, y: str, batch: int | str = 1, **others: Sequence[int]) -> ModelProto:
    """Finish with Conv ``z``; what an If computes has no shape that inference could find, so outputs are declared."""
    shapes = {t.conv(y, "z", 8, 3): (batch, 3, 4, 6), **others}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(t.nodes, "choices", t.inputs, outputs, t.initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", t.opset)], ir_version=8)


def body(
    name: str, build: Callable[[Tiny], Sequence[str] | str], shape: Sequence[int | str] | None = SHAPE
) -> GraphProto:
    """Make a branch; ``build`` returns what it gives back."""
    b = Tiny(seed=sum(map(ord, name)))
    results = build(b)
    names = [results] if isinstance(results, str) else results
    outputs = [helper.make_tensor_value_info(result, TensorProto.FLOAT, shape) for result in names]
    return helper.make_graph(b.nodes, name, [], outputs, b.initializers)


def choose(t: Tiny, flag: str, then: GraphProto, otherwise: GraphProto, name: str = "choice", outputs: int = 1):
    """Add an If."""
    return t.node("If", flag, then_branch=then, else_branch=otherwise, name=name, outputs=outputs)


def conv(b: Tiny, y: str, name: str, channels: int = 8, kernel: int = 3) -> str:
    return b.conv(y, name, 8, channels, kernel)


# -- checking ----------------------------------------------------------------------------------------------------------


def taken(model: ModelProto, pick: Pick) -> ModelProto:
    """Return the model as it is where ``pick`` says what every condition is."""
    plain = ModelProto()
    plain.CopyFrom(model)
    del plain.graph.node[:]

    def lay_out(nodes: Sequence[NodeProto]) -> None:
        for node in nodes:
            if node.op_type != "If":
                plain.graph.node.append(node)
                plain.graph.node[-1].ClearField("name")
                continue
            name = "then_branch" if pick[node.input[0]] else "else_branch"
            branch = next(attribute.g for attribute in node.attribute if attribute.name == name)
            plain.graph.initializer.extend(branch.initializer)
            lay_out(branch.node)
            for output, inner in zip(node.output, branch.output, strict=True):
                plain.graph.node.append(helper.make_node("Identity", [inner.name], [output]))

    lay_out(model.graph.node)
    return plain


def image(model: ModelProto, batch: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """Random values for the inputs that are no flags."""
    rng = np.random.default_rng(seed)
    return {
        value.name: rng.standard_normal([d.dim_value or batch for d in value.type.tensor_type.shape.dim], np.float32)
        for value in model.graph.input
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }


def assert_pruned_in_every_branch(
    model: ModelProto, *flags: str, target: float = 0.7, batch: int = 1
) -> onnxprune.Result:
    """Whatever the inputs ``flags`` say, the pruned model gives what the masked original gives."""
    onnx.checker.check_model(model, full_check=True)
    result = assert_pruned(model, target)
    renamed, _ = prepare(model)
    feeds, seen = image(model, batch), []
    for values in product((True, False), repeat=len(flags)):
        pick = dict(zip(flags, values, strict=True))
        have = run(result.model, feeds | {flag: np.array(value) for flag, value in pick.items()})
        plain = taken(renamed, pick)
        for index in reversed([i for i, value in enumerate(plain.graph.input) if value.name in flags]):
            del plain.graph.input[index]
        want = masked_reference(plain, result.plan, feeds)
        assert_close(have, want)
        assert not any(np.array_equal(want[0], other) for other in seen), "the branches cannot be told apart"
        seen.append(want[0])
    return result


def sizes(model: ModelProto) -> dict[str, list[int]]:
    """Shape of every constant, in bodies too."""
    found: dict[str, list[int]] = {}

    def look(graph: GraphProto) -> None:
        found.update({tensor.name: list(tensor.dims) for tensor in graph.initializer})
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    found[node.output[0]] = list(attribute.t.dims)
                if attribute.HasField("g"):
                    look(attribute.g)

    look(model.graph)
    return found


# -- branches that shrink ----------------------------------------------------------------------------------------------


def two_convolutions() -> ModelProto:
    """Convolve by ``p`` or by ``q``."""
    t, y = begin("flag")
    then, otherwise = (body(n, lambda b, n=n: b.node("Relu", conv(b, y, n), name=f"{n}.out")) for n in "pq")
    return end(t, choose(t, "flag", then, otherwise))


def shared_weight() -> ModelProto:
    """Convolve by one outer weight that both branches capture, and rectify or bend the result."""
    t, y = begin("flag")
    w = t.random(8, 8, 3, 3, name="w", scale=0.2)

    def branch(op: str) -> GraphProto:
        return body(op, lambda b: b.node(op, b.node("Conv", y, w, name=f"{op}.c", pads=[1] * 4), name=f"{op}.out"))

    return end(t, choose(t, "flag", branch("Relu"), branch("Tanh")))


def weight_shared_with_outside() -> ModelProto:
    """One weight for Conv ``b`` before the If and for both branches."""
    t, y = begin("flag")
    w = t.random(8, 8, 3, 3, name="w", scale=0.2)
    y = t.node("Relu", t.node("Conv", y, w, name="b", pads=[1] * 4))

    def branch(op: str) -> GraphProto:
        return body(op, lambda b: b.node(op, b.node("Conv", y, w, name=f"{op}.c", pads=[1] * 4), name=f"{op}.out"))

    return end(t, choose(t, "flag", branch("Relu"), branch("Tanh")))


def bias_shared_with_outside() -> ModelProto:
    """One bias, as exporters share equal vectors, for unrelated convolutions in both branches and before them."""
    t, y = begin("flag")
    t.random(8, name="shared")
    y = t.node("Relu", t.node("Conv", y, t.random(8, 8, 1, 1, name="b.w", scale=0.4), "shared", name="b"))

    def branch(name: str) -> GraphProto:
        def build(b: Tiny) -> str:
            inner = b.node("Conv", y, b.random(8, 8, 1, 1, name=f"{name}.w", scale=0.4), "shared", name=name)
            return conv(b, b.node("Relu", inner, name=f"{name}.relu"), f"{name}2")

        return body(name, build)

    return end(t, choose(t, "flag", branch("p"), branch("q")))


def nested() -> ModelProto:
    """Choose between two convolutions inside one of two branches."""
    t, y = begin("flag", "inner_flag")

    def outer(b: Tiny) -> str:
        c = conv(b, y, "p")
        return choose(b, "inner_flag", *(body(n, lambda i, n=n: conv(i, c, n)) for n in "rs"), name="inner")

    return end(t, choose(t, "flag", body("p", outer), body("q", lambda b: conv(b, y, "q"))))


def one_after_another() -> ModelProto:
    """Choose twice: each If is between the convolutions of the other."""
    t, y = begin("flag", "other_flag")
    y = choose(t, "flag", *(body(n, lambda b, n=n: conv(b, y, n)) for n in "pq"))
    other = t.conv(t.node("Relu", y), "c", 8, 8, 3)
    return end(t, choose(t, "other_flag", *(body(n, lambda b, n=n: conv(b, other, n)) for n in "rs"), name="second"))


def several_outputs() -> ModelProto:
    """Return two tensors of each branch, one of which the other branch takes from elsewhere."""
    t, y = begin("flag")

    def branch(name: str) -> GraphProto:
        return body(name, lambda b: [conv(b, y, f"{name}1"), b.node("Tanh", conv(b, y, f"{name}2", kernel=1))])

    first, second = choose(t, "flag", branch("p"), branch("q"), outputs=2)
    t.conv(second, "z2", 8, 3)
    return end(t, t.node("Relu", first), z2=(1, 3, 4, 6))


def same_names() -> ModelProto:
    """Call nodes, weights and results of both branches the same, as exporters do."""
    t, y = begin("flag")
    then, otherwise = (
        body(name, lambda b, name=name: b.node(name, conv(b, y, "same"), name="out")) for name in ("Relu", "Tanh")
    )
    return end(t, choose(t, "flag", then, otherwise))


def same_names_and_numbers() -> ModelProto:
    """Call tensors of both branches the same, and others outside as they might then be told apart."""
    t, y = begin("flag")
    weight = t.random(8, 8, 3, 3, name="same.w.1", scale=0.2)
    y = t.node("Relu", t.node("Conv", y, weight, name="same.2", pads=[1] * 4), name="out.1")
    then, otherwise = (
        body(name, lambda b, name=name: b.node(name, conv(b, y, "same"), name="out")) for name in ("Relu", "Tanh")
    )
    return end(t, choose(t, "flag", then, otherwise))


def same_node_names() -> ModelProto:
    """Call several nodes in a row the same in both branches, and like nodes outside."""
    t, y = begin("flag")

    def branch(op: str) -> GraphProto:
        return body(op, lambda b: b.node("Neg", b.node(op, b.node("Abs", y, name="first"), name="act"), name="a.act"))

    model = end(t, choose(t, "flag", branch("Sigmoid"), branch("Tanh")))
    for node in model.graph.node:
        for attribute in node.attribute:
            for index, inner in enumerate(attribute.g.node):
                inner.name = ("a", "relu1", "z")[index]
    return model


def passed_on() -> ModelProto:
    """Hand an outer tensor on in one of the branches."""
    t, y = begin("flag")
    then = body("p", lambda b: conv(b, y, "p"))
    otherwise = body("q", lambda b: b.node("Identity", y, name="q.out"))
    return end(t, t.conv(t.node("Relu", choose(t, "flag", then, otherwise)), "c", 8, 8, 3))


def constants_inside() -> ModelProto:
    """Keep weights in a Constant node, reshape to the sizes that Constant nodes and initializers of the branch hold."""
    t, y = begin("flag")

    def branch(name: str) -> GraphProto:
        def build(b: Tiny) -> str:
            w = b.rng.standard_normal((8, 8, 3, 3)).astype(np.float32) * 0.2
            weight = b.node("Constant", name=f"{name}.w", value=numpy_helper.from_array(w, "value"))
            flat = b.node("Constant", name=f"{name}.flat", value_ints=[1, 8, 24])
            c = b.node("Reshape", b.node("Conv", y, weight, name=name, pads=[1] * 4), flat, name=f"{name}.there")
            return b.node("Reshape", c, b.constant(SHAPE, name=f"{name}.back"), name=f"{name}.out")

        return body(name, build)

    return end(t, choose(t, "flag", branch("p"), branch("q")))


def shape_arithmetic_inside() -> ModelProto:
    """Reshape to sizes that every branch computes."""
    t, y = begin("flag")

    def branch(name: str) -> GraphProto:
        def build(b: Tiny) -> str:
            c = conv(b, y, name)
            shape = b.node("Shape", c, name=f"{name}.shape")
            ends = [b.node("Gather", shape, b.constant([i], name=f"{name}.{i}"), name=f"{name}.g{i}") for i in range(4)]
            space = b.node("Mul", *ends[2:], name=f"{name}.space")
            flat = b.node(
                "Reshape", c, b.node("Concat", *ends[:2], space, axis=0, name=f"{name}.to"), name=f"{name}.there"
            )
            return b.node("Reshape", flat, shape, name=f"{name}.out")

        return body(name, build)

    return end(t, choose(t, "flag", branch("p"), branch("q")))


def dead_nodes() -> ModelProto:
    """A branch computes what nobody reads, by an outer bias."""
    t, y = begin("flag")

    def then(b: Tiny) -> str:
        unread = b.node("Mul", y, b.random(8, 1, 1, name="unread.scale"), name="unread")
        b.node("Relu", unread, name="unread.too")
        return conv(b, y, "p")

    return end(t, choose(t, "flag", body("p", then), body("q", lambda b: conv(b, y, "q"))))


def unused_output() -> ModelProto:
    """Nobody reads one of the results."""
    t, y = begin("flag")

    def build(b: Tiny, name: str) -> list[str]:
        return [b.node("Mul", y, b.random(8, 1, 1, name=f"{name}.scale"), name=f"{name}.unread"), conv(b, y, name)]

    then, otherwise = (body(name, lambda b, name=name: build(b, name)) for name in "pq")
    _, chosen = choose(t, "flag", then, otherwise, outputs=2)
    return end(t, chosen)


EVERY = [
    two_convolutions, shared_weight, weight_shared_with_outside, bias_shared_with_outside, several_outputs, same_names,
    same_names_and_numbers, same_node_names, passed_on, constants_inside, shape_arithmetic_inside, dead_nodes, unused_output,
]  # fmt: skip


@pytest.mark.parametrize("target", [0.75, 0.5])
@pytest.mark.parametrize("build", EVERY, ids=lambda build: build.__name__)
def test_both_branches_shrink_alike(build: Callable[[], ModelProto], target: float) -> None:
    """What goes out of a branch goes out of the other, and each gives what it gave, masked."""
    model = build()
    result = assert_pruned_in_every_branch(model, "flag", target=target)
    assert [node.op_type for node in result.model.graph.node] == [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(("build", "flag"), [(nested, "inner_flag"), (one_after_another, "other_flag")])
def test_two_conditions(build: Callable[[], ModelProto], flag: str) -> None:
    """Branches in branches and one If after another give what they gave, masked, in all four cases."""
    model = build()
    if build is nested:  # inside branch q the inner condition changes nothing
        result = assert_pruned(model, 0.6)
        for inner in (True, False):
            feeds = image(model) | {"flag": np.array(True), flag: np.array(inner)}
            plain = taken(prepare(model)[0], {"flag": True, flag: inner})
            known = {name: value for name, value in feeds.items() if name not in ("flag", flag)}
            del plain.graph.input[1:]
            assert_close(run(result.model, feeds), masked_reference(plain, result.plan, known))
    else:
        result = assert_pruned_in_every_branch(model, "flag", flag, target=0.6)
    assert sizes(result.model).keys() == sizes(prepare(model)[0]).keys()


def test_every_branch_loses_channels() -> None:
    """All convolutions around and inside a nested choice give channels up."""
    model = nested()
    after, before = sizes(assert_pruned(model, 0.4, preset="a").model), sizes(model)
    smaller = {name for name in before if after[name] != before[name]}
    assert {f"{name}.w" for name in "apqrsz"} <= smaller


def test_dynamic_batch() -> None:
    """A pruned If with a dynamic batch runs at batch 3 in both branches."""
    t, y = begin("flag", batch="N")
    shape = ("N", *SHAPE[1:])
    then, otherwise = (body(n, lambda b, n=n: conv(b, y, n), shape) for n in "pq")
    model = end(t, choose(t, "flag", then, otherwise), "N")
    assert_pruned_in_every_branch(model, "flag", batch=3)


# -- conditions that are computed --------------------------------------------------------------------------------------


def computed(kind: str) -> tuple[ModelProto, str]:
    """Choose by what the data or a shape say; return the model and the condition's name."""
    t, y = begin()
    if kind == "data":
        condition = t.node("Greater", t.node("ReduceMean", "x", keepdims=0), t.constant(np.float32(0)))
    elif kind == "data of one element":
        mean = t.node("ReduceMean", y, axes=[0, 1, 2, 3], keepdims=0)
        condition = t.node("Greater", t.node("Unsqueeze", mean, t.constant([0])), t.constant([0.45]))
    else:
        axis, size = {"width": (3, 6), "channels": (1, 8)}[kind]
        length = t.node("Gather", t.node("Shape", y), t.constant(axis), axis=0)
        condition = t.node("Equal", length, t.constant(size))
    then, otherwise = (body(n, lambda b, n=n: conv(b, y, n)) for n in "pq")
    return end(t, choose(t, condition, then, otherwise)), condition


@pytest.mark.parametrize("kind", ["data", "data of one element"])
def test_condition_computed_from_data(kind: str) -> None:
    """The pruned model takes the branch that the masked original takes, whichever that is."""
    model, condition = computed(kind)
    result = assert_pruned(model)
    seen = []
    for sign in (1, -1):
        feeds = {"x": sign * np.abs(image(model)["x"])}
        wanted = [
            masked_reference(taken(prepare(model)[0], {condition: flag}), result.plan, feeds) for flag in (True, False)
        ]
        have = run(result.model, feeds)
        seen += [flag for flag, want in enumerate(wanted) if np.allclose(have, want, atol=1e-5)]
    assert len(seen) == 2
    if kind == "data":
        assert sorted(seen) == [0, 1]


@pytest.mark.parametrize("kind", ["width", "channels"])
def test_condition_computed_from_shapes(kind: str) -> None:
    """A condition that counts what is pruned still says what it said: the same branch runs, with what is left in it."""
    model, condition = computed(kind)
    result = assert_pruned(model)
    feeds = image(model)
    want = masked_reference(taken(prepare(model)[0], {condition: True}), result.plan, feeds)
    assert_close(run(result.model, feeds), want)


def branch_of(model: ModelProto, name: str) -> GraphProto:
    """Return a branch of the only If."""
    (node,) = [node for node in model.graph.node if node.op_type == "If"]
    return next(attribute.g for attribute in node.attribute if attribute.name == name)


def exchange_branches(model: ModelProto) -> None:
    then, otherwise = branch_of(model, "then_branch"), branch_of(model, "else_branch")
    kept = GraphProto.FromString(then.SerializeToString())
    then.CopyFrom(otherwise)
    otherwise.CopyFrom(kept)


def change_target(model: ModelProto) -> None:
    (tensor,) = [tensor for tensor in branch_of(model, "then_branch").initializer if tensor.name == "p.back"]
    values = numpy_helper.to_array(tensor).copy()
    values[2:] = values[2:][::-1]
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def drop_node(model: ModelProto) -> None:
    branch = branch_of(model, "then_branch")
    branch.node[-1].op_type = "Identity"
    del branch.node[-1].input[1:]


@pytest.mark.parametrize("spoil", [exchange_branches, change_target, drop_node], ids=lambda spoil: spoil.__name__)
def test_verify_looks_into_branches(spoil: Callable[[ModelProto], None]) -> None:
    """A pruned model whose branches were exchanged, or changed in anything but weights, is refused."""
    model = constants_inside()
    result = onnxprune.prune(model, target_mac=0.7)
    spoiled = ModelProto()
    spoiled.CopyFrom(result.model)
    spoil(spoiled)
    with pytest.raises(onnxprune.ProofError):
        onnxprune.verify(model, spoiled, result.plan)


def test_verify_accepts_trained_branches() -> None:
    """Weights of branches may have been trained since."""
    model = two_convolutions()
    result = onnxprune.prune(model, target_mac=0.7)
    trained = ModelProto()
    trained.CopyFrom(result.model)
    (tensor,) = [tensor for tensor in branch_of(trained, "else_branch").initializer if tensor.name == "q.w"]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.1), tensor.name))
    assert onnxprune.verify(model, trained, result.plan).weights == "changed"


# -- what cannot be laid out ---------------------------------------------------------------------------------------------


def unequal(how: str) -> ModelProto:
    """Return other shapes from the two branches, behind convolutions that have nothing to do with them."""
    t, y = begin("flag")

    def other(b: Tiny) -> str:
        c = conv(b, y, "q")
        if how == "size":
            return b.node("MaxPool", c, kernel_shape=[2, 2], strides=[2, 2], name="q.out")
        if how == "rank":
            return b.node("Flatten", c, name="q.out")
        return b.conv(c, "q2", 8, 1)

    then, otherwise = body("p", lambda b: conv(b, y, "p"), None), body("q", other, None)
    t.node("ReduceMean", choose(t, "flag", then, otherwise), keepdims=0, name="mean")
    return end(t, t.node("Relu", t.conv(t.node("Relu", t.conv("x", "c", 2, 8, 3)), "d", 8, 8, 3)), mean=())


def assert_frozen_around(model: ModelProto, result: onnxprune.Result, op: str, weights: Sequence[str]) -> None:
    """Weights around a node keep their shape, for a reason that names its operator; others shrank."""
    after, before = sizes(result.model), sizes(model)
    assert {name: after[name] for name in weights} == {name: before[name] for name in weights}
    assert after != before
    assert any(row.op == op for row in onnxprune.inspect(model).frozen)


@pytest.mark.parametrize("how", ["size", "rank", "channels"])
def test_branches_of_other_shapes_freeze(how: str) -> None:
    """Where the branches return other shapes, the If and what it reads stay as they are; the rest prunes and is proved."""
    model = unequal(how)
    result = assert_pruned(model, 0.85)
    assert_frozen_around(model, result, "If", ["a.w", "p.w", "q.w"])
    for flag in (True, False):
        feeds = image(model) | {"flag": np.array(flag)}
        have, want = run(result.model, feeds), run(model, feeds)
        assert np.array_equal(have[1], want[1])


def scalars() -> ModelProto:
    """Choose between scalars by a condition of one element, which a Where would make a vector of."""
    t, y = begin()
    condition = t.node("Greater", t.node("ReduceMean", "x", axes=[1, 2, 3], keepdims=0), t.constant([0.0]))
    then = body("p", lambda b: b.node("Neg", b.constant(np.float32(2.0), name="two"), name="p.out"), ())
    otherwise = body("q", lambda b: b.node("Neg", b.constant(np.float32(3.0), name="three"), name="q.out"), ())
    return end(t, t.node("Mul", t.conv(y, "c", 8, 8, 3), choose(t, condition, then, otherwise)))


def integers() -> ModelProto:
    """Choose between two reshape targets."""
    t, y = begin("flag")
    bodies = []
    for name, shape in (("p", [0, 8, 6, 4]), ("q", [0, 8, 3, 8])):
        node = helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(shape), name))
        output = helper.make_tensor_value_info(name, TensorProto.INT64, (4,))
        bodies.append(helper.make_graph([node], name, [], [output]))
    y = t.node("Reshape", y, choose(t, "flag", *bodies))
    y = t.node("Relu", t.conv(t.conv(t.node("GlobalAveragePool", y), "c", 8, 8), "d", 8, 8))
    model = end(t, y)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("z", TensorProto.FLOAT, (1, 3, 1, 1)))
    return model


def sequences() -> ModelProto:
    """Return sequences of tensors from the branches."""
    t, y = begin("flag")
    bodies = []
    for name in "pq":
        b = Tiny(seed=ord(name))
        b.node("SequenceConstruct", conv(b, y, name), name=f"{name}.out")
        output = helper.make_tensor_sequence_value_info(f"{name}.out", TensorProto.FLOAT, None)
        bodies.append(helper.make_graph(b.nodes, name, [], [output], b.initializers))
    first = t.node("SequenceAt", choose(t, "flag", *bodies), t.constant(0))
    return end(t, t.node("Relu", t.conv(t.node("Relu", t.conv(first, "c", 8, 8, 3)), "d", 8, 8, 3)))


@pytest.mark.parametrize("build", [scalars, integers, sequences], ids=lambda build: build.__name__)
def test_other_kinds_of_results(build: Callable[[], ModelProto]) -> None:
    """Branches that return scalars, integers or sequences are handled or frozen, and never break the model."""
    model = build()
    result = assert_pruned(model, 0.97)
    for flag in (True, False):
        feeds = image(model)
        if len(model.graph.input) > 1:
            feeds["flag"] = np.array(flag)
        run(result.model, feeds)


def test_opset_without_where() -> None:
    """At opset 8, where nothing like Where exists, an If freezes what it touches."""
    t, y = begin("flag")
    t.opset = 8
    then, otherwise = (body(n, lambda b, n=n: conv(b, y, n)) for n in "pq")
    y = choose(t, "flag", then, otherwise)
    model = end(t, t.node("Relu", t.conv(t.node("Relu", t.conv(y, "c", 8, 8, 3)), "d", 8, 8, 3)))
    result = assert_pruned(model, 0.85)
    assert_frozen_around(model, result, "If", ["a.w", "p.w", "q.w"])


# -- loops -------------------------------------------------------------------------------------------------------------


def loop(own: bool, bias: bool = False) -> ModelProto:
    """Convolve three times by a weight that is the body's own, or captured; ``bias``: by a bias that Conv ``d`` has, too."""
    t, y = begin()
    w = None if own else t.random(8, 8, 3, 3, name="w", scale=0.2)
    b = Tiny(seed=5)
    inputs = ["carried", w or b.random(8, 8, 3, 3, name="own", scale=0.2), *(["d.b"] if bias else [])]
    b.node("Relu", b.node("Conv", *inputs, name="step", pads=[1] * 4), name="next")
    b.node("Identity", "going", name="go_on")
    graph = helper.make_graph(
        b.nodes, "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, ()), helper.make_tensor_value_info("going", 9, ()),
         helper.make_tensor_value_info("carried", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("go_on", 9, ()), helper.make_tensor_value_info("next", TensorProto.FLOAT, SHAPE)],
        b.initializers,
    )  # fmt: skip
    y = t.node("Loop", t.constant(3), t.constant(True), y, body=graph, name="loop")
    y = t.node("Relu", t.conv(y, "c", 8, 8, 3))
    return end(t, t.node("Relu", t.conv(y, "d", 8, 8, 3)))


def scan(own: bool) -> ModelProto:
    """Run a recurrence over 5 positions by a weight that is the body's own, or captured."""
    t = Tiny()
    y = t.node("Relu", t.linear(t.input(5, 1, 4), "a", 4, 8))
    w = None if own else t.random(8, 8, name="w", scale=0.3)
    b = Tiny(seed=5)
    product_ = b.node("MatMul", "state", w or b.random(8, 8, name="own", scale=0.3), name="step")
    b.node("Identity", b.node("Tanh", b.node("Add", product_, "now", name="sum"), name="next"), name="row")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 8)) for n in ("state", "now", "next", "row")]
    graph = helper.make_graph(b.nodes, "body", values[:2], values[2:], b.initializers)
    start = t.constant(np.zeros((1, 8), np.float32))
    _, y = t.node("Scan", start, y, body=graph, num_scan_inputs=1, name="scan", outputs=2)
    y = t.node("Relu", t.linear(t.node("Relu", t.linear(y, "c", 8, 8)), "d", 8, 8))
    return t.build(t.linear(y, "z", 8, 3))


@pytest.mark.parametrize(
    ("build", "op"),
    [
        pytest.param(lambda: loop(own=False), "Loop", id="loop-captured"),
        pytest.param(lambda: loop(own=True), "Loop", id="loop-own"),
        pytest.param(lambda: scan(own=False), "Scan", id="scan-captured"),
        pytest.param(lambda: scan(own=True), "Scan", id="scan-own"),
    ],
)
def test_loops_freeze_what_they_touch(build: Callable[[], ModelProto], op: str) -> None:
    """What enters a loop, what its body holds or captures and what leaves it stay; the rest prunes, compared everywhere."""
    model = build()
    result = assert_pruned(model, 0.9)
    assert_frozen_around(model, result, op, ["a.w", *({"w"} & sizes(model).keys()), *({"own"} & sizes(model).keys())])
    assert {tuple(s) for name, s in sizes(result.model).items() if name in ("c.w", "d.w")} != {
        tuple(sizes(model)["c.w"])
    }
    feeds = image(model)
    assert_close(run(result.model, feeds), masked_reference(model, result.plan, feeds))
    assert result.report.proof is not None
    assert result.report.proof.insensitive == ()


def test_bias_that_a_loop_captures() -> None:
    """A bias that a body reads whole stays whole for it; the convolution outside that shares it gets its own slice."""
    model = loop(own=False, bias=True)
    result = assert_pruned(model, 0.8, preset="a", ignore=("c.w",))
    after = sizes(result.model)
    assert after["d.b"] == [8]
    assert after["d.w"][0] < 8
    feeds = image(model)
    assert_close(run(result.model, feeds), masked_reference(model, result.plan, feeds))


def loop_beside_an_if() -> ModelProto:
    """Use the names of an If's branch in the body of a loop, too."""
    model = loop(own=True)
    t, y = begin("flag")

    def branch(name: str) -> GraphProto:
        def build(b: Tiny) -> str:
            weight = b.random(8, 8, 3, 3, name="own", scale=0.2)
            step = b.node("Conv", y, weight, name="step", pads=[1] * 4)
            flat = b.node("Reshape", step, b.constant([1, 8, 24], name="flat"), name=f"{name}.there")
            return b.node("Reshape", flat, b.constant(SHAPE, name="back"), name="next" if name == "p" else "q.out")

        return body(name, build)

    y = t.conv(choose(t, "flag", branch("p"), branch("q")), "e", 8, 8, 3)
    (node,) = [node for node in model.graph.node if node.op_type == "Loop"]
    t.nodes.append(NodeProto.FromString(node.SerializeToString()))
    for name, value in zip(node.input, (np.array(3), np.array(True)), strict=False):
        t.constant(value, name=name)
    t.nodes[-1].input[2] = y
    return end(t, t.node("Relu", t.conv(t.node("Relu", t.conv("loop", "c", 8, 8, 3)), "d", 8, 8, 3)))


def test_names_shared_by_a_branch_and_a_loop() -> None:
    """What is edited in a branch is not edited in a loop's body that uses the same names."""
    model = loop_beside_an_if()
    result = assert_pruned(model, 0.7)
    feeds = image(model) | {"flag": np.array(True)}
    (body_before,), (body_after,) = (
        [a.g for node in each.graph.node if node.op_type == "Loop" for a in node.attribute]
        for each in (model, result.model)
    )
    weights = [{tuple(tensor.dims) for tensor in graph.initializer} for graph in (body_before, body_after)]
    assert weights[0] == weights[1]
    plain = taken(prepare(model)[0], {"flag": True})
    del plain.graph.input[1:]
    assert_close(run(result.model, feeds), masked_reference(plain, result.plan, {"x": feeds["x"]}))


# -- the parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [*EVERY, nested, one_after_another], ids=lambda build: build.__name__)
def test_flat_model_computes_the_same(build: Callable[[], ModelProto]) -> None:
    """Laid out side by side, with a Where in the place of every If, a model computes what it computed."""
    model = unique_names(build())
    flat = flatten(model)
    assert "If" not in {node.op_type for node in flat.graph.node}
    names = [name for node in flat.graph.node for name in node.output]
    assert len(names) == len(set(names))
    flags = [value.name for value in model.graph.input if value.type.tensor_type.elem_type == TensorProto.BOOL]
    for values in product((True, False), repeat=len(flags)):
        feeds = image(model) | dict(zip(flags, map(np.array, values), strict=True))
        for have, want in zip(run(flat, feeds), run(model, feeds), strict=True):
            assert np.array_equal(have, want)
    assert all(name in onnx_io.read(flat).shapes for name in names)


@pytest.mark.parametrize("build", EVERY, ids=lambda build: build.__name__)
def test_renaming_changes_nothing_else(build: Callable[[], ModelProto]) -> None:
    """Names become unique over all bodies, the model computes what it computed, and a second time nothing is renamed."""
    model = build()
    renamed = unique_names(model)
    onnx.checker.check_model(renamed, full_check=True)
    assert unique_names(renamed) is renamed
    for flag in (True, False):
        feeds = image(model) | {"flag": np.array(flag)}
        for have, want in zip(run(renamed, feeds), run(model, feeds), strict=True):
            assert np.array_equal(have, want)
    outer = [node.output[0] for node in model.graph.node]
    assert [node.output[0] for node in renamed.graph.node] == outer


def test_models_without_branches_are_not_copied() -> None:
    """Without an If, the model itself comes back: also where two loops use the same names."""
    t, y = begin()
    plain = end(t, y)
    assert flatten(plain) is unique_names(plain) is plain
    looping = loop(own=False)
    (node,) = [node for node in looping.graph.node if node.op_type == "Loop"]
    again = looping.graph.node.add()
    again.CopyFrom(node)
    again.output[0] = again.name = "again"
    assert unique_names(looping) is flatten(looping) is looping


def test_standardisation_inside_a_branch() -> None:
    """A weight that a branch computes from all of another stays whole there, for that reason; the rest prunes."""
    t, y = begin("flag")

    def branch(name: str) -> GraphProto:
        def build(b: Tiny) -> str:
            w = b.random(8, 8, 3, 3, name=f"{name}.w", scale=0.2)
            mean = b.node("ReduceMean", w, axes=[1, 2, 3], keepdims=1, name=f"{name}.mean")
            weight = b.node("Sub", w, mean, name=f"{name}.centred")
            return b.node("Conv", y, weight, name=name, pads=[1] * 4)

        return body(name, build)

    model = end(t, choose(t, "flag", branch("p"), branch("q")))
    result = assert_pruned_in_every_branch(model, "flag", target=0.8)
    assert {sizes(result.model)[f"{name}.w"][1] for name in "pq"} == {8}
    assert any(row.reason == "a weight is computed from all of it" for row in onnxprune.inspect(model).frozen)


def test_deeply_nested_branches() -> None:
    """Twenty choices inside one another are read in a moment, and shrink together."""
    t, y = begin("flag")

    def level(depth: int) -> GraphProto:
        def build(b: Tiny) -> str:
            inner = conv(b, y, f"c{depth}", kernel=1)
            if not depth:
                return inner
            other = body(f"q{depth}", lambda o: o.node("Neg", inner, name=f"q{depth}.out"))
            return choose(b, "flag", level(depth - 1), other, name=f"choice{depth}")

        return body(f"p{depth}", build)

    otherwise = body("last", lambda b: b.node("Tanh", y, name="last.out"))
    model = end(t, choose(t, "flag", level(20), otherwise))
    result = assert_pruned(model, 0.6)
    after = sizes(result.model)
    assert len({after[name][0] for name in after if name.startswith("c0")}) == 1
    feeds = image(model)
    plain = taken(prepare(model)[0], {"flag": False})
    del plain.graph.input[1:]
    assert_close(run(result.model, feeds | {"flag": np.array(False)}), masked_reference(plain, result.plan, feeds))


def test_nothing_removed_means_no_plan() -> None:
    """A model whose branches share names gets an empty plan where nothing is to be removed."""
    assert onnxprune.prune(same_names(), target_mac=1.0).plan.initializers == {}
