"""Selection meets every budget exactly, within the user's limits, by the presets' documented formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import ceil

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import architectures
import onnxprune
from graphs import Tiny, sandwich
from onnxprune import onnx_io
from onnxprune.cost import Cost
from onnxprune.coupling import Bundle, Coupling, Group
from onnxprune.passes.couple import couple
from onnxprune.passes.score import Scores, score
from onnxprune.passes.select import (
    KEEP_SHARE,
    PRESETS,
    TRIED,
    Limits,
    Selection,
    _moves,
    effective_scores,
    least_kept,
    lowest,
    prices,
    select,
)

NAMES = ("edsr", "sid", "resnet_a", "resnext", "mobilenet_v2", "densenet", "c2f_detector", "layer_norm_mlp")


@dataclass(frozen=True)
class Case:
    """A coupled model, its cost and its scores."""

    model: ModelProto
    coupling: Coupling
    cost: Cost
    scores: Scores

    @property
    def groups(self) -> list[Group]:
        """Groups that may lose channels."""
        return [group for group in self.coupling.groups if group.frozen is None]

    @property
    def bundles(self) -> tuple[Bundle, ...]:
        """Groups, in the units in which their channels go."""
        return self.coupling.bundles

    def full(self, kind: str) -> float:
        """Cost of everything."""
        return self.value(kind, np.ones(self.coupling.n_classes, bool))

    def value(self, kind: str, keep: np.ndarray) -> float:
        """Cost of one kind under a mask."""
        return self.cost.total(kind, self.cost.counts(keep))

    def select(self, budget: Mapping[str, float], preset: str = "d", limits: Limits | None = None) -> Selection:
        """Select for shares of the cost."""
        absolute = {kind: share * self.full(kind) for kind, share in budget.items()}
        return select(self.coupling, self.cost, self.scores, absolute, PRESETS[preset], limits or Limits())


def case_of(model: ModelProto) -> Case:
    """Couple and score a model."""
    coupling = couple(onnx_io.read(model))
    return Case(model, coupling, Cost(coupling), score(coupling))


@cache
def case(name: str) -> Case:
    """Return one fixture, coupled once."""
    return case_of(architectures.ALL[name]())


def permitted(size: int, preset: str, limits: Limits, unit: int = 1) -> list[int]:
    """Numbers of channels that a group of ``size`` may keep, ascending, as the options document it; ``unit`` go at once."""
    least = max(1, limits.min_channels, ceil(PRESETS[preset].floor * size), ceil((1 - limits.max_prune) * size - 1e-9))
    return [n for n in range(size % unit or unit, size, unit) if n >= least and n % limits.align == 0] + [size]


def n_kept(bundle: Bundle, keep: np.ndarray) -> int:
    """Number of channels that a bundle keeps; every cell gives up its share."""
    gone = [int((~keep[cell]).sum()) for cell in bundle.cells]
    assert len({n / share for n, share in zip(gone, bundle.shares, strict=True)}) == 1
    return bundle.size - sum(gone)


def removed_units(bundle: Bundle, keep: np.ndarray) -> np.ndarray:
    """Removed channels in rows that can be put back at once."""
    pairs = zip(bundle.cells, bundle.shares, strict=True)
    return np.concatenate([cell[~keep[cell]].reshape(-1, share) for cell, share in pairs], 1)


def restorable(own: Case, keep: np.ndarray, budget: Mapping[str, float], preset: str, limits: Limits) -> list[str]:
    """Bundles whose next larger permitted number of channels would still fit: tried one by one, without any search.

    With one unit at a time every removed unit is tried; of an aligned block, the first units.
    """
    found = []
    for bundle in own.bundles:
        kept = n_kept(bundle, keep)
        larger = [n for n in permitted(bundle.size, preset, limits, bundle.unit) if n > kept]
        if not larger:
            continue
        removed = removed_units(bundle, keep)
        n_more = (larger[0] - kept) // bundle.unit
        for block in removed if n_more == 1 else removed[None, :n_more]:
            more = keep.copy()
            more[block] = True
            if all(own.value(kind, more) <= share * own.full(kind) for kind, share in budget.items()):
                found.append(f"{[group.id for group in bundle.groups]} {block}")
    return found


def assert_exact(own: Case, budget: Mapping[str, float], preset: str, limits: Limits) -> None:
    """The budget is met, every bundle keeps a permitted number, and nothing can be put back."""
    keep = own.select(budget, preset, limits).keep
    for kind, share in budget.items():
        assert own.value(kind, keep) <= share * own.full(kind)
    assert keep[own.coupling.frozen].all()
    assert not own.coupling.unbalanced(keep)
    for bundle in own.bundles:
        assert n_kept(bundle, keep) in permitted(bundle.size, preset, limits, bundle.unit)
    assert restorable(own, keep, budget, preset, limits) == []


@pytest.mark.parametrize("share", [0.7, 0.3])
@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("name", NAMES)
def test_mac_budget_is_met_exactly(name: str, preset: str, share: float) -> None:
    """MAC stay below the target and no removed channel can be put back within it, in every preset."""
    assert_exact(case(name), {"mac": share}, preset, Limits())


@pytest.mark.parametrize("kind", ["weights", "params", "bandwidth", "activations", "bytes"])
@pytest.mark.parametrize("name", NAMES)
def test_other_budgets_are_met_exactly(name: str, kind: str) -> None:
    """Weights, parameters, bandwidth, activations and bytes are budgets like MAC."""
    assert_exact(case(name), {kind: 0.6}, "d", Limits())


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param(Limits(align=4), id="align4"),
        pytest.param(Limits(align=8), id="align8"),
        pytest.param(Limits(min_channels=5), id="min_channels5"),
        pytest.param(Limits(max_prune=0.4), id="max_prune0.4"),
        pytest.param(Limits(align=4, min_channels=6, max_prune=0.7), id="all"),
    ],
)
@pytest.mark.parametrize("preset", ["a", "d"])
@pytest.mark.parametrize("name", ["edsr", "sid", "resnet_a", "resnext", "mobilenet_v2", "densenet"])
def test_limits_are_obeyed_exactly(name: str, preset: str, limits: Limits) -> None:
    """Alignment, the least number and the largest share to remove are part of the search."""
    own = case(name)
    floor = lowest(own.coupling, own.cost, PRESETS[preset], limits)["mac"] / own.full("mac")
    assert_exact(own, {"mac": floor + 0.5 * (1 - floor)}, preset, limits)


def grouped(channels: int = 12) -> ModelProto:
    """A convolution of two groups between two dense ones."""
    return sandwich(lambda t, y: t.conv(y, "op", channels, channels, 3, group=2), channels)


@pytest.mark.parametrize(
    ("limits", "least"),
    [
        pytest.param(Limits(), 2, id="none"),
        pytest.param(Limits(align=4), 4, id="align4"),
        pytest.param(Limits(align=3), 6, id="align3"),
        pytest.param(Limits(min_channels=5), 6, id="min_channels5"),
        pytest.param(Limits(max_prune=0.4), 8, id="max_prune0.4"),
    ],
)
def test_limits_count_channels_of_all_rows(limits: Limits, least: int) -> None:
    """Two groups of six channels lose two at once; limits hold for what both keep together, in every number on the way."""
    own = case_of(grouped())
    assert [(bundle.size, bundle.unit, bundle.n_units) for bundle in own.bundles] == [(12, 2, 6)] * 2
    floor = lowest(own.coupling, own.cost, PRESETS["a"], limits)["mac"] / own.full("mac")
    keep = own.select({"mac": floor}, "a", limits).keep
    assert [n_kept(bundle, keep) for bundle in own.bundles] == [least] * 2
    for share in np.linspace(floor, 1, 7):
        assert_exact(own, {"mac": share}, "a", limits)


def test_blocks_of_unequal_width_go_by_their_mean() -> None:
    """Four channels of 1.0 each go before two of 1.2, though together they lose more."""
    own = case_of(sandwich(lambda t, y: t.conv(y, "b", 12, 10), 12, 10))
    wide, narrow = sorted(own.groups, key=lambda group: -group.size)
    assert (wide.size, narrow.size) == (12, 10)
    values = np.zeros(own.coupling.n_classes)
    values[wide.classes], values[narrow.classes] = 1.0, 1.2
    scores = replace(own.scores, value=values, order=values)
    (all_of_it, first), (_, then), *_, (least, _) = prices(
        own.coupling, own.cost, scores, PRESETS["a"], Limits(align=4)
    )
    floor = lowest(own.coupling, own.cost, PRESETS["a"], Limits(align=4))["mac"]
    assert (all_of_it, least) == (1, pytest.approx(floor / own.full("mac")))
    assert (first, then) == (0, pytest.approx(4 / (12 + 1.2 * 10)))


def joined() -> ModelProto:
    """Join tensors of two, six and four channels in front of a convolution of two groups of six."""
    t = Tiny()
    x = t.input(1, 2, 4, 6)
    y = t.node("Concat", *(t.conv(x, name, 2, size) for name, size in (("a", 2), ("b", 6), ("c", 4))), axis=1)
    return t.build(t.conv(t.conv(y, "op", 12, 4, group=2), "z", 4, 3))


def test_groups_that_shrink_together_keep_a_channel_each() -> None:
    """Where groups of channels share rows, removing the most that may go leaves something of every one of them."""
    own = case_of(joined())
    bundle = next(bundle for bundle in own.bundles if len(bundle.groups) == 3)
    floor = lowest(own.coupling, own.cost, PRESETS["a"], Limits())["mac"] / own.full("mac")
    result = onnxprune.prune(own.model, target_mac=floor * (1 + 1e-9), preset="a")
    assert result.report.proof is not None
    assert result.report.proof.ok
    kept = {name: sum(keep) for name, _, keep in result.plan.groups}
    assert all(kept[group.id] >= 1 for group in bundle.groups)
    assert sum(kept[group.id] for group in bundle.groups) < bundle.size


def test_several_budgets_hold_together() -> None:
    """With two targets both are met, and nothing can be put back within both."""
    assert_exact(case("resnet_a"), {"mac": 0.6, "params": 0.5}, "d", Limits())


@pytest.mark.parametrize("kind", ["mac", "params", "bandwidth", "size"])
@pytest.mark.parametrize("name", ["edsr", "resnet_a", "dynamic_reshape_constant"])
def test_target_of_a_run_is_met(name: str, kind: str) -> None:
    """What ``prune`` reports as achieved lies below the request, and within 10 % of the original from it."""
    target = onnxprune.prune(architectures.ALL[name](), proof=False, **{f"target_{kind}": 0.6}).report.target
    assert target is not None
    assert target.kind == kind
    assert target.floor < target.achieved <= target.requested == 0.6
    assert target.achieved > 0.5


@pytest.mark.parametrize("name", ["edsr", "resnet_a", "sid", "mobilenet_v2"])
def test_size_target_holds_for_the_bytes_written(name: str) -> None:
    """A pruned model under a size target takes no more bytes than that share of the original."""
    model = architectures.ALL[name]()
    pruned = onnxprune.prune(model, target_size=0.5).model
    assert len(pruned.SerializeToString(deterministic=True)) <= 0.5 * model.ByteSize()


def test_absolute_target_counts_in_units() -> None:
    """A target above 1 is an absolute number of MAC; achieved and floor are absolute, too."""
    own = case("edsr")
    wanted = round(0.5 * own.full("mac"))
    report = onnxprune.prune(own.model, target_mac=wanted, proof=False).report
    assert report.target is not None
    assert report.target.requested == wanted
    assert report.target.achieved == report.after["mac"] <= wanted
    assert 1 < report.target.floor < wanted


# -- the ends of the range ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("name", NAMES)
def test_floor_is_reachable_and_nothing_below_it(name: str, preset: str) -> None:
    """The floor itself is a target that can be met: every bundle keeps its least number; a hair below it is an error."""
    own = case(name)
    floor = lowest(own.coupling, own.cost, PRESETS[preset], Limits())["mac"]
    keep = own.select({"mac": floor / own.full("mac") * (1 + 1e-12)}, preset).keep
    least = [permitted(bundle.size, preset, Limits(), bundle.unit)[0] for bundle in own.bundles]
    assert [n_kept(bundle, keep) for bundle in own.bundles] == least
    with pytest.raises(onnxprune.BudgetError):
        own.select({"mac": 0.999 * floor / own.full("mac")}, preset)


def test_out_of_reach_names_floor_and_culprits() -> None:
    """An impossible target is a BudgetError with exit code 4, the floor in the request's unit, and the costliest layers."""
    own = case("resnet_a")
    with pytest.raises(onnxprune.BudgetError, match="out of reach") as caught:
        onnxprune.prune(own.model, target_mac=0.001)
    error = caught.value
    assert error.exit_code == 4
    assert error.floor == pytest.approx(lowest(own.coupling, own.cost, PRESETS["d"], Limits())["mac"], rel=1e-9)
    assert 1 <= len(error.culprits) <= 3
    assert set(error.culprits) <= {node.name for node in own.model.graph.node}
    assert all(name in str(error) for name in error.culprits)
    keep = least_kept(own.coupling, PRESETS["d"], Limits(), own.scores.value)
    macs = own.cost.layers.values(own.cost.counts(keep))
    left = {work.node.title: value for work, value in zip(own.cost.works, macs, strict=True)}
    assert [left[name] for name in error.culprits] == sorted(left.values(), reverse=True)[: len(error.culprits)]


def test_frozen_network_is_out_of_reach() -> None:
    """A network without a prunable channel has its full cost as floor."""
    weight = numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "w")
    image = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 3, 4, 4)) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "one", image[:1], image[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(onnxprune.BudgetError) as caught:
        onnxprune.prune(model, target_mac=0.9)
    assert caught.value.floor == 3 * 3 * 16


@pytest.mark.parametrize("target", [1.0, 10**12])
def test_target_already_met_removes_nothing(target: float) -> None:
    """A target at or above the cost returns the model itself, says so, and proves nothing."""
    model = architectures.ALL["edsr"]()
    before = model.SerializeToString()
    result = onnxprune.prune(model, target_mac=target)
    assert result.model.SerializeToString() == before
    assert result.report.before == result.report.after
    assert result.report.proof is None
    assert any("already meets the target" in note for note in result.report.notes)


# -- presets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preset", ["a", "b"])
def test_presets_a_and_b_compare_plain_scores(name: str, preset: str) -> None:
    """In presets a and b the threshold is the same for every group: the order is that of the scores."""
    own = case(name)
    np.testing.assert_array_equal(effective_scores(own.cost, own.scores, own.groups, PRESETS[preset]), own.scores.value)


def branches(n_branches: int, width: int) -> ModelProto:
    """A sum of branches of two convolutions each: every inner channel costs the same."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for i in range(n_branches):
        first, second = rng.standard_normal((width, 3, 3, 3)), rng.standard_normal((3, width, 3, 3))
        first *= rng.uniform(0.5, 2, (width, 1, 1, 1))
        weights += [numpy_helper.from_array(w.astype("f"), f"{n}{i}") for n, w in (("w", first), ("v", second))]
        nodes.append(helper.make_node("Conv", ["x", f"w{i}"], [f"a{i}"], pads=[1] * 4))
        nodes.append(helper.make_node("Conv", [f"a{i}", f"v{i}"], [f"b{i}"], pads=[1] * 4))
    nodes.append(helper.make_node("Sum", [f"b{i}" for i in range(n_branches)], ["y"]))
    image = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 3, 8, 8)) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "branches", image[:1], image[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("share", [0.75, 0.5, 0.4])
def test_preset_a_keeps_the_largest_scores(share: float) -> None:
    """Where every channel costs the same, preset a keeps exactly the channels with the largest scores of all groups."""
    own = case_of(branches(4, 10))
    assert [group.size for group in own.groups] == [10] * 4
    keep = own.select({"mac": share}, "a").keep
    classes = np.concatenate([group.classes for group in own.groups])
    largest = classes[np.argsort(own.scores.value[classes])[-int(40 * share) :]]
    assert sorted(classes[keep[classes]]) == sorted(largest)
    kept = [int(keep[group.classes].sum()) for group in own.groups]
    assert len(set(kept)) > 1


def test_preset_floor_keeps_depth() -> None:
    """Preset a may leave one channel per group, b, c and d leave an eighth of it."""
    assert PRESETS["a"].floor == 0
    assert {PRESETS[name].floor for name in "bcd"} == {KEEP_SHARE} == {1 / 8}
    assert permitted(64, "a", Limits())[0] == 1
    own = case("sid")
    for preset, least in (("a", 1), ("b", 0)):
        floor = lowest(own.coupling, own.cost, PRESETS[preset], Limits())["mac"] / own.full("mac")
        keep = own.select({"mac": floor * 1.0001}, preset).keep
        kept = [int(keep[group.classes].sum()) for group in own.groups]
        assert kept == [least or ceil(group.size / 8) for group in own.groups]


def straight(widths: tuple[int, ...], sizes: tuple[int, ...]) -> ModelProto:
    """Convolutions 3x3 in a row, the i-th at resolution ``sizes[i]``, with max pooling between them."""
    rng = np.random.default_rng(0)
    nodes, weights, tensor, before = [], [], "x", 3
    for i, (width, size) in enumerate(zip(widths, sizes, strict=True)):
        weights.append(numpy_helper.from_array(rng.standard_normal((width, before, 3, 3)).astype("f"), f"w{i}"))
        nodes.append(helper.make_node("Conv", [tensor, f"w{i}"], [f"c{i}"], name=f"conv{i}", pads=[1] * 4))
        tensor, before = f"c{i}", width
        if i + 1 < len(sizes) and sizes[i + 1] != size:
            nodes.append(helper.make_node("MaxPool", [tensor], [f"p{i}"], kernel_shape=[2, 2], strides=[2, 2]))
            tensor = f"p{i}"
    nodes[-1].output[0] = "y"
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, sizes[0], sizes[0]))]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, widths[-1], sizes[-1], sizes[-1]))]
    graph = helper.make_graph(nodes, "straight", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_preset_c_divides_by_mac_per_weight() -> None:
    """Preset c divides scores by e(g)^alpha: e(g) is the MAC per weight that a channel saves, over the network's.

    Channel of conv0: 27 weights at 16x16 before it, 8 * 9 behind it at 8x8; of conv1: 4 * 9 before it at 8x8 (4 channels
    of conv0), 5 * 9 behind it at 4x4. The exponent is half the deviation of log scores within groups, as long as log
    e varies by less than 1.
    """
    own = case_of(straight((4, 8, 5), (16, 8, 4)))
    assert [group.size for group in own.groups] == [4, 8]
    mac = 4 * 27 * 256 + 8 * 36 * 64 + 5 * 72 * 16
    weights = 4 * 27 + 8 * 36 + 5 * 72
    saved = np.array([(27 * 256 + 72 * 64) / (27 + 72), (36 * 64 + 45 * 16) / (36 + 45)])
    efficiency = saved / (mac / weights)
    assert np.log(efficiency).std() < 1
    logs = [np.log(own.scores.value[group.classes]) for group in own.groups]
    alpha = 0.5 * np.concatenate([log - log.mean() for log in logs]).std()
    order = effective_scores(own.cost, own.scores, own.groups, PRESETS["c"])
    for group, ratio in zip(own.groups, efficiency, strict=True):
        np.testing.assert_allclose(order[group.classes], own.scores.value[group.classes] / ratio**alpha, rtol=1e-9)


def kept_share(own: Case, preset: str, tensor: str, share: float = 0.6) -> float:
    """Share of the channels kept of the group that one tensor produces on its axis 0."""
    keep = own.select({"mac": share}, preset).keep
    group = next(group for group in own.groups if (tensor, 0) in group.members)
    return float(keep[group.classes].mean())


def test_preset_c_favours_groups_with_more_mac_per_weight() -> None:
    """SID's layers at full resolution, with few weights and many MAC, give up more in preset c than in b."""
    own = case("sid")
    saved = []
    for group in own.groups:
        keep = np.ones(own.coupling.n_classes, bool)
        keep[group.classes[0]] = False
        pair = [own.full(kind) - own.value(kind, keep) for kind in ("mac", "weights")]
        saved.append(pair[0] / pair[1])
    kept = {p: own.select({"mac": 0.6}, p).keep for p in "bc"}
    share = {p: np.array([keep[group.classes].mean() for group in own.groups]) for p, keep in kept.items()}
    order = np.argsort(saved)
    n = len(order) // 3
    assert share["c"][order[-n:]].mean() < share["b"][order[-n:]].mean() - 0.1
    assert share["c"][order[:n]].mean() > share["b"][order[:n]].mean() + 0.1


@pytest.mark.parametrize(
    ("name", "stream"),
    [
        pytest.param("edsr", "head/Conv/weight", id="edsr"),
        pytest.param("resnet_a", "stem/Conv/weight", id="resnet_a"),
        pytest.param("resnet_b", "stem/Conv/weight", id="resnet_b"),
    ],
)
def test_preset_d_prunes_the_shared_stream(name: str, stream: str) -> None:
    """At 60 % of the MAC preset d takes a fair share from the group that many tensors must agree on; b nearly none."""
    own = case(name)
    group = next(group for group in own.groups if (stream, 0) in group.members)
    assert len(group.members) > 6
    assert kept_share(own, "b", stream) >= 0.85
    assert kept_share(own, "d", stream) <= 0.85
    assert kept_share(own, "d", stream) < kept_share(own, "b", stream)


def test_preset_d_balances_by_rank() -> None:
    """With alpha left out, a channel of rank p among a shared group's is compared by the p-quantile of single groups."""
    own = case("edsr")
    preset = PRESETS["d"].__class__(0.0, 0.0, balance=True)
    order = effective_scores(own.cost, own.scores, own.groups, preset)
    shared = next(group for group in own.groups if ("head/Conv/weight", 0) in group.members)
    single = [group for group in own.groups if own.scores.members[group.classes].max() == 1]
    pool = np.sort(np.concatenate([own.scores.value[group.classes] for group in single]))
    rank = np.searchsorted(np.sort(own.scores.value[shared.classes]), own.scores.value[shared.classes])
    expected = np.quantile(pool, (rank + 0.5) / shared.size)
    np.testing.assert_allclose(order[shared.classes], expected, rtol=1e-12)
    for group in single:
        np.testing.assert_array_equal(order[group.classes], own.scores.value[group.classes])


# -- determinism -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_selection_is_deterministic(name: str) -> None:
    """Reading, coupling and selecting again gives the same mask."""
    model = architectures.ALL[name]()
    first, second = (case_of(model).select({"mac": 0.6}).keep for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_ties_go_in_index_order(preset: str) -> None:
    """Among channels of equal score, those with lower indices go first."""
    own = case("resnet_a")
    equal = Scores(np.ones_like(own.scores.value), own.scores.members)
    keep = select(own.coupling, own.cost, equal, {"mac": 0.5 * own.full("mac")}, PRESETS[preset], Limits()).keep
    assert not all(keep[group.classes].all() for group in own.groups)
    for group in own.groups:
        assert (np.diff(keep[group.classes].astype(int)) >= 0).all(), group.id


def test_pairs_that_are_tried_are_those_that_gain_most_for_their_cost() -> None:
    """Of more blocks than pairs are made of, the two that gain most for what they cost come back together."""
    dear = [(block, 1, 1.0, np.array([10.0])) for block in range(TRIED + 4)]
    cheap = [(block, 1, 1.5, np.array([1.0])) for block in (100, 101)]
    best, *_ = _moves([*dear, *cheap], left=np.array([2.0]), limits=np.array([100.0]))
    assert sorted(best) == [(100, 1), (101, 1)]
