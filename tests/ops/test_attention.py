"""Fused attention: queries and keys share columns within a head, values pass; what they were scaled by stays."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
from onnx import ModelProto, helper

import oracle
from onnxprune.cost import Cost
from oracle import Case
from standins import MICROSOFT, OPSET, Fused, runnable

TOKENS, FEATURES = 5, 4


class Projected(Fused):
    """A graph whose input of shape (1, TOKENS, FEATURES) is projected to queries, keys and values."""

    def __init__(self, *, opset: int = OPSET, functions: tuple[str, ...] = ()) -> None:
        super().__init__(opset=opset, functions=functions)
        self.input(1, TOKENS, FEATURES)

    def project(self, name: str, size: int) -> str:
        """Project the input, with a bias, to (1, TOKENS, size)."""
        return self.node("Add", self.linear("x", name, FEATURES, size), self.random(size, name=f"{name}.b", scale=0.5))

    def heads(self, name: str, heads: int, size: int) -> str:
        """Project the input to (1, heads, TOKENS, size)."""
        y = self.node("Reshape", self.project(name, heads * size), self.constant([1, TOKENS, heads, -1]))
        return self.node("Transpose", y, perm=[0, 2, 1, 3])

    def finish(self, y: str, size: int) -> ModelProto:
        """Project the result."""
        return self.build(self.linear(y, "z", size, 3))


# -- Attention -------------------------------------------------------------------------------------------------------


def attention(heads: int = 2, shared: int = 2, size: int = 3, wide: int = 4, **attributes) -> ModelProto:
    """Attend with ``heads`` heads of queries and ``shared`` of keys and values, packed along the last axis."""
    t = Projected()
    parts = [t.project("q", heads * size), t.project("k", shared * size), t.project("v", shared * wide)]
    y = t.node("Attention", *parts, name="op", q_num_heads=heads, kv_num_heads=shared, **attributes)
    return t.finish(y, heads * wide)


def attention_heads(heads: int = 4, shared: int = 2, **attributes) -> ModelProto:
    """Attend with an axis of heads."""
    t = Projected()
    parts = [t.heads("q", heads, 3), t.heads("k", shared, 3), t.heads("v", shared, 4)]
    y = t.node("Attention", *parts, name="op", **attributes)
    y = t.node("Reshape", t.node("Transpose", y, perm=[0, 2, 1, 3]), t.constant([1, TOKENS, heads * 4]))
    return t.finish(y, heads * 4)


def attention_of_single_columns() -> ModelProto:
    """Attend with heads of one column, each with a bias of its own: only whole heads can go."""
    t = Projected()
    parts = [t.project(name, 6) for name in "qkv"]
    bias = t.random(1, 6, TOKENS, TOKENS, name="bias")
    return t.finish(t.node("Attention", *parts, bias, name="op", q_num_heads=6, kv_num_heads=6), 6)


def attention_with_past(*, constant: bool) -> ModelProto:
    """Attend to earlier tokens, too: to learned ones, or to those that the graph's inputs hold."""
    t = Projected()
    parts = [t.project("q", 6), t.project("k", 6), t.project("v", 8)]
    shapes = {"past_k": (1, 2, 2, 3), "past_v": (1, 2, 2, 4)}
    past = [t.random(*s, name=n) if constant else t.input(*s, name=n) for n, s in shapes.items()]
    y, *present = t.node("Attention", *parts, "", *past, name="op", outputs=3, q_num_heads=2, kv_num_heads=2)
    for name, size in zip(present, (3, 4), strict=True):
        y = t.node("Add", y, t.node("ReduceMax", t.linear(name, f"{name}2", size, 1)))
    return t.finish(y, 8)


def attention_of_made_tokens() -> ModelProto:
    """Attend within three tokens that one layer makes and another reads: each token's channels are outputs of their own."""
    t = Fused()
    y = t.node("Add", t.linear(t.input(1, FEATURES), "a", FEATURES, 54), t.random(54, name="a.b"))
    parts = t.node("Split", t.node("Reshape", y, t.constant([1, 3, 18])), outputs=3, axis=-1, num_outputs=3)
    y = t.node("Attention", *parts, name="op", q_num_heads=2, kv_num_heads=2)
    return t.build(t.linear(t.node("Reshape", y, t.constant([1, 18])), "z", 18, 3))


def attention_with_outputs() -> ModelProto:
    """Read keys, values and products of queries and keys, too."""
    t = Projected()
    parts = [t.project("q", 12), t.project("k", 6), t.project("v", 8)]
    y, k, v, scores = t.node("Attention", *parts, name="op", outputs=4, q_num_heads=4, kv_num_heads=2)
    y = t.node("Add", y, t.node("ReduceSum", scores))
    y = t.node("Add", y, t.node("ReduceSum", t.linear(k, "k2", 3, 2)))
    return t.finish(t.node("Add", y, t.node("ReduceSum", t.linear(v, "v2", 4, 2))), 16)


# -- rotary embeddings -----------------------------------------------------------------------------------------------


def rotary(
    domain: str = "", *, heads: bool = False, count: int = 2, size: int = 4, rotated: int = 4, positions: bool = True,
    tables: str = "constant", **attributes,
) -> ModelProto:  # fmt: skip
    """Rotate two heads of ``size`` columns, of which the first ``rotated`` turn by angles from two tables."""
    t = Projected()
    y = t.heads("q", count, size) if heads else t.project("q", count * size)
    shape = (7, rotated // 2) if positions else (1, TOKENS, rotated // 2)
    make = {
        "constant": lambda name: t.random(*shape, name=name),
        "given": lambda name: t.input(*shape, name=name),
        "computed": lambda name: t.linear(t.input(*shape[:-1], 3, name=f"{name}.x"), name, 3, shape[-1]),
    }
    angles = [make[tables](name) for name in ("cos", "sin")]
    order = [t.constant([[3, 1, 4, 1, 5]])] if positions else []
    y = t.node(
        "RotaryEmbedding", y, *(order + angles if domain else angles + order), name="op", domain=domain, **attributes
    )
    if heads:
        y = t.node("Reshape", t.node("Transpose", y, perm=[0, 2, 1, 3]), t.constant([1, TOKENS, count * size]))
    return t.finish(y, count * size)


def rotated(*columns: int, tables: tuple[int, ...] = (0, 1), names: tuple[str, ...] = ("cos/1", "sin/1")) -> dict:
    """Classes of one head's columns, the same in both heads, and of the tables."""
    return dict.fromkeys(("q.w/1", "q.b/0", "z.w/0"), columns * 2) | dict.fromkeys(names, tables)


# -- onnxruntime's attention -----------------------------------------------------------------------------------------


def projected(
    *, heads: int = 2, sizes: tuple[int, ...] = (), bias: bool = True, extra: tuple[str, ...] = (),
    functions: tuple[str, ...] = (), **attributes,
) -> ModelProto:  # fmt: skip
    """Attend with heads whose queries, keys and values one weight projects, from a hidden layer of six."""
    t = Projected(functions=functions)
    x = t.project("a", 6)
    total = sum(sizes) or 18
    if sizes:
        attributes["qkv_hidden_sizes"] = sizes
    weights = [t.random(6, total, name="w", scale=0.4), t.random(total, name="b") if bias else ""]
    more = {
        "lengths": lambda: t.constant(np.array([4], np.int32)),
        "bias": lambda: t.random(1, heads, TOKENS, TOKENS, name="bias"),
    }
    operands = [*weights, *(more[name]() if name else "" for name in extra)]
    y = t.fused("Attention", x, *operands, num_heads=heads, **attributes)
    return t.finish(y, sizes[2] if sizes else 6)


def projected_with_past(*, constant: bool) -> ModelProto:
    """Attend to earlier tokens as well, and read the keys and values of all."""
    t = Projected()
    past = t.random(2, 1, 2, 2, 3, name="past") if constant else t.input(2, 1, 2, 2, 3, name="past")
    operands = [t.random(FEATURES, 18, name="w"), t.random(18, name="b"), "", past]
    y, present = t.fused("Attention", "x", *operands, outputs=2, num_heads=2)
    return t.finish(t.node("Add", y, t.node("ReduceMax", t.linear(present, "p", 3, 1))), 6)


def multi_head(
    *, heads: int = 2, bias: bool = False, wide: int = 4, extra: tuple[str, ...] = (), outputs: int = 1, **attributes
) -> ModelProto:
    """Attend with queries and keys of six columns in all heads, values of ``wide`` in each."""
    t = Projected()
    parts = [t.project("q", 6), t.project("k", 6), t.project("v", heads * wide)]
    more = {
        "mask": lambda: t.constant(np.array([[1, 1, 1, 0, 1]], np.int32)),
        "bias": lambda: t.random(1, heads if heads > 2 else 1, TOKENS, TOKENS, name="bias"),
        "past_k": lambda: t.random(1, 2, 2, 3, name="past_k"),
        "past_v": lambda: t.random(1, 2, 2, 3, name="past_v"),
    }
    added = t.random(12 + heads * wide, name="b") if bias else ""
    operands = [added, *(more[name]() if name else "" for name in extra)]
    y = t.fused("MultiHeadAttention", *parts, *operands, num_heads=heads, outputs=outputs, **attributes)
    if outputs > 1:
        y, *present = y
        for name in present:
            y = t.node("Add", y, t.node("ReduceMax", t.linear(name, f"{name}2", 3 if name == "op.1" else wide, 1)))
    return t.finish(y, heads * wide)


def cross() -> ModelProto:
    """Attend to keys and values that come as heads, as those of an encoder do: they are as wide as each other."""
    t = Projected()
    parts = [t.project("q", 6), t.heads("k", 2, 3), t.heads("v", 2, 3)]
    return t.finish(t.fused("MultiHeadAttention", *parts, num_heads=2), 6)


def stacked() -> ModelProto:
    """Attend to queries, keys and values that are stacked within every head."""
    t = Projected(functions=("MultiHeadAttention",))
    y = t.node("Reshape", t.project("a", 2 * 3 * 4), t.constant([1, TOKENS, 2, 3, -1]))
    return t.finish(t.fused("MultiHeadAttention", y, num_heads=2), 8)


def packed() -> ModelProto:
    """Attend within one sequence without padding."""
    t = Projected(functions=("PackedMultiHeadAttention",))
    parts = [
        t.node("Reshape", t.project(n, size), t.constant([TOKENS, -1]))
        for n, size in zip("qkv", (6, 6, 8), strict=True)
    ]
    offsets = [t.constant(np.arange(TOKENS, dtype=np.int32)[None]), t.constant(np.array([0, TOKENS], np.int32))]
    y = t.fused("PackedMultiHeadAttention", *parts, "", *offsets, num_heads=2)
    return t.finish(y, 8)


def packed_and_projected() -> ModelProto:
    """Project and attend within one sequence without padding."""
    t = Projected(functions=("PackedAttention",))
    x = t.node("Reshape", "x", t.constant([TOKENS, FEATURES]))
    offsets = [t.constant(np.arange(TOKENS, dtype=np.int32)[None]), t.constant(np.array([0, TOKENS], np.int32))]
    operands = [t.random(FEATURES, 18, name="w"), t.random(18, name="b"), *offsets]
    y = t.fused("PackedAttention", x, *operands, num_heads=2, qkv_hidden_sizes=[6, 6, 6])
    return t.finish(y, 6)


def grouped(
    size: int = 16, *, stacked: bool = False, rotated: int = 0, past: bool = False, extra: tuple[str, ...] = (), **attributes
) -> ModelProto:  # fmt: skip
    """Attend with four heads of queries and two of keys and values, all of ``size`` columns."""
    t = Projected()
    parts = (
        [t.project("q", 8 * size), "", ""]
        if stacked
        else [t.project(n, m * size) for n, m in zip("qkv", (4, 2, 2), strict=True)]
    )
    cache = [t.input(1, 2, 2, size, name=name) for name in ("past_k", "past_v")] if past else ["", ""]
    total = TOKENS + 2 * past
    lengths = [t.constant(np.array([total - 1], np.int32)), t.constant(np.array(total, np.int32))]
    tables = [t.random(8, rotated // 2, name=name) for name in ("cos", "sin")] if rotated else ["", ""]
    more = {
        "bias": lambda: t.random(1, 4, TOKENS, total, name="bias"),
        "sink": lambda: t.random(4, name="sink"),
        "scale": lambda: t.constant(np.ones(1, np.float32)),
    }
    operands = [*tables, *(more[name]() if name else "" for name in extra)]
    given = {"do_rotary": int(rotated > 0)} | attributes
    y = t.fused(
        "GroupQueryAttention", *parts, *cache, *lengths, *operands, num_heads=4, kv_num_heads=2, outputs=3, **given
    )
    y = t.linear(y[0], "z", 4 * size, 3)
    return t.build(y, "op.1", "op.2") if past else t.build(y)


def runs(*starts: int, size: int) -> list[int]:
    """Numbers of ``size`` columns from every start on."""
    return [start + column for start in starts for column in range(size)]


QK = dict.fromkeys(("q.w/1", "q.b/0", "k.w/1", "k.b/0"), range(6))
V = dict.fromkeys(("v.w/1", "v.b/0", "z.w/0"), range(6, 14))
ZERO = tuple(QK)
INPUT = "it meets an axis that cannot shrink"
OTHER = "another factor of the same axis shrinks instead"


def qkv(q: Sequence[int], k: Sequence[int], v: Sequence[int], z: Sequence[int]) -> dict[str, Sequence[int]]:
    """Classes of the columns of all four projections, and of the first three's biases."""
    columns = {"q": q, "k": k, "v": v}
    return {f"{n}.{part}": own for n, own in columns.items() for part in ("w/1", "b/0")} | {"z.w/0": z}


GROUPED = qkv(runs(0, 0, 3, 3, size=3), range(6), range(6, 14), runs(6, 6, 10, 10, size=4))
INNER = dict.fromkeys(("a.w/1", "a.b/0", "w/0"), range(20, 26))
INNER_ZERO = ("a.w/1", "a.b/0", "w/1", "b/0")
PROJECTED = INNER | dict.fromkeys(("w/1", "b/0"), runs(0, 0, 6, size=6)) | {"z.w/0": range(6, 12)}
HEADS = dict.fromkeys(("q.w/1", "q.b/0", "z.w/0"), runs(0, 0, 0, 0, 1, 1, 1, 1, size=1))
EIGHTS = qkv(runs(0, 0, 16, 16, size=16), range(32), range(32, 64), runs(32, 32, 48, 48, size=16))
TURNED = qkv(runs(*[0] * 8, size=16), runs(*[0] * 4, size=16), range(16, 80), runs(16, 16, 48, 48, size=32))
PAIRS = np.repeat(np.arange(16), 2)
TABLES = dict.fromkeys(("cos/1", "sin/1"), range(16))

STANDARD = [
    Case("Attention", "packed", attention, QK | V, (3, 4), zero=ZERO),
    Case("Attention", "causal", partial(attention, is_causal=1, softcap=2.0, scale=0.3), QK | V, (3, 4), zero=ZERO),
    Case("Attention", "grouped", partial(attention, 4), GROUPED, (3, 4), zero=ZERO),
    Case(
        "Attention", "one-key-head", partial(attention, 4, 1),
        qkv(runs(0, 0, 0, 0, size=3), range(3), range(3, 7), runs(3, 3, 3, 3, size=4)), (3, 4), zero=ZERO,
    ),
    Case("Attention", "heads", partial(attention_heads, 2), QK | V, (3, 4), zero=ZERO),
    Case("Attention", "grouped-heads", attention_heads, GROUPED, (3, 4), zero=ZERO),
    Case(
        "Attention", "single-columns", attention_of_single_columns,
        qkv(range(6), range(6), range(6), range(6)) | {"bias/1": range(6)}, (6,), zero=ZERO,
    ),
    Case(
        "Attention", "learned-past", partial(attention_with_past, constant=True),
        qkv(*[runs(0, 0, size=3)] * 2, *[runs(3, 3, size=4)] * 2)
        | dict.fromkeys(("past_k/3", "op.12.w/0"), range(3)) | dict.fromkeys(("past_v/3", "op.22.w/0"), range(3, 7)),
        (3, 4), zero=(*ZERO, "past_k/3"),
    ),
    Case(
        "Attention", "given-past", partial(attention_with_past, constant=False),
        frozen={"k.w/1": ("op", "Attention", INPUT), "v.w/1": ("op", "Attention", INPUT)},
    ),
    Case(
        "Attention", "made-tokens", attention_of_made_tokens,
        dict.fromkeys(("a.w/1", "a.b/0"), [*runs(0, 0, 6, size=6)] * 3) | {"z.w/0": runs(6, 6, 6, size=6)}, (3, 3),
        zero=("a.w/1", "a.b/0"),
    ),
    Case(
        "Attention", "outputs", attention_with_outputs,
        qkv(runs(0, 0, 0, 0, size=3), runs(0, 0, size=3), runs(3, 3, size=4), runs(3, 3, 3, 3, size=4))
        | {"k2.w/0": range(3), "v2.w/0": range(3, 7), "k2.w/1": (7, 8), "v2.w/1": (9, 10)},
        (2, 2, 3, 4), zero=(*ZERO, "k2.w/1", "v2.w/1"),
    ),
]  # fmt: skip


def rotary_cases(domain: str) -> list[Case]:
    """Cases of an operator that two domains have."""
    make = partial(Case, "RotaryEmbedding")
    count = 0 if domain else 2  # onnxruntime's finds it by itself
    frozen = {"q.w/1": ("op", "RotaryEmbedding", INPUT)}
    return [
        make("packed", partial(rotary, domain, num_heads=count), rotated(0, 1, 0, 1), (2,)),
        make(
            "packed-by-sixteen", partial(rotary, domain, size=16, rotated=16, num_heads=count),
            rotated(*range(8), *range(8), tables=(*range(8),)), (8,),
        ),
        make("heads", partial(rotary, domain, heads=True), rotated(0, 1, 0, 1), (2,)),
        make("interleaved", partial(rotary, domain, num_heads=count, interleaved=1), rotated(0, 0, 1, 1), (2,)),
        make(
            "part", partial(rotary, domain, size=6, num_heads=2, rotary_embedding_dim=4),
            rotated(0, 1, 0, 1) | dict.fromkeys(HEADS, (0, 1, 0, 1, 2, 3, 0, 1, 0, 1, 4, 5)), (2, 2),
        ),
        make(
            "given-tables", partial(rotary, domain, tables="given", num_heads=2, rotary_embedding_dim=4), HEADS, (2,)
        ),
        make("given-tables-heads", partial(rotary, domain, heads=True, tables="given"), HEADS, (2,)),
        make(
            "one-head", partial(rotary, domain, count=1, tables="given", num_heads=1, rotary_embedding_dim=4),
            frozen=frozen,
        ),
    ]  # fmt: skip


ROTARY = [
    *rotary_cases(""),
    *rotary_cases(MICROSOFT),
    Case(
        "RotaryEmbedding", "computed-tables", partial(rotary, positions=False, tables="computed", num_heads=2),
        rotated(0, 1, 0, 1, names=("cos.w/1", "sin.w/1")), (2,), zero=("cos.w/1", "sin.w/1"),
    ),
]  # fmt: skip

projected_case = partial(Case, "Attention")
multi_head_case = partial(Case, "MultiHeadAttention")
grouped_case = partial(Case, "GroupQueryAttention")

FUSED = [
    projected_case("projected", projected, PROJECTED, (6, 3, 3), zero=INNER_ZERO),
    projected_case("causal", partial(projected, unidirectional=1, scale=0.3), PROJECTED, (6, 3, 3), zero=INNER_ZERO),
    projected_case("lengths", partial(projected, extra=("lengths",)), PROJECTED, (6, 3, 3), zero=INNER_ZERO),
    projected_case("added", partial(projected, extra=("", "", "bias")), PROJECTED, (6, 3, 3), zero=INNER_ZERO),
    projected_case(
        "wide", partial(projected, sizes=(6, 6, 8)),
        PROJECTED | {n: [*range(6), *range(14)] for n in ("w/1", "b/0")} | {"z.w/0": range(6, 14)}, (6, 3, 4),
        zero=INNER_ZERO,
    ),
    projected_case(
        "no-bias", partial(projected, bias=False), {n: own for n, own in PROJECTED.items() if n != "b/0"}, (6, 3, 3),
        zero=INNER_ZERO[:3],
    ),
    projected_case(
        "single-columns", partial(projected, heads=6, extra=("", "", "bias")),
        INNER | dict.fromkeys(("w/1", "b/0"), runs(0, 0, 0, size=6)) | {"z.w/0": range(6), "bias/1": range(6)}, (6, 6),
        zero=INNER_ZERO,
    ),
    projected_case(
        "rotary", partial(projected, sizes=(6, 6, 6), do_rotary=1, functions=("Attention",)),
        INNER | dict.fromkeys(("w/1", "b/0"), [-1] * 12 + [*range(6)]) | {"z.w/0": range(6)}, (3, 6),
        frozen={"w/1": ("", "Reshape", OTHER)}, zero=INNER_ZERO,
    ),
    projected_case(
        "learned-past", partial(projected_with_past, constant=True),
        dict.fromkeys(("w/1", "b/0"), runs(*[0] * 6, size=3)) | {"z.w/0": runs(0, 0, size=3)}
        | dict.fromkeys(("past/4", "p.w/0"), range(3)),
        (3,), zero=("w/1", "b/0", "past/4"),
    ),
    projected_case(
        "given-past", partial(projected_with_past, constant=False), frozen={"w/1": ("op", "Attention", INPUT)}
    ),
    Case(
        "PackedAttention", "one-sequence", packed_and_projected, {n: PROJECTED[n] for n in ("w/1", "b/0", "z.w/0")}, (3, 3),
        zero=("w/1", "b/0"),
    ),
    multi_head_case("plain", multi_head, QK | V, (3, 4), zero=ZERO),
    multi_head_case("causal", partial(multi_head, scale=0.3, unidirectional=1), QK | V, (3, 4), zero=ZERO),
    multi_head_case(
        "bias", partial(multi_head, bias=True), QK | V | {"b/0": [*range(6), *range(14)]}, (3, 4), zero=(*ZERO, "b/0")
    ),
    multi_head_case("masked", partial(multi_head, extra=("mask", "bias")), QK | V, (3, 4), zero=ZERO),
    multi_head_case(
        "learned-past", partial(multi_head, wide=3, extra=("", "", "past_k", "past_v"), outputs=3),
        qkv(*[runs(0, 0, size=3)] * 2, *[runs(3, 3, size=3)] * 2)
        | dict.fromkeys(("past_k/3", "op.12.w/0"), range(3)) | dict.fromkeys(("past_v/3", "op.22.w/0"), range(3, 6)),
        (3,), zero=(*ZERO, "past_k/3"),
    ),
    multi_head_case(
        "single-columns", partial(multi_head, heads=6, wide=1, bias=True, extra=("", "bias")),
        qkv(*[range(6)] * 4) | {"b/0": runs(0, 0, 0, size=6), "bias/1": range(6)}, (6,), zero=(*ZERO, "b/0"),
    ),
    multi_head_case("cross", cross, QK | dict.fromkeys(V, range(6, 12)), (3,), zero=ZERO),
    multi_head_case(
        "stacked", stacked, dict.fromkeys(("a.w/1", "a.b/0"), runs(0, 0, 0, 4, 4, 4, size=4)) | {"z.w/0": range(8)}, (4,),
        zero=("a.w/1", "a.b/0"),
    ),
    Case("PackedMultiHeadAttention", "one-sequence", packed, QK | V, (3, 4), zero=ZERO),
    grouped_case("plain", grouped, EIGHTS, (2,), zero=ZERO),
    grouped_case(
        "stacked", partial(grouped, stacked=True),
        {n: [*EIGHTS["q.w/1"], *range(64)] for n in ("q.w/1", "q.b/0")} | {"z.w/0": EIGHTS["z.w/0"]}, (2,), zero=ZERO[:2],
    ),
    grouped_case("rotary", partial(grouped, 32, rotated=32), TURNED | TABLES, (2,), zero=ZERO),
    grouped_case(
        "unused-tables", partial(grouped, 32, rotated=32, do_rotary=0),
        dict.fromkeys(("q.w/1", "q.b/0", "z.w/0"), np.repeat(np.arange(4), 32)), (2,),
        frozen={"k.w/1": ("", "Reshape", OTHER)}, zero=("q.w/1", "q.b/0"),
    ),
    grouped_case(
        "interleaved", partial(grouped, 32, rotated=32, rotary_interleaved=1, scale=0.2),
        TURNED | TABLES | dict.fromkeys(("q.w/1", "q.b/0"), [*PAIRS] * 4) | dict.fromkeys(("k.w/1", "k.b/0"), [*PAIRS] * 2),
        (2,), zero=ZERO,
    ),
    grouped_case(
        "added", partial(grouped, extra=("", "bias", "sink")), EIGHTS, (2,), zero=ZERO,
        frozen={"bias/1": ("", "Reshape", OTHER), "sink/0": ("", "Reshape", OTHER)},
    ),
    grouped_case(
        "given-past", partial(grouped, past=True),
        dict.fromkeys(("q.w/1", "q.b/0", "z.w/0"), np.repeat(np.arange(4), 16)), (2,),
        frozen={"k.w/1": ("op", "GroupQueryAttention", INPUT)},
    ),
    grouped_case(
        "quantised", partial(grouped, extra=("", "", "", "scale", "scale")),
        frozen={"q.w/1": ("op", "GroupQueryAttention", "a quantised cache")},
    ),
]  # fmt: skip

CASES = [*STANDARD, *ROTARY, *FUSED]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_columns_tie_within_heads(case, monkeypatch):
    """Queries and keys share columns within every head; values pass theirs to the output."""
    oracle.assert_coupling(runnable(case, monkeypatch))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pruned_equals_masked(case, monkeypatch):
    """Pruned attention equals attention whose projections are zero in the removed columns, at the original scale."""
    oracle.assert_case_prunes(runnable(case, monkeypatch))


# -- what an operator reads from the number of columns ---------------------------------------------------------------


def pruned_node(case: Case, seed: int = 3) -> dict[str, object]:
    """Prune at random and return the attributes of the operator."""
    model = case.build()
    coupling = oracle.couple_proto(model)
    pruned = oracle.prune_to(model, coupling, oracle.random_keep(coupling, np.random.default_rng(seed)))
    node = next(node for node in pruned.model.graph.node if node.name == "op")
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


@pytest.mark.parametrize(
    ("case", "scale"),
    [
        (STANDARD[0], 3**-0.5),
        (STANDARD[1], 0.3),
        (STANDARD[4], 3**-0.5),
        (FUSED[0], 3**-0.5),
        (FUSED[1], 0.3),
        (next(case for case in FUSED if str(case) == "MultiHeadAttention-plain"), 3**-0.5),
        (next(case for case in FUSED if str(case) == "GroupQueryAttention-stacked"), 0.25),
        (next(case for case in FUSED if str(case) == "GroupQueryAttention-interleaved"), 0.2),
    ],
    ids=str,
)
def test_the_scale_stays(case, scale):
    """The default scale is one over the root of the number of columns: it is written down as it was before some went."""
    assert pruned_node(case)["scale"] == pytest.approx(scale)


def test_whole_heads_keep_the_default_scale():
    """Where whole heads go and columns stay, nothing needs to be written down, and the numbers of heads follow."""
    attributes = pruned_node(next(case for case in STANDARD if case.name == "single-columns"))
    assert "scale" not in attributes
    assert attributes["q_num_heads"] == attributes["kv_num_heads"] < 6


def test_sizes_are_named_where_they_differ():
    """Queries and keys of onnxruntime's Attention lose other numbers of columns than values: sizes say so from then on."""
    sizes = pruned_node(FUSED[0], seed=0)["qkv_hidden_sizes"]
    assert sizes[0] == sizes[1] != sizes[2]


@pytest.mark.parametrize(("name", "unit"), [("plain", 8), ("rotary", 16), ("interleaved", 16)])
def test_grouped_heads_keep_multiples(name, unit):
    """GroupQueryAttention wants multiples of 8 columns, with rotation of 16; values are as many as keys."""
    case = next(case for case in FUSED if str(case) == f"GroupQueryAttention-{name}")
    model = case.build()
    coupling = oracle.couple_proto(model)
    pruned = oracle.prune_to(model, coupling, oracle.one_left(coupling, np.random.default_rng(0)))
    shapes = {tensor.name: tuple(tensor.dims) for tensor in pruned.model.graph.initializer}
    assert shapes["k.w"] == shapes["v.w"] == (FEATURES, 2 * unit)
    assert shapes["q.w"] == (FEATURES, 4 * unit)


def test_heads_of_queries_go_where_all_read_the_same_keys():
    """Queries, keys and values in one tensor, four heads and one: columns stay as many, so that the scale does."""
    t = Projected()
    lengths = [t.constant(np.array([TOKENS - 1], np.int32)), t.constant(np.array(TOKENS, np.int32))]
    y, *_ = t.fused(
        "GroupQueryAttention", t.project("q", 6 * 16), *[""] * 4, *lengths, num_heads=4, kv_num_heads=1, outputs=3
    )
    node = oracle.assert_pruned(t.finish(y, 4 * 16), 0.6, attention="heads").model.graph.node
    attributes = {a.name: helper.get_attribute_value(a) for n in node if n.name == "op" for a in n.attribute}
    assert attributes["num_heads"] < 4
    assert attributes["kv_num_heads"] == 1
    assert "scale" not in attributes


@pytest.mark.parametrize("extra", ["", "mask", "bias"])
def test_tokens_of_queries_stay_where_there_is_a_mask(extra):
    """Tokens of queries that a product from the left makes may go, with those of an addend, unless a mask is given."""
    t = Projected()
    queries = t.node("MatMul", t.random(6, TOKENS, name="made"), t.project("q", 6))
    added = {
        "": ["", ""],
        "mask": [t.constant(np.array([[1, 1, 1, 0, 1]], np.int32)), ""],
        "bias": ["", t.random(1, 1, 6, TOKENS, name="bias")],
    }[extra]
    y = t.fused("MultiHeadAttention", queries, t.project("k", 6), t.project("v", 8), "", *added, num_heads=2)
    y = t.node("MatMul", t.random(3, 6, name="mixed"), t.linear(y, "z", 8, 3))
    plan = oracle.assert_pruned(t.build(y), 0.4).plan
    assert (0 in plan.initializers.get("made", {})) == (extra != "mask")


def test_attention_costs_two_products_per_head():
    """Queries times keys and probabilities times values: batch * heads * tokens * tokens * columns each."""
    coupling = oracle.couple_proto(attention(4, 2, size=3, wide=4))
    cost = Cost(coupling)
    macs = cost.layers.values(cost.counts(np.ones(coupling.n_classes, bool)))
    own = [mac for work, mac in zip(cost.works, macs, strict=True) if work.node.op == "Attention"]
    assert own == [4 * TOKENS * TOKENS * 3, 4 * TOKENS * TOKENS * 4]
