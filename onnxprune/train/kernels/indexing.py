"""Operators that read or write at computed places, and those that make indices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onnxprune.errors import ModelError
from onnxprune.train.kernels import Call, computes
from onnxprune.train.kernels.elementwise import TYPES


def _wrapped(index: Tensor, size: int) -> Tensor:
    """Negative indices count from the end."""
    index = index.long()
    return torch.where(index < 0, index + size, index)


@computes("GatherElements")
def gather_elements(call: Call, x: Tensor, index: Tensor) -> Tensor:
    """One index per element of the result."""
    axis = call.get("axis", 0) % x.ndim
    return torch.gather(x, axis, _wrapped(index, x.shape[axis]))


@computes("GatherND")
def gather_nd(call: Call, x: Tensor, index: Tensor) -> Tensor:
    """The last axis of the indices holds places on the axes that follow ``batch_dims``."""
    batch = call.get("batch_dims", 0)
    columns = [_wrapped(part, x.shape[batch + k]) for k, part in enumerate(index.unbind(-1))]
    lead = [
        torch.arange(n, device=x.device).view(-1, *[1] * (index.ndim - 2 - axis))
        for axis, n in enumerate(x.shape[:batch])
    ]
    return x[(*lead, *columns)]


_MERGES: dict[str, str] = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _merged(call: Call) -> str | None:
    mode = call.get("reduction", "none")
    if mode != "none" and mode not in _MERGES:
        raise ModelError(f"{call.title}: reduction {mode}")
    return _MERGES.get(mode)


@computes("ScatterND")
def scatter_nd(call: Call, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """Slices of a copy are replaced, or merged with what is there."""
    depth = index.shape[-1]
    lead, inner = x.shape[:depth], x.shape[depth:]
    flat = torch.zeros(index.shape[:-1], dtype=torch.int64, device=x.device)
    for size, part in zip(lead, index.unbind(-1), strict=True):
        flat = flat * size + _wrapped(part, size)
    rows = x.reshape(lead.numel(), *inner)
    flat, updates = flat.reshape(-1), updates.reshape(-1, *inner).to(x.dtype)
    if (merge := _merged(call)) is None:
        return rows.index_copy(0, flat, updates).reshape(x.shape)
    if merge == "sum":
        return rows.index_add(0, flat, updates).reshape(x.shape)
    where = flat.view(-1, *[1] * len(inner)).expand(updates.shape)
    return rows.scatter_reduce(0, where, updates, merge).reshape(x.shape)


@computes("ScatterElements", "Scatter")
def scatter_elements(call: Call, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """Elements of a copy are replaced, or merged with what is there."""
    axis = call.get("axis", 0) % x.ndim
    index = _wrapped(index, x.shape[axis])
    if (merge := _merged(call)) is None:
        return x.scatter(axis, index, updates)
    return x.scatter_reduce(axis, index, updates, merge)


@computes("TensorScatter")
def tensor_scatter(call: Call, past: Tensor, update: Tensor, begins: Tensor | None = None) -> Tensor:
    """Each sample's update goes where its row of indices says, along one axis; mode circular wraps around."""
    axis = call.get("axis", -2) % past.ndim
    size, steps = past.shape[axis], torch.arange(update.shape[axis], device=past.device)
    begin = torch.zeros(past.shape[0], 1, dtype=torch.int64, device=past.device) if begins is None else begins[:, None]
    index = begin + steps
    index = index % size if call.get("mode", "linear") == "circular" else index
    shape = [past.shape[0], *[1] * (past.ndim - 1)]
    shape[axis] = -1
    return past.scatter(axis, index.reshape(shape).expand(update.shape), update)


@computes("OneHot", host=(1,))
def one_hot(call: Call, index: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    """Indices out of range give no hot element."""
    n = int(depth.reshape(-1)[0])
    axis = call.get("axis", -1) % (index.ndim + 1)
    places = torch.arange(n, device=index.device).view(-1, *[1] * (index.ndim - axis))
    hot = _wrapped(index, n).unsqueeze(axis) == places
    return torch.where(hot, values[1], values[0])


@computes("TopK", host=(1,))
def top_k(call: Call, x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Values and their places, best first; of equals the first comes first. ``k`` is an attribute up to opset 9."""
    axis: int = call.get("axis", -1)
    count = call.get("k") if k is None else int(k.reshape(-1)[0])
    values, places = torch.sort(x, dim=axis, descending=bool(call.get("largest", 1)), stable=True)
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


@computes("NonZero")
def non_zero(call: Call, x: Tensor) -> Tensor:
    """One row per axis."""
    return torch.nonzero(x).T


@computes("Compress")
def compress(call: Call, x: Tensor, condition: Tensor) -> Tensor:
    """What the condition holds for, along an axis or of the flattened input."""
    axis = call.get("axis")
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis)
    return x.index_select(axis, torch.nonzero(condition).reshape(-1))


@computes("Trilu", host=(1,))
def triangle(call: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    """The upper triangle, or the lower one; ``k`` shifts the diagonal."""
    part: Callable[..., Tensor] = torch.triu if call.get("upper", 1) else torch.tril
    return part(x, 0 if k is None else int(k.item()))


@computes("Range", host=(0, 1, 2))
def arange(call: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """The limit is left out."""
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device)


@computes("Tile", host=(1,))
def tile(call: Call, x: Tensor, repeats: Tensor) -> Tensor:
    """Copies follow one another on every axis."""
    return x.repeat([int(n) for n in repeats.tolist()])


@computes("ReverseSequence", host=(1,))
def reverse_sequence(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    """The first elements along ``time_axis`` are turned round, as many as each sample of ``batch_axis`` has."""
    time, batch = call.get("time_axis", 0), call.get("batch_axis", 1)
    return reversed_rows(x, lengths.to(x.device), time, batch)


def reversed_rows(x: Tensor, lengths: Tensor, time: int, batch: int) -> Tensor:
    """Turn round as many leading elements along ``time`` as ``lengths`` says for each index of ``batch``."""
    place = torch.arange(x.shape[time], device=x.device)
    index = torch.where(place < lengths[:, None], lengths[:, None] - 1 - place, place)  # (batch, time)
    shape = [1] * x.ndim
    shape[batch], shape[time] = x.shape[batch], x.shape[time]
    index = index.long() if batch < time else index.T.long()
    return torch.gather(x, time, index.reshape(shape).expand(x.shape))


@computes("EyeLike")
def eye_like(call: Call, x: Tensor) -> Tensor:
    """Ones on the ``k``-th diagonal."""
    kind = TYPES[call.get("dtype")] if "dtype" in call.attributes else x.dtype
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return (torch.arange(x.shape[1], device=x.device) - rows == call.get("k", 0)).to(kind)
