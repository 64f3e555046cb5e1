"""Channels seen as rows (groups of a convolution, heads of attention): rows keep equally many, and choose freely which.

What forces rows to agree ties them: a table that all of them read, an order in which they are merged.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

import onnxprune
import oracle
from graphs import Tiny, sandwich
from oracle import Case

TOKENS, FEATURES = 5, 4


class Heads(Tiny):
    """A graph of attention under construction: tokens of ``FEATURES`` features come in, x of shape (1, TOKENS, FEATURES)."""

    def project(self, name: str, heads: int, size: int) -> str:
        """Project the input and see the result as heads: (1, heads, TOKENS, size)."""
        y = self.linear("x", name, FEATURES, heads * size)
        y = self.node("Add", y, self.random(heads * size, name=f"{name}.b"))
        y = self.node("Reshape", y, self.constant([1, TOKENS, heads, -1]))
        return self.node("Transpose", y, perm=[0, 2, 1, 3])

    def attend(self, q: str, k: str, v: str, size: int) -> ModelProto:
        """Attend, merge the ``size`` channels of all heads, project."""
        scores = self.node("MatMul", q, self.node("Transpose", k, perm=[0, 1, 3, 2]), name="scores")
        y = self.node("MatMul", self.node("Softmax", scores, axis=-1), v, name="mix")
        y = self.node("Reshape", self.node("Transpose", y, perm=[0, 2, 1, 3]), self.constant([1, TOKENS, size]))
        return self.build(self.linear(y, "z", size, 3))


def heads() -> Heads:
    """Begin a graph of attention."""
    t = Heads()
    t.input(1, TOKENS, FEATURES)
    return t


# -- what rows share -------------------------------------------------------------------------------------------------


def position_table(shape: Sequence[int]) -> ModelProto:
    """Multiply queries and keys of two heads of three channels by one table."""
    t = heads()
    table = t.random(*shape, name="table", offset=1.0, scale=0.3)
    q, k = (t.node("Mul", t.project(name, 2, 3), table, name=f"{name}*") for name in "qk")
    return t.attend(q, k, t.project("v", 2, 3), 6)


def table_before_groups() -> ModelProto:
    """Scale two rows of four channels by one table, in front of a convolution of four groups of two."""

    def middle(t: Tiny, y: str) -> str:
        y = t.node("Reshape", y, t.constant([1, 2, 4, 4, 6]))
        y = t.node("Mul", y, t.random(4, 1, 1, name="table", offset=1.0, scale=0.3))
        return t.conv(t.node("Reshape", y, t.constant([1, 8, 4, 6])), "op", 8, 8, group=4)

    return sandwich(middle, 8)


def rotary() -> ModelProto:
    """Rotate halves of two heads of four channels by tables of cosines and sines that the heads share."""
    t = heads()
    cos, sin = (t.random(TOKENS, 4, name=name, offset=1.0, scale=0.3) for name in ("cos", "sin"))
    ends, last = [t.constant([value]) for value in (0, 2, 4)], t.constant([-1])

    def rotated(y: str) -> str:
        left, right = (t.node("Slice", y, *ends[i : i + 2], last) for i in (0, 1))
        turned = t.node("Concat", t.node("Neg", right), left, axis=-1)
        return t.node("Add", t.node("Mul", y, cos), t.node("Mul", turned, sin))

    q, k = (rotated(t.project(name, 2, 4)) for name in "qk")
    return t.attend(q, k, t.project("v", 2, 3), 6)


def repeated_keys() -> ModelProto:
    """Attend with four heads of queries and two of keys and values, each of which two heads of queries share."""
    t = heads()

    def repeat(name: str) -> str:
        y = t.node("Reshape", t.project(name, 2, 3), t.constant([1, 2, 1, TOKENS, 3]))
        y = t.node("Expand", y, t.constant([1, 2, 2, TOKENS, 3]))
        return t.node("Reshape", y, t.constant([1, 4, TOKENS, -1]))

    return t.attend(t.project("q", 4, 3), repeat("k"), repeat("v"), 12)


def shuffled(channels: int = 8, groups: int = 2) -> ModelProto:
    """Shuffle channels between two grouped convolutions (ShuffleNet)."""

    def middle(t: Tiny, y: str) -> str:
        folded = t.constant([1, groups, channels // groups, 4, 6])
        y = t.node("Reshape", t.conv(y, "b", channels, channels, group=groups), folded)
        y = t.node("Transpose", y, perm=[0, 2, 1, 3, 4])
        return t.conv(t.node("Reshape", y, t.constant([1, channels, 4, 6])), "c", channels, channels, group=groups)

    return sandwich(middle, channels)


def shuffled_copies() -> ModelProto:
    """Shuffle copies of one channel that a grouped convolution computed from shuffled ones: all of it is one channel."""

    def shuffle(t: Tiny, y: str) -> str:
        y = t.node("Transpose", t.node("Reshape", y, t.constant([1, 2, 2, 4, 6])), perm=[0, 2, 1, 3, 4])
        return t.node("Reshape", y, t.constant([1, 4, 4, 6]))

    def middle(t: Tiny, y: str) -> str:
        y = t.node("Gather", t.conv(shuffle(t, y), "b", 4, 2, group=2), t.constant([0, 0, 0, 0]), axis=1)
        return t.conv(shuffle(t, y), "c", 4, 4)

    return sandwich(middle, 4)


# -- what rows decide for themselves ---------------------------------------------------------------------------------


def fused(how: str) -> ModelProto:
    """Compute queries, keys and values of two heads of three channels by one matrix, and take them apart."""
    t = heads()
    y = t.node("Add", t.linear("x", "qkv", FEATURES, 18), t.random(18, name="qkv.b"))
    y = t.node("Reshape", y, t.constant([1, TOKENS, 3, 2, 3]))
    y = t.node("Transpose", y, perm=[2, 0, 3, 1, 4])
    if how == "Gather":
        parts = [t.node("Gather", y, t.constant(index), axis=0) for index in range(3)]
    elif how == "Split":
        parts = [t.node("Squeeze", part, t.constant([0])) for part in t.node("Split", y, outputs=3, axis=0)]
    else:
        ends = [t.constant([value]) for value in range(4)]
        slices = [t.node("Slice", y, *ends[index : index + 2], ends[0]) for index in range(3)]
        parts = [t.node("Reshape", part, t.constant([1, 2, TOKENS, -1])) for part in slices]
    return t.attend(*parts, 6)


def norm_within_groups() -> ModelProto:
    """Normalise four groups of channels that a convolution of two groups computed."""

    def middle(t: Tiny, y: str) -> str:
        y = t.conv(y, "g", 4, 12, group=2)
        ones, zeros = t.constant(np.ones(4, np.float32), "ones"), t.constant(np.zeros(4, np.float32), "zeros")
        y = t.node("InstanceNormalization", t.node("Reshape", y, t.constant([0, 4, -1])), ones, zeros, name="op")
        return t.node("Mul", t.node("Reshape", y, t.constant([1, 12, 4, 6])), t.random(12, 1, 1, name="scale"))

    return sandwich(middle, 4, 12)


def two_and_three_groups(channels: int = 12) -> ModelProto:
    """Add a tensor to itself that convolutions of two and of three groups read, too."""

    def middle(t: Tiny, y: str) -> str:
        return t.node("Add", *(t.conv(y, f"g{groups}", channels, channels, 3, group=groups) for groups in (2, 3)))

    return sandwich(middle, channels)


def halves_of_heads(how: str) -> ModelProto:
    """Cut every head's six channels into two and four, of which only the first change (partial rotary embedding)."""
    t = heads()

    def bent(y: str) -> str:
        if how == "Split":
            left, right = t.node("Split", y, t.constant([2, 4]), outputs=2, axis=-1)
        else:
            ends, last = [t.constant([value]) for value in (0, 2, 6)], t.constant([3])
            left, right = (t.node("Slice", y, *ends[i : i + 2], last) for i in (0, 1))
        return t.node("Concat", t.node("Tanh", left), right, axis=-1)

    q, k = (bent(t.project(name, 2, 6)) for name in "qk")
    return t.attend(q, k, t.project("v", 2, 3), 6)


def reordered_in_heads(order: Sequence[int]) -> ModelProto:
    """Reorder the four channels of every head of queries."""
    t = heads()
    q = t.node("Gather", t.project("q", 2, 4), t.constant(list(order)), axis=-1)
    return t.attend(q, t.project("k", 2, 4), t.project("v", 2, 3), 6)


def interleaved() -> ModelProto:
    """Treat odd channels of every head unlike even ones (rotary embedding of neighbours)."""
    t = heads()
    zero, one, two, last, end = (t.constant([value]) for value in range(5))

    def sorted_out(y: str) -> str:
        even, odd = (t.node("Slice", y, start, end, last, two) for start in (zero, one))
        return t.node("Concat", t.node("Tanh", odd), even, axis=-1)

    q, k = (sorted_out(t.project(name, 2, 4)) for name in "qk")
    return t.attend(q, k, t.project("v", 2, 3), 6)


def middle_of_heads() -> ModelProto:
    """Attend by all six channels of every head, and once more by the two in their middle."""
    t = heads()
    ends = [t.constant([2]), t.constant([4]), t.constant([3])]
    q, k = (t.project(name, 2, 6) for name in "qk")
    left, right = (t.node("Slice", y, *ends, name=f"{y}2") for y in (q, k))
    more = t.node("MatMul", left, t.node("Transpose", right, perm=[0, 1, 3, 2]))
    scores = t.node("Add", t.node("MatMul", q, t.node("Transpose", k, perm=[0, 1, 3, 2])), more)
    y = t.node("MatMul", t.node("Softmax", scores, axis=-1), t.project("v", 2, 3))
    y = t.node("Reshape", t.node("Transpose", y, perm=[0, 2, 1, 3]), t.constant([1, TOKENS, 6]))
    return t.build(t.linear(y, "z", 6, 3))


def one_of_every_head(how: str) -> ModelProto:
    """Treat the first of every head's four channels alone."""
    t = heads()

    def bent(name: str) -> str:
        y = t.project(name, 2, 4)
        if how == "Split":
            first, rest = t.node("Split", y, t.constant([1, 3]), name=f"{name}1", outputs=2, axis=-1)
        else:
            ends, last = [t.constant([value]) for value in (0, 1, 4)], t.constant([3])
            first, rest = (t.node("Slice", y, *ends[i : i + 2], last, name=f"{name}{i + 1}") for i in (0, 1))
        return t.node("Concat", t.node("Tanh", first), rest, axis=-1)

    q, k = (bent(name) for name in "qk")
    return t.attend(q, k, t.project("v", 2, 3), 6)


def beside_the_input(channels: int, *, refuse: bool = False) -> ModelProto:
    """Join the graph's two inputs channels and others in front of a convolution of two groups."""
    t = Tiny()
    x = t.input(1, 2, 4, 6)
    y = t.node("Concat", x, t.conv(x, "a", 2, channels), axis=1)
    y = t.conv(y, "op", channels + 2, 4, group=2)
    return t.build(y if refuse else t.conv(y, "z", 4, 3))


def by_row(size: int, *rows: int) -> list[int]:
    """Number the channels of several rows of ``size``; rows of equal number are tied by index."""
    return [size * row + column for row in rows for column in range(size)]


TIED = by_row(3, 0, 0)
ROTARY = by_row(2, 0, 0, 0, 0)
PAIRS = [0, 0, 1, 1, 2, 2, 3, 3]
SHARED_KEYS = by_row(3, 0, 0, 1, 1)
QKV = [*range(6), *range(6), *range(6, 12)]
GROUPS = {"a.w/0": range(12), "a.b/0": range(12), "g2.w/1": range(12), "g3.w/1": range(12)}
JOINED = {name: range(12, 24) for name in ("g2.w/0", "g2.b/0", "g3.w/0", "g3.b/0", "z.w/1")}
VALUES = {"v.w/1": range(6, 12), "v.b/0": range(6, 12), "z.w/0": range(6, 12)}
QUERIES = ("q.w/1", "q.b/0", "k.w/1", "k.b/0")
ZERO = ("q.w/1", "q.b/0")
CASES = [
    Case("Mul", "table-of-channels", partial(position_table, (3,)),
         dict.fromkeys(QUERIES, TIED) | {"table@q*/0": range(3), "table@k*/0": range(3)} | VALUES, (3, 3), zero=ZERO),
    Case("Mul", "table-of-positions", partial(position_table, (TOKENS, 3)),
         dict.fromkeys(QUERIES, TIED) | {"table/1": range(3)} | VALUES, (3, 3), zero=ZERO),
    Case("Mul", "table-of-heads", partial(position_table, (2, 1, 3)),
         dict.fromkeys(QUERIES, TIED) | {"table/2": range(3)} | VALUES, (3, 3), zero=ZERO),
    Case("Conv", "groups-within-rows-of-a-table", table_before_groups,
         {name: by_row(4, 0, 0) for name in ("a.w/0", "a.b/0", "op.w/1")} | {"table/0": range(4)} | {
             name: range(4, 12) for name in ("op.w/0", "op.b/0", "z.w/1")}, (2, 2)),
    Case("Add", "rotary", rotary,
         dict.fromkeys(QUERIES, ROTARY) | {"cos/1": ROTARY[:4], "sin/1": ROTARY[:4]} | VALUES, (2, 3), zero=ZERO),
    Case(
        "Expand", "repeated-keys", repeated_keys,
        {"q.w/1": SHARED_KEYS, "q.b/0": SHARED_KEYS, "k.w/1": range(6), "k.b/0": range(6),
         "v.w/1": range(6, 12), "v.b/0": range(6, 12), "z.w/0": np.add(SHARED_KEYS, 6)}, (3, 3), zero=ZERO,
    ),
    Case(
        "Reshape", "shuffle-between-groups-of-four", shuffled,
        {"a.w/0": range(8), "a.b/0": range(8), "b.w/1": range(8),
         "b.w/0": by_row(4, 2, 2), "b.b/0": by_row(4, 2, 2), "c.w/1": np.repeat(range(8, 12), 2),
         "c.w/0": range(12, 20), "c.b/0": range(12, 20), "z.w/1": range(12, 20)}, (2, 4, 4),
    ),
    Case("Gather", "shuffled-copies", shuffled_copies, {name: range(4) for name in ("c.w/0", "c.b/0", "z.w/1")}, (4,)),
    *(
        Case(op, "fused-queries-keys-values", partial(fused, op),
             {"qkv.w/1": QKV, "qkv.b/0": QKV, "z.w/0": range(6, 12)}, (3,), zero=("qkv.w/1", "qkv.b/0"))
        for op in ("Gather", "Split", "Slice")
    ),
    Case(
        "InstanceNormalization", "four-groups-after-two", norm_within_groups,
        {"a.w/0": range(4), "a.b/0": range(4), "g.w/1": range(4),
         "g.w/0": range(4, 16), "g.b/0": range(4, 16), "scale/0": range(4, 16), "z.w/1": range(4, 16)}, (2, 3),
        redefined=True,
    ),
    Case("Add", "groups-of-two-and-three", two_and_three_groups, GROUPS | JOINED, (2, 2)),
    *(
        Case(op, "halves-of-heads", partial(halves_of_heads, op), dict.fromkeys(QUERIES, range(12)) | {
            "v.w/1": range(12, 18), "v.b/0": range(12, 18), "z.w/0": range(12, 18)}, (2, 3, 4), zero=ZERO)
        for op in ("Split", "Slice")
    ),
    Case("Gather", "reordered-in-heads", partial(reordered_in_heads, [2, 0, 3, 1]),
         {"q.w/1": [1, 3, 0, 2] * 2, "q.b/0": [1, 3, 0, 2] * 2, "k.w/1": [*range(4)] * 2, "k.b/0": [*range(4)] * 2,
             "v.w/1": range(4, 10), "v.b/0": range(4, 10), "z.w/0": range(4, 10)}, (3, 4), zero=ZERO),
    Case("Slice", "interleaved-in-heads", interleaved, dict.fromkeys(QUERIES, PAIRS) | VALUES, (2, 3),
         zero=ZERO),
    Case("Slice", "middle-of-heads", middle_of_heads, dict.fromkeys(QUERIES, range(12)) | {
        "v.w/1": range(12, 18), "v.b/0": range(12, 18), "z.w/0": range(12, 18)}, (2, 2, 3), zero=ZERO),
    *(
        Case(op, "one-of-every-head", partial(one_of_every_head, op),
             {name: [-1, 0, 1, 2, -1, 3, 4, 5] for name in QUERIES} | {
                "v.w/1": range(6, 12), "v.b/0": range(6, 12), "z.w/0": range(6, 12)}, (3, 3),
             {"q.w/1": ("q1", op, "one index is taken out alone")}, zero=ZERO)
        for op in ("Slice", "Split")
    ),
    Case("Conv", "row-with-frozen-channels", partial(beside_the_input, 4),
         {"a.w/0": range(4), "a.b/0": range(4), "op.w/1": [-1, -1, 0, 1, 2, 3],
          "op.w/0": range(4, 8), "op.b/0": range(4, 8), "z.w/1": range(4, 8)}, (1, 2)),
    Case("Conv", "row-of-frozen-channels", partial(beside_the_input, 2, refuse=True), frozen={"a.w/0": ("", "", "")}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_tied_where_something_forces_them(case):
    """Rows choose freely, unless they read one table, are copies of each other, or are merged in another order."""
    oracle.assert_coupling(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pruned_equals_masked(case):
    """Whatever every row keeps, as long as all keep equally many, equals zeroing the consumers' weight slices."""
    oracle.assert_case_prunes(case)


# -- selection: every row keeps its own best channels ------------------------------------------------------------------


def strengthened(model: ModelProto, axes: dict[str, int], strong: Sequence[int]) -> ModelProto:
    """Make some channels of weights matter a hundred times as much as the others."""
    for tensor in model.graph.initializer:
        if tensor.name in axes:
            weight = numpy_helper.to_array(tensor).copy()
            weight.swapaxes(0, axes[tensor.name])[np.delete(np.arange(weight.shape[axes[tensor.name]]), strong)] /= 100
            tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    return model


def importance(model: ModelProto, axes: dict[str, int]) -> np.ndarray:
    """Largest norm of a channel's slices, each over its weight's mean norm (in numpy)."""
    weights, found = dict(oracle.constants_of(model)), []
    for name, axis in axes.items():
        norms = np.sqrt((np.moveaxis(weights[name], axis, 0).reshape(weights[name].shape[axis], -1) ** 2).sum(1))
        found.append(norms / norms.mean())
    return np.max(found, 0)


def assert_rows_keep_their_best(model: ModelProto, axes: dict[str, int], n_rows: int, shares: Sequence[float]) -> None:
    """Every row of four keeps three, two and one at these shares of the MAC: the largest of its own scores."""
    scores = importance(model, axes)
    size = len(scores) // n_rows
    counts = []
    for share in shares:
        result = onnxprune.prune(model, target_mac=share, preset="a", only=tuple(axes))
        assert result.report.proof.ok
        kept = [result.plan.initializers[name][axis] for name, axis in axes.items()]
        assert all(indices == kept[0] for indices in kept)
        rows = [[index % size for index in kept[0] if index // size == row] for row in range(n_rows)]
        for row, indices in enumerate(rows):
            assert len(indices) == len(rows[0])
            best = np.argsort(scores[row * size : (row + 1) * size])[-len(indices) :]
            assert indices == sorted(best)
        assert len({tuple(row) for row in rows}) == n_rows
        counts.append(len(rows[0]))
    assert counts == [3, 2, 1]


def test_groups_of_a_convolution_keep_their_own_best_channels():
    """The first group's channels 0 and 1 matter, the second's 2 and 3: both keep theirs."""
    model = sandwich(lambda t, y: t.conv(y, "op", 8, 8, 3, group=2), 8)
    model = strengthened(model, {"a.w": 0}, strong=(0, 1, 6, 7))
    assert_rows_keep_their_best(model, {"a.w": 0}, 2, (0.8, 0.6, 0.35))


def test_heads_of_attention_keep_their_own_best_channels():
    """Queries and keys of the first head are best in 0 and 1, of the second in 2 and 3; values the other way round."""
    t = heads()
    model = t.attend(*(t.project(name, 2, 4) for name in "qkv"), 8)
    model = strengthened(model, {"q.w": 1, "k.w": 1}, strong=(0, 1, 6, 7))
    model = strengthened(model, {"v.w": 1}, strong=(2, 3, 4, 5))
    assert_rows_keep_their_best(model, {"q.w": 1, "k.w": 1}, 2, (0.9, 0.8, 0.65))
    assert_rows_keep_their_best(model, {"v.w": 1}, 2, (0.9, 0.8, 0.65))


def test_rows_that_share_a_table_keep_the_same_channels():
    """Where both heads read one table, a column counts by the better of its two channels, and goes from both."""
    t = heads()
    table = t.random(4, name="table", offset=1.0, scale=0.1)
    q, k = (t.node("Mul", t.project(name, 2, 4), table) for name in "qk")
    model = t.attend(q, k, t.project("v", 2, 3), 6)
    model = strengthened(model, {"q.w": 1, "k.w": 1}, strong=(0, 6))
    kept = onnxprune.prune(model, target_mac=0.7, preset="a").plan.initializers["q.w"][1]
    assert kept == [0, 2, 4, 6]
