"""Cost equals the published figures, and under any plan the cost counted anew from the pruned graph."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import architectures
import onnxprune
import oracle
from onnxprune import onnx_io, runtime
from onnxprune.cost import KINDS, Cost
from onnxprune.coupling import Coupling
from onnxprune.passes.apply import apply
from onnxprune.passes.couple import couple
from onnxprune.plan import make_plan

FIXTURES = Path(__file__).parents[1] / "fixtures"
BUILDERS: dict[str, Callable[[], ModelProto]] = {
    **architectures.ALL,
    "digits": partial(onnx.load, FIXTURES / "digits" / "digits.onnx"),
    "denoise": partial(onnx.load, FIXTURES / "denoise" / "denoise.onnx"),
}


def of(model: ModelProto, input_shapes: dict[str, tuple[int, ...]] | None = None) -> dict[str, int]:
    """Cost of a whole model."""
    coupling = couple(onnx_io.read(model, input_shapes))
    return Cost(coupling).of(np.ones(coupling.n_classes, bool))


@pytest.mark.parametrize(
    ("build", "giga_macs", "kilo_weights", "mega_activations"),
    [
        pytest.param(architectures.edsr, 1428.06, 1367.4, 5076.1, id="edsr"),
        pytest.param(architectures.sid, 560.09, 7757.3, 1936.3, id="sid"),
    ],
)
def test_published_cost(
    build: architectures.Architecture, giga_macs: float, kilo_weights: float, mega_activations: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """EDSR and SID cost what the paper's Table 1 says, at its resolution, without running them.

    Activations would take 20 GB for EDSR; reading, coupling and counting stays below 200 MB of Python's memory.
    """

    def never(*_: object, **__: object) -> NoReturn:
        raise AssertionError("the model was run")

    model = build()
    monkeypatch.setattr(runtime, "Session", never)
    tracemalloc.start()
    cost = of(model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert round(cost["mac"] / 1e9, 2) == giga_macs
    assert round(cost["weights"] / 1e3, 1) == kilo_weights
    assert round(cost["activations"] / 1e6, 1) == mega_activations
    assert cost["bandwidth"] == cost["weights"] + cost["activations"]
    assert peak < 200e6


def test_exact_cost_of_edsr() -> None:
    """Per pixel EDSR takes 1,372,608 MAC and 4879 elements; the numbers are exact, not rounded floats."""
    cost = of(architectures.edsr())
    assert cost["mac"] == 1372608 * 1020**2
    assert cost["activations"] == 4879 * 1020**2
    assert cost["weights"] == 9 * (3 * 64 + 33 * 64 * 64 + 64 * 256 + 64 * 3)


@pytest.mark.parametrize(
    ("build", "giga_macs", "kilo_weights", "mega_activations"),
    [
        pytest.param(architectures.resnet, 0.041, 268.3, 0.4, id="resnet20"),
        pytest.param(architectures.resnet_bottleneck, 4.09, 25502.9, 21.8, id="resnet50"),
        pytest.param(architectures.resnext, 4.23, 24959.7, 28.4, id="resnext50"),
        pytest.param(architectures.mobilenet_v1, 0.57, 4209.1, 10.2, id="mobilenet_v1"),
        pytest.param(architectures.mobilenet_v2, 0.30, 3469.8, 13.4, id="mobilenet_v2"),
        pytest.param(architectures.squeeze_excite, 1.81, 11766.0, 4.7, id="squeeze_excite"),
        pytest.param(architectures.densenet, 2.83, 7894.2, 21.9, id="densenet121"),
    ],
)
def test_cost_in_the_readme(
    build: architectures.Architecture, giga_macs: float, kilo_weights: float, mega_activations: float
) -> None:
    """The published networks cost what the table in fixtures/README.md says, to its last digit."""
    cost = of(build())
    assert cost["mac"] / 1e9 == pytest.approx(giga_macs, abs=0.005 if giga_macs > 0.1 else 0.0005)
    assert cost["weights"] / 1e3 == pytest.approx(kilo_weights, abs=0.05)
    assert cost["activations"] / 1e6 == pytest.approx(mega_activations, abs=0.05)


# -- plans -------------------------------------------------------------------------------------------------------------


class Counted(NamedTuple):
    """Cost of a graph, counted node by node from its shapes."""

    mac: int
    weights: int
    activations: int
    params: int
    bytes: int


def counted(model: ModelProto, input_shapes: dict[str, tuple[int, ...]]) -> Counted:
    """Count without the tool: shapes come from onnx, weight elements times positions, no labels."""
    fixed = ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, input_shapes.get(value.name, ()), strict=False):
            dim.dim_value = size
    del fixed.graph.value_info[:]
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(fixed, strict_mode=True, data_prop=True).graph
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    constants = {tensor.name: tensor for tensor in fixed.graph.initializer}
    shapes |= {name: tuple(tensor.dims) for name, tensor in constants.items()}
    macs = weights = activations = 0
    for node in fixed.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        source, weight, result = (shapes[name] for name in (*node.input[:2], node.output[0]))
        rows = {
            "Conv": result[0] * math.prod(result[2:]),
            "ConvTranspose": source[0] * math.prod(source[2:]),
            "Gemm": source[0],
            "MatMul": math.prod(source[:-1]),
        }[node.op_type]
        macs += math.prod(weight) * rows
        weights += math.prod(weight)
        activations += math.prod(source) + math.prod(result)
    arrays = [numpy_helper.to_array(tensor) for tensor in constants.values()]
    return Counted(macs, weights, activations, sum(a.size for a in arrays), sum(a.nbytes for a in arrays))


@cache
def coupled(name: str) -> tuple[ModelProto, Coupling]:
    """Return a fixture and its coupling, made once."""
    model = BUILDERS[name]()
    return model, couple(onnx_io.read(model))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", BUILDERS)
def test_cost_of_a_plan_is_that_of_the_pruned_model(name: str, seed: int) -> None:
    """Any number of units of every bundle gives a valid graph, whose cost was predicted to the last MAC."""
    model, coupling = coupled(name)
    keep = oracle.any_keep(coupling, np.random.default_rng(seed))
    cost = Cost(coupling).of(keep)
    pruned = apply(model, coupling, make_plan(coupling, keep), keep)
    onnx.checker.check_model(pruned, full_check=True)
    found = counted(pruned, dict(coupling.model.input_shapes))
    assert {kind: cost[kind] for kind in found._fields} == found._asdict()
    assert cost["bandwidth"] == found.weights + found.activations
    assert of(pruned, dict(coupling.model.input_shapes)) == cost


@pytest.mark.parametrize("name", BUILDERS)
def test_removing_a_channel_never_costs(name: str) -> None:
    """No kind of cost rises when a channel goes (one of every row), and MAC or weights fall."""
    _, coupling = coupled(name)
    cost, rng = Cost(coupling), np.random.default_rng(4)
    before = {kind: cost.total(kind, cost.counts(np.ones(coupling.n_classes, bool))) for kind in KINDS}
    for bundle in coupling.bundles:
        keep = np.ones(coupling.n_classes, bool)
        keep[bundle.units(rng.random(coupling.n_classes))[0]] = False
        after = {kind: cost.total(kind, cost.counts(keep)) for kind in KINDS}
        assert all(after[kind] <= before[kind] for kind in KINDS)
        assert after["mac"] < before["mac"] or after["weights"] < before["weights"]


@pytest.mark.parametrize("name", ["edsr", "resnext", "squeeze_excite_gemm", "c2f_detector", "layer_norm_mlp"])
def test_layers_sum_up(name: str) -> None:
    """The report's layers add up to the totals, before and after."""
    report = onnxprune.prune(BUILDERS[name](), target_mac=0.6, proof=False).report
    for kind, before, after in (("mac", "mac_before", "mac_after"), ("weights", "weights_before", "weights_after")):
        assert sum(getattr(layer, before) for layer in report.layers) == report.before[kind]
        assert sum(getattr(layer, after) for layer in report.layers) == report.after[kind]


def test_increment_says_what_a_channel_adds() -> None:
    """Counts change by ``increment`` when one channel is put back."""
    _, coupling = coupled("c2f_detector")
    cost, keep = Cost(coupling), oracle.any_keep(coupling, np.random.default_rng(5))
    for channel in np.flatnonzero(~keep)[::7]:
        atoms, times = cost.increment(channel)
        expected = cost.counts(keep)
        expected[atoms] += times
        more = keep.copy()
        more[channel] = True
        np.testing.assert_array_equal(cost.counts(more), expected)


def test_product_of_activations_counts() -> None:
    """A MatMul of two activations costs rows times shared length times columns, and holds no weights."""
    weights = {name: np.ones((6, 6), np.float32) for name in ("wq", "wk")}
    nodes = [
        helper.make_node("MatMul", ["x", "wq"], ["q"]),
        helper.make_node("MatMul", ["x", "wk"], ["k"]),
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "scores",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 5, 6))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 5, 5))],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    cost = of(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert cost["mac"] == 2 * 5 * 6 * 6 + 5 * 6 * 5
    assert cost["weights"] == 2 * 36


def test_shared_weight_is_stored_once_and_used_twice() -> None:
    """A weight that two layers share counts its MAC twice and its elements once."""
    weight = numpy_helper.from_array(np.ones((4, 4, 1, 1), np.float32), "w")
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"]), helper.make_node("Conv", ["a", "w"], ["y"])]
    image = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 4, 3, 3)) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "tied", image[:1], image[1:], [weight])
    cost = of(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert cost["mac"] == 2 * 16 * 9
    assert cost["weights"] == cost["params"] == 16
    assert cost["activations"] == 2 * 2 * 36
