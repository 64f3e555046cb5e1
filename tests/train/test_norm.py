"""Normalisations and softmax: value as onnxruntime computes it, slope as differences say."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from agreement import Case, agrees, normal, positive, slopes
from onnxprune.train import OnnxModule

X, SEQUENCE = normal(2, 6, 5, 4), normal(2, 5, 8)
S, B = positive(6), normal(6)

CASES = {
    "batch": Case("BatchNormalization", [X, S, B, normal(6), positive(6)]),
    "batch_epsilon": Case("BatchNormalization", [X, S, B, normal(6), positive(6)], {"epsilon": 0.1}, opset=9),
    "batch_vectors": Case("BatchNormalization", [normal(3, 6), S, B, normal(6), positive(6)]),
    "batch_training": Case(
        "BatchNormalization", [X, S, B, normal(6), positive(6)], {"training_mode": 1}, outputs=3, opset=15
    ),
    "instance": Case("InstanceNormalization", [X, S, B]),
    "instance_epsilon": Case("InstanceNormalization", [normal(2, 6, 7), S, B], {"epsilon": 0.1}),
    "layer": Case("LayerNormalization", [SEQUENCE, positive(8), normal(8)]),
    "layer_axis": Case("LayerNormalization", [SEQUENCE, positive(5, 8), normal(5, 8)], {"axis": 1, "epsilon": 0.1}),
    "layer_no_bias": Case("LayerNormalization", [SEQUENCE, positive(8)]),
    "layer_statistics": Case("LayerNormalization", [SEQUENCE, positive(8), normal(8)], outputs=3, smooth=False),
    "group": Case("GroupNormalization", [X, S, B], {"num_groups": 3}),
    "group_opset18": Case("GroupNormalization", [X, positive(3), normal(3)], {"num_groups": 3}, opset=18),
    "rms": Case("RMSNormalization", [SEQUENCE, positive(8)], opset=23),
    "rms_axis": Case("RMSNormalization", [SEQUENCE, positive(5, 8)], {"axis": 1, "epsilon": 0.1}, opset=23),
    "simplified": Case("SimplifiedLayerNormalization", [SEQUENCE, positive(8)], {"axis": -1}),
    "lp": Case("LpNormalization", [SEQUENCE]),
    "lp_1": Case("LpNormalization", [SEQUENCE], {"axis": 1, "p": 1}),
    "lp_zero": Case("LpNormalization", [0 * SEQUENCE], smooth=False),
    "lrn": Case("LRN", [X], {"size": 3, "alpha": 0.5, "beta": 0.6, "bias": 2.0}),
    "mean_variance": Case("MeanVarianceNormalization", [X]),
    "mean_variance_axes": Case("MeanVarianceNormalization", [X], {"axes": [2, 3]}),
    "softmax": Case("Softmax", [X]),
    "softmax_axis": Case("Softmax", [X], {"axis": 1}),
    "softmax_opset11": Case("Softmax", [X], {"axis": 2}, opset=11),
    "log_softmax": Case("LogSoftmax", [X], {"axis": -2}),
    "log_softmax_opset11": Case("LogSoftmax", [X], opset=11),
    "hardmax": Case("Hardmax", [X], {"axis": 1}, smooth=False),
    "hardmax_opset11": Case("Hardmax", [X], {"axis": 1}, opset=11, smooth=False),
}
SMOOTH = {name: case for name, case in CASES.items() if case.smooth}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_agrees(case: Case) -> None:
    """What PyTorch computes is what onnxruntime does."""
    agrees(case)


@pytest.mark.parametrize("case", SMOOTH.values(), ids=SMOOTH)
def test_slope_agrees(case: Case) -> None:
    """Gradients for input, scale and bias are what differences say."""
    slopes(case)


def test_statistics_stay_while_training() -> None:
    """In training mode a batch is still normalised by the graph's statistics, and they do not move."""
    case = CASES["batch"]
    module = OnnxModule(case.model(), ["in1", "in2"])
    x = torch.from_numpy(X)
    trained, evaluated = module.train()(x), module.eval()(x)
    assert torch.equal(trained, evaluated)
    assert list(module.state_dict()) == ["in1", "in2"]


def test_one_element_is_normalised_to_the_bias() -> None:
    """Where a channel has one element, which PyTorch's function refuses, the result is the bias."""
    agrees(Case("InstanceNormalization", [normal(2, 6, 1, 1), S, B]), tolerance=1e-4)


def test_even_window_reaches_further_behind() -> None:
    """Among an even number of channels one more comes after than before; onnxruntime has odd ones only."""
    case = Case("LRN", [X], {"size": 4, "alpha": 0.5})
    totals = np.stack([np.square(X[:, max(0, c - 1) : c + 3]).sum(1) for c in range(6)], 1)
    given = OnnxModule(case.model(), [])(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(given, X / (1 + 0.5 / 4 * totals) ** 0.75, rtol=1e-5)
    slopes(case)
