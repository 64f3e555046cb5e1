"""Pooling: value as onnxruntime computes it, slope as differences say."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from agreement import Case, agrees, normal, slopes

X, SEQUENCE, VOLUME = normal(2, 3, 9, 8), normal(2, 3, 11), normal(1, 2, 5, 6, 5)
SHAPES = {
    "plain": {"kernel_shape": [3, 2]},
    "strided": {"kernel_shape": [3, 2], "strides": [2, 3]},
    "padded": {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    "uneven": {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 1, 2, 0]},
    "same_upper": {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    "same_lower": {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_LOWER"},
    "ceil": {"kernel_shape": [2, 3], "strides": [2, 2], "ceil_mode": 1},
    "ceil_padded": {"kernel_shape": [3, 3], "strides": [2, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1},
    "ceil_behind": {"kernel_shape": [1, 1], "strides": [2, 3], "ceil_mode": 1},
    "dilated": {"kernel_shape": [3, 2], "dilations": [2, 3]},
    "dilated_padded": {"kernel_shape": [3, 2], "dilations": [2, 3], "pads": [1, 1, 1, 1], "strides": [2, 1]},
}
PLACES, HALVES = np.array([[[[5, 7], [13, 15]]]]), {"kernel_shape": [2, 2], "strides": [2, 2]}
BYTES = np.arange(36, dtype=np.uint8).reshape(1, 1, 6, 6)
COUNTED = {"count_include_pad": 1}
CASES = {
    **{f"max_{name}": Case("MaxPool", [X], kind) for name, kind in SHAPES.items()},
    **{f"places_{name}": Case("MaxPool", [X], kind, outputs=2) for name, kind in SHAPES.items()},
    **{f"mean_{name}": Case("AveragePool", [X], kind) for name, kind in SHAPES.items()},
    **{f"mean_counted_{name}": Case("AveragePool", [X], {**kind, **COUNTED}) for name, kind in SHAPES.items()},
    **{f"lp_{name}": Case("LpPool", [X], kind) for name, kind in SHAPES.items() if "ceil" not in name},
    "lp_3": Case("LpPool", [X], {"kernel_shape": [2, 2], "p": 3}),
    "max_columns_first": Case("MaxPool", [X], {"kernel_shape": [2, 2], "storage_order": 1}, outputs=2),
    "max_1d": Case("MaxPool", [SEQUENCE], {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}),
    "max_3d": Case("MaxPool", [VOLUME], {"kernel_shape": [3, 2, 2], "strides": [2, 2, 2]}, outputs=2),
    "max_bytes": Case("MaxPool", [BYTES], {"kernel_shape": [2, 2]}, smooth=False),
    "mean_1d": Case("AveragePool", [SEQUENCE], {"kernel_shape": [3], "strides": [2], "pads": [1, 0]}),
    "mean_3d": Case("AveragePool", [VOLUME], {"kernel_shape": [3, 2, 2], "pads": [1, 0, 0, 1, 0, 1]}),
    "mean_opset7": Case("AveragePool", [X], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, opset=8),
    "global_mean": Case("GlobalAveragePool", [X]),
    "global_max": Case("GlobalMaxPool", [X]),
    "global_lp": Case("GlobalLpPool", [X]),
    "global_lp_3": Case("GlobalLpPool", [VOLUME], {"p": 3}),
    "unpool": Case("MaxUnpool", [normal(1, 1, 2, 2), PLACES], HALVES),
    "unpool_shape": Case("MaxUnpool", [normal(1, 1, 2, 2), PLACES, np.array([1, 1, 5, 5])], HALVES),
}
SMOOTH = {name: case for name, case in CASES.items() if case.smooth}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_agrees(case: Case) -> None:
    """What PyTorch computes is what onnxruntime does, places included."""
    agrees(case)


@pytest.mark.parametrize("case", SMOOTH.values(), ids=SMOOTH)
def test_slope_agrees(case: Case) -> None:
    """Gradients are what differences say."""
    slopes(case)
