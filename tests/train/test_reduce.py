"""Reductions: value as onnxruntime computes it, slope as differences say."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from agreement import Case, agrees, integers, positive, slopes

X = positive(3, 4, 5)
OPS = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()
CASES = {
    **{f"{op}_all": Case(f"Reduce{op}", [X], opset=18) for op in OPS},
    **{f"{op}_axes": Case(f"Reduce{op}", [X, integers(-1, 0)], {"keepdims": 0}, opset=18) for op in OPS},
    **{f"{op}_kept": Case(f"Reduce{op}", [X, integers(1)], opset=18) for op in OPS},
    **{f"{op}_attribute": Case(f"Reduce{op}", [X], {"axes": [1, 2], "keepdims": 0}, opset=12) for op in OPS},
    "none": Case("ReduceSum", [X], {"noop_with_empty_axes": 1}, opset=13),
    "empty": Case("ReduceMean", [X, np.zeros(0, np.int64)], opset=18),
    "scalar": Case("ReduceSumSquare", [np.array(3.0, np.float32)], opset=18),
    "integers": Case("ReduceSum", [integers(3, 4, 5)], opset=13, smooth=False),
    "integers_max": Case("ReduceMax", [integers(3, 4, 5)], opset=18, smooth=False),
    "integers_product": Case("ReduceProd", [integers(3, 4, 5)], opset=18, smooth=False),
    "integers_mean": Case("ReduceMean", [integers(3, 4, -9, dtype=np.int32)], opset=18, smooth=False),
}
SMOOTH = {name: case for name, case in CASES.items() if case.smooth}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_agrees(case: Case) -> None:
    """What PyTorch computes is what onnxruntime does."""
    agrees(case)


@pytest.mark.parametrize("case", SMOOTH.values(), ids=SMOOTH)
def test_slope_agrees(case: Case) -> None:
    """Gradients are what differences say."""
    slopes(case)
