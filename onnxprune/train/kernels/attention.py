"""Fused attention and rotary embeddings. Heads are seen as (batch, heads, tokens, columns)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from onnxprune.errors import ModelError
from onnxprune.train.kernels import Call, computes
from onnxprune.train.kernels.rotary import rotated, turned

MICROSOFT = "com.microsoft"


def heads(x: Tensor, count: int) -> Tensor:
    """Split the last axis of (batch, tokens, heads * columns)."""
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """Put heads back into the last axis."""
    return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, softcap: float = 0.0) -> Tensor:
    """Softmax over the keys' tokens of scaled products, and the mean of the values that it weighs."""
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if not softcap:
        return functional.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    return torch.softmax(scores if bias is None else scores + bias, -1) @ v


def _bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A boolean mask as what is added to scores: minus infinity where it is false."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, -torch.inf)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def causal(q: Tensor, k: Tensor, past: int, fill: float = -torch.inf, window: int = -1) -> Tensor:
    """What is added to scores so that a token sees only itself and those before it, ``window`` of them."""
    rows = torch.arange(q.shape[2], device=q.device)[:, None] + past
    columns = torch.arange(k.shape[2], device=q.device)
    hidden = (columns > rows) | ((columns <= rows - window) if window > 0 else torch.zeros_like(columns > rows))
    return torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill(hidden, fill)


def _with_past(past: Tensor | None, x: Tensor) -> Tensor:
    return x if past is None else torch.cat([past, x], 2)


def _checked(call: Call, places: dict[int, str], inputs: tuple[Any, ...]) -> None:
    for place, title in places.items():
        if len(inputs) > place and inputs[place] is not None:
            raise ModelError(f"{call.title}: {call.op} with {title}")


@computes("Attention")
def attention(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *rest: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values may have fewer heads than queries; with three axes the last packs heads and columns."""
    _checked(call, {0: "lengths of keys"}, rest)
    if any(call.outputs[3:]) or call.get("left_window_size", -1) >= 0 or call.get("right_window_size", -1) >= 0:
        raise ModelError(f"{call.title}: attention that returns its scores, or with a window")
    packed = q.ndim == 3
    if packed:
        q, k, v = heads(q, call.get("q_num_heads")), *(heads(x, call.get("kv_num_heads")) for x in (k, v))
    before = 0 if past_key is None else past_key.shape[2]
    k, v = _with_past(past_key, k), _with_past(past_value, v)
    bias = _bias(mask, q)
    if bias is not None and bias.shape[-1] < k.shape[2]:
        bias = functional.pad(bias, (0, k.shape[2] - bias.shape[-1]), value=-torch.inf)
    if call.get("is_causal", 0):
        bias = _plus(bias, causal(q, k, before))
    y = attend(q, k, v, bias, call.get("scale"), call.get("softcap", 0.0))
    return (joined(y) if packed else y), k, v


@computes("Attention", domain=MICROSOFT)
def projected_attention(
    call: Call,
    x: Tensor,
    weight: Tensor,
    stacked: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    bias: Tensor | None = None,
    *rest: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One weight holds those of queries, keys and values; output 1 stacks keys and values."""
    _checked(call, {0: "a length of the past"}, rest)
    if call.get("do_rotary", 0):
        raise ModelError(f"{call.title}: attention that rotates by itself")
    y = x @ weight if stacked is None else x @ weight + stacked
    sizes = call.get("qkv_hidden_sizes") or [y.shape[-1] // 3] * 3
    q, k, v = (heads(part, call.get("num_heads")) for part in y.split(sizes, -1))
    before = 0 if past is None else past.shape[3]
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    fill = call.get("mask_filter_value", -10000.0)
    bias = _plus(bias, _padding(call, mask, q, k, fill))
    if call.get("unidirectional", 0):
        bias = _plus(bias, causal(q, k, before, torch.finfo(q.dtype).min))
    present = torch.stack([k, v]) if any(call.outputs[1:]) else k
    return joined(attend(q, k, v, bias, call.get("scale") or None)), present


def _padding(call: Call, mask: Tensor | None, q: Tensor, k: Tensor, fill: float) -> Tensor | None:
    """What is added to scores for a mask of zeros and ones, or for lengths of the keys."""
    if mask is None:
        return None
    batch, total = q.shape[0], k.shape[2]
    if mask.ndim == 1 and mask.numel() == batch:
        mask = torch.arange(total, device=q.device) < mask[:, None]
    if mask.ndim == 1 or mask.ndim > 3 or mask.shape[-1] != total:
        raise ModelError(f"{call.title}: a mask of shape {list(mask.shape)}")
    seen = mask > 0 if mask.dtype != torch.bool else mask
    seen = seen.view(batch, 1, -1, total)
    return torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, fill)


@computes("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(
    call: Call,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    stacked: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *rest: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values come apart, or packed as (batch, tokens, heads, parts, columns)."""
    _checked(call, {0: "a length of the past", 1: "an indirection"}, rest)
    count = call.get("num_heads")
    if query.ndim == 5:
        q, k, v = (part.transpose(1, 2) for part in query.unbind(3))
    elif key is not None and key.ndim == 5:
        q = heads(query, count)
        k, v = (part.transpose(1, 2) for part in key.unbind(3))
    elif key is None or value is None:
        raise ModelError(f"{call.title}: MultiHeadAttention without keys or values")
    else:
        q = heads(query, count)
        k, v = (x if x.ndim == 4 else heads(x, count) for x in (key, value))
    if stacked is not None:
        widths = [q.shape[-1] * count, k.shape[-1] * count, v.shape[-1] * count]
        q, k, v = (x + part.view(count, 1, -1) for x, part in zip((q, k, v), stacked.split(widths), strict=True))
    before = 0 if past_key is None else past_key.shape[2]
    k, v = _with_past(past_key, k), _with_past(past_value, v)
    bias = _plus(bias, _padding(call, mask, q, k, call.get("mask_filter_value", -10000.0)))
    if call.get("unidirectional", 0):
        bias = _plus(bias, causal(q, k, before, torch.finfo(q.dtype).min))
    return joined(attend(q, k, v, bias, call.get("scale") or None)), k, v


@computes("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(
    call: Call,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    lengths: Tensor,
    total: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    bias: Tensor | None = None,
    *rest: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention over a prompt, whose keys and values have fewer heads than its queries."""
    _checked(call, dict.fromkeys(range(4), "sinks, norms or scales"), rest)
    if call.get("smooth_softmax", 0) > 0 or (
        past_key is not None and past_key.shape[2] and int(total) > query.shape[1]
    ):
        raise ModelError(f"{call.title}: GroupQueryAttention that continues a past, or with a smooth softmax")
    own, shared = call.get("num_heads"), call.get("kv_num_heads")
    if key is None or value is None:
        width = query.shape[-1] // (own + 2 * shared)
        query, key, value = query.split([own * width, shared * width, shared * width], -1)
    q, k, v = heads(query, own), heads(key, shared), heads(value, shared)
    if call.get("do_rotary", 0) and cos is not None and sin is not None:
        steps = torch.arange(q.shape[2], device=q.device)[None] if positions is None else positions
        tables = cos[steps].unsqueeze(1), sin[steps].unsqueeze(1)
        q, k = (rotated(x, *tables, bool(call.get("rotary_interleaved", 0))) for x in (q, k))
    bias = _plus(bias, causal(q, k, 0, window=call.get("local_window_size", -1)))
    y = attend(q, k, v, bias, call.get("scale") or None, call.get("softcap", 0.0))
    return joined(y), k, v


@computes("RotaryEmbedding")
def rotary_embedding(call: Call, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    """Tables hold one row per position; without positions, one per token of every sample."""
    tables = (cos, sin) if positions is None else (cos[positions.long()], sin[positions.long()])
    return turned(call, x, *tables)


@computes("RotaryEmbedding", domain=MICROSOFT)
def microsoft_rotary_embedding(call: Call, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One number in the place of positions is that of the first token."""
    if positions.numel() == 1:
        tokens = x.shape[-2]
        positions = positions.reshape(1, 1) + torch.arange(tokens, device=x.device)
    return turned(call, x, cos[positions.long()], sin[positions.long()])
