"""Closeness: whether a tensor of the pruned graph is what the masked original has there.

Floats agree relative to their spread, since sums over fewer terms round differently. Integers that are sums of products
agree bit for bit. What was rounded to a quantised type may lie one step apart in a few elements: a float just beside the
middle between two steps, rounded differently before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from onnxprune import protos

TOLERANCE = {np.dtype(np.float32): 1e-4, np.dtype(np.float64): 1e-4, np.dtype(np.float16): 3e-2}
"""Largest difference over the spread of a tensor (standard deviation after its per-channel mean is removed)."""

FEW = 16
"""Elements of a tensor below which its spread is taken as at least a tenth of its largest value."""

FLOAT8 = (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ)
NARROW = (*(kind for kind in protos.BITS if kind in protos.INTEGERS), *FLOAT8)
"""Types that onnxruntime computes with, but that cross its border as another type only."""

ROUNDED = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16, *NARROW)
"""Types that floats are quantised to."""

INTEGERS = (*ROUNDED, TensorProto.INT32)
"""Types other than floats whose values are compared; indices and conditions are not."""

STEPPED = 0.01
"""Share of a tensor's elements that may lie one quantisation step apart (one element in any case)."""


@dataclass(frozen=True, slots=True)
class Closeness:
    """What comparing two tensors found.

    Attributes
    ----------
    error
        Largest difference over the spread of a tensor of floats; 0 for integers.
    varies
        Whether agreement means anything: a constant proves nothing.
    wrong
        What is wrong, in words; empty where the tensors agree.
    """

    error: float
    varies: bool
    wrong: str = ""


def closeness(have: np.ndarray, want: np.ndarray, kind: int) -> Closeness:
    """Compare a tensor of ONNX type ``kind`` with what it should be; types of :data:`NARROW` come as float32."""
    if have.shape != want.shape:
        return Closeness(0.0, False, f"shape {list(have.shape)}, expected {list(want.shape)}")
    if want.size == 0:
        return Closeness(0.0, False)
    if kind in INTEGERS:
        return _in_steps(have, want, kind)
    error, spread = relative_error(have.astype(np.float64), want.astype(np.float64))
    fits = error <= TOLERANCE.get(want.dtype, 1e-4)
    return Closeness(float(error), spread > 0, "" if fits else f"differs by {error:.2g} of its spread")


def _in_steps(have: np.ndarray, want: np.ndarray, kind: int) -> Closeness:
    varies = bool((want != want.flat[0]).any())
    places = [_places(value, kind) for value in (have, want)]
    steps = np.abs(places[0] - places[1])
    most, count = int(steps.max()), int((steps > 0).sum())
    allowed = max(1, int(STEPPED * steps.size)) if kind in ROUNDED else 0
    if most > 1 or count > allowed:
        return Closeness(0.0, varies, f"{count} of {steps.size} integers differ, by up to {most}")
    return Closeness(0.0, varies)


def _places(value: np.ndarray, kind: int) -> np.ndarray:
    """Number of each element's value among those of its type."""
    if kind not in FLOAT8:
        return value.astype(np.int64)
    every = np.arange(256, dtype=np.uint8).view(helper.tensor_dtype_to_np_dtype(kind)).astype(np.float32)
    return np.searchsorted(np.unique(every), value)  # NaN stands last


def relative_error(have: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    """Largest difference over the spread of ``want``, and that spread. NaN anywhere gives NaN, which is below nothing.

    Both arrays are used up.
    """
    endless = np.isinf(want)  # attention masks hold -inf: equal where both do, and no measure of spread
    if endless.any():
        if not np.array_equal(have[endless], want[endless]):
            return np.inf, 0.0
        want[endless] = have[endless] = 0
    difference, largest = _largest(np.subtract(have, want, out=have)), _largest(want)
    spread = _spread(want)
    if np.isnan(difference):
        return difference, spread
    if want.size < FEW:  # a few numbers may lie close together by chance
        spread = max(spread, 0.1 * largest)
    if spread <= 1e-6 * largest:  # constant but for rounding: it must agree, and proves nothing
        return (0.0 if difference <= 1e-5 * largest else np.inf), 0.0
    return (difference / spread if spread else 0.0 if difference == 0 else np.inf), spread


def _largest(value: np.ndarray) -> float:
    return float(max(value.max(), -value.min()))


def _spread(value: np.ndarray) -> float:
    """Standard deviation of a tensor after its per-channel (axis 1) mean is removed; the array is used up."""
    if value.size == 1:
        return _largest(value)
    if value.ndim > 2 and value.size > value.shape[1]:
        value -= value.mean(tuple(a for a in range(value.ndim) if a != 1), keepdims=True)
    else:
        value -= value.mean()
    return float(np.sqrt(np.mean(np.square(value, out=value))))  # BLAS would sum by threads
