"""A graph as a module: inputs, shapes, control flow and refusals."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper

pytest.importorskip("torch")

import torch

import architectures
from agreement import built, expected, image, normal, results, spread
from architectures import variants
from onnxprune.errors import ModelError, UsageError
from onnxprune.train import OnnxModule

DYNAMIC = variants.with_dynamic_batch(architectures.ALL["resnet_a"]())


# -- calls -------------------------------------------------------------------------------------------------------------


def test_inputs_go_by_place_or_name() -> None:
    """Several inputs and outputs; too few or unknown ones are refused with the names there are."""
    nodes = [helper.make_node("Sub", ["a", "b"], ["y"]), helper.make_node("Relu", ["y"], ["z"])]
    module = OnnxModule(built(nodes, {}, {"a": (1, [2]), "b": (1, [2])}, ["y", "z"]), [])
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])
    for y, z in (module(a, b), module(b=b, a=a), module(a, b=b)):
        assert (y.tolist(), z.tolist()) == ([-2.0, 1.0], [0.0, 1.0])
    for arguments, names in (((a,), {}), ((a, b, a), {}), ((a,), {"c": b})):
        with pytest.raises(UsageError, match="the graph takes a, b"):
            module(*arguments, **names)


def test_any_tensor_can_be_wanted() -> None:
    """Inner tensors are returned by name, with gradients or without."""
    model = architectures.ALL["resnet_a"]()
    module = OnnxModule(model)
    names = [model.graph.node[3].output[0], model.graph.node[-2].output[0]]
    x = torch.from_numpy(image(model))
    with torch.no_grad():
        free = module(x, wanted=names)
    kept = module(x, wanted=names)
    assert list(free) == list(kept) == names
    for name in names:
        torch.testing.assert_close(free[name], kept[name])


@pytest.mark.parametrize("batch", [1, 3, 2])
def test_batch_may_differ(batch: int) -> None:
    """A dynamic batch takes any size, whatever sizes came before."""
    module = OnnxModule(DYNAMIC)
    for n in (2, batch, 2):
        x = image(DYNAMIC, n)
        with torch.no_grad():
            assert spread(expected(DYNAMIC, **{module.inputs[0]: x})[0], module(torch.from_numpy(x)).numpy()) < 1e-4


def test_shape_arithmetic_follows_sizes() -> None:
    """Height and width computed in the graph are those of each call."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "order"], ["t"]),
        helper.make_node("Reshape", ["x", "t"], ["y"]),
    ]
    model = built(nodes, {"order": np.array([1, 0])}, {"x": (1, ["a", "b"])})
    module = OnnxModule(model, [])
    for shape in ((2, 5), (3, 4), (2, 5)):
        assert tuple(module(torch.zeros(shape)).shape) == shape[::-1]


def test_shapes_that_depend_on_values_are_not_remembered() -> None:
    """Where a shape follows from what an input holds, every call computes it anew."""
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),
        helper.make_node("Shape", ["places"], ["s"], start=1),
        helper.make_node("Expand", ["one", "s"], ["y"]),
        helper.make_node("Expand", ["one", "n"], ["e"]),
        helper.make_node("Shape", ["e"], ["z"]),
    ]
    model = built(nodes, {"one": np.ones(1, np.float32)}, {"x": (1, [4]), "n": (7, [1])}, ["y", "z"])
    module = OnnxModule(model, [])
    for n in (1, 3, 2):
        y, z = module((torch.arange(4) < n).float(), torch.tensor([n]))
        assert (y.shape[0], z.item()) == (n, n)


def test_training_may_follow_inference_mode() -> None:
    """What is remembered from a call in inference mode serves for training."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Cast", ["s"], ["f"], to=1),
        helper.make_node("ReduceProd", ["f"], ["n"], keepdims=0),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Div", ["h", "n"], ["y"]),
    ]
    module = OnnxModule(built(nodes, {"w": normal(3, 4)}, {"x": (1, ["n", 3])}))
    x = torch.from_numpy(normal(2, 3))
    with torch.inference_mode():
        y = module(x)
    z = module(x)
    z.sum().backward()
    torch.testing.assert_close(y, z)
    assert module.get_parameter("w").grad is not None


# -- control flow and refusals -----------------------------------------------------------------------------------------


def branching() -> ModelProto:
    """An If whose bodies read a tensor and a constant from outside."""

    def body(op: str) -> onnx.GraphProto:
        return helper.make_graph([helper.make_node(op, ["h", "w"], [op])], op, [], [onnx.ValueInfoProto(name=op)])

    nodes = [
        helper.make_node("Mul", ["x", "v"], ["h"]),
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["b"], then_branch=body("Add"), else_branch=body("Sub")),
        helper.make_node("Neg", ["b"], ["y"]),
    ]  # fmt: skip
    constants = {"v": normal(3), "w": normal(3) + 1, "zero": np.array(0, np.float32)}
    return built(nodes, constants, {"x": (1, [2, 3])})


@pytest.mark.parametrize("sign", [1, -1])
def test_the_chosen_branch_is_computed(sign: int) -> None:
    """An If computes the body that its condition chooses, and gradients reach what the body reads."""
    model = branching()
    module = OnnxModule(model, ["v", "w"])
    x = sign * np.abs(normal(2, 3))
    y = module(torch.from_numpy(x))
    assert spread(expected(model, x=x)[0], y.detach().numpy()) < 1e-6
    y.sum().backward()
    torch.testing.assert_close(module.get_parameter("w").grad, torch.full((3,), -2.0 * sign))
    with torch.no_grad():
        torch.testing.assert_close(module(torch.from_numpy(x)), y.detach())


def test_missing_operators_are_named_at_once() -> None:
    """Every operator without a kernel is in one message, those of bodies and of other domains too."""
    body = helper.make_graph(
        [helper.make_node("RandomNormalLike", ["h"], ["r"])], "r", [], [onnx.ValueInfoProto(name="r")]
    )
    nodes = [
        helper.make_node("Unique", ["x"], ["h"]),
        helper.make_node("If", ["c"], ["b"], then_branch=body, else_branch=body),
        helper.make_node("Strange", ["b"], ["y"], domain="else.where"),
    ]
    model = built(nodes, {"c": np.array(True)}, {"x": (1, [2, 3])})
    with pytest.raises(ModelError, match=r"RandomNormalLike, Unique, else\.where:Strange"):
        OnnxModule(model, [])


def test_results_have_the_outputs_order() -> None:
    """A graph may return an input, a constant and a tensor twice."""
    model = built([helper.make_node("Relu", ["x"], ["y"])], {"c": normal(2)}, {"x": (1, [2])}, ["c", "y", "x"])
    c, y, x = results(OnnxModule(model, [])(torch.tensor([-1.0, 2.0])))
    assert (c.tolist(), y.tolist(), x.tolist()) == (normal(2).tolist(), [0.0, 2.0], [-1.0, 2.0])
