"""A graph as a module: names, sharing, shapes, control flow, and what is written back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

pytest.importorskip("torch")

import torch
from torch import nn

import architectures
from agreement import normal, results, spread
from architectures import variants
from onnxprune import onnx_io, runtime
from onnxprune.errors import ModelError, UsageError
from onnxprune.train import OnnxModule

FIXTURES = Path(__file__).parents[2] / "fixtures"
DIGITS = onnx.load(FIXTURES / "digits" / "digits.onnx")
DYNAMIC = variants.with_dynamic_batch(architectures.ALL["resnet_a"]())


def built(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    inputs: dict[str, tuple[int, Sequence]],
    outputs: Sequence[str] = ("y",),
    **options,
) -> ModelProto:
    """A small model; inputs have a type and a shape."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9, **options)


def expected(model: ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    """What onnxruntime computes."""
    return runtime.Session(model.SerializeToString(), optimize=False, threads=1).run(feeds)


def image(model: ModelProto, batch: int = 1) -> np.ndarray:
    """Random input."""
    shape = [d.dim_value or 1 for d in model.graph.input[0].type.tensor_type.shape.dim]
    return normal(batch, *shape[1:])


def nudge(module: OnnxModule) -> None:
    """Change every parameter a little."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))


# -- written back ------------------------------------------------------------------------------------------------------

WRITTEN = {
    "digits": DIGITS,
    "dynamic_batch": DYNAMIC,
    "edsr": architectures.ALL["edsr"](),
    "constants_as_nodes": variants.constants_as_nodes(architectures.ALL["resnet_a"]()),
    "initializers_as_inputs": variants.initializers_as_inputs(architectures.ALL["resnet_a"]()),
}


@pytest.mark.parametrize("model", WRITTEN.values(), ids=WRITTEN)
def test_unchanged_parameters_give_the_same_bytes(model: ModelProto) -> None:
    """Nothing trained, nothing changed, and the model given is not touched."""
    before = model.SerializeToString()
    assert OnnxModule(model).to_onnx().SerializeToString() == before
    assert model.SerializeToString() == before


@pytest.mark.parametrize("model", WRITTEN.values(), ids=WRITTEN)
def test_changed_parameters_change_their_bytes_only(model: ModelProto) -> None:
    """Signature and nodes stay; onnxruntime computes from the written model what the module computes."""
    module = OnnxModule(model)
    nudge(module)
    written = module.to_onnx()
    differences, exact = onnx_io.compare(model, written)
    assert differences == ()
    assert not exact
    if model is not WRITTEN["constants_as_nodes"]:
        assert [n.SerializeToString() for n in written.graph.node] == [n.SerializeToString() for n in model.graph.node]
    onnx.checker.check_model(written)
    x = image(model)
    with torch.no_grad():
        given = module(torch.from_numpy(x))
    assert spread(expected(written, **{module.inputs[0]: x})[0], given.numpy()) < 1e-4


def test_numbers_in_other_fields_stay_there() -> None:
    """A tensor that holds its numbers as floats rather than bytes is left so where it does not change."""
    model = built([helper.make_node("Add", ["x", "b"], ["y"])], {}, {"x": (1, [2, 3])})
    model.graph.initializer.append(helper.make_tensor("b", 1, [3], [0.1, 0.2, 0.3]))
    assert not model.graph.initializer[0].raw_data
    assert OnnxModule(model, ["b"]).to_onnx() == model


def test_half_precision_is_kept_in_the_file() -> None:
    """Weights in half precision are trained in float32 and written in half precision."""
    weight = normal(3, 4).astype(np.float16)
    model = built([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}, {"x": (10, [2, 3])})
    module = OnnxModule(model, ["w"])
    assert module.get_parameter("w").dtype == torch.float32
    assert module.to_onnx() == model
    x = normal(2, 3).astype(np.float16)
    assert spread(expected(model, x=x)[0], module(torch.from_numpy(x)).detach().numpy()) < 1e-2
    nudge(module)
    written = module.to_onnx().graph.initializer[0]
    assert written.data_type == onnx.TensorProto.FLOAT16
    np.testing.assert_allclose(numpy_helper.to_array(written), weight, atol=0.1)


def test_state_of_another_run_is_written() -> None:
    """A state dict taken elsewhere can be written without loading it; an unknown name is refused."""
    module = OnnxModule(DIGITS)
    state = {name: 2 * value for name, value in module.state_dict().items()}
    written = {t.name: numpy_helper.to_array(t) for t in module.to_onnx(state).graph.initializer}
    for name, value in state.items():
        np.testing.assert_array_equal(written[name], value.numpy())
    with pytest.raises(UsageError, match="stranger"):
        module.to_onnx({"stranger": torch.ones(1)})


def test_constant_of_a_function_is_written() -> None:
    """Where a local function holds what is trained, the written model has it inlined."""
    body = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(normal(3, 4))),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
    ]
    function = helper.make_function("local", "Layer", ["a"], ["b"], body, [helper.make_opsetid("", 18)])
    model = built(
        [helper.make_node("Layer", ["x"], ["y"], domain="local")], {}, {"x": (1, [2, 3])}, functions=[function]
    )
    model.opset_import.append(helper.make_opsetid("local", 1))
    module = OnnxModule(model)
    assert len(list(module.parameters())) == 1
    nudge(module)
    x = normal(2, 3)
    assert spread(expected(module.to_onnx(), x=x)[0], module(torch.from_numpy(x)).detach().numpy()) < 1e-5


# -- names and state ---------------------------------------------------------------------------------------------------


def named() -> ModelProto:
    """A model whose constants have names that modules may not have."""
    nodes = [
        helper.make_node("MatMul", ["x", "/layer.0/weight"], ["h"]),
        helper.make_node("Add", ["h", "layer.0.bias"], ["y"]),
    ]
    return built(nodes, {"/layer.0/weight": normal(3, 4), "layer.0.bias": normal(4)}, {"x": (1, ["n", 3])})


class Wrapped(nn.Module):
    """A module that holds another, as those for several processes do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: nn.Sequential(m, nn.Linear(4, 2)), Wrapped], ids=["bare", "sequence", "wrapped"]
)
def test_state_survives(wrap) -> None:
    """Names with dots and slashes survive saving and strict loading, also inside another module."""
    source, target = wrap(OnnxModule(named())), wrap(OnnxModule(named()))
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    state = source.state_dict()
    assert any(key.endswith("layer.0.bias") for key in state)
    target.load_state_dict(state, strict=True)
    for key, value in target.state_dict().items():
        assert torch.equal(value, state[key])
    assert dict(source.named_parameters()).keys() == state.keys()


@pytest.mark.parametrize("change", ["missing", "unexpected", "unexpected_with_dots", "shape"])
def test_strict_loading_is_strict(change: str) -> None:
    """A state with a name too few, too many, or another shape is refused."""
    module = nn.Sequential(OnnxModule(named()))
    state = module.state_dict()
    if change == "missing":
        del state["0.layer.0.bias"]
    elif change == "shape":
        state["0.layer.0.bias"] = torch.ones(5)
    else:
        state["0.more" if change == "unexpected" else "0.more.of.it"] = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"layer\.0\.bias|more"):
        module.load_state_dict(state)


def test_copies_are_independent() -> None:
    """A deep copy has its own parameters under the same names, and computes the same."""
    module = OnnxModule(named())
    twin = copy.deepcopy(module)
    x = torch.from_numpy(normal(2, 3))
    assert torch.equal(module(x), twin(x))
    nudge(twin)
    assert not torch.equal(module(x), twin(x))


def test_shared_constant_is_one_parameter() -> None:
    """What two nodes read is one parameter, and its gradient is the sum of both."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    module = OnnxModule(built(nodes, {"w": normal(3, 3)}, {"x": (1, [2, 3])}))
    x, w = torch.from_numpy(normal(2, 3)), torch.from_numpy(normal(3, 3)).requires_grad_()
    module(x).sum().backward()
    (x @ w @ w).sum().backward()
    assert list(module.state_dict()) == ["w"]
    torch.testing.assert_close(module.get_parameter("w").grad, w.grad)


def test_only_floating_constants_are_trained() -> None:
    """Names that are no floating constants of the graph are refused."""
    for name in ("nobody", "x", "i"):
        nodes = [helper.make_node("Gather", ["x", "i"], ["y"])]
        with pytest.raises(ModelError, match=f"{name}: no floating-point constant"):
            OnnxModule(built(nodes, {"i": np.array([0])}, {"x": (1, [2, 3])}), [name])


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
