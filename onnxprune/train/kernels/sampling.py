"""Resizing and sampling at computed positions.

Resizing goes axis by axis: every output position is a weighted sum of a few input positions. Where PyTorch's own
interpolation computes the same, it does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from onnxprune.errors import ModelError
from onnxprune.train.kernels import Call, computes


@dataclass(frozen=True, slots=True)
class _Axis:
    """How one axis is resized: lengths, scale, and the attributes that matter."""

    size: int
    wanted: int
    scale: float
    transform: str
    mode: str
    nearest: str
    cubic: float
    exclude: bool
    antialias: bool
    roi: tuple[float, float]


@computes("Resize", host=(1, 2, 3))
def resize(
    call: Call, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    """Opset 10 takes scales as input 1, and reads at asymmetric positions."""
    if call.opset < 11:
        return _old(call, x, roi.tolist() if roi is not None else call.get("scales"))
    mode, transform = call.get("mode", "nearest"), call.get("coordinate_transformation_mode", "half_pixel")
    axes = [axis % x.ndim for axis in call.get("axes", range(x.ndim))]
    factors, lengths = _targets(call, x, axes, scales, sizes)
    crop = transform == "tf_crop_and_resize"
    corners = roi.tolist() if crop and roi is not None else [0.0] * len(axes) + [1.0] * len(axes)
    plans = {
        axis: _Axis(
            x.shape[axis], lengths[k], factors[k], transform, mode, call.get("nearest_mode", "round_prefer_floor"),
            call.get("cubic_coeff_a", -0.75), bool(call.get("exclude_outside", 0)), bool(call.get("antialias", 0)),
            (corners[k], corners[k + len(axes)]),
        )
        for k, axis in enumerate(axes)
        if lengths[k] != x.shape[axis] or factors[k] != 1 or crop
    }  # fmt: skip
    return _resized(x, plans, call.get("extrapolation_value", 0.0))


def _targets(
    call: Call, x: Tensor, axes: Sequence[int], scales: Tensor | None, sizes: Tensor | None
) -> tuple[list[float], list[int]]:
    """Scale and length of every resized axis."""
    if sizes is None or not sizes.numel():
        if scales is None or not scales.numel():
            raise ModelError(f"{call.title}: neither scales nor sizes")
        factors = [float(f) for f in scales.tolist()]
        return factors, [
            int(np.floor(np.float32(x.shape[a]) * np.float32(f))) for a, f in zip(axes, factors, strict=True)
        ]
    lengths = [int(n) for n in sizes.tolist()]
    factors = [n / x.shape[axis] for axis, n in zip(axes, lengths, strict=True)]
    policy = call.get("keep_aspect_ratio_policy", "stretch")
    if policy != "stretch":
        one = min(factors) if policy == "not_larger" else max(factors)
        factors, lengths = [one] * len(axes), [int(np.floor(one * x.shape[axis] + 0.5)) for axis in axes]
    return factors, lengths


@computes("Upsample", host=(1,))
def upsample(call: Call, x: Tensor, scales: Tensor | None = None) -> Tensor:
    """Reads at asymmetric positions; scales are an attribute up to opset 8."""
    return _old(call, x, call.get("scales") if scales is None else scales.tolist())


def _old(call: Call, x: Tensor, scales: Sequence[float]) -> Tensor:
    plans = {
        axis: _Axis(
            x.shape[axis], int(np.floor(x.shape[axis] * scale)), scale, "asymmetric", call.get("mode", "nearest"),
            "floor" if scale >= 1 else "ceil", -0.75, False, False, (0.0, 1.0),
        )
        for axis, scale in enumerate(scales)
        if scale != 1
    }  # fmt: skip
    return _resized(x, plans, 0.0)


def _resized(x: Tensor, plans: dict[int, _Axis], outside: float) -> Tensor:
    if (direct := _by_torch(x, plans)) is not None:
        return direct
    kind = x.dtype
    for axis, plan in plans.items():
        places, beyond = _positions(plan)
        if plan.mode == "nearest":
            x = x.index_select(axis, torch.from_numpy(_nearest(places, plan)).to(x.device))
        else:
            matrix = torch.from_numpy(_matrix(plan)).to(
                x.device, torch.float32 if not x.is_floating_point() else x.dtype
            )
            x = (x.to(matrix.dtype).movedim(axis, -1) @ matrix.T).movedim(-1, axis)
        if plan.transform == "tf_crop_and_resize" and beyond.any():
            mask = torch.from_numpy(beyond).to(x.device).view(-1, *[1] * (x.ndim - 1 - axis))
            x = torch.where(mask, torch.full_like(x, outside), x)
    return x.to(kind)


def _by_torch(x: Tensor, plans: dict[int, _Axis]) -> Tensor | None:
    """PyTorch's own interpolation, where all axes are resized alike and in a way that it has."""
    if not plans or min(plans) < 2 or not x.is_floating_point() or not 3 <= x.ndim <= 5:
        return None
    first = next(iter(plans.values()))
    exact = all(plan.wanted == plan.size * plan.scale for plan in plans.values())
    size = [plans[axis].wanted if axis in plans else x.shape[axis] for axis in range(2, x.ndim)]
    if first.mode == "nearest":
        integral = all(float(plan.scale).is_integer() for plan in plans.values())
        by_floor = first.transform == "asymmetric" and first.nearest == "floor"
        return functional.interpolate(x, size, mode="nearest") if by_floor and exact and integral else None
    corners = first.transform == "align_corners"
    centred = first.transform in ("half_pixel", "pytorch_half_pixel") and exact and min(size) > 1
    if first.mode != "linear" or first.antialias or first.exclude or not (corners or centred):
        return None
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[x.ndim]
    return functional.interpolate(x, size, mode=mode, align_corners=corners)


def _positions(plan: _Axis) -> tuple[np.ndarray, np.ndarray]:
    """Where every output position lies among the input's, and whether that is outside."""
    n, size = plan.wanted, plan.size
    x, scale = np.arange(n, dtype=np.float32), np.float32(plan.scale)
    begin, end = plan.roi
    half = (x + np.float32(0.5)) / scale - np.float32(0.5)
    match plan.transform:
        case "half_pixel":
            places = half
        case "pytorch_half_pixel":
            places = half if n > 1 else np.zeros(1, np.float32)
        case "half_pixel_symmetric":
            places = half + np.float32(size / 2 * (1 - n / (plan.scale * size)))
        case "asymmetric":
            places = x / scale
        case "tf_half_pixel_for_nn":
            places = (x + np.float32(0.5)) / scale
        case "align_corners":
            places = x * np.float32(size - 1) / np.float32(n - 1) if n > 1 else np.zeros(1, np.float32)
        case "tf_crop_and_resize":
            step = (end - begin) * (size - 1) / (n - 1) if n > 1 else 0.0
            places = (begin * (size - 1) + x * step if n > 1 else np.full(1, 0.5 * (begin + end) * (size - 1))).astype(
                np.float32
            )
        case _:
            raise ModelError(f"coordinate transformation {plan.transform}")
    return places, (places < 0) | (places > size - 1)


_ROUNDING: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda places: np.ceil(places - np.float32(0.5)),
    "round_prefer_ceil": lambda places: np.floor(places + np.float32(0.5)),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _nearest(places: np.ndarray, plan: _Axis) -> np.ndarray:
    return np.clip(_ROUNDING[plan.nearest](places), 0, plan.size - 1).astype(np.int64)


@lru_cache(maxsize=256)
def _matrix(plan: _Axis) -> np.ndarray:
    """Weights of the input's positions in every output position, of shape ``(wanted, size)``."""
    places, _ = _positions(plan)
    places = places.astype(np.float64)
    if plan.mode == "linear" and not plan.antialias:
        places = np.clip(places, 0, plan.size - 1)
    reach = max(1.0, 1 / plan.scale) if plan.antialias else 1.0
    width = 1 if plan.mode == "linear" else 2
    span = int(np.ceil(width * reach))
    taps = np.floor(places)[:, None].astype(np.int64) + np.arange(1 - span, span + 1)
    distance = np.abs(taps - places[:, None]) / reach
    weights = np.maximum(0, 1 - distance) if width == 1 else _cubic(distance, plan.cubic)
    if plan.exclude:
        weights = np.where((taps < 0) | (taps >= plan.size), 0, weights)
    if plan.exclude or plan.antialias:
        weights /= weights.sum(1, keepdims=True)
    matrix = np.zeros((plan.wanted, plan.size))
    rows = np.broadcast_to(np.arange(plan.wanted)[:, None], taps.shape)
    np.add.at(matrix, (rows, np.clip(taps, 0, plan.size - 1)), weights)
    return matrix


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Cubic convolution (Keys 1981, equation 4)."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


@computes("GridSample")
def grid_sample(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    """Modes have PyTorch's names up to opset 19."""
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(call.get("mode", "bilinear"), call.get("mode", "bilinear"))
    corners = bool(call.get("align_corners", 0))
    return functional.grid_sample(x, grid, mode, call.get("padding_mode", "zeros"), corners)


@computes("AffineGrid", host=(1,))
def affine_grid(call: Call, theta: Tensor, size: Tensor) -> Tensor:
    """Positions of every output element under one affine map per sample."""
    return functional.affine_grid(theta, [int(n) for n in size.tolist()], bool(call.get("align_corners", 0)))
