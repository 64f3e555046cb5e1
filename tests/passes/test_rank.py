"""Ranking by removal error, weighing by the network's output, and allocation, against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxprune import pipeline
from onnxprune.options import Clock, Options
from onnxprune.passes.allocate import _Side, _steps, allocate
from onnxprune.passes.calibrate import calibrate
from onnxprune.passes.rank import RIDGE, by_activation, rank
from onnxprune.passes.score import score
from onnxprune.passes.weigh import weigh


def mlp(widths=(6, 10, 8, 3), seed=0) -> onnx.ModelProto:
    """Gemm, Relu, Gemm, Relu, Gemm with random weights."""
    rng = np.random.default_rng(seed)
    nodes, constants, name = [], [], "x"
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        constants.append(numpy_helper.from_array(rng.standard_normal((a, b)).astype(np.float32), f"w{i}"))
        constants.append(numpy_helper.from_array(rng.standard_normal(b).astype(np.float32), f"b{i}"))
        last = i == len(widths) - 2
        nodes.append(helper.make_node("Gemm", [name, f"w{i}", f"b{i}"], ["y" if last else f"h{i}"], name=f"gemm{i}"))
        if not last:
            nodes.append(helper.make_node("Relu", [f"h{i}"], [f"a{i}"], name=f"relu{i}"))
        name = f"a{i}"
    io = [helper.make_tensor_value_info(n, 1, ["n", w]) for n, w in (("x", widths[0]), ("y", widths[-1]))]
    graph = helper.make_graph(nodes, "mlp", io[:1], io[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def case():
    """A loaded network, calibration feeds, consumers and rankings."""
    loaded = pipeline.load(mlp(), Options(), Clock())
    x = np.random.default_rng(1).standard_normal((512, 6)).astype(np.float32)
    feeds = [{"x": x[i : i + 64]} for i in range(0, 512, 64)]
    consumers = calibrate(loaded.flat, loaded.coupling, feeds, memory=1 << 30)
    return loaded, feeds, consumers, rank(loaded.coupling, consumers, score(loaded.coupling))


def removal_error(consumer, gone: list[int]) -> float:
    """Relative error of an operator without some inputs, the others fitted anew, straight from the moments."""
    p = consumer.matrix.shape[1]
    gram = consumer.gram[0].copy()
    gram[np.arange(p), np.arange(p)] += RIDGE * np.trace(gram[:p, :p]) / p
    whole = np.concatenate([consumer.matrix[0], np.zeros((1, consumer.matrix.shape[2]))])
    kept = np.delete(np.arange(p + 1), gone)
    fitted = np.zeros_like(whole)
    fitted[kept] = np.linalg.solve(gram[np.ix_(kept, kept)], (gram @ whole)[kept])
    difference = fitted - whole
    return float(np.sum(difference * (gram @ difference))) / consumer.energy


def test_errors_add_up_to_the_error_of_a_new_fit(case):
    """The errors of the first removals sum to what an operator loses without those inputs, fitted from scratch."""
    _, _, consumers, rankings = case
    for consumer, ranking in zip(consumers, rankings, strict=True):
        columns = consumer.columns[0].tolist()
        for count in (1, 3, len(ranking.units) - 2):
            gone = [columns.index(channel) for channel in ranking.units[:count].ravel()]
            assert ranking.errors[:count].sum() == pytest.approx(removal_error(consumer, gone), rel=1e-3)


def test_the_first_removal_is_the_cheapest(case):
    """No other single channel would cost less than the one that goes first."""
    _, _, consumers, rankings = case
    for consumer, ranking in zip(consumers, rankings, strict=True):
        errors = [removal_error(consumer, [place]) for place in range(consumer.matrix.shape[1])]
        assert ranking.errors[0] == pytest.approx(min(errors), rel=1e-3)
        assert consumer.columns[0][int(np.argmin(errors))] == ranking.units[0, 0]


def test_an_error_in_front_of_the_output_weighs_one(case):
    """The last operator's error is the output's error; what passes further operators weighs something else."""
    loaded, feeds, consumers, rankings = case
    weights = weigh(loaded.flat, loaded.coupling, consumers, rankings, feeds, macs=1.0)
    last = consumers[-1].columns.min()
    place = next(i for i, ranking in enumerate(rankings) if last in ranking.units)
    # outputs of different means have one common spread here, so that one is met within their differences
    assert 0.2 < weights[place] < 2
    assert (weights > 0).all()
    assert weights[1 - place] != pytest.approx(weights[place], rel=0.05)


@pytest.mark.parametrize("per_cost", [True, False], ids=["per cost", "alone"])
def test_allocation_keeps_each_order(case, per_cost):
    """Across groups every group's own order of removal stays, and all removable channels have a turn."""
    loaded, _, _, rankings = case
    order = allocate(loaded.cost, rankings, np.ones(len(rankings)), ["mac"], per_cost=per_cost)
    for ranking in rankings:
        turns = order[ranking.units[: ranking.bundle.removable].ravel()]
        assert (np.diff(turns) > 0).all()
        assert np.isfinite(turns).all()


def test_a_heavy_group_is_spared(case):
    """A group whose errors weigh a million times more goes last."""
    loaded, _, _, rankings = case
    order = allocate(loaded.cost, rankings, np.array([1e6, 1.0]), ["mac"])
    heavy, light = (order[r.units[: r.bundle.removable].ravel()] for r in rankings)
    assert heavy.min() > light.max()


@pytest.mark.parametrize("weighted", [False, True], ids=["activation", "wanda"])
def test_light_criteria_follow_the_activations(case, weighted):
    """A channel's score is the root mean square of what its reader sees, times the reader's weights for wanda."""
    loaded, _, consumers, _ = case
    scores = by_activation(loaded.coupling, consumers, score(loaded.coupling), weighted=weighted)
    consumer = consumers[0]
    squares = np.diag(consumer.gram[0])[:-1] * (np.square(consumer.matrix[0]).sum(1) if weighted else 1)
    expected = np.sqrt(squares) / np.sqrt(squares).mean()
    assert scores.value[consumer.columns[0]] == pytest.approx(expected)


def test_few_units_are_offered_one_by_one(case) -> None:
    """Allocation may stop after any unit of a bundle that has few."""
    _, _, _, rankings = case
    assert [_steps(ranking) for ranking in rankings] == [[*range(ranking.bundle.removable + 1)] for ranking in rankings]


def test_price_is_error_over_shares_of_all_costs_saved(case) -> None:
    """What a step saves of several costs counts as shares of each in the original."""
    loaded, _, _, rankings = case
    cost, every = loaded.cost, np.ones(loaded.coupling.n_classes, bool)
    counts = cost.counts(every)
    whole = {kind: cost.total(kind, counts) for kind in ("mac", "params")}
    for ranking in rankings:
        side = _Side(cost, ranking, 1.0, _steps(ranking))
        side.judge(counts, whole)
        keep = every.copy()
        keep[ranking.units[0]] = False
        saved = sum(1 - cost.total(kind, cost.counts(keep)) / total for kind, total in whole.items())
        assert side.price == pytest.approx(ranking.errors[0] / saved)
