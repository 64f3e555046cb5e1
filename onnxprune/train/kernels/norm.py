"""Normalisations and softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from onnxprune.train.kernels import Call, computes


@computes("BatchNormalization")
def batch_normalization(
    call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> Tensor | tuple[Tensor, ...]:
    """Statistics are the graph's, also while training; where the graph says ``training_mode``, the batch's."""
    epsilon, momentum = call.get("epsilon", 1e-5), call.get("momentum", 0.9)
    if not call.get("training_mode", 0):
        if mean.requires_grad or var.requires_grad:  # PyTorch's function has no gradient for them
            return _per_channel(_per_channel(x, torch.ones_like(mean), -mean), scale * torch.rsqrt(var + epsilon), bias)
        return functional.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)
    axes = (0, *range(2, x.ndim))
    running = (
        momentum * mean + (1 - momentum) * x.mean(axes),
        momentum * var + (1 - momentum) * x.var(axes, correction=0),
    )
    return functional.batch_norm(x, None, None, scale, bias, True, 0.0, epsilon), *running


@computes("InstanceNormalization")
def instance_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Statistics over the spatial axes."""
    return _per_channel(group_normalized(x, x.shape[1], call.get("epsilon", 1e-5)), scale, bias)


def group_normalized(x: Tensor, groups: int, epsilon: float) -> Tensor:
    """Mean 0 and variance 1 in every group of consecutive channels of every sample."""
    if x.numel() // x.shape[0] > groups:
        return functional.group_norm(x, groups, eps=epsilon)
    return x - x  # PyTorch refuses groups of one element


def _per_channel(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    shape = (-1, *[1] * (x.ndim - 2))
    return x * scale.view(shape) + bias.view(shape)


@computes("GroupNormalization")
def group_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Scale and bias are one number per channel; before opset 21 one per group."""
    groups = call.get("num_groups")
    each = x.shape[1] // groups if call.opset < 21 else 1
    normal = group_normalized(x, groups, call.get("epsilon", 1e-5))
    return _per_channel(normal, scale.repeat_interleave(each), bias.repeat_interleave(each))


def layer_normalized(
    x: Tensor, scale: Tensor | None, bias: Tensor | None, epsilon: float, axis: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised input, and mean and inverse deviation over the axes from ``axis`` on."""
    shape = x.shape[axis % x.ndim :]
    axes = tuple(range(axis % x.ndim, x.ndim))
    scale, bias = (None if c is None else c.expand(shape) for c in (scale, bias))
    y = functional.layer_norm(x, shape, scale, bias, epsilon)
    mean = x.detach().mean(axes, keepdim=True)
    deviation = torch.rsqrt(x.detach().var(axes, correction=0, keepdim=True) + epsilon)
    return y, mean, deviation


@computes("LayerNormalization")
def layer_normalization(
    call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor | tuple[Tensor, ...]:
    """Statistics over the axes from ``axis`` on; as outputs 1 and 2 they carry no gradient."""
    axis, epsilon = call.get("axis", -1), call.get("epsilon", 1e-5)
    if any(call.outputs[1:]):
        return layer_normalized(x, scale, bias, epsilon, axis)
    shape = x.shape[axis % x.ndim :]
    return functional.layer_norm(x, shape, scale.expand(shape), None if bias is None else bias.expand(shape), epsilon)


@computes("RMSNormalization", "SimplifiedLayerNormalization")
def rms_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Division by the root of the mean square over the axes from ``axis`` on; output 1 is its inverse."""
    axes = tuple(range(call.get("axis", -1) % x.ndim, x.ndim))
    inverse = rms_inverse(x, axes, call.get("epsilon", 1e-5))
    y = x * inverse * scale
    return (y if bias is None else y + bias), inverse


def rms_inverse(x: Tensor, axes: Sequence[int], epsilon: float) -> Tensor:
    """Inverse of the root of the mean square."""
    return torch.rsqrt(x.square().mean(tuple(axes), keepdim=True) + epsilon)


@computes("LpNormalization")
def lp_normalization(call: Call, x: Tensor) -> Tensor:
    """Division by the norm along one axis; where that is zero the result is zero."""
    norm = torch.linalg.vector_norm(x, call.get("p", 2), dim=call.get("axis", -1), keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


@computes("LRN")
def local_response_normalization(call: Call, x: Tensor) -> Tensor:
    """Squares sum over ``size`` neighbouring channels; where that is even, one more of them comes after than before."""
    size = call.get("size")
    before = (size - 1) // 2
    squares = functional.pad(x.square().flatten(2).transpose(1, 2), (before, size - 1 - before))
    total = squares.unfold(2, size, 1).sum(-1).transpose(1, 2).reshape(x.shape)
    return x * (call.get("bias", 1.0) + call.get("alpha", 1e-4) / size * total).pow(-call.get("beta", 0.75))


@computes("MeanVarianceNormalization")
def mean_variance_normalization(call: Call, x: Tensor) -> Tensor:
    """Statistics over ``axes``; 1e-9 is added to the deviation."""
    axes = tuple(call.get("axes", [0, 2, 3]))
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


_SOFTMAX: dict[str, Callable[[Tensor, int], Tensor]] = {
    "Softmax": torch.softmax,
    "LogSoftmax": torch.log_softmax,
    "Hardmax": _hardmax,
}


@computes("Softmax", "LogSoftmax", "Hardmax")
def softmax(call: Call, x: Tensor) -> Tensor:
    """Over one axis; up to opset 12 over all axes from ``axis`` on."""
    function = _SOFTMAX[call.op]
    if call.opset >= 13:
        return function(x, call.get("axis", -1))
    axis = call.get("axis", 1) % (x.ndim + 1)
    return function(x.reshape(*x.shape[:axis], -1), -1).reshape(x.shape)
