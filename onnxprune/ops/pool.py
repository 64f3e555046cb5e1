"""Pooling and resampling: channels pass, space changes."""

from __future__ import annotations

import numpy as np

from onnxprune.labels import Axis, Ledger, Refusal, fixed, is_fixed, length
from onnxprune.model import Node
from onnxprune.ops import Change, Edit, channels_only, couples, rewrites


@couples("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def pool(node: Node, ledger: Ledger) -> None:
    """Batch and channels pass; MaxPool's indices count through all channels, so asking for them freezes."""
    x = ledger.input(node, 0)
    channels_only(node, ledger, x.axes[2:], "pooling slides over it")
    if len(node.outputs) > 1 and node.outputs[1]:
        ledger.freeze(x.axes[:2], "MaxPool returns flat indices through the channels", node.inputs[0])
    ledger.output(node, (*x.axes[:2], *map(fixed, ledger.shape(node.outputs[0])[2:])))


@couples("Resize", "Upsample")
def resize(node: Node, ledger: Ledger) -> None:
    """Axes of unchanged length pass, resampled ones are fixed."""
    x = ledger.input(node, 0)
    shape = ledger.shape(node.outputs[0])
    if node.attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise Refusal("Resize crops by a region of interest")
    axes: list[Axis] = []
    for axis, size in zip(x.axes, shape, strict=True):
        if length(axis) == size:
            axes.append(axis)
            continue
        if not is_fixed(axis):
            ledger.freeze([axis], "it is resampled", node.inputs[0])
        axes.append(fixed(size))
    ledger.output(node, axes)


@rewrites("Resize")
def resize_sizes(node: Node, change: Change) -> list[Edit]:
    """A Resize that states target sizes states the new channel count."""
    sizes = change.value(node.inputs[3]) if node.has(3) else None
    if sizes is None:
        return []
    before, after = change.before(node.outputs[0]), change.after(node.outputs[0])
    axes = node.attributes.get("axes") or range(len(after))
    required = sizes.copy()
    for position, axis in enumerate(axes):
        if before[axis] != after[axis]:
            required[position] = after[axis]
    return [] if np.array_equal(sizes, required) else [Edit(3, required)]
