"""Reductions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onnxprune.train.kernels import Call, computes
from onnxprune.train.kernels.movement import axes_of


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep)
    return x.double().mean(axes, keepdim=keep).trunc().to(x.dtype)


_REDUCE: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMean": _mean,
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
        return _REDUCE[call.op](x, tuple(axes), keep) if axes else _REDUCE[call.op](x.reshape(1), (0,), False)
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


@computes("ArgMax", "ArgMin")
def arg(call: Call, x: Tensor) -> Tensor:
    """The first of equals, or the last with ``select_last_index``."""
    axis, keep = call.get("axis", 0), bool(call.get("keepdims", 1))
    best = x.amax(axis, keepdim=True) if call.op == "ArgMax" else x.amin(axis, keepdim=True)
    place = torch.arange(x.shape[axis], device=x.device).view(-1, *[1] * (x.ndim - 1 - axis % x.ndim))
    if call.get("select_last_index", 0):
        return torch.where(x == best, place, -1).amax(axis, keepdim=keep)
    return torch.where(x == best, place, x.shape[axis]).amin(axis, keepdim=keep)


@computes("CumSum", "CumProd", host=(1,))
def cumulate(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    """With ``exclusive`` an element does not count itself; with ``reverse`` from the end."""
    where = int(axis.item()) % x.ndim
    x = x.flip(where) if call.get("reverse", 0) else x
    if call.get("exclusive", 0):
        first = torch.full_like(x.narrow(where, 0, 1), 0 if call.op == "CumSum" else 1)
        x = torch.cat([first, x.narrow(where, 0, x.shape[where] - 1)], where)
    y = torch.cumsum(x, where, dtype=x.dtype) if call.op == "CumSum" else torch.cumprod(x, where, dtype=x.dtype)
    return y.flip(where) if call.get("reverse", 0) else y
