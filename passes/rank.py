"""Rank: in which order channels of a group should go, and how much error each removal adds.

Optimal brain surgeon on channels: removing regressors u of a linear operator and updating the others optimally adds
``tr(W_u^T ((H^-1)_uu)^-1 W_u)`` to its squared error (Hassibi and Stork, 1993; H holds second moments of the inputs). Errors
are taken relative to the variance of the operator's output and summed over all operators that read the group; channels go
one after another, cheapest first, with H and W updated each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.coupling import Bundle, Coupling
from onnxprune.passes.calibrate import Consumer
from onnxprune.passes.score import Scores

RIDGE = 1e-3
"""Added to the moments, as a share of the mean square of a regressor."""

PROBE = 0.3
"""Share of a bundle's channels after whose removal its weight on the network's output is measured."""

ROUNDS = 128
"""Removals of a bundle are found in this many rounds at most."""


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """The order in which the units of one bundle go.

    Attributes
    ----------
    units
        Classes of every unit, int64 ``(n_units, unit)``, first to go first.
    errors
        Relative error that each removal adds, summed over readers, float64 ``(n_units,)``.
    measured
        Whether errors come from calibration; without a linear reader they are shares of squared weight norms.
    probe
        Number of removals after which ``weights`` were noted.
    weights
        By node: its weights after so many removals, float64 ``(blocks, p + 1, q)``, the bias's change last.
    """

    bundle: Bundle
    units: np.ndarray
    errors: np.ndarray
    measured: bool
    probe: int
    weights: Mapping[str, np.ndarray]


def rank(coupling: Coupling, consumers: Sequence[Consumer], magnitude: Scores) -> list[Ranking]:
    """Rank the channels of every bundle; ``magnitude`` orders those that no linear operator reads whose output varies."""
    rankings = []
    consumers = [consumer for consumer in consumers if consumer.varies]
    for bundle in coupling.bundles:
        classes = np.concatenate(bundle.cells)
        readers = [c for c in consumers if np.isin(c.columns, classes).any()]
        rankings.append(_eliminate(bundle, readers) if readers else _by_magnitude(bundle, magnitude))
    return rankings


def _by_magnitude(bundle: Bundle, magnitude: Scores) -> Ranking:
    units = bundle.units(magnitude.value)
    squares = np.square(magnitude.value)[units].sum(1)
    return Ranking(bundle, units, squares / max(squares.sum(), 1e-30), False, _probe(bundle), {})


def _probe(bundle: Bundle) -> int:
    return min(bundle.n_units, max(1, round(PROBE * bundle.n_units)))


def _eliminate(bundle: Bundle, readers: Sequence[Consumer]) -> Ranking:
    eliminations = [_Elimination(reader) for reader in readers]
    left = [cell.copy() for cell in bundle.cells]
    units, errors, probe = [], [], _probe(bundle)
    weights: dict[str, np.ndarray] = {}
    step = -(-bundle.n_units // ROUNDS)
    while len(units) < bundle.n_units:
        count = min(step, bundle.n_units - len(units), probe - len(units) if len(units) < probe else step)
        parts = []
        for number, (cell, share) in enumerate(zip(left, bundle.shares, strict=True)):
            order = np.argsort(sum(each.errors(cell) for each in eliminations), kind="stable")
            parts.append(cell[order[: count * share]].reshape(count, share))
            left[number] = cell[np.sort(order[count * share :])]
        chosen = np.concatenate(parts, 1)
        added = sum(each.remove(chosen.ravel()) for each in eliminations)
        units += list(chosen)
        errors += [added / count] * count
        if len(units) == probe:
            weights = {each.consumer.node.key: each.weights.copy() for each in eliminations}
    return Ranking(bundle, np.array(units), np.maximum.accumulate(errors), True, probe, weights)


class _Elimination:
    """A reader whose regressors go one channel after another, the weights of the others updated optimally."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        blocks, p, q = consumer.matrix.shape
        gram = consumer.gram
        mean_square = np.einsum("gii->g", gram[:, :p, :p]) / p
        mean_square[mean_square == 0] = 1.0  # of a block that nothing reaches
        diagonal = np.full((blocks, p + 1), RIDGE) * mean_square[:, None]
        diagonal[:, p] = 1e-9
        self.inverse = np.linalg.inv(gram + np.eye(p + 1) * diagonal[:, None])
        self.weights = np.concatenate([consumer.matrix, np.zeros((blocks, 1, q))], 1)
        self.energy = consumer.energy
        self._places: dict[int, list[tuple[int, np.ndarray]]] = {}
        for block, columns in enumerate(consumer.columns):
            order = np.argsort(columns, kind="stable")
            for run in np.split(order, np.flatnonzero(np.diff(columns[order])) + 1):
                self._places.setdefault(int(columns[run[0]]), []).append((block, run))

    def errors(self, classes: np.ndarray) -> np.ndarray:
        """Relative error that removing each class would add, float64 of the shape of ``classes``."""
        alike: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}
        for place, channel in enumerate(classes.tolist()):
            for block, run in self._places.get(channel, ()):
                alike.setdefault((block, len(run)), []).append((place, run))
        errors = np.zeros(len(classes))
        for (block, _), runs in alike.items():
            columns = np.array([run for _, run in runs])
            weights = self.weights[block][columns]
            inverse = np.linalg.inv(self.inverse[block][columns[:, :, None], columns[:, None]])
            np.add.at(errors, [place for place, _ in runs], (weights * (inverse @ weights)).sum((1, 2)))
        return errors / self.energy

    def remove(self, channels: np.ndarray) -> float:
        """Remove classes together; return the relative error that this adds."""
        error = 0.0
        runs: dict[int, list[np.ndarray]] = {}
        for channel in channels.tolist():
            for block, run in self._places.get(channel, ()):
                runs.setdefault(block, []).append(run)
        for block, parts in runs.items():
            run = np.concatenate(parts)
            weights, inverse = self.weights[block], self.inverse[block]
            side, own = inverse[:, run], weights[run]
            solved = np.linalg.solve(side[run], np.concatenate([own, side.T], 1))
            error += float((own * solved[:, : own.shape[1]]).sum())
            weights -= side @ solved[:, : own.shape[1]]
            inverse -= side @ solved[:, own.shape[1] :]
            weights[run] = 0.0
            inverse[run] = inverse[:, run] = 0.0
            inverse[run, run] = 1e-30
        return error / self.energy


def by_activation(coupling: Coupling, consumers: Sequence[Consumer], magnitude: Scores, *, weighted: bool) -> Scores:
    """Score channels by the root mean square of what reaches their readers, over the mean of each reader's channels.

    ``weighted`` multiplies every regressor by the norm of the weights that read it (Sun et al. 2023, Wanda, summed to
    channels). Over readers the maximum counts; channels that no linear operator reads keep their magnitude.
    """
    value = np.full(coupling.n_classes, -1.0)
    members = np.zeros(coupling.n_classes, np.int64)
    for consumer in consumers:
        p = consumer.matrix.shape[1]
        squares = np.einsum("gii->gi", consumer.gram[:, :p, :p])
        if weighted:
            squares = squares * np.square(consumer.matrix).sum(2)
        present, inverse = np.unique(consumer.columns, return_inverse=True)
        found = np.sqrt(np.bincount(inverse.ravel(), squares.ravel()))
        if not found.any():
            continue
        found /= found.mean()
        value[present] = np.maximum(value[present], found)
        members[present] += 1
    unread = value < 0
    return Scores(np.where(unread, magnitude.value, value), np.where(unread, magnitude.members, members))
