"""Pooling."""

from __future__ import annotations

from itertools import starmap

import torch
from torch import Tensor
from torch.nn import functional

from onnxprune.train.kernels import Call, computes
from onnxprune.train.kernels.linear import padded, same_pads

_MAX = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVERAGE = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


@computes("GlobalAveragePool", "GlobalMaxPool")
def global_pool(call: Call, x: Tensor) -> Tensor:
    """Over all spatial axes."""
    axes = tuple(range(2, x.ndim))
    return x.mean(axes, keepdim=True) if call.op == "GlobalAveragePool" else x.amax(axes, keepdim=True)


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
def max_pool(call: Call, x: Tensor) -> Tensor:
    """Padding never wins."""
    kernel = call.get("kernel_shape")
    n = len(kernel)
    x, _ = padded(x, _pads(call, x), -torch.inf) if any(_pads(call, x)) else (x, [])
    return _MAX[n](x, kernel, call.get("strides", [1] * n), 0, call.get("dilations", [1] * n))


@computes("AveragePool")
def average_pool(call: Call, x: Tensor) -> Tensor:
    """Padding counts only where ``count_include_pad`` says so, and what ``ceil_mode`` adds never does."""
    kernel = call.get("kernel_shape")
    n = len(kernel)
    strides, pads = call.get("strides", [1] * n), _pads(call, x)
    if not any(pads):
        return _AVERAGE[n](x, kernel, strides)
    counted = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    flat = [side for axis in reversed(range(n)) for side in (pads[axis], pads[axis + n])]
    if call.get("count_include_pad", 0):
        own = same_pads(call, x.shape[2:], kernel)
        inner = [side for axis in reversed(range(n)) for side in (own[axis], own[axis + n])]
        counted = functional.pad(counted, inner, value=1.0)
        counted = functional.pad(counted, list(starmap(lambda a, b: a - b, zip(flat, inner, strict=True))))
    else:
        counted = functional.pad(counted, flat)
    return _AVERAGE[n](functional.pad(x, flat), kernel, strides) / _AVERAGE[n](counted, kernel, strides)
