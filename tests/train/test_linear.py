"""Convolutions and products: value, slope, and the gradients of PyTorch's own layers."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from agreement import Case, agrees, normal, slopes
from onnxprune.errors import ModelError
from onnxprune.train import OnnxModule

IMAGE, SEQUENCE, VOLUME = normal(2, 4, 9, 8), normal(2, 4, 11), normal(1, 4, 5, 6, 5)
W, B = normal(6, 4, 3, 3), normal(6)
T, TB = normal(4, 6, 3, 3), normal(6)


def conv(*, w: np.ndarray = W, b: np.ndarray | None = B, x: np.ndarray = IMAGE, op: str = "Conv", **attributes) -> Case:
    """A convolution."""
    return Case(op, [x, w] if b is None else [x, w, b], attributes)


def transposed(*, w: np.ndarray = T, b: np.ndarray | None = TB, x: np.ndarray = IMAGE, **attributes) -> Case:
    """A transposed convolution."""
    return conv(w=w, b=b, x=x, op="ConvTranspose", **attributes)


CASES = {
    "conv": conv(),
    "conv_no_bias": conv(b=None),
    "conv_pads": conv(pads=[1, 1, 1, 1]),
    "conv_uneven_pads": conv(pads=[0, 1, 2, 0], strides=[2, 1]),
    "conv_dilated": conv(dilations=[2, 1], pads=[2, 1, 2, 1]),
    "conv_grouped": conv(w=normal(6, 2, 3, 3), group=2),
    "conv_depthwise": conv(w=normal(8, 1, 3, 3), b=normal(8), group=4),
    "conv_same_upper": conv(auto_pad="SAME_UPPER", strides=[2, 3]),
    "conv_same_lower": conv(auto_pad="SAME_LOWER", strides=[2, 3], w=normal(6, 4, 2, 4)),
    "conv_valid": conv(auto_pad="VALID"),
    "conv_1d": conv(x=SEQUENCE, w=normal(6, 4, 3), pads=[1, 2]),
    "conv_3d": conv(x=VOLUME, w=normal(6, 4, 3, 1, 2), pads=[1, 0, 1, 1, 0, 0], strides=[1, 2, 1]),
    "transposed": transposed(),
    "transposed_no_bias": transposed(b=None),
    "transposed_strided": transposed(strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
    "transposed_uneven_pads": transposed(strides=[2, 3], pads=[0, 1, 2, 0]),
    "transposed_grouped": transposed(w=normal(4, 3, 3, 3), group=2, strides=[2, 2]),
    "transposed_dilated": transposed(dilations=[2, 2], strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 0]),
    "transposed_output_shape": transposed(strides=[2, 2], output_shape=[18, 16]),
    "transposed_same_upper": transposed(strides=[2, 2], auto_pad="SAME_UPPER"),
    "transposed_same_lower": transposed(strides=[2, 2], auto_pad="SAME_LOWER"),
    "transposed_1d": transposed(x=SEQUENCE, w=normal(4, 6, 3), strides=[2], pads=[1, 0], output_padding=[1]),
    "transposed_3d": transposed(x=VOLUME, w=normal(4, 6, 2, 2, 2), strides=[2, 2, 2]),
    "gemm": Case("Gemm", [normal(3, 4), normal(4, 5), normal(5)]),
    "gemm_both_transposed": Case("Gemm", [normal(4, 3), normal(5, 4), normal(3, 1)], {"transA": 1, "transB": 1}),
    "gemm_factors": Case("Gemm", [normal(3, 4), normal(4, 5), normal(1, 5)], {"alpha": 0.5, "beta": 2.0}),
    "gemm_no_c": Case("Gemm", [normal(3, 4), normal(4, 5)], {"alpha": 0.5}),
    "gemm_opset9": Case("Gemm", [normal(3, 4), normal(5, 4), normal(5)], {"transB": 1}, opset=9),
    "matmul": Case("MatMul", [normal(3, 4), normal(4, 5)]),
    "matmul_batched": Case("MatMul", [normal(2, 1, 3, 4), normal(6, 4, 5)]),
    "matmul_vector": Case("MatMul", [normal(2, 3, 4), normal(4)]),
    "einsum": Case("Einsum", [normal(2, 3, 4), normal(5, 4)], {"equation": "b i d, o d -> b o i"}),
    "einsum_ellipsis": Case("Einsum", [normal(2, 3, 4), normal(4, 5)], {"equation": "...d,de->...e"}),
    "einsum_implicit": Case("Einsum", [normal(3, 4), normal(4, 5)], {"equation": "ij,jk"}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_agrees(case: Case) -> None:
    """What PyTorch computes is what onnxruntime does."""
    agrees(case)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_slope_agrees(case: Case) -> None:
    """Gradients for input, weight and bias are what differences say."""
    slopes(case)


LAYERS = {
    "conv2d": (torch.nn.Conv2d(4, 6, 3, 2, 1), Case("Conv", [], {"pads": [1] * 4, "strides": [2, 2]}), IMAGE),
    "conv_transpose2d": (
        torch.nn.ConvTranspose2d(4, 6, 3, 2, 1, 1),
        Case("ConvTranspose", [], {"pads": [1] * 4, "strides": [2, 2], "output_padding": [1, 1]}),
        IMAGE,
    ),
    "linear": (torch.nn.Linear(4, 6), Case("Gemm", [], {"transB": 1}), normal(3, 4)),
    "layer_norm": (torch.nn.LayerNorm((4, 11)), Case("LayerNormalization", [], {"axis": -2}), SEQUENCE),
    "group_norm": (torch.nn.GroupNorm(2, 4), Case("GroupNormalization", [], {"num_groups": 2}), IMAGE),
    "prelu": (torch.nn.PReLU(), Case("PRelu", []), IMAGE),
}


@pytest.mark.parametrize(("layer", "case", "x"), LAYERS.values(), ids=LAYERS)
def test_gradients_are_those_of_the_layer(layer, case: Case, x: np.ndarray) -> None:
    """A graph with the weights of PyTorch's own layer has its output and its gradients."""
    arrays = [x, *(p.detach().numpy() for p in layer.parameters())]
    case = Case(case.op, arrays, case.attributes)
    module = OnnxModule(case.model(), case.trained())
    one, other = (torch.from_numpy(x).requires_grad_() for _ in range(2))
    y, z = module(one), layer(other)
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
    for mine, its in zip(module.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-4)


def test_equation_that_no_one_reads_is_refused() -> None:
    """An equation that PyTorch cannot read is an error that names the node."""
    case = Case("Einsum", [normal(3, 4), normal(4, 5)], {"equation": "ij,jk->iq"})
    with pytest.raises(ModelError, match="out0"):
        OnnxModule(case.model(), case.trained())(torch.from_numpy(case.arrays[0]))
