"""Operators that onnxruntime's optimisers fuse from several."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from onnxprune.errors import ModelError
from onnxprune.train.kernels import Call, computes
from onnxprune.train.kernels.attention import MICROSOFT
from onnxprune.train.kernels.linear import conv, gemm
from onnxprune.train.kernels.norm import group_normalized, layer_normalized, rms_inverse


@computes("FastGelu", domain=MICROSOFT)
def fast_gelu(call: Call, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The tanh formula, of the sum with a bias."""
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")


@computes("BiasGelu", domain=MICROSOFT)
def bias_gelu(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    """The exact formula, of the sum with a bias."""
    return functional.gelu(x + bias)


@computes("QuickGelu", domain=MICROSOFT)
def quick_gelu(call: Call, x: Tensor) -> Tensor:
    """``x * sigmoid(alpha * x)``."""
    return x * torch.sigmoid(call.get("alpha", 1.702) * x)


@computes("BiasAdd", domain=MICROSOFT)
def bias_add(call: Call, x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """All three add up."""
    return x + bias + skip


@computes("BiasSplitGelu", domain=MICROSOFT)
def bias_split_gelu(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    """The left half is multiplied with the right half's activation."""
    left, right = (x + bias).chunk(2, -1)
    return left * functional.gelu(right)


def _activated(call: Call, x: Tensor, numbers: list[float]) -> Tensor:
    """Apply the attribute ``activation``, whose numbers come in the order of its operator's."""
    first, second = (*numbers, None, None)[:2]
    table: dict[str, Callable[[], Tensor]] = {
        "": lambda: x,
        "Relu": lambda: torch.relu(x),
        "Sigmoid": lambda: torch.sigmoid(x),
        "Tanh": lambda: torch.tanh(x),
        "LeakyRelu": lambda: functional.leaky_relu(x, 0.01 if first is None else first),
        "Clip": lambda: torch.clamp(x, first, second),
        "HardSigmoid": lambda: torch.clamp(
            (0.2 if first is None else first) * x + (0.5 if second is None else second), 0, 1
        ),
    }
    if (name := call.get("activation", "")) not in table:
        raise ModelError(f"{call.title}: activation {name}")
    return table[name]()


@computes("FusedConv", domain=MICROSOFT)
def fused_conv(call: Call, x: Tensor, w: Tensor, bias: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
    """Convolution, then the sum with a residual tensor, then an activation."""
    y = conv(call, x, w, bias)
    return _activated(call, y if skip is None else y + skip, list(call.get("activation_params", [])))


@computes("NhwcConv", "NhwcFusedConv", domain=MICROSOFT)
def channels_last_conv(
    call: Call, x: Tensor, w: Tensor, bias: Tensor | None = None, skip: Tensor | None = None
) -> Tensor:
    """Channels stand last in all but the weight."""
    first = None if skip is None else skip.movedim(-1, 1)
    return fused_conv(call, x.movedim(-1, 1), w, bias, first).movedim(1, -1)


@computes("FusedGemm", domain=MICROSOFT)
def fused_gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Gemm, then an activation."""
    names = ("activation_alpha", "activation_beta", "activation_gamma")
    numbers = [call.get(name) for name in names if name in call.attributes]
    return _activated(call, gemm(call, a, b, c), numbers)


@computes("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def fused_matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Operands whose first axis moves behind the batch, or whose last two change places; ``alpha`` times the product."""
    sides = []
    for x, side in ((a, "A"), (b, "B")):
        x = x.movedim(0, -2) if call.get(f"transBatch{side}", 0) and x.ndim > 2 else x  # noqa: PLW2901
        sides.append(x.transpose(-1, -2) if call.get(f"trans{side}", 0) and x.ndim > 1 else x)
    return call.get("alpha", 1.0) * (sides[0] @ sides[1])


@computes("SkipLayerNormalization", domain=MICROSOFT)
def skip_layer_normalization(
    call: Call, x: Tensor, skip: Tensor, scale: Tensor, shift: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All inputs add up; outputs 1 and 2 are statistics of the sum, 3 is the sum."""
    total = x + skip if bias is None else x + skip + bias
    return *layer_normalized(total, scale, shift, call.get("epsilon", 1e-12)), total


@computes("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_rms_normalization(
    call: Call, x: Tensor, skip: Tensor, scale: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All inputs add up; output 3 is the sum."""
    total = x + skip if bias is None else x + skip + bias
    inverse = rms_inverse(total, (-1,), call.get("epsilon", 1e-12))
    return total * inverse * scale, torch.zeros_like(inverse), inverse, total


@computes("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_normalization(
    call: Call,
    words: Tensor,
    segments: Tensor | None,
    word_rows: Tensor,
    position_rows: Tensor,
    segment_rows: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of tables add up; output 1 counts the ones of the mask, 2 is the sum."""
    steps = torch.arange(words.shape[1], device=words.device)[None] if positions is None else positions
    total = word_rows[words.long()] + position_rows[steps.long()]
    if segments is not None and segment_rows is not None:
        total = total + segment_rows[segments.long()]
    counts = torch.zeros(words.shape[0], dtype=torch.int32, device=words.device) if mask is None else mask.sum(1)
    y, *_ = layer_normalized(total, scale, shift, call.get("epsilon", 1e-12))
    return y, counts.to(torch.int32), total


@computes("GroupNorm", "SkipGroupNorm", domain=MICROSOFT)
def group_norm(
    call: Call, x: Tensor, scale: Tensor, shift: Tensor, skip: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Channels stand last unless ``channels_last`` says otherwise; output 1 is the sum with skip and bias."""
    last = bool(call.get("channels_last", 1))
    for part in (skip, bias):
        if part is not None:
            narrow = part.ndim == 2 and x.ndim == 4
            x = x + (part[:, None, None, :] if narrow and last else part[:, :, None, None] if narrow else part)
    total = x
    y = x.movedim(-1, 1) if last else x
    shape = (-1, *[1] * (y.ndim - 2))
    y = group_normalized(y, call.get("groups"), call.get("epsilon", 1e-5)) * scale.view(shape) + shift.view(shape)
    y = functional.silu(y) if call.get("activation", 0) else y
    return (y.movedim(1, -1) if last else y), total
