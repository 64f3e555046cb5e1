"""Normalisations and softmax."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from onnxprune.train.kernels import Call, computes


@computes("BatchNormalization")
def batch_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Statistics are the graph's, also while training; where the graph says ``training_mode``, the batch's."""
    epsilon = call.get("epsilon", 1e-5)
    if call.get("training_mode", 0):
        return functional.batch_norm(x, None, None, scale, bias, True, 0.0, epsilon)
    return functional.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)


@computes("InstanceNormalization")
def instance_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Statistics over the spatial axes."""
    axes = tuple(range(2, x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + call.get("epsilon", 1e-5))
    shape = (-1, *[1] * (x.ndim - 2))
    return normal * scale.view(shape) + bias.view(shape)


@computes("LayerNormalization")
def layer_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Statistics over the axes from ``axis`` on."""
    axes = tuple(range(call.get("axis", -1) % x.ndim, x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + call.get("epsilon", 1e-5))
    return normal * scale if bias is None else normal * scale + bias


@computes("Softmax", "LogSoftmax")
def softmax(call: Call, x: Tensor) -> Tensor:
    """Over one axis; up to opset 12 over all axes from ``axis`` on."""
    function = functional.softmax if call.op == "Softmax" else functional.log_softmax
    if call.opset >= 13:
        return function(x, call.get("axis", -1))
    axis = call.get("axis", 1) % x.ndim
    return function(x.reshape(*x.shape[:axis], -1), -1).reshape(x.shape)
