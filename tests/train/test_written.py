"""What is written back, and what a state holds: names, sharing, bytes."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

pytest.importorskip("torch")

import torch
from torch import nn

import architectures
from agreement import built, expected, image, normal, nudge, spread
from architectures import variants
from onnxprune import onnx_io
from onnxprune.errors import ModelError, UsageError
from onnxprune.train import OnnxModule

FIXTURES = Path(__file__).parents[2] / "fixtures"
DIGITS = onnx.load(FIXTURES / "digits" / "digits.onnx")
DYNAMIC = variants.with_dynamic_batch(architectures.ALL["resnet_a"]())


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
