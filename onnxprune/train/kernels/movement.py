"""Operators that move data without changing it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from onnxprune.errors import ModelError
from onnxprune.train.kernels import Call, computes


def axes_of(call: Call, given: Tensor | None) -> list[int] | None:
    """Axes from an input (later opsets) or an attribute (earlier ones)."""
    if given is not None:
        return [int(axis) for axis in given.reshape(-1).tolist()]
    axes = call.get("axes")
    return None if axes is None else list(axes)


@computes("Constant")
def constant(call: Call) -> Tensor:
    """A tensor, a number or a list of numbers."""
    value = next((v for k, v in call.attributes.items() if k.startswith("value")), None)
    if value is None or isinstance(value, str):
        raise ModelError(f"{call.title}: a sparse or textual constant")
    kind = torch.int64 if "int" in next(iter(call.attributes)) else None
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=kind)


@computes("Reshape", host=(1,))
def reshape(call: Call, x: Tensor, shape: Tensor | None = None) -> Tensor:
    """A zero copies the input's length unless ``allowzero``; the target is an attribute up to opset 4."""
    target = list(call.get("shape")) if shape is None else [int(size) for size in shape.tolist()]
    if not call.get("allowzero", 0):
        target = [x.shape[axis] if size == 0 else size for axis, size in enumerate(target)]
    return x.reshape(tuple(target))


@computes("Transpose")
def transpose(call: Call, x: Tensor) -> Tensor:
    """Without ``perm`` the order is reversed."""
    return x.permute(call.get("perm") or list(reversed(range(x.ndim))))


@computes("Flatten")
def flatten(call: Call, x: Tensor) -> Tensor:
    """The axes before ``axis`` are one, those from it on the other."""
    axis = call.get("axis", 1)
    lead = x.shape[: axis + x.ndim if axis < 0 else axis].numel()
    return x.reshape(lead, -1) if x.numel() else x.reshape(lead, 0)


@computes("Squeeze", host=(1,))
def squeeze(call: Call, x: Tensor, given: Tensor | None = None) -> Tensor:
    """Without axes all of length one go."""
    axes = axes_of(call, given)
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@computes("Unsqueeze", host=(1,))
def unsqueeze(call: Call, x: Tensor, given: Tensor | None = None) -> Tensor:
    """Axes count in the result."""
    axes = axes_of(call, given) or []
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@computes("Concat")
def concat(call: Call, *inputs: Tensor) -> Tensor:
    """One after the other on ``axis``."""
    return torch.cat(inputs, call.get("axis", 1))


@computes("Split", host=(1,))
def split(call: Call, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    """Into given lengths, or into equal ones of which the last may be shorter."""
    axis, given = call.get("axis", 0), call.get("split")
    lengths = list(given) if sizes is None and given else [] if sizes is None else [int(n) for n in sizes.tolist()]
    if not lengths:
        parts = call.get("num_outputs", len(call.outputs))
        each = -(-x.shape[axis] // parts)
        lengths = [min(each, x.shape[axis] - begin) for begin in range(0, x.shape[axis], each)]
    return torch.split(x, lengths, axis)


@computes("Slice", host=(1, 2, 3, 4))
def cut(
    call: Call,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Bounds are attributes up to opset 9; a negative step reads backwards."""
    begin = list(call.get("starts")) if starts is None else starts.tolist()
    end = list(call.get("ends")) if ends is None else ends.tolist()
    which = axes_of(call, axes) or list(range(len(begin)))
    step = [1] * len(begin) if steps is None else steps.tolist()
    for b, e, axis, s in zip(begin, end, which, step, strict=True):
        first, last, stride = slice(int(b), int(e), int(s)).indices(x.shape[axis])
        if stride == 1:
            x = x.narrow(axis, first, max(0, last - first))
        else:
            x = (
                x.index_select(axis, torch.arange(first, last, stride, device=x.device))
                if ((last - first) * stride > 0)
                else x.narrow(axis, 0, 0)
            )
    return x


@computes("Pad", host=(1, 2, 3))
def pad(
    call: Call, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    """Negative amounts cut; amounts are an attribute up to opset 10."""
    amounts = [int(n) for n in (call.get("pads") if pads is None else pads.tolist())]
    which = list(range(x.ndim)) if axes is None else [int(axis) % x.ndim for axis in axes.tolist()]
    sides = {axis: (amounts[i], amounts[i + len(which)]) for i, axis in enumerate(which)}
    flat = [side for axis in reversed(range(x.ndim)) for side in sides.get(axis, (0, 0))]
    mode = call.get("mode", "constant")
    if mode == "constant":
        fill = call.get("value", 0.0) if value is None else value.item()
        return functional.pad(x, flat, value=fill)
    for axis, (before, after) in sides.items():
        index = _reflected(x.shape[axis], before, after, mode, x.device)
        x = x if index is None else x.index_select(axis, index)
    return x


def _reflected(size: int, before: int, after: int, mode: str, device: torch.device) -> Tensor | None:
    """Indices that one axis is read at, where its padding repeats what it holds."""
    if not before and not after:
        return None
    index = torch.arange(-before, size + after, device=device)
    if mode == "edge":
        return index.clamp(0, size - 1)
    if mode == "wrap":
        return index % size
    period = max(1, 2 * (size - 1))
    index = index % period
    return torch.where(index >= size, period - index, index)


@computes("Shape")
def shape(call: Call, x: Tensor) -> Tensor:
    """Lengths of the axes from ``start`` to ``end``."""
    return torch.tensor(list(x.shape)[call.get("start", 0) : call.get("end")], dtype=torch.int64)


@computes("Size")
def size(call: Call, x: Tensor) -> Tensor:
    """Number of elements."""
    return torch.tensor(x.numel())


@computes("ConstantOfShape", host=(0,))
def constant_of_shape(call: Call, shape: Tensor) -> Tensor:
    """Zeros, or copies of the one element of ``value``."""
    value = call.get("value")
    value = torch.zeros(1) if value is None else value
    return value.reshape(()).expand([int(n) for n in shape.tolist()])


@computes("Expand", host=(1,))
def expand(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    """Both shapes broadcast to each other."""
    return x.expand(torch.broadcast_shapes(x.shape, [int(n) for n in shape.tolist()]))


@computes("Gather")
def gather(call: Call, x: Tensor, index: Tensor) -> Tensor:
    """Negative indices count from the end."""
    axis = call.get("axis", 0) % x.ndim
    flat = index.reshape(-1).long()
    taken = x.index_select(axis, torch.where(flat < 0, flat + x.shape[axis], flat))
    return taken.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


@computes("DepthToSpace")
def depth_to_space(call: Call, x: Tensor) -> Tensor:
    """Mode DCR takes the block from the outer channels, CRD from the inner ones."""
    n, c, h, w = x.shape
    r = call.get("blocksize")
    if call.get("mode", "DCR") == "DCR":
        grid = x.reshape(n, r, r, c // r**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        grid = x.reshape(n, c // r**2, r, r, h, w).permute(0, 1, 4, 2, 5, 3)
    return grid.reshape(n, c // r**2, h * r, w * r)


@computes("SpaceToDepth")
def space_to_depth(call: Call, x: Tensor) -> Tensor:
    """The inverse of mode DCR."""
    n, c, h, w = x.shape
    r = call.get("blocksize")
    grid = x.reshape(n, c, h // r, r, w // r, r).permute(0, 3, 5, 1, 2, 4)
    return grid.reshape(n, c * r**2, h // r, w // r)


@computes("CenterCropPad", host=(1,))
def center_crop_pad(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    """The middle is cut out, or zeros are put around; where the two sides differ the end has one more."""
    axes = [axis % x.ndim for axis in call.get("axes", range(x.ndim))]
    for axis, wanted in zip(axes, map(int, shape.tolist()), strict=True):
        have = x.shape[axis]
        if have >= wanted:
            x = x.narrow(axis, (have - wanted) // 2, wanted)
        else:
            before = (wanted - have) // 2
            sides = [0, 0] * (x.ndim - 1 - axis) + [before, wanted - have - before]
            x = functional.pad(x, sides)
    return x


@computes("Col2Im", host=(1, 2))
def col2im(call: Call, x: Tensor, size: Tensor, block: Tensor) -> Tensor:
    """Blocks are put back, and what overlaps is added; two spatial axes."""
    if size.numel() != 2:
        raise ModelError(f"{call.title}: Col2Im with other than two spatial axes")
    pads = call.get("pads", [0] * 4)
    full = tuple(int(n) + pads[i] + pads[i + 2] for i, n in enumerate(size.tolist()))
    y = functional.fold(
        x, full, tuple(block.tolist()), dilation=call.get("dilations", [1, 1]), stride=call.get("strides", [1, 1])
    )
    for i, n in enumerate(size.tolist()):
        y = y.narrow(i + 2, pads[i], int(n))
    return y
