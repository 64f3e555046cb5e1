"""Pairs: let an operator compute what its only reader can use best, instead of what the original computed there.

Where channels between two linear operators are read by nobody else, it does not matter which values they carry, only what
the second operator makes of them. Most channels behind a rectifier are above zero nearly everywhere, so that the kept ones
can carry other combinations than they did, closer to the best low-rank approximation of what was removed. Both operators
are fitted in turn to the second one's target: the second by least squares, the first by the linear least squares problem
that remains when it is decided which values the rectifier cuts off (Gauss and Newton), solved by conjugate gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.passes.least_squares import Rectifier, Rows, Weights, error, least_squares

ROUNDS = 3
ITERATIONS = 6
RIDGE = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class PairRows:
    """Samples of a pair: positions of the second operator, and what the first one sees for each of their taps.

    Attributes
    ----------
    x
        Regressors of the first operator, float32 ``(n * taps, p)``.
    inside
        False where a tap lies in the padding, bool ``(n * taps,)``.
    target, skip
        Of the second operator, as in :class:`Rows`: ``(n, q)``.
    n_train
        The first positions train, the others judge.
    """

    x: np.ndarray
    inside: np.ndarray
    target: np.ndarray
    skip: np.ndarray | None
    n_train: int

    @property
    def taps(self) -> int:
        """Rows of the first operator for each of the second."""
        return len(self.x) // max(1, len(self.target))


@dataclass(frozen=True, slots=True, eq=False)
class Refined:
    """Both operators' weights, and the error of the second on images held back, before and after."""

    first: Weights
    second: Weights
    error_before: float
    error: float


@np.errstate(over="ignore", invalid="ignore")  # what overflows has no finite error, and is not chosen
def refine(
    rows: PairRows, first: Weights, middle: Rectifier | None, second: Weights, behind: Rectifier | None,
    *, free_offsets: tuple[bool, bool],
) -> Refined:  # fmt: skip
    """Fit both operators to what the second should put out.

    Parameters
    ----------
    first, second
        Weights to begin with, of one block each; the second's are fitted first.
    middle, behind
        Rectifiers behind each of them.
    """
    run = _Pair(rows, middle, behind, free_offsets)
    second = run.fit_second(first, second)
    before = run.judged(first, second)
    best = Refined(first, second, before, before)
    for _ in range(ROUNDS):
        first = run.improve_first(first, second)
        second = run.fit_second(first, second)
        now = run.judged(first, second)
        if not now < best.error:
            break
        best = Refined(first, second, before, now)
    return best


class _Pair:
    def __init__(
        self, rows: PairRows, middle: Rectifier | None, behind: Rectifier | None, free_offsets: tuple[bool, bool]
    ) -> None:
        self.rows, self.middle, self.behind = rows, middle, behind
        self.free_first, self.free_second = free_offsets
        cut = rows.n_train * rows.taps
        self.x, self.inside = rows.x[:cut], rows.inside[:cut, None]
        gram = np.empty((rows.x.shape[1] + 1,) * 2)
        gram[:-1, :-1] = self.x.T @ self.x
        gram[-1, :-1] = gram[:-1, -1] = self.x.sum(0, dtype=np.float64)
        gram[-1, -1] = len(self.x)
        self.gram = gram / max(1, len(self.x))
        self.scale = max(float(np.trace(self.gram[:-1, :-1])) / max(1, len(gram) - 1), 1e-30)
        diagonal = np.full(len(gram), RIDGE * self.scale)
        diagonal[-1] = 1e-6 * self.scale
        self.inverse = np.linalg.inv(self.gram + np.diag(diagonal))

    def hidden(self, first: Weights, x: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values between the operators, and the rectifier's slope at each."""
        z = x @ first.matrix[0].astype(np.float32) + first.offset[0].astype(np.float32)
        if self.middle is None:
            return z * inside, np.broadcast_to(inside, z.shape)
        slope = np.where(z > 0, np.float32(1), np.float32(self.middle.slope)) * (z < self.middle.top) * inside
        return self.middle(z) * inside, slope

    def second_rows(self, first: Weights, begin: int, end: int) -> Rows:
        """What the second operator sees at some positions."""
        rows = self.rows
        part = slice(begin * rows.taps, end * rows.taps)
        values, _ = self.hidden(first, rows.x[part], rows.inside[part, None])
        skip = None if rows.skip is None else rows.skip[None, begin:end]
        return Rows(values.reshape(1, end - begin, -1), rows.target[None, begin:end], skip, end - begin)

    def judged(self, first: Weights, second: Weights) -> float:
        """Error on images held back; on all where there are none."""
        n = len(self.rows.target)
        begin = self.rows.n_train if self.rows.n_train < n else 0
        return error(self.second_rows(first, begin, n), second, self.behind)

    def fit_second(self, first: Weights, second: Weights) -> Weights:
        """Solve the second operator for what the first one gives."""
        rows = self.second_rows(first, 0, self.rows.n_train)
        return least_squares(rows, second, RIDGE, self.behind, free_offset=self.free_second)

    def improve_first(self, first: Weights, second: Weights) -> Weights:
        """One step of Gauss and Newton for the first operator, halved until the error falls."""
        rows, n = self.rows, self.rows.n_train
        values, slope = self.hidden(first, self.x, self.inside)
        seen = Rows(
            values.reshape(1, n, -1), rows.target[None, :n], None if rows.skip is None else rows.skip[None, :n], n
        )
        z = second.output(seen)[0]
        aim = rows.target[:n] if self.behind is None else self.behind.aim(z, rows.target[:n])
        weights = second.matrix[0].astype(np.float32)
        q = values.shape[1]
        spread = sum(part @ part.T for part in weights.astype(np.float64).reshape(rows.taps, q, -1))
        right = np.linalg.inv(spread + np.eye(q) * (1e-2 * np.trace(spread) / q + 1e-30))
        penalty = RIDGE * self.scale * np.trace(spread) / q

        def forward(step: np.ndarray) -> np.ndarray:
            moved = (self.x @ step[:-1].astype(np.float32) + step[-1].astype(np.float32)) * slope
            return moved.reshape(n, -1) @ weights

        def backward(residual: np.ndarray) -> np.ndarray:
            pulled = (residual @ weights.T).reshape(-1, q) * slope
            found = np.empty((self.x.shape[1] + 1, q))
            found[:-1] = self.x.T @ pulled
            found[-1] = pulled.sum(0, dtype=np.float64) if self.free_first else 0.0
            return found / len(self.x)

        def precondition(step: np.ndarray) -> np.ndarray:
            found = self.inverse @ step @ right
            if not self.free_first:
                found[-1] = 0.0
            return found

        # conjugate gradients on the normal equations (Hestenes and Stiefel, 1952)
        step = np.zeros((self.x.shape[1] + 1, q))
        left = backward(aim - z)
        turned = precondition(left)
        direction, strength = turned, float(np.sum(left * turned))
        for _ in range(ITERATIONS):
            if not strength > 0:
                break
            bent = backward(forward(direction)) + penalty * direction
            length = strength / float(np.sum(direction * bent))
            step = step + length * direction
            left = left - length * bent
            turned = precondition(left)
            strength, old = float(np.sum(left * turned)), strength
            direction = turned + strength / old * direction
        now = error(seen, second, self.behind)
        for share in (1.0, 0.5, 0.25):
            moved = Weights(first.matrix + share * step[None, :-1], first.offset + share * step[None, -1])
            if error(self.second_rows(moved, 0, n), second, self.behind) < now:
                return moved
        return first
