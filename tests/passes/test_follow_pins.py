"""Lengths that enter computations on values: numbers of channels are pinned to what they were, dynamic lengths are not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxprune
from graphs import Tiny
from oracle import assert_close, masked_reference, run

TOKENS, FEATURES, HEADS, SIZE = 5, 8, 2, 6
SCORES = ("q.w/1", "q.b/0")  # what stands for masked queries where they meet keys
PINNED = "its length enters the computation on values"
Lengths = Mapping[str, int]


def feeds_for(model: ModelProto, lengths: Lengths) -> dict[str, np.ndarray]:
    """Random values for the only input, with ``lengths`` for its dynamic axes."""
    (value,) = model.graph.input
    dims = value.type.tensor_type.shape.dim
    shape = [lengths.get(dim.dim_param, 1) if dim.dim_param else dim.dim_value for dim in dims]
    return {value.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}


def assert_pruned_at(
    model: ModelProto, lengths: Sequence[Lengths], target: float = 0.75, zero: Sequence[str] = (), **options: object
) -> onnxprune.Result:
    """The pruned model is proved, and equals the masked original at sizes that the program has not seen."""
    onnx.checker.check_model(model, full_check=True)
    result = onnxprune.prune(model, target_mac=target, **options)
    onnx.checker.check_model(result.model, full_check=True)
    assert result.report.proof is not None
    assert result.report.proof.ok
    assert result.plan.initializers
    again = onnxprune.apply(model, onnxprune.Plan.from_json(json.dumps(result.plan.to_json())))
    assert again.model == result.model
    for each in lengths:
        feeds = feeds_for(model, each)
        assert_close(run(result.model, feeds), masked_reference(model, result.plan, feeds, zero))
    return result


def constants(model: ModelProto) -> list[list[float]]:
    """Values of all small constants."""
    arrays = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    return [array.ravel().tolist() for array in arrays if array.size <= 8]


def removed(result: onnxprune.Result) -> set[str]:
    """Tensor axes (``tensor/axis``) that the plan cuts."""
    return {f"{name}/{axis}" for name, axes in result.plan.initializers.items() for axis in axes}


def dim(t: Tiny, y: str, axis: int, *, vector: bool = False) -> str:
    """One length of a tensor, as exporters compute it."""
    return t.node("Gather", t.node("Shape", y), t.constant([axis] if vector else axis), axis=0)


def as_float(t: Tiny, y: str) -> str:
    return t.node("Cast", y, to=TensorProto.FLOAT)


# -- attention scales --------------------------------------------------------------------------------------------------


def divided(t: Tiny, q: str, k: str) -> str:
    """Divide the scores by the root of the heads' size."""
    last = t.node("Slice", t.node("Shape", q), t.constant([-1]), t.constant([2**63 - 1]))
    return t.node("Div", _scores(t, q, k), t.node("Sqrt", as_float(t, last)))


def multiplied(t: Tiny, q: str, k: str) -> str:
    """Multiply the scores by one over the root."""
    root = t.node("Sqrt", as_float(t, dim(t, q, 3)))
    return t.node("Mul", _scores(t, q, k), t.node("Div", t.constant(1.0), root))


def power(t: Tiny, q: str, k: str) -> str:
    """Multiply the queries by the size to the power of minus a half."""
    return _scores(t, t.node("Mul", q, t.node("Pow", as_float(t, dim(t, q, 3)), t.constant(-0.5))), k)


def both_sides(t: Tiny, q: str, k: str) -> str:
    """Multiply queries and keys by the fourth root each, as torch.nn.functional.scaled_dot_product_attention exports."""
    scale = t.node("Sqrt", t.node("Div", t.constant(1.0), t.node("Sqrt", as_float(t, dim(t, q, 3)))))
    return _scores(t, t.node("Mul", q, scale), t.node("Mul", k, scale))


def _scores(t: Tiny, q: str, k: str) -> str:
    return t.node("MatMul", q, t.node("Transpose", k, perm=[0, 1, 3, 2]), name="scores")


def attention(
    scale: Callable[[Tiny, str, str], str],
    tokens: int | str,
    batch: int | str,
    pool: Callable[[Tiny, str], str] | None = None,
) -> ModelProto:
    """Attend with two heads of six dimensions, all shapes computed from the tensors'; ``pool`` the tokens."""
    t = Tiny()
    x = t.input(batch, tokens, FEATURES)

    def project(name: str) -> str:
        y = t.node("Add", t.linear(x, name, FEATURES, HEADS * SIZE), t.random(HEADS * SIZE, name=f"{name}.b"))
        outer = t.node("Slice", t.node("Shape", y), t.constant([0]), t.constant([2]))
        y = t.node("Reshape", y, t.node("Concat", outer, t.constant([HEADS, SIZE]), axis=0))
        return t.node("Transpose", y, perm=[0, 2, 1, 3])

    q, k, v = (project(name) for name in "qkv")
    mixed = t.node("MatMul", t.node("Softmax", scale(t, q, k), axis=-1), v, name="mix")
    y = t.node("Transpose", mixed, perm=[0, 2, 1, 3])
    outer = t.node("Slice", t.node("Shape", y), t.constant([0]), t.constant([2]))
    y = t.node("Reshape", y, t.node("Concat", outer, t.constant([HEADS * SIZE]), axis=0))
    return t.build(t.linear(pool(t, y) if pool else y, "o", HEADS * SIZE, 3))


def mean_over_tokens(t: Tiny, y: str) -> str:
    """Divide the sum over tokens by their number."""
    return t.node("Div", t.node("ReduceSum", y, t.constant([1]), keepdims=0), as_float(t, dim(t, y, 1)))


SCALES = {divided: SIZE**0.5, multiplied: SIZE**-0.5, power: SIZE**-0.5, both_sides: SIZE**-0.25}


@pytest.mark.parametrize("pool", [None, mean_over_tokens], ids=["tokens", "mean"])
@pytest.mark.parametrize(
    ("tokens", "batch", "lengths"),
    [
        pytest.param(TOKENS, 1, [{}], id="static"),
        pytest.param("T", 1, [{"T": 64}, {"T": 9}, {"T": 1}], id="any_tokens"),
        pytest.param(TOKENS, "N", [{"N": 1}, {"N": 3}], id="any_batch"),
        pytest.param("T", "N", [{"T": 7, "N": 3}, {"T": 100, "N": 2}], id="any"),
    ],
)
@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: scale.__name__)
def test_attention_keeps_its_scale(
    scale: Callable, tokens: int | str, batch: int | str, lengths: Sequence[Lengths], pool: Callable | None
) -> None:
    """Heads that lost dimensions divide their scores by the root of the size that they had, for any number of tokens."""
    result = assert_pruned_at(attention(scale, tokens, batch, pool), lengths, 0.7, SCORES)
    assert len(result.plan.initializers["q.w"][1]) < HEADS * SIZE
    assert any(np.allclose(values, SCALES[scale]) for values in constants(result.model))
    assert (pool is not None) == any(node.op_type == "ReduceSum" for node in result.model.graph.node)


def test_scale_stays_computed_where_nothing_changes_it() -> None:
    """Whole heads leave the size of a head alone: its scale is computed as before."""
    model = attention(divided, "T", "N")
    result = assert_pruned_at(model, [{"T": 7, "N": 3}], 0.7, SCORES, attention="heads")
    assert [node.op_type for node in result.model.graph.node] == [node.op_type for node in model.graph.node]


# -- lengths of dynamic axes -------------------------------------------------------------------------------------------


def convolutions(middle: Callable[[Tiny, str], str], width: int | str = "W", batch: int | str = 1) -> ModelProto:
    """Build Conv ``a`` -> Relu -> Conv ``b`` -> Relu -> ``middle`` -> Conv ``z``."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input(batch, 2, 4, width), "a", 2, 8, 3))
    return t.build(t.conv(middle(t, t.node("Relu", t.conv(y, "b", 8, 8, 3))), "z", 8, 3))


def by_channels(t: Tiny, y: str) -> str:
    """Divide by the number of channels."""
    return t.node("Div", y, as_float(t, dim(t, y, 1)))


def by_width(t: Tiny, y: str) -> str:
    """Divide by the width."""
    return t.node("Div", y, as_float(t, dim(t, y, 3)))


def by_both(t: Tiny, y: str) -> str:
    """Divide by the number of channels times the width."""
    return t.node("Div", y, as_float(t, t.node("Mul", dim(t, y, 1), dim(t, y, 3))))


def by_both_apart(t: Tiny, y: str) -> str:
    """Divide by the number of channels, then by the width."""
    return by_width(t, by_channels(t, y))


def by_size(t: Tiny, y: str) -> str:
    """Divide by the number of elements."""
    return t.node("Mul", t.node("Div", y, as_float(t, t.node("Size", y))), t.constant(100.0))


def by_half_the_width(t: Tiny, y: str) -> str:
    """Divide by the number of channels times half the width, rounded down."""
    half = t.node("Div", dim(t, y, 3), t.constant(2))
    return t.node("Mul", t.node("Div", y, as_float(t, t.node("Mul", dim(t, y, 1), half))), t.constant(100.0))


def by_flattened(t: Tiny, y: str) -> str:
    """Divide by the length of all but the batch, flattened."""
    flat = t.node("Reshape", t.node("Reshape", y, t.constant([0, 8, -1])), t.constant([0, -1]))
    scaled = t.node("Div", flat, as_float(t, dim(t, flat, 1)))
    return t.node("Mul", t.node("Reshape", scaled, t.constant([0, 8, 4, -1])), t.constant(100.0))


def by_grouped(t: Tiny, y: str) -> str:
    """Divide by the number of elements of a group of channels (GroupNorm, spelled out)."""
    groups = t.node("Reshape", y, t.constant([0, 2, -1]))
    scaled = t.node("Div", groups, as_float(t, dim(t, groups, 2)))
    return t.node("Mul", t.node("Reshape", scaled, t.constant([0, 8, 4, -1])), t.constant(100.0))


def by_parity(t: Tiny, y: str) -> str:
    """Add the number of channels where the width is even."""
    odd = t.node("Mod", dim(t, y, 3), t.constant(2))
    return t.node("Add", y, as_float(t, t.node("Mul", dim(t, y, 1), t.node("Sub", t.constant(1), odd))))


DYNAMIC = [
    by_channels, by_width, by_both, by_both_apart, by_size, by_parity,
    *(pytest.param(by) for by in (by_half_the_width, by_flattened, by_grouped)),
]  # fmt: skip


@pytest.mark.parametrize("middle", DYNAMIC, ids=lambda middle: middle.__name__)
def test_dynamic_lengths_are_not_pinned(middle: Callable[[Tiny, str], str]) -> None:
    """What depends on a dynamic axis still does: the pruned model is right at widths it has never been run at."""
    model = convolutions(middle)
    widths = [{"W": width} for width in (64, 65, 32, 31, 7, 2)]
    assert_pruned_at(model, widths)
    try:
        assert_pruned_at(model, widths, 0.9, ignore=("a.w",))
    except onnxprune.BudgetError:
        assert PINNED in {row.reason for row in onnxprune.inspect(model).frozen}


@pytest.mark.parametrize(
    ("middle", "pinned"),
    [(by_channels, True), (by_width, True), (by_both_apart, True), (by_both, False), (by_size, False)],
)
def test_what_cannot_be_pinned_freezes(middle: Callable[[Tiny, str], str], pinned: bool) -> None:
    """Channels whose number is multiplied with a dynamic length stay, with that reason; others shrink."""
    model = convolutions(middle)
    result = assert_pruned_at(model, [{"W": 10}])
    assert ("b.w/0" in removed(result)) == pinned
    told = [row.reason for row in onnxprune.inspect(model).frozen]
    assert (PINNED in told) != pinned


@pytest.mark.parametrize("middle", [by_channels, by_both, by_size, by_grouped, by_flattened, by_half_the_width])
def test_static_models_pin_everything(middle: Callable[[Tiny, str], str]) -> None:
    """Where the file declares every length, any number computed from them is a constant."""
    result = assert_pruned_at(convolutions(middle, 6), [{}], 0.9, ignore=("a.w",))
    assert "b.w/0" in removed(result)


def test_dynamic_batch_is_not_pinned() -> None:
    """A mean over the batch (batch statistics) is divided by the batch that is fed, whatever the channels do."""

    def middle(t: Tiny, y: str) -> str:
        total = t.node("ReduceSum", y, t.constant([0]), keepdims=1)
        count = as_float(t, t.node("Mul", dim(t, y, 0), t.constant(1)))
        return t.node("Sub", y, t.node("Div", t.node("Div", total, count), as_float(t, dim(t, y, 1))))

    result = assert_pruned_at(convolutions(middle, 6, "N"), [{"N": 1}, {"N": 2}, {"N": 5}])
    assert "b.w/0" in removed(result)


def test_only_the_reader_gets_the_constant() -> None:
    """A shape that is read by a reshape, too, goes on being computed for that."""

    def middle(t: Tiny, y: str) -> str:
        shape = t.node("Shape", y, name="shape")
        channels = t.node("Gather", shape, t.constant(1), axis=0)
        return t.node("Reshape", t.node("Div", y, as_float(t, channels)), shape, name="back")

    model = convolutions(middle, "W", "N")
    result = assert_pruned_at(model, [{"W": 10, "N": 3}])
    (node,) = [node for node in result.model.graph.node if node.name == "back"]
    assert node.input[1] == "shape"
    assert "b.w/0" in removed(result)


def view_for_its_size(t: Tiny, y: str) -> str:
    """Divide by the length of a view that nothing else reads."""
    flat = t.node("Reshape", y, t.constant([0, -1]), name="view")
    return t.node("Mul", t.node("Div", y, as_float(t, dim(t, flat, 1))), t.constant(100.0))


def test_view_that_only_feeds_a_pinned_length() -> None:
    """A reshape that nothing but a pinned length needed may go, and the proof does not miss it."""
    result = assert_pruned_at(convolutions(view_for_its_size, 6), [{}])
    assert "b.w/0" in removed(result)


def test_prefix_tokens_beside_dynamic_ones() -> None:
    """Learned tokens in front of any number of others: what their number scales is right for every number."""
    t = Tiny()
    y = t.node("Relu", t.linear(t.input(1, "T", 4), "a", 4, 8))
    y = t.node("Concat", t.random(1, 3, 8, name="prefix"), y, axis=1)
    scale = as_float(t, t.node("Mul", dim(t, y, 1), dim(t, y, 2)))
    y = t.node("Mul", t.node("Div", y, scale), t.constant(100.0))
    model = t.build(t.linear(t.node("Relu", t.linear(y, "b", 8, 8)), "z", 8, 3))
    assert_pruned_at(model, [{"T": tokens} for tokens in (64, 10, 1)])


# -- reshape targets and bounds ----------------------------------------------------------------------------------------


def target_of_another_tensor(half: bool) -> ModelProto:
    """Reshape ``b`` to a target whose channels are twice those of ``a``, which shrinks on its own; ``half`` the width."""
    t = Tiny()
    a = t.node("Relu", t.conv(t.input(1, 2, 4, "W"), "a", 2, 4, 3))
    b = t.node("Relu", t.conv(a, "b", 4, 8, 3))
    doubled = t.node("Mul", dim(t, a, 1, vector=True), t.constant([2]))
    width = dim(t, b, 3, vector=True)
    if half:
        width = t.node("Div", width, t.constant([2]))
    target = t.node("Concat", t.constant([1]), doubled, width, t.constant([-1]), axis=0)
    return t.build(t.conv(t.node("Reshape", b, target), "z", 8, 3))


@pytest.mark.parametrize("half", [False, pytest.param(True)], ids=["width", "half_the_width"])
def test_target_with_a_dynamic_part_is_not_replaced(half: bool) -> None:
    """A target that follows neither by itself nor by a constant in it is not frozen into one that holds a width."""
    model = target_of_another_tensor(half)
    try:
        assert_pruned_at(model, [{"W": 64}, {"W": 32}, {"W": 10}], 0.8)
    except onnxprune.BudgetError:
        assert any("would not follow" in row.reason for row in onnxprune.inspect(model).frozen)


@pytest.mark.parametrize("batch", [1, "N"])
@pytest.mark.parametrize("parts", [2, 4])
def test_chunk_bounds_of_channels_follow(parts: int, batch: int | str) -> None:
    """Bounds computed from the number of channels alone move with it, also where the batch is dynamic."""

    def middle(t: Tiny, y: str) -> str:
        whole = dim(t, y, 1, vector=True)
        share = t.node("Div", t.node("Add", whole, t.constant([parts - 1])), t.constant([parts]))
        bounds = [t.node("Mul", share, t.constant([part])) for part in range(parts + 1)]
        pieces = [t.node("Slice", y, *bounds[part : part + 2], t.constant([1])) for part in range(parts)]
        return t.node("Concat", *(t.node("Tanh", piece) if i else piece for i, piece in enumerate(pieces)), axis=1)

    result = assert_pruned_at(convolutions(middle, 6, batch), [{"N": 1}, {"N": 3}])
    assert "b.w/0" in removed(result)


def test_windows_of_a_dynamic_image() -> None:
    """Windows of two by two, their number computed from the image's size, at several sizes (a part of Swin)."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input("N", 2, "H", "W"), "a", 2, 8, 3))
    n, c, h, w = (dim(t, y, axis, vector=True) for axis in range(4))
    two = t.constant([2])
    rows, columns = t.node("Div", h, two), t.node("Div", w, two)
    y = t.node("Reshape", y, t.node("Concat", n, c, rows, two, columns, two, axis=0))
    y = t.node("Transpose", y, perm=[0, 2, 4, 3, 5, 1])
    y = t.node("Reshape", y, t.node("Concat", t.constant([-1]), t.constant([4]), c, axis=0))
    y = t.node("Relu", t.linear(y, "m", 8, 8))
    y = t.node("Reshape", y, t.node("Concat", n, rows, columns, two, two, t.constant([-1]), axis=0))
    y = t.node("Transpose", y, perm=[0, 5, 1, 3, 2, 4])
    y = t.node("Reshape", y, t.node("Concat", n, t.constant([-1]), h, w, axis=0))
    model = t.build(t.conv(y, "z", 8, 3))
    result = assert_pruned_at(model, [{"N": 1, "H": 4, "W": 6}, {"N": 3, "H": 10, "W": 2}], 0.7)
    assert {"a.w/0", "m.w/1"} & removed(result)


def test_length_that_is_an_output() -> None:
    """A number of channels that the graph puts out stays true: those channels stay."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input(1, 2, 4, 6), "a", 2, 8, 3))
    t.node("Gather", t.node("Shape", y), t.constant(1), axis=0, name="channels")
    y = t.node("Relu", t.conv(y, "b", 8, 8, 3))
    t.conv(y, "z", 8, 3)
    outputs = [
        helper.make_tensor_value_info("z", TensorProto.FLOAT, (1, 3, 4, 6)),
        helper.make_tensor_value_info("channels", TensorProto.INT64, ()),
    ]
    graph = helper.make_graph(t.nodes, "lengths", t.inputs, outputs, t.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    result = assert_pruned_at(model, [{}], 0.85)
    assert "a.w/0" not in removed(result)
    assert "b.w/0" in removed(result)


def test_count_beside_a_length_that_data_decide() -> None:
    """A number of channels that ends in a shape, beside one that an input gives, would have to follow: it stays."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input(1, 2, 4, 6), "a", 2, 8, 3))
    rows = t.input(1, name="rows", kind=TensorProto.INT64)
    y = t.node("Reshape", y, t.node("Concat", rows, dim(t, y, 1, vector=True), t.constant([-1]), axis=0))
    y = t.node("Relu", t.node("Reshape", y, t.constant([1, -1, 4, 6])))
    model = t.build(t.conv(t.node("Relu", t.conv(y, "b", 8, 8, 3)), "z", 8, 3))
    result = onnxprune.prune(model, target_mac=0.8)
    assert removed(result).isdisjoint({"a.w/0", "b.w/1"})
    feeds = {**image_of(model), "rows": np.array([1])}
    assert_close(run(result.model, feeds), masked_reference(model, result.plan, feeds, ()))


def image_of(model: ModelProto) -> dict[str, np.ndarray]:
    """Random values for the first input."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    shape = [dim.dim_value for dim in dims]
    return {model.graph.input[0].name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}


@pytest.mark.parametrize("outputs", range(3, 13))
def test_arithmetic_that_is_right_by_chance_freezes(outputs: int) -> None:
    """A number of parts that is divided out: with one column left of each it comes out as 0, which means "as before"."""
    t = Tiny()
    y = t.linear(t.input("n", 5, 4), "a", 4, 12)
    batch, length = (t.node("Gather", t.node("Shape", y), t.constant(place)) for place in ([0], [2]))
    shape = t.node("Concat", batch, t.constant([5]), t.node("Div", length, t.constant(4)), t.constant([4]), axis=0)
    y = t.node("ReduceSum", t.node("Reshape", y, shape), t.constant([2]), keepdims=0)
    model = t.build(t.linear(y, "z", 4, outputs))
    assert "computed by arithmetic that would not follow" in str(onnxprune.inspect(model).to_json()["frozen"])
