"""Operators that cut and join axes: their sizes, bounds, indices and amounts follow the kept channels."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

import oracle
from graphs import Tiny, perceptron, sandwich
from oracle import Case

INT64_MAX, INT64_MIN = 2**63 - 1, -(2**63)
A = {"a.w/0": range(6), "a.b/0": range(6)}


def concat(axis: int = 1, parts: int = 2, *, twice: bool = False) -> ModelProto:
    """Concatenate convolutions of 3, 4 and 5 channels (or one of them with itself) along the channels."""
    t = Tiny()
    x = t.input(1, 2, 4, 6)
    maps = [t.conv(x, name, 2, size) for name, size in zip("abc"[:parts], (3, 4, 5), strict=False)]
    maps = [maps[0], maps[0]] if twice else maps
    y = t.node("Concat", *maps, name="op", axis=axis)
    return t.build(t.conv(y, "z", 6 if twice else sum((3, 4, 5)[:parts]), 3))


def concat_space() -> ModelProto:
    """Concatenate along rows: channels of both are tied."""
    t = Tiny()
    x = t.input(1, 2, 4, 6)
    return t.build(t.conv(t.node("Concat", t.conv(x, "a", 2, 6), t.conv(x, "b", 2, 6), name="op", axis=2), "z", 6, 3))


def concat_input() -> ModelProto:
    """Concatenate with the graph's input, and with a constant of one channel."""
    t = Tiny()
    x = t.input(1, 2, 4, 6)
    single = t.random(1, 1, 4, 6, name="c")
    return t.build(t.conv(t.node("Concat", x, t.conv(x, "a", 2, 6), single, name="op", axis=1), "z", 9, 3))


def concat_made_rows() -> ModelProto:
    """Lay rows that a product from the left makes on those of the graph's input, and mix all of them."""
    t = Tiny()
    x = t.input(4, 5)
    y = t.node("Concat", t.node("MatMul", t.random(6, 4, name="a.w"), x), x, name="op", axis=0)
    return t.build(t.node("MatMul", t.random(3, 10, name="z.w"), y))


def concat_flat() -> ModelProto:
    """Concatenate flattened maps with features."""
    t = Tiny()
    x = t.input(1, 2, 1, 3)
    flat = t.node("Flatten", t.conv(x, "a", 2, 4))
    features = t.gemm(t.node("Flatten", x), "b", 6, 5)
    return t.build(t.gemm(t.node("Concat", flat, features, name="op", axis=1), "z", 17, 3))


def dense_block() -> ModelProto:
    """Concatenate everything before, twice (DenseNet)."""

    def middle(t: Tiny, y: str) -> str:
        for number, name in enumerate("bc"):
            y = t.node("Concat", y, t.conv(t.node("LeakyRelu", y), name, 4 + 2 * number, 2), name=f"op{name}", axis=1)
        return y

    return sandwich(middle, 4, 8)


def split(
    how: str, sizes: Sequence[int] = (3, 3), *, opset: int = 17, used: Callable | None = None, axis: int = 1
) -> ModelProto:
    """Split a convolution's output and consume every part by a convolution of its own."""
    t = Tiny(opset=opset)
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, sum(sizes))
    operands = [t.constant(list(sizes), "sizes")] if how == "input" else []
    attributes = {"attribute": {"split": list(sizes)}, "num_outputs": {"num_outputs": len(sizes)}}.get(how, {})
    parts = t.node("Split", y, *operands, name="op", outputs=len(sizes), axis=axis, **attributes)
    ends = [t.conv(part, f"z{i}", size, 3) for i, (part, size) in enumerate(zip(parts, sizes, strict=True))]
    return t.build(t.node("Sum", *ends))


def split_and_join() -> ModelProto:
    """Split, transform one half, join again (C2f, ShuffleNetV2)."""

    def middle(t: Tiny, y: str) -> str:
        left, right = t.node("Split", y, name="op", outputs=2, axis=1)
        return t.node("Concat", left, t.conv(t.node("LeakyRelu", right), "b", 3, 3), axis=1)

    return sandwich(middle)


def split_gate() -> ModelProto:
    """Multiply the two halves (gated linear unit): they are tied."""

    def middle(t: Tiny, y: str) -> str:
        left, right = t.node("Split", y, name="op", outputs=2, axis=1)
        return t.node("Mul", left, t.node("Sigmoid", right))

    return sandwich(middle, after=3)


def cut(
    starts: Sequence[int], ends: Sequence[int], axes: Sequence[int] | None = (1,), steps: Sequence[int] | None = None, *,
    after: int, opset: int = 17, whole: bool = True,
) -> ModelProto:  # fmt: skip
    """Slice six channels; a convolution of its own reads them whole too where ``whole`` says so."""
    t = Tiny(opset=opset)
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    if opset < 10:
        attributes = {"starts": list(starts), "ends": list(ends)} | ({"axes": list(axes)} if axes else {})
        part = t.node("Slice", y, name="op", **attributes)
    else:
        operands = [t.constant(list(values)) if values else "" for values in (starts, ends, axes, steps)]
        while not operands[-1]:
            operands.pop()
        part = t.node("Slice", y, *operands, name="op")
    end = t.node("ReduceMean", t.conv(part, "z", after, 3), axes=[2, 3])
    if whole:
        end = t.node("Add", end, t.node("ReduceMean", t.conv(y, "w", 6, 3), axes=[2, 3]))
    return t.build(end)


def chunks(bounds: Sequence[int]) -> ModelProto:
    """Cut channels into chunks by Slice, each read by a convolution of its own."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, bounds[-1])
    ends = []
    for number, (begin, end) in enumerate(pairwise(bounds)):
        part = t.node("Slice", y, t.constant([begin]), t.constant([end]), t.constant([1]), name=f"op{number}")
        ends.append(t.conv(part, f"z{number}", end - begin, 3))
    return t.build(t.node("Sum", *ends))


def gather(indices: int | list, *, after: int, axis: int = 1, op: str = "Gather") -> ModelProto:
    """Pick channels by constant indices."""

    def middle(t: Tiny, y: str) -> str:
        y = t.node(op, y, t.constant(indices), name="op", axis=axis)
        return t.node("Reshape", y, t.constant([1, after, -1, 6]))

    return sandwich(middle, after=after)


def gather_computed() -> ModelProto:
    """Pick channels by indices that are an input."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    y = t.node("Gather", y, t.input(2, name="indices", kind=TensorProto.INT64), name="op", axis=1)
    return t.build(t.conv(y, "z", 2, 3))


def embedding() -> ModelProto:
    """Look words up in a table: its rows freeze, its columns are channels."""
    t = Tiny()
    y = t.node("Gather", t.random(7, 6, name="table"), t.input(1, 4, kind=TensorProto.INT64), name="op")
    return t.build(t.linear(y, "z", 6, 3))


def pad(pads: Sequence[int], *, after: int, mode: str = "constant", value: float | None = None, opset: int = 17,
        axes: Sequence[int] | None = None) -> ModelProto:  # fmt: skip
    """Pad between two convolutions."""

    def middle(t: Tiny, y: str) -> str:
        if opset < 11:
            extra = {} if value is None else {"value": value}
            return t.node("Pad", y, name="op", mode=mode, pads=list(pads), **extra)
        operands = [t.constant(list(pads)), t.constant(value) if value is not None else ""]
        operands += [t.constant(list(axes))] if axes else []
        while not operands[-1]:
            operands.pop()
        return t.node("Pad", y, *operands, name="op", mode=mode)

    return sandwich(middle, after=after, opset=opset)


def option_a() -> ModelProto:
    """Shortcut of a CIFAR ResNet: strided slice and zero channels in front and behind, added to a convolution."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 4)
    steps = [t.constant(v) for v in ([0, 0], [INT64_MAX, INT64_MAX], [2, 3], [2, 2])]
    short = t.node("Pad", t.node("Slice", y, *steps), t.constant([0, 2, 0, 0, 0, 2, 0, 0]), name="op")
    y = t.node("Add", t.conv(y, "b", 4, 8, 3, strides=[2, 2]), short)
    return t.build(t.conv(t.node("LeakyRelu", y), "z", 8, 3))


def frozen(op: str, text: str, *names: str) -> dict[str, tuple[str, str, str]]:
    """Expect these axes (default: the channels before the operator) to be frozen by it."""
    return dict.fromkeys(names or ("a.w/0", "a.b/0"), ("op", op, text))


def both(*labels: int) -> dict[str, Sequence[int]]:
    """Six channels that are read whole, and in the picked order."""
    return A | {"w.w/1": range(6), "z.w/1": labels}


HALVES = A | {"z0.w/1": range(3), "z1.w/1": range(3, 6)}
LONE = "one index is taken out alone"
CASES = [
    Case("Concat", "two", concat, {
        "a.w/0": range(3), "a.b/0": range(3), "b.w/0": range(3, 7), "b.b/0": range(3, 7), "z.w/1": range(7)}, (3, 4)),
    Case("Concat", "three-negative-axis", partial(concat, -3, 3), {
        "a.w/0": range(3), "a.b/0": range(3), "b.w/0": range(3, 7), "b.b/0": range(3, 7),
        "c.w/0": range(7, 12), "c.b/0": range(7, 12), "z.w/1": range(12)}, (3, 4, 5)),
    Case("Concat", "with-itself", partial(concat, parts=1, twice=True),
         {"a.w/0": range(3), "a.b/0": range(3), "z.w/1": [*range(3)] * 2}, (3,)),
    Case("Concat", "rows", concat_space,
         A | {"b.w/0": range(6), "b.b/0": range(6), "z.w/1": range(6)}, (6,)),
    Case("Concat", "input-and-constant", concat_input, A | {"z.w/1": [-1, -1, *range(6), -1]}, (6,),
         {"z.w/1": ("op", "Concat", "cannot shrink")}),
    Case("Concat", "made-rows", concat_made_rows, {"a.w/0": range(6), "z.w/1": [*range(6), -1, -1, -1, -1]}, (6,),
         {"z.w/1": ("op", "Concat", "cannot shrink")}),
    Case("Concat", "flat-maps", concat_flat, {
        "a.w/0": range(4), "a.b/0": range(4), "b.w/1": range(4, 9), "b.b/0": range(4, 9),
        "z.w/0": [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 5, 6, 7, 8]}, (4, 5)),
    Case("Concat", "dense-block", dense_block, {
        "a.w/0": range(4), "a.b/0": range(4), "b.w/1": range(4), "b.w/0": range(4, 6), "b.b/0": range(4, 6),
        "c.w/1": range(6), "c.w/0": range(6, 8), "c.b/0": range(6, 8), "z.w/1": range(8)}, (2, 2, 4)),
    Case("Split", "equal", partial(split, "equal"), HALVES, (3, 3)),
    Case("Split", "equal-three", partial(split, "equal", (2, 2, 2)),
         A | {"z0.w/1": [0, 1], "z1.w/1": [2, 3], "z2.w/1": [4, 5]}, (2, 2, 2)),
    Case("Split", "equal-opset11", partial(split, "equal", opset=11), HALVES, (3, 3)),
    Case("Split", "input", partial(split, "input", (2, 4)), A | {"z0.w/1": range(2), "z1.w/1": range(2, 6)}, (2, 4)),
    Case("Split", "attribute-opset11", partial(split, "attribute", (2, 4), opset=11),
         A | {"z0.w/1": range(2), "z1.w/1": range(2, 6)}, (2, 4)),
    Case("Split", "num-outputs", partial(split, "num_outputs", opset=18), HALVES, (3, 3)),
    Case("Split", "num-outputs-uneven", partial(split, "num_outputs", (3, 3, 2), opset=18), {
        "a.w/0": range(8), "a.b/0": range(8), "z0.w/1": range(3), "z1.w/1": range(3, 6), "z2.w/1": range(6, 8)}, (2, 3, 3)),
    Case("Split", "negative-axis", partial(split, "input", (2, 4), axis=-3),
         A | {"z0.w/1": range(2), "z1.w/1": range(2, 6)}, (2, 4)),
    Case("Split", "one-channel-alone", partial(split, "input", (1, 5)),
         {"a.w/0": [-1, *range(5)], "a.b/0": [-1, *range(5)], "z1.w/1": range(5)}, (5,), {"a.w/0": ("op", "Split", LONE)}),
    Case("Split", "split-and-join", split_and_join,
         A | {"b.w/1": range(3, 6), "b.w/0": range(6, 9), "b.b/0": range(6, 9), "z.w/1": [0, 1, 2, 6, 7, 8]}, (3, 3, 3)),
    Case("Split", "gate", split_gate, {"a.w/0": [0, 1, 2] * 2, "a.b/0": [0, 1, 2] * 2, "z.w/1": range(3)}, (3,)),
    Case("Slice", "front", partial(cut, [0], [4], after=4), both(0, 1, 2, 3), (2, 4)),
    Case("Slice", "middle", partial(cut, [1], [4], after=3), both(1, 2, 3), (3, 3)),
    Case("Slice", "negative-bounds", partial(cut, [-4], [-1], [-3], after=3), both(2, 3, 4), (3, 3)),
    Case("Slice", "open-end", partial(cut, [2], [INT64_MAX], after=4), both(2, 3, 4, 5), (2, 4)),
    Case("Slice", "no-axes", partial(cut, [0, 2, 1], [1, 5, 3], None, after=3), both(2, 3, 4), (3, 3)),
    Case("Slice", "space-only", partial(cut, [1, 0], [3, 5], [2, 3], [1, 2], after=6), both(*range(6)), (6,)),
    Case("Slice", "channels-and-space", partial(cut, [1, 1], [3, 5], [2, 1], [1, 1], after=4), both(1, 2, 3, 4), (2, 4)),
    Case("Slice", "opset9", partial(cut, [1], [4], after=3, opset=9), both(1, 2, 3), (3, 3)),
    Case("Slice", "opset9-no-axes", partial(cut, [0, 1], [1, 4], None, after=3, opset=9), both(1, 2, 3), (3, 3)),
    Case("Slice", "reversed", partial(cut, [5], [INT64_MIN], [1], [-1], after=6), both(5, 4, 3, 2, 1, 0), (6,)),
    Case("Slice", "reversed-part", partial(cut, [4], [1], [1], [-1], after=3), both(4, 3, 2), (3, 3)),
    Case("Slice", "reversed-to-front", partial(cut, [-2], [-7], [1], [-1], after=5), both(4, 3, 2, 1, 0), (1, 5)),
    Case("Slice", "every-second", partial(cut, [0], [6], [1], [2], after=3),
         {"a.w/0": [0, 0, 1, 1, 2, 2], "a.b/0": [0, 0, 1, 1, 2, 2], "w.w/1": [0, 0, 1, 1, 2, 2], "z.w/1": range(3)}, (3,)),
    Case("Slice", "every-third-from-one", partial(cut, [1], [6], [1], [3], after=2),
         {"a.w/0": [0, 0, 0, 1, 1, 1], "a.b/0": [0, 0, 0, 1, 1, 1], "w.w/1": [0, 0, 0, 1, 1, 1], "z.w/1": range(2)}, (2,)),
    Case("Slice", "every-fourth", partial(cut, [0], [6], [1], [4], after=2),
         frozen=frozen("Slice", "a stride of 4 over 6 channels")),
    Case("Slice", "every-second-reversed", partial(cut, [5], [INT64_MIN], [1], [-2], after=3),
         frozen=frozen("Slice", "a stride of -2")),
    Case("Slice", "one-channel", partial(cut, [2], [3], after=1),
         {"a.w/0": [0, 1, -1, 3, 4, 5], "a.b/0": [0, 1, -1, 3, 4, 5], "w.w/1": [0, 1, -1, 3, 4, 5]}, (5,),
             {"a.w/0": ("op", "Slice", LONE)}),
    Case("Slice", "chunks", partial(chunks, (0, 2, 4, 8)), {
        "a.w/0": range(8), "a.b/0": range(8), "z0.w/1": range(2), "z1.w/1": range(2, 4), "z2.w/1": range(4, 8)}, (2, 2, 4)),
    Case("Gather", "some", partial(gather, [4, 0, 2], after=3),
         {"a.w/0": [0, -1, 1, -1, 2, -1], "a.b/0": [0, -1, 1, -1, 2, -1], "z.w/1": [2, 0, 1]}, (3,),
         {"a.w/0": ("", "", "no operator consumes")}),
    Case("Gather", "permutation-negative", partial(gather, [-1, 0, -2, 1, -3, 2], after=6),
         A | {"z.w/1": [5, 0, 4, 1, 3, 2]}, (6,)),
    Case("Gather", "duplicates", partial(gather, [0, 1, 2, 3, 4, 5, 0, 0, 3], after=9),
         A | {"z.w/1": [0, 1, 2, 3, 4, 5, 0, 0, 3]}, (1, 1, 4)),
    Case("Gather", "one", partial(gather, [3], after=1), frozen={"a.w/0": ("op", "Gather", LONE)}),
    Case("Gather", "scalar", partial(gather, 3, after=1), frozen={"a.w/0": ("op", "Gather", LONE)}),
    Case("Gather", "scalar-negative", partial(gather, -1, after=1), frozen={"a.w/0": ("op", "Gather", LONE)}),
    Case("Gather", "rows", partial(gather, [0, 2, -1], axis=2, after=6), A | {"z.w/1": range(6)}, (6,)),
    Case("Gather", "matrix-of-indices", partial(gather, [[0, 1], [2, 3]], after=2), frozen=frozen("Gather", "several axes")),
    Case("Gather", "computed", gather_computed, frozen=frozen("Gather", "indexed by computed values")),
    Case("Gather", "embedding", embedding, {"table/1": range(6), "z.w/0": range(6)}, (6,),
         {"table/0": ("op", "Gather", "indexed by computed values")}),
    *(
        Case("Pad", f"space-{mode}", partial(pad, [0, 0, 1, 2, 0, 0, 2, 1], after=6, mode=mode),
             A | {"z.w/1": range(6)}, (6,))
        for mode in ("constant", "reflect", "edge", "wrap") if mode != "wrap"
    ),
    Case("Pad", "space-value", partial(pad, [0, 0, 1, 2, 0, 0, 2, 1], after=6, value=3.0), A | {"z.w/1": range(6)}, (6,)),
    Case("Pad", "space-crop", partial(pad, [0, 0, -1, 0, 0, 0, 0, -2], after=6), A | {"z.w/1": range(6)}, (6,)),
    Case("Pad", "space-opset9", partial(pad, [0, 0, 1, 2, 0, 0, 2, 1], after=6, opset=9), A | {"z.w/1": range(6)}, (6,)),
    Case("Pad", "channels", partial(pad, [0, 2, 0, 0, 0, 3, 0, 0], after=11),
         A | {"z.w/1": [6, 7, *range(6), 8, 9, 10]}, (2, 3, 6)),
    Case("Pad", "channels-behind", partial(pad, [0, 0, 0, 0, 0, 3, 1, 1], after=9, value=0.0),
         A | {"z.w/1": [*range(6), 6, 7, 8]}, (3, 6)),
    Case("Pad", "channels-opset9", partial(pad, [0, 2, 0, 0, 0, 3, 0, 0], after=11, opset=9),
         A | {"z.w/1": [6, 7, *range(6), 8, 9, 10]}, (2, 3, 6)),
    Case("Pad", "channels-axes", partial(pad, [2, 1, 3, 0], after=11, opset=18, axes=[-3, 2]),
         A | {"z.w/1": [6, 7, *range(6), 8, 9, 10]}, (2, 3, 6)),
    Case("Pad", "option-a", option_a, {
        "a.w/0": range(4), "a.b/0": range(4), "b.w/1": range(4), "b.w/0": [4, 5, 0, 1, 2, 3, 6, 7],
        "b.b/0": [4, 5, 0, 1, 2, 3, 6, 7], "z.w/1": [4, 5, 0, 1, 2, 3, 6, 7]}, (2, 2, 4)),
    Case("Pad", "channels-reflect", partial(pad, [0, 2, 0, 0, 0, 1, 0, 0], after=9, mode="reflect"),
         frozen=frozen("Pad", "other than zero")),
    Case("Pad", "channels-edge", partial(pad, [0, 2, 0, 0, 0, 1, 0, 0], after=9, mode="edge"),
         frozen=frozen("Pad", "other than zero")),
    Case("Pad", "channels-one", partial(pad, [0, 2, 0, 0, 0, 1, 0, 0], after=9, value=1.0),
         frozen=frozen("Pad", "other than zero")),
    Case("Pad", "channels-one-opset9", partial(pad, [0, 2, 0, 0, 0, 1, 0, 0], after=9, value=1.0, opset=9),
         frozen=frozen("Pad", "other than zero")),
    Case("Pad", "channels-crop", partial(pad, [0, -2, 0, 0, 0, 0, 0, 0], after=4), frozen=frozen("Pad", "cropped")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_labels_move_as_data_moves(case):
    """Every output index carries the label of the index it copies; indices taken out alone or by unknown rules freeze."""
    oracle.assert_coupling(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pruned_equals_masked(case):
    """Sizes, bounds, indices and amounts count the kept channels."""
    oracle.assert_case_prunes(case)


def keep_channels(coupling, kept: Sequence[int]) -> np.ndarray:
    """Keep these channels of convolution ``a``."""
    classes = oracle.constant_axes(coupling)["a.w/0"]
    keep = np.ones(coupling.n_classes, bool)
    keep[np.delete(classes, kept)] = False
    return keep


def operand(model: ModelProto, index: int) -> list[int]:
    """Value of a constant operand of the node under test."""
    name = next(node for node in model.graph.node if node.name == "op").input[index]
    return numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == name)).tolist()


@pytest.mark.parametrize(
    ("how", "sizes", "opset", "kept"),
    [
        ("equal", (3, 3), 17, [0, 3, 4]),
        ("equal", (3, 3), 17, [0, 1, 3]),
        ("equal", (3, 3), 17, [1, 2, 4, 5]),
        ("equal", (2, 2, 2), 17, [0, 1, 2, 3, 4]),
        ("equal", (2, 2, 2), 11, [0, 1, 2, 3, 4]),
        ("equal", (3, 3), 11, [0, 1, 3]),
        ("num_outputs", (2, 2, 2), 18, [0, 1, 2, 3, 4]),
        ("num_outputs", (2, 2, 2), 18, [0, 2, 3, 4]),
        ("num_outputs", (2, 2, 2), 18, [0, 1, 2, 4, 5]),
        ("attribute", (2, 4), 11, [0, 3, 4, 5]),
        ("input", (2, 4), 13, [1, 5]),
    ],
)
def test_split_sizes_are_those_of_the_kept_runs(how, sizes, opset, kept):
    """An equal split that is no longer equal gets explicit sizes, also where only its last part is shorter."""
    model = split(how, sizes, opset=opset)
    coupling = oracle.couple_proto(model)
    oracle.assert_prunes(model, coupling, keep_channels(coupling, kept))


@pytest.mark.parametrize(
    ("kept", "bounds"), [([0, 1, 3, 5], (1, 3)), ([2, 5], (0, 1)), ([1, 2, 3, 4], (0, 3)), ([0, 1, 3], (1, 4))]
)
def test_slice_bounds_count_kept_channels(kept, bounds):
    """A slice from 1 to 4 starts and ends where its kept channels do; if it already does, it stays."""
    model = cut([1], [4], after=3)
    coupling = oracle.couple_proto(model)
    pruned = oracle.assert_prunes(model, coupling, keep_channels(coupling, kept))
    assert (operand(pruned.model, 1)[0], operand(pruned.model, 2)[0]) == bounds


def test_gather_indices_count_kept_channels():
    """Indices of removed channels go, the others point at their channel's new place."""
    model = gather([0, 1, 2, 3, 4, 5, 0, 0, 3], after=9)
    coupling = oracle.couple_proto(model)
    pruned = oracle.assert_prunes(model, coupling, keep_channels(coupling, [0, 3, 4]))
    assert operand(pruned.model, 1) == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("indices", [5, -1, -6, [5, -5], [-6, 1]], ids=str)
def test_gather_index_that_only_looks_right_is_rewritten(indices):
    """An index past the end of the kept channels is wrong even where it agrees with the right one modulo their number."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    part = t.node("Gather", y, t.constant(indices), name="op", axis=1)
    part = t.node("Reshape", part, t.constant([1, np.size(indices), 4, 6]))
    model = t.build(t.node("Add", t.conv(y, "w", 6, 3), t.conv(part, "z", np.size(indices), 3)))
    coupling = oracle.couple_proto(model)
    kept = sorted({0, 1, 5} if np.size(indices) > 1 else {int(indices) % 6, 2})
    oracle.assert_prunes(model, coupling, keep_channels(coupling, kept))


def test_gather_indices_that_still_fit_are_left_alone():
    """The first channels keep their places where only later ones go: the operand is not written anew."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    part = t.node("Gather", y, t.constant([0, 2, -5], "picked"), name="op", axis=1)
    model = t.build(t.node("Add", t.conv(y, "w", 6, 3), t.conv(part, "z", 3, 3)))
    coupling = oracle.couple_proto(model)
    pruned = oracle.assert_prunes(model, coupling, keep_channels(coupling, [0, 1, 2, 3, 4]))
    assert operand(pruned.model, 1) == [0, 2, 1]
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    part = t.node("Gather", y, t.constant([0, 2], "picked"), name="op", axis=1)
    model = t.build(t.node("Add", t.conv(y, "w", 6, 3), t.conv(part, "z", 2, 3)))
    coupling = oracle.couple_proto(model)
    pruned = oracle.assert_prunes(model, coupling, keep_channels(coupling, [0, 1, 2, 3, 4]))
    assert next(node for node in pruned.model.graph.node if node.name == "op").input[1] == "picked"
    assert "picked" in {tensor.name for tensor in pruned.model.graph.initializer}


def test_operands_shared_with_other_nodes_are_copied():
    """A bound that two slices share keeps its old value for the slice that still needs it."""
    t = Tiny()
    x = t.input(1, 2, 4, 6)
    three, axis, zero = t.constant([3], "three"), t.constant([1], "axis"), t.constant([0], "zero")
    y = t.node("Slice", t.conv(x, "a", 2, 6), zero, three, axis, name="op")
    rows = t.node("Slice", y, zero, three, t.constant([2]), name="rows")
    model = t.build(t.conv(rows, "z", 3, 3))
    coupling = oracle.couple_proto(model)
    pruned = oracle.assert_prunes(model, coupling, keep_channels(coupling, [0, 2, 3, 4, 5]))
    assert operand(pruned.model, 2) == [2]
    shared = next(tensor for tensor in pruned.model.graph.initializer if tensor.name == "three")
    assert numpy_helper.to_array(shared).tolist() == [3]


def test_unused_split_output_freezes():
    """A Split whose output is not asked for freezes its input."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    left, _ = t.node("Split", y, name="op", outputs=2, axis=1)
    t.nodes[-1].output[1] = ""
    oracle.assert_coupling(
        Case("Split", "unused", lambda: t.build(t.conv(left, "z", 3, 3)), frozen=frozen("Split", "unused output"))
    )


def test_matrix_columns_are_cut_like_channels():
    """The last axis of a perceptron splits, slices and joins by the same rules."""

    def middle(t: Tiny, y: str) -> str:
        left, right = t.node("Split", y, name="op", outputs=2, axis=-1)
        return t.node("Concat", t.node("Neg", right), left, axis=-1)

    oracle.assert_case_prunes(Case("Split", "rotary", partial(perceptron, middle)))


@pytest.mark.parametrize("stored", [5, 7])
def test_channels_are_padded_by_what_a_quantised_value_stands_for(stored):
    """A padding value that is dequantised is zero where it is stored as its zero point."""
    t = Tiny()
    value = t.node("DequantizeLinear", t.constant(np.int8(stored)), t.constant(np.float32(0.5)), t.constant(np.int8(5)))
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    y = t.node("Pad", y, t.constant([0, 2, 0, 0, 0, 3, 0, 0]), value, name="op")
    coupling = oracle.couple_proto(t.build(t.conv(y, "z", 11, 3)))
    removable = any(bundle.removable for bundle in coupling.bundles)
    assert removable == (stored == 5)
