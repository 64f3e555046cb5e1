"""Activations that have numbers of their own; those without are among the element-wise operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from onnxprune.train.kernels import Call, computes


@computes("LeakyRelu")
def leaky_relu(call: Call, x: Tensor) -> Tensor:
    """``alpha`` is the slope below zero."""
    return functional.leaky_relu(x, call.get("alpha", 0.01))


@computes("PRelu")
def prelu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    """The slope broadcasts to the input from the right; up to opset 6 a vector holds one per channel."""
    if call.opset < 7 and slope.ndim == 1 and x.ndim > 2:
        slope = slope.view(-1, *[1] * (x.ndim - 2))
    return torch.where(x < 0, x * slope, x)


@computes("HardSigmoid")
def hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    """``max(0, min(1, alpha * x + beta))``."""
    return torch.clamp(call.get("alpha", 0.2) * x + call.get("beta", 0.5), 0, 1)


@computes("Elu")
def elu(call: Call, x: Tensor) -> Tensor:
    """``alpha * (exp(x) - 1)`` below zero."""
    return functional.elu(x, call.get("alpha", 1.0))


@computes("Celu")
def celu(call: Call, x: Tensor) -> Tensor:
    """``max(0, x) + min(0, alpha * (exp(x / alpha) - 1))``."""
    return functional.celu(x, call.get("alpha", 1.0))


@computes("Selu")
def selu(call: Call, x: Tensor) -> Tensor:
    """``gamma * x``, and ``gamma * alpha * (exp(x) - 1)`` below zero."""
    return call.get("gamma", 1.0507009873554805) * functional.elu(x, call.get("alpha", 1.6732632423543772))


@computes("Swish")
def swish(call: Call, x: Tensor) -> Tensor:
    """``x * sigmoid(alpha * x)``."""
    alpha = call.get("alpha", 1.0)
    return functional.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@computes("ThresholdedRelu")
def thresholded_relu(call: Call, x: Tensor) -> Tensor:
    """What does not exceed ``alpha`` is zero."""
    return torch.where(x > call.get("alpha", 1.0), x, torch.zeros_like(x))


@computes("Shrink")
def shrink(call: Call, x: Tensor) -> Tensor:
    """What lies within ``lambd`` is zero; the rest moves towards zero by ``bias``."""
    bound, bias = call.get("lambd", 0.5), call.get("bias", 0.0)
    moved = torch.where(x < 0, x + bias, x - bias)
    return torch.where(x.abs() > bound, moved, torch.zeros_like(x))


@computes("Gelu")
@computes("Gelu", domain="com.microsoft")
def gelu(call: Call, x: Tensor) -> Tensor:
    """Exact, or by the tanh formula."""
    return functional.gelu(x, approximate=call.get("approximate", "none"))
