"""Measures of quality: pure functions of a prediction and what was wanted.

Every function takes two arrays whose first axis holds samples (pictures as ``(samples, channels, height, width)``) and
returns one value per sample.
"""

from __future__ import annotations

import numpy as np

from onnxprune.errors import UsageError

MAX_DB = 100.0
_WINDOW, _SIGMA = 11, 1.5  # Wang et al. 2004
_K1, _K2 = 0.01, 0.03


def _pair(prediction: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 of one shape; axes of length 1 may differ, since they do not move values."""
    one, other = ([n for n in array.shape[1:] if n != 1] for array in (prediction, wanted))
    if len(prediction) != len(wanted) or one != other:
        raise UsageError(
            f"one prediction has shape {prediction.shape[1:]}, its target {wanted.shape[1:]}; "
            "targets must be shaped like the model's first output"
        )
    return prediction.astype(np.float64), wanted.astype(np.float64).reshape(prediction.shape)


def mse(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Mean squared error of each sample."""
    one, other = _pair(prediction, target)
    with np.errstate(invalid="ignore"):  # infinity minus infinity: no number, and no quality
        return np.square(one - other).reshape(len(one), -1).mean(1)


def decibels(errors: np.ndarray, peak: float) -> np.ndarray:
    """Peak signal-to-noise ratio of mean squared errors in dB, 10 log10(peak^2 / MSE).

    At most 100 dB, which identical pictures have; beyond that float32 says nothing.
    """
    with np.errstate(divide="ignore"):
        return np.minimum(10 * np.log10(peak * peak / errors), MAX_DB)


def psnr(prediction: np.ndarray, target: np.ndarray, *, peak: float = 1.0) -> np.ndarray:
    """Peak signal-to-noise ratio of each sample in dB, of its own error; at most 100 dB."""
    return decibels(mse(prediction, target), peak)


def cosine(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Cosine of the angle between each sample and its target, both as vectors; 1 where both are 0, 0 where one is."""
    one, other = (array.reshape(len(array), -1) for array in _pair(prediction, target))
    lengths = np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1)
    product = lengths[0] * lengths[1]
    both_zero = (lengths[0] == 0) & (lengths[1] == 0)
    value = np.einsum("ij,ij->i", one, other) / np.where(product > 0, product, 1)
    return np.where(both_zero, 1.0, value)


def top1(scores: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Percentage of each sample's positions whose highest score, on axis 1, is that of the labelled class.

    Parameters
    ----------
    scores
        ``(samples, classes)``, or ``(samples, classes, height, width)`` for a class per pixel.
    label
        Class numbers from 0, of the shape of ``scores`` without axis 1.
    """
    if scores.ndim < 2 or len(label) != len(scores) or label.size * scores.shape[1] != scores.size:
        raise UsageError(
            f"top1 takes scores of shape (samples, classes) and one label each; found scores of shape {scores.shape}, "
            f"labels of shape {label.shape}"
        )
    if label.size and not 0 <= label.min() <= label.max() < scores.shape[1]:
        raise UsageError(
            f"labels reach from {label.min()} to {label.max()}, the model knows the classes 0 to {scores.shape[1] - 1}"
        )
    hits = scores.argmax(1).reshape(len(scores), -1) == label.reshape(len(scores), -1)
    return 100.0 * hits.mean(1)


def agreement(scores: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Percentage of each sample's positions where two models have their highest score, on axis 1, in the same class."""
    if scores.ndim < 2 or scores.shape != wanted.shape:
        raise UsageError(
            f"agreement takes scores of shape (samples, classes) of two models; found {scores.shape}, {wanted.shape}"
        )
    return 100.0 * (scores.argmax(1) == wanted.argmax(1)).reshape(len(scores), -1).mean(1)


def _smooth(picture: np.ndarray) -> np.ndarray:
    """Weigh the last two axes by the Gaussian window, only where all of it lies inside the picture."""
    weights = np.exp(-0.5 * np.square(np.arange(_WINDOW) - _WINDOW // 2) / _SIGMA**2)
    weights /= weights.sum()
    for axis in (-1, -2):
        moved = np.moveaxis(picture, axis, -1)
        n = moved.shape[-1] - _WINDOW + 1
        picture = np.moveaxis(sum(w * moved[..., k : k + n] for k, w in enumerate(weights)), -1, axis)
    return picture


def ssim(prediction: np.ndarray, target: np.ndarray, *, peak: float = 1.0) -> np.ndarray:
    """Structural similarity of each sample, the mean over its channels.

    Wang, Bovik, Sheikh, Simoncelli 2004: Gaussian window of 11x11 with sigma 1.5, K1 = 0.01, K2 = 0.03, evaluated where
    the window lies inside the picture. The last two axes are height and width.
    """
    x, y = _pair(prediction, target)
    if x.ndim < 3 or min(x.shape[-2:]) < _WINDOW:
        raise UsageError(
            f"ssim needs pictures of shape (channels, height, width), {_WINDOW} pixels or more each way; "
            f"found {x.shape[1:]}"
        )
    mean_x, mean_y = _smooth(x), _smooth(y)
    variance_x = _smooth(x * x) - mean_x**2
    variance_y = _smooth(y * y) - mean_y**2
    covariance = _smooth(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * peak) ** 2, (_K2 * peak) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return (above / below).reshape(len(x), -1).mean(1)
