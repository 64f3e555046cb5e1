"""Operators that move data: value as onnxruntime computes it, slope as differences say."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from agreement import Case, agrees, integers, normal, slopes

X = normal(2, 4, 6, 5)
FILL = np.array(0.5, np.float32)

CASES = {
    "reshape": Case("Reshape", [X, integers(0, -1, 3)]),
    "reshape_allowzero": Case("Reshape", [normal(0, 4), integers(4, 0)], {"allowzero": 1}, smooth=False),
    "transpose": Case("Transpose", [X], {"perm": [0, 2, 3, 1]}),
    "transpose_default": Case("Transpose", [X]),
    "flatten": Case("Flatten", [X]),
    "flatten_zero": Case("Flatten", [X], {"axis": 0}),
    "flatten_negative": Case("Flatten", [X], {"axis": -1}),
    "squeeze": Case("Squeeze", [normal(1, 3, 1), integers(-1)]),
    "squeeze_all": Case("Squeeze", [normal(1, 3, 1)]),
    "squeeze_opset11": Case("Squeeze", [normal(1, 3, 1)], {"axes": [0]}, opset=11),
    "unsqueeze": Case("Unsqueeze", [normal(3, 4), integers(-1, 0)]),
    "unsqueeze_opset11": Case("Unsqueeze", [normal(3, 4)], {"axes": [2, 0]}, opset=11),
    "concat": Case("Concat", [X, normal(2, 1, 6, 5)], {"axis": 1}),
    "concat_negative": Case("Concat", [X, normal(2, 4, 6, 2)], {"axis": -1}),
    "split": Case("Split", [X, integers(1, 3)], {"axis": 1}, outputs=2),
    "split_equal": Case("Split", [X], {"axis": 1, "num_outputs": 2}, outputs=2),
    "split_uneven": Case("Split", [X], {"axis": 3, "num_outputs": 2}, outputs=2),
    "split_opset11": Case("Split", [X], {"axis": 1, "split": [1, 3]}, opset=11, outputs=2),
    "slice": Case("Slice", [X, integers(1, -3), integers(9, -1), integers(1, 2)]),
    "slice_steps": Case("Slice", [X, integers(0, -1), integers(4, -9), integers(1, -2), integers(2, -1)]),
    "slice_no_axes": Case("Slice", [X, integers(0, 1), integers(1, 3)]),
    "slice_empty": Case("Slice", [X, integers(3), integers(1), integers(1)], smooth=False),
    "slice_opset9": Case("Slice", [X], {"starts": [1, 0], "ends": [3, -1], "axes": [1, 3]}, opset=9),
    "pad": Case("Pad", [X, integers(0, 0, 1, 2, 0, 1, 0, 3)]),
    "pad_value": Case("Pad", [X, integers(0, 0, 1, 2, 0, 1, 0, 3), FILL], smooth=False),
    "pad_negative": Case("Pad", [X, integers(0, 0, -1, 2, 0, 0, 1, -1)]),
    "pad_axes": Case("Pad", [X, integers(1, 2, 0, 1), None, integers(2, -1)]),
    "pad_reflect": Case("Pad", [X, integers(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": "reflect"}),
    "pad_edge": Case("Pad", [X, integers(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": "edge"}),
    "pad_wrap": Case("Pad", [X, integers(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": "wrap"}),
    "pad_opset2": Case("Pad", [X], {"pads": [0, 0, 1, 2, 0, 1, 0, 3], "value": 0.5}, opset=10),
    "shape": Case("Shape", [X], smooth=False),
    "shape_range": Case("Shape", [X], {"start": 1, "end": -1}, smooth=False),
    "size": Case("Size", [X], smooth=False),
    "constant_of_shape": Case("ConstantOfShape", [integers(2, 3)], smooth=False),
    "expand": Case("Expand", [normal(3, 1), integers(2, 1, 4)]),
    "gather": Case("Gather", [X, np.array([[0, -1], [2, 0]])], {"axis": 2}),
    "gather_scalar": Case("Gather", [X, np.array(1)], {"axis": 1}),
    "depth_to_space": Case("DepthToSpace", [X], {"blocksize": 2}),
    "depth_to_space_crd": Case("DepthToSpace", [X], {"blocksize": 2, "mode": "CRD"}),
    "space_to_depth": Case("SpaceToDepth", [X[..., :4]], {"blocksize": 2}),
    "center_crop_pad": Case("CenterCropPad", [X, integers(3, 8)], {"axes": [2, 3]}),
    "center_crop_pad_odd": Case("CenterCropPad", [X, integers(9, 2)], {"axes": [2, 3]}),
    "col2im": Case("Col2Im", [normal(1, 8, 4), integers(5, 3), integers(2, 2)], {"pads": [0, 0, 0, 0], "strides": [2, 1]}),
    "col2im_pads": Case("Col2Im", [normal(1, 8, 16), integers(4, 3), integers(2, 2)], {"pads": [0, 1, 1, 1]}),
}  # fmt: skip
SMOOTH = {name: case for name, case in CASES.items() if case.smooth}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_agrees(case: Case) -> None:
    """What PyTorch computes is what onnxruntime does."""
    agrees(case)


@pytest.mark.parametrize("case", SMOOTH.values(), ids=SMOOTH)
def test_slope_agrees(case: Case) -> None:
    """Gradients are what differences say."""
    slopes(case)
