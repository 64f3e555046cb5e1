"""Tiny graphs for tests, written node by node: names are chosen so that an expectation can name every weight axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import ArrayLike
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

IR_VERSION = 8


@cache
def runs(opset: int) -> bool:
    """Whether the installed onnx and onnxruntime know an opset."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION)
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:
        assert "till opset" in str(error)
        return False
    return opset <= onnx.defs.onnx_opset_version()


def need(opset: int) -> None:
    """Skip a test whose graph is newer than the installed onnx or onnxruntime."""
    if not runs(opset):
        pytest.skip(f"opset {opset} is newer than onnx {onnx.__version__} or onnxruntime {onnxruntime.__version__}")


class Tiny:
    """A graph under construction.

    A layer called ``a`` computes the tensor ``a``,
        from weight ``a.w`` and bias ``a.b``. Weights are seeded and of unit gain.
    """

    def __init__(self, *, opset: int = 17, seed: int = 0, domains: Sequence[str] = ()) -> None:
        self.opset, self.domains = opset, domains
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.functions: list[onnx.FunctionProto] = []

    def input(self, *shape: int | str, name: str = "x", kind: int = TensorProto.FLOAT) -> str:
        """Declare a graph input; a string in the shape is a dynamic axis."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def constant(self, values: ArrayLike, name: str | None = None) -> str:
        """Add an initializer; Python integers become int64, Python floats float32."""
        array = np.asarray(values)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        name = name or f"constant{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def random(self, *shape: int, name: str, offset: float = 0.0, scale: float = 1.0) -> str:
        """Add a float32 initializer drawn from a normal distribution."""
        return self.constant((offset + scale * self.rng.standard_normal(shape)).astype(np.float32), name)

    def node(
        self, op: str, *inputs: str, name: str | None = None, outputs: int = 1, domain: str = "", **attributes: Any
    ):
        """Add a node; the tensors it computes carry its name (numbered where there are several)."""
        name = name or f"{op.lower()}{len(self.nodes)}"
        results = [name] if outputs == 1 else [f"{name}.{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), results, name=name, domain=domain, **attributes))
        return results[0] if outputs == 1 else results

    def conv(
        self, x: str, name: str, channels_in: int, channels: int, kernel: int = 1, *,
        rank: int = 2, group: int = 1, bias: bool = True, transpose: bool = False, **attributes: Any,
    ) -> str:  # fmt: skip
        """Add a convolution (or its transpose) that keeps the spatial size where the kernel is odd and the stride one."""
        fan_in = channels_in // group
        shape = (channels_in, channels // group) if transpose else (channels, fan_in)
        inputs = [x, self.random(*shape, *[kernel] * rank, name=f"{name}.w", scale=(fan_in * kernel**rank) ** -0.5)]
        if bias:
            inputs.append(self.random(channels, name=f"{name}.b", scale=0.3))
        attributes = {"group": group, "pads": [kernel // 2] * (2 * rank), "kernel_shape": [kernel] * rank} | attributes
        return self.node("ConvTranspose" if transpose else "Conv", *inputs, name=name, **attributes)

    def gemm(self, x: str, name: str, features_in: int, features: int, **attributes: Any) -> str:
        """Add a Gemm with bias; ``transB=1`` stores the weight as (features, features_in)."""
        shape = (features, features_in) if attributes.get("transB") else (features_in, features)
        weight = self.random(*shape, name=f"{name}.w", scale=features_in**-0.5)
        return self.node("Gemm", x, weight, self.random(features, name=f"{name}.b", scale=0.3), name=name, **attributes)

    def linear(self, x: str, name: str, features_in: int, features: int) -> str:
        """Add a MatMul with its weight on the right."""
        weight = self.random(features_in, features, name=f"{name}.w", scale=features_in**-0.5)
        return self.node("MatMul", x, weight, name=name)

    def batch_norm(self, x: str, name: str, channels: int, **attributes: Any) -> str:
        """Add a BatchNormalization with statistics near (0, 1)."""
        vectors = (("scale", 1.0), ("shift", 0.0), ("mean", 0.0))
        inputs = [self.random(channels, name=f"{name}.{role}", offset=at, scale=0.3) for role, at in vectors]
        variance = (0.5 + self.rng.random(channels)).astype(np.float32)
        return self.node(
            "BatchNormalization", x, *inputs, self.constant(variance, f"{name}.variance"), name=name, **attributes
        )

    def build(self, *outputs: str) -> ModelProto:
        """Make the model; outputs get the type and shape that inference finds."""
        need(self.opset)
        declared = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "tiny", self.inputs, declared, self.initializers)
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(domain, 1) for domain in self.domains)]
        version = max(IR_VERSION, 10 * (self.opset > 18))
        model = helper.make_model(graph, ir_version=version, opset_imports=opsets, functions=self.functions)
        for output in model.graph.output:
            output.type.tensor_type.ClearField("elem_type")
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        for output, known in zip(model.graph.output, inferred.graph.output, strict=True):
            output.CopyFrom(known)
            if not output.type.tensor_type.elem_type:
                output.type.tensor_type.elem_type = TensorProto.FLOAT
        if any(not output.type.tensor_type.HasField("shape") for output in model.graph.output):
            _declare_measured(model)
        return model


def length(dim: onnx.TensorShapeProto.Dimension, batch: int = 1) -> int:
    """Length of an axis; an open one's stands behind its name (``D2_6``), or it is ``batch``."""
    return dim.dim_value or int(dim.dim_param.partition("_")[2] or batch)


def _declare_measured(model: ModelProto) -> None:
    """Declare outputs that inference knows nothing of as onnxruntime computes them."""
    probe = ModelProto()
    probe.CopyFrom(model)
    for output in probe.graph.output:
        output.ClearField("type")
    session = onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    types = {i.name: i.type.tensor_type for i in model.graph.input}
    feeds = {
        name: np.ones([length(dim) for dim in type_.shape.dim], helper.tensor_dtype_to_np_dtype(type_.elem_type))
        for name, type_ in types.items()
    }
    for output, value in zip(model.graph.output, session.run(None, feeds), strict=True):
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        output.CopyFrom(helper.make_tensor_value_info(output.name, kind, value.shape))


Middle = Callable[[Tiny, str], str]


def sandwich(
    middle: Middle, channels: int = 6, after: int | None = None, *,
    size: Sequence[int] = (4, 6), rank_after: int | None = None, kernel: int = 1, opset: int = 17,
        domains: Sequence[str] = (),
) -> ModelProto:  # fmt: skip
    """Build input -> Conv ``a`` (2 to ``channels``) -> ``middle`` -> Conv ``z`` (``after`` to 3) -> output."""
    t = Tiny(opset=opset, domains=domains)
    x = t.input(1, 2, *size)
    y = middle(t, t.conv(x, "a", 2, channels, kernel, rank=len(size)))
    return t.build(t.conv(y, "z", after or channels, 3, rank=rank_after or len(size)))


def perceptron(middle: Middle, features: int = 6, after: int | None = None, *, opset: int = 17) -> ModelProto:
    """Build input (4, 2) -> Gemm ``a`` (to ``features``) -> ``middle`` -> Gemm ``z`` (``after`` to 3) -> output."""
    t = Tiny(opset=opset)
    y = middle(t, t.gemm(t.input(4, 2), "a", 2, features))
    return t.build(t.gemm(y, "z", after or features, 3))


KINDS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}


def in_type(model: ModelProto, kind: str) -> ModelProto:
    """Convert a float32 model to another type: everything but what operators want as float32 (scales of Resize)."""
    dtype = np.dtype(KINDS.get(kind, kind))
    wanted = helper.np_dtype_to_tensor_dtype(dtype)
    single = {node.input[2] for node in model.graph.node if node.op_type == "Resize" and len(node.input) > 2}

    def convert(tensor: TensorProto) -> None:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in single:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))

    def visit(graph: GraphProto) -> None:
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == TensorProto.FLOAT:
                value.type.tensor_type.elem_type = wanted
        for tensor in graph.initializer:
            convert(tensor)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    convert(attribute.t)
                if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                    attribute.i = wanted
                if attribute.HasField("g"):
                    visit(attribute.g)

    converted = ModelProto()
    converted.CopyFrom(model)
    visit(converted.graph)
    return converted
