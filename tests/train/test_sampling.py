"""Resizing, sampling and Fourier transforms: value as onnxruntime computes it, slope as differences say."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch.nn import functional

from agreement import Case, agrees, integers, normal, slopes
from onnxprune.errors import ModelError
from onnxprune.train import OnnxModule

X, ROW, VOLUME = normal(2, 3, 6, 8), normal(2, 3, 7), normal(1, 2, 4, 5, 6)
UP, DOWN = np.array([1, 1, 2, 2.5], np.float32), np.array([1, 1, 0.6, 0.45], np.float32)
LAST = np.ascontiguousarray(X.transpose(0, 2, 3, 1))
TRANSFORMS = "half_pixel pytorch_half_pixel align_corners asymmetric half_pixel_symmetric".split()
ROUNDINGS = "round_prefer_floor round_prefer_ceil floor ceil".split()


def resized(scales: np.ndarray | None = None, sizes: tuple[int, ...] = (), x: np.ndarray = X, **attributes) -> Case:
    """A Resize to scales or sizes."""
    arrays = [x, None, scales] if scales is not None else [x, None, None, integers(*sizes)]
    names = {"transform": "coordinate_transformation_mode", "rounding": "nearest_mode"}
    return Case("Resize", arrays, {names.get(k, k): v for k, v in attributes.items()}, 19)


CASES = {
    **{
        f"{mode}_{transform}_{title}": resized(scales, mode=mode, transform=transform)
        for mode, transform, (title, scales) in product(
            ("nearest", "linear", "cubic"), TRANSFORMS, (("up", UP), ("down", DOWN))
        )
    },
    **{
        f"nearest_{rounding}_{transform}": resized(UP, mode="nearest", rounding=rounding, transform=transform)
        for rounding, transform in product(ROUNDINGS, TRANSFORMS)
    },
    **{f"{mode}_sizes": resized(sizes=(2, 3, 9, 5), mode=mode) for mode in ("nearest", "linear", "cubic")},
    "nearest_twice": resized(np.array([1, 1, 2, 2], np.float32), transform="asymmetric", rounding="floor"),
    "linear_twice": resized(np.array([1, 1, 2, 2], np.float32), mode="linear"),
    "linear_one_axis": resized(np.array([1, 1, 1, 2], np.float32), mode="linear"),
    "linear_to_one": resized(sizes=(2, 3, 1, 1), mode="linear", transform="pytorch_half_pixel"),
    "linear_aspect_larger": resized(sizes=(9, 20), axes=[2, 3], mode="linear", keep_aspect_ratio_policy="not_larger"),
    "nearest_aspect_smaller": resized(sizes=(9, 20), axes=[2, 3], keep_aspect_ratio_policy="not_smaller"),
    "cubic_coefficient": resized(UP, mode="cubic", cubic_coeff_a=-0.5),
    "cubic_exclude": resized(UP, mode="cubic", exclude_outside=1),
    "linear_antialias": resized(DOWN, mode="linear", antialias=1),
    "cubic_antialias": resized(DOWN, mode="cubic", antialias=1),
    "linear_rows": resized(np.array([1, 1, 2], np.float32), x=ROW, mode="linear"),
    "linear_volume": resized(np.array([1, 1, 2, 2, 2], np.float32), x=VOLUME, mode="linear"),
    "nearest_volume": resized(np.array([1, 1, 2, 1, 2], np.float32), x=VOLUME),
    "linear_last": Case("Resize", [LAST, None, np.array([1, 2, 2, 1], np.float32)], {"mode": "linear"}, 19),
    "crop": Case(
        "Resize",
        [X, np.array([0, 0, 0.2, -0.3, 1, 1, 0.7, 1.2], np.float32), None, integers(2, 3, 5, 7)],
        {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 0.5},
        19,
    ),
    "opset11": Case(
        "Resize", [X, np.zeros(0, np.float32), UP], {"coordinate_transformation_mode": "tf_half_pixel_for_nn"}, 11
    ),
    "opset10": Case("Resize", [X, UP], {"mode": "linear"}, 10),
    "opset10_nearest": Case("Resize", [X, DOWN], {"mode": "nearest"}, 10),
    "upsample": Case("Upsample", [X, UP], {"mode": "linear"}, 9),
    "upsample_nearest": Case("Upsample", [X, UP], {}, 9),
    "upsample_opset7": Case("Upsample", [X], {"scales": [1.0, 1.0, 2.0, 3.0]}, 8),
    **{
        f"grid_{mode}_{padding}_{corners}": Case(
            "GridSample",
            [X, np.tanh(normal(2, 4, 5, 2)) * np.float32(1.2)],
            {"mode": mode, "padding_mode": padding, "align_corners": corners},
            20,
        )
        for mode, padding, corners in product(("linear", "nearest", "cubic"), ("zeros", "border", "reflection"), (0, 1))
    },
    "grid_opset16": Case("GridSample", [X, np.tanh(normal(2, 4, 5, 2))], {"mode": "bilinear"}, 16),
    "affine_grid": Case("AffineGrid", [normal(2, 2, 3), integers(2, 3, 4, 5)], {"align_corners": 1}, 20),
    "fourier": Case("DFT", [normal(2, 6, 3, 1), None, np.array(1)], {}, 20),
    "fourier_onesided": Case("DFT", [normal(2, 6, 1), np.array(8)], {"onesided": 1, "axis": 1}, 17),
    "fourier_inverse": Case("DFT", [normal(2, 6, 2)], {"inverse": 1, "axis": 1}, 17),
}  # fmt: skip
SMOOTH = {name: case for name, case in CASES.items() if not name.startswith("grid") or "linear_zeros" in name}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_agrees(case: Case) -> None:
    """What PyTorch computes is what onnxruntime does."""
    agrees(case, 2e-5)


@pytest.mark.parametrize("case", SMOOTH.values(), ids=SMOOTH)
def test_slope_agrees(case: Case) -> None:
    """Gradients are what differences say."""
    slopes(case)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_gradients_are_those_of_interpolation(mode: str) -> None:
    """Enlarging has the gradient of PyTorch's own interpolation."""
    case = resized(np.array([1, 1, 2, 3], np.float32), mode=mode)
    one, other = (torch.from_numpy(X).requires_grad_() for _ in range(2))
    weight = torch.from_numpy(normal(2, 3, 12, 24))
    (OnnxModule(case.model(), [])(one) * weight).sum().backward()
    (functional.interpolate(other, scale_factor=(2, 3), mode=f"bi{mode}") * weight).sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_unknown_positions_are_refused() -> None:
    """A coordinate transformation that the specification does not have is an error that says which."""
    case = resized(UP, mode="linear", transform="sideways")
    with pytest.raises(ModelError, match="sideways"):
        OnnxModule(case.model(), [])(torch.from_numpy(X))
