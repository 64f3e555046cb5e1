"""A torch checkpoint sliced by the plan of an ONNX model computes, in a narrower module, what the pruned model computes."""

from __future__ import annotations

from collections import OrderedDict
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxprune
from onnxprune.errors import ModelError, UsageError
from onnxprune.plan import Plan

torch = pytest.importorskip("torch")
nn = torch.nn

EPS = 1e-5
MAP = {
    "onnx::Conv_20": "conv1.weight",
    "onnx::Conv_21": ["conv1.bias", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"],
    "onnx::Conv_22": "conv2.weight",
    "onnx::Conv_23": ["bn2.weight", "bn2.bias", "bn2.running_mean", "bn2.running_var"],
    "onnx::MatMul_24": {"name": "fc1.weight", "axes": [1, 0]},
}


def network(stem: int, mixed: int, hidden: int) -> Any:
    """Convolution, grouped convolution, both with batch normalization, and two linear layers."""
    parts = OrderedDict(
        conv1=nn.Conv2d(3, stem, 3, padding=1), bn1=nn.BatchNorm2d(stem), relu1=nn.ReLU(),
        conv2=nn.Conv2d(stem, mixed, 3, groups=2, bias=False), bn2=nn.BatchNorm2d(mixed), relu2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc1=nn.Linear(mixed, hidden), relu3=nn.ReLU(),
        fc2=nn.Linear(hidden, 5),
    )  # fmt: skip
    return nn.Sequential(parts).eval()


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """Return the state dict of a network, its statistics far from their initial values."""
    torch.manual_seed(7)
    state = network(16, 12, 60).state_dict()
    for name, tensor in state.items():
        if "bn" in name and tensor.dim():
            state[name] = torch.rand_like(tensor) + 0.5
    return state


def exported(state: dict[str, Any]) -> onnx.ModelProto:
    """Return what exporters make of it: normalizations folded into nameless weights, a transposed linear layer."""
    arrays = {name: tensor.double().numpy() for name, tensor in state.items()}

    def folded(conv: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
        gain = arrays[f"{norm}.weight"] / np.sqrt(arrays[f"{norm}.running_var"] + EPS)
        bias = arrays.get(f"{conv}.bias", 0) - arrays[f"{norm}.running_mean"]
        return arrays[f"{conv}.weight"] * gain[:, None, None, None], bias * gain + arrays[f"{norm}.bias"]

    weights = dict(zip(("onnx::Conv_20", "onnx::Conv_21"), folded("conv1", "bn1"), strict=True))
    weights |= dict(zip(("onnx::Conv_22", "onnx::Conv_23"), folded("conv2", "bn2"), strict=True))
    weights["onnx::MatMul_24"] = arrays["fc1.weight"].T
    weights |= {name: arrays[name] for name in ("fc1.bias", "fc2.weight", "fc2.bias")}
    nodes = [
        helper.make_node("Conv", ["x", "onnx::Conv_20", "onnx::Conv_21"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "onnx::Conv_22", "onnx::Conv_23"], ["c"], group=2),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("MatMul", ["f", "onnx::MatMul_24"], ["g"]),
        helper.make_node("Add", ["g", "fc1.bias"], ["h"]),
        helper.make_node("Relu", ["h"], ["i"]),
        helper.make_node("Gemm", ["i", "fc2.weight", "fc2.bias"], ["y"], transB=1),
    ]
    tensors = [numpy_helper.from_array(np.ascontiguousarray(w, np.float32), n) for n, w in weights.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 9, 9])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])]
    graph = helper.make_graph(nodes, "net", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def pruned(trained: dict[str, Any]) -> onnxprune.Result:
    """Prune the exported network until every kind of layer is cut."""
    return onnxprune.prune(exported(trained), target_params=0.3)


def loaded(path: Path) -> Any:
    """Load what was written into a module as narrow as its parameters."""
    state = torch.load(path, weights_only=True)
    module = network(state["conv1.weight"].shape[0], state["conv2.weight"].shape[0], state["fc1.weight"].shape[0])
    module.load_state_dict(state)
    return module


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_sliced_state_computes_what_the_pruned_model_does(
    suffix: str, trained: dict[str, Any], pruned: onnxprune.Result, tmp_path: Path
) -> None:
    """The narrower module with the sliced state gives the outputs of the pruned graph, also by way of safetensors."""
    torch.save(trained, tmp_path / "in.pt")
    out = tmp_path / f"out{suffix}"
    summary = onnxprune.apply_checkpoint(pruned.plan, tmp_path / "in.pt", out, mapping=MAP)
    assert summary.notes == ()
    assert {"conv1.weight", "conv2.weight", "bn1.running_var", "fc1.weight"} <= set(summary.mapped)
    assert {"fc2.bias", "bn1.num_batches_tracked"} <= set(summary.copied)
    if suffix == ".safetensors":
        onnxprune.apply_checkpoint(Plan({}, ()), out, tmp_path / "back.pt")
        out = tmp_path / "back.pt"
    x = np.random.default_rng(1).standard_normal((1, 3, 9, 9)).astype(np.float32)
    session = onnxruntime.InferenceSession(pruned.model.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        given = loaded(out)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(given, session.run(None, {"x": x})[0], rtol=1e-4, atol=1e-5)


def test_plan_cuts_every_kind_of_axis(pruned: onnxprune.Result) -> None:
    """The test above is about grouped rows, folded biases, and both axes of a transposed matrix."""
    slices = pruned.plan.initializers
    assert isinstance(slices["onnx::Conv_22"][1][0], list)
    assert set(slices["onnx::MatMul_24"]) == {0, 1}
    assert set(MAP) <= set(slices)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_nested_state_dict(key: str, trained: dict[str, Any], pruned: onnxprune.Result, tmp_path: Path) -> None:
    """A state dict inside a training checkpoint is sliced in place; what lies beside it stays, and the note names it."""
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(16)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    content = {"epoch": 3, key: trained, "optimizer": optimizer, "ema": {"conv1.weight": torch.ones(16, 3, 3, 3)}}
    torch.save(content, tmp_path / "in.pt")
    (note,) = onnxprune.apply_checkpoint(pruned.plan, tmp_path / "in.pt", tmp_path / "out.pt", mapping=MAP).notes
    assert "optimizer, ema" in note
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(written) == list(content)
    assert written["epoch"] == 3
    assert written["optimizer"]["param_groups"] == optimizer["param_groups"]
    assert torch.equal(written["ema"]["conv1.weight"], content["ema"]["conv1.weight"])
    assert list(written[key]) == list(trained)
    assert written[key]["conv1.weight"].shape[0] < 16
    with pytest.raises(UsageError, match="a nested state dict"):
        onnxprune.apply_checkpoint(pruned.plan, tmp_path / "in.pt", tmp_path / "out.safetensors", mapping=MAP)


def test_nothing_else_changes(tmp_path: Path) -> None:
    """Order, data types, parameters as such, values that are no tensors and torch's own notes on the dict stay."""
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    state = module.state_dict()
    state["half"] = torch.arange(6).to(torch.bfloat16).reshape(2, 3)
    state["own"] = nn.Parameter(torch.ones(4), requires_grad=False)
    state["turned"] = torch.arange(12.0).reshape(3, 4).T
    state["_extra_state"] = {"version": 2}
    torch.save(state, tmp_path / "in.pth")
    plan = Plan({"half": {1: [2, 0]}, "own": {0: [1]}, "turned": {0: [3]}}, ())
    onnxprune.apply_checkpoint(plan, tmp_path / "in.pth", tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(written) == list(state)
    assert written._metadata == state._metadata
    assert torch.equal(written["half"], state["half"][:, [2, 0]])
    assert isinstance(written["own"], nn.Parameter)
    assert not written["own"].requires_grad
    assert written["turned"].tolist() == [[3, 7, 11]]
    assert written["_extra_state"] == {"version": 2}
    assert torch.equal(written["0.weight"], state["0.weight"])
    assert written["1.num_batches_tracked"].dtype == torch.int64
    with pytest.raises(UsageError, match="_extra_state, which is no plain tensor"):
        onnxprune.apply_checkpoint(plan, tmp_path / "in.pth", tmp_path / "out.safetensors")


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    """A parameter that is the same memory as a sliced one is sliced with it, and both stay one tensor."""
    table = torch.arange(12.0).reshape(4, 3)
    torch.save({"embed.weight": table, "head.weight": table, "copy": table.clone()}, tmp_path / "in.pt")
    plan = Plan({"embed.weight": {1: [0, 2]}}, ())
    onnxprune.apply_checkpoint(plan, tmp_path / "in.pt", tmp_path / "out.pt")
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(written["head.weight"], table[:, [0, 2]])
    assert written["head.weight"].data_ptr() == written["embed.weight"].data_ptr()
    assert written["copy"].shape == (4, 3)
    with pytest.raises(ModelError, match="two different slices"):
        onnxprune.apply_checkpoint(
            Plan({**plan.initializers, "head.weight": {1: [0, 1]}}, ()), tmp_path / "in.pt", tmp_path / "o.pt"
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(nn.Linear(2, 2), "save model.state_dict()", id="module"),
        pytest.param([1, 2], "holds no state dict", id="list"),
        pytest.param({"net": {"w": torch.ones(2)}}, "holds no state dict", id="unknown_entry"),
        pytest.param(None, "cannot load it as plain data", id="garbage"),
    ],
)
def test_files_without_a_state_dict(content: Any, message: str, tmp_path: Path) -> None:
    """Pickled modules (whose code is not run), other content and garbage are refused in words."""
    if content is None:
        (tmp_path / "in.pt").write_bytes(b"garbage")
    else:
        torch.save(content, tmp_path / "in.pt")
    with pytest.raises(ModelError, match=message.replace("(", r"\(").replace(")", r"\)")):
        onnxprune.apply_checkpoint(Plan({}, ()), tmp_path / "in.pt", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


HOLLOW = {
    "giant": lambda: torch.zeros(2, 1).expand(2, 1 << 33),
    "expanded": lambda: torch.zeros(2, 1).expand(2, 4),
    "meta": lambda: torch.empty(2, 4, device="meta"),
    "sparse": lambda: torch.zeros(2, 4).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", HOLLOW)
def test_tensors_without_elements_of_their_own(kind: str, tmp_path: Path) -> None:
    """What claims more elements than the file holds is never unfolded: it stays as it is, and slicing it is refused."""
    torch.save({"w": HOLLOW[kind](), "strided": torch.arange(6.0).reshape(3, 2)[:, 1]}, tmp_path / "in.pt")
    onnxprune.apply_checkpoint(Plan({"strided": {0: [0, 2]}}, ()), tmp_path / "in.pt", tmp_path / "out.pt")
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert written["strided"].tolist() == [1, 5]
    assert written["w"].is_nested or written["w"].shape == HOLLOW[kind]().shape
    with pytest.raises(ModelError, match="1 tensors of the plan are no parameters"):
        onnxprune.apply_checkpoint(Plan({"w": {0: [0]}}, ()), tmp_path / "in.pt", tmp_path / "o.pt")
    with pytest.raises(UsageError, match="w, which is no plain tensor"):
        onnxprune.apply_checkpoint(Plan({}, ()), tmp_path / "in.pt", tmp_path / "o.safetensors")


def test_content_that_holds_itself(tmp_path: Path) -> None:
    """Lists that hold themselves, or one another over and over, are searched for tensors once."""
    itself: list[Any] = []
    itself.append(itself)
    doubled = reduce(lambda inner, _: [inner, inner], range(40), [])
    torch.save({"state_dict": {"w": torch.zeros(4)}, "itself": itself, "doubled": doubled}, tmp_path / "in.pt")
    plan = Plan({"w": {0: [0]}}, ())
    assert onnxprune.apply_checkpoint(plan, tmp_path / "in.pt", tmp_path / "out.pt").notes == ()
