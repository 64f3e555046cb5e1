"""Convolutions and matrix products end their input's channels and start new ones."""

from functools import partial

import numpy as np
import pytest
from onnx import ModelProto

import onnxprune
import oracle
from graphs import Tiny, perceptron, sandwich
from onnxprune.plan import make_plan
from oracle import Case

INNER = {"a.w/0": range(6), "a.b/0": range(6), "z.w/1": range(6)}
OUTPUT = ("z", "output", "output of the graph")
FIXED = "axis that cannot shrink"
RANKS = {"1d": (9,), "2d": (4, 6), "3d": (3, 4, 5)}


def conv(size: tuple[int, ...], **attributes) -> ModelProto:
    """Three convolutions in a row; the middle one has the attributes."""
    return sandwich(lambda t, y: t.conv(y, "op", 6, 4, 3, rank=len(size), **attributes), 6, 4, size=size)


def grouped(group: int, channels_in: int, channels: int, size: tuple[int, ...] = (4, 6), **attributes) -> ModelProto:
    """Put a grouped convolution between two dense ones."""

    def middle(t: Tiny, y: str) -> str:
        return t.conv(y, "op", channels_in, channels, 3, rank=len(size), group=group, **attributes)

    return sandwich(middle, channels_in, channels, size=size)


def transposed(group: int, channels_in: int, channels: int, size: tuple[int, ...] = (4, 6), **attributes) -> ModelProto:
    """Put a transposed convolution between two dense ones."""
    return grouped(group, channels_in, channels, size, transpose=True, strides=[2] * len(size), **attributes)


def grouped_input() -> ModelProto:
    """Apply a grouped convolution to the graph's input."""
    t = Tiny()
    y = t.conv(t.input(1, 6, 4, 6), "op", 6, 4, group=2)
    return t.build(t.conv(y, "z", 4, 3))


def computed_weight() -> ModelProto:
    """Use a weight that is computed from the input."""
    t = Tiny()
    x = t.input(1, 2, 4, 6)
    weight = t.node(
        "Reshape", t.node("GlobalAveragePool", t.conv(x, "k", 2, 12)), t.constant([2, 6, 1, 1]), name="kernel"
    )
    return t.build(t.node("Conv", t.conv(x, "a", 2, 6), weight, name="op"))


def transposed_weight(op: str) -> ModelProto:
    """Store a weight with its axes swapped, behind Transpose."""
    t = Tiny()
    if op == "Conv":
        y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
        weight = t.node("Transpose", t.random(6, 4, 1, 1, name="op.w"), perm=[1, 0, 2, 3])
        return t.build(t.conv(t.node("Conv", y, weight, name="op"), "z", 4, 3))
    y = t.gemm(t.input(4, 2), "a", 2, 6)
    weight = t.node("Transpose", t.random(4, 6, name="op.w"))
    return t.build(t.gemm(t.node("MatMul", y, weight, name="op"), "z", 4, 3))


def slides_over_channels(op: str) -> ModelProto:
    """Convolve along an axis that a Transpose filled with channels."""

    def middle(t: Tiny, y: str) -> str:
        return t.conv(t.node("Transpose", y, perm=[0, 2, 1, 3]), "op", 4, 4, 3, transpose=op == "ConvTranspose")

    return sandwich(middle, after=4)


def gemm(*, trans_a: int = 0, trans_b: int = 0, bias: str = "vector", scale: float = 1.0) -> ModelProto:
    """Put a Gemm between two others; its A is transposed beforehand where ``trans_a`` says so."""

    def middle(t: Tiny, y: str) -> str:
        shapes = {"vector": (5,), "row": (1, 5), "column": (4, 1), "matrix": (4, 5), "scalar": ()}
        weight = t.random(*((5, 6) if trans_b else (6, 5)), name="op.w")
        inputs = [t.node("Transpose", y) if trans_a else y, weight]
        if bias:
            inputs.append(t.random(*shapes[bias], name="op.b"))
        return t.node("Gemm", *inputs, name="op", transA=trans_a, transB=trans_b, alpha=scale, beta=0.5)

    return perceptron(middle, 6, 5)


def gemm_weight_left() -> ModelProto:
    """Multiply a weight from the left: rows are the channels."""
    t = Tiny()
    y = t.node("Gemm", t.random(6, 2, name="a.w"), t.input(2, 5), t.random(6, 1, name="a.b"), name="a")
    return t.build(t.node("Gemm", t.random(3, 6, name="z.w"), t.node("LeakyRelu", y), name="z"))


def matmul(rank: int = 2, *, left: bool = False) -> ModelProto:
    """Apply two weights, from the right on the last axis or from the left on the last but one."""
    t = Tiny()
    lead = (2, 3)[: rank - 2]
    if left:
        y = t.node("MatMul", t.random(6, 2, name="a.w"), t.input(*lead, 2, 5), name="a")
        y = t.node("Add", y, t.random(6, 1, name="a.b"))
        return t.build(t.node("MatMul", t.random(3, 6, name="z.w"), t.node("LeakyRelu", y), name="z"))
    y = t.node("Add", t.linear(t.input(*lead, 4, 2), "a", 2, 6), t.random(6, name="a.b"))
    return t.build(t.linear(t.node("LeakyRelu", y), "z", 6, 3))


def matmul_vectors(side: str) -> ModelProto:
    """Multiply by a one-dimensional weight."""
    t = Tiny()
    y = t.node("LeakyRelu", t.gemm(t.input(4, 2), "a", 2, 6))
    vector = t.random(6, name="z.w")
    return t.build(
        t.node("MatMul", y, vector, name="z") if side == "right" else
        t.node("MatMul", vector, t.node("Transpose", y), name="z")
    )  # fmt: skip


def attention(heads: int = 1) -> ModelProto:
    """Multiply queries by keys, and the result by values; heads come from a Reshape and a Transpose."""
    t = Tiny()
    x = t.input(1, 5, 4)

    def project(name: str) -> str:
        y = t.node("Add", t.linear(x, name, 4, 6), t.random(6, name=f"{name}.b"), name=f"{name}+")
        if heads == 1:
            return y
        return t.node("Transpose", t.node("Reshape", y, t.constant([1, 5, heads, -1])), perm=[0, 2, 1, 3])

    q, k, v = (project(name) for name in "qkv")
    order = [0, 2, 1] if heads == 1 else [0, 1, 3, 2]
    scores = t.node("MatMul", q, t.node("Transpose", k, perm=order), name="op")
    y = t.node("MatMul", t.node("Softmax", scores, axis=-1), v, name="mix")
    if heads > 1:
        y = t.node("Reshape", t.node("Transpose", y, perm=[0, 2, 1, 3]), t.constant([1, 5, 6]))
    return t.build(t.linear(y, "z", 6, 3))


def square() -> ModelProto:
    """Multiply a tensor by its own transpose: one set of channels ends twice at one node."""
    t = Tiny()
    y = t.linear(t.input(1, 5, 4), "a", 4, 6)
    return t.build(t.node("MatMul", y, t.node("Transpose", y, perm=[0, 2, 1]), name="op"))


def gram() -> ModelProto:
    """Multiply the transpose of a tensor by itself: the result has the channels on both axes."""
    t = Tiny()
    y = t.linear(t.input(1, 5, 4), "a", 4, 6)
    y = t.node("MatMul", t.node("Transpose", y, perm=[0, 2, 1]), y, name="op")
    return t.build(t.node("ReduceSum", t.linear(y, "z", 6, 3), t.constant([1]), name="sum"))


TWO_CONVS = {
    "a.w/0": range(6), "a.b/0": range(6), "op.w/1": range(6),
    "op.w/0": range(6, 10), "op.b/0": range(6, 10), "z.w/1": range(6, 10),
}  # fmt: skip
DEPTHWISE = INNER | {"op.w/0": range(6), "op.b/0": range(6)}
MULTIPLIED = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
GROUPED = TWO_CONVS  # every group's block of op.w/1 is listed: its channels are its own
TRANSPOSED_GROUPED = {
    "a.w/0": range(6), "a.b/0": range(6), "op.w/0": range(6),
    "op.w/1": range(6, 10), "op.b/0": range(6, 10), "z.w/1": range(6, 10),
}  # fmt: skip
GEMM = {"a.w/1": range(6), "a.b/0": range(6), "op.w/0": range(6), "op.w/1": range(6, 11), "z.w/0": range(6, 11)}
GEMM_T = {"a.w/1": range(6), "a.b/0": range(6), "op.w/1": range(6), "op.w/0": range(6, 11), "z.w/0": range(6, 11)}
SEQUENCE = {"a.w/1": range(6), "a.b/0": range(6), "z.w/0": range(6)}

CASES = [
    *(Case("Conv", rank, partial(conv, size), TWO_CONVS, (4, 6)) for rank, size in RANKS.items()),
    Case("Conv", "strides-dilations", partial(conv, (7, 9), strides=[2, 1], dilations=[1, 2]), TWO_CONVS, (4, 6)),
    Case("Conv", "auto-pad", partial(conv, (4, 6), auto_pad="SAME_UPPER", pads=None), TWO_CONVS, (4, 6)),
    Case(
        "Conv", "no-bias", partial(conv, (4, 6), bias=False),
        {name: labels for name, labels in TWO_CONVS.items() if name != "op.b/0"}, (4, 6),
        {"z.w/0": OUTPUT, "z.b/0": OUTPUT, "a.w/1": ("a", "Conv", FIXED)},
    ),
    *(Case("Conv", f"depthwise-{rank}", partial(grouped, 6, 6, 6, size), DEPTHWISE, (6,)) for rank, size in RANKS.items()),
    Case(
        "Conv", "depth-multiplier", partial(grouped, 4, 4, 12),
        {"a.w/0": range(4), "a.b/0": range(4), "op.w/0": MULTIPLIED, "op.b/0": MULTIPLIED, "z.w/1": MULTIPLIED}, (4,),
    ),
    Case("Conv", "grouped", partial(grouped, 2, 6, 4), GROUPED, (2, 3)),
    Case("Conv", "grouped-1d", partial(grouped, 2, 6, 4, (9,)), GROUPED, (2, 3)),
    Case(
        "Conv", "grouped-one-output-each", partial(grouped, 2, 6, 2),
        {"a.w/0": range(6), "a.b/0": range(6), "op.w/1": range(6)}, (3,),
    ),
    Case("Conv", "grouped-input", grouped_input,
         {"op.w/0": range(4), "op.b/0": range(4), "z.w/1": range(4)}, (2,)),
    Case("Conv", "weight-behind-transpose", partial(transposed_weight, "Conv"),
         {"a.w/0": range(6), "a.b/0": range(6), "op.w/0": range(6), "op.w/1": range(6, 10), "z.w/1": range(6, 10)}, (4, 6)),
    Case(
        "Conv", "computed-weight", computed_weight,
        {"a.w/0": range(6), "a.b/0": range(6), "k.w/0": [*range(6)] * 2, "k.b/0": [*range(6)] * 2}, (6,),
        zero=("a.w/0", "a.b/0"),
    ),
    *(
        Case(
            "ConvTranspose", rank, partial(transposed, 1, 6, 4, size),
            {"a.w/0": range(6), "a.b/0": range(6), "op.w/0": range(6),
             "op.w/1": range(6, 10), "op.b/0": range(6, 10), "z.w/1": range(6, 10)}, (4, 6),
        )
        for rank, size in RANKS.items()
    ),
    Case("ConvTranspose", "grouped", partial(transposed, 2, 6, 4), TRANSPOSED_GROUPED, (2, 3)),
    Case("ConvTranspose", "depthwise", partial(transposed, 6, 6, 6, bias=False), INNER | {"op.w/0": range(6)}, (6,)),
    Case("ConvTranspose", "depthwise-bias", partial(transposed, 6, 6, 6), DEPTHWISE, (6,)),
    Case(
        "ConvTranspose", "depth-multiplier", partial(transposed, 4, 4, 12),
        {"a.w/0": range(4), "a.b/0": range(4), "op.w/0": range(4), "op.b/0": MULTIPLIED, "z.w/1": MULTIPLIED}, (4,),
    ),
    *(
        Case(op, "slides-over-channels", partial(slides_over_channels, op),
             {f"op.w/{1 if op == 'ConvTranspose' else 0}": range(4), "op.b/0": range(4), "z.w/1": range(4)}, (4,),
             {"a.w/0": ("op", op, "a convolution slides over it")})
        for op in ("Conv", "ConvTranspose")
    ),
    Case("Conv", "slides-over-output", lambda: sandwich(lambda t, y: t.node("Transpose", y, perm=[0, 2, 1, 3]), after=4),
         frozen={"a.w/0": ("z", "Conv", "a convolution slides over it")}),
    *(
        Case("Gemm", f"transA{a}-transB{b}", partial(gemm, trans_a=a, trans_b=b),
             (GEMM_T if b else GEMM) | {"op.b/0": range(6, 11)}, (5, 6))
        for a in (0, 1) for b in (0, 1)
    ),
    Case("Gemm", "bias-row", partial(gemm, bias="row"), GEMM | {"op.b/1": range(6, 11)}, (5, 6)),
    Case("Gemm", "bias-column", partial(gemm, bias="column"), GEMM, (5, 6)),
    Case("Gemm", "bias-matrix", partial(gemm, bias="matrix", scale=0.5), GEMM | {"op.b/1": range(6, 11)}, (5, 6)),
    Case("Gemm", "bias-scalar", partial(gemm, bias="scalar"), GEMM, (5, 6)),
    Case("Gemm", "no-bias", partial(gemm, bias=""), GEMM, (5, 6)),
    Case("Gemm", "weight-left", gemm_weight_left, {"a.w/0": range(6), "a.b/0": range(6), "z.w/1": range(6)}, (6,)),
    *(Case("MatMul", f"rank{rank}", partial(matmul, rank), SEQUENCE, (6,)) for rank in (2, 3, 4)),
    *(
        Case("MatMul", f"weight-left-rank{rank}", partial(matmul, rank, left=True),
             {"a.w/0": range(6), "a.b/0": range(6), "z.w/1": range(6)}, (6,))
        for rank in (2, 3, 4)
    ),
    Case("MatMul", "vector-right", partial(matmul_vectors, "right"),
         {"a.w/1": range(6), "a.b/0": range(6), "z.w/0": range(6)}, (6,)),
    Case("MatMul", "vector-left", partial(matmul_vectors, "left"),
         {"a.w/1": range(6), "a.b/0": range(6), "z.w/0": range(6)}, (6,)),
    Case("MatMul", "weight-behind-transpose", partial(transposed_weight, "MatMul"),
         {"a.w/1": range(6), "a.b/0": range(6), "op.w/1": range(6), "op.w/0": range(6, 10), "z.w/0": range(6, 10)}, (4, 6)),
    Case(
        "MatMul", "attention", attention,
        {"q.w/1": range(6), "q.b/0": range(6), "k.w/1": range(6), "k.b/0": range(6),
         "v.w/1": range(6, 12), "v.b/0": range(6, 12), "z.w/0": range(6, 12)}, (6, 6), zero=("q.w/1", "q.b/0"),
    ),
    Case(
        "MatMul", "attention-two-heads", partial(attention, 2),
        {"q.w/1": range(6), "q.b/0": range(6), "k.w/1": range(6), "k.b/0": range(6),
         "v.w/1": range(6, 12), "v.b/0": range(6, 12), "z.w/0": range(6, 12)}, (3, 3), zero=("q.w/1", "q.b/0"),
    ),
    Case("MatMul", "square", square, {"a.w/1": range(6)}, (6,), zero=("a.w/1",)),
    Case("MatMul", "gram", gram, {"a.w/1": range(6), "z.w/0": range(6)}, (6,), zero=("a.w/1",)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_form_exactly_these_groups(case):
    """Channels end in the weight's input axis and start on its output axis, and nothing else is tied or frozen."""
    oracle.assert_coupling(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pruned_equals_masked(case):
    """Removing channels equals zeroing the consumers' weight slices, down to one channel per group."""
    oracle.assert_case_prunes(case)


@pytest.mark.parametrize(
    ("build", "left"),
    [(partial(grouped, 6, 6, 6), 3), (partial(transposed, 6, 6, 6), 3), (partial(grouped, 2, 6, 4), 2)],
    ids=["depthwise", "depthwise-transposed", "grouped"],
)
def test_group_attribute_counts_surviving_groups(build, left):
    """A depthwise convolution that lost half its channels has half the groups; a grouped one keeps all its groups."""
    model = build()
    coupling = oracle.couple_proto(model)
    keep = np.ones(coupling.n_classes, bool)
    for bundle in coupling.bundles:
        keep[bundle.units(np.arange(coupling.n_classes))[: bundle.n_units // 2]] = False
    pruned = oracle.prune_to(model, coupling, keep)
    node = next(node for node in pruned.model.graph.node if node.name == "op")
    assert next(a.i for a in node.attribute if a.name == "group") == left


@pytest.mark.parametrize(
    ("x", "w"), [((1, 4, 5, 7), (6, 2, 3, 3)), ((1, 6, 5, 7), (6, 1, 3, 3))], ids=["grouped", "depthwise"]
)
def test_work_counts_multiply_accumulates(x, w):
    """A convolution's multiply-accumulates are its weight elements times the output's positions."""
    t = Tiny()
    size = t.input(*x)
    model = t.build(t.conv(size, "op", x[1], w[0], 3, group=x[1] // w[1]))
    (work,) = oracle.couple_proto(model).ledger.works
    counted = work.factor * np.prod([atom.size for axis in work.axes for atom in axis])
    assert counted == np.prod(w) * np.prod(x[2:])


@pytest.mark.parametrize("bias", [False, True])
def test_transposed_groups_that_are_joined_may_read_one_channel_each(bias):
    """Down to one channel of every part that is joined, the groups of a transposed convolution keep their own."""
    t = Tiny()
    x = t.input(1, 2, 4, 6)
    y = t.node("Concat", t.conv(x, "a", 2, 2), t.conv(x, "b", 2, 2), axis=1)
    model = t.build(t.conv(t.conv(y, "g", 4, 6, group=2, transpose=True, bias=bias), "z", 6, 3))
    coupling = oracle.couple_proto(model)
    read = next(bundle for bundle in coupling.bundles if len(bundle.groups) == 2)
    keep = np.ones(coupling.n_classes, bool)
    keep[read.units(np.arange(coupling.n_classes))[: read.removable]] = False
    plan = make_plan(coupling, keep)
    assert onnxprune.apply(model, plan).report.proof.ok
    assert "g.w" in plan.initializers
