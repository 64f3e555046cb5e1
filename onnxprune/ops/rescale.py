"""Normalisations whose scale and offset per channel can be fitted to an output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from onnxprune.model import Model, Node


@dataclass(frozen=True, slots=True, eq=False)
class Rescale:
    """A normalisation ends with ``scale * value + offset`` per channel.

    Attributes
    ----------
    parameters
        Inputs that hold the channels' parameters.
    channel
        Axis of the output that they lie along.
    has_offset
        Whether there is an offset to change.
    refit
        ``refit(parameters, a, b)``: new parameters so that the output becomes ``a * output + b``; None where that cannot be.
    """

    parameters: tuple[int, ...]
    channel: int
    has_offset: bool
    refit: Callable[[Sequence[np.ndarray], np.ndarray, np.ndarray], list[np.ndarray] | None]

    def rows(self, y: np.ndarray, picked: np.ndarray) -> np.ndarray:
        """Values of every channel at positions, float32 of shape ``(channels, n, 1)``."""
        moved = np.moveaxis(y, self.channel, -1).reshape(-1, y.shape[self.channel])
        return np.ascontiguousarray(moved[picked].T, np.float32)[:, :, None]

    def positions(self, shape: tuple[int, ...]) -> int:
        """Positions of an output besides its channels, samples slowest."""
        return prod(size for axis, size in enumerate(shape) if axis != self.channel % len(shape))


def rescale(node: Node, model: Model) -> Rescale | None:
    """View a node as a scale and an offset per channel; None where it is not."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op == "BatchNormalization" and not node.attributes.get("training_mode", 0):
        epsilon = float(node.attributes.get("epsilon", 1e-5))
        return Rescale((1, 2, 3, 4), 1, True, lambda old, a, b: _statistics(old, a, b, epsilon))
    if node.op in ("InstanceNormalization", "GroupNormalization"):
        return Rescale((1, 2), 1, True, _affine) if _fits(node, model, 1) else None
    if node.op in ("LayerNormalization", "RMSNormalization"):
        given = tuple(index for index in (1, 2) if node.has(index))
        return Rescale(given, -1, len(given) == 2, _affine) if _fits(node, model, -1) else None
    return None


def _fits(node: Node, model: Model, channel: int) -> bool:
    """Whether the scale has one number for each channel."""
    scale, shape = model.constant(node.inputs[1]), model.shapes.get(node.key)
    return scale is not None and shape is not None and scale.shape == (shape[channel],)


def _affine(old: Sequence[np.ndarray], a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    return [a * old[0], *(a * offset + b for offset in old[1:])]


def _statistics(old: Sequence[np.ndarray], a: np.ndarray, b: np.ndarray, epsilon: float) -> list[np.ndarray] | None:
    """Scale and offset of a BatchNormalization stay: its mean and variance are re-estimated.

    ``a (s (x - m) / sqrt(v + eps) + o) + b = s (x - m') / sqrt(v' + eps) + o``.
    """
    scale, offset, mean, variance = old
    can = (a > 1e-3) & (np.abs(scale) > 1e-12)
    a, b = np.where(can, a, 1.0), np.where(can, b, 0.0)
    new_variance = (variance + epsilon) / a**2 - epsilon
    new_variance = np.where(new_variance > 0, new_variance, variance)
    factor, old_factor = (scale / np.sqrt(v + epsilon) for v in (new_variance, variance))
    wanted = a * (offset - old_factor * mean) + b
    new_mean = np.where(can, (offset - wanted) / np.where(can, factor, 1.0), mean)
    return [scale, offset, new_mean, new_variance]
