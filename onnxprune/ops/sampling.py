"""Operators that read images at other places: regions, grids, blocks, spectra. Channels pass beside them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnxprune.labels import Axis, Ledger, Refusal, fixed, is_fixed, length
from onnxprune.model import Node
from onnxprune.ops import Change, Edit, channels_only, couples, rewrites
from onnxprune.ops.linear import conv, convolution_groups


@couples("RoiAlign", "MaxRoiPool")
def regions_of_interest(node: Node, ledger: Ledger) -> None:
    """Channels pass; regions become the batch, images are looked up by number."""
    x, regions = ledger.input(node, 0), ledger.input(node, 1)
    others = (0, *range(2, len(x.axes)))
    channels_only(node, ledger, tuple(x.axes[axis] for axis in others), "regions are cut out of it")
    ledger.freeze([regions.axes[1]], "it holds a region's coordinates", node.inputs[1])
    count = regions.axes[0]
    if node.has(2):
        count = ledger.unify(count, ledger.input(node, 2).axes[0])
    space = map(fixed, ledger.shape(node.outputs[0])[2:])
    ledger.output(node, (count, ledger.mix(x, others).axes[1], *space))


@couples("GridSample")
def grid_sample(node: Node, ledger: Ledger) -> None:
    """Channels pass; the grid's axes take the place of the image's."""
    x, grid = ledger.input(node, 0), ledger.input(node, 1)
    space = range(2, len(x.axes))
    channels_only(node, ledger, x.axes[2:], "it is sampled at computed places")
    ledger.freeze([grid.axes[-1]], "it holds coordinates", node.inputs[1])
    x = ledger.mix(x, space)
    ledger.output(node, (ledger.unify(x.axes[0], grid.axes[0]), x.axes[1], *grid.axes[1:-1]))


@couples("AffineGrid")
def affine_grid(node: Node, ledger: Ledger) -> None:
    """The batch passes, matrices become coordinates."""
    theta = ledger.input(node, 0)
    ledger.freeze(theta.axes[1:], "it holds a transformation", node.inputs[0])
    ledger.output(node, (theta.axes[0], *map(fixed, ledger.shape(node.outputs[0])[1:])))


@rewrites("AffineGrid")
def affine_grid_size(node: Node, change: Change) -> list[Edit]:
    """The size names batch, channels (which nobody reads) and space."""
    size, (batch, *space, _) = change.value(node.inputs[1]), change.after(node.outputs[0])
    if size is None or [size[0], *size[2:]] == [batch, *space]:
        return []
    return [Edit(1, np.array([batch, size[1], *space], size.dtype))]


@couples("CenterCropPad")
def center_crop_pad(node: Node, ledger: Ledger) -> None:
    """Axes of unchanged length pass, others are fixed."""
    x = ledger.input(node, 0)
    axes: list[Axis] = []
    for axis, size in zip(x.axes, ledger.shape(node.outputs[0]), strict=True):
        if length(axis) != size and not is_fixed(axis):
            ledger.freeze([axis], "it is cropped or padded", node.inputs[0])
        axes.append(axis if length(axis) == size else fixed(size))
    ledger.output(node, axes)


@rewrites("CenterCropPad")
def center_crop_pad_shape(node: Node, change: Change) -> list[Edit]:
    """The shape states the kept channels, or zeros would take the place of the others."""
    shape, after = change.value(node.inputs[1]), change.after(node.outputs[0])
    axes = node.attributes.get("axes") or range(len(after))
    if shape is None or shape.tolist() == [after[axis] for axis in axes]:
        return []
    return [Edit(1, np.array([after[axis] for axis in axes], shape.dtype))]


@couples("Col2Im")
def columns_to_image(node: Node, ledger: Ledger) -> None:
    """Axis 1 is channels x block: the blocks become pixels, the channels pass."""
    x, shape = ledger.input(node, 0), ledger.shape(node.outputs[0])
    channels_only(node, ledger, x.axes[2:], "it becomes pixels")
    if not shape[1]:
        raise Refusal("Col2Im of less than one channel")
    channels, block = ledger.grid(x.axes[1], shape[1])
    ledger.freeze([block], "it becomes pixels", node.inputs[0])
    ledger.output(node, (x.axes[0], channels, *map(fixed, shape[2:])))


@couples("DeformConv")
def deformable_convolution(node: Node, ledger: Ledger) -> None:
    """A convolution that reads where its offsets say; every offset group keeps equally many channels."""
    x, offset = ledger.input(node, 0), ledger.input(node, 2)
    groups = node.attributes.get("offset_group", 1)
    if groups > 1:
        rows, _ = ledger.grid(x.axes[1], groups)
        ledger.freeze([rows], "the number of offset groups stays", node.inputs[0])
    batch = ledger.unify(x.axes[0], offset.axes[0])
    ledger.freeze(offset.axes[1:], "it holds offsets", node.inputs[2])
    if node.has(4):
        mask = ledger.input(node, 4)
        batch = ledger.unify(batch, mask.axes[0])
        ledger.freeze(mask.axes[1:], "it weighs what is read at an offset", node.inputs[4])
    conv(_as_convolution(node), ledger)
    out = ledger.layouts[node.outputs[0]]
    ledger.output(node, (batch, *out.axes[1:]))


@rewrites("DeformConv")
def deformable_groups(node: Node, change: Change) -> list[Edit]:
    """A grouped convolution that lost whole groups says so in its attribute."""
    return convolution_groups(_as_convolution(node), change)


def _as_convolution(node: Node) -> Node:
    bias = node.inputs[3] if node.has(3) else ""
    return replace(node, op="Conv", inputs=(*node.inputs[:2], bias))


@couples("DFT")
def fourier_transform(node: Node, ledger: Ledger) -> None:
    """The transformed axis and the one of real and imaginary parts freeze; the others pass."""
    x, shape = ledger.input(node, 0), ledger.shape(node.outputs[0])
    given = np.array(node.attributes.get("axis", 1 if ledger.model.opset < 20 else -2))
    axis = ledger.model.value(node.inputs[2]) if node.has(2) else given
    if axis is None:
        raise Refusal("DFT over a computed axis")
    mixed = (int(axis.ravel()[0]) % len(shape), len(shape) - 1)
    channels_only(node, ledger, tuple(x.axes[i] for i in mixed), "a Fourier transform combines its indices")
    axes = ledger.mix(x, mixed).axes
    ledger.output(node, [fixed(shape[i]) if i in mixed else passing for i, passing in enumerate(axes)])


@couples("STFT")
def short_time_fourier_transform(node: Node, ledger: Ledger) -> None:
    """Signals become frames of spectra; the batch passes."""
    x = ledger.input(node, 0)
    channels_only(node, ledger, x.axes[1:], "a Fourier transform combines its indices")
    ledger.output(node, (ledger.mix(x, (1, 2)).axes[0], *map(fixed, ledger.shape(node.outputs[0])[1:])))
