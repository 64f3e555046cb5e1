"""Operators that optimisers fuse: value as onnxruntime or their parts compute it, slope as differences say."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch.nn import functional

from agreement import Case, agrees, normal, positive, slopes
from onnxprune.errors import ModelError
from onnxprune.train import OnnxModule

X, IMAGE = normal(2, 5, 8), normal(2, 4, 7, 6)
W, B = normal(6, 4, 3, 3), normal(6)
IDS = np.array([[1, 4, 0, 2, 2], [3, 1, 1, 0, 5]], np.int32)


def fused(op: str, *arrays: np.ndarray | None, outputs: int = 1, **attributes) -> Case:
    """An operator of onnxruntime's."""
    return Case(op, arrays, attributes, 17, outputs, "com.microsoft")


ACTIVATIONS = {
    "Relu": [], "Sigmoid": [], "Tanh": [], "LeakyRelu": [0.2], "Clip": [-0.5, 3.0], "HardSigmoid": [0.3, 0.4],
}  # fmt: skip
ALPHA_BETA = ("activation_alpha", "activation_beta")
CASES = {
    "gelu": fused("Gelu", X),
    "fast_gelu": fused("FastGelu", X),
    "fast_gelu_bias": fused("FastGelu", X, normal(8)),
    "bias_gelu": fused("BiasGelu", X, normal(8)),
    "quick_gelu": fused("QuickGelu", X),
    "quick_gelu_alpha": fused("QuickGelu", X, alpha=1.2),
    **{
        f"conv_{name}": fused("FusedConv", IMAGE, W, B, activation=name, **{"activation_params": numbers} if numbers else {})
        for name, numbers in ACTIVATIONS.items()
    },
    "conv_sum": fused("FusedConv", IMAGE, W, B, normal(2, 6, 5, 4), activation="Relu"),
    **{
        f"gemm_{name}": fused(
            "FusedGemm",
            normal(3, 4),
            normal(4, 5),
            normal(5),
            activation=name,
            **dict(zip(ALPHA_BETA, numbers, strict=False)),
        )
        for name, numbers in ACTIVATIONS.items()
        if name != "Clip"
    },
    "matmul": fused("FusedMatMul", normal(2, 4, 3), normal(2, 5, 4), transA=1, transB=1, alpha=0.5),
    "matmul_batch": fused("FusedMatMul", normal(3, 2, 4), normal(2, 4, 5), transBatchA=1),
    "matmul_batch_both": fused("FusedMatMul", normal(4, 2, 3), normal(2, 5, 4), transBatchA=1, transA=1, transB=1),
    "transposed": fused("TransposeMatMul", normal(2, 4, 3), normal(2, 4, 5), transA=1),
    "skip": fused("SkipLayerNormalization", X, X + 1, positive(8), normal(8)),
    "skip_bias": fused(
        "SkipLayerNormalization", X, normal(2, 5, 8) - 1, positive(8), normal(8), normal(8) + 1, outputs=4, epsilon=1e-3
    ),
    "skip_broadcast": fused("SkipLayerNormalization", X, normal(1, 5, 8), positive(8)),
    "skip_rms": fused("SkipSimplifiedLayerNormalization", X, X + 1, positive(8)),
    "skip_rms_bias": fused("SkipSimplifiedLayerNormalization", X, X + 1, positive(8), normal(8), epsilon=1e-3),
    "embed": fused(
        "EmbedLayerNormalization", IDS, IDS % 2, normal(6, 8), normal(7, 8), normal(2, 8), positive(8), normal(8), outputs=2
    ),
    "embed_mask": fused(
        "EmbedLayerNormalization",
        IDS, None, normal(6, 8), normal(7, 8), None, positive(8), normal(8), IDS % 2, outputs=3, epsilon=1e-3,
    ),
}  # fmt: skip
SMOOTH = {name: case for name, case in CASES.items() if name not in ("embed", "embed_mask", "skip_bias")}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_agrees(case: Case) -> None:
    """What PyTorch computes is what onnxruntime does."""
    agrees(case)


@pytest.mark.parametrize("case", SMOOTH.values(), ids=SMOOTH)
def test_slope_agrees(case: Case) -> None:
    """Gradients for input, weights and biases are what differences say."""
    slopes(case)


def last(x: np.ndarray) -> np.ndarray:
    """Channels last."""
    return np.ascontiguousarray(np.moveaxis(x, 1, -1))


def t(x: np.ndarray) -> torch.Tensor:
    """As a tensor."""
    return torch.from_numpy(x)


GAIN, SHIFT = positive(4), normal(4)
PARTS = {
    "bias_add": (fused("BiasAdd", X, normal(8), X + 1), lambda: t(X) + t(normal(8)) + t(X + 1)),
    "bias_split_gelu": (
        fused("BiasSplitGelu", X, normal(8)),
        lambda: (t(X) + t(normal(8)))[..., :4] * functional.gelu((t(X) + t(normal(8)))[..., 4:]),
    ),
    "nhwc_conv": (
        fused("NhwcConv", last(IMAGE), W, B, pads=[1, 1, 1, 1]),
        lambda: functional.conv2d(t(IMAGE), t(W), t(B), padding=1).movedim(1, -1),
    ),
    "nhwc_fused_conv": (
        fused("NhwcFusedConv", last(IMAGE), W, B, activation="Relu"),
        lambda: functional.conv2d(t(IMAGE), t(W), t(B)).relu().movedim(1, -1),
    ),
    "group_norm": (
        fused("GroupNorm", last(IMAGE), GAIN, SHIFT, groups=2, activation=1),
        lambda: functional.silu(functional.group_norm(t(IMAGE), 2, t(GAIN), t(SHIFT))).movedim(1, -1),
    ),
    "skip_group_norm": (
        fused("SkipGroupNorm", last(IMAGE), GAIN, SHIFT, normal(2, 4), normal(4) - 1, groups=2),
        lambda: functional.group_norm(
            t(IMAGE) + t(normal(2, 4))[:, :, None, None] + t(normal(4) - 1)[:, None, None], 2, t(GAIN), t(SHIFT)
        ).movedim(1, -1),
    ),
}


@pytest.mark.parametrize(("case", "parts"), PARTS.values(), ids=PARTS)
def test_value_is_that_of_the_parts(case: Case, parts) -> None:
    """What onnxruntime has on graphics cards only is what its parts are."""
    y = OnnxModule(case.model(), case.trained())(torch.from_numpy(case.arrays[0]))
    torch.testing.assert_close(y, parts(), rtol=1e-5, atol=1e-5)
    slopes(case)


def test_unknown_activation_is_refused() -> None:
    """An activation that no kernel has is an error that names the node."""
    case = fused("FusedConv", IMAGE, W, B, activation="Gelu")
    with pytest.raises(ModelError, match="out0: activation Gelu"):
        OnnxModule(case.model(), [])(torch.from_numpy(IMAGE))
