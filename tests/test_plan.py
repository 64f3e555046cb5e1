"""A plan survives JSON, is refused where it is malformed, and replays on siblings and on bare arrays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

import architectures
import onnxprune
import oracle
from graphs import sandwich
from onnxprune import Plan, onnx_io
from onnxprune.passes.couple import couple
from onnxprune.plan import keep_of_groups

FIXTURES = Path(__file__).parents[1] / "fixtures"


def plan_of(name: str, share: float = 0.6) -> tuple[ModelProto, onnxprune.Result]:
    """Prune one fixture without proof."""
    model = architectures.ALL[name]()
    return model, onnxprune.prune(model, target_mac=share, proof=False)


@pytest.mark.parametrize("name", architectures.ALL)
def test_json_round_trip(name: str) -> None:
    """A plan read back from its JSON text is the same plan, and writes the same text."""
    plan = plan_of(name)[1].plan
    text = json.dumps(plan.to_json())
    again = Plan.from_json(text)
    assert again.to_json() == plan.to_json()
    assert {n: {a: list(k) for a, k in s.items()} for n, s in plan.initializers.items()} == again.initializers
    assert again.groups == plan.groups
    assert again.inputs == plan.inputs


def test_json_has_the_documented_form() -> None:
    """Schema, model with hash and inputs, kept indices by name and axis, and a mask per group."""
    result = onnxprune.prune(FIXTURES / "digits" / "digits.onnx", target_mac=0.6, proof=False)
    data = json.loads(json.dumps(result.plan.to_json()))
    assert data["schema"] == 1
    assert set(data["model"]) == {"sha256", "inputs"}
    assert len(data["model"]["sha256"]) == 64
    assert data["model"]["inputs"] == {"image": [1, 1, 8, 8]}
    for axes in data["initializers"].values():
        for axis, kept in axes.items():
            assert axis.isdigit()
            assert kept == sorted(set(kept))
            assert all(isinstance(index, int) for index in kept)
    for group in data["groups"]:
        assert {"id", "size", "keep"} <= set(group)
        assert len(group["keep"]) == group["size"]
        assert all(isinstance(value, bool) for value in group["keep"])


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("not json", id="text"),
        pytest.param("[]", id="list"),
        pytest.param("3", id="number"),
        pytest.param("null", id="null"),
        pytest.param("{}", id="no_schema"),
        pytest.param('{"schema": 2, "initializers": {}}', id="other_schema"),
        pytest.param('{"schema": 1}', id="no_initializers"),
        pytest.param('{"schema": 1, "initializers": []}', id="initializers_list"),
        pytest.param('{"schema": 1, "initializers": {"w": [0, 1]}}', id="no_axis"),
        pytest.param('{"schema": 1, "initializers": {"w": {"x": [0]}}}', id="axis_no_number"),
        pytest.param('{"schema": 1, "initializers": {"w": {"0": 3}}}', id="kept_no_list"),
        pytest.param('{"schema": 1, "initializers": {"w": {"0": ["a"]}}}', id="kept_no_numbers"),
        pytest.param('{"schema": 1, "initializers": {"w": {"0": [null]}}}', id="kept_null"),
        pytest.param('{"schema": 1, "initializers": {"w": {"1": [[[0, 1]]]}}}', id="kept_three_deep"),
        pytest.param('{"schema": 1, "initializers": {"w": {"1": [0, [1]]}}}', id="kept_list_behind_number"),
        pytest.param('{"schema": 1, "initializers": {"w": {"1": [[1], 0]}}}', id="kept_number_behind_list"),
        pytest.param('{"schema": 1, "initializers": {}, "groups": [{"size": 3}]}', id="group_without_id"),
        pytest.param('{"schema": 1, "initializers": {}, "groups": 5}', id="groups_number"),
        pytest.param('{"schema": 1, "initializers": {}, "model": 5}', id="model_number"),
        pytest.param('{"schema": 1, "initializers": {"w": {"-1": [0]}}}', id="axis_negative"),
        pytest.param('{"schema": 1, "initializers": {"%s": {"0": [0]}}}' % ("@" * 20_000), id="name_of_marks"),
        pytest.param('{"schema": 1, "initializers": {}, "attention": "both"}', id="attention"),
        pytest.param('{"schema": 1, "initializers": {}, "added": 5}', id="added_number"),
        pytest.param('{"schema": 1, "initializers": {}, "added": "x"}', id="added_text"),
        pytest.param('{"schema": 1, "initializers": {}, "added": [1]}', id="added_list"),
        pytest.param('{"schema": 1, "initializers": {}, "added": {"b": 5}}', id="added_entry_number"),
        pytest.param(
            '{"schema": 1, "initializers": {}, "added": {"b": {"node": "n", "input": "0", "replaces": ""}}}',
            id="added_input_text",
        ),
        pytest.param('{"schema": 1, "initializers": {}, "model": {"inputs": {"x": "12"}}}', id="shape_text"),
        pytest.param('{"schema": 1, "initializers": {}, "model": {"inputs": {"x": [1.5]}}}', id="shape_fraction"),
        pytest.param(json.dumps({"schema": 1, "initializers": {}, "model": {"inputs": {"x": [1] * 65}}}), id="axes"),
    ],
)
def test_malformed_text_is_a_model_error(text: str) -> None:
    """Anything but a plan is a ModelError of one line."""
    with pytest.raises(onnxprune.ModelError) as caught:
        Plan.from_json(text)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def edited(plan: Plan, change: Callable[[dict[str, Any]], object]) -> Plan:
    """The plan after a change of its JSON's initializers."""
    data = json.loads(json.dumps(plan.to_json()))
    change(data["initializers"])
    return Plan.from_json(json.dumps(data))


WEIGHT = "body0/Conv/weight"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda slices: slices.update(nowhere={"0": [0]}), id="unknown_tensor"),
        pytest.param(lambda slices: slices.update({f"{WEIGHT}@nowhere": {"0": [0]}}), id="unknown_reader"),
        pytest.param(lambda slices: slices[WEIGHT].update({"9": [0]}), id="unknown_axis"),
        pytest.param(lambda slices: slices[WEIGHT].update({"0": []}), id="keeps_nothing"),
        pytest.param(lambda slices: slices[WEIGHT].update({"0": [-1]}), id="negative_index"),
        pytest.param(lambda slices: slices[WEIGHT].update({"0": [0, 16]}), id="index_too_large"),
        pytest.param(lambda slices: slices[WEIGHT].update({"2": [0]}), id="kernel_axis"),
        pytest.param(lambda slices: slices[WEIGHT].update({"0": [0, 0, 1]}), id="index_twice"),
        pytest.param(lambda slices: slices[WEIGHT].update({"0": [1, 0]}), id="unsorted"),
        pytest.param(lambda slices: slices.pop(WEIGHT), id="tensor_missing"),
        pytest.param(lambda slices: slices.update(mean={"1": [0, 1]}), id="frozen_tensor"),
    ],
)
def test_plan_that_does_not_fit_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    """A plan that names what the model does not have, or leaves it inconsistent, is an error and gives no model."""
    model, result = plan_of("edsr")
    assert onnxprune.apply(model, edited(result.plan, lambda slices: None)).report.proof.ok
    with pytest.raises(onnxprune.OnnxPruneError) as caught:
        onnxprune.apply(model, edited(result.plan, change))
    assert caught.value.exit_code in (3, 5)


@pytest.mark.parametrize("shape", [[], [0, 1, 8, 8], [1, 1, 8, 10**30], [1, 1, 9, 8]], ids=str)
def test_plan_of_other_inputs_is_to_blame_itself(shape: list[int], tmp_path: Path) -> None:
    """Input shapes of a plan that the model cannot take are the plan's fault, not that of an option nobody gave."""
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"schema": 1, "initializers": {}, "model": {"inputs": {"image": shape}}}))
    with pytest.raises(onnxprune.ModelError, match=r"^the plan is of a model with other inputs: image: \["):
        onnxprune.apply(FIXTURES / "digits" / "digits.onnx", path)


# -- groups of a convolution: each keeps channels of its own -------------------------------------------------------------


def grouped() -> ModelProto:
    """A convolution of two groups of four channels between two dense ones."""
    return sandwich(lambda t, y: t.conv(y, "op", 8, 8, 3, group=2), 8)


@pytest.mark.parametrize("build", [grouped, architectures.ALL["resnext"]], ids=["small", "resnext"])
def test_grouped_convolution_has_a_list_per_group(build: Callable[[], ModelProto]) -> None:
    """Axis 1 of its weight keeps a list for each block of axis 0, in the JSON, too: equally long, but not the same."""
    model = build()
    result = onnxprune.prune(model, target_mac=0.6)
    text = json.dumps(result.plan.to_json())
    slices = json.loads(text)["initializers"]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nested = {}
    for node in model.graph.node:
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        kept = slices.get(node.input[1], {}).get("1") if groups > 1 else None
        if kept is not None:
            nested[node.input[1]] = kept
            assert len(kept) == groups
    assert nested
    for name, kept in nested.items():
        assert len({len(row) for row in kept}) == 1
        assert all(row == sorted(set(row)) and 0 <= row[0] <= row[-1] < constants[name].shape[1] for row in kept)
    assert any(row != kept[0] for kept in nested.values() for row in kept)
    again = onnxprune.apply(model, Plan.from_json(text))
    assert again.report.proof.ok
    assert again.model.SerializeToString() == result.model.SerializeToString()
    pruned = {tensor.name: numpy_helper.to_array(tensor) for tensor in result.model.graph.initializer}
    for name in nested:
        np.testing.assert_array_equal(oracle.sliced(constants[name], slices[name]), pruned[name])


def keeping(first: list, inner: list) -> Callable[[dict[str, Any]], None]:
    """Keep these channels in front of the grouped convolution, these in its groups, and everything else."""

    def change(slices: dict[str, Any]) -> None:
        slices.clear()
        slices.update({"a.w": {"0": first}, "a.b": {"0": first}, "op.w": {"1": inner}})

    return change


def test_plan_by_hand_chooses_in_every_group() -> None:
    """Whichever channels a plan written by hand keeps in each group, as many in both: it is applied and proved."""
    model = grouped()
    plan = onnxprune.prune(model, target_mac=0.6).plan
    for first, inner in (([0, 3, 5, 6], [[0, 3], [1, 2]]), ([0, 1, 4, 5], [[0, 1], [0, 1]]), ([3, 4], [[3], [0]])):
        result = onnxprune.apply(model, edited(plan, keeping(first, inner)))
        assert result.report.proof.ok
        shapes = {tensor.name: list(tensor.dims) for tensor in result.model.graph.initializer}
        assert (shapes["a.w"][0], shapes["op.w"][1]) == (len(first), len(first) // 2)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        pytest.param(keeping([0, 1, 2, 4], [[0, 1, 2], [0]]), "unequal numbers", id="other_number_per_group"),
        pytest.param(keeping([0, 1, 2, 4, 5], [[0, 1, 2], [0, 1]]), "unequal numbers", id="one_more_in_a_group"),
        pytest.param(keeping([0, 1, 2, 3, 4], [[0, 1, 2, 3], [0]]), "unequal numbers", id="one_group_whole"),
        pytest.param(keeping([0, 1, 4, 5], [[0, 1]] * 3), "3 rows of op.w axis 1, which has 2", id="too_many_groups"),
        pytest.param(keeping([0, 1, 4, 5], [[0, 1], []]), "indices of op.w axis 1", id="empty_group"),
        pytest.param(keeping([0, 1, 4, 5], [[0, 1], [4, 5]]), "indices of op.w axis 1", id="indices_beyond_the_group"),
        pytest.param(
            keeping([[0, 1], [0, 1]], [[0, 1], [0, 1]]), "2 rows of a.w axis 0, which has 1", id="rows_of_a_dense"
        ),
    ],
)
def test_plan_with_unequal_groups_is_refused(change: Callable[[dict[str, Any]], None], text: str) -> None:
    """Groups that would keep unequal numbers, or lists that are not one per group, are a ModelError that says so."""
    model = grouped()
    plan = onnxprune.prune(model, target_mac=0.6).plan
    with pytest.raises(onnxprune.ModelError, match=text) as caught:
        onnxprune.apply(model, edited(plan, change))
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_mask_with_unequal_groups_is_refused() -> None:
    """The plan's masks per group are checked in the same way, where they are what counts."""
    model = grouped()
    plan = onnxprune.prune(model, target_mac=0.6).plan
    data = json.loads(json.dumps(plan.to_json()))
    mask = next(group["keep"] for group in data["groups"] if group["size"] == 8 and not all(group["keep"]))
    mask[mask.index(False)] = True
    with pytest.raises(onnxprune.ModelError, match="unequal numbers"):
        keep_of_groups(couple(onnx_io.read(model)), Plan.from_json(json.dumps(data)))


def other_weights(model: ModelProto) -> ModelProto:
    """The same network with other weights."""
    sibling = ModelProto()
    sibling.CopyFrom(model)
    rng = np.random.default_rng(11)
    for tensor in sibling.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if tensor.name.endswith("/weight"):
            value = value * rng.uniform(0.5, 1.5, value.shape).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return sibling


@pytest.mark.parametrize("name", ["edsr", "resnet_a", "resnext", "c2f_detector", "dynamic_reshape_constant"])
def test_replay_on_the_same_model_gives_the_same_bytes(name: str) -> None:
    """Applying a plan to the model it was made for gives what pruning gave."""
    model, result = plan_of(name)
    assert onnxprune.apply(model, result.plan).model.SerializeToString() == result.model.SerializeToString()


@pytest.mark.parametrize("name", ["edsr", "resnet_a", "resnext", "c2f_detector", "dynamic_reshape_constant"])
def test_replay_on_a_sibling(name: str) -> None:
    """A plan fits a network with other weights and the same names: it keeps the same channels, and is proved."""
    model, result = plan_of(name)
    sibling = other_weights(model)
    again = onnxprune.apply(sibling, result.plan)
    assert again.report.proof is not None
    assert again.report.proof.ok
    assert again.report.to_json()["cost"] == result.report.to_json()["cost"]
    shapes = [(tensor.name, list(tensor.dims)) for tensor in result.model.graph.initializer]
    assert [(tensor.name, list(tensor.dims)) for tensor in again.model.graph.initializer] == shapes
    assert again.model.SerializeToString() != result.model.SerializeToString()


@pytest.mark.parametrize("name", architectures.ALL)
def test_initializers_alone_slice_a_checkpoint(name: str) -> None:
    """With nothing but ``initializers`` numpy slices a checkpoint to the pruned model's parameters."""
    model, result = plan_of(name)
    slices = json.loads(json.dumps(result.plan.to_json()))["initializers"]
    assert slices
    checkpoint = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for tensor in result.model.graph.initializer:
        value = checkpoint[tensor.name if tensor.name in checkpoint else tensor.name.partition("@")[0]]
        value = oracle.sliced(value, slices.get(tensor.name, {}))
        if value.dtype == np.float32:
            np.testing.assert_array_equal(value, numpy_helper.to_array(tensor))
