"""The proof is attacked: every wrong plan and every tampered graph is caught, and right ones pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import integers
import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import architectures
import onnxprune
import oracle
from onnxprune import onnx_io
from onnxprune.cost import Cost
from onnxprune.coupling import Coupling
from onnxprune.passes import prove as proving
from onnxprune.passes.apply import apply
from onnxprune.passes.closeness import closeness
from onnxprune.passes.couple import couple
from onnxprune.passes.prove import Proof
from onnxprune.passes.score import score
from onnxprune.passes.select import PRESETS, Limits, select
from onnxprune.plan import Plan, make_plan
from onnxprune.slices import Slices

FIXTURES = Path(__file__).parents[2] / "fixtures"
BUILDERS: dict[str, Callable[[], ModelProto]] = {
    **architectures.ALL,
    "digits": partial(onnx.load, FIXTURES / "digits" / "digits.onnx"),
    "denoise": partial(onnx.load, FIXTURES / "denoise" / "denoise.onnx"),
}
MAC_SHARE = 0.6


@dataclass(frozen=True)
class Case:
    """A model with a right plan for it."""

    model: ModelProto
    coupling: Coupling
    plan: Plan
    keep: np.ndarray

    def prune(self, initializers: dict[str, Slices] | None = None) -> tuple[ModelProto, Plan]:
        """Apply the plan, or the same plan with other slices."""
        plan = self.plan if initializers is None else replace(self.plan, initializers=initializers)
        return apply(self.model, self.coupling, plan, self.keep), plan

    def prove(self, pruned: ModelProto, plan: Plan | None = None) -> Proof:
        """Prove a pruned model as the pipeline does."""
        graph = onnx_io.read(pruned, self.coupling.model.input_shapes)
        return proving.prove(self.model, pruned, graph, self.coupling, plan or self.plan, self.keep)


def case_of(model: ModelProto, share: float = MAC_SHARE) -> Case:
    """Couple a model and plan for a share of its MAC."""
    coupling = couple(onnx_io.read(model))
    cost = Cost(coupling)
    budget = {"mac": share * cost.of(np.ones(coupling.n_classes, bool))["mac"]}
    keep = select(coupling, cost, score(coupling), budget, PRESETS["d"], Limits()).keep
    return Case(model, coupling, make_plan(coupling, keep), keep)


@pytest.fixture(autouse=True)
def single_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the proof's many small models on one thread each, which is faster."""
    monkeypatch.setattr(proving, "Session", partial(proving.Session, threads=1))


@pytest.fixture
def values_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the comparison of values as the proof's only part."""
    for part in ("check_labels", "check_weights"):
        monkeypatch.setattr(proving, part, lambda *_: [])


@cache
def case(name: str) -> Case:
    """Return one fixture with its plan, made once."""
    return case_of(BUILDERS[name]())


def copied(plan: Plan) -> dict[str, Slices]:
    """Slices of a plan, free to be changed."""
    return {name: deepcopy(axes) for name, axes in plan.initializers.items()}


# -- attacks on the plan: each returns changed slices, or None where the fixture offers no place for it ------------------

Attack = Callable[[Case, np.random.Generator], dict[str, Slices] | None]


def length_of(case: Case, name: str, axis: int) -> int:
    """Length of an axis before it was sliced."""
    constants = case.coupling.model.constants
    return constants[name if name in constants else name.partition("@")[0]].shape[axis]


def rows_of(kept: list) -> list[list[int]]:
    """Kept indices of every block of axis 0; a single row where all blocks keep the same."""
    return kept if isinstance(kept[0], list) else [kept]


def places(case: Case, n_kept: int = 1, n_rows: int = 1) -> list[tuple[str, int]]:
    """Sliced axes that keep at least ``n_kept`` indices (in each of at least ``n_rows`` rows)."""
    return [
        (name, axis)
        for name, axes in case.plan.initializers.items()
        for axis, kept in axes.items()
        if len(rows_of(kept)) >= n_rows and len(rows_of(kept)[0]) >= n_kept
    ]


def pick(case: Case, rng: np.random.Generator, n_kept: int = 1) -> tuple[dict[str, Slices], str, int]:
    """Copy the slices and draw one axis."""
    chosen = places(case, n_kept)
    name, axis = chosen[rng.integers(len(chosen))]
    return copied(case.plan), name, axis


def one_index_swapped(case: Case, rng: np.random.Generator) -> dict[str, Slices] | None:
    """Keep a removed index in the place of a kept one, in one initializer."""
    slices, name, axis = pick(case, rng)
    rows = rows_of(slices[name][axis])
    kept = rows[rng.integers(len(rows))]
    removed = np.setdiff1d(np.arange(length_of(case, name, axis)), kept)
    kept[rng.integers(len(kept))] = int(rng.choice(removed))
    return slices


def two_rows_exchanged(case: Case, rng: np.random.Generator) -> dict[str, Slices] | None:
    """Keep the right indices of one initializer in another order."""
    slices, name, axis = pick(case, rng, n_kept=2)
    rows = rows_of(slices[name][axis])
    kept = rows[rng.integers(len(rows))]
    i, j = rng.choice(len(kept), 2, replace=False)
    kept[i], kept[j] = kept[j], kept[i]
    return slices


def two_blocks_exchanged(case: Case, rng: np.random.Generator) -> dict[str, Slices] | None:
    """Give one group of a grouped convolution the indices that another group keeps, and the other way round."""
    found = []
    for name, axis in places(case, n_rows=2):
        rows = case.plan.initializers[name][axis]
        found += [(name, axis, i, j) for j in range(len(rows)) for i in range(j) if rows[i] != rows[j]]
    if not found:
        return None
    name, axis, i, j = found[rng.integers(len(found))]
    slices = copied(case.plan)
    rows = slices[name][axis]
    rows[i], rows[j] = rows[j], rows[i]
    return slices


def blocks_alike(case: Case, rng: np.random.Generator) -> dict[str, Slices] | None:
    """Slice all groups of a grouped convolution by the indices of one of them, as if they had to agree."""
    found = []
    for name, axis in places(case, n_rows=2):
        rows = case.plan.initializers[name][axis]
        found += [(name, axis, row) for row in rows if any(row != other for other in rows)]
    if not found:
        return None
    name, axis, row = found[rng.integers(len(found))]
    slices = copied(case.plan)
    slices[name][axis] = list(row)
    return slices


def vector_left_out(case: Case, rng: np.random.Generator) -> dict[str, Slices] | None:
    """Forget a bias or a parameter of a normalization."""
    constants = case.coupling.model.constants
    vectors = [n for n, _ in places(case) if len(constants.get(n, constants[n.partition("@")[0]]).shape) == 1]
    if not vectors:
        return None
    slices = copied(case.plan)
    del slices[str(rng.choice(vectors))]
    return slices


def tensor_left_out(case: Case, rng: np.random.Generator) -> dict[str, Slices] | None:
    """Leave a whole tensor unsliced."""
    slices, name, _ = pick(case, rng)
    del slices[name]
    return slices


def concat_offset_wrong(case: Case, rng: np.random.Generator) -> dict[str, Slices] | None:
    """Slice a reader of a Concat as if one branch began one or two channels earlier or later."""
    coupling, found = case.coupling, []
    for node in coupling.model.nodes:
        if node.op != "Concat" or node.outputs[0] in coupling.model.static:
            continue
        position = node.attributes["axis"] % len(coupling.axes(node.outputs[0]))
        joined = coupling.atoms(coupling.axes(node.outputs[0])[position])
        lengths = [coupling.model.shapes[name][position] for name in node.inputs]
        ends = np.cumsum(lengths)
        for member in coupling.members if len(joined) == 1 else ():
            kept = case.plan.initializers.get(member.tensor, {}).get(member.axis)
            if kept is None or not np.array_equal(member.classes, joined[0]):
                continue
            for begin, end in zip(ends - lengths, ends, strict=True):
                for shift in (-2, -1, 1, 2):
                    moved = [index + shift if begin <= index < end else index for index in kept]
                    if moved != kept and len(set(moved)) == len(kept) and 0 <= min(moved) <= max(moved) < ends[-1]:
                        found.append((member.tensor, member.axis, moved))
    if not found:
        return None
    name, axis, moved = found[rng.integers(len(found))]
    slices = copied(case.plan)
    slices[name][axis] = moved
    return slices


def other_group(case: Case, rng: np.random.Generator) -> dict[str, Slices] | None:
    """Slice one axis by the indices that another group of the same size and number keeps."""
    known: dict[tuple[int, ...], list[list]] = {}
    for name, axis in places(case):
        kept = case.plan.initializers[name][axis]
        known.setdefault((length_of(case, name, axis), *np.shape(kept)), []).append(kept)
    found = []
    for name, axis in places(case):
        kept = case.plan.initializers[name][axis]
        others = [other for other in known[length_of(case, name, axis), *np.shape(kept)] if other != kept]
        found += [(name, axis, other) for other in sorted(others)]
    if not found:
        return None
    name, axis, other = found[rng.integers(len(found))]
    slices = copied(case.plan)
    slices[name][axis] = deepcopy(other)
    return slices


ATTACKS: tuple[Attack, ...] = (
    one_index_swapped,
    two_rows_exchanged,
    vector_left_out,
    concat_offset_wrong,
    tensor_left_out,
    other_group,
    one_index_swapped,
    two_rows_exchanged,
    two_blocks_exchanged,
    blocks_alike,
)


def attacks(name: str) -> Iterator[tuple[str, dict[str, Slices]]]:
    """Ten corrupted plans of one fixture, 270 over all; an attack without a place becomes a swapped index."""
    for number, attack in enumerate(ATTACKS):
        rng = np.random.default_rng([sorted(BUILDERS).index(name), number])
        slices, made = attack(case(name), rng), attack
        if slices is None:
            slices, made = one_index_swapped(case(name), rng), one_index_swapped
        assert slices is not None
        yield f"{number} {made.__name__}", slices


@dataclass(frozen=True)
class Outcome:
    """Which parts of the proof found a corrupted plan; an error of onnxprune before the proof counts for each."""

    attack: str
    proof: bool = True
    labels: bool = True
    values: bool = True


@cache
def outcomes(name: str) -> tuple[Outcome, ...]:
    """Attack one fixture."""
    return tuple(Outcome(what, *caught(case(name), slices)) for what, slices in attacks(name))


def caught(case: Case, slices: dict[str, Slices]) -> tuple[bool, bool, bool]:
    """Whether the whole proof, its label check alone, and its comparison of values alone find a corrupted plan."""
    try:
        pruned, plan = case.prune(slices)
        graph = onnx_io.read(pruned, case.coupling.model.input_shapes)
    except onnxprune.OnnxPruneError:
        return True, True, True
    with pytest.MonkeyPatch.context() as patch:
        violations = proving.check_labels(case.coupling, graph, plan, case.keep)
        patch.setattr(proving, "check_labels", lambda *_: [])
        patch.setattr(proving, "check_weights", lambda *_: [])
        values = case.prove(pruned, plan).ok
        patch.setattr(proving, "check_labels", lambda *_: violations)
        proof = values and case.prove(pruned, plan).ok
    return not proof, bool(violations), not values


IN_TURN = [pytest.param(name, marks=[pytest.mark.slow] if place % 2 else []) for place, name in enumerate(BUILDERS)]
"""Every second network, and the others where there is time."""


@pytest.mark.parametrize("name", IN_TURN)
def test_every_corrupted_plan_fails_the_proof(name: str) -> None:
    """No corrupted plan is proved: applying it is an error, or the proof does not hold."""
    assert [outcome.attack for outcome in outcomes(name) if not outcome.proof] == []


@pytest.mark.parametrize("name", IN_TURN)
def test_values_alone_catch_every_corrupted_plan(name: str) -> None:
    """With the label check switched off, comparing values still finds every corrupted plan."""
    assert [outcome.attack for outcome in outcomes(name) if not outcome.values] == []


@pytest.mark.parametrize("name", IN_TURN)
def test_labels_alone_catch_every_corrupted_plan(name: str) -> None:
    """Without comparing a single value, the label check finds every corrupted plan."""
    assert [outcome.attack for outcome in outcomes(name) if not outcome.labels] == []


@pytest.mark.parametrize(
    "name",
    ["sid", "resnet_b", "mobilenet_v1", "densenet", "fpn", "digits", "denoise", "resnext", "transposed_generator"],
)
def test_walk_of_the_pruned_graph_catches_corrupted_plans(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Reshape makes no grid of an axis, the labels that meet give a wrong plan away without looking at its groups."""
    own = case(name)
    passed = []
    for what, slices in attacks(name):
        monkeypatch.setattr(proving, "expected_slices", lambda *_, slices=slices: slices)
        if not caught(own, slices)[1]:
            passed.append(what)
    assert passed == []


def test_attacks_are_many_and_of_every_kind() -> None:
    """At least 200 plans are corrupted, each kind of corruption finds its place, and none equals the right plan."""
    made = [(name, what, slices) for name in BUILDERS for what, slices in attacks(name)]
    assert len(made) >= 200
    assert {what.split()[1] for _, what, _ in made} == {attack.__name__ for attack in ATTACKS}
    assert [(name, what) for name, what, slices in made if slices == copied(case(name).plan)] == []
    assert sum("concat_offset_wrong" in what for _, what, _ in made) >= 4


# -- right plans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.8, 0.5])
@pytest.mark.parametrize("name", BUILDERS)
def test_right_plan_is_proved(name: str, share: float) -> None:
    """Every fixture is pruned to its target and proved, unless the target lies below its floor."""
    model = BUILDERS[name]()
    try:
        result = onnxprune.prune(model, target_mac=share)
    except onnxprune.BudgetError as error:
        assert error.floor > share * onnxprune.inspect(model).before["mac"]
        return
    proof = result.report.proof
    assert proof is not None
    assert proof.ok
    assert proof.labels
    assert proof.max_rel_err <= 1e-4
    assert proof.tensors > 0
    assert result.report.target is not None
    assert result.report.target.achieved <= share


@pytest.mark.parametrize("name", BUILDERS)
def test_random_plan_is_proved(name: str) -> None:
    """Any number of units of every bundle may go, and any of them: it is proved, not just what selection would keep."""
    own = case(name)
    keep = oracle.any_keep(own.coupling, np.random.default_rng(6))
    chosen = replace(own, keep=keep, plan=make_plan(own.coupling, keep))
    assert chosen.prove(chosen.prune()[0]).failures == ()


# -- attacks on the pruned model ---------------------------------------------------------------------------------------


def refused(case: Case, pruned: ModelProto) -> bool:
    """Whether a tampered model fails: it cannot be read, or the proof does not hold."""
    try:
        return not case.prove(pruned).ok
    except onnxprune.OnnxPruneError:
        return True


def changed(model: ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace the value of an initializer, or of the Constant node with that output."""
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(numpy_helper.to_array(tensor))), name))
            return
    node = next(node for node in model.graph.node if name in node.output)
    value = numpy_helper.to_array(node.attribute[0].t)
    node.attribute[0].t.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(value)), name))


def weights_of(model: ModelProto) -> list[tuple[str, np.ndarray]]:
    """Initializers of two axes or more whose first axis has more than one index."""
    arrays = [(tensor.name, numpy_helper.to_array(tensor)) for tensor in model.graph.initializer]
    return [(n, a) for n, a in arrays if a.ndim > 1 and len(a) > 1 and a.dtype == np.float32 and a.size > 16]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda w: w[::-1], id="rows_reversed"),
        pytest.param(lambda w: np.concatenate([w[: len(w) // 2][::-1], w[len(w) // 2 :]]), id="half_reversed"),
        pytest.param(lambda w: w * np.float32(1.002), id="scaled"),
    ],
)
@pytest.mark.parametrize("name", BUILDERS)
def test_tampered_weight_is_caught(name: str, change: Callable[[np.ndarray], np.ndarray], values_only: None) -> None:
    """Reordering a weight or scaling it by 0.2 % after pruning shows in the values that the graph computes."""
    own = case(name)
    pruned, _ = own.prune()
    choices = [(n, w) for n, w in weights_of(pruned) if not np.array_equal(change(w), w)]
    weight, _ = choices[np.random.default_rng(len(name)).integers(len(choices))]
    changed(pruned, weight, change)
    assert refused(own, pruned), weight


@pytest.mark.parametrize("operator", ["Sigmoid", "LeakyRelu", "Abs", "Identity"])
@pytest.mark.parametrize("name", ["edsr", "resnet_a", "mobilenet_v1", "unet_resize", "digits"])
def test_replaced_activation_is_caught(name: str, operator: str) -> None:
    """One Relu replaced by another activation after pruning fails the proof."""
    own = case(name)
    pruned, _ = own.prune()
    rectifiers = [node for node in pruned.graph.node if node.op_type == "Relu"]
    rectifiers[len(rectifiers) // 2].op_type = operator
    assert refused(own, pruned)


@pytest.mark.parametrize("name", ["resnext", "mobilenet_v1", "mobilenet_v2"])
def test_changed_group_attribute_is_caught(name: str) -> None:
    """A grouped convolution that keeps another number of groups fails the proof."""
    own = case(name)
    pruned, _ = own.prune()
    groups = [a for n in pruned.graph.node if n.op_type == "Conv" for a in n.attribute if a.name == "group" and a.i > 1]
    groups[0].i //= 2
    assert refused(own, pruned)


def network(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], channels_out: int = 3) -> ModelProto:
    """Make a model from image x, 3 channels of 8x8, to y."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 8, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, channels_out, None, None))],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """Draw normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def sliced_network() -> ModelProto:
    """A convolution of 16 channels of which a Slice hands on eight."""
    weights = {
        "w1": drawn(16, 3, 3, 3),
        "w2": drawn(3, 8, 3, 3, seed=1),
        "starts": np.array([4]),
        "ends": np.array([12]),
        "axes": np.array([1]),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="first"),
        helper.make_node("Slice", ["a", "starts", "ends", "axes"], ["b"], name="slice"),
        helper.make_node("Conv", ["b", "w2"], ["y"], name="second"),
    ]
    return network(nodes, weights)


@pytest.mark.parametrize("shift", [-1, 1])
def test_shifted_slice_bound_is_caught(shift: int) -> None:
    """A Slice over channels that begins and ends one channel off fails the proof."""
    own = case_of(sliced_network())
    pruned, _ = own.prune()
    assert not refused(own, pruned)
    moved = 0
    for node in pruned.graph.node:
        if node.op_type == "Slice":
            for bound in node.input[1:3]:
                changed(pruned, bound, lambda value: value + shift)
                moved += 1
    assert moved == 2
    assert refused(own, pruned)


@pytest.mark.parametrize("part", ["starts", "steps"])
def test_shifted_spatial_slice_is_caught(part: str) -> None:
    """The strided Slice of ResNet's shortcut that takes other pixels fails the proof."""
    own = case("resnet_a")
    pruned, _ = own.prune()
    node = next(node for node in pruned.graph.node if node.op_type == "Slice")
    index = {"starts": 1, "steps": 4}[part]
    changed(pruned, node.input[index], lambda value: value + 1)
    assert refused(own, pruned)


def test_removed_node_is_caught() -> None:
    """A rectifier that is gone from the pruned graph fails the proof, wherever it stood."""
    own = case("resnet_a")
    pruned, _ = own.prune()
    places = [index for index, node in enumerate(pruned.graph.node) if node.op_type == "Relu"]
    assert len(places) == 19
    for index in places:
        tampered = ModelProto()
        tampered.CopyFrom(pruned)
        gone = tampered.graph.node.pop(index)
        for node in tampered.graph.node:
            node.input[:] = [gone.input[0] if name == gone.output[0] else name for name in node.input]
        assert refused(own, tampered), gone.name


# -- negative control and NaN ------------------------------------------------------------------------------------------


def chain(first: np.ndarray, second: np.ndarray, bias: np.ndarray | None = None) -> ModelProto:
    """Convolution, Relu, convolution."""
    weights = {"w1": first, "w2": second} | ({} if bias is None else {"b1": bias})
    nodes = [
        helper.make_node("Conv", ["x", "w1"] + ([] if bias is None else ["b1"]), ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "w2"], ["y"], name="second"),
    ]
    return network(nodes, weights)


def test_segment_of_equal_slices_is_insensitive() -> None:
    """Where all channels have equal weights, exchanging them shows nothing, and the proof says so."""
    same = chain(np.repeat(drawn(1, 3, 3, 3), 8, 0), np.repeat(drawn(3, 1, 3, 3, seed=1), 8, 1))
    own = case_of(same)
    proof = own.prove(own.prune()[0])
    assert proof.ok
    assert "first" in proof.insensitive


def test_segment_of_different_slices_is_sensitive() -> None:
    """The same network with different channels passes its negative control."""
    own = case_of(chain(drawn(8, 3, 3, 3), drawn(3, 8, 3, 3, seed=1)))
    proof = own.prove(own.prune()[0])
    assert proof.ok
    assert proof.insensitive == ()
    assert proof.tensors == 3


def test_exchange_of_equal_slices_needs_the_labels() -> None:
    """Swapping slices of equal value changes no value: only the labels catch it, and they do."""
    same = chain(np.repeat(drawn(1, 3, 3, 3), 8, 0), np.repeat(drawn(3, 1, 3, 3, seed=1), 8, 1))
    own = case_of(same)
    slices = two_rows_exchanged(own, np.random.default_rng(0))
    assert slices is not None
    pruned, plan = own.prune(slices)
    proof = own.prove(pruned, plan)
    assert not proof.labels
    assert not proof.ok


def test_nan_in_the_pruned_model_is_caught() -> None:
    """A NaN among the pruned model's biases fails the proof."""
    own = case_of(chain(drawn(8, 3, 3, 3), drawn(3, 8, 3, 3, seed=1), drawn(8, seed=2)))
    pruned, _ = own.prune()
    assert not refused(own, pruned)
    changed(pruned, "b1", lambda bias: np.where(np.arange(len(bias)) == 0, np.float32("nan"), bias))
    assert refused(own, pruned)


def test_nan_in_both_models_proves_nothing() -> None:
    """NaN never equals NaN: a model that computes it everywhere is refused, not proved."""
    bias = np.full(8, np.nan, np.float32)
    model = chain(drawn(8, 3, 3, 3), drawn(3, 8, 3, 3, seed=1), bias)
    with pytest.raises(onnxprune.OnnxPruneError) as caught:
        onnxprune.prune(model, target_mac=0.6)
    assert caught.value.exit_code in (3, 5)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_comparison_refuses_nan_and_new_infinities(value: str, values_only: None) -> None:
    """Comparing values alone finds NaN or infinity where the original is finite."""
    own = case_of(chain(drawn(8, 3, 3, 3), drawn(3, 8, 3, 3, seed=1), drawn(8, seed=2)))
    pruned, _ = own.prune()
    assert not refused(own, pruned)
    changed(pruned, "b1", lambda bias: np.where(np.arange(len(bias)) == 1, np.float32(value), bias))
    assert refused(own, pruned)


def nudged(weight: np.ndarray, place: int) -> np.ndarray:
    """Move a single element by half the weight's standard deviation."""
    weight = weight.copy()
    weight.flat[place] += 0.5 * weight.std()
    return weight


@pytest.mark.parametrize(
    ("name", "weight", "position"),
    [
        pytest.param("video_3d", "classifier/Gemm_2/weight", 10, id="classifier"),
        pytest.param("squeeze_excite_gemm", "stage1/block0/gate/Gemm_1/weight", 10, id="gate"),
        pytest.param("audio_1d", "stage3/Conv/weight", 2, id="few_positions"),
    ],
)
def test_single_wrong_element_is_caught(name: str, weight: str, position: int) -> None:
    """One element of a weight that moves by half the weight's standard deviation fails the proof."""
    own = case(name)
    pruned, _ = own.prune()
    for number in range(position, position + 4):
        tampered = ModelProto()
        tampered.CopyFrom(pruned)
        changed(tampered, weight, lambda w, n=number: nudged(w, 7 * n))
        assert refused(own, tampered), number


def test_failure_names_the_tensor() -> None:
    """The proof's failures say which tensor differs, and by how much."""
    own = case("edsr")
    pruned, _ = own.prune()
    changed(pruned, "body1/Conv/weight", lambda weight: weight[::-1])
    failures = own.prove(pruned).failures
    assert any(failure.startswith("body1/Conv/output: differs by") for failure in failures)
    assert all("body1/Conv" in failure for failure in failures)


# -- integers ----------------------------------------------------------------------------------------------------------

INTEGERS = {"residual": integers.residual, "dynamic": integers.dynamic, "few-bits": integers.few_bits}


@pytest.mark.parametrize("name", INTEGERS)
def test_every_corrupted_plan_of_an_integer_model_is_caught(name: str) -> None:
    """Labels alone and values alone find corrupted slices of integer weights, scales and zero points."""
    own = case_of(INTEGERS[name]())
    missed = []
    for number, attack in enumerate(ATTACKS):
        rng = np.random.default_rng(number)
        slices = attack(own, rng) or one_index_swapped(own, rng)
        assert slices is not None
        if caught(own, slices) != (True, True, True):
            missed.append((attack.__name__, caught(own, slices)))
    assert missed == []


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_model_is_proved_and_nothing_insensitive(name: str) -> None:
    """The right plan of an integer model is proved; every segment notices the negative control."""
    for share in (0.8, 0.4):
        proof = onnxprune.prune(INTEGERS[name](), target_mac=share).report.proof
        assert proof.ok
        assert proof.insensitive == ()


@pytest.mark.parametrize(
    ("op", "index", "value"),
    [
        pytest.param("QLinearAdd", 5, np.uint8(100), id="zero-point-of-an-operand"),
        pytest.param("QLinearConv", 7, np.uint8(99), id="zero-point-of-an-output"),
        pytest.param("QGemm", 7, np.float32(0.3), id="scale-of-an-output"),
    ],
)
def test_another_scale_or_zero_point_is_caught(op: str, index: int, value: np.generic, values_only: None) -> None:
    """Integer outputs are compared: an operator that rounds to other integers than the original fails the proof."""
    own = case_of(integers.residual())
    pruned, _ = own.prune()
    assert own.prove(pruned).ok
    node = next(node for node in pruned.graph.node if node.op_type == op)
    pruned.graph.initializer.append(numpy_helper.from_array(np.asarray(value), "other"))
    node.input[index] = "other"
    proof = own.prove(pruned)
    assert any("integers differ" in failure for failure in proof.failures)


@pytest.mark.parametrize(
    ("kind", "moved", "agree"),
    [
        pytest.param(TensorProto.UINT8, {0: 1}, True, id="one-step-in-one"),
        pytest.param(TensorProto.UINT8, {0: 2}, False, id="two-steps"),
        pytest.param(TensorProto.UINT8, dict.fromkeys(range(10), 1), True, id="one-step-in-one-per-cent"),
        pytest.param(TensorProto.UINT8, dict.fromkeys(range(11), 1), False, id="one-step-in-more"),
        pytest.param(TensorProto.INT32, {0: 1}, False, id="sums-are-exact"),
    ],
)
def test_rounded_integers_may_lie_one_step_apart(kind: int, moved: dict[int, int], agree: bool) -> None:
    """What was rounded from floats may differ by one step in one element of a hundred; sums of products never."""
    want = np.arange(1000) % 200
    have = want.copy()
    for place, steps in moved.items():
        have[place] += steps
    found = closeness(have, want, kind)
    assert (found.wrong == "") is agree
    assert found.varies


@pytest.mark.parametrize("kind", [TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2])
def test_a_step_of_float8_is_the_next_number(kind: int) -> None:
    """Neighbours among the numbers of float8 are one step apart, however far that is."""
    every = np.arange(256, dtype=np.uint8).view(helper.tensor_dtype_to_np_dtype(kind)).astype(np.float32)
    every = np.unique(every[np.isfinite(every)])
    assert closeness(every[[5, 200]], every[[5, 201]], kind).wrong == ""
    assert closeness(every[[5, 200]], every[[5, 202]], kind).wrong


def test_sums_that_saturate_are_judged_with_a_bit_to_spare() -> None:
    """Unsigned times signed bytes saturate on processors without VNNI: the proof holds there, too, and is no weaker."""
    t = integers.Integers()
    y = t.qmatmul(t.enter(t.input(5, 4), 0.02, 128, "x"), "a", (4, 32))
    weight = t.constant(t.rng.integers(-127, 128, (32, 16)).astype(np.int8), "c.w")
    own, after = t.point(0.01, 0, "c.w", np.int8), t.point(2.0, 120, "c")
    y = [t.node("QLinearMatMul", *y, weight, *own, *after, name="c"), *after]
    own_case = case_of(t.build(t.qmatmul(y, "z", (16, 3))[0]))
    assert own_case.prove(own_case.prune()[0]).failures == ()
    slices = one_index_swapped(own_case, np.random.default_rng(0))
    assert slices is not None
    assert caught(own_case, slices) == (True, True, True)
