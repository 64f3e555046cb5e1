"""Operators that read images at other places: channels pass, space and coordinates stay."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

import oracle
from graphs import Tiny, sandwich
from oracle import Case

ROIS = [[0.5, 0.2, 4.0, 3.0], [1.0, 1.0, 5.0, 2.5], [0.0, 0.0, 3.0, 3.0]]


def frozen(op: str, text: str, *names: str) -> dict[str, tuple[str, str, str]]:
    """Expect these axes (default: the channels before the operator) to be frozen by it."""
    return dict.fromkeys(names or ("a.w/0", "a.b/0"), ("op", op, text))


def across(middle, *, opset: int = 17) -> ModelProto:
    """Let an operator meet channels where it expects rows, through Transpose."""
    return sandwich(lambda t, y: middle(t, t.node("Transpose", y, perm=[0, 2, 1, 3])), after=4, opset=opset)


# -- regions and grids -----------------------------------------------------------------------------------------------


def roi_align(t: Tiny, y: str, **attributes: str) -> str:
    """Cut three regions out of an image."""
    numbers = t.constant([0, 0, 0])
    size = {"output_height": 2, "output_width": 3, "sampling_ratio": 2}
    return t.node("RoiAlign", y, t.constant(ROIS, "rois"), numbers, name="op", **size, **attributes)


def roi_pool(t: Tiny, y: str) -> str:
    """Pool three regions of an image."""
    return t.node("MaxRoiPool", y, t.constant([[0.0, *roi] for roi in ROIS], "rois"), name="op", pooled_shape=[2, 3])


def grid_sample(t: Tiny, y: str, **attributes: str | int) -> str:
    """Sample at places that are an input."""
    return t.node("GridSample", y, t.input(1, 3, 5, 2, name="grid"), name="op", **attributes)


def grid_sample_volume(t: Tiny, y: str) -> str:
    """Sample a volume."""
    return t.node("GridSample", y, t.input(1, 2, 3, 5, 3, name="grid"), name="op", mode="linear")


def computed_grid() -> ModelProto:
    """Sample at places that a convolution computes."""
    t = Tiny()
    x = t.input(1, 2, 4, 6)
    grid = t.node("Transpose", t.conv(x, "g", 2, 2), perm=[0, 2, 3, 1])
    return t.build(t.conv(t.node("GridSample", t.conv(x, "a", 2, 6), grid, name="op"), "z", 6, 3))


def spatial_transformer(size: str) -> ModelProto:
    """Compute a transformation, its grid for the size of the maps, and sample them; the size may be read at run time."""
    t = Tiny(opset=20)
    x = t.input(1, 2, 4, 6)
    y = t.conv(x, "a", 2, 6)
    pooled = t.node("Flatten", t.node("GlobalAveragePool", t.conv(x, "p", 2, 5)))
    theta = t.node("Reshape", t.gemm(pooled, "theta", 5, 6), t.constant([1, 2, 3]))
    shape = t.node("Shape", y) if size == "read" else t.constant([1, 6, 4, 6])
    grid = t.node("AffineGrid", theta, shape, name="op")
    return t.build(t.conv(t.node("GridSample", y, grid), "z", 6, 3))


# -- blocks ----------------------------------------------------------------------------------------------------------


def crop(shape: Sequence[int], axes: Sequence[int] | None, after: int = 6) -> ModelProto:
    """Crop or pad around the centre."""

    def middle(t: Tiny, y: str) -> str:
        return t.node("CenterCropPad", y, t.constant(list(shape)), name="op", **({"axes": axes} if axes else {}))

    return sandwich(middle, after=after, opset=18)


def fold(channels: int, stride: int, *, image: Sequence[int] = (4, 6)) -> ModelProto:
    """Assemble images of 2 x 2 blocks that a convolution computes."""
    t = Tiny(opset=18)
    size = [(n - 2) // stride + 1 for n in image]
    y = t.conv(t.input(1, 2, *size), "a", 2, 4 * channels)
    y = t.node("Reshape", y, t.constant([1, 4 * channels, -1]))
    y = t.node("Col2Im", y, t.constant(list(image)), t.constant([2, 2]), name="op", strides=[stride, stride])
    return t.build(t.conv(y, "z", channels, 3))


def fold_across() -> ModelProto:
    """Assemble images of blocks that channels count."""
    t = Tiny(opset=18)
    y = t.conv(t.input(1, 2, 4, 1), "a", 2, 6)
    y = t.node("Transpose", t.node("Reshape", y, t.constant([1, 6, 4])), perm=[0, 2, 1])
    y = t.node("Col2Im", y, t.constant([4, 6]), t.constant([2, 2]), name="op", strides=[2, 2])
    return t.build(t.conv(y, "z", 1, 3))


def deformable(
    group: int = 1, offset_group: int = 1, *, channels: int = 6, after: int = 4, mask: bool = True, bias: bool = True
) -> ModelProto:
    """Put a deformable convolution between two others; offsets and weights of places come from convolutions."""
    t = Tiny(opset=19)
    x = t.input(1, 2, 4, 6)
    inputs = [
        t.conv(x, "a", 2, channels),
        t.random(after, channels // group, 3, 3, name="op.w", scale=(9 * channels / group) ** -0.5),
        t.conv(x, "offset", 2, 18 * offset_group),
        t.random(after, name="op.b") if bias else "",
        t.node("Sigmoid", t.conv(x, "mask", 2, 9 * offset_group)) if mask else "",
    ]
    while not inputs[-1]:
        inputs.pop()
    y = t.node("DeformConv", *inputs, name="op", group=group, offset_group=offset_group, pads=[1] * 4)
    return t.build(t.conv(t.node("LeakyRelu", y), "z", after, 3))


# -- transforms ------------------------------------------------------------------------------------------------------


def fourier(axis: int, opset: int, **attributes: int) -> ModelProto:
    """Transform rows (or channels) and put real and imaginary parts side by side."""

    def middle(t: Tiny, y: str) -> str:
        y = t.node("Unsqueeze", y, t.constant([4]))
        if opset < 20:
            y = t.node("DFT", y, name="op", axis=axis, **attributes)
        else:
            y = t.node("DFT", y, "", t.constant(axis), name="op", **attributes)
        return t.node("Reshape", y, t.constant([0, 0, 0, -1]))

    return sandwich(middle, opset=opset)


def spectrogram(*, channels_are_signals: bool = True) -> ModelProto:
    """Transform windows of every channel's signal, or of a signal of channels."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 16), "a", 2, 6, rank=1)
    y = t.node("Transpose", y, perm=[1, 2, 0] if channels_are_signals else [2, 1, 0])
    window = t.constant(np.hanning(4).astype(np.float32))
    y = t.node("STFT", y, t.constant(2), window, name="op")
    y = t.node("Reshape", y, t.constant([0, -1]))
    return t.build(t.linear(t.node("Transpose", y), "z", 6 if channels_are_signals else 16, 3))


def normalise(*axes: int, opset: int = 17) -> ModelProto:
    """Normalise by the tensor's own mean and variance over some axes (default: all but the channels)."""
    attributes = {"axes": axes} if axes else {}
    return sandwich(lambda t, y: t.node("MeanVarianceNormalization", y, name="op", **attributes), opset=opset)


def running_product(axis: int) -> ModelProto:
    """Multiply along an axis."""
    return sandwich(lambda t, y: t.node("CumProd", y, t.constant(axis), name="op"), opset=26)


def bits() -> ModelProto:
    """Look at floats as integers, and back."""

    def middle(t: Tiny, y: str) -> str:
        return t.node("BitCast", t.node("BitCast", y, name="op", to=TensorProto.INT32), to=TensorProto.FLOAT)

    return sandwich(middle, opset=26)


A = {"a.w/0": range(6), "a.b/0": range(6)}
PASSES = A | {"z.w/1": range(6)}
DEFORMED = {
    "a.w/0": range(6), "a.b/0": range(6), "op.w/1": range(6),
    "op.w/0": range(6, 10), "op.b/0": range(6, 10), "z.w/1": range(6, 10),
}  # fmt: skip
WEIGHT = ("op.w/1",)
BLOCKS = np.repeat(range(6), 4)
FOURIER = "a Fourier transform combines its indices"
CASES = [
    Case("RoiAlign", "regions", partial(sandwich, roi_align), PASSES, (6,),
         {"rois/1": ("op", "RoiAlign", "coordinates"), "rois/0": ("z", "output", "output of the graph")}),
    Case("RoiAlign", "largest", partial(sandwich, partial(roi_align, mode="max")), PASSES, (6,)),
    Case("RoiAlign", "across", partial(across, roi_align), frozen=frozen("RoiAlign", "regions are cut out")),
    Case("MaxRoiPool", "regions", partial(sandwich, roi_pool), PASSES, (6,)),
    Case("MaxRoiPool", "across", partial(across, roi_pool), frozen=frozen("MaxRoiPool", "regions are cut out")),
    Case("GridSample", "image", partial(sandwich, grid_sample), PASSES, (6,)),
    Case("GridSample", "border", partial(sandwich, partial(grid_sample, padding_mode="border", align_corners=1)), PASSES,
         (6,)),
    Case("GridSample", "volume", partial(sandwich, grid_sample_volume, size=(3, 4, 5), opset=20), PASSES, (6,)),
    Case("GridSample", "computed-grid", computed_grid, PASSES, (6,), {"g.w/0": ("op", "GridSample", "coordinates")}),
    Case("GridSample", "across", partial(across, grid_sample), frozen=frozen("GridSample", "sampled at computed places")),
    *(
        Case("AffineGrid", f"size-{size}", partial(spatial_transformer, size),
             PASSES | {"p.w/0": range(6, 11), "p.b/0": range(6, 11), "theta.w/0": range(6, 11)}, (5, 6),
             {"theta.w/1": ("op", "AffineGrid", "it holds a transformation")})
        for size in ("read", "constant")
    ),
    Case("CenterCropPad", "space", partial(crop, [2, 9], [2, -1]), PASSES, (6,)),
    Case("CenterCropPad", "all-axes", partial(crop, [1, 6, 2, 9], None), PASSES, (6,)),
    Case("CenterCropPad", "channels-unchanged", partial(crop, [9, 6], [3, 1]), PASSES, (6,)),
    Case("CenterCropPad", "channels", partial(crop, [4], [1], 4), frozen=frozen("CenterCropPad", "cropped or padded")),
    *(
        Case("Col2Im", f"stride{stride}", partial(fold, 6, stride),
             {"a.w/0": BLOCKS, "a.b/0": BLOCKS, "z.w/1": range(6)}, (6,))
        for stride in (1, 2)
    ),
    Case("Col2Im", "one-channel", partial(fold, 1, 2), frozen=frozen("Col2Im", "becomes pixels")),
    Case("Col2Im", "across", fold_across, frozen=frozen("Col2Im", "becomes pixels")),
    Case("DeformConv", "dense", deformable, DEFORMED, (4, 6),
         {"offset.w/0": ("op", "DeformConv", "offsets"), "mask.w/0": ("op", "DeformConv", "weighs what is read")},
         zero=WEIGHT),
    Case("DeformConv", "no-mask", partial(deformable, mask=False), DEFORMED, (4, 6), zero=WEIGHT),
    Case("DeformConv", "no-bias", partial(deformable, bias=False),
         {name: labels for name, labels in DEFORMED.items() if name != "op.b/0"}, (4, 6), zero=WEIGHT),
    Case("DeformConv", "no-mask-no-bias", partial(deformable, bias=False, mask=False),
         {name: labels for name, labels in DEFORMED.items() if name != "op.b/0"}, (4, 6), zero=WEIGHT),
    Case("DeformConv", "grouped", partial(deformable, 2), DEFORMED, (2, 3), zero=WEIGHT),
    Case("DeformConv", "offset-groups", partial(deformable, 1, 2), DEFORMED, (3, 4), zero=WEIGHT),
    Case("DeformConv", "grouped-offset-groups", partial(deformable, 2, 2), DEFORMED, (2, 3), zero=WEIGHT),
    Case("DeformConv", "depthwise", partial(deformable, 6, after=6, bias=False),
         PASSES | {"op.w/0": range(6)}, (6,)),
    Case("DeformConv", "offsets-per-channel", partial(deformable, 1, 6), {
        "op.w/0": range(4), "op.b/0": range(4), "z.w/1": range(4)}, (4,),
        frozen("DeformConv", "number of offset groups")),
    Case("DeformConv", "depthwise-offset-groups", partial(deformable, 6, 2, after=6),
         PASSES | {"op.w/0": range(6), "op.b/0": range(6)}, (3,)),
    Case("DFT", "opset17", partial(fourier, 2, 17), PASSES, (6,)),
    Case("DFT", "opset17-onesided", partial(fourier, 2, 17, onesided=1), PASSES, (6,)),
    Case("DFT", "opset20", partial(fourier, -2, 20), PASSES, (6,)),
    Case("DFT", "opset20-onesided", partial(fourier, 2, 20, onesided=1), PASSES, (6,)),
    Case("DFT", "channels", partial(fourier, 1, 17), frozen=frozen("DFT", FOURIER)),
    Case("DFT", "channels-opset20", partial(fourier, -4, 20), frozen=frozen("DFT", FOURIER)),
    Case("STFT", "signals", spectrogram, A | {"z.w/0": range(6)}, (6,)),
    Case("STFT", "across", partial(spectrogram, channels_are_signals=False), frozen=frozen("STFT", FOURIER)),
    Case("MeanVarianceNormalization", "default", partial(normalise, opset=12), PASSES, (6,)),
    Case("MeanVarianceNormalization", "batch-and-space", partial(normalise, 0, 2, 3), PASSES, (6,)),
    Case("MeanVarianceNormalization", "space", partial(normalise, 2, -1), PASSES, (6,)),
    Case("MeanVarianceNormalization", "channels", partial(normalise, 1, 2, 3), PASSES, (6,), redefined=True),
    Case("CumProd", "rows", partial(running_product, 2), PASSES, (6,)),
    Case("CumProd", "channels", partial(running_product, -3), frozen=frozen("CumProd", "mixes its indices")),
    Case("BitCast", "floats", bits, PASSES, (6,)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_channels_pass(case):
    """Channels keep their labels while space becomes other space; where an operator looks across them, they freeze."""
    oracle.assert_coupling(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pruned_equals_masked(case):
    """Sizes and groups follow the kept channels."""
    oracle.assert_case_prunes(case)
