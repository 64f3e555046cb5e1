"""Long models, for what must stay quick and small."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def chain(length: int) -> onnx.ModelProto:
    """A model of so many convolutions in a row."""
    rng, nodes, weights = np.random.default_rng(0), [], []
    for k in range(length):
        name = f"stages.{k // 50}.blocks.{k % 50}.conv"
        weights.append(numpy_helper.from_array(rng.lognormal(size=(8, 8, 1, 1)).astype(np.float32), f"{name}.weight"))
        nodes.append(
            helper.make_node("Conv", [f"x{k}", f"{name}.weight"], [f"x{k + 1}"], name=f"/{name.replace('.', '/')}")
        )
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 8, 8, 8]) for n in ("x0", f"x{length}")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
