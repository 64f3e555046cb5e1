"""Two plans in a row are one plan for the original: the same tensors, and ``verify`` accepts what both made."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

import architectures
import onnxprune
from graphs import Tiny
from onnxprune import Plan, onnx_io, pipeline
from onnxprune.compose import compose
from onnxprune.options import Clock, ModelLike, Options

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "fixtures"
ZOO = ROOT.parent / "shared" / "zoo"
needs_zoo = pytest.mark.skipif(not ZOO.is_dir(), reason=f"the architectures are not there: {ZOO}")


def in_steps(model: ModelLike, shares: Sequence[float], **chosen: Any) -> tuple[list[onnxprune.Result], Plan]:
    """Prune to shares of the original's MAC, one after another; the steps, and their plans as one."""
    macs = onnxprune.inspect(model).before["mac"]
    steps: list[onnxprune.Result] = []
    for share in shares:
        given = steps[-1].model if steps else model
        steps.append(onnxprune.prune(given, target_mac=share * macs, proof=False, **chosen))
    coupling = pipeline.load(model, Options(), Clock(), steps[0].plan).coupling
    plan = steps[0].plan
    for step in steps[1:]:
        plan = compose(plan, step.plan, coupling)
    return steps, Plan.from_json(json.dumps(plan.to_json()))


def initializers(model: ModelProto) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Shape and bytes of every initializer."""
    return {t.name: (tuple(t.dims), numpy_helper.to_array(t).tobytes()) for t in model.graph.initializer}


def check(model: ModelLike, shares: Sequence[float] = (0.8, 0.6), **chosen: Any) -> None:
    """The composed plan makes the same tensors as the steps, and ``verify`` says so."""
    steps, plan = in_steps(model, shares, **chosen)
    assert initializers(onnxprune.apply(model, plan, proof=False).model) == initializers(steps[-1].model)
    report = onnxprune.verify(model, steps[-1].model, plan)
    assert report.weights == "exact"
    assert report.after["mac"] == steps[-1].report.after["mac"]


@pytest.mark.parametrize("name", architectures.ALL)
def test_two_steps_are_one_plan(name: str) -> None:
    """Pruned to 80 % and then to 60 % of the original's MAC, every architecture is what the composed plan makes."""
    check(architectures.ALL[name]())


@pytest.mark.parametrize("name", ["edsr", "resnext", "mobilenet_v2", "densenet", "dynamic_reshape_constant"])
def test_three_steps_in_random_order(name: str) -> None:
    """Composing again goes on: three steps that remove channels at random are one plan, too."""
    check(architectures.ALL[name](), (0.85, 0.7, 0.55), criterion="random")


@pytest.mark.parametrize("name", ["digits", "denoise"])
def test_trained_fixtures(name: str) -> None:
    """So it is with trained networks."""
    check(FIXTURES / name / f"{name}.onnx")


@pytest.mark.parametrize("name", ["digits", pytest.param("denoise", marks=pytest.mark.slow)])
def test_compensated_steps_verify(name: str) -> None:
    """Where each step fits the weights to calibration data, what both made still verifies by the composed plan."""
    path = FIXTURES / name / f"{name}.onnx"
    steps, plan = in_steps(path, (0.8, 0.6), calib=FIXTURES / name / f"{name}_calib.npz")
    assert onnxprune.verify(path, steps[-1].model, plan).weights == "changed"


@needs_zoo
@pytest.mark.parametrize("name", ["shuffle_group", "gru_seq", "gn_resnet", "v_script_if", "hf_llama_gqa-dynamo"])
def test_real_exports(name: str, tmp_path: Path) -> None:
    """Shared shape constants, control flow, grouped convolutions and heads of real exports compose as well."""
    path = tmp_path / "model.onnx"
    subprocess.run([sys.executable, ZOO / "fill.py", name, path], check=True, capture_output=True)
    check(path)


# -- biases that compensation added ------------------------------------------------------------------------------------


def products() -> ModelProto:
    """Matrix products without biases, which compensation has to put behind them; and a shared vector."""
    t = Tiny()
    y, shared = t.input(4, 8), t.constant([0.0] * 8, "zeros")
    for layer in "abcd":
        y = t.node("MatMul", y, t.random(8, 8, name=f"{layer}.w", scale=0.4), name=layer)
        y = t.node("Relu", y, name=f"{layer}.relu")
    for layer in "ef":
        y = t.node("Gemm", y, t.random(8, 8, name=f"{layer}.w", scale=0.4), shared, name=layer)
        y = t.node("Relu", y, name=f"{layer}.relu")
    return t.build(t.node("MatMul", y, t.random(8, 3, name="last.w"), name="last"))


FEEDS = [{"x": 1 + np.random.default_rng(seed).standard_normal((4, 8)).astype(np.float32)} for seed in range(64)]


def test_added_biases_are_sliced_by_later_steps() -> None:
    """A bias that the first step added is listed with the size that the second leaves it, and verifies."""
    model = products()
    steps, plan = in_steps(model, (0.8, 0.6, 0.4, 0.25), calib=FEEDS)
    added = {name for step in steps for name in step.plan.added}
    assert plan.added.keys() == added
    assert {entry["input"] for entry in plan.added.values()} == {None, 2}
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in steps[-1].model.graph.initializer}
    assert {name: entry["size"] for name, entry in plan.added.items()} == {name: sizes[name] for name in added}
    shrunk = {e["input"] for step in steps for name, e in step.plan.added.items() if e["size"] > sizes[name]}
    assert shrunk == {None, 2}
    onnxprune.verify(model, steps[-1].model, plan)


def test_added_bias_elsewhere_is_refused() -> None:
    """A composed plan does not let biases pass that stand elsewhere than it says."""
    model = products()
    steps, plan = in_steps(model, (0.8, 0.6, 0.4), calib=FEEDS)
    name, entry = next((name, entry) for name, entry in plan.added.items() if entry["input"] is None)
    wrong = Plan.from_json(json.dumps({**plan.to_json(), "added": {**plan.added, name: {**entry, "node": "a"}}}))
    assert entry["node"] != "a"
    with pytest.raises(onnxprune.ModelError, match=name):
        onnxprune.verify(model, steps[-1].model, wrong)


# -- what does not compose ---------------------------------------------------------------------------------------------


def test_plans_of_other_models_are_refused() -> None:
    """A second plan that was made for something else than the first one's result is an error that says so."""
    model = architectures.ALL["edsr"]()
    first = onnxprune.prune(model, target_mac=0.6, proof=False).plan
    other = onnxprune.prune(architectures.ALL["resnet_a"](), target_mac=0.6, proof=False).plan
    coupling = pipeline.load(model, Options(), Clock(), first).coupling
    with pytest.raises(onnxprune.ModelError, match="not made for the first one's result"):
        compose(first, other, coupling)
    again = onnxprune.prune(model, target_mac=0.3, criterion="random", proof=False).plan
    with pytest.raises(onnxprune.OnnxPruneError):
        compose(first, again, coupling)


def test_biases_that_replace_added_ones_are_refused() -> None:
    """A bias in the place of one that was added before has no place in the original."""
    model = products()
    steps, _ = in_steps(model, (0.8,), calib=FEEDS)
    first = steps[0].plan
    coupling = pipeline.load(model, Options(), Clock(), first).coupling
    entry = {"node": "a", "input": 2, "replaces": next(iter(first.added)), "size": 8}
    with pytest.raises(onnxprune.ModelError, match="added before"):
        compose(first, Plan({}, (), added={"another": entry}), coupling)


# -- comparing reader by reader ----------------------------------------------------------------------------------------


def test_copies_for_single_readers_make_no_difference() -> None:
    """A shape constant that one reader has as a copy of its own compares equal, with the right value only."""
    t = Tiny()
    x = t.node("Relu", t.input(1, 4), name="y")
    shape = t.constant([2, 2], "shape")
    model = t.build(t.node("Add", t.node("Reshape", x, shape, name="r"), t.node("Reshape", "x", shape, name="s")))
    copied = ModelProto.FromString(model.SerializeToString())
    copied.graph.node[1].input[1] = "shape@r"
    copied.graph.initializer.append(numpy_helper.from_array(np.array([2, 2]), "shape@r"))
    assert onnx_io.compare(model, copied) == onnx_io.compare(copied, model) == ((), True)
    copied.graph.initializer[-1].CopyFrom(numpy_helper.from_array(np.array([4, 1]), "shape@r"))
    assert onnx_io.compare(model, copied) == (("shape@r holds other integers",), False)
    copied.graph.node[1].input[1] = "shape@s"
    copied.graph.initializer[-1].name = "shape@s"
    assert onnx_io.compare(model, copied)[0]


def test_constant_in_the_place_of_a_result_is_a_difference() -> None:
    """A node that reads a constant where the other model's reads what is computed differs from it."""
    t = Tiny()
    t.node("Relu", t.input(1, 4), name="y")
    model = t.build(t.node("Neg", "y", name="z"))
    other = onnx.ModelProto.FromString(model.SerializeToString())
    other.graph.node[1].input[0] = "y@z"
    other.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 4), np.float32), "y@z"))
    assert onnx_io.compare(model, other)[0]
