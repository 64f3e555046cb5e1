"""Quantisation: value as onnxruntime computes it, and gradients as if nothing were rounded."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper, numpy_helper

pytest.importorskip("torch")

import torch

from agreement import Case, agrees, normal
from onnxprune import runtime
from onnxprune.train import OnnxModule

X = normal(3, 4)
BYTES = np.random.default_rng(3).integers(0, 255, (3, 4), np.uint8)
SIGNED = np.random.default_rng(3).integers(-63, 64, (4, 5), np.int8)  # without VNNI onnxruntime saturates beyond
SCALE, ZERO = np.array(0.02, np.float32), np.array(100, np.uint8)
BLOCKS = np.array([[0.02, 0.03]] * 3, np.float32)
ROWS = np.array([0.02, 0.03, 0.01], np.float32)

CASES = {
    "quantize": Case("QuantizeLinear", [X, SCALE, ZERO]),
    "quantize_no_zero": Case("QuantizeLinear", [X, SCALE]),
    "quantize_signed": Case("QuantizeLinear", [X, SCALE, np.array(3, np.int8)]),
    "quantize_axis": Case("QuantizeLinear", [X, ROWS, np.array([1, 2, 3], np.int8)], {"axis": 0}),
    "dequantize": Case("DequantizeLinear", [BYTES, SCALE, ZERO]),
    "dequantize_axis": Case("DequantizeLinear", [BYTES, ROWS], {"axis": 0}),
    "dequantize_int32": Case("DequantizeLinear", [BYTES.astype(np.int32) * 1000, SCALE]),
    "dequantize_blocks": Case("DequantizeLinear", [BYTES, BLOCKS], {"axis": 1, "block_size": 2}),
    "dynamic": Case("DynamicQuantizeLinear", [X], outputs=3),
    "dynamic_positive": Case("DynamicQuantizeLinear", [np.abs(X) + 1], outputs=3),
    "dynamic_negative": Case("DynamicQuantizeLinear", [-np.abs(X) - 1], outputs=3),
    "dynamic_zero": Case("DynamicQuantizeLinear", [0 * X], outputs=3),
    "matmul": Case("MatMulInteger", [BYTES, SIGNED, ZERO, np.array(3, np.int8)]),
    "matmul_columns": Case("MatMulInteger", [BYTES, SIGNED, ZERO, np.arange(5, dtype=np.int8)]),
    "conv": Case(
        "ConvInteger", [BYTES.reshape(1, 1, 3, 4), SIGNED.reshape(5, 1, 2, 2).astype(np.uint8), ZERO], {"pads": [1, 0, 1, 0]}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_agrees(case: Case) -> None:
    """What PyTorch computes is what onnxruntime does, to the last integer."""
    agrees(case, 1e-6)


def fake_quantised(x: np.ndarray, scale: float, zero: np.generic):
    """A model that quantises and dequantises its input."""
    constants = [
        numpy_helper.from_array(np.array(scale, np.float32), "s"),
        numpy_helper.from_array(np.array(zero), "z"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, 1, x.shape) for name in "xy"]
    graph = helper.make_graph(nodes, "qdq", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def test_rounding_lets_gradients_through() -> None:
    """Within the range the gradient is that of the identity; beyond it there is none."""
    x = np.array([-5, -0.313, 0.1, 0.777, 5], np.float32)
    model = fake_quantised(x, 0.02, np.int8(0))
    given = torch.from_numpy(x).requires_grad_()
    y = OnnxModule(model, [])(given)
    y.sum().backward()
    np.testing.assert_allclose(y.detach(), runtime.Session(model.SerializeToString()).run({"x": x})[0], rtol=1e-6)
    np.testing.assert_allclose(given.grad, [0, 1, 1, 1, 0], rtol=1e-6)


def test_quantised_weight_trains() -> None:
    """A weight that is quantised in the graph gets a gradient, and the scale one that lowers the error of rounding."""
    w, x = normal(4, 5), normal(3, 4)
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["v"]),
        helper.make_node("MatMul", ["x", "v"], ["y"]),
    ]
    arrays = {"w": w, "s": np.array(0.02, np.float32), "z": np.array(0, np.int8)}
    graph = helper.make_graph(
        nodes,
        "qat",
        [helper.make_tensor_value_info("x", 1, [3, 4])],
        [helper.make_tensor_value_info("y", 1, [3, 5])],
        [numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    module = OnnxModule(model, ["w", "s"])
    module(torch.from_numpy(x)).sum().backward()
    np.testing.assert_allclose(
        module.get_parameter("w").grad, np.broadcast_to(x.sum(0)[:, None], (4, 5)), rtol=1e-4, atol=1e-5
    )
    assert torch.isfinite(module.get_parameter("s").grad)
