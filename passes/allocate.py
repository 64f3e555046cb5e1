"""Allocate: in which order the units of all groups go, so that the budget is freed where it hurts least.

Greedy: the next units to go are those with the least error per cost saved, savings taken at the counts kept by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from onnxprune.cost import Cost
from onnxprune.passes.rank import Ranking

ALLOCATIONS = ("sensitivity", "error-per-mac", "error")
"""How groups compare: by what removals do to the output, by errors inside per MAC, or by errors alone."""

STEPS = 64
"""Steps in which a group's units go, at least."""


def allocate(
    cost: Cost, rankings: Sequence[Ranking], weights: np.ndarray, kinds: Iterable[str], *, per_cost: bool = True,
    cuts: Sequence[Sequence[int]] | None = None,
) -> np.ndarray:  # fmt: skip
    """Order in which classes go, float64 ``(n_classes,)``; lower goes first, infinite never.

    Parameters
    ----------
    weights
        What a ranking's errors are multiplied by.
    kinds
        Kinds of cost to save; each counts as a share of the original's.
    cuts
        Per ranking, how many units may have gone, ascending from zero; by default any number.
    """
    counts = cost.counts(np.ones(cost.coupling.n_classes, bool))
    whole = {kind: max(cost.total(kind, counts), 1e-30) for kind in kinds} if per_cost else {}
    order = np.full(cost.coupling.n_classes, np.inf)
    steps = [_steps(ranking) for ranking in rankings] if cuts is None else cuts
    sides = [_Side(cost, *each) for each in zip(rankings, weights, steps, strict=True)]
    meets = _meeting(cost, sides, whole)
    for side in sides:
        side.judge(counts, whole)
    turn = 0
    while open_ := [side for side in sides if side.open]:
        best = min(open_, key=lambda side: side.price)
        for unit in best.units:
            order[unit] = turn
            turn += 1
        counts[best.atoms] = np.maximum(counts[best.atoms] - best.times, 1e-9)
        number = sides.index(best)
        best.advance()
        for other in np.flatnonzero(meets[number]):
            sides[other].judge(counts, whole)
    return order


def _steps(ranking: Ranking) -> list[int]:
    end = ranking.bundle.removable
    return [*range(0, end, max(1, end // STEPS)), end]


def _meeting(cost: Cost, sides: Sequence[_Side], kinds: Iterable[str]) -> np.ndarray:
    """Which sides share a row of the costs, so that what one saves changes with the other: bool ``(n_sides, n_sides)``."""
    meets = np.eye(len(sides), dtype=bool)
    for kind in kinds:
        rows: dict[int, list[int]] = {}
        for number, side in enumerate(sides):
            for row in cost.terms[kind].touched(side.atoms).tolist() if side.open else ():
                rows.setdefault(row, []).append(number)
        for numbers in rows.values():
            meets[np.ix_(numbers, numbers)] = True
    return meets


class _Side:
    """One bundle on its way down; ``price`` is the error per cost saved of its next step, per unit where none counts."""

    def __init__(self, cost: Cost, ranking: Ranking, weight: float, steps: Sequence[int]) -> None:
        self.cost, self.ranking, self.steps = cost, ranking, steps
        self.errors = ranking.errors * weight
        self.price = np.inf
        self.number = 0
        self._load()

    @property
    def open(self) -> bool:
        """Whether anything may still go."""
        return self.number + 1 < len(self.steps)

    def judge(self, counts: np.ndarray, whole: Mapping[str, float]) -> None:
        """Work out the price at these counts."""
        if self.open:
            error = float(self.errors[self.steps[self.number] : self.steps[self.number + 1]].sum())
            terms = ((self.cost.terms[kind], total) for kind, total in whole.items())
            saved = -sum(term.change(counts, self.atoms, -self.times) / total for term, total in terms)
            saved = saved if whole else len(self.units)
            self.price = error / saved if saved > 0 else np.inf

    def advance(self) -> None:
        """Go on to the next step."""
        self.number += 1
        self._load()

    def _load(self) -> None:
        if self.open:
            self.units = self.ranking.units[self.steps[self.number] : self.steps[self.number + 1]]
            self.atoms, self.times = self.cost.increment(self.units.ravel())
