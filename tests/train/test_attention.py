"""Fused attention and rotary embeddings: value as onnxruntime computes it, slope as differences say."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from agreement import Case, agrees, integers, normal, slopes
from onnxprune.errors import ModelError
from onnxprune.train import OnnxModule

BATCH, TOKENS, HEADS, WIDTH = 2, 5, 4, 8
WHOLE = HEADS * WIDTH
MICROSOFT = "com.microsoft"
Q, K, V = normal(BATCH, TOKENS, WHOLE), normal(BATCH, 6, WHOLE), normal(BATCH, 6, WHOLE) + 0.1
ANGLES = np.arange(40, dtype=np.float32).reshape(10, 4) / 10
COS, SIN = np.cos(ANGLES), np.sin(ANGLES)
POSITIONS = np.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])


def standard(*arrays: np.ndarray | None, outputs: int = 1, opset: int = 23, **attributes) -> Case:
    """The standard's attention with packed heads."""
    counts = {"q_num_heads": HEADS, "kv_num_heads": HEADS} if arrays[0].ndim == 3 else {}
    return Case("Attention", arrays, {**counts, **attributes}, opset, outputs)


def fused(op: str, *arrays: np.ndarray | None, outputs: int = 1, smooth: bool = True, **attributes) -> Case:
    """An operator of onnxruntime's."""
    return Case(op, arrays, {"num_heads": HEADS, **attributes}, 17, outputs, MICROSOFT, smooth)


def heads(x: np.ndarray, count: int = HEADS) -> np.ndarray:
    """(batch, heads, tokens, columns)."""
    return np.ascontiguousarray(x.reshape(*x.shape[:2], count, -1).swapaxes(1, 2))


PROJECTED = (Q, 0.3 * normal(WHOLE, 3 * WHOLE), normal(3 * WHOLE))
MASK = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 1, 0]], np.int32)
KEPT = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 0, 1]], np.int32)
PAST = normal(BATCH, HEADS, 3, WIDTH)
SHARED = normal(BATCH, TOKENS, 2 * WIDTH)
SEEN = np.array([TOKENS - 1] * BATCH, np.int32), np.array([TOKENS], np.int32)
WIDE = np.cos(np.arange(80, dtype=np.float32).reshape(10, 8)), np.sin(np.arange(80, dtype=np.float32).reshape(10, 8))
CONTINUED = (Q, SHARED, SHARED, PAST[:, :2], PAST[:, :2], SEEN[0] + 3, SEEN[1] + 3)
GROUPED = (Q, SHARED, SHARED + 0.1, None, None, *SEEN)

CASES = {
    "standard": standard(Q, K, V),
    "standard_heads": standard(heads(Q), heads(K), heads(V)),
    "standard_scale": standard(Q, K, V, scale=0.2),
    "standard_mask": standard(Q, K, V, normal(TOKENS, 6)),
    "standard_bool_mask": standard(Q, K, V, normal(TOKENS, 6) > -1),
    "standard_causal": standard(Q, K, V, is_causal=1),
    "standard_causal_mask": standard(Q, K, V, normal(TOKENS, 6), is_causal=1),
    "standard_softcap": standard(Q, K, V, softcap=2.0),
    "standard_grouped": standard(Q, K[..., : 2 * WIDTH], V[..., : 2 * WIDTH], kv_num_heads=2),
    "standard_past": standard(Q, K, V, None, PAST, PAST + 0.1, outputs=3),
    "standard_wide_values": standard(Q, K, normal(BATCH, 6, HEADS * 3)),
    "projected": fused("Attention", *PROJECTED),
    "projected_causal": fused("Attention", *PROJECTED, unidirectional=1),
    "projected_mask": fused("Attention", *PROJECTED, MASK),
    "projected_lengths": fused("Attention", *PROJECTED, np.array([4, 2], np.int32)),
    "projected_bias": fused("Attention", *PROJECTED, None, None, normal(BATCH, HEADS, TOKENS, TOKENS)),
    "projected_sizes": fused(
        "Attention", Q, normal(WHOLE, 48), normal(48), qkv_hidden_sizes=[16, 16, 16], scale=0.1, outputs=1
    ),
    "projected_past": fused("Attention", *PROJECTED, None, np.stack([PAST, PAST + 0.1]), outputs=2),
    "multi": fused("MultiHeadAttention", Q, K, V),
    "multi_bias": fused("MultiHeadAttention", Q, K, V, normal(3 * WHOLE)),
    "multi_mask": fused("MultiHeadAttention", Q, K, V, None, KEPT),
    "multi_lengths": fused("MultiHeadAttention", Q, K, V, None, np.array([4, 2], np.int32)),
    "multi_scores": fused("MultiHeadAttention", Q, K, V, None, None, normal(1, HEADS, TOKENS, 6)),
    "multi_heads": fused("MultiHeadAttention", Q, heads(K), heads(V)),
    "multi_past": fused("MultiHeadAttention", Q, K, V, None, None, None, PAST, PAST + 0.1, outputs=3),
    "multi_scale": fused("MultiHeadAttention", Q, Q + 0.1, Q - 0.2, scale=0.2, unidirectional=1),
    "grouped": fused("GroupQueryAttention", *GROUPED, kv_num_heads=2, outputs=3),
    "grouped_scale": fused("GroupQueryAttention", *GROUPED, kv_num_heads=2, scale=0.2, outputs=3),
    "grouped_softcap": fused("GroupQueryAttention", *GROUPED, kv_num_heads=2, softcap=2.0, outputs=3),
    "grouped_window": fused("GroupQueryAttention", *GROUPED, kv_num_heads=2, local_window_size=2, outputs=3),
    "grouped_rotary": fused(
        "GroupQueryAttention", *GROUPED, *WIDE, num_heads=2, kv_num_heads=1, do_rotary=1, rotary_interleaved=1, outputs=3
    ),
    "grouped_packed": fused(
        "GroupQueryAttention", normal(BATCH, TOKENS, 8 * WIDTH), None, None, None, None, *SEEN, kv_num_heads=2, outputs=3
    ),
    "rotary": Case("RotaryEmbedding", [heads(Q), COS, SIN, POSITIONS], {}, 23),
    "rotary_packed": Case("RotaryEmbedding", [Q, COS, SIN, POSITIONS], {"num_heads": HEADS}, 23),
    "rotary_interleaved": Case("RotaryEmbedding", [heads(Q), COS, SIN, POSITIONS], {"interleaved": 1}, 23),
    "rotary_part": Case(
        "RotaryEmbedding", [heads(Q), COS[:, :2], SIN[:, :2], POSITIONS], {"rotary_embedding_dim": 4}, 23
    ),
    "rotary_tables": Case("RotaryEmbedding", [heads(Q), COS[POSITIONS], SIN[POSITIONS]], {}, 23),
    "fused_rotary": Case("RotaryEmbedding", [Q, POSITIONS, COS, SIN], {}, 17, domain=MICROSOFT),
    "fused_rotary_offset": Case("RotaryEmbedding", [Q, integers(2), COS, SIN], {}, 17, domain=MICROSOFT),
    "fused_rotary_heads": Case("RotaryEmbedding", [heads(Q), POSITIONS, COS, SIN], {"interleaved": 1}, 17, domain=MICROSOFT),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_agrees(case: Case) -> None:
    """What PyTorch computes is what onnxruntime does."""
    agrees(case)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_slope_agrees(case: Case) -> None:
    """Gradients for queries, keys, values, weights and biases are what differences say."""
    slopes(case)


def test_gradients_are_those_of_the_layer() -> None:
    """Attention with the projections of PyTorch's own layer has its output and its gradients."""
    own = torch.nn.MultiheadAttention(WHOLE, HEADS, batch_first=True)
    weight, bias = own.in_proj_weight.detach().numpy().T.copy(), own.in_proj_bias.detach().numpy()
    case = fused("Attention", Q, weight, bias)
    module = OnnxModule(case.model(), case.trained())
    x = torch.from_numpy(Q)
    y = own.out_proj(module(x))
    z = own(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    own.zero_grad()
    z.square().sum().backward()
    torch.testing.assert_close(module.get_parameter("in1").grad, own.in_proj_weight.grad.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        pytest.param(standard(Q, K, V, outputs=4), "returns its scores", id="scores"),
        pytest.param(fused("Attention", *PROJECTED, do_rotary=1), "rotates", id="rotates"),
        pytest.param(fused("MultiHeadAttention", Q), "without keys", id="no_keys"),
        pytest.param(fused("Attention", *PROJECTED, np.ones((6,), np.int32)), "a mask", id="mask"),
        pytest.param(
            fused("GroupQueryAttention", *CONTINUED, kv_num_heads=2),
            "continues a past",
            id="past",
        ),
    ],
)  # fmt: skip
def test_forms_without_a_kernel_are_refused(case: Case, reason: str) -> None:
    """What the kernels do not compute is an error that says so, not a wrong result."""
    with pytest.raises(ModelError, match=reason):
        OnnxModule(case.model(), [])(torch.from_numpy(Q))
