"""Convolutions and products of matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from onnxprune.errors import ModelError
from onnxprune.train.kernels import Call, computes

CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONV_TRANSPOSE = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


def same_pads(call: Call, sizes: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """Padding per spatial axis, begins before ends, from ``pads`` or ``auto_pad``."""
    n, mode = len(sizes), call.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        return list(call.get("pads", [0] * 2 * n))
    if mode == "VALID":
        return [0] * 2 * n
    strides, dilations = call.get("strides", [1] * n), call.get("dilations", [1] * n)
    total = [
        max(0, (-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size)
        for size, stride, k, dilation in zip(sizes, strides, kernel, dilations, strict=True)
    ]
    less = [t // 2 for t in total]
    more = [t - half for t, half in zip(total, less, strict=True)]
    return [*less, *more] if mode == "SAME_UPPER" else [*more, *less]


def padded(x: Tensor, pads: Sequence[int], value: float = 0.0) -> tuple[Tensor, list[int]]:
    """Pad explicitly where the two sides differ; returns the rest as one number per axis."""
    n = len(pads) // 2
    if list(pads[:n]) == list(pads[n:]) and value == 0:
        return x, list(pads[:n])
    flat = [side for axis in reversed(range(n)) for side in (pads[axis], pads[axis + n])]
    return functional.pad(x, flat, value=value), [0] * n


@computes("Conv")
def conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Kernel, strides, dilations and groups as PyTorch has them; padding may differ from side to side."""
    n = weight.ndim - 2
    x, pads = padded(x, same_pads(call, x.shape[2:], weight.shape[2:]))
    return CONV[n](
        x, weight, bias, call.get("strides", [1] * n), pads, call.get("dilations", [1] * n), call.get("group", 1)
    )


@computes("ConvTranspose")
def conv_transpose(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What the pads leave out is cut from the full result, so that any two sides do."""
    n = weight.ndim - 2
    strides, dilations = call.get("strides", [1] * n), call.get("dilations", [1] * n)
    more = list(call.get("output_padding", [0] * n))
    full = [
        (size - 1) * stride + (k - 1) * dilation + 1 + extra
        for size, stride, k, dilation, extra in zip(
            x.shape[2:], strides, weight.shape[2:], dilations, more, strict=True
        )
    ]
    mode, wanted = call.get("auto_pad", "NOTSET"), call.get("output_shape")
    if wanted is None and mode in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if wanted is None:
        pads = list(call.get("pads", [0] * 2 * n))
    else:
        total = [max(0, size - want) for size, want in zip(full, wanted[-n:], strict=True)]
        less = [t // 2 for t in total]
        rest = [t - half for t, half in zip(total, less, strict=True)]
        pads = [*less, *rest] if mode == "SAME_UPPER" else [*rest, *less]
    if pads[:n] == pads[n:] and all(extra < max(s, d) for extra, s, d in zip(more, strides, dilations, strict=True)):
        return _CONV_TRANSPOSE[n](x, weight, bias, strides, pads[:n], more, call.get("group", 1), dilations)
    y = _CONV_TRANSPOSE[n](x, weight, bias, strides, 0, 0, call.get("group", 1), dilations)
    lacking = [
        side for size, have in zip(reversed(full), reversed(y.shape[2:]), strict=True) for side in (0, size - have)
    ]
    if any(lacking):  # output padding lies outside of what any input reaches: it holds the bias
        y = functional.pad(y if bias is None else y - bias.view(-1, *[1] * n), lacking)
        y = y if bias is None else y + bias.view(-1, *[1] * n)
    for axis in range(n):
        y = y.narrow(axis + 2, pads[axis], y.shape[axis + 2] - pads[axis] - pads[axis + n])
    return y


@computes("Gemm")
def gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """``alpha * A B + beta * C``, either of A and B transposed before."""
    a = a.T if call.get("transA", 0) else a
    b = b.T if call.get("transB", 0) else b
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    y = a @ b if alpha == 1 else alpha * (a @ b)
    return y if c is None else y + (c if beta == 1 else beta * c)


@computes("MatMul")
def matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """As numpy has it."""
    return a @ b


@computes("Einsum")
def einsum(call: Call, *operands: Tensor) -> Tensor:
    """Subscripts as PyTorch reads them, without blanks."""
    try:
        return torch.einsum(call.get("equation").replace(" ", ""), *operands)
    except RuntimeError as error:
        raise ModelError(f"{call.title}: {error}") from error
