"""Select: which channels to keep so that the model fits its budget, and nothing more could be kept.

Threshold of group g = lambda * e(g)^alpha * balance(g). All channels are therefore ordered by
``score / (e^alpha * balance)``; lambda is found by bisection on that order, then whatever still fits is restored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from math import ceil

import numpy as np

from onnxprune.cost import Cost
from onnxprune.coupling import Bundle, Coupling, Group
from onnxprune.errors import BudgetError
from onnxprune.passes.score import Scores

KEEP_SHARE = 1 / 8
"""Share of every group's channels that presets b, c and d never remove ("keep layer depth")."""


@dataclass(frozen=True, slots=True)
class Preset:
    """How thresholds adapt: ``floor`` share of channels to keep, ``alpha`` exponent of MAC efficiency, balancing."""

    floor: float
    alpha: float
    balance: bool


PRESETS = {
    "a": Preset(0.0, 0.0, balance=False),
    "b": Preset(KEEP_SHARE, 0.0, balance=False),
    "c": Preset(KEEP_SHARE, 0.5, balance=False),
    "d": Preset(KEEP_SHARE, 0.5, balance=True),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a user allows: see the options of the same names.

    Attributes
    ----------
    align
        Kept channels of a group are a multiple of this, or all of them.
    min_channels, max_prune
        Least number to keep and largest share to remove, per group.
    permitted
        Of bundles, by the id of their first group: whether so many units may go, as ``passes.align`` finds it.
    """

    align: int = 1
    min_channels: int = 1
    max_prune: float = 1.0
    permitted: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def in_blocks(self) -> bool:
        """Whether channels go in blocks."""
        return self.align > 1 or any(not mask.all() for mask in self.permitted.values())


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Channels to keep (bool of shape ``(n_classes,)``), and the lowest cost per budgeted kind that was possible."""

    keep: np.ndarray
    floor: Mapping[str, float]


def select(
    coupling: Coupling, cost: Cost, scores: Scores, budget: Mapping[str, float], preset: Preset, limits: Limits
) -> Selection:
    """Choose the channels to keep so that the model fits the budget.

    Parameters
    ----------
    budget
        Upper bound per kind of cost (a key of ``cost.terms``), absolute.

    Raises
    ------
    BudgetError
        Frozen layers and limits alone exceed the budget.
    """
    n = coupling.n_classes
    channels, ends, owner, losses = _ordered(coupling, cost, scores, preset, limits)

    def kept(n_units: int) -> np.ndarray:
        keep = np.ones(n, bool)
        keep[channels[: ends[n_units]]] = False
        return keep

    def fits(keep: np.ndarray) -> bool:
        counts = cost.counts(keep)
        return all(cost.total(kind, counts) <= limit for kind, limit in budget.items())

    all_removed = cost.counts(kept(len(owner)))
    floor = {kind: cost.total(kind, all_removed) for kind in budget}
    low, high = 0, len(owner)
    if "latency" in budget:  # fewer channels may take longer: the first that fit are looked for, not the last
        tried = np.unique(np.linspace(0, high, PREFIXES).round().astype(int)).tolist()
        place = next((i for i, number in enumerate(tried) if fits(kept(number))), len(tried) - 1)
        low, high = tried[max(place - 1, 0)], tried[place]
    if not fits(kept(high)):
        raise _out_of_reach(coupling, cost, kept(high), floor, budget)
    while low < high:
        middle = (low + high) // 2
        if fits(kept(middle)):
            high = middle
        else:
            low = middle + 1
    keep = _restore(cost, kept(low), channels, ends, owner[:low], budget)
    if limits.in_blocks:
        blocks = [channels[begin:end] for begin, end in pairwise(ends)]
        keep = _exchange(cost, keep, blocks, owner, losses, budget)
    return Selection(keep, floor)


def prices(
    coupling: Coupling, cost: Cost, scores: Scores, preset: Preset, limits: Limits, points: int = 32
) -> list[tuple[float, float]]:
    """What each budget takes: (share of MAC kept, share of the scores of all channels that may go which goes).

    Channels go in the order of :func:`select`, without what that restores in the end; at most ``points`` steps, from
    everything down to everything that may go.
    """
    channels, ends, owner, _ = _ordered(coupling, cost, scores, preset, limits)
    groups = [group for group in coupling.groups if group.frozen is None]
    whole = scores.value[np.concatenate([np.zeros(0, np.int64), *(group.classes for group in groups)])].sum()
    full = cost.total("mac", cost.counts(np.ones(coupling.n_classes, bool)))
    if not len(owner) or not whole or not full:
        return []
    found = []
    for number in np.unique(np.linspace(0, len(owner), points).round().astype(int)):
        keep, gone = np.ones(coupling.n_classes, bool), channels[: ends[number]]
        keep[gone] = False
        found.append((float(cost.total("mac", cost.counts(keep)) / full), float(scores.value[gone].sum() / whole)))
    return found


def least_kept(coupling: Coupling, preset: Preset, limits: Limits, order: np.ndarray | None = None) -> np.ndarray:
    """What stays with everything removed that may be, lowest in ``order`` (per class) first; bool per class."""
    order = np.zeros(coupling.n_classes) if order is None else order
    keep = np.ones(coupling.n_classes, bool)
    for bundle in coupling.bundles:
        keep[bundle.units(order)[: removals(bundle, preset, limits)[-1]]] = False
    return keep


def lowest(coupling: Coupling, cost: Cost, preset: Preset, limits: Limits) -> dict[str, float]:
    """Cost of every kind with everything removed that may be."""
    counts = cost.counts(least_kept(coupling, preset, limits))
    return {kind: cost.total(kind, counts) for kind in cost.kinds}


def effective_scores(cost: Cost, scores: Scores, groups: list[Group], preset: Preset) -> np.ndarray:
    """Return ``score / (e^alpha * balance)`` per class.

    ``e(g)`` is the MAC saved per weight removed by one channel of g, over the network's own ratio. Scores of one layer may
    lie within 3 % or span decades, and MAC per weight spans a factor of 256 in a U-Net, so the exponent is measured in
    standard deviations: log e varies across groups, times alpha, as much as log scores vary within groups.
    ``balance(g)`` raises the threshold of groups that several tensors must agree on: as the maximum over m members lies
    higher and closer together than a single norm, g's channel of rank p is compared by the p-quantile of the channels that
    one tensor alone decides. At every lambda such a group thus gives up the same share as those do.
    """
    order = scores.value.copy()
    if preset.balance:
        shared = [group for group in groups if scores.members[group.classes].max() > 1]
        single = [group for group in groups if scores.members[group.classes].max() <= 1]
        pool = np.concatenate([np.zeros(0), *(scores.value[group.classes] for group in single or groups)])
        for group in shared:
            rank = np.argsort(np.argsort(scores.value[group.classes], kind="stable"), kind="stable")
            order[group.classes] = np.quantile(pool, (rank + 0.5) / group.size)
    if preset.alpha and groups:
        efficiency = _mac_per_weight(cost, groups)
        spread = np.concatenate([_log_deviation(order[group.classes]) for group in groups]).std()
        alpha = preset.alpha * spread / max(1.0, float(np.log(efficiency).std()))
        for group, ratio in zip(groups, efficiency, strict=True):
            order[group.classes] /= ratio**alpha
    return order


def _ordered(
    coupling: Coupling, cost: Cost, scores: Scores, preset: Preset, limits: Limits
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    groups = [group for group in coupling.groups if group.frozen is None]
    order = effective_scores(cost, scores, groups, preset) if scores.order is None else scores.order
    losses = order if scores.order is None else scores.value
    return _removal_order(coupling.bundles, order, losses, preset, limits)


def _mac_per_weight(cost: Cost, groups: list[Group]) -> np.ndarray:
    """MAC saved per weight removed by one channel of each group, over the network's own ratio."""
    full = cost.counts(np.ones(cost.coupling.n_classes, bool))
    slopes = [terms.slope(full) for terms in (cost.layers, cost.weights)]
    saved, removed = np.ones(len(groups)), np.ones(len(groups))
    alone = {b.groups[0].id: b.cells for b in cost.coupling.bundles if len(b.groups) == 1}
    for index, group in enumerate(groups):
        # One channel of every cell: a tensor in rows becomes smaller only where each row does.
        atoms, times = cost.increment(np.array([cell[0] for cell in alone.get(group.id, [group.classes])]))
        mac, weights = (float(times @ slope[atoms]) for slope in slopes)
        if mac > 0 and weights > 0:
            saved[index], removed[index] = mac / cost.total("mac", full), weights / cost.total("weights", full)
    return saved / removed


def _log_deviation(scores: np.ndarray) -> np.ndarray:
    """Deviation of log scores from their group's mean."""
    logs = np.log(np.maximum(scores, 1e-6))
    return logs - logs.mean()


def _removal_order(
    bundles: Sequence[Bundle], order: np.ndarray, losses: np.ndarray, preset: Preset, limits: Limits
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Blocks in the order in which they go: their channels end to end, where each ends, its bundle, and what it loses."""
    runs, scores, sizes, owner, lost = [], [], [], [], []
    for number, bundle in enumerate(bundles):
        units = bundle.units(order)
        cuts = np.array(removals(bundle, preset, limits))
        if len(cuts) > 1:
            means = np.add.reduceat(order[units[: cuts[-1]]].mean(1), cuts[:-1])
            scores.append(np.maximum.accumulate(means / np.diff(cuts)))
            lost.append(np.add.reduceat(losses[units[: cuts[-1]]].mean(1), cuts[:-1]))
            runs.append(units[: cuts[-1]].ravel())
            sizes.append(np.diff(cuts) * bundle.unit)
            owner.append(np.full(len(cuts) - 1, number))
    if not runs:
        return np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0)
    flat_sizes, flat_owner = np.concatenate(sizes), np.concatenate(owner)
    turn = np.argsort(np.concatenate(scores), kind="stable")
    place = np.empty(len(turn), np.int64)
    place[turn] = np.arange(len(turn))
    channels = np.concatenate(runs)[np.argsort(np.repeat(place, flat_sizes), kind="stable")]
    return channels, np.concatenate([[0], np.cumsum(flat_sizes[turn])]), flat_owner[turn], np.concatenate(lost)[turn]


def removals(bundle: Bundle, preset: Preset, limits: Limits) -> list[int]:
    """Numbers of units that may be removed from a bundle, ascending from zero."""
    size = bundle.size
    least = max(1, limits.min_channels, ceil(preset.floor * size), ceil((1 - limits.max_prune) * size - 1e-9))
    numbers = np.arange(1, bundle.removable + 1)
    kept = size - numbers * bundle.unit
    allowed = (kept >= least) & (kept % limits.align == 0)
    mask = limits.permitted.get(bundle.groups[0].id)
    return [0, *numbers[allowed if mask is None else allowed & mask[1:]].tolist()]


def _restore(
    cost: Cost, keep: np.ndarray, channels: np.ndarray, ends: np.ndarray, owner: np.ndarray, budget: Mapping[str, float]
) -> np.ndarray:
    """Put back the best units that still fit; a group whose next unit does not fit never will."""
    counts = cost.counts(keep)
    left = {kind: limit - cost.total(kind, counts) for kind, limit in budget.items()}
    full: set[int] = set()
    for unit in range(len(owner) - 1, -1, -1):
        if int(owner[unit]) in full:
            continue
        mine = channels[ends[unit] : ends[unit + 1]]
        atoms, times = cost.increment(mine)
        growth = {kind: cost.terms[kind].change(counts, atoms, times) for kind in budget}
        if all(growth[kind] <= left[kind] for kind in budget):
            keep[mine] = True
            counts[atoms] += times
            left = {kind: left[kind] - growth[kind] for kind in budget}
        else:
            full.add(int(owner[unit]))
    return keep


PREFIXES = 512
"""Numbers of blocks gone that are tried where the cost of fewer channels may be higher."""

TRIED = 24
"""Blocks on either side of which two move at once, and exchanges that are tried at a time."""

EXCHANGES = 48
"""Exchanges that are made; many small blocks lie close to the best way as they are."""


def _exchange(
    cost: Cost, keep: np.ndarray, blocks: Sequence[np.ndarray], owner: np.ndarray, losses: np.ndarray,
    budget: Mapping[str, float],
) -> np.ndarray:  # fmt: skip
    """Exchange blocks between bundles while that loses less: up to two come back, and up to two others go.

    Blocks are coarse, so the order in which they go does not end at the best way to fill the budget. ``blocks`` are those of
    all bundles in that order; ``losses`` what each loses.
    """
    mine: dict[int, list[int]] = {}
    for number, bundle in enumerate(owner.tolist()):
        mine.setdefault(bundle, []).append(number)
    gone = {bundle: sum(not keep[blocks[n][0]] for n in numbers) for bundle, numbers in mine.items()}
    limits = np.array([*budget.values()])
    counts = cost.counts(keep)
    left = limits - [cost.total(kind, counts) for kind in budget]
    atoms = [cost.increment(block) for block in blocks]

    def growth(counts: np.ndarray, block: int, sign: int) -> np.ndarray:
        return np.array([cost.terms[kind].change(counts, atoms[block][0], sign * atoms[block][1]) for kind in budget])

    for made in count():
        back = [mine[bundle][n - 1] for bundle, n in gone.items() if n]
        away = [mine[bundle][n] for bundle, n in gone.items() if n < len(mine[bundle])]
        sides = [
            (block, sign, losses[block], growth(counts, block, sign))
            for found, sign in ((back, 1), (away, -1))
            for block in found
        ]
        for move in _moves(sides if made < EXCHANGES else sides[: len(back)], left, limits):
            after, grown = counts.copy(), np.zeros(len(limits))
            for block, sign in move:
                grown += growth(after, block, sign)
                after[atoms[block][0]] += sign * atoms[block][1]
            if len({int(owner[block]) for block, _ in move}) == len(move) and (grown <= left).all():
                break
        else:
            return keep
        for block, sign in move:
            keep[blocks[block]] = sign > 0
            gone[int(owner[block])] -= sign
        counts, left = after, left - grown
    return keep


def _moves(
    sides: Sequence[tuple[int, int, float, np.ndarray]], left: np.ndarray, limits: np.ndarray
) -> list[list[tuple[int, int]]]:
    """Sets of blocks that come back (1) and go (-1), those that gain most first, by what each alone adds to the cost."""
    sets = []
    for sign in (1, -1):
        own = [side for side in sides if side[1] == sign]
        # Those that gain much for what they cost come back, those that lose little for what they free go.
        own.sort(key=lambda side: -sign * side[2] / max(float((np.abs(side[3]) / limits).max()), 1e-30))
        pairs = [(i, j) for i in range(min(len(own), TRIED)) for j in range(i)]
        members = [(), *((i,) for i in range(len(own))), *pairs]
        value = np.array([sum(own[i][2] for i in member) for member in members])
        grown = np.array([sum((own[i][3] for i in member), np.zeros(len(limits))) for member in members])
        sets.append((own, members, value, grown))
    (back, ins, gain, more), (away, outs, loss, less) = sets
    net = gain[:, None] - loss
    # Costs are products, so sums of changes are not exact; what is a little over may fit.
    fits = (more[:, None] + less <= left + 0.02 * (np.abs(more)[:, None] + np.abs(less))).all(2)
    two = np.array([len(member) for member in ins])[:, None] + [len(member) for member in outs] <= 3
    places = np.flatnonzero((fits & two & (net > 1e-12 * max(float(gain.max(initial=0.0)), 1e-30))).ravel())
    best = places[np.argsort(-net.ravel()[places], kind="stable")[:TRIED]]
    found = []
    for place in best.tolist():
        a, b = divmod(place, len(outs))
        found.append([*((back[i][0], 1) for i in ins[a]), *((away[i][0], -1) for i in outs[b])])
    return found


def _out_of_reach(
    coupling: Coupling, cost: Cost, keep: np.ndarray, floor: Mapping[str, float], budget: Mapping[str, float]
) -> BudgetError:
    kind = next(kind for kind, limit in budget.items() if floor[kind] > limit)
    counts = cost.counts(keep)
    macs = cost.layers.values(counts)
    culprits = tuple(cost.works[i].node.title for i in np.argsort(-macs, kind="stable")[:3])
    full = cost.total(kind, cost.counts(np.ones(coupling.n_classes, bool)))
    message = (
        f"target out of reach: {budget[kind] / full:.4g} of {kind} requested, but {floor[kind] / full:.4g} remains with "
        f"everything removed that may be; most of it in {', '.join(culprits)}. "
        f'See "onnxprune inspect" for what is frozen and why; another --preset or fewer limits may help'
    )
    return BudgetError(message, floor[kind], culprits)
