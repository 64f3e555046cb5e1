"""Align: how many units of a bundle may go, so that every operator keeps channel counts that its hardware computes well.

A count that pruning changes must become a multiple of what the profile says for the operator, stay above its least and off
its forbidden counts. Counts that are no multiples in the original may stay as they are. Every bundle is free on its own:
whatever the others do, no operator ends up with another count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd, prod

import numpy as np

from onnxprune.coupling import Bundle, Coupling, distinct, first_row
from onnxprune.labels import Axis, Work, length
from onnxprune.profile import Profile, kind_of


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """What a profile asks of one axis of one operator; ``side`` 0 is inputs, 1 outputs."""

    work: Work
    side: int
    axis: Axis
    multiple: int
    least: int
    never: frozenset[int]

    def met(self, before: int, after: int) -> bool:
        """Whether a count may become another."""
        return after == before or (after % self.multiple == 0 and after >= self.least and after not in self.never)


def demands(coupling: Coupling, profile: Profile) -> list[Demand]:
    """Everything that a profile asks of a model, in the order of its operators."""
    return list(_demands(coupling, profile))


def _demands(coupling: Coupling, profile: Profile) -> Iterator[Demand]:
    for work in coupling.ledger.works:
        kind = kind_of(work)
        if not kind or work.channels is None:
            continue
        multiples, least, never = profile.multiple(kind), profile.least(kind), profile.never(kind)
        channels = work.channels
        axes = [(0, channels.inputs), (1, channels.outputs)]
        if kind == "GroupedConv":  # of each group; multiples of that are multiples in all, too
            axes += [(0, channels.summed), (1, channels.outputs if channels.made is None else channels.made)]
        for side, axis in axes:
            if multiples[side] > 1 or least[side] > 1 or never[side]:
                yield Demand(work, side, axis, multiples[side], least[side], never[side])


def permitted(coupling: Coupling, profile: Profile) -> Mapping[str, np.ndarray]:
    """How many units may go from each bundle: bool ``(removable + 1,)`` by the id of its first group."""
    found = {bundle.groups[0].id: np.ones(bundle.removable + 1, bool) for bundle in coupling.bundles}
    owner = np.full(coupling.n_classes, -1)
    for number, bundle in enumerate(coupling.bundles):
        owner[np.concatenate(bundle.cells)] = number
    for demand in demands(coupling, profile):
        atoms = [(atom, coupling.classes[first_row(atom.labels)]) for atom in demand.axis if atom.labels is not None]
        free = [(atom, classes) for atom, classes in atoms if (owner[classes] >= 0).any()]
        still = length(demand.axis) // prod(atom.size for atom, _ in free)
        rest = demand.multiple // gcd(demand.multiple, still)
        for atom, classes in free:
            # The innermost carries the whole multiple: the others may then be what they like.
            share = rest if atom is free[-1][0] else rest // gcd(rest, free[-1][0].size)
            owners = [number for number in distinct(owner[classes]).tolist() if number >= 0]
            for number in owners:
                bundle = coupling.bundles[number]
                mask = found[bundle.groups[0].id]
                gone = np.arange(len(mask)) * _lost(bundle, classes)
                own = int((owner[classes] == number).sum())
                if len(owners) == 1:
                    fits = _fits(demand, share, (atom.size - gone) * still, atom.size - gone, exact=len(free) == 1)
                else:  # a multiple stays one when multiples are taken from it
                    fits = _fits(demand, share, (own - gone) * still, gone, exact=False) & (atom.size % share == 0)
                mask &= fits | (gone == 0)
    return found


def locked(coupling: Coupling, permitted: Mapping[str, np.ndarray]) -> list[str]:
    """Bundles, by the id of their first group, that could shrink but for the counts that ``permitted`` allows.

    Among them are parts of a concatenation that could shrink together alone: 24 and 40 channels, in blocks of 16.
    """
    names = [bundle.groups[0].id for bundle in coupling.bundles if bundle.removable]
    return [name for name in names if name in permitted and not permitted[name][1:].any()]


def _lost(bundle: Bundle, classes: np.ndarray) -> int:
    """Indices of an axis (its classes) that go with one unit."""
    pairs = zip(bundle.cells, bundle.shares, strict=True)
    return sum(int(np.isin(classes, cell).sum()) * share // len(cell) for cell, share in pairs)


def _fits(demand: Demand, share: int, counts: np.ndarray, multiples: np.ndarray, *, exact: bool) -> np.ndarray:
    """Which ``counts`` meet a demand, given numbers that must be multiples of ``share``; forbidden counts must be exact."""
    fits = (multiples % share == 0) & (counts >= demand.least)
    if demand.never:
        fits &= ~np.isin(counts, list(demand.never)) if exact else False
    return fits


def violations(coupling: Coupling, profile: Profile, keep: np.ndarray) -> list[tuple[Demand, int]]:
    """Demands that a count does not meet although pruning changed it; ``keep`` is a bool per class."""
    found = []
    for demand in demands(coupling, profile):
        after = _count(coupling, demand.axis, keep)
        if not demand.met(length(demand.axis), after):
            found.append((demand, after))
    return found


def foreign(coupling: Coupling, profile: Profile) -> list[Demand]:
    """Demands that the model does not meet as it is."""
    return [d for d in demands(coupling, profile) if not d.met(-1, length(d.axis))]


def _count(coupling: Coupling, axis: Axis, keep: np.ndarray) -> int:
    return prod(
        atom.size if atom.labels is None else int(keep[coupling.classes[first_row(atom.labels)]].sum()) for atom in axis
    )
