"""Quantisation: values stay floats that hold integers, and rounding lets gradients through as if it were not there."""

from __future__ import annotations

import torch
from torch import Tensor

from onnxprune.errors import ModelError
from onnxprune.train.kernels import Call, computes
from onnxprune.train.kernels.elementwise import TYPES
from onnxprune.train.kernels.linear import conv


def _rounded(x: Tensor) -> Tensor:
    """Straight-through estimator: the nearest integer, with the gradient of the identity."""
    return x + (torch.round(x) - x).detach()


def _spread(call: Call, factor: Tensor, x: Tensor) -> Tensor:
    """One number per tensor, per index of ``axis``, or per block of ``block_size`` indices."""
    if factor.numel() == 1:
        return factor.reshape(())
    axis = call.get("axis", 1) % x.ndim
    if block := call.get("block_size", 0):
        return factor.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return factor.reshape(-1, *[1] * (x.ndim - 1 - axis))


@computes("QuantizeLinear")
def quantize_linear(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Saturated to the range of the zero point's type; a gradient passes where it did not saturate."""
    kind = zero.dtype if zero is not None else TYPES.get(call.get("output_dtype", 0), torch.uint8)
    if kind.is_floating_point:
        raise ModelError(f"{call.title}: quantisation to {kind}")
    shift = 0.0 if zero is None else _spread(call, zero, x).float()
    limits = torch.iinfo(kind)
    return torch.clamp(_rounded(x / _spread(call, scale, x)) + shift, limits.min, limits.max)


@computes("DequantizeLinear")
def dequantize_linear(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """``(x - zero) * scale``."""
    x = x.to(scale.dtype)
    shifted = x if zero is None else x - _spread(call, zero, x).to(scale.dtype)
    return shifted * _spread(call, scale, x)


@computes("DynamicQuantizeLinear")
def dynamic_quantize_linear(call: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """To unsigned bytes over the range of the values and zero; scale and zero point carry no gradient."""
    low, high = x.detach().amin().clamp(max=0), x.detach().amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round(torch.clamp(-low / scale, 0, 255))
    return torch.clamp(_rounded(x / scale) + zero, 0, 255), scale, zero


def _centred(x: Tensor, zero: Tensor | None, row: bool) -> Tensor:
    """Subtract a zero point that is one number, or one per row (of the left operand) or column."""
    if zero is None:
        return x.float()
    return x.float() - (zero.float().unsqueeze(-1) if row and zero.ndim == 1 and zero.numel() > 1 else zero.float())


@computes("MatMulInteger")
def matmul_integer(
    call: Call, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    """The product of both without their zero points, in float32."""
    return _centred(a, a_zero, True) @ _centred(b, b_zero, False)


@computes("ConvInteger")
def conv_integer(
    call: Call, x: Tensor, w: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None
) -> Tensor:
    """The convolution of both without their zero points, in float32."""
    if w_zero is not None and w_zero.numel() > 1:
        w_zero = w_zero.view(-1, *[1] * (w.ndim - 1))
    return conv(call, _centred(x, x_zero, False), _centred(w, w_zero, False))
