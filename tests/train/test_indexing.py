"""Reading and writing at computed places: value as onnxruntime computes it, slope as differences say."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from agreement import Case, agrees, integers, normal, slopes
from onnxprune.errors import ModelError
from onnxprune.train import OnnxModule

X = normal(3, 4, 5)
AXIS = np.array(1)


def table(*rows: list) -> np.ndarray:
    """A matrix of integers."""
    return np.array(rows, np.int64)


CASES = {
    "gather_elements": Case("GatherElements", [normal(3, 4), table([0, -1], [2, 1])], {"axis": 1}),
    "gather_elements_smaller": Case("GatherElements", [X, np.ones((2, 4, 1), np.int64)], {"axis": 2}),
    "gather_nd": Case("GatherND", [X, table([0, -1], [2, 1])]),
    "gather_nd_whole": Case("GatherND", [X, table([0, 1, 2], [2, 3, -1])]),
    "gather_nd_batch": Case("GatherND", [X, table([1], [0], [3])], {"batch_dims": 1}),
    "gather_nd_batch_rows": Case("GatherND", [X, np.array([[[1], [2]], [[0], [0]], [[3], [1]]])], {"batch_dims": 1}),
    "scatter_nd": Case("ScatterND", [X, table([0, 1], [2, -1]), normal(2, 5)]),
    "scatter_nd_elements": Case("ScatterND", [X, table([0, 1, 1], [2, 1, 0]), normal(2)]),
    "scatter_nd_add": Case("ScatterND", [X, table([0], [0]), normal(2, 4, 5)], {"reduction": "add"}),
    "scatter_nd_mul": Case("ScatterND", [X, table([0], [0]), normal(2, 4, 5)], {"reduction": "mul"}),
    "scatter_nd_max": Case("ScatterND", [X, table([0], [0]), normal(2, 4, 5)], {"reduction": "max"}),
    "scatter_nd_min": Case("ScatterND", [X, table([0], [0]), normal(2, 4, 5)], {"reduction": "min"}),
    "scatter": Case("Scatter", [normal(3, 4), table([0, 1]), normal(1, 2)], {"axis": 1}, opset=10),
    "scatter_elements": Case("ScatterElements", [normal(3, 4), table([0, -1]), normal(1, 2)], {"axis": 1}),
    **{
        f"scatter_elements_{mode}": Case(
            "ScatterElements", [normal(3, 4), table([1, 1, 0, 1]), normal(1, 4)], {"reduction": mode}
        )
        for mode in ("add", "mul", "max", "min")
    },
    "tensor_scatter": Case(
        "TensorScatter", [normal(2, 3, 6, 4), normal(2, 3, 2, 4), integers(0, 3)], opset=24, reference=True
    ),
    "tensor_scatter_circular": Case(
        "TensorScatter",
        [normal(2, 3, 6, 4), normal(2, 3, 2, 4), integers(5, 3)],
        {"mode": "circular"},
        opset=24,
        reference=True,
    ),
    "one_hot": Case("OneHot", [table([0, 5], [-1, 2]), np.array(4), np.array([0.5, 2], np.float32)], smooth=False),
    "one_hot_axis": Case(
        "OneHot", [table([0, 5], [-1, 2]), np.array([4]), np.array([0, 1], np.float32)], {"axis": 1}, smooth=False
    ),
    "top_k": Case("TopK", [X, integers(2)], outputs=2),
    "top_k_axis": Case("TopK", [X, integers(2)], {"axis": 1, "largest": 0}, outputs=2),
    "top_k_opset9": Case("TopK", [X], {"k": 2, "axis": 1}, opset=9, outputs=2),
    "arg_max": Case("ArgMax", [X], smooth=False),
    "arg_min": Case("ArgMin", [X], {"axis": -1, "keepdims": 0}, smooth=False),
    "arg_max_first": Case("ArgMax", [np.array([[1, 3, 3]], np.float32)], {"axis": 1}, smooth=False),
    "arg_max_last": Case(
        "ArgMax", [np.array([[1, 3, 3]], np.float32)], {"axis": 1, "select_last_index": 1}, smooth=False
    ),
    "non_zero": Case("NonZero", [np.round(normal(3, 4))], smooth=False),
    "compress": Case("Compress", [X, np.array([True, False, True])], {"axis": 1}),
    "compress_flat": Case("Compress", [X, np.array([True, False, True])]),
    "upper_triangle": Case("Trilu", [X]),
    "lower_triangle": Case("Trilu", [X, np.array(-1)], {"upper": 0}),
    "range": Case("Range", [np.array(1.0, np.float32), np.array(4.5, np.float32), np.array(0.5, np.float32)], smooth=False),
    "range_down": Case("Range", [np.array(5), np.array(-2), np.array(-2)], smooth=False),
    "tile": Case("Tile", [X, integers(1, 2, 3)]),
    "cumulated_sum": Case("CumSum", [X, AXIS]),
    "cumulated_sum_reverse": Case("CumSum", [X, AXIS], {"reverse": 1}),
    "cumulated_sum_exclusive": Case("CumSum", [X, AXIS], {"exclusive": 1, "reverse": 1}),
    "cumulated_product": Case("CumProd", [X, AXIS], {"exclusive": 1}, opset=26, reference=True),
    "reverse_sequence": Case("ReverseSequence", [normal(4, 3, 2), integers(4, 1, 2)]),
    "reverse_sequence_batch_first": Case(
        "ReverseSequence", [normal(3, 4, 2), integers(4, 1, 2)], {"batch_axis": 0, "time_axis": 1}
    ),
    "eye_like": Case("EyeLike", [normal(3, 4)], {"k": 1}, smooth=False),
    "eye_like_type": Case("EyeLike", [normal(3, 4)], {"dtype": 7}, smooth=False),
}  # fmt: skip
SMOOTH = {name: case for name, case in CASES.items() if case.smooth}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_agrees(case: Case) -> None:
    """What PyTorch computes is what onnxruntime does."""
    agrees(case)


@pytest.mark.parametrize("case", SMOOTH.values(), ids=SMOOTH)
def test_slope_agrees(case: Case) -> None:
    """Gradients are what differences say, also where an element is read or written more than once."""
    slopes(case)


def test_unknown_reduction_is_refused() -> None:
    """A way of merging that the specification does not have is an error that names the node."""
    case = Case("ScatterND", [X, table([0]), normal(1, 4, 5)], {"reduction": "median"})
    with pytest.raises(ModelError, match="out0: reduction median"):
        OnnxModule(case.model(), ["in2"])(torch.from_numpy(X))
