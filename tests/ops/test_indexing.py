"""Operators that index by values: axes they look up freeze, axes they move along pass."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

import oracle
from graphs import Tiny, perceptron, sandwich
from oracle import Case

INT64, BOOL = TensorProto.INT64, TensorProto.BOOL
INDEXED = "it is indexed by computed values"
LONE = "one index is taken out alone"
FIXED = "axis that cannot shrink"


def frozen(op: str, text: str, *names: str) -> dict[str, tuple[str, str, str]]:
    """Expect these axes (default: the channels before the operator) to be frozen by it."""
    return dict.fromkeys(names or ("a.w/0", "a.b/0"), ("op", op, text))


def two_convs(t: Tiny, channels: int = 6) -> tuple[str, str]:
    """Compute data and updates of shape (1, channels, 4, 6) by convolutions ``a`` and ``b``."""
    x = t.input(1, 2, 4, 6)
    return t.conv(x, "a", 2, channels), t.conv(x, "b", 2, 6)


def choose(*shape: int, axis: int, size: int) -> np.ndarray:
    """Distinct random indices below ``size`` along an axis."""
    rng = np.random.default_rng(0)
    order = rng.random([size if a == axis else n for a, n in enumerate(shape)]).argsort(axis)
    return order.take(np.arange(shape[axis]), axis).astype(np.int64)


# -- Gather ----------------------------------------------------------------------------------------------------------


def gather_matrix(indices: Sequence, *, after: int, order: Sequence[int] = ()) -> ModelProto:
    """Gather pooled channels into several axes (``as_strided``), and flatten, after a permutation if there is one."""
    t = Tiny()
    y = t.node("Reshape", t.node("GlobalAveragePool", t.conv(t.input(1, 2, 4, 6), "a", 2, 6)), t.constant([-1]))
    y = t.node("Gather", y, t.constant(indices), name="op", axis=0)
    y = t.node("Transpose", y, perm=order) if order else y
    return t.build(t.gemm(t.node("Reshape", y, t.constant([1, -1])), "z", after, 3))


def gather_maps(indices: Sequence, groups: int) -> ModelProto:
    """Gather maps into groups and channels, and normalise each group's channels by themselves."""
    t = Tiny()
    y = t.node("Gather", t.conv(t.input(1, 2, 4, 6), "a", 2, 6), t.constant(indices), name="op", axis=1)
    y = t.node("ReduceSum", t.node("LeakyRelu", y), t.constant([3, 4]), keepdims=0)
    weight = t.random(6 // groups, 3, name="z.w")
    return t.build(t.node("MatMul", y, weight, name="z"))


# -- GatherElements --------------------------------------------------------------------------------------------------


def gather_sorted() -> ModelProto:
    """Order the rows of one map by another's values (point clouds): both have the same channels."""
    t = Tiny()
    a, b = two_convs(t)
    _, indices = t.node("TopK", a, t.constant([2]), outputs=2, axis=2)
    return t.build(t.conv(t.node("GatherElements", b, indices, name="op", axis=2), "z", 6, 3))


def gather_elements(*shape: int, axis: int, whole: bool = False) -> ModelProto:
    """Gather by constant indices; a convolution of its own reads all channels too where ``whole`` says so."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    size = (1, 6, 4, 6)[axis]
    indices = t.constant(choose(*shape, axis=axis % 4, size=size), "i")
    end = t.node(
        "ReduceMean", t.conv(t.node("GatherElements", y, indices, name="op", axis=axis), "z", shape[1], 3), axes=[2, 3]
    )
    if whole:
        end = t.node("Add", end, t.node("ReduceMean", t.conv(y, "w", 6, 3), axes=[2, 3]))
    return t.build(end)


def gather_input(*, expand: bool) -> ModelProto:
    """Gather rows by indices that are an input, one for all channels (expanded) or one for each."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    indices = t.input(1, 1 if expand else 6, 2, 6, name="i", kind=INT64)
    if expand:
        indices = t.node("Expand", indices, t.constant([1, 6, 2, 6]))
    return t.build(t.conv(t.node("GatherElements", y, indices, name="op", axis=2), "z", 6, 3))


def gather_features() -> ModelProto:
    """Gather features by constant indices: which of the gathered ones stay is free."""

    def middle(t: Tiny, y: str) -> str:
        return t.node("GatherElements", y, t.constant(choose(4, 5, axis=1, size=6), "i"), name="op", axis=-1)

    return perceptron(middle, after=5)


# -- GatherND --------------------------------------------------------------------------------------------------------


def gather_nd(*tuples: int, order: Sequence[int], batch: int = 0, after: int = 6) -> ModelProto:
    """Look maps, permuted, up by index tuples that are an input; channels end in a linear layer."""
    t = Tiny()
    y = t.node("Transpose", t.conv(t.input(1, 2, 4, 6), "a", 2, 6), perm=order)
    y = t.node("GatherND", y, t.input(*tuples, name="i", kind=INT64), name="op", batch_dims=batch)
    return t.build(t.linear(y, "z", after, 3))


def gather_nd_per_channel() -> ModelProto:
    """Look other pixels up in every channel: channels are a batch of the operator."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    indices = np.random.default_rng(0).integers(0, 4, (6, 5, 2))
    y = t.node(
        "GatherND", t.node("Reshape", y, t.constant([6, 4, 6])), t.constant(indices, "i"), name="op", batch_dims=1
    )
    return t.build(t.linear(t.node("Transpose", y), "z", 6, 3))


# -- Scatter ---------------------------------------------------------------------------------------------------------


def scatter_elements(
    *shape: int, axis: int, op: str = "ScatterElements", opset: int = 18, **attributes: str
) -> ModelProto:
    """Write rows or channels of one map into another."""
    t = Tiny(opset=opset)
    a, b = two_convs(t)
    starts, ends, axes = [0, 0, 0], [*shape[1:]], [1, 2, 3]
    if opset > 9:
        updates = t.node("Slice", b, t.constant(starts), t.constant(ends), t.constant(axes))
    else:
        updates = t.node("Slice", b, starts=starts, ends=ends, axes=axes)
    indices = t.constant(choose(*shape, axis=axis % 4, size=(1, 6, 4, 6)[axis]), "i")
    y = t.node(op, a, indices, updates, name="op", axis=axis, **attributes)
    return t.build(t.conv(t.node("LeakyRelu", y), "z", 6, 3))


def tokens(t: Tiny) -> tuple[str, str]:
    """Compute data of shape (4, 5, 6) and updates of shape (3, 6) by linear layers ``a`` and ``b``."""
    return t.linear(t.input(4, 5, 4), "a", 4, 6), t.linear(t.input(3, 4, name="u"), "b", 4, 6)


def scatter_nd(*, updates: str = "computed", opset: int = 18, **attributes: str) -> ModelProto:
    """Write tokens into others at constant places."""
    t = Tiny(opset=opset)
    data, written = tokens(t)
    if updates == "constant":
        written = t.random(3, 6, name="u.c")
    indices = t.constant([[0, 1], [3, 4], [2, 0]])
    y = t.node("ScatterND", data, indices, written, name="op", **attributes)
    return t.build(t.linear(t.node("LeakyRelu", y), "z", 6, 3))


def scatter_nd_grid() -> ModelProto:
    """Write tokens at a grid of places: indices of three axes, whose last holds the tuples."""
    t = Tiny(opset=18)
    data = t.linear(t.input(4, 5, 4), "a", 4, 6)
    written = t.linear(t.input(3, 2, 4, name="u"), "b", 4, 6)
    indices = t.constant([[[0], [1]], [[3], [2]], [[1], [3]]])
    rows = t.node("Reshape", written, t.constant([3, 2, 1, 6]))
    y = t.node("ScatterND", data, indices, t.node("Tile", rows, t.constant([1, 1, 5, 1])), name="op")
    return t.build(t.linear(t.node("LeakyRelu", y), "z", 6, 3))


def scatter_nd_channels() -> ModelProto:
    """Write single values at index tuples that name channels too."""
    t = Tiny()
    data, _ = tokens(t)
    indices = t.constant([[0, 1, 5], [3, 4, 0], [2, 0, 2]])
    y = t.node("ScatterND", data, indices, t.constant([1.0, 2.0, 3.0]), name="op")
    return t.build(t.linear(t.node("LeakyRelu", y), "z", 6, 3))


def cache(axis: int = -2, *, positions: bool = True) -> ModelProto:
    """Write two rows (or channels) into a cache from a position on."""
    t = Tiny(opset=24)
    a, b = two_convs(t)
    updates = t.node("Slice", b, *(t.constant(values) for values in ([0], [2], [axis % 4])))
    indices = [t.input(1, name="i", kind=INT64)] if positions else []
    return t.build(t.conv(t.node("TensorScatter", a, updates, *indices, name="op", axis=axis), "z", 6, 3))


# -- the rest --------------------------------------------------------------------------------------------------------


def one_hot(axis: int) -> ModelProto:
    """Say where every row of every channel is largest, as zeros and ones."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    y = t.node("ArgMax", y, axis=2, keepdims=0)
    y = t.node("OneHot", y, t.constant(4), t.constant([0.0, 1.0]), name="op", axis=axis)
    return t.build(t.conv(y, "z", 6 if axis in (-1, 3) else 4, 3))


def compress(condition: Sequence[bool] | None, axis: int | None, *, after: int, whole: bool = False) -> ModelProto:
    """Pick channels or rows by a condition, constant or an input."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    chosen = t.input(4, name="c", kind=BOOL) if condition is None else t.constant(np.array(condition, bool), "c")
    part = t.node("Compress", y, chosen, name="op", **({} if axis is None else {"axis": axis}))
    if axis is None:
        part = t.node("Reshape", part, t.constant([1, after, 1, 1]))
    end = t.node("ReduceMean", t.conv(part, "z", after, 3), axes=[2, 3])
    return t.build(t.node("Add", end, t.node("ReduceMean", t.conv(y, "w", 6, 3), axes=[2, 3])) if whole else end)


def compress_by_channels() -> ModelProto:
    """Pick rows by a condition that has an entry per channel."""
    t = Tiny()
    x = t.input(1, 2, 4, 6)
    a, b = t.conv(x, "a", 2, 4), t.conv(x, "b", 2, 6)
    sums = t.node("ReduceSum", t.node("Abs", a), t.constant([0, 2, 3]), keepdims=0)
    y = t.node("Compress", b, t.node("Greater", sums, t.constant(-1.0)), name="op", axis=2)
    return t.build(t.node("ReduceSum", t.conv(y, "z", 6, 3), t.constant([2, 3])))


def reverse(order: Sequence[int], **attributes: int) -> ModelProto:
    """Reverse sequences of lengths that are an input, between linear layers on (steps, batch, channels)."""
    t = Tiny()
    y = t.node("Add", t.linear(t.input(5, 3, 4), "a", 4, 6), t.random(6, name="a.b"))
    size = (5, 3, 6)[order[attributes.get("batch_axis", 1)]]
    y = t.node("ReverseSequence", t.node("Transpose", y, perm=order), t.input(size, name="lengths", kind=INT64),
               name="op", **attributes)  # fmt: skip
    return t.build(t.linear(t.node("Transpose", y, perm=np.argsort(order).tolist()), "z", 6, 3))


def trilu_maps() -> ModelProto:
    """Keep the lower triangle of every map."""
    return sandwich(lambda t, y: t.node("Trilu", y, t.constant(1), name="op", upper=0))


def add_to(t: Tiny, y: str, found: str) -> ModelProto:
    """Consume what an operator found, beside a convolution of the channels that it searched."""
    found = t.node("ReduceSum", t.node("Cast", found, to=TensorProto.FLOAT), keepdims=0)
    return t.build(t.node("Add", t.conv(y, "z", 6, 3), found))


def search(op: str) -> ModelProto:
    """Search all channels for something."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    return add_to(t, y, t.node(op, y, name="op"))


def suppress() -> ModelProto:
    """Suppress boxes that two linear layers made."""
    t = Tiny()
    x = t.input(1, 5, 4)
    boxes, scores = t.linear(x, "a", 4, 4), t.node("Transpose", t.linear(x, "b", 4, 3), perm=[0, 2, 1])
    kept = t.node("NonMaxSuppression", boxes, scores, t.constant([2]), t.constant([0.5]), t.constant([0.0]), name="op")
    return t.build(t.node("ReduceSum", t.node("Cast", kept, to=TensorProto.FLOAT)))


def unpool() -> ModelProto:
    """Undo a pooling by indices that are an input."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 2, 3), "a", 2, 6)
    indices = t.input(1, 6, 2, 3, name="i", kind=INT64)
    y = t.node("MaxUnpool", y, indices, name="op", kernel_shape=[2, 2], strides=[2, 2])
    return t.build(t.conv(y, "z", 6, 3))


def random_like(op: str) -> ModelProto:
    """Draw random numbers for channels."""
    return sandwich(lambda t, y: t.node(op, t.node("Sigmoid", y), name="op", seed=1.0))


def multinomial() -> ModelProto:
    """Draw from as many outcomes as there are features."""

    def middle(t: Tiny, y: str) -> str:
        return t.node("Cast", t.node("Multinomial", y, name="op", seed=1.0, sample_size=6), to=TensorProto.FLOAT)

    return perceptron(middle)


A = {"a.w/0": range(6), "a.b/0": range(6)}
PASSES = A | {"z.w/1": range(6)}
TWO = PASSES | {"b.w/0": range(6), "b.b/0": range(6)}
LINEAR = {"a.w/1": range(6), "z.w/0": range(6)}
DRAWN = "random numbers are drawn"
GATHERED = A | {"z.w/0": range(6)}
CASES = [
    Case("Gather", "as-strided", partial(gather_matrix, np.arange(6).reshape(1, 6, 1, 1), after=6), GATHERED, (6,)),
    Case("Gather", "permuted-column", partial(gather_matrix, [[5], [0], [-2], [1]], after=4),
         {"a.w/0": [0, 1, -1, -1, 2, 3], "a.b/0": [0, 1, -1, -1, 2, 3], "z.w/0": [3, 0, 2, 1]}, (4,)),
    Case("Gather", "as-reshape", partial(gather_matrix, np.arange(-6, 0).reshape(2, 3), after=6), GATHERED, (3,)),
    Case("Gather", "as-shuffle", partial(gather_matrix, np.arange(6).reshape(2, 3), order=(1, 0), after=6),
         {"a.w/0": [0, 1, 2, 0, 1, 2], "a.b/0": [0, 1, 2, 0, 1, 2], "z.w/0": [0, 0, 1, 1, 2, 2]}, (3,)),
    Case("Gather", "as-groups", partial(gather_maps, np.arange(6).reshape(2, 3), 2),
         {"a.w/0": [0, 1, 2] * 2, "a.b/0": [0, 1, 2] * 2, "z.w/0": range(3)}, (3,)),
    Case("Gather", "windows", partial(gather_matrix, [[0, 1, 2], [1, 2, 3]], after=6),
         frozen=frozen("Gather", "several axes")),
    Case("GatherElements", "sorted-rows", gather_sorted, TWO, (6,)),
    Case("GatherElements", "constant", partial(gather_elements, 1, 6, 2, 6, axis=2), PASSES | {"i/1": range(6)}, (6,),
         {"i/2": ("z", "Conv", "slides"), "i/3": ("op", "GatherElements", FIXED)}),
    Case("GatherElements", "first-channels", partial(gather_elements, 1, 4, 2, 5, axis=-2, whole=True),
         A | {"w.w/1": range(6), "i/1": range(4), "z.w/1": range(4)}, (2, 4)),
    Case("GatherElements", "first-channel", partial(gather_elements, 1, 1, 2, 6, axis=2, whole=True),
         {"a.w/0": [-1, *range(5)], "a.b/0": [-1, *range(5)], "w.w/1": [-1, *range(5)]}, (5,),
         frozen("GatherElements", LONE)),
    Case("GatherElements", "channels", partial(gather_elements, 1, 5, 4, 6, axis=1), {"i/1": range(5), "z.w/1": range(5)},
         (5,), frozen("GatherElements", INDEXED)),
    Case("GatherElements", "features", gather_features, {"i/1": range(5), "z.w/0": range(5)}, (5,),
         frozen("GatherElements", INDEXED, "a.w/1", "a.b/0")),
    Case("GatherElements", "expanded-indices", partial(gather_input, expand=True), PASSES, (6,)),
    Case("GatherElements", "input-indices", partial(gather_input, expand=False), frozen=frozen("GatherElements", FIXED)),
    Case("GatherND", "pixels", partial(gather_nd, 5, 2, order=(2, 3, 0, 1)),
         PASSES_NHWC := A | {"z.w/0": range(6)}, (6,)),
    Case("GatherND", "pixels-of-batch", partial(gather_nd, 1, 5, 2, 2, order=(0, 2, 3, 1), batch=1), PASSES_NHWC, (6,)),
    Case("GatherND", "rows", partial(gather_nd, 5, 1, order=(2, 0, 3, 1)), PASSES_NHWC, (6,)),
    Case("GatherND", "channels", partial(gather_nd, 5, 2, order=(0, 1, 2, 3)), frozen=frozen("GatherND", INDEXED)),
    Case("GatherND", "batch-of-channels", gather_nd_per_channel, PASSES_NHWC | {"i/0": range(6)}, (6,),
         {"i/2": ("op", "GatherND", "index tuples")}),
    Case("ScatterElements", "rows", partial(scatter_elements, 1, 6, 2, 6, axis=2), TWO | {"i/1": range(6)}, (6,),
         {"i/2": ("op", "ScatterElements", "where they are written")}),
    Case("ScatterElements", "rows-of-first-channels", partial(scatter_elements, 1, 4, 2, 5, axis=-2),
         PASSES | {"i/1": range(4), "b.w/0": [0, 1, 2, 3, -1, -1], "b.b/0": [0, 1, 2, 3, -1, -1]}, (2, 4)),
    Case("ScatterElements", "added", partial(scatter_elements, 1, 6, 4, 6, axis=3, reduction="add"),
         TWO | {"i/1": range(6)}, (6,)),
    Case("ScatterElements", "channels", partial(scatter_elements, 1, 2, 4, 6, axis=1),
         frozen=frozen("ScatterElements", INDEXED) | frozen("ScatterElements", "where they are written", "b.w/0", "i/1")),
    Case("Scatter", "rows", partial(scatter_elements, 1, 6, 2, 6, axis=2, op="Scatter", opset=9),
         TWO | {"i/1": range(6)}, (6,)),
    Case("Scatter", "channels", partial(scatter_elements, 1, 2, 4, 6, axis=1, op="Scatter", opset=9),
         frozen=frozen("Scatter", INDEXED)),
    Case("ScatterND", "tokens", scatter_nd, LINEAR | {"b.w/1": range(6)}, (6,)),
    Case("ScatterND", "constant-tokens", partial(scatter_nd, updates="constant"), LINEAR | {"u.c/1": range(6)}, (6,)),
    Case("ScatterND", "largest", partial(scatter_nd, reduction="max"), LINEAR | {"b.w/1": range(6)}, (6,)),
    Case("ScatterND", "opset16", partial(scatter_nd, opset=16), LINEAR | {"b.w/1": range(6)}, (6,)),
    Case("ScatterND", "grid", scatter_nd_grid, LINEAR | {"b.w/1": range(6)}, (6,)),
    Case("ScatterND", "channels", scatter_nd_channels, frozen=frozen("ScatterND", INDEXED, "a.w/1")),
    Case("TensorScatter", "rows", cache, TWO, (6,)),
    Case("TensorScatter", "from-the-start", partial(cache, positions=False), TWO, (6,)),
    Case("TensorScatter", "channels", partial(cache, 1, positions=False),
         frozen=frozen("TensorScatter", INDEXED) | frozen("TensorScatter", "where they are written", "b.w/0")),
    Case("OneHot", "last", partial(one_hot, -1), PASSES, (6,)),
    Case("OneHot", "first", partial(one_hot, 1), frozen={"a.w/0": ("z", "Conv", "slides over it")}),
    Case("Compress", "channels", partial(compress, [1, 0, 0, 1, 1, 0], 1, after=3, whole=True),
         A | {"w.w/1": range(6), "z.w/1": [0, 3, 4]}, (3, 3)),
    Case("Compress", "short-condition", partial(compress, [0, 1, 1, 1], -3, after=3, whole=True),
         A | {"w.w/1": range(6), "z.w/1": [1, 2, 3]}, (3, 3)),
    Case("Compress", "rows", partial(compress, [1, 0, 0, 1], 2, after=6), PASSES, (6,)),
    Case("Compress", "computed-rows", partial(compress, None, 2, after=6), PASSES, (6,)),
    Case("Compress", "rows-by-channels", compress_by_channels,
         {"b.w/0": range(6), "b.b/0": range(6), "z.w/1": range(6)}, (6,), frozen("Compress", "which indices stay")),
    Case("Compress", "one-channel", partial(compress, [0, 0, 0, 0, 1], 1, after=1), frozen=frozen("Compress", LONE)),
    Case("Compress", "flat", partial(compress, [1, 0, 0, 1], None, after=2), frozen=frozen("Compress", "as one axis")),
    Case("ReverseSequence", "steps", partial(reverse, (0, 1, 2)), LINEAR | {"a.b/0": range(6)}, (6,)),
    Case("ReverseSequence", "batch-first", partial(reverse, (1, 0, 2), time_axis=1, batch_axis=0),
         LINEAR | {"a.b/0": range(6)}, (6,)),
    Case("ReverseSequence", "channels", partial(reverse, (2, 1, 0)),
         frozen=frozen("ReverseSequence", "reversed", "a.w/1", "a.b/0")),
    Case("ReverseSequence", "batch-of-channels", partial(reverse, (1, 2, 0)),
         frozen=frozen("ReverseSequence", FIXED, "a.w/1", "a.b/0")),
    Case("Trilu", "maps", trilu_maps, PASSES, (6,)),
    Case("Trilu", "features", partial(perceptron, lambda t, y: t.node("Trilu", y, name="op")),
         frozen=frozen("Trilu", "zeroes a triangle", "a.w/1", "a.b/0")),
    Case("NonZero", "channels", partial(search, "NonZero"), frozen=frozen("NonZero", "counts through all")),
    Case("Unique", "channels", partial(search, "Unique"), frozen=frozen("Unique", "compares all")),
    Case("NonMaxSuppression", "boxes", suppress,
         frozen=frozen("NonMaxSuppression", "compares boxes", "a.w/1", "b.w/1")),
    Case("MaxUnpool", "channels", unpool, frozen=frozen("MaxUnpool", "flat indices through the channels")),
    *(
        Case(op, "channels", partial(random_like, op), frozen=frozen(op, DRAWN))
        for op in ("Bernoulli", "RandomNormalLike", "RandomUniformLike")
    ),
    Case("Multinomial", "features", multinomial, frozen=frozen("Multinomial", DRAWN, "a.w/1", "a.b/0")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_axes_pass_where_nothing_is_looked_up(case):
    """Data, indices and updates agree on every axis but the indexed one, which freezes."""
    oracle.assert_coupling(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pruned_equals_masked(case):
    """Indices along other axes shrink with the data."""
    oracle.assert_case_prunes(case)
