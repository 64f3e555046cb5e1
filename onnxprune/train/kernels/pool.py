"""Pooling."""

from __future__ import annotations

from itertools import starmap
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from onnxprune.train.kernels import Call, computes
from onnxprune.train.kernels.linear import CONV, padded, same_pads

_MAX = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVERAGE = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


@computes("GlobalAveragePool", "GlobalMaxPool")
def global_pool(call: Call, x: Tensor) -> Tensor:
    """Over all spatial axes."""
    axes = tuple(range(2, x.ndim))
    return x.mean(axes, keepdim=True) if call.op == "GlobalAveragePool" else x.amax(axes, keepdim=True)


@computes("GlobalLpPool")
def global_lp_pool(call: Call, x: Tensor) -> Tensor:
    """The ``p``-norm over all spatial axes."""
    return torch.linalg.vector_norm(x, call.get("p", 2), dim=tuple(range(2, x.ndim)), keepdim=True)


def _pads(call: Call, x: Tensor) -> list[int]:
    """Padding, with what ``ceil_mode`` needs at the ends so that the last window fits."""
    kernel = call.get("kernel_shape")
    n = len(kernel)
    pads = same_pads(call, x.shape[2:], kernel)
    if call.get("ceil_mode", 0):
        strides, dilations = call.get("strides", [1] * n), call.get("dilations", [1] * n)
        for axis in range(n):
            window = (kernel[axis] - 1) * dilations[axis] + 1
            reach = x.shape[axis + 2] + pads[axis] + pads[axis + n] - window
            steps = -(-reach // strides[axis])
            if steps * strides[axis] >= x.shape[axis + 2] + pads[axis]:
                steps -= 1  # no window may begin behind the input
            pads[axis + n] += max(0, steps * strides[axis] - reach)
    return pads


@computes("MaxPool")
def max_pool(call: Call, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """Padding never wins; output 1 holds places in the flattened input."""
    kernel = call.get("kernel_shape")
    n, kind, pads = len(kernel), x.dtype, _pads(call, x)
    strides, dilations = call.get("strides", [1] * n), call.get("dilations", [1] * n)
    given = x.shape
    x = x if x.is_floating_point() else x.float()
    inner = pads[:n] if pads[:n] == pads[n:] and all(2 * p <= k for p, k in zip(pads, kernel, strict=False)) else None
    if inner is None:
        x, _ = padded(x, pads, -torch.inf)
    begins = [0] * n if inner is not None else pads[:n]
    own = inner or [0] * n
    if len(call.outputs) < 2 or not call.outputs[1]:
        return _MAX[n](x, kernel, strides, own, dilations).to(kind)
    y, places = _MAX[n](x, kernel, strides, own, dilations, return_indices=True)
    return y.to(kind), _places(places, x.shape[2:], given, begins, bool(call.get("storage_order", 0)))


def _places(places: Tensor, padded_to: torch.Size, shape: torch.Size, begins: list[int], columns_first: bool) -> Tensor:
    """Places in one padded channel as places in the whole input."""
    order = range(len(begins)) if columns_first else reversed(range(len(begins)))
    coordinates = {}
    for axis in reversed(range(len(begins))):
        coordinates[axis] = places % padded_to[axis] - begins[axis]
        places = places // padded_to[axis]
    flat, step = torch.zeros_like(places), 1
    for axis in order:
        flat, step = flat + coordinates[axis] * step, step * shape[axis + 2]
    channel = torch.arange(shape[0] * shape[1], device=places.device).view(*shape[:2], *[1] * len(begins))
    return flat + channel * step


@computes("MaxUnpool", host=(2,))
def max_unpool(call: Call, x: Tensor, places: Tensor, wanted: Tensor | None = None) -> Tensor:
    """Values go back to their places in a tensor of the given shape; the rest is zero."""
    kernel = call.get("kernel_shape")
    n = len(kernel)
    strides, pads = call.get("strides", [1] * n), call.get("pads", [0] * 2 * n)
    spatial = [
        (size - 1) * stride + k - pads[axis] - pads[axis + n]
        for axis, (size, stride, k) in enumerate(zip(x.shape[2:], strides, kernel, strict=True))
    ]
    shape = [*x.shape[:2], *spatial] if wanted is None else [int(size) for size in wanted.tolist()]
    flat = torch.zeros(prod(shape), dtype=x.dtype, device=x.device)
    return flat.scatter(0, places.reshape(-1).long(), x.reshape(-1)).reshape(shape)


def _sums(call: Call, x: Tensor, pads: list[int]) -> Tensor:
    """Sum over every window: a convolution with ones."""
    kernel = call.get("kernel_shape")
    n = len(kernel)
    flat = [side for axis in reversed(range(n)) for side in (pads[axis], pads[axis + n])]
    rows = functional.pad(x, flat).reshape(-1, 1, *[x.shape[a + 2] + pads[a] + pads[a + n] for a in range(n)])
    ones = torch.ones((1, 1, *kernel), dtype=x.dtype, device=x.device)
    y = CONV[n](rows, ones, None, call.get("strides", [1] * n), 0, call.get("dilations", [1] * n))
    return y.reshape(*x.shape[:2], *y.shape[2:])


@computes("LpPool")
def lp_pool(call: Call, x: Tensor) -> Tensor:
    """The ``p``-norm of every window."""
    p = call.get("p", 2)
    total = _sums(call, x.abs().pow(p), _pads(call, x))
    return total.clamp_min(torch.finfo(x.dtype).tiny).pow(1 / p)  # the root's slope at zero is infinite


@computes("AveragePool")
def average_pool(call: Call, x: Tensor) -> Tensor:
    """Padding counts only where ``count_include_pad`` says so, and what ``ceil_mode`` adds never does."""
    kernel = call.get("kernel_shape")
    n = len(kernel)
    strides, pads = call.get("strides", [1] * n), _pads(call, x)
    dilated = any(dilation != 1 for dilation in call.get("dilations", []))
    if not any(pads) and not dilated:
        return _AVERAGE[n](x, kernel, strides)
    counted = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    rest = pads
    if call.get("count_include_pad", 0):
        own = same_pads(call, x.shape[2:], kernel)
        inner = [side for axis in reversed(range(n)) for side in (own[axis], own[axis + n])]
        counted = functional.pad(counted, inner, value=1.0)
        rest = list(starmap(lambda a, b: a - b, zip(pads, own, strict=True)))
    if dilated:
        return _sums(call, x, pads) / _sums(call, counted, rest)
    flat, more = ([side for axis in reversed(range(n)) for side in (p[axis], p[axis + n])] for p in (pads, rest))
    pool = _AVERAGE[n]
    return pool(functional.pad(x, flat), kernel, strides) / pool(functional.pad(counted, more), kernel, strides)
