"""Least squares: fit a linear operator to what the original computed, without getting worse on images held back.

The fit minimises ``|f(x M + skip) - f(target)|^2 + ridge |M - M0|^2`` where f is the rectifier behind the operator, if there
is one, and M0 the weights as they are. An infinite ridge is no compensation, and it is always among the candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates, as shares of the mean square of a regressor."""

STEPS = 3
"""Rounds of majorisation for each candidate, where a rectifier follows."""

ROUNDING = 1e-6
"""Share of an error that is no gain: sums in float32 differ that much from one evaluation to the next."""

FINAL_STEPS = 12
"""Rounds with the ridge that was chosen."""

EXACT = 1e-4
"""Share of the error that a fit before the rectifier may leave to count as exact."""


@dataclass(frozen=True, slots=True, eq=False)
class Rectifier:
    """``f(z) = z`` above zero and ``slope * z`` below, at most ``top``: Relu, LeakyRelu, Clip from zero."""

    slope: float = 0.0
    top: float = np.inf

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """Apply it."""
        negative = np.float32(self.slope) * z if self.slope else np.float32(0)
        return np.minimum(np.where(z > 0, z, negative), np.float32(self.top))

    def aim(self, z: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Where ``z`` should move to lower the squared error behind the rectifier.

        Behind a Relu, the parabola about the aim is an upper bound of the error that touches it at ``z``, so that its
        minimum has no more error, except where a positive target is hidden: it is aimed at itself although the error is
        flat there, or a dead channel would stay dead. Where the target is below zero, ``z`` comes down to it only as far as
        the rectifier lets that be seen; where both are cut off at the top, nothing moves.
        """
        slope = np.float32(self.slope)
        below = np.where(z > 0, slope * target, z + slope * slope * (target - z))
        aim = np.where(target > 0, target, below)
        if np.isinf(self.top):
            return aim
        return np.where((target >= self.top) & (z >= self.top), z, np.minimum(aim, np.float32(self.top)))


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Samples of an operator's inputs, and of what should come out.

    Attributes
    ----------
    x
        Regressors, float32 ``(blocks, n, p)``.
    target
        What the original has at the place where the error is measured, float32 ``(blocks, n, q)``.
    skip
        What the pruned graph adds to the operator's output before that place, of the same shape, or None.
    n_train
        The first rows train; the others, of images held back, judge. All of them judge where none are held back.
    """

    x: np.ndarray
    target: np.ndarray
    skip: np.ndarray | None
    n_train: int

    def part(self, begin: int, end: int) -> Rows:
        """Return some of the rows, as views."""
        skip = None if self.skip is None else self.skip[:, begin:end]
        return Rows(self.x[:, begin:end], self.target[:, begin:end], skip, end - begin)


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """Matrix ``(blocks, p, q)`` and offset ``(blocks, q)``, and how they do on images held back.

    Attributes
    ----------
    error_before, error
        Mean squared error there, with the weights as they were and as fitted.
    ridge
        The ridge chosen; infinite where the weights stay as they are.
    note
        Why they stay.
    """

    matrix: np.ndarray
    offset: np.ndarray
    error_before: float
    error: float
    ridge: float
    note: str = "no gain on samples held back"


@np.errstate(over="ignore", invalid="ignore")  # what overflows has no finite error, and is not chosen
def fit(
    rows: Rows, matrix: np.ndarray, offset: np.ndarray, rectifier: Rectifier | None = None,
    *, free_matrix: bool = True, free_offset: bool = True,
) -> Fit:  # fmt: skip
    """Fit, choosing the ridge by the images held back.

    Parameters
    ----------
    matrix, offset
        The weights as they are: ``(blocks, p, q)`` and ``(blocks, q)``.
    free_matrix, free_offset
        What may change.

    Returns
    -------
    Fit
        The weights as they are where nothing is better, or where their error is not finite.
    """
    start = Weights(matrix, offset)
    train = rows.part(0, rows.n_train)
    judge = rows.part(rows.n_train, rows.x.shape[1]) if rows.n_train < rows.x.shape[1] else train
    before = error(judge, start, rectifier)
    worth = before * (1 - ROUNDING)
    best, best_error, best_ridge = start, worth, np.inf
    if not (free_matrix or free_offset) or not np.isfinite(before):
        return Fit(matrix, offset, before, before, np.inf)
    candidates = RIDGES if free_matrix else (0.0,)
    moments = _Moments(train, free_matrix, free_offset)
    for ridge in candidates:
        found = _solve(train, moments, start, start, ridge, rectifier, STEPS)
        judged = error(judge, found, rectifier)
        if judged < best_error:
            best, best_error, best_ridge = found, judged, ridge
    if rectifier is not None:
        # Few rounds behind a rectifier do not reach a solution without error; where there is one, a fit before it does.
        found = _solve(train, moments, start, start, candidates[0], None, 1)
        judged = error(judge, found, rectifier)
        if judged < min(best_error, EXACT * before):
            best, best_error, best_ridge = found, judged, candidates[0]
    if np.isfinite(best_ridge):
        whole = rows.part(0, rows.x.shape[1])
        moments = _Moments(whole, free_matrix, free_offset)
        final = _solve(whole, moments, best, start, best_ridge, rectifier, FINAL_STEPS)
        if error(judge, final, rectifier) < worth:
            best = final
    return Fit(best.matrix, best.offset, before, error(judge, best, rectifier), best_ridge)


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Matrix and offset, float64."""

    matrix: np.ndarray
    offset: np.ndarray

    def output(self, rows: Rows) -> np.ndarray:
        """Value at the place where the error is measured, before the rectifier."""
        z = rows.x @ self.matrix.astype(np.float32) + self.offset.astype(np.float32)[:, None]
        return z if rows.skip is None else z + rows.skip


class _Moments:
    """Second moments of the regressors, the ones last, as far as their weights are free."""

    def __init__(self, rows: Rows, free_matrix: bool, free_offset: bool) -> None:
        blocks, n, p = rows.x.shape
        gram = np.ones((blocks, p + 1, p + 1))
        gram[:, :p, :p] = rows.x.transpose(0, 2, 1) @ rows.x
        gram[:, :p, :p] /= n
        gram[:, :p, p] = gram[:, p, :p] = rows.x.mean(1, dtype=np.float64)
        self.free = np.concatenate([np.full(p, free_matrix), [free_offset]])
        self.gram = gram[:, self.free][:, :, self.free]
        self.scale = np.maximum(np.einsum("gii->g", gram[:, :p, :p]) / max(p, 1), 1e-30)

    def penalty(self, ridge: float) -> np.ndarray:
        """Ridge of every free weight, float64 ``(blocks, free)``; the offset has none."""
        shrunk = np.ones(len(self.free))
        shrunk[-1] = 0.0
        return ridge * self.scale[:, None] * shrunk[self.free]

    def inverse(self, ridge: float) -> np.ndarray:
        """Inverse of the penalised moments; a trace of regularisation keeps dead regressors from dividing by zero."""
        diagonal = self.penalty(ridge) + 1e-9 * self.scale[:, None]
        return np.linalg.inv(self.gram + np.eye(self.gram.shape[1]) * diagonal[:, None])


def _solve(
    rows: Rows, moments: _Moments, begin: Weights, prior: Weights, ridge: float, rectifier: Rectifier | None, steps: int
) -> Weights:
    """Minimise from ``begin``, drawn to ``prior`` by the ridge; each step moves to the aims by least squares."""
    p, n = rows.x.shape[2], rows.x.shape[1]
    inverse, penalty, free = moments.inverse(ridge), moments.penalty(ridge), moments.free
    origin = np.concatenate([prior.matrix, prior.offset[:, None]], 1)
    weights = np.concatenate([begin.matrix, begin.offset[:, None]], 1)
    for _ in range(steps if rectifier is not None else 1):
        z = Weights(weights[:, :p], weights[:, p]).output(rows)
        push = (rows.target if rectifier is None else rectifier.aim(z, rows.target)) - z
        slope = np.empty_like(weights)
        slope[:, :p] = rows.x.transpose(0, 2, 1) @ push
        slope[:, p] = push.sum(1, dtype=np.float64)
        slope = slope[:, free] / n - penalty[:, :, None] * (weights - origin)[:, free]
        weights = weights.copy()
        weights[:, free] += inverse @ slope
    return Weights(weights[:, :p], weights[:, p])


def least_squares(
    rows: Rows, begin: Weights, ridge: float, rectifier: Rectifier | None, *, free_offset: bool, steps: int = STEPS
) -> Weights:
    """Solve with one ridge that draws to ``begin``, all rows training."""
    return _solve(rows, _Moments(rows, True, free_offset), begin, begin, ridge, rectifier, steps)


def error(rows: Rows, weights: Weights, rectifier: Rectifier | None) -> float:
    """Mean squared error behind the rectifier."""
    z, target = weights.output(rows), rows.target
    if rectifier is not None:
        z, target = rectifier(z), rectifier(target)
    return float(np.square(z - target).mean(dtype=np.float64))
