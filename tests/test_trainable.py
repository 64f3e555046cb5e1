"""Which constants training may change: weights by the place where they are read, and a reason for all others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

import architectures
from graphs import Tiny
from onnxprune import trainable as module
from onnxprune.protos import named_tensors
from onnxprune.trainable import trainable

FIXTURES = Path(__file__).parents[1] / "fixtures"
MICROSOFT = "com.microsoft"


def model_of(t: Tiny, output: str) -> ModelProto:
    """The graph as it is: nothing runs here, so shapes need not be known, nor operators."""
    declared = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
    return helper.make_model(helper.make_graph(t.nodes, "tiny", t.inputs, declared, t.initializers))


def verdict(build: Callable[[Tiny], str], *shape: int, name: str = "c") -> str:
    """What becomes of the constant ``c`` in a graph whose input ``x`` has the given shape and has been negated as ``y``."""
    t = Tiny(domains=[MICROSOFT])
    t.input(*(shape or (1, 4)))
    t.node("Neg", "x", name="y")
    return trainable(model_of(t, build(t)))[name]


SLOTS: dict[str, tuple[Callable[[Tiny], str], tuple[int, ...]]] = {
    "conv_weight": (lambda t: t.node("Conv", "y", t.random(2, 4, 1, 1, name="c")), (1, 4, 3, 3)),
    "conv_bias_of_one_channel": (
        lambda t: t.node("Conv", "y", t.random(1, 4, 1, 1, name="w"), t.random(1, name="c")),
        (1, 4, 3, 3),
    ),
    "conv_transpose": (lambda t: t.node("ConvTranspose", "y", t.random(4, 2, 1, 1, name="c")), (1, 4, 3, 3)),
    "gemm_bias": (lambda t: t.node("Gemm", "y", t.random(4, 2, name="w"), t.random(2, name="c")), (1, 4)),
    "matmul_right": (lambda t: t.node("MatMul", "y", t.random(4, 2, name="c")), (1, 4)),
    "matmul_left": (lambda t: t.node("MatMul", t.random(2, 1, name="c"), "y"), (1, 4)),
    "einsum": (lambda t: t.node("Einsum", "y", t.random(4, 2, name="c"), equation="ij,jk->ik"), (1, 4)),
    "layer_norm_scale": (lambda t: t.node("LayerNormalization", "y", t.random(4, name="c")), (1, 4)),
    "prelu": (lambda t: t.node("PRelu", "y", t.random(1, name="c")), (1, 4)),
    "embedding": (lambda t: t.node("Gather", t.random(9, 4, name="c"), t.node("Cast", "y", to=7)), (1, 4)),
    "added_vector": (lambda t: t.node("Add", "y", t.random(4, name="c")), (1, 4)),
    "scale": (lambda t: t.node("Mul", t.random(4, name="c"), "y"), (1, 4)),
    "transposed": (
        lambda t: t.node("MatMul", "y", t.node("Transpose", t.random(2, 4, name="c"), perm=[1, 0])),
        (1, 4),
    ),
    "identity_of_one_element": (
        lambda t: t.node("Conv", "y", t.random(1, 4, 1, 1, name="w"), t.node("Identity", t.random(1, name="c"))),
        (1, 4, 3, 3),
    ),
    "standardised": (
        lambda t: t.node(
            "MatMul", "y", t.node("Sub", t.random(4, 2, name="c"), t.node("ReduceMean", "c", keepdims=1))
        ),
        (1, 4),
    ),
    "fused_attention": (
        lambda t: t.node(
            "Attention", "y", t.random(4, 12, name="c"), t.random(12, name="b"), domain=MICROSOFT, num_heads=2
        ),
        (1, 3, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "shape"), SLOTS.values(), ids=SLOTS)
def test_weights_are_trainable(build: Callable[[Tiny], str], shape: tuple[int, ...]) -> None:
    """What sits in a weight's place is trainable, directly or through arithmetic on constants."""
    assert verdict(build, *shape) == ""


REASONS: dict[str, tuple[Callable[[Tiny], str], tuple[int, ...], str]] = {
    "one_number": (lambda t: t.node("Mul", "y", t.constant(0.5, "c")), (1, 4), module.NUMBER),
    "one_number_reshaped": (
        lambda t: t.node("Mul", "y", t.node("Unsqueeze", t.constant(0.5, "c"), t.constant([0]))),
        (1, 4),
        module.NUMBER,
    ),
    "mask": (lambda t: t.node("Add", "y", t.constant([0.0, 0.0, -1e9, -1e9], "c")), (1, 4), module.MASK),
    "infinite_mask": (lambda t: t.node("Add", "y", t.constant([0.0, 0.0, 0.0, -np.inf], "c")), (1, 4), module.MASK),
    "nan": (lambda t: t.node("Add", "y", t.constant([0.0, 0.0, 0.0, np.nan], "c")), (1, 4), module.MASK),
    "input_mean": (lambda t: t.node("Sub", "x", t.random(4, name="c")), (1, 4), module.NORMALISES),
    "input_deviation": (
        lambda t: t.node("Div", t.node("Sub", "x", t.random(4, name="m")), t.random(4, name="c", offset=9)),
        (1, 4),
        module.NORMALISES,
    ),
    "bound": (lambda t: t.node("Clip", "y", t.constant(0.0, "c")), (1, 4), module.OPERAND),
    "exponent": (lambda t: t.node("Pow", "y", t.constant([2.0, 2.0, 2.0, 2.0], "c")), (1, 4), module.OPERAND),
    "pad_value": (
        lambda t: t.node("Pad", "y", t.constant([0, 0, 0, 1]), t.constant(0.0, "c")), (1, 4), module.OPERAND,
    ),
    "resize_scales": (
        lambda t: t.node("Resize", "y", "", t.constant([1.0, 1.0, 2.0, 2.0], "c")), (1, 4, 3, 3), module.OPERAND,
    ),
    "initial_state": (
        lambda t: t.node(
            "RNN", "y", t.random(1, 5, 4, name="w"), t.random(1, 5, 5, name="r"), "", "", t.random(1, 1, 5, name="c"),
            hidden_size=5,
        ),
        (3, 1, 4),
        module.STATE,
    ),
    "quantisation_scale": (
        lambda t: t.node("QuantizeLinear", "y", t.constant(0.1, "c"), t.constant(np.uint8(0))), (1, 4), module.QUANTISED,
    ),
    "quantised_weight": (
        lambda t: t.node(
            "MatMul", "y", t.node("DequantizeLinear", t.constant(np.ones((4, 2), np.int8), "c"), t.constant(0.1))
        ),
        (1, 4),
        module.QUANTISED,
    ),
    "unread": (lambda t: t.random(4, name="c") and "y", (1, 4), module.UNREAD),
    "dead": (lambda t: t.node("Add", "y", t.random(4, name="c")) and "y", (1, 4), module.UNUSED),
    "unknown_operator": (
        lambda t: t.node("FusedMagic", "y", t.random(4, name="c"), domain=MICROSOFT), (1, 4), module.OPERAND,
    ),
    "weight_that_bounds_elsewhere": (
        lambda t: t.node("Pow", t.node("Mul", "y", t.random(4, name="c")), "c"), (1, 4), module.OPERAND,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "shape", "reason"), REASONS.values(), ids=REASONS)
def test_what_is_no_weight_has_a_reason(build: Callable[[Tiny], str], shape: tuple[int, ...], reason: str) -> None:
    """A constant that is no weight, in whichever way, says why."""
    assert verdict(build, *shape) == reason


@pytest.mark.parametrize("name", architectures.ALL)
def test_every_floating_constant_has_a_verdict(name: str) -> None:
    """Of every architecture all floating-point constants are named; weights of layers train, running statistics do not."""
    model = architectures.ALL[name]()
    found = trainable(model)
    floating = {tensor.name for tensor in named_tensors(model.graph) if tensor.data_type == TensorProto.FLOAT}
    assert found.keys() == floating
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "BatchNormalization"):
            assert [found[each] for each in node.input[1:3]] == [""] * len(node.input[1:3])
        if node.op_type == "BatchNormalization":
            assert [found[each] for each in node.input[3:]] == [module.STATISTICS] * 2


def test_constant_nodes_count() -> None:
    """A Constant node's tensor goes by the node's output."""
    model = onnx.load(FIXTURES / "digits" / "digits.onnx")
    weight = next(node.input[1] for node in model.graph.node if node.op_type == "Conv")
    (tensor,) = [t for t in model.graph.initializer if t.name == weight]
    model.graph.initializer.remove(tensor)
    model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    assert trainable(model)[tensor.name] == ""


def test_bodies_of_control_flow_stay() -> None:
    """Constants inside a branch, and those that a branch reads from outside, are left alone."""

    def branch(name: str) -> onnx.GraphProto:
        weight = helper.make_tensor(f"{name}.w", TensorProto.FLOAT, [4], [1.0] * 4)
        nodes = [
            helper.make_node("Add", ["y", f"{name}.w"], [f"{name}.a"]),
            helper.make_node("Add", [f"{name}.a", "outer"], [name]),
        ]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, 1, [1, 4])], [weight])

    t = Tiny()
    t.input(1, 4)
    t.node("Neg", "x", name="y")
    t.random(4, name="outer")
    branches = {"then_branch": branch("then"), "else_branch": branch("else")}
    model: ModelProto = model_of(t, t.node("If", t.constant(np.array(True)), **branches))
    assert trainable(model) == dict.fromkeys(("then.w", "else.w", "outer"), module.BODY)
