"""Operators that only move data: axes are products of factors, so reshapes and transposes need no patterns."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

import oracle
from graphs import Tiny, perceptron, sandwich
from oracle import Case

A = {"a.w/0": range(6), "a.b/0": range(6)}
PASSES = A | {"z.w/1": range(6)}


def reshapes(*steps: Sequence[int] | str, channels: int = 6, after: int | None = None, size=(4, 6)) -> ModelProto:
    """Apply a chain of Reshapes (lists) and Transposes (strings of axes) between two convolutions."""

    def middle(t: Tiny, y: str) -> str:
        for number, step in enumerate(steps):
            last = {"name": "op"} if number == len(steps) - 1 else {}
            if isinstance(step, str):
                y = t.node("Transpose", y, perm=[int(axis) for axis in step], **last)
            else:
                y = t.node("Reshape", y, t.constant(list(step)), **last)
        return y

    return sandwich(middle, channels, after, size=size)


def head(
    *, target: Sequence[int] | None = None, axis: int = 1, size: tuple[int, int] = (2, 3), **attributes
) -> ModelProto:
    """Flatten feature maps (by Reshape where a target is given) and classify them."""
    t = Tiny()
    y = t.conv(t.input(1, 2, *size), "a", 2, 4)
    y = t.node("Flatten", y, axis=axis, name="op") if target is None else t.node(
        "Reshape", y, t.constant(list(target)), name="op", **attributes)  # fmt: skip
    return t.build(t.gemm(y, "z", 4 * size[0] * size[1], 3))


def head_nhwc() -> ModelProto:
    """Flatten channels last, as converters from TensorFlow write it."""
    t = Tiny()
    y = t.node("Transpose", t.conv(t.input(1, 2, 2, 3), "a", 2, 4), perm=[0, 2, 3, 1])
    return t.build(t.linear(t.node("Reshape", y, t.constant([1, -1]), name="op"), "z", 24, 3))


def tokens() -> ModelProto:
    """Turn maps into a sequence, apply a linear layer, turn it back."""

    def middle(t: Tiny, y: str) -> str:
        y = t.node("Transpose", t.node("Reshape", y, t.constant([1, 6, 24])), perm=[0, 2, 1])
        y = t.node("Add", t.linear(y, "l", 6, 5), t.random(5, name="l.b"))
        return t.node("Reshape", t.node("Transpose", y, perm=[0, 2, 1]), t.constant([1, 5, 4, 6]), name="op")

    return sandwich(middle, after=5)


def squeeze(opset: int, axes: Sequence[int] | None) -> ModelProto:
    """Squeeze pooled maps to features."""
    t = Tiny(opset=opset)
    y = t.node("GlobalAveragePool", t.conv(t.input(2, 2, 4, 6), "a", 2, 6))
    if axes is None:
        y = t.node("Squeeze", y, name="op")
    elif opset < 13:
        y = t.node("Squeeze", y, name="op", axes=list(axes))
    else:
        y = t.node("Squeeze", y, t.constant(list(axes)), name="op")
    return t.build(t.linear(y, "z", 6, 3))


def unsqueeze(opset: int, axes: Sequence[int]) -> ModelProto:
    """Unsqueeze features to maps."""
    t = Tiny(opset=opset)
    y = t.gemm(t.input(2, 2), "a", 2, 6)
    y = t.node("Unsqueeze", y, name="op", axes=list(axes)) if opset < 13 else t.node(
        "Unsqueeze", y, t.constant(list(axes)), name="op")  # fmt: skip
    return t.build(t.conv(y, "z", 6, 3))


def transposed_rows() -> ModelProto:
    """Add a square of rows to itself across the diagonal: row (i, j) meets row (j, i), and all of them keep the same."""
    t = Tiny()
    y = t.node("Reshape", t.gemm(t.input(1, 2), "a", 2, 12), t.constant([2, 2, 3]))
    y = t.node("Add", y, t.node("Transpose", y, name="op", perm=[1, 0, 2]))
    return t.build(t.gemm(t.node("Reshape", y, t.constant([1, 12])), "z", 12, 3))


def expand(target: Sequence[int], source: str = "pooled") -> ModelProto:
    """Expand pooled maps to full size, or one channel to many."""

    def middle(t: Tiny, y: str) -> str:
        y = t.node("GlobalAveragePool", y) if source == "pooled" else t.conv(y, "g", 6, 1)
        return t.node("Expand", y, t.constant(list(target)), name="op")

    return sandwich(middle)


def tile(repeats: Sequence[int], after: int, *, single: bool = False) -> ModelProto:
    """Repeat maps along axes."""

    def middle(t: Tiny, y: str) -> str:
        return t.node("Tile", t.conv(y, "g", 6, 1) if single else y, t.constant(list(repeats)), name="op")

    return sandwich(middle, after=after)


def constant_of_shape(*, computed: bool = False) -> ModelProto:
    """Add a tensor of equal values, whose shape is a constant or that of the other operand."""

    def middle(t: Tiny, y: str) -> str:
        value = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.5])
        shape = t.node("Shape", y) if computed else t.constant([1, 6, 4, 6])
        return t.node("Add", t.node("ConstantOfShape", shape, name="op", value=value), y)

    return sandwich(middle)


def pixels(op: str, r: int = 2, channels: int = 8, size: tuple[int, int] = (4, 6), **attributes) -> ModelProto:
    """Trade channels for pixels or back."""
    after = channels // r**2 if op == "DepthToSpace" else channels * r**2
    return sandwich(lambda t, y: t.node(op, y, name="op", blocksize=r, **attributes), channels, after, size=size)


def there_and_back() -> ModelProto:
    """Apply SpaceToDepth and DepthToSpace: every channel comes back to itself."""

    def middle(t: Tiny, y: str) -> str:
        y = t.node("SpaceToDepth", y, blocksize=2)
        return t.node("DepthToSpace", y, name="op", blocksize=2)

    return sandwich(middle)


def shuffle_unit() -> ModelProto:
    """Put a channel shuffle between two grouped convolutions (ShuffleNet)."""

    def middle(t: Tiny, y: str) -> str:
        y = t.node("Reshape", t.conv(y, "b", 6, 6, group=2), t.constant([1, 2, 3, 4, 6]))
        y = t.node("Transpose", y, perm=[0, 2, 1, 3, 4])
        return t.conv(t.node("Reshape", y, t.constant([1, 6, 4, 6]), name="op"), "c", 6, 6, group=2)

    return sandwich(middle)


def shape_read_as_data(op: str, batch: int | str = 1) -> ModelProto:
    """Scale channels by their own number (Shape), or by that of all elements (Size)."""
    t = Tiny()
    y = t.conv(t.input(batch, 2, 4, 6), "a", 2, 6)
    count = t.node(op, y, name="op")
    if op == "Shape":
        count = t.node("Gather", count, t.constant(1), axis=0)
    scale = t.node("Sqrt", t.node("Cast", count, to=TensorProto.FLOAT))
    return t.build(t.conv(t.node("Div", y, scale, name="div"), "z", 6, 3))


def ranges() -> ModelProto:
    """Add positions to columns, counted by Range from the tensor's own shape."""

    def middle(t: Tiny, y: str) -> str:
        width = t.node("Gather", t.node("Shape", y), t.constant(3), axis=0)
        positions = t.node("Range", t.constant(0), width, t.constant(1), name="op")
        return t.node("Add", y, t.node("Cast", positions, to=TensorProto.FLOAT))

    return sandwich(middle)


def identity_matrix() -> ModelProto:
    """Multiply a weight by an identity matrix of the shape of pruned features."""
    t = Tiny()
    y = t.gemm(t.input(4, 2), "a", 2, 6)
    eye = t.node("EyeLike", y, name="op", dtype=TensorProto.FLOAT)
    side = t.linear(eye, "e", 6, 3)
    return t.build(t.node("Add", t.gemm(t.node("LeakyRelu", y), "z", 6, 3), side))


def frozen(op: str, text: str, *names: str) -> dict[str, tuple[str, str, str]]:
    """Expect these axes (default: the channels before the operator) to be frozen by it."""
    return dict.fromkeys(names or ("a.w/0", "a.b/0"), ("op", op, text))


ROWS = {"a.w/0": range(4), "a.b/0": range(4), "z.w/0": np.repeat(range(4), 6)}
FEATURES = {"a.w/0": range(6), "a.b/0": range(6), "z.w/0": range(6)}
FOLDED = [0, 1, 2, 0, 1, 2]
CASES = [
    Case("Transpose", "there-and-back", partial(reshapes, "0231", "0312"), PASSES, (6,)),
    Case("Transpose", "rows-and-columns", partial(reshapes, "0132"), PASSES, (6,)),
    Case("Transpose", "no-permutation", lambda: perceptron(
        lambda t, y: t.node("Transpose", t.node("Transpose", y), name="op")),
        {"a.w/1": range(6), "a.b/0": range(6), "z.w/0": range(6)}, (6,)),
    Case("Transpose", "channels-to-columns", partial(reshapes, "0321", after=6, size=(4, 6)),
         frozen={"a.w/0": ("z", "Conv", "a convolution slides over it")}),
    Case("Reshape", "head", partial(head, target=[1, 24]), ROWS, (4,)),
    Case("Reshape", "head-minus-one", partial(head, target=[1, -1]), ROWS, (4,)),
    Case("Reshape", "head-zero", partial(head, target=[0, -1]), ROWS, (4,)),
    Case("Reshape", "head-minus-one-in-front", partial(head, target=[-1, 24]), ROWS, (4,)),
    Case("Reshape", "head-allowzero", partial(head, target=[1, 24], allowzero=1), ROWS, (4,)),
    Case("Reshape", "head-nhwc", head_nhwc, {"a.w/0": range(4), "a.b/0": range(4), "z.w/0": [*range(4)] * 6}, (4,)),
    Case("Reshape", "split-columns", partial(reshapes, [1, 6, 4, 2, 3], [1, 6, 8, 3]), PASSES, (6,)),
    Case("Reshape", "split-and-merge-channels", partial(reshapes, [1, 2, 3, 4, 6], [1, 6, 4, 6]),
         PASSES, (3,)),
    Case("Reshape", "merge-with-rows-and-back", partial(reshapes, [1, 24, 6], [1, 6, 4, 6]), PASSES, (6,)),
    Case("Reshape", "groups-to-batch", partial(reshapes, [2, 3, 4, 6], after=3),
         {"a.w/0": FOLDED, "a.b/0": FOLDED, "z.w/1": range(3)}, (3,), ),
    Case("Reshape", "channel-shuffle", partial(reshapes, [1, 2, 3, 4, 6], "02134", [1, 6, 4, 6]),
         dict.fromkeys(A, FOLDED) | {"z.w/1": [0, 0, 1, 1, 2, 2]}, (3,)),
    Case("Reshape", "channel-shuffle-flat", partial(reshapes, [2, 3, 24], "102", [1, -1, 4, 6]),
         dict.fromkeys(A, FOLDED) | {"z.w/1": [0, 0, 1, 1, 2, 2]}, (3,)),
    Case("Reshape", "shuffle-between-groups", shuffle_unit, None, ()),
    Case("Reshape", "pixel-shuffle", partial(reshapes, [1, 2, 2, 2, 4, 6], "014253", [1, 2, 8, 12], channels=8, after=2),
         {"a.w/0": [0] * 4 + [1] * 4, "a.b/0": [0] * 4 + [1] * 4, "z.w/1": range(2)}, (2,)),
    Case("Reshape", "pixel-unshuffle", partial(reshapes, [1, 6, 2, 2, 3, 2], "013524", [1, 24, 2, 3], after=24),
         A | {"z.w/1": np.repeat(range(6), 4)}, (6,)),
    Case("Reshape", "tokens", tokens,
         A | {"l.w/0": range(6), "l.w/1": range(6, 11), "l.b/0": range(6, 11), "z.w/1": range(6, 11)}, (5, 6)),
    Case("Reshape", "across-channels", partial(reshapes, [1, 4, 6, 6], after=4),
         frozen=frozen("Reshape", "across channel boundaries")),
    Case("Flatten", "head", head, ROWS, (4,)),
    Case("Flatten", "negative-axis", partial(head, axis=-3), ROWS, (4,)),
    Case("Flatten", "one-pixel", partial(head, size=(1, 1)), {"a.w/0": range(4), "a.b/0": range(4), "z.w/0": range(4)},
         (4,)),
    Case("Transpose", "rows-meet-across", transposed_rows, dict.fromkeys(("a.w/1", "a.b/0", "z.w/0"), [0, 1, 2] * 4), (3,)),
    Case("Squeeze", "axes", partial(squeeze, 17, [2, 3]), FEATURES, (6,)),
    Case("Squeeze", "negative-axes", partial(squeeze, 17, [-1, -2]), FEATURES, (6,)),
    Case("Squeeze", "attribute", partial(squeeze, 11, [2, 3]), FEATURES, (6,)),
    *(Case("Squeeze", f"no-axes-{opset}", partial(squeeze, opset, None), FEATURES, (6,)) for opset in (12, 13, 17)),
    Case("Unsqueeze", "axes", partial(unsqueeze, 17, [2, 3]), {"a.w/1": range(6), "a.b/0": range(6), "z.w/1": range(6)},
         (6,)),
    Case("Unsqueeze", "attribute", partial(unsqueeze, 11, [2, 3]),
         {"a.w/1": range(6), "a.b/0": range(6), "z.w/1": range(6)}, (6,)),
    Case("Expand", "space", partial(expand, [1, 6, 4, 6]), PASSES, (6,)),
    Case("Expand", "space-by-ones", partial(expand, [1, 1, 4, 6]), PASSES, (6,)),
    Case("Expand", "space-low-rank", partial(expand, [4, 6]), PASSES, (6,)),
    Case("Expand", "one-channel", partial(expand, [1, 6, 4, 6], "single"),
         A | {"g.w/1": range(6), "z.w/1": range(6, 12)}, (6, 6)),
    Case("Tile", "space", partial(tile, [1, 1, 2, 3], 6), PASSES, (6,)),
    Case("Tile", "channels", partial(tile, [1, 2, 1, 1], 12), A | {"z.w/1": [*range(6)] * 2}, (6,)),
    Case("Tile", "one-channel", partial(tile, [1, 5, 1, 1], 5, single=True),
         A | {"g.w/1": range(6), "z.w/1": range(6, 11)}, (5, 6)),
    Case("ConstantOfShape", "constant", constant_of_shape, PASSES, (6,)),
    Case("ConstantOfShape", "computed", partial(constant_of_shape, computed=True), PASSES, (6,)),
    Case("DepthToSpace", "dcr", partial(pixels, "DepthToSpace", mode="DCR"),
         {"a.w/0": [0, 1] * 4, "a.b/0": [0, 1] * 4, "z.w/1": [0, 1]}, (2,)),
    Case("DepthToSpace", "crd", partial(pixels, "DepthToSpace", mode="CRD"),
         {"a.w/0": [0] * 4 + [1] * 4, "a.b/0": [0] * 4 + [1] * 4, "z.w/1": [0, 1]}, (2,)),
    Case("DepthToSpace", "default-three", partial(pixels, "DepthToSpace", 3, 18),
         {"a.w/0": [0, 1] * 9, "a.b/0": [0, 1] * 9, "z.w/1": [0, 1]}, (2,)),
    Case("DepthToSpace", "to-one-channel", partial(pixels, "DepthToSpace", 2, 4),
         frozen=frozen("DepthToSpace", "it becomes pixels")),
    Case("DepthToSpace", "there-and-back", there_and_back, PASSES, (6,)),
    Case("SpaceToDepth", "two", partial(pixels, "SpaceToDepth", 2, 3),
         {"a.w/0": range(3), "a.b/0": range(3), "z.w/1": [*range(3)] * 4}, (3,)),
    Case("Shape", "read-as-data", partial(shape_read_as_data, "Shape"), PASSES, (6,)),
    Case("Shape", "read-as-data-dynamic-batch", partial(shape_read_as_data, "Shape", "n"), PASSES, (6,)),
    Case("Size", "read-as-data", partial(shape_read_as_data, "Size"), PASSES, (6,)),
    Case("Size", "read-as-data-dynamic-batch", partial(shape_read_as_data, "Size", "n"),
         frozen={"a.w/0": ("div", "Div", "its length enters the computation")}),
    Case("Range", "of-columns", ranges, PASSES, (6,)),
    Case("EyeLike", "of-channels", identity_matrix, frozen={"a.w/1": ("op", "EyeLike", "")}),
]  # fmt: skip


@pytest.mark.parametrize("case", [case for case in CASES if case.free is not None], ids=str)
def test_labels_move_as_data_moves(case):
    """Reshapes regroup factors and transposes permute them; the rest freezes and names the operator."""
    oracle.assert_coupling(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pruned_equals_masked(case):
    """Targets, repeats and shapes follow the kept channels."""
    oracle.assert_case_prunes(case)


def test_shuffle_between_grouped_convolutions_keeps_groups_balanced():
    """Either side of a channel shuffle loses channels without emptying or unbalancing a group of the other."""
    model = shuffle_unit()
    coupling = oracle.couple_proto(model)
    assert any(group.frozen is None and group.size > 1 for group in coupling.groups)
    rng = np.random.default_rng(0)
    for _ in range(5):
        oracle.assert_prunes(model, coupling, oracle.random_keep(coupling, rng))


@pytest.mark.parametrize("perm", ["012", "021", "102", "120", "201", "210"])
def test_any_permutation_of_three_factors_is_followed(perm):
    """Channels seen as three factors, permuted and merged again, land with their data; the innermost factor shrinks.

    Rows along a factor that stays outside of it choose freely. Along one that is merged inside they keep the same indices:
    in the merged order, else, one row's second channel might have to come before the other row's first.
    """
    model = reshapes([2, 3, 2, 24], perm + "3", [1, 12, 4, 6], channels=12)
    axes = oracle.constant_axes(coupling := oracle.couple_proto(model))
    order = np.arange(12).reshape(2, 3, 2).transpose([int(axis) for axis in perm]).ravel()
    assert axes["z.w/1"].tolist() == axes["a.w/0"][order].tolist()
    outside = [perm.index(factor) < perm.index("2") for factor in "01"]
    rows = np.indices((2, 3, 2)) * np.reshape([*outside, True], (3, 1, 1, 1))
    assert oracle.canonical(axes["a.w/0"]) == oracle.canonical(np.ravel_multi_index(tuple(rows), (2, 3, 2)).ravel())
    oracle.assert_prunes(model, coupling, oracle.random_keep(coupling, np.random.default_rng(0)))
