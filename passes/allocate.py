"""Allocate: in which order the units of all groups go, so that the budget is freed where it hurts least.

Greedy: the next units to go are those with the least error per cost saved, savings taken at the counts kept by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from onnxprune.cost import Cost
from onnxprune.passes.rank import Ranking

ALLOCATIONS = ("sensitivity", "error-per-mac", "error")
"""How groups compare: by what removals do to the output, by errors inside per MAC, or by errors alone."""

STEPS = 64
"""Steps in which a group's units go, at least."""


def allocate(
    cost: Cost, rankings: Sequence[Ranking], weights: np.ndarray, kinds: Iterable[str], *, per_cost: bool = True
) -> np.ndarray:
    """Order in which classes go, float64 ``(n_classes,)``; lower goes first, infinite never.

    Parameters
    ----------
    weights
        What a ranking's errors are multiplied by.
    kinds
        Kinds of cost to save; each counts as a share of the original's.
    """
    counts = cost.counts(np.ones(cost.coupling.n_classes, bool))
    whole = {kind: max(cost.total(kind, counts), 1.0) for kind in kinds}
    order = np.full(cost.coupling.n_classes, np.inf)
    sides = [_Side(cost, ranking, weight) for ranking, weight in zip(rankings, weights, strict=True)]
    turn = 0
    while open_ := [side for side in sides if side.place < side.end]:
        slope = sum(cost.terms[kind].slope(counts) / total for kind, total in whole.items())
        best = min(open_, key=lambda side: side.price(slope if per_cost else None))
        for unit in best.units:
            order[unit] = turn
            turn += 1
        counts[best.atoms] = np.maximum(counts[best.atoms] - best.times, 1e-9)
        best.advance()
    return order


class _Side:
    """One bundle on its way down."""

    def __init__(self, cost: Cost, ranking: Ranking, weight: float) -> None:
        self.cost, self.ranking = cost, ranking
        self.errors = ranking.errors * weight
        self.end = ranking.bundle.removable
        self.step = max(1, self.end // STEPS)
        self.place = 0
        self._load()

    @property
    def units(self) -> np.ndarray:
        """Units of the next step."""
        return self.ranking.units[self.place : min(self.end, self.place + self.step)]

    def price(self, slope: np.ndarray | None) -> float:
        """Error per cost saved of the next step; per unit where no slope is given."""
        error = float(self.errors[self.place : self.place + len(self.units)].sum())
        saved = float(self.times @ slope[self.atoms]) if slope is not None else len(self.units)
        return error / saved if saved > 0 else np.inf

    def advance(self) -> None:
        """Go on to the next step."""
        self.place += len(self.units)
        self._load()

    def _load(self) -> None:
        if self.place < self.end:
            self.atoms, self.times = self.cost.increment(self.units.ravel())
