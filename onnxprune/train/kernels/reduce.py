"""Reductions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onnxprune.train.kernels import Call, computes
from onnxprune.train.kernels.movement import axes_of

_REDUCE: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
}


@computes(*_REDUCE, "ReduceProd", host=(1,))
def reduce(call: Call, x: Tensor, given: Tensor | None = None) -> Tensor:
    """Without axes over all, or over none where ``noop_with_empty_axes``."""
    axes = axes_of(call, given)
    if not axes:
        if call.get("noop_with_empty_axes", 0):
            return x
        axes = list(range(x.ndim))
    keep = bool(call.get("keepdims", 1))
    if call.op != "ReduceProd":
        return _REDUCE[call.op](x, tuple(axes), keep) if axes else x
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x
