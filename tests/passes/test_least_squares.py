"""Least squares recovers linear maps, lowers the error behind rectifiers, and never gets worse on rows held back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onnxprune.passes import least_squares
from onnxprune.passes.least_squares import Rectifier, Rows, fit

RECTIFIERS = {
    "none": None,
    "relu": Rectifier(),
    "leaky": Rectifier(0.1),
    "relu6": Rectifier(0.0, 2.0),
}
rectified = pytest.mark.parametrize("rectifier", list(RECTIFIERS.values())[1:], ids=list(RECTIFIERS)[1:])
every_rectifier = pytest.mark.parametrize("rectifier", RECTIFIERS.values(), ids=RECTIFIERS)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Draw float32 from a normal distribution."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def problem(
    n: int = 600,
    p: int = 7,
    q: int = 5,
    blocks: int = 1,
    *,
    noise: float = 0.0,
    n_train: int | None = None,
    seed: int = 0,
) -> tuple[Rows, np.ndarray, np.ndarray]:
    """Rows of a known linear map, that map and its offset."""
    x = normal(blocks, n, p, seed=seed) + 0.5
    matrix, offset = normal(blocks, p, q, seed=seed + 1).astype(float), normal(blocks, q, seed=seed + 2).astype(float)
    target = x @ matrix + offset[:, None] + noise * normal(blocks, n, q, seed=seed + 3)
    return Rows(x, target.astype(np.float32), None, n * 4 // 5 if n_train is None else n_train), matrix, offset


def loss(rows: Rows, matrix: np.ndarray, offset: np.ndarray, rectifier: Rectifier | None) -> float:
    """Mean squared error, computed anew."""
    z = rows.x.astype(float) @ matrix + offset[:, None]
    z = z if rows.skip is None else z + rows.skip
    target = rows.target.astype(float)
    if rectifier is not None:
        z, target = _apply(rectifier, z), _apply(rectifier, target)
    return float(np.square(z - target).mean())


def _apply(rectifier: Rectifier, z: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(z, 0) + rectifier.slope * np.minimum(z, 0), rectifier.top)


@pytest.mark.parametrize("blocks", [1, 3], ids=["one-block", "three-blocks"])
@pytest.mark.parametrize("skip", [False, True], ids=["alone", "skip"])
@pytest.mark.parametrize("n_train", [480, 600], ids=["held-back", "none-held-back"])
def test_a_linear_map_is_recovered(blocks: int, skip: bool, n_train: int) -> None:
    """From zero weights the fit finds the map that made the targets, and what is added on the way is accounted for."""
    rows, matrix, offset = problem(blocks=blocks, n_train=n_train)
    if skip:
        extra = normal(*rows.target.shape, seed=9)
        rows = Rows(rows.x, rows.target + extra, extra, rows.n_train)
    found = fit(rows, np.zeros_like(matrix), np.zeros_like(offset))
    assert np.abs(found.matrix - matrix).max() < 1e-3
    assert np.abs(found.offset - offset).max() < 1e-3
    assert found.ridge == min(least_squares.RIDGES)
    assert found.error < 1e-6 * found.error_before


@rectified
def test_a_map_is_recovered_from_behind_a_rectifier(rectifier: Rectifier) -> None:
    """With targets that the map meets exactly, the error behind the rectifier all but vanishes."""
    rows, matrix, offset = problem()
    found = fit(rows, matrix + 0.1 * normal(*matrix.shape, seed=4), offset, rectifier)
    assert found.error < 1e-2 * found.error_before


def test_a_ridge_is_larger_where_rows_are_few_and_noisy() -> None:
    """Rows held back choose the ridge: few noisy rows for many weights call for a larger one than many clean rows."""
    rows, matrix, offset = problem(n=60, p=40, noise=6.0)
    clean, *_ = problem(p=40)
    few, many = fit(rows, matrix, offset), fit(clean, 0.9 * matrix, offset)
    assert few.ridge > many.ridge


@rectified
def test_the_rectified_loss_falls_with_every_round(rectifier: Rectifier) -> None:
    """Further rounds lower the loss on the training rows; where it has settled, it moves by less than a thousandth."""
    rows, matrix, offset = problem(noise=2.0, n_train=600)
    begin = least_squares.Weights(0.3 * matrix + normal(*matrix.shape, seed=8), offset)
    moments = least_squares._Moments(rows, True, True)
    losses = [loss(rows, begin.matrix, begin.offset, rectifier)]
    for steps in range(1, 25):
        found = least_squares._solve(rows, moments, begin, begin, 0.0, rectifier, steps)
        losses.append(loss(rows, found.matrix, found.offset, rectifier))
    assert np.all(np.diff(losses[:5]) < 0)
    assert np.all(np.diff(losses) <= 1e-3 * losses[0])
    assert losses[-1] < 0.7 * losses[0]


@rectified
def test_a_ridge_draws_to_the_weights_as_they_were(rectifier: Rectifier) -> None:
    """The penalised loss does not rise either, and a huge ridge leaves the matrix."""
    rows, matrix, offset = problem(noise=2.0, n_train=600)
    prior = least_squares.Weights(0.3 * matrix, offset)
    moments = least_squares._Moments(rows, True, True)
    scale = np.square(rows.x, dtype=float).mean()
    totals = [loss(rows, prior.matrix, prior.offset, rectifier)]
    for steps in range(1, 12):
        found = least_squares._solve(rows, moments, prior, prior, 0.1, rectifier, steps)
        penalty = 0.1 * scale * np.square(found.matrix - prior.matrix).sum() / rows.target.shape[2]
        totals.append(loss(rows, found.matrix, found.offset, rectifier) + penalty)
    assert np.all(np.diff(totals) <= 1e-3 * totals[0])
    assert totals[3] < totals[2] < totals[1] < totals[0]
    stiff = least_squares._solve(rows, moments, prior, prior, 1e9, rectifier, 3)
    assert np.abs(stiff.matrix - prior.matrix).max() < 1e-6
    assert np.abs(stiff.offset - prior.offset).max() > 1e-3


def test_seeing_the_rectifier_beats_the_plain_fit() -> None:
    """Where most targets are cut off, fitting behind the rectifier has less error there than fitting before it."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1, 4000, 6)).astype(np.float32)
    hidden = x @ rng.standard_normal((6, 4)) - 2.0
    target = (hidden + np.square(x[..., :1]) * np.minimum(hidden, 0)).astype(np.float32)
    rows = Rows(x, target, None, 3200)
    zero, offset = np.zeros((1, 6, 4)), np.zeros((1, 4))
    plain, seeing = fit(rows, zero, offset), fit(rows, zero, offset, Rectifier())
    judge = rows.part(3200, 4000)
    assert loss(judge, seeing.matrix, seeing.offset, Rectifier()) < 0.8 * loss(
        judge, plain.matrix, plain.offset, Rectifier()
    )
    assert loss(judge, plain.matrix, plain.offset, None) < loss(judge, seeing.matrix, seeing.offset, None)


numbers = st.floats(-4, 4, width=32)


@st.composite
def hard_problems(draw: st.DrawFn) -> tuple[Rows, np.ndarray, np.ndarray]:
    """Problems with few rows, dead, constant and repeated regressors, few or no rows held back, tiny and large scales."""
    blocks, n, p, q = (draw(st.integers(1, high)) for high in (2, 12, 8, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    x = rng.standard_normal((blocks, n, p)).astype(np.float32) * np.float32(10.0 ** draw(st.integers(-4, 3)))
    for column in range(p):
        kind = draw(st.sampled_from(["random", "random", "dead", "constant", "repeated"]))
        if kind == "dead":
            x[..., column] = 0
        elif kind == "constant":
            x[..., column] = draw(numbers)
        elif kind == "repeated":
            x[..., column] = x[..., 0]
    target = draw(arrays(np.float32, (blocks, n, q), elements=numbers))
    skip = draw(st.one_of(st.none(), arrays(np.float32, (blocks, n, q), elements=numbers)))
    matrix, offset = rng.standard_normal((blocks, p, q)), rng.standard_normal((blocks, q))
    return Rows(x, target, skip, draw(st.integers(1, n))), matrix, offset


@given(
    case=hard_problems(), rectifier=st.sampled_from(list(RECTIFIERS.values())),
    free=st.sampled_from([(True, True), (True, False), (False, True)]),
)  # fmt: skip
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_error_on_rows_held_back_never_rises(
    case: Any, rectifier: Rectifier | None, free: tuple[bool, bool]
) -> None:
    """Whatever the rows, the result is finite, no worse than before where it is judged, and reported as it is."""
    rows, matrix, offset = case
    found = fit(rows, matrix, offset, rectifier, free_matrix=free[0], free_offset=free[1])
    n = rows.x.shape[1]
    judge = rows.part(rows.n_train, n) if rows.n_train < n else rows
    assert np.isfinite(found.matrix).all()
    assert np.isfinite(found.offset).all()
    assert found.error <= found.error_before
    assert found.error_before == pytest.approx(loss(judge, matrix, offset, rectifier), rel=1e-3, abs=1e-6)
    assert found.error == pytest.approx(loss(judge, found.matrix, found.offset, rectifier), rel=1e-2, abs=1e-4)
    assert np.isinf(found.ridge) == (found.error == found.error_before)


@every_rectifier
def test_nothing_changes_where_nothing_can_be_gained(rectifier: Rectifier | None) -> None:
    """Weights that already meet the target stay bit by bit, and the ridge is infinite."""
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (1, 50, 4)).astype(np.float32)
    matrix, offset = rng.integers(-2, 3, (1, 4, 3)).astype(float), rng.integers(-2, 3, (1, 3)).astype(float)
    rows = Rows(x, (x @ matrix + offset).astype(np.float32), None, 40)
    found = fit(rows, matrix, offset, rectifier)
    assert found.ridge == np.inf
    assert found.error == found.error_before == 0
    assert np.array_equal(found.matrix, matrix)
    assert np.array_equal(found.offset, offset)


def test_training_rows_alone_do_not_convince() -> None:
    """Where rows held back say the opposite of the training rows, the weights stay."""
    x = normal(1, 100, 3)
    weight = np.ones((1, 3, 2))
    target = np.where(np.arange(100)[None, :, None] < 80, -5.0, 1.0) * (x @ weight)
    found = fit(Rows(x, target.astype(np.float32), None, 80), weight, np.zeros((1, 2)), free_offset=False)
    assert found.ridge == np.inf
    assert np.array_equal(found.matrix, weight)


@every_rectifier
def test_only_what_is_free_changes(rectifier: Rectifier | None) -> None:
    """A fixed offset or matrix stays bit by bit while the other is fitted; with both fixed nothing is."""
    rows, matrix, offset = problem(noise=0.1)
    start, shift = 0.5 * matrix, offset + 1.0
    found = fit(rows, start, shift, rectifier, free_offset=False)
    assert np.array_equal(found.offset, shift)
    assert not np.array_equal(found.matrix, start)
    found = fit(rows, matrix, shift, rectifier, free_matrix=False)
    assert np.array_equal(found.matrix, matrix)
    assert found.ridge == 0.0
    assert found.error < found.error_before
    found = fit(rows, start, shift, rectifier, free_matrix=False, free_offset=False)
    assert found.ridge == np.inf
    assert np.array_equal(found.matrix, start)
    assert np.array_equal(found.offset, shift)


def test_an_offset_alone_is_the_mean_of_what_is_missing() -> None:
    """With a fixed matrix the offset becomes the mean difference over all rows."""
    rows, matrix, offset = problem(noise=1.0)
    found = fit(rows, 0 * matrix, 0 * offset, free_matrix=False)
    assert np.allclose(found.offset, rows.target.mean(1), atol=1e-4)


def test_no_finite_error_means_no_fit() -> None:
    """Targets that overflow leave the weights as they are."""
    rows, matrix, offset = problem()
    target = rows.target.copy()
    target[0, -1, 0] = np.inf
    found = fit(Rows(rows.x, target, None, rows.n_train), matrix, offset)
    assert found.ridge == np.inf
    assert np.array_equal(found.matrix, matrix)


def test_inputs_are_left_alone() -> None:
    """A fit does not write to the weights or rows that it is given."""
    rows, matrix, offset = problem(noise=0.1)
    copies = [a.copy() for a in (rows.x, rows.target, matrix, offset)]
    fit(rows, matrix, offset, Rectifier())
    for array, copy in zip((rows.x, rows.target, matrix, offset), copies, strict=True):
        assert np.array_equal(array, copy)


slopes = st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0])
tops = st.sampled_from([np.inf, 6.0, 1.0])


def squared(rectifier: Rectifier, at: float, target: float) -> float:
    """Loss of one value."""
    return float(_apply(rectifier, np.float64(at)) - _apply(rectifier, np.float64(target))) ** 2


def aimed(rectifier: Rectifier, z: float, target: float) -> float:
    """Where one value should move."""
    return float(rectifier.aim(np.array(z, np.float32), np.array(target, np.float32)))


@given(z=numbers, target=numbers, new=numbers)
@settings(max_examples=2000, deadline=None, derandomize=True)
def test_aim_behind_relu_is_the_minimum_of_an_upper_bound(z: float, target: float, new: float) -> None:
    """The parabola about the aim lies nowhere below the loss, and touches it at ``z`` unless Relu hides a wanted value."""
    relu = Rectifier()
    aim = aimed(relu, z, target)
    hidden = z <= 0 < target
    shift = 0.0 if hidden else squared(relu, z, target) - (z - aim) ** 2
    assert squared(relu, new, target) <= shift + (new - aim) ** 2 + 1e-4


@given(z=numbers, target=numbers, slope=slopes, top=tops)
@settings(max_examples=3000, deadline=None, derandomize=True)
def test_moving_to_the_aim_never_raises_the_loss(z: float, target: float, slope: float, top: float) -> None:
    """With any slope below and any top, a value that moves to its aim is no farther off behind the rectifier."""
    rectifier = Rectifier(slope, top)
    assert squared(rectifier, aimed(rectifier, z, target), target) <= squared(rectifier, z, target) + 1e-4


@given(z=numbers, target=numbers, slope=slopes, top=tops)
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_the_aim_is_as_far_as_the_loss_can_see(z: float, target: float, slope: float, top: float) -> None:
    """The squared distance to the aim is zero only where the loss has no slope: no descent is missed."""
    rectifier = Rectifier(slope, top)
    if abs(aimed(rectifier, z, target) - z) < 1e-6:
        step = 1e-3
        lowest = min(squared(rectifier, z + step, target), squared(rectifier, z - step, target))
        assert lowest >= squared(rectifier, z, target) - 1e-5


@given(z=numbers, slope=slopes, top=tops)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_rectifier_is_what_it_says(z: float, slope: float, top: float) -> None:
    """The function is the identity above zero, a line below, and cut off at the top; a met target is not moved from."""
    rectifier = Rectifier(slope, top)
    value = np.array(z, np.float32)
    assert rectifier(value) == pytest.approx(_apply(rectifier, value), rel=1e-6)
    assert _apply(rectifier, rectifier.aim(value, value)) == pytest.approx(_apply(rectifier, value), abs=1e-6)
