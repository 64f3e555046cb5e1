"""Rotary embeddings: pairs of columns turn by an angle that the position gives (Su et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from onnxprune.train.kernels import Call


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the first columns; the tables have half as many, and broadcast to the other axes."""
    n = 2 * cos.shape[-1]
    turning, rest = x[..., :n], x[..., n:]
    a, b = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    real, imaginary = cos * a - sin * b, sin * a + cos * b
    pairs = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    return torch.cat([pairs, rest], -1)


def turned(call: Call, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (batch, heads, tokens, columns), or (batch, tokens, heads * columns)."""
    interleaved = bool(call.get("interleaved", 0))
    if x.ndim == 4:
        return rotated(x, cos.unsqueeze(1), sin.unsqueeze(1), interleaved)
    count = call.get("num_heads", 0)
    if not count or (call.domain and not call.get("rotary_embedding_dim", 0)):
        count = x.shape[-1] // (2 * cos.shape[-1])
    split = x.reshape(*x.shape[:2], count, -1)
    return rotated(split, cos.unsqueeze(2), sin.unsqueeze(2), interleaved).reshape(x.shape)
