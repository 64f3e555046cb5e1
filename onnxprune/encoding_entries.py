"""What stays of the quantization encodings of one tensor, in each format that AIMET has written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from onnxprune.errors import ModelError

FLAT = ("scale", "offset", "zero_point_shift", "per_block_int_scale")
"""Vectors of an encoding of version 1.0.0."""

NESTED = ("y_scale", "y_zero_point", "zero_point_shift", "per_channel_float_scale", "per_block_int_scale")
"""Lists of an encoding of version 2.0.0, as deep as the tensor has axes where it has blocks."""


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of the pruned model.

    Attributes
    ----------
    given
        Its shape in the original, or how to find that out.
    left
        What stays of an array of that shape.
    channels
        Axes of output and input channels, where an operator that reads the tensor says so.
    groups
        How many groups of outputs there are where the axis of output channels has those of one group (ConvTranspose).
    """

    name: str
    given: tuple[int, ...] | Callable[[], tuple[int, ...] | None]
    left: Callable[[np.ndarray], np.ndarray]
    channels: tuple[int, int] | None = None
    groups: int = 1

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape in the original."""
        shape = self.given() if callable(self.given) else self.given
        if shape is None:
            raise _error(self.name, "its shape is not known")
        return shape

    @property
    def whole(self) -> bool:
        """Whether nothing of it goes."""
        return self.left(np.broadcast_to(np.int8(0), self.shape)).shape == self.shape

    def kept(self, axis: int) -> list[int]:
        """Indices of an axis that stay."""
        place = [-1 if other == axis else 1 for other in range(len(self.shape))]
        indices = np.broadcast_to(np.arange(self.shape[axis], dtype=np.int32).reshape(place), self.shape)
        left = np.moveaxis(self.left(indices), axis, 0)
        rows = left.reshape(len(left), -1)
        if (rows != rows[:, :1]).any():
            raise self.error(f"its groups keep different channels of axis {axis}")
        return list(map(int, rows[:, 0]))

    def error(self, why: str) -> ModelError:
        """Say that the encodings of this tensor cannot be sliced."""
        return _error(f"{self.name} of shape {list(self.shape)}", why)


def _error(what: str, why: str) -> ModelError:
    return ModelError(
        f"the encodings of {what} cannot be sliced: {why}; leave the tensor alone (--ignore), or make its encodings anew "
        "from the pruned model"
    )


def slice_entry(entry: Any, tensor: Tensor) -> Any:
    """Slice the encodings of a tensor as the tensor was.

    Raises
    ------
    ModelError
        It cannot be told which entries stay, or blocks would be torn.
    """
    if _is_single(entry) or tensor.whole:
        return entry
    if isinstance(entry, list):
        return [entry[index] for index in tensor.kept(_axis_of(tensor, len(entry)))]
    if not isinstance(entry, Mapping):
        raise tensor.error("they have an unknown form")
    return _flat(entry, tensor) if "enc_type" in entry else _nested(entry, tensor)


def _is_single(entry: Any) -> bool:
    """Whether an encoding is of a tensor as a whole, so that it says nothing of channels."""
    if isinstance(entry, list):
        return len(entry) <= 1
    if not isinstance(entry, Mapping):
        return False
    vectors = [entry[key] for key in (*FLAT, *NESTED) if isinstance(entry.get(key), list | Mapping)]
    return all(
        isinstance(vector, list) and len(vector) <= 1 and not any(isinstance(one, list) for one in vector)
        for vector in vectors
    )


def _axis_of(tensor: Tensor, count: int) -> int:
    """The axis that so many encodings are of: that of output channels where its length fits, else the only one."""
    shape = tensor.shape
    if tensor.groups > 1:
        return _axis_in_groups(tensor, count)
    if tensor.channels and shape[tensor.channels[0]] == count:
        return tensor.channels[0]
    fitting = [axis for axis, size in enumerate(shape) if size == count]
    if len(fitting) != 1:
        raise tensor.error(f"there are {count} of them, and {'several axes are' if fitting else 'no axis is'} as long")
    return fitting[0]


def _axis_in_groups(tensor: Tensor, count: int) -> int:
    """The axis of the weight of a grouped transposed convolution, (inputs, outputs of a group, ...): never a guess."""
    inputs, each = tensor.shape[:2]
    if count == inputs == tensor.groups and each == 1:
        return 0  # depthwise: an input is an output
    meant = [axis for axis, size in enumerate((inputs, each, each * tensor.groups)) if size == count]
    if len(meant) != 1 or meant[0] > 1:
        raise tensor.error(
            f"there are {count} of them for {tensor.groups} groups, and of which channels cannot be told"
        )
    return meant[0]


def _flat(entry: Mapping[str, Any], tensor: Tensor) -> dict[str, Any]:
    """Version 1.0.0: vectors over output channels, and for blocks over (output channel, block of input channels)."""
    kind, vectors = entry["enc_type"], {key: entry[key] for key in FLAT if isinstance(entry.get(key), list)}
    count = len(vectors.get("scale", ()))
    if kind == "PER_CHANNEL":
        kept = tensor.kept(_axis_of(tensor, count))
        return {**entry, **{key: _pick(vector, count, kept, tensor, key) for key, vector in vectors.items()}}
    if kind not in ("PER_BLOCK", "LPBQ") or tensor.channels is None or tensor.groups > 1:
        raise tensor.error(f"enc_type {kind} of it is not understood")
    (out, into), size = tensor.channels, _block_size(entry, tensor)
    n_blocks = _n_blocks(tensor, into, size)
    channels, blocks = tensor.kept(out), _whole_blocks(tensor, into, size)
    grid = [channel * n_blocks + block for channel in channels for block in blocks]
    done = {}
    for key, vector in vectors.items():
        per_channel = len(vector) == tensor.shape[out] and key != "per_block_int_scale" and n_blocks > 1
        count = tensor.shape[out] * (1 if per_channel else n_blocks)
        done[key] = _pick(vector, count, channels if per_channel else grid, tensor, key)
    return {**entry, **done}


def _pick(vector: Sequence[Any], count: int, kept: Sequence[int], tensor: Tensor, key: str) -> list[Any]:
    if len(vector) != count:
        raise tensor.error(f"{key} has {len(vector)} entries, {count} were expected")
    if any(isinstance(one, list) for one in vector):
        raise tensor.error(f"{key} holds lists, numbers were expected")
    return [vector[index] for index in kept]


def _nested(entry: Mapping[str, Any], tensor: Tensor) -> dict[str, Any]:
    """Version 2.0.0: a vector along ``axis``, or lists as deep as the tensor, which ``axis`` cuts into blocks."""
    rank, axis, blocked = len(tensor.shape), entry.get("axis"), "block_size" in entry
    if not isinstance(axis, int) or isinstance(axis, bool) or not -rank <= axis < rank:
        raise tensor.error("they do not say of which axis they are")
    axis %= rank
    done = {}
    for key in NESTED:
        value = entry.get(key)
        if isinstance(value, Mapping):
            raise tensor.error(f"{key} is itself quantized, which is not supported")
        if not isinstance(value, list):
            continue
        if not blocked:
            done[key] = _pick(value, tensor.shape[axis], tensor.kept(axis), tensor, key)
            continue
        lengths, kept = _lengths(value, key, tensor), value
        if len(lengths) != rank:
            raise tensor.error(f"{key} has {len(lengths)} axes, the tensor {rank}")
        size = _block_size(entry, tensor)
        for place, length in enumerate(lengths):
            whole = _n_blocks(tensor, axis, size) if place == axis else tensor.shape[place]
            if length not in (1, whole):
                raise tensor.error(f"{key} has {length} entries along axis {place}, {whole} were expected")
            if length > 1:
                kept = _take(kept, place, _whole_blocks(tensor, axis, size) if place == axis else tensor.kept(place))
        done[key] = kept
    return {**entry, **done}


def _lengths(nested: Any, key: str, tensor: Tensor) -> tuple[int, ...]:
    """Shape of nested lists, however deep."""
    lengths, level = list[int](), [nested]
    while any(isinstance(one, list) for one in level):
        found = {len(one) if isinstance(one, list) else None for one in level}
        if len(found) > 1:
            raise tensor.error(f"the lists of {key} differ in length")
        lengths.append(len(level[0]))
        level = [inner for one in level for inner in one]
    return tuple(lengths)


def _take(nested: list[Any], axis: int, indices: Sequence[int]) -> list[Any]:
    if axis:
        return [_take(inner, axis - 1, indices) for inner in nested]
    return [nested[index] for index in indices]


def _block_size(entry: Mapping[str, Any], tensor: Tensor) -> int:
    size = entry.get("block_size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise tensor.error(f"block_size {size} is no length")
    return size


def _n_blocks(tensor: Tensor, axis: int, size: int) -> int:
    if tensor.shape[axis] % size:
        raise tensor.error(f"blocks of {size} do not divide its axis {axis}")
    return tensor.shape[axis] // size


def _whole_blocks(tensor: Tensor, axis: int, size: int) -> list[int]:
    """Blocks of an axis that stay; none may be torn, nor members of two meet in one."""
    kept = tensor.kept(axis)
    blocks = sorted({index // size for index in kept})
    if kept != [block * size + index for block in blocks for index in range(size)]:
        raise tensor.error(f"the plan keeps parts of blocks of {size} along axis {axis}")
    return blocks
