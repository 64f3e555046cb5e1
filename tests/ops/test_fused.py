"""Operators that optimisers fuse couple, prune and cost what their parts do."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

import oracle
from onnxprune.cost import Cost
from oracle import Case
from standins import Fused, runnable

TOKENS = 5
SIZE = (4, 6)


def sequence(middle: Callable[[Fused, str], str], features: int = 6, after: int | None = None, **options) -> ModelProto:
    """Build tokens -> layer ``a`` (4 to ``features``, with bias) -> ``middle`` -> layer ``z`` (``after`` to 3)."""
    t = Fused(**options)
    y = t.node("Add", t.linear(t.input(2, TOKENS, 4), "a", 4, features), t.random(features, name="a.b"))
    return t.build(t.linear(middle(t, y), "z", after or features, 3))


def maps(middle: Callable[[Fused, str], str], channels: int = 6, after: int | None = None, **options) -> ModelProto:
    """Build feature maps -> convolution ``a`` (2 to ``channels``) -> ``middle`` -> convolution ``z`` (``after`` to 3)."""
    t = Fused(**options)
    y = middle(t, t.conv(t.input(1, 2, *SIZE), "a", 2, channels))
    return t.build(t.conv(y, "z", after or channels, 3))


def channels_last(
    middle: Callable[[Fused, str], str], channels: int = 6, after: int | None = None, **options
) -> ModelProto:
    """Build feature maps whose channels stand last in ``middle``."""

    def moved(t: Fused, y: str) -> str:
        return t.node("Transpose", middle(t, t.node("Transpose", y, perm=[0, 2, 3, 1])), perm=[0, 3, 1, 2])

    return maps(moved, channels, after, **options)


# -- activations and biases ------------------------------------------------------------------------------------------


def activation(op: str, vectors: int = 0) -> ModelProto:
    """Add some vectors, then activate."""

    def middle(t: Fused, y: str) -> str:
        return t.fused(op, y, *(t.random(6, name=f"op.{index}") for index in range(vectors)))

    return sequence(middle)


def bias_add() -> ModelProto:
    """Add a bias and another layer's output."""

    def middle(t: Fused, y: str) -> str:
        return t.fused("BiasAdd", y, t.random(6, name="op.0"), t.linear("x", "skip", 4, 6))

    return sequence(middle, functions=("BiasAdd",))


def bias_split_gelu() -> ModelProto:
    """Add a bias, multiply the left half by the right half's activation."""
    return sequence(
        lambda t, y: t.fused("BiasSplitGelu", y, t.random(6, name="op.0")), after=3, functions=("BiasSplitGelu",)
    )


# -- products and convolutions ---------------------------------------------------------------------------------------


def fused_gemm(**attributes) -> ModelProto:
    """Multiply, add and activate."""
    t = Fused()
    y = t.gemm(t.input(TOKENS, 4), "a", 4, 6)
    shape = (5, 6) if attributes.get("transB") else (6, 5)
    y = t.fused(
        "FusedGemm", y, t.random(*shape, name="op.w"), t.random(5, name="op.b"), activation="Tanh", **attributes
    )
    return t.build(t.gemm(y, "z", 5, 3))


def fused_matmul(shape: tuple[int, ...] = (6, 5), op: str = "FusedMatMul", **attributes) -> ModelProto:
    """Multiply tokens by a weight that is stored in one way or another."""
    return sequence(lambda t, y: t.fused(op, y, t.random(*shape, name="op.w"), alpha=0.5, **attributes), after=5)


def scores(**attributes) -> ModelProto:
    """Multiply two layers' tokens with each other: their features end there."""
    t = Fused()
    t.input(2, TOKENS, 4)
    q, k = (t.node("Add", t.linear("x", name, 4, 6), t.random(6, name=f"{name}.b")) for name in ("a", "k"))
    if not attributes.get("transB"):
        k = t.node("Transpose", k, perm=[0, 2, 1])
    if attributes.get("transA"):
        q = t.node("Transpose", q, perm=[0, 2, 1])
    if attributes.get("transBatchA"):  # rows, batch, columns
        q, k = (t.node("Transpose", y, perm=[1, 0, 2]) for y in (q, k))
    return t.build(t.fused("FusedMatMul", q, k, **attributes))


def fused_conv(*, residual: bool = False, **attributes) -> ModelProto:
    """Convolve, perhaps add another layer's output, activate."""
    groups = attributes.get("group", 1)

    def middle(t: Fused, y: str) -> str:
        operands = [t.random(4, 6 // groups, 3, 3, name="op.w", scale=0.2), t.random(4, name="op.b")]
        operands += [t.conv("x", "skip", 2, 4)] if residual else []
        return t.fused("FusedConv", y, *operands, activation="Sigmoid", pads=[1] * 4, kernel_shape=[3, 3], **attributes)

    return maps(middle, after=4)


def depthwise() -> ModelProto:
    """Convolve every channel by itself, and activate."""

    def middle(t: Fused, y: str) -> str:
        return t.fused("FusedConv", y, t.random(6, 1, 3, 3, name="op.w"), activation="Relu", pads=[1] * 4, group=6)

    return maps(middle)


def nhwc_conv(op: str = "NhwcConv", group: int = 1) -> ModelProto:
    """Convolve maps whose channels stand last."""

    def middle(t: Fused, y: str) -> str:
        operands = [t.random(4, 6 // group, 1, 1, name="op.w"), t.random(4, name="op.b")]
        if op == "NhwcFusedConv":
            operands.append(t.node("Transpose", t.conv("x", "skip", 2, 4), perm=[0, 2, 3, 1]))
        return t.fused(op, y, *operands, group=group)

    return channels_last(middle, after=4, functions=(op,))


# -- norms -----------------------------------------------------------------------------------------------------------


def simplified() -> ModelProto:
    """Divide by the root of the mean square, as onnxruntime names it in the standard's domain."""
    return sequence(
        lambda t, y: t.node("SimplifiedLayerNormalization", y, t.random(6, name="op.scale", offset=1.0), name="op")
    )


def skip_norm(
    op: str = "SkipLayerNormalization", *, bias: bool = True, outputs: int = 1, skip: str = "layer"
) -> ModelProto:
    """Add another layer's output (or what all sequences share) and normalise; the sum may be used as well."""

    def middle(t: Fused, y: str) -> str:
        other = t.linear("x", "skip", 4, 6) if skip == "layer" else t.random(TOKENS, 6, name="skip")
        vectors = [t.random(6, name=f"op.{role}", offset=1.0, scale=0.2) for role in ("scale", "shift")]
        added = t.random(6, name="op.bias") if bias else ""
        operands = [*vectors, added] if op == "SkipLayerNormalization" else [vectors[0], added]
        y = t.fused(op, y, other, *operands, outputs=outputs)
        return y if outputs == 1 else t.node("Add", t.node("Mul", y[0], y[2]), y[3])

    return sequence(middle)


def embed_norm(*, segments: bool = True, outputs: int = 2) -> ModelProto:
    """Look words, positions and segments up, add and normalise."""
    t = Fused()
    words = t.input(2, TOKENS, kind=TensorProto.INT32)
    tables = [t.random(rows, 6, name=name) for name, rows in (("words", 9), ("positions", 8))]
    kinds = [words, t.random(2, 6, name="kinds")] if segments else ["", ""]
    vectors = [t.random(6, name=f"op.{role}", offset=1.0, scale=0.2) for role in ("scale", "shift")]
    y = t.fused("EmbedLayerNormalization", words, kinds[0], *tables, kinds[1], *vectors, outputs=outputs)
    return t.build(t.linear(t.node("Add", y[0], y[2]) if outputs == 3 else y[0], "z", 6, 3))


def group_norm(op: str = "GroupNorm", groups: int = 2) -> ModelProto:
    """Normalise groups of channels, which stand last; with a skip tensor and a bias they stand second here."""

    def middle(t: Fused, y: str) -> str:
        vectors = [t.random(6, name=f"op.{role}", offset=1.0, scale=0.2) for role in ("scale", "shift")]
        if op == "GroupNorm":
            return t.fused(op, y, *vectors, groups=groups, activation=0)
        skip = t.linear(t.node("ReduceMean", "x", t.constant([2, 3]), keepdims=0), "skip", 2, 6)
        operands = [*vectors, skip, t.random(6, name="op.bias")]
        y, total = t.fused(op, y, *operands, groups=groups, activation=1, channels_last=0, outputs=2)
        return t.node("Add", y, total)

    return (channels_last if op == "GroupNorm" else maps)(middle, functions=(op,))


LAYER = {"a.w/1": range(6), "a.b/0": range(6), "z.w/0": range(6)}
MAPS = {"a.w/0": range(6), "a.b/0": range(6), "z.w/1": range(6)}
VECTORS = {"op.scale/0": range(6), "op.shift/0": range(6)}
INNER = {"a.w/1": range(6), "a.b/0": range(6)}
OUTER = range(6, 11)
CONV = {"a.w/0": range(6), "a.b/0": range(6), "op.w/1": range(6)} | dict.fromkeys(
    ("op.w/0", "op.b/0", "z.w/1"), range(6, 10)
)
GROUPS = {"a.w/0": range(6), "a.b/0": range(6)} | dict.fromkeys(("op.w/0", "op.b/0", "z.w/1"), range(6, 10))
SCORES = dict.fromkeys(("a.w/1", "a.b/0", "k.w/1", "k.b/0"), range(6))
COLUMNS = [0, 1, 2, 0, 1, 2]

CASES = [
    *(Case(op, "plain", partial(activation, op), LAYER, (6,)) for op in ("Gelu", "QuickGelu", "FastGelu")),
    *(
        Case(op, "bias", partial(activation, op, 1), LAYER | {"op.0/0": range(6)}, (6,))
        for op in ("FastGelu", "BiasGelu")
    ),
    Case("BiasAdd", "skip", bias_add, LAYER | {"op.0/0": range(6), "skip.w/1": range(6)}, (6,)),
    Case(
        "BiasSplitGelu", "halves", bias_split_gelu,
        dict.fromkeys(("a.w/1", "a.b/0", "op.0/0"), COLUMNS) | {"z.w/0": range(3)}, (3,),
    ),
    *(
        Case(
            "FusedGemm", f"transB={side}", partial(fused_gemm, transB=side),
            {"a.w/1": range(6), "a.b/0": range(6), f"op.w/{side}": range(6), f"op.w/{1 - side}": OUTER}
            | dict.fromkeys(("op.b/0", "z.w/0"), OUTER), (5, 6), zero=("a.w/1", "a.b/0"),
        )
        for side in (0, 1)
    ),
    Case(
        "FusedMatMul", "weight", fused_matmul, INNER | {"op.w/0": range(6), "op.w/1": OUTER, "z.w/0": OUTER}, (5, 6),
        zero=tuple(INNER),
    ),
    Case(
        "TransposeMatMul", "weight", partial(fused_matmul, (5, 6), "TransposeMatMul", transB=1),
        INNER | {"op.w/1": range(6), "op.w/0": OUTER, "z.w/0": OUTER}, (5, 6), zero=tuple(INNER),
    ),
    Case(
        "FusedMatMul", "stored-across-batch", partial(fused_matmul, (6, 2, 5), transBatchB=1),
        INNER | {"op.w/0": range(6), "op.w/2": OUTER, "z.w/0": OUTER}, (5, 6), zero=tuple(INNER),
    ),
    Case("FusedMatMul", "two-layers", partial(scores, transB=1), SCORES, (6,), zero=tuple(SCORES)),
    Case("FusedMatMul", "two-layers-transA", partial(scores, transA=1, alpha=2.0), SCORES, (6,), zero=tuple(SCORES)),
    Case(
        "FusedMatMul", "two-layers-across-batch", partial(scores, transBatchA=1, transBatchB=1, transB=1), SCORES, (6,),
        zero=tuple(SCORES),
    ),
    Case("FusedConv", "activated", fused_conv, CONV, (4, 6), zero=("a.w/0", "a.b/0")),
    Case(
        "FusedConv", "residual", partial(fused_conv, residual=True),
        CONV | {"skip.w/0": range(6, 10), "skip.b/0": range(6, 10)}, (4, 6), zero=("a.w/0", "a.b/0"),
    ),
    Case(
        "FusedConv", "groups", partial(fused_conv, group=2), GROUPS | {"op.w/1": range(6)}, (2, 3), zero=("a.w/0", "a.b/0")
    ),
    Case("FusedConv", "depthwise", depthwise, MAPS | {"op.w/0": range(6)}, (6,)),
    Case("NhwcConv", "plain", nhwc_conv, CONV, (4, 6), zero=("a.w/0", "a.b/0")),
    Case(
        "NhwcConv", "groups", partial(nhwc_conv, group=2), GROUPS | {"op.w/1": range(6)}, (2, 3), zero=("a.w/0", "a.b/0")
    ),
    Case(
        "NhwcFusedConv", "residual", partial(nhwc_conv, "NhwcFusedConv"),
        CONV | {"skip.w/0": range(6, 10), "skip.b/0": range(6, 10)}, (4, 6), zero=("a.w/0", "a.b/0"),
    ),
    Case("SimplifiedLayerNormalization", "scale", simplified, LAYER | {"op.scale/0": range(6)}, (6,), redefined=True),
    Case(
        "SkipLayerNormalization", "bias", skip_norm,
        LAYER | VECTORS | {"op.bias/0": range(6), "skip.w/1": range(6)}, (6,), redefined=True,
    ),
    Case(
        "SkipLayerNormalization", "shared-skip", partial(skip_norm, skip="constant", bias=False),
        LAYER | VECTORS | {"skip/1": range(6)}, (6,), redefined=True,
    ),
    Case(
        "SkipLayerNormalization", "outputs", partial(skip_norm, outputs=4),
        LAYER | VECTORS | {"op.bias/0": range(6), "skip.w/1": range(6)}, (6,), redefined=True,
    ),
    Case(
        "SkipSimplifiedLayerNormalization", "bias", partial(skip_norm, "SkipSimplifiedLayerNormalization"),
        LAYER | {"op.scale/0": range(6), "op.bias/0": range(6), "skip.w/1": range(6)}, (6,), redefined=True,
    ),
    Case(
        "SkipSimplifiedLayerNormalization", "outputs",
        partial(skip_norm, "SkipSimplifiedLayerNormalization", outputs=4, bias=False),
        LAYER | {"op.scale/0": range(6), "skip.w/1": range(6)}, (6,), redefined=True,
    ),
    Case(
        "EmbedLayerNormalization", "segments", embed_norm,
        VECTORS | dict.fromkeys(("words/1", "positions/1", "kinds/1", "z.w/0"), range(6)), (6,), redefined=True,
    ),
    Case(
        "EmbedLayerNormalization", "sum", partial(embed_norm, segments=False, outputs=3),
        VECTORS | dict.fromkeys(("words/1", "positions/1", "z.w/0"), range(6)), (6,), redefined=True,
        frozen={"words/0": ("op", "EmbedLayerNormalization", "indexed by computed values")},
    ),
    Case(
        "GroupNorm", "two-groups", group_norm, dict.fromkeys((*MAPS, *VECTORS), range(6)), (3,), redefined=True
    ),
    Case(
        "GroupNorm", "group-per-channel", partial(group_norm, groups=6),
        frozen={"a.w/0": ("op", "GroupNorm", "number of normalisation groups")},
    ),
    Case(
        "SkipGroupNorm", "two-groups", partial(group_norm, "SkipGroupNorm"),
        dict.fromkeys((*MAPS, *VECTORS, "op.bias/0", "skip.w/1"), range(6)), (3,), redefined=True,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_couple(case, monkeypatch):
    """Every input and output of a fused operator has the channels that its parts would have."""
    oracle.assert_coupling(runnable(case, monkeypatch))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pruned_equals_masked(case, monkeypatch):
    """Pruning around a fused operator is proved; where statistics run over channels it is listed as redefined."""
    if case.op == "SimplifiedLayerNormalization":  # onnx does not know it, though it stands in its domain
        monkeypatch.setattr(oracle, "check", lambda model: None)
    oracle.assert_case_prunes(runnable(case, monkeypatch))


@pytest.mark.parametrize(
    ("build", "macs"),
    [
        (fused_conv, 4 * 6 * 9 * 24),
        (partial(fused_conv, group=2), 4 * 3 * 9 * 24),
        (fused_gemm, TOKENS * 6 * 5),
        (fused_matmul, 2 * TOKENS * 6 * 5),
        (partial(scores, transBatchA=1, transBatchB=1, transB=1), 2 * TOKENS * 6 * TOKENS),
    ],
    ids=["conv", "grouped-conv", "gemm", "matmul", "two-layers"],
)
def test_costs_are_those_of_the_product_inside(build, macs):
    """Multiply-accumulates count as without the fusion."""
    coupling = oracle.couple_proto(build())
    cost = Cost(coupling)
    values = cost.layers.values(cost.counts(np.ones(coupling.n_classes, bool)))
    assert [value for work, value in zip(cost.works, values, strict=True) if work.node.title == "op"] == [macs]
