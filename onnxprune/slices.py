"""Slices of a tensor: which indices stay on which axis."""

from __future__ import annotations

import numpy as np

from onnxprune.errors import ModelError

Slices = dict[int, list]
"""Kept indices by axis: a list, or a list of lists where every block of axis 0 keeps others (grouped convolutions)."""


def take(array: np.ndarray, slices: Slices, name: str) -> np.ndarray:
    """Keep the given indices on every axis of ``slices``; ``name`` is for the error where they do not fit."""
    sliced_shape(array.shape, slices, name)
    for axis, kept in sorted(slices.items(), reverse=True):  # axis 0, which other axes may count blocks of, last
        rows = _rows(kept)
        blocks = np.split(array, len(rows)) if len(rows) > 1 else [array]
        array = (
            np.concatenate([b.take(row, axis) for b, row in zip(blocks, rows, strict=True)])
            if len(rows) > 1
            else (array.take(rows[0], axis))
        )
    return array


def sliced_shape(shape: tuple[int, ...], slices: Slices, name: str) -> tuple[int, ...]:
    """Shape of what :func:`take` returns.

    Raises
    ------
    ModelError
        An axis or an index does not exist, or blocks keep unequal numbers.
    """
    after = list(shape)
    for axis, kept in slices.items():
        rows = _rows(kept)
        fits = 0 <= axis < len(shape) and shape[0] % len(rows) == 0 and (axis or len(rows) == 1)
        if not fits or max(max(row, default=-1) for row in rows) >= shape[axis] or len({len(row) for row in rows}) > 1:
            raise ModelError(f"the plan does not fit {name} of shape {list(shape)}")
        after[axis] = len(rows[0])
    return tuple(after)


def _rows(kept: list) -> list[list[int]]:
    return kept if kept and isinstance(kept[0], list) else [kept]
