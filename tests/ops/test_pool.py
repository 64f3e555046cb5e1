"""Pooling and resampling: channels pass, space changes."""

from functools import partial

import pytest
from onnx import ModelProto, TensorProto

import oracle
from graphs import Tiny, sandwich
from oracle import Case

PASSES = {"a.w/0": range(6), "a.b/0": range(6), "z.w/1": range(6)}
SIZES = {"1d": (9,), "2d": (4, 6), "3d": (4, 6, 5)}


def pool(op: str, size: tuple[int, ...], **attributes) -> ModelProto:
    """Pool between two convolutions."""
    return sandwich(lambda t, y: t.node(op, y, name="op", **attributes), size=size)


def windows(size: tuple[int, ...]) -> dict[str, list[int]]:
    """Return the attributes of a small window."""
    return {"kernel_shape": [2] * len(size), "strides": [2] * len(size)}


def max_pool_indices() -> ModelProto:
    """Ask MaxPool for its indices too."""

    def middle(t: Tiny, y: str) -> str:
        values, indices = t.node("MaxPool", y, name="op", outputs=2, kernel_shape=[2, 2])
        return t.node("Add", values, t.node("Cast", indices, to=TensorProto.FLOAT))

    return sandwich(middle)


def resize(*, scales=None, sizes=None, opset: int = 17, mode: str = "nearest", **attributes) -> ModelProto:
    """Resize by scales or to sizes."""

    def middle(t: Tiny, y: str) -> str:
        operands = [t.constant(scales)] if sizes is None else ["", t.constant(sizes)]
        roi = [""] if opset > 10 else []
        return t.node("Resize", y, *roi, *operands, name="op", mode=mode, **attributes)

    return sandwich(middle, opset=opset)


def resize_channels() -> ModelProto:
    """Enlarge the channel axis itself."""
    return sandwich(lambda t, y: t.node("Resize", y, "", t.constant([1.0, 2.0, 1.0, 1.0]), name="op"), after=12)


def resize_crop() -> ModelProto:
    """Resize a region of interest."""

    def middle(t: Tiny, y: str) -> str:
        roi = t.constant([0.0, 0, 0, 0, 1, 1, 0.5, 0.5])
        mode = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"}
        return t.node("Resize", y, roi, t.constant([1.0, 1, 2, 2]), name="op", **mode)

    return sandwich(middle)


def upsample() -> ModelProto:
    """Upsample as opset 9 does."""
    return sandwich(lambda t, y: t.node("Upsample", y, t.constant([1.0, 1, 2, 2]), name="op", mode="nearest"), opset=9)


def upsample_attribute() -> ModelProto:
    """Upsample as opset 7 does."""
    return sandwich(lambda t, y: t.node("Upsample", y, name="op", mode="nearest", scales=[1.0, 1, 2, 2]), opset=7)


def pooled_to_head(op: str) -> ModelProto:
    """Pool globally, flatten, classify."""
    t = Tiny()
    y = t.node(op, t.conv(t.input(1, 2, 4, 6), "a", 2, 6), name="op")
    return t.build(t.gemm(t.node("Flatten", y), "z", 6, 3))


def pool_over_channels() -> ModelProto:
    """Pool over channels that a Transpose moved to a spatial axis."""

    def middle(t: Tiny, y: str) -> str:
        y = t.node("Transpose", y, perm=[0, 2, 1, 3])
        return t.node("Transpose", t.node("MaxPool", y, name="op", kernel_shape=[2, 1]), perm=[0, 2, 1, 3])

    return sandwich(middle, after=5)


FROZEN = ("a.w/0", "a.b/0")
CASES = [
    *(
        Case(op, rank, partial(pool, op, size, **windows(size)), PASSES, (6,))
        for op in ("MaxPool", "AveragePool", "LpPool") for rank, size in SIZES.items()
    ),
    *(
        Case(op, rank, partial(pool, op, size), PASSES, (6,))
        for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool") for rank, size in SIZES.items()
    ),
    *(
        Case(op, "head", partial(pooled_to_head, op), {"a.w/0": range(6), "a.b/0": range(6), "z.w/0": range(6)}, (6,))
        for op in ("GlobalAveragePool", "GlobalMaxPool")
    ),
    Case("AveragePool", "counting-padding",
         partial(pool, "AveragePool", (4, 6), kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1), PASSES, (6,)),
    Case("MaxPool", "ceil-dilated",
         partial(pool, "MaxPool", (7, 9), kernel_shape=[2, 2], dilations=[2, 2], strides=[2, 2], ceil_mode=1), PASSES, (6,)),
    Case("MaxPool", "indices", max_pool_indices, frozen=dict.fromkeys(FROZEN, ("op", "MaxPool", "flat indices"))),
    Case("MaxPool", "over-channels", pool_over_channels,
         frozen=dict.fromkeys(FROZEN, ("op", "MaxPool", "pooling slides over it"))),
    Case("Resize", "scales", partial(resize, scales=[1.0, 1, 2, 2]), PASSES, (6,)),
    Case("Resize", "scales-linear", partial(resize, scales=[1.0, 1, 1.5, 2], mode="linear"), PASSES, (6,)),
    Case("Resize", "scales-cubic", partial(resize, scales=[1.0, 1, 2, 2], mode="cubic"), PASSES, (6,)),
    Case("Resize", "opset10", partial(resize, scales=[1.0, 1, 2, 2], opset=10), PASSES, (6,)),
    Case("Resize", "sizes", partial(resize, sizes=[1, 6, 8, 9]), PASSES, (6,)),
    Case("Resize", "sizes-linear-smaller", partial(resize, sizes=[1, 6, 3, 3], mode="linear"), PASSES, (6,)),
    Case("Resize", "sizes-of-two-axes", partial(resize, sizes=[8, 9], opset=18, axes=[2, 3]), PASSES, (6,)),
    Case("Resize", "sizes-of-negative-axes", partial(resize, sizes=[6, 8, 9], opset=18, axes=[-3, -2, -1]), PASSES, (6,)),
    Case("Resize", "scales-of-two-axes", partial(resize, scales=[2.0, 2], opset=18, axes=[2, 3]), PASSES, (6,)),
    Case("Resize", "not-larger",
         partial(resize, sizes=[9, 9], opset=18, axes=[2, 3], keep_aspect_ratio_policy="not_larger"), PASSES, (6,)),
    Case("Resize", "channels", resize_channels, frozen=dict.fromkeys(FROZEN, ("op", "Resize", "it is resampled"))),
    Case("Resize", "crop", resize_crop, frozen=dict.fromkeys(FROZEN, ("op", "Resize", "region of interest"))),
    Case("Upsample", "opset9", upsample, PASSES, (6,)),
    Case("Upsample", "opset7", upsample_attribute, PASSES, (6,)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_channels_pass_and_space_is_fixed(case):
    """Channels before and after are the same; what resamples channels or counts through them freezes them."""
    oracle.assert_coupling(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pruned_equals_masked(case):
    """Pooling and resampling keep channels apart, and stated sizes follow the pruned channel count."""
    oracle.assert_case_prunes(case)
