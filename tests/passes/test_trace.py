"""A trace gives the values of a whole run at every place, within its bound of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import oracle
from graphs import Tiny
from onnxprune.passes.trace import Memory, Trace
from onnxprune.runtime import in_float32

PLENTY = 1 << 30
LIMITS = {"plenty": PLENTY, "some": 4000, "one-byte": 1}


def residual() -> ModelProto:
    """Convolutions, a residual and a classifier; the batch is dynamic."""
    t = Tiny()
    x = t.input("N", 2, 4, 6)
    y = t.node("Relu", t.conv(x, "a", 2, 6, 3), name="ar")
    z = t.conv(t.node("Relu", t.conv(y, "b", 6, 5, 3), name="br"), "c", 5, 6, 3)
    s = t.node("Add", z, y, name="sum")
    pooled = t.node("Flatten", t.node("GlobalAveragePool", s, name="pool"), name="flat")
    return t.build(t.gemm(pooled, "g", 6, 3))


def shape_arithmetic() -> ModelProto:
    """Reshape to a shape that is computed from another tensor's."""
    t = Tiny()
    x = t.input("N", 2, 4, 6)
    y = t.conv(x, "a", 2, 6)
    n = t.node("Gather", t.node("Shape", y, name="shape"), t.constant(np.array([0])), name="n")
    target = t.node("Concat", n, t.constant(np.array([-1, 4])), axis=0, name="target")
    return t.build(t.linear(t.node("Reshape", y, target, name="flat"), "g", 4, 3))


def constant_nodes() -> ModelProto:
    """Weights in Constant nodes of every kind, one behind Identity, one behind Transpose."""
    t = Tiny()
    x = t.input("N", 4)
    weight = numpy_helper.from_array(t.rng.standard_normal((4, 5)).astype(np.float32))
    t.nodes.append(helper.make_node("Constant", [], ["w"], value=weight))
    t.nodes.append(helper.make_node("Constant", [], ["two"], value_float=2.0))
    t.nodes.append(helper.make_node("Constant", [], ["shift"], value_floats=[1.0, 2.0, 3.0, 4.0, 5.0]))
    y = t.node("MatMul", x, t.node("Identity", "w", name="alias"), name="y")
    y = t.node("Add", t.node("Mul", y, "two", name="m"), "shift", name="s")
    turned = t.node("Transpose", t.random(3, 5, name="v"), name="turned")
    return t.build(t.node("MatMul", y, turned, name="z"))


def branches() -> ModelProto:
    """An If whose branches read outer tensors, one of them only there."""
    t = Tiny()
    x = t.input("N", 4)
    y, z = t.node("Relu", x, name="y"), t.node("Neg", x, name="z")
    other = t.random(4, name="other")
    total = t.node("ReduceSum", x, name="total", keepdims=0)
    condition = t.node("Greater", total, t.constant(np.float32(0)), name="condition")
    out = helper.make_tensor_value_info("branch", TensorProto.FLOAT, None)
    then = helper.make_graph([helper.make_node("Mul", [z, other], ["branch"])], "then", [], [out])
    out = helper.make_tensor_value_info("branch2", TensorProto.FLOAT, None)
    otherwise = helper.make_graph([helper.make_node("Sub", [y, z], ["branch2"])], "else", [], [out])
    r = t.node("If", condition, then_branch=then, else_branch=otherwise, name="r")
    return t.build(t.node("Add", r, t.node("Tanh", y, name="t"), name="s"))


def typed(model: ModelProto, kind: int) -> ModelProto:
    """The same model in another type."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    return model


def two_outputs() -> ModelProto:
    """A node with two outputs, one of them read much later, and one without any input."""
    t = Tiny()
    x = t.input("N", 6)
    a, b = t.node("Split", x, t.constant(np.array([2, 4])), name="parts", outputs=2, axis=1)
    t.nodes.append(helper.make_node("RandomNormalLike", ["x"], ["unused"], seed=1.0))
    y = t.gemm(t.node("Relu", t.gemm(b, "g", 4, 5), name="r"), "h", 5, 2)
    return t.build(t.node("Add", y, a, name="s"))


MODELS: dict[str, Callable[[], ModelProto]] = {
    "residual": residual,
    "shape-arithmetic": shape_arithmetic,
    "constant-nodes": constant_nodes,
    "branches": branches,
    "two-outputs": two_outputs,
    "fp16": lambda: typed(residual(), TensorProto.FLOAT16),
    "double": lambda: typed(residual(), TensorProto.DOUBLE),
}
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
every_limit = pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)


def feeds_of(model: ModelProto, sizes: Sequence[int] = (2, 3, 1)) -> list[dict[str, np.ndarray]]:
    """Random inputs of several batch sizes."""
    rng = np.random.default_rng(5)
    value = model.graph.input[0]
    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:]
    dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    return [{"x": rng.standard_normal((n, *shape)).astype(dtype)} for n in sizes]


def computed(model: ModelProto) -> list[str]:
    """Tensors that nodes compute from the input, in order."""
    fixed = {tensor.name for tensor in model.graph.initializer}
    names = []
    for node in model.graph.node:
        if all(name in fixed for name in node.input) and not any(a.HasField("g") for a in node.attribute):
            fixed.update(node.output)
        else:
            names += [name for name in node.output if name != "unused"]
    return names


def whole(model: ModelProto, names: Sequence[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Tensors as a run of the whole model gives them."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    del exposed.graph.output[:]
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    wide = in_float32(exposed)  # onnxruntime cannot run convolutions in double
    return oracle.run(exposed, feed) if wide is None else oracle.run(wide, {"x": feed["x"].astype(np.float32)})


def assert_same(have: np.ndarray, want: np.ndarray) -> None:
    """Equal up to the order of sums; models in double run in float32."""
    assert have.shape == want.shape
    tolerance = 5e-3 if want.dtype == np.float16 else 1e-5
    assert np.allclose(have, want, rtol=tolerance, atol=tolerance)


def walk(trace: Trace, names: Sequence[str], n_feeds: int) -> Iterator[tuple[int, str, np.ndarray]]:
    """Ask for every tensor at its place, feed by feed."""
    place = 0
    for name in names:
        place = max(place, trace.place_of(name))
        for index in range(n_feeds):
            (value,) = trace.values(index, place, [name])
            yield index, name, value
        trace.release(name)


@every_model
@every_limit
def test_values_are_those_of_a_whole_run(build: Callable[[], ModelProto], limit: int) -> None:
    """Every tensor has, for feeds of different sizes, the value of a whole run, also where all must be run again."""
    model = build()
    feeds, names, memory = feeds_of(model), computed(model), Memory(limit)
    expected = [dict(zip(names, whole(model, names, feed), strict=True)) for feed in feeds]
    trace = Trace(model, feeds, names, memory)
    seen = 0
    for index, name, value in walk(trace, names, len(feeds)):
        assert_same(value, expected[index][name])
        assert memory.held <= memory.peak <= limit
        seen += 1
    assert seen == len(names) * len(feeds)
    trace.close()
    assert memory.held == 0


@every_model
def test_a_wanted_tensor_can_be_asked_for_late(build: Callable[[], ModelProto]) -> None:
    """What was announced stays available at the end, until it is released; its memory is given back then."""
    model = build()
    feeds, names, memory = feeds_of(model), computed(model), Memory(PLENTY)
    expected = whole(model, names, feeds[0])
    trace = Trace(model, feeds, names, memory)
    trace.values(0, max(map(trace.place_of, names)) // 2, [])
    place = max(map(trace.place_of, names))
    for have, want in zip(trace.values(0, place, names), expected, strict=True):
        assert_same(have, want)
    for name in names:
        trace.release(name)
    trace.values(0, place, [])
    assert memory.held == 0


@every_model
@every_limit
def test_staying_leaves_the_trace_where_it_is(build: Callable[[], ModelProto], limit: int) -> None:
    """Looking ahead neither moves a trace nor takes up memory, and what is asked next is unaffected."""
    model = build()
    feeds, names, memory = feeds_of(model), computed(model), Memory(limit)
    last, middle = names[-1], names[len(names) // 2]
    trace = Trace(model, feeds, (), memory)
    for index, feed in enumerate(feeds):
        want_middle, want_last = whole(model, [middle, last], feed)
        trace.values(index, trace.place_before(middle), [])
        held = memory.held
        assert_same(trace.values(index, trace.place_of(last), [last], stay=True)[0], want_last)
        assert memory.held == held
        assert_same(trace.values(index, trace.place_of(middle), [middle])[0], want_middle)
        assert_same(trace.values(index, trace.place_of(last), [last])[0], want_last)


def test_only_live_tensors_are_held() -> None:
    """After a classifier's pooling nothing but the pooled features and what is wanted is held."""
    model = residual()
    feeds, memory = feeds_of(model), Memory(PLENTY)
    trace = Trace(model, feeds, (), memory)
    for index in range(len(feeds)):
        trace.values(index, trace.place_before("c"), ["br"])
    assert memory.held == sum(4 * len(feed["x"]) * 24 * (5 + 6) for feed in feeds)
    for index in range(len(feeds)):
        trace.values(index, trace.place_of("pool"), [])
    assert memory.held == sum(4 * len(feed["x"]) * 6 for feed in feeds)
    assert memory.peak > memory.held


def test_traces_share_one_bound() -> None:
    """Two traces together stay within the limit, and closing one gives back no more than its own share."""
    model = residual()
    feeds, memory = feeds_of(model), Memory(8000)
    first, second = (Trace(model, feeds, (), memory) for _ in range(2))
    for trace in (first, second):
        for index in range(len(feeds)):
            trace.values(index, trace.place_before("c"), ["br"])
            assert memory.held <= 8000
    shared = memory.held
    first.close()
    assert 0 < memory.held < shared
    second.close()
    assert memory.held == 0


def changed(model: ModelProto, name: str, value: np.ndarray) -> ModelProto:
    """The model with another value for a constant."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    for tensor in other.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(value, name))
    return other


@every_limit
def test_replaced_constants_are_read_by_later_nodes(limit: int) -> None:
    """A new weight takes effect at its node, also where an earlier piece had been prepared with the old one."""
    model = residual()
    feeds, memory = feeds_of(model), Memory(limit)
    weight = np.random.default_rng(2).standard_normal((6, 5, 3, 3)).astype(np.float32)
    trace = Trace(model, feeds, (), memory)
    for index in range(len(feeds)):
        trace.values(index, trace.place_of("c"), ["c"], stay=True)
    trace.values(0, trace.place_before("c"), ["br"])
    trace.replace("c.w", weight.astype(np.float64))
    for index, feed in enumerate(feeds):
        have = trace.values(index, trace.place_of("g"), ["g"])[0]
        assert_same(have, whole(changed(model, "c.w", weight), ["g"], feed)[0])
        assert not np.allclose(have, whole(model, ["g"], feed)[0], atol=1e-3)


@every_limit
def test_a_piece_is_prepared_anew_for_new_constants(limit: int) -> None:
    """The very piece that has just run gives other values once a constant of it was replaced."""
    model = residual()
    feeds = feeds_of(model)
    trace = Trace(model, feeds, (), Memory(limit))
    before = trace.values(0, trace.place_of("c"), ["c"], stay=True)[0]
    trace.replace("c.b", np.arange(6))
    after = trace.values(0, trace.place_of("c"), ["c"], stay=True)[0]
    assert_same(after, whole(changed(model, "c.b", np.arange(6, dtype=np.float32)), ["c"], feeds[0])[0])
    assert not np.allclose(after, before)


def test_what_has_run_keeps_the_old_constant() -> None:
    """Replacing the weight of a node that has run changes nothing that is held."""
    model = residual()
    feeds = feeds_of(model)
    trace = Trace(model, feeds, (), Memory(PLENTY))
    trace.values(0, trace.place_of("c"), ["c"])
    trace.replace("c.w", np.zeros((6, 5, 3, 3)))
    assert_same(trace.values(0, trace.place_of("g"), ["g"])[0], whole(model, ["g"], feeds[0])[0])


def test_a_constant_behind_other_nodes_can_be_replaced() -> None:
    """Constant nodes, and constants behind Identity and Transpose, take new values, too."""
    model = constant_nodes()
    feeds = feeds_of(model)
    rng = np.random.default_rng(1)
    w, v = rng.standard_normal((4, 5)).astype(np.float32), rng.standard_normal((3, 5)).astype(np.float32)
    trace = Trace(model, feeds, (), Memory(PLENTY))
    trace.replace("w", w)
    trace.replace("v", v)
    want = (2 * feeds[0]["x"] @ w + np.arange(1, 6, dtype=np.float32)) @ v.T
    assert_same(trace.values(0, trace.place_of("z"), ["z"])[0], want)


@every_limit
def test_rewired_inputs_are_read(limit: int) -> None:
    """A node without a bias gets one, another node reads a vector of its own; the first reader keeps the old one."""
    t = Tiny()
    x = t.input("N", 4)
    y = t.gemm(x, "a", 4, 4)
    t.nodes.append(helper.make_node("Gemm", [y, t.random(4, 4, name="b.w"), "a.b"], ["b"], name="b"))
    t.nodes.append(helper.make_node("Gemm", ["b", t.random(4, 4, name="c.w")], ["c"], name="c"))
    model = t.build("c")
    feeds = feeds_of(model)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    one, two = np.arange(4.0, dtype=np.float32), -np.ones(4, np.float32)
    trace = Trace(model, feeds, (), Memory(limit))
    trace.rewire("b", 2, "b/bias", one)
    trace.rewire("c", 2, "c/bias", two)
    for index, feed in enumerate(feeds):
        want = ((feed["x"] @ values["a.w"] + values["a.b"]) @ values["b.w"] + one) @ values["c.w"] + two
        assert_same(trace.values(index, trace.place_of("c"), ["c"])[0], want)


@every_limit
def test_constants_added_behind_a_node_reach_its_readers(limit: int) -> None:
    """An offset behind a node shows in the tensor of the node's own name and in all that follows."""
    t = Tiny()
    y = t.linear(t.input("N", 4), "a", 4, 5)
    model = t.build(t.linear(t.node("Relu", y, name="r"), "b", 5, 3))
    feeds = feeds_of(model)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    shift, end = np.arange(5.0, dtype=np.float32), np.ones(3, np.float32)
    trace = Trace(model, feeds, ["a", "b"], Memory(limit))
    trace.values(0, trace.place_of("r"), ["r"], stay=True)
    trace.add_behind("a", "a/bias", shift)
    trace.add_behind("b", "b/bias", end)
    for index, feed in enumerate(feeds):
        want = feed["x"] @ values["a.w"] + shift
        assert_same(trace.values(index, trace.place_of("a"), ["a"])[0], want)
        want = np.maximum(want, 0) @ values["b.w"] + end
        assert_same(trace.values(index, trace.place_of("b"), ["b"])[0], want)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE], ids=["fp16", "double"])
def test_new_constants_have_the_type_of_the_graph(kind: int) -> None:
    """A bias that is rewired in, or a weight that is replaced, runs in the graph's own type."""
    model = typed(residual(), kind)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    feeds = feeds_of(model)
    bias, weight = np.arange(6, dtype=dtype), np.ones((6, 5, 3, 3), dtype)
    other = changed(changed(model, "c.w", weight), "c.b", bias)
    trace = Trace(model, feeds, (), Memory(PLENTY))
    trace.replace("c.w", weight)
    trace.rewire("c", 2, "c/bias", bias)
    assert_same(trace.values(0, trace.place_of("g"), ["g"])[0], whole(other, ["g"], feeds[0])[0])


def test_places_count_nodes() -> None:
    """An input is there from the start; a node's output is there once the nodes up to it have run."""
    trace = Trace(residual(), feeds_of(residual()), (), Memory(PLENTY))
    assert trace.place_of("x") == 0
    assert trace.place_of("a") == 1
    assert trace.place_before("a") == 0
    assert trace.place_of("sum") == trace.place_before("sum") + 1
    assert_same(trace.values(0, 0, ["x"])[0], feeds_of(residual())[0]["x"])
