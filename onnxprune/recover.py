"""Recover: find out which channels of a model a pruned one has kept, from the two models alone.

Only what can be read off exactly counts: slices of the pruned tensors that equal slices of the original's, bit by bit, in
one way only. One such member tells what its whole group keeps; members whose weights were changed do not matter then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from onnxprune import external
from onnxprune.coupling import Coupling
from onnxprune.errors import UsageError
from onnxprune.labels import Atom
from onnxprune.protos import named_tensors
from onnxprune.slices import Slices, take

_HINT = "give the plan that made it (--plan; prune writes one with --plan-out)"
_UNKNOWN, _REMOVED, _KEPT = -1, 0, 1


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """A constant of the original, and what is left of it."""

    name: str
    axes: Mapping[int, Atom]
    before: tuple[int, ...]
    tensor: onnx.TensorProto

    @property
    def after(self) -> tuple[int, ...]:
        """Shape of what is left."""
        return tuple(self.tensor.dims)


def recover(coupling: Coupling, pruned: onnx.ModelProto) -> np.ndarray:
    """Find the keep mask (bool per class) by which a model was pruned.

    Raises
    ------
    UsageError
        Some group's channels cannot be told: its weights have changed, or several channels are alike.
    """
    pairs = list(_pairs(coupling, pruned.graph))
    state = np.where(coupling.frozen, _KEPT, _UNKNOWN)
    for pair in pairs:
        for axis, atom in pair.axes.items():
            whole = pair.before == pair.after if atom.rows else pair.before[axis] == pair.after[axis]
            if whole:
                _learn(coupling, state, atom, np.arange(atom.size))
    open_pairs = [pair for pair in pairs if pair.before != pair.after]
    while True:
        left = [pair for pair in open_pairs if not _match(coupling, pair, state)]
        if len(left) == len(open_pairs):
            break
        open_pairs = left
    for group in coupling.groups:
        if group.frozen is None and (state[group.classes] == _UNKNOWN).any():
            where = group.members[0][0] if group.members else group.id
            raise UsageError(f"which channels of {where} were kept cannot be told from the weights; {_HINT}")
    return state != _REMOVED


def _pairs(coupling: Coupling, graph: onnx.GraphProto) -> Iterator[_Pair]:
    tensors = {tensor.name: tensor for tensor in named_tensors(graph)}
    for (name, key), axes in coupling.ledger.constants.items():
        tensor = tensors.get(f"{name}@{key}") or tensors.get(name)
        before = coupling.model.constants[name].shape
        if tensor is None:
            continue
        after = tuple(tensor.dims)
        if len(after) != len(before) or any(new > old for new, old in zip(after, before, strict=True)):
            raise UsageError(
                f"{name} has shape {list(after)} in one model and {list(before)} in the other: the former is not the "
                "latter with channels removed"
            )
        yield _Pair(name, axes, before, tensor)


def _match(coupling: Coupling, pair: _Pair, state: np.ndarray) -> bool:
    """Learn what a tensor keeps on the one axis that is not known yet; False where that has to wait or cannot be."""
    slices: Slices = {}
    unknown = []
    for axis, atom in pair.axes.items():
        if (state[coupling.classes[atom.labels]] == _UNKNOWN).any():
            unknown.append(axis)
        elif not atom.rows or _even(coupling, atom, state):
            slices[axis] = coupling.kept_in_rows(atom, state != _REMOVED).tolist()
        else:
            return False
    if len(unknown) != 1 or pair.axes[unknown[0]].rows:
        return not unknown
    (axis,) = unknown
    array = take(coupling.model.constants[pair.name].load(), slices, pair.name)
    expected = tuple(pair.after[a] if a != axis else pair.before[a] for a in range(len(pair.before)))
    if array.shape != expected:
        return False
    kept = _only_embedding(np.moveaxis(array, axis, 0), np.moveaxis(external.array(pair.tensor), axis, 0))
    if kept is not None:
        _learn(coupling, state, pair.axes[axis], kept)
    return kept is not None


def _even(coupling: Coupling, atom: Atom, state: np.ndarray) -> bool:
    return bool(np.ptp((state[coupling.classes[atom.labels]] != _REMOVED).sum(-1)) == 0)


def _learn(coupling: Coupling, state: np.ndarray, atom: Atom, kept: np.ndarray) -> None:
    """Note which indices of an axis are kept; what is known already must agree."""
    classes = coupling.classes[atom.labels]
    news = np.full(classes.shape, _REMOVED)
    news[..., kept] = _KEPT
    known = state[classes]
    if ((known != _UNKNOWN) & (known != news)).any():
        raise UsageError(
            f"tensors of one group keep different channels: no pruning makes this of the original; {_HINT}"
        )
    state[classes] = news


def _only_embedding(whole: np.ndarray, part: np.ndarray) -> np.ndarray | None:
    """Ascending indices at which ``whole`` holds the slices of ``part``; None where there are none, or more than one way."""
    rows, wanted = ([row.tobytes() for row in np.ascontiguousarray(array)] for array in (whole, part))
    first = _earliest(rows, wanted)
    last = _earliest(rows[::-1], wanted[::-1])
    if first is None or last is None or first != [len(rows) - 1 - index for index in reversed(last)]:
        return None
    return np.array(first, np.int64)


def _earliest(rows: list[bytes], wanted: list[bytes]) -> list[int] | None:
    found, place = [], 0
    for row in wanted:
        while place < len(rows) and rows[place] != row:
            place += 1
        if place == len(rows):
            return None
        found.append(place)
        place += 1
    return found
