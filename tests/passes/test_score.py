"""Scores equal what numpy computes by hand on small graphs, and do not depend on how a network is written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import architectures
import onnxprune
from architectures import variants
from graphs import sandwich
from onnxprune import onnx_io
from onnxprune.coupling import Coupling
from onnxprune.passes.couple import couple
from onnxprune.passes.score import NAMES, score

RNG = np.random.default_rng(5)
FIRST = RNG.standard_normal((6, 3, 3, 3)).astype(np.float32)
OTHER = RNG.standard_normal((6, 3, 1, 1)).astype(np.float32)
LAST = RNG.standard_normal((4, 6, 1, 1)).astype(np.float32)
SCALE = RNG.uniform(0.2, 2, 6).astype(np.float32)
VARIANCE = RNG.uniform(0.5, 3, 6).astype(np.float32)


def model_of(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], channels_out: int = 4) -> ModelProto:
    """Make a model from x (3 channels of 8x8) to y."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 8, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, channels_out, 8, 8))],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def plain(first: np.ndarray = FIRST) -> ModelProto:
    """Conv, Relu, Conv."""
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "last"], ["y"]),
    ]
    return model_of(nodes, {"first": first, "last": LAST})


def normed(scale: np.ndarray = SCALE) -> ModelProto:
    """Conv, BatchNormalization, Conv."""
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], pads=[1] * 4),
        helper.make_node("BatchNormalization", ["a", "scale", "shift", "mean", "variance"], ["b"], epsilon=1e-3),
        helper.make_node("Conv", ["b", "last"], ["y"]),
    ]
    zeros = np.zeros(6, np.float32)
    weights = {"first": FIRST, "last": LAST, "scale": scale, "shift": zeros, "mean": zeros, "variance": VARIANCE}
    return model_of(nodes, weights)


def summed() -> ModelProto:
    """Two convolutions whose outputs are added, and a reader: both must agree to lose a channel."""
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], pads=[1] * 4),
        helper.make_node("Conv", ["x", "other"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Conv", ["c", "last"], ["y"]),
    ]
    return model_of(nodes, {"first": FIRST, "other": OTHER, "last": LAST})


def scores_of(model: ModelProto, criterion: str, seed: int = 0) -> np.ndarray:
    """Scores of the only prunable group, in the order of the first weight's rows."""
    coupling = couple(onnx_io.read(model))
    (group,) = [group for group in coupling.groups if group.frozen is None]
    assert np.array_equal(group.classes, _rows(coupling, "first"))
    return score(coupling, criterion, seed).value[group.classes]


def _rows(coupling: Coupling, tensor: str) -> np.ndarray:
    return next(member.classes for member in coupling.members if (member.tensor, member.axis) == (tensor, 0))


def over_mean(values: np.ndarray) -> np.ndarray:
    """Values over their mean, in float64."""
    values = values.astype(np.float64)
    return values / values.mean()


def distances(weight: np.ndarray) -> np.ndarray:
    """Sum of every row's distances to all rows, one by one."""
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    return np.array([sum(np.linalg.norm(row - other) for other in rows) for row in rows])


BY_HAND: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "l1": lambda weight: np.abs(weight).sum((1, 2, 3)),
    "l2": lambda weight: np.sqrt((weight.astype(np.float64) ** 2).sum((1, 2, 3))),
    "max": lambda weight: np.abs(weight).max((1, 2, 3)),
    "geometric-median": distances,
}


def test_every_criterion_is_checked_here() -> None:
    """The criteria computed by hand in this file are all there are."""
    assert set(NAMES) == set(BY_HAND) | {"bn-scale", "random"}


@pytest.mark.parametrize("criterion", BY_HAND)
def test_criterion_by_hand(criterion: str) -> None:
    """A channel's score is the norm of its slice of the producing weight over the mean norm."""
    expected = over_mean(BY_HAND[criterion](FIRST))
    np.testing.assert_allclose(scores_of(plain(), criterion), expected, rtol=1e-6)


@pytest.mark.parametrize("criterion", BY_HAND)
def test_maximum_over_members(criterion: str) -> None:
    """Where two weights produce a channel, the larger of their scores counts, each over its own mean."""
    first, other = (over_mean(BY_HAND[criterion](weight)) for weight in (FIRST, OTHER))
    expected = np.maximum(first, other)
    assert not np.array_equal(expected, first)
    assert not np.array_equal(expected, other)
    np.testing.assert_allclose(scores_of(summed(), criterion), expected, rtol=1e-6)


@pytest.mark.parametrize("criterion", ["l1", "l2", "max", "geometric-median"])
def test_scale_of_a_layer_does_not_matter(criterion: str) -> None:
    """Scores are relative to their tensor: a layer times 100 has the same ones."""
    np.testing.assert_allclose(scores_of(plain(100 * FIRST), criterion), scores_of(plain(), criterion), rtol=1e-5)


@pytest.mark.parametrize("criterion", ["l1", "l2", "max"])
def test_batch_norm_counts_as_if_folded(criterion: str) -> None:
    """A normalization right behind a weight multiplies its rows by |scale| / sqrt(variance + epsilon)."""
    factor = SCALE / np.sqrt(VARIANCE + 1e-3)
    expected = over_mean(BY_HAND[criterion](FIRST * factor.reshape(-1, 1, 1, 1)))
    np.testing.assert_allclose(scores_of(normed(), criterion), expected, rtol=1e-5)


def test_geometric_median_counts_folded_rows() -> None:
    """Distances are those between folded rows: scaling a row moves it, it does not scale its distances."""
    factor = SCALE / np.sqrt(VARIANCE + 1e-3)
    expected = over_mean(distances(FIRST * factor.reshape(-1, 1, 1, 1)))
    np.testing.assert_allclose(scores_of(normed(), "geometric-median"), expected, rtol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_bn_scale_by_hand(sign: int) -> None:
    """Criterion bn-scale ranks by the absolute scale of the normalization alone (Liu et al. 2017)."""
    np.testing.assert_allclose(scores_of(normed(sign * SCALE), "bn-scale"), over_mean(SCALE), rtol=1e-6)


@pytest.mark.parametrize("criterion", BY_HAND)
def test_groups_of_a_transposed_convolution_have_channels_of_their_own(criterion: str) -> None:
    """Output channel j of group g is column j of the g-th block of the weight: every one has a score of its own."""
    model = sandwich(lambda t, y: t.conv(y, "first", 6, 4, 3, group=2, transpose=True), 6, 4)
    coupling = couple(onnx_io.read(model))
    weight = next(numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == "first.w")
    slices = weight.reshape(2, 3, 2, 3, 3).swapaxes(1, 2).reshape(4, 3, 3, 3)
    classes = next(m.classes for m in coupling.members if (m.tensor, m.axis) == ("first.w", 1))
    assert classes.shape == (2, 2)
    found = score(coupling, criterion).value[classes.ravel()]
    np.testing.assert_allclose(found, over_mean(BY_HAND[criterion](slices)), rtol=1e-5)


def test_groups_of_a_convolution_are_ranked_by_their_producer() -> None:
    """Input channels of a grouped convolution are scored by the weight in front of it, all rows over one mean."""
    model = sandwich(lambda t, y: t.conv(y, "last", 6, 4, 3, group=2), 6, 4)
    coupling = couple(onnx_io.read(model))
    weight = next(numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == "a.w")
    classes = next(m.classes for m in coupling.members if (m.tensor, m.axis) == ("last.w", 1))
    assert classes.shape == (2, 3)
    found = score(coupling, "l2").value[classes.ravel()]
    np.testing.assert_allclose(found, over_mean(BY_HAND["l2"](weight)), rtol=1e-5)


def test_bn_scale_falls_back_to_the_norm() -> None:
    """Without a normalization bn-scale is l2."""
    np.testing.assert_array_equal(scores_of(plain(), "bn-scale"), scores_of(plain(), "l2"))


def test_random_is_seeded() -> None:
    """Criterion random gives the same scores for the same seed, others for another one."""
    first = scores_of(plain(), "random", seed=1)
    np.testing.assert_array_equal(first, scores_of(plain(), "random", seed=1))
    assert not np.array_equal(first, scores_of(plain(), "random", seed=2))
    assert len(set(first)) == len(first)


def test_unknown_criterion_is_a_usage_error() -> None:
    """A criterion that does not exist is named with those that do."""
    with pytest.raises(onnxprune.UsageError, match=r"l3.*geometric-median"):
        onnxprune.prune(plain(), target_mac=0.5, criterion="l3")


def test_zero_channels_score_zero() -> None:
    """A channel without weights scores 0; a layer of zeros has no NaN."""
    weight = FIRST.copy()
    weight[2] = 0
    assert scores_of(plain(weight), "l2")[2] == 0
    np.testing.assert_array_equal(scores_of(plain(0 * FIRST), "l2"), np.zeros(6))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("criterion", ["l1", "l2", "max", "geometric-median"])
def test_broken_weight_is_named(criterion: str, value: float) -> None:
    """NaN and infinity cannot be ranked: the error has exit code 3 and names the tensor."""
    weight = FIRST.copy()
    weight[1, 0, 0, 0] = value
    with pytest.raises(onnxprune.ModelError, match=r"^first: ") as caught:
        onnxprune.prune(plain(weight), target_mac=0.5, criterion=criterion)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["resnet_a", "resnet_b", "mobilenet_v2", "c2f_detector", "transposed_generator"])
def test_folded_network_prunes_alike(name: str) -> None:
    """A network with normalizations as nodes and the same one with them folded keep the same channels."""
    model = architectures.ALL[name]()
    folded = variants.fold_batch_norm(model)
    plans = [onnxprune.prune(each, target_mac=0.6, proof=False).plan for each in (model, folded)]
    assert plans[0].groups == plans[1].groups


def test_scores_do_not_depend_on_batch() -> None:
    """Scores come from weights alone: a dynamic batch changes nothing."""
    model = architectures.ALL["resnet_a"]()
    both = [score(couple(onnx_io.read(each))).value for each in (model, variants.with_dynamic_batch(model))]
    np.testing.assert_array_equal(*both)
