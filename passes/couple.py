"""Couple: which channels live or die together, which are frozen and why.

Precondition: a model with static shapes. Postcondition: every label has a class; classes partition into groups that occupy
the same axes; keeping any non-empty subset of every unfrozen group leaves a valid graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

import numpy as np

from onnxprune import ops
from onnxprune.coupling import Coupling, distinct
from onnxprune.errors import UsageError
from onnxprune.labels import Decisions, Ledger, Reason, Split
from onnxprune.model import Model, Node
from onnxprune.passes.follow import unfollowed


def couple(model: Model, ignore: Sequence[str] = (), only: Sequence[str] = (), attention: str = "auto") -> Coupling:
    """Walk the graph once, then solve for classes.

    Parameters
    ----------
    ignore
        Globs of node names, tensor names or group ids that must not be pruned.
    only
        Globs: everything that matches none of them is frozen.
    attention
        One of :data:`onnxprune.coupling.ATTENTION`.
    """
    ledger = walk(model)
    if attention != "auto":
        ledger.frozen += _other_than(ledger, attention)
    coupling = _in_rows(ledger) if ledger.splits else _followed(ledger)
    if ignore or only:
        frozen = list(_excluded(coupling, ignore, only))
        if frozen:
            coupling.ledger.frozen += frozen
            coupling = _followed(coupling.ledger)
    return coupling


def _followed(ledger: Ledger) -> Coupling:
    """Solve, freezing what shapes cannot follow and what cannot shrink evenly."""
    coupling = solve(ledger)
    while extra := _impossible(coupling):
        ledger.frozen += extra
        coupling = solve(ledger)
    return coupling


def _other_than(ledger: Ledger, attention: str) -> list[tuple[np.ndarray, Reason]]:
    """Labels of what must not shrink in attention: dimensions of heads, or the heads themselves."""
    reason = Reason("", "", "", f"--attention {attention}")
    return [(labels.ravel(), reason) for labels in (ledger.head_dims if attention == "heads" else ledger.heads)]


def _impossible(coupling: Coupling) -> list[tuple[np.ndarray, Reason]]:
    return [*_uneven(coupling), *unfollowed(coupling)]


def _uneven(coupling: Coupling) -> Iterable[tuple[np.ndarray, Reason]]:
    for classes in coupling.uneven:
        labels = np.flatnonzero(np.isin(coupling.classes, classes))
        yield labels, Reason("", "", "", "its groups or heads cannot shrink evenly")


def _in_rows(first: Ledger) -> Coupling:
    """Walk again, knowing which factor of every split shrinks: where it is the inner one, rows choose freely.

    Constants have the same labels in both walks. What turns out to be impossible is frozen in the first, too, since another
    factor may then shrink instead.
    """
    model, known = first.model, first.constants

    def start(node: Node, index: int, axis: int) -> np.ndarray | None:
        name = model.aliases.get(node.inputs[index], node.inputs[index])
        atom = (known.get((name, node.key)) or known.get((name, "")) or {}).get(axis)
        return None if atom is None else atom.labels

    impossible: list[tuple[np.ndarray, Reason]] = []
    while True:
        ledger = walk(model, start, first.n_labels, Decided(solve(first)))
        ledger.frozen += impossible
        coupling = solve(ledger)
        extra = _impossible(coupling)
        if any((labels >= first.n_labels).any() for labels, _ in extra):
            ledger.frozen += extra
            return _followed(ledger)
        if not extra:
            return coupling
        impossible += extra
        first.frozen += extra


class Decided:
    """What a first walk decided about splits, for a second with the same labels of constants."""

    def __init__(self, first: Coupling) -> None:
        self._coupling = first

    def _known(self, labels: np.ndarray) -> np.ndarray | None:
        """Classes of labels; None where some are new."""
        return self._coupling.classes[labels] if (labels < len(self._coupling.classes)).all() else None

    def shrinking(self, grid: np.ndarray) -> str | None:
        """Which dimension of a grid (last axis: inner) shrinks: "outer", "inner", or None for neither."""
        classes = self._known(grid)
        if classes is None:
            return "inner"
        if self._coupling.frozen[classes].all():
            return None
        return "outer" if (classes == classes[..., :1]).all() else "inner"

    def can_shrink(self, labels: np.ndarray) -> bool:
        """Whether any of the labels may be removed."""
        classes = self._known(labels)
        return classes is None or not self._coupling.frozen[classes].all()

    def reason(self, labels: np.ndarray) -> Reason:
        """Why none of the labels may be removed."""
        return self._coupling.reasons[self._coupling.reason[self._coupling.classes[labels.ravel()[0]]]]


class Replayed:
    """What was decided about splits of the original, for a walk of the pruned graph (labels: the original's classes)."""

    def __init__(self, coupling: Coupling) -> None:
        self._frozen = coupling.frozen
        self._known: set[tuple[int, str | None, int]] = set()
        for labels, shrinking in coupling.ledger.decided:
            outer, inner = labels.shape[-2:]
            classes = distinct(coupling.classes[labels].ravel()).tolist()
            self._known.update((c, shrinking, inner if shrinking == "outer" else outer) for c in classes)

    def _all(self, labels: np.ndarray, shrinking: str, size: int) -> bool:
        return all((c, shrinking, size) in self._known for c in distinct(labels.ravel()).tolist())

    def shrinking(self, grid: np.ndarray) -> str | None:
        """What shrank in the original: the dimension that did not is as long as it was."""
        outer, inner = grid.shape[-2:]
        known = grid[grid < len(self._frozen)]  # the others are new: zeros of a Pad, or what stays beside channels
        if not len(known):
            return "inner"
        if self._frozen[known].all():
            return None
        if (grid == grid[..., :1]).all() and self._all(known, "outer", inner):
            return "outer"
        return "inner" if self._all(known, "inner", outer) else None

    def can_shrink(self, labels: np.ndarray) -> bool:
        """Whether any of the labels could be removed from the original."""
        return self._all(labels[labels < len(self._frozen)], "inner", 1)

    def reason(self, labels: np.ndarray) -> Reason:
        """Nothing of it shrank in the original."""
        return Reason("", "", "", "another factor of the same axis shrinks instead")


def walk(
    model: Model,
    start: Callable[[Node, int, int], np.ndarray | None] | None = None,
    n_labels: int = 0,
    decisions: Decisions | None = None,
    original: Model | None = None,
) -> Ledger:
    """Let labels travel through every node.

    Parameters
    ----------
    start
        Gives the labels of a constant's axis, int64 (default: fresh ones).
    n_labels
        Labels below this number are not fresh.
    decisions
        What is known of splits; without it they are recorded, to be decided by ``solve``.
    original
        What ``model`` was made from by pruning.
    """
    ledger = Ledger(model, start, decisions, original, n_labels=n_labels)
    for node in model.nodes:
        if node.key in model.static or node.key in model.aliases:
            continue
        ops.couple(node, ledger)
        read = (*node.inputs, *node.captured)
        if all(not name or name in ledger.derived or model.constant(name) is not None for name in read):
            ledger.derived.update(node.outputs)
    _freeze_values(ledger)
    for name in model.outputs:
        ledger.node = Node("", "output", "", (name,), (name,), {})
        constant = model.constant(name)
        if constant is not None:
            ledger.freeze(ledger.whole(constant, ledger.node, 0).axes, "it is an output of the graph", name)
        elif name in ledger.layouts:
            ledger.freeze(ledger.layouts[name].axes, "it is an output of the graph", name)
    ledger.node = None
    return ledger


def _freeze_values(ledger: Ledger) -> None:
    """A matrix that one node reads with labels and another by its values (indices of a Gather) stays as it is."""
    model = ledger.model
    shared = {name for name, key in ledger.constants if not key}
    for node in model.nodes if shared else ():
        if node.key in model.static or node.key in model.aliases:
            continue
        for name in node.inputs:
            root = model.aliases.get(name, name)
            if root in shared and (node.key, root) not in ledger.readers:
                ledger.node = node
                axes = ledger.constants[root, ""].values()
                ledger.freeze([(atom,) for atom in axes], "its values are read as they are", name)


def components(n: int, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Smallest label of each label's connected component: vectorised hooking and pointer jumping."""
    parent = np.arange(n)
    aligned = [(x, y) if x.shape == y.shape else np.broadcast_arrays(x, y) for x, y in pairs]
    if not aligned:
        return parent
    a = np.concatenate([x.ravel() for x, _ in aligned])
    b = np.concatenate([y.ravel() for _, y in aligned])
    while len(a):
        a, b = parent[a], parent[b]
        differ = a != b
        a, b = a[differ], b[differ]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(parent, jumped := parent[parent]):
            parent = jumped
    return parent


def solve(ledger: Ledger) -> Coupling:
    """Decide every split, then partition labels into classes."""
    root = components(ledger.n_labels, ledger.ties)
    fixed = np.zeros(ledger.n_labels, bool)
    for labels, _ in ledger.frozen:
        fixed[root[labels]] = True
    ties, rows = _decide(ledger.splits, root, fixed)
    if ties:
        root = components(ledger.n_labels, [*ledger.ties, *ties])
    kept = distinct(root)
    classes = np.searchsorted(kept, root)
    reason = np.full(len(kept), -1)
    reasons = [reason for _, reason in ledger.frozen]
    for index in range(len(ledger.frozen) - 1, -1, -1):
        reason[classes[ledger.frozen[index][0]]] = index
    for labels, cause in rows:
        mine = np.unique(classes[labels])
        told = reason[classes[cause]].max() if cause is not None else -1
        reason[mine[reason[mine] < 0]] = told if told >= 0 else len(reasons)
    reasons.append(Reason("", "Reshape", "", "another factor of the same axis shrinks instead"))
    live = np.zeros(len(kept), bool)
    for c in ledger.contractions:
        for atom in ledger.input(c.node, c.input, ()).axes[c.axis]:
            if atom.labels is not None:
                live[classes[atom.labels]] = True
    reason[~live & (reason < 0)] = len(reasons)
    reasons.append(Reason("", "", "", "no operator consumes these channels"))
    return Coupling(ledger.model, ledger, classes, reason, tuple(reasons))


def _decide(
    splits: Sequence[Split], root: np.ndarray, fixed: np.ndarray
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[tuple[np.ndarray, np.ndarray | None]]]:
    """Choose which dimension of every split shrinks: the inner one if it can. All rows keep the same indices.

    Returns ties that make the choice true, and labels that stay: because of other labels, or (None) because another
    dimension was chosen.
    """
    ties: list[tuple[np.ndarray, np.ndarray]] = []
    rows: list[tuple[np.ndarray, np.ndarray | None]] = []
    finer: dict[int, list[Split]] = {}
    for split in splits:
        finer.setdefault(int(split.whole.flat[0]), []).append(split)

    def can_shrink(labels: np.ndarray) -> bool:
        """Whether some of the labels may go, and of every split of them a dimension."""
        return not fixed[root[labels]].all() and all(
            can_shrink(split.outer) or can_shrink(split.inner) for split in finer.get(int(labels.flat[0]), ())
        )

    pending = list(splits)
    waiting: list[Split] = []
    while len(pending) != len(waiting):  # first what leaves no choice, to a fixed point
        waiting = pending
        pending = [split for split in waiting if not _settle(split, root, fixed, can_shrink, ties, rows, forced=True)]
    for split in pending:
        _settle(split, root, fixed, can_shrink, ties, rows, forced=False)
    return ties, rows


def _settle(
    split: Split,
    root: np.ndarray,
    fixed: np.ndarray,
    can_shrink: Callable[[np.ndarray], bool],
    ties: list,
    rows: list,
    *,
    forced: bool,
) -> bool:
    """Decide one split if at most one of its dimensions can shrink, or in any case where ``forced`` is False."""
    whole, outer, inner = root[split.whole], root[split.outer], root[split.inner]
    can = [not fixed[whole].all() and can_shrink(part) for part in (split.outer, split.inner)]
    if forced and all(can):
        return False
    if not any(can):
        cause = split.inner if not fixed[whole].all() else split.whole.ravel()
        rows += [(labels, cause) for labels in (split.whole.ravel(), split.outer, split.inner)]
        for labels in (whole, outer, inner):
            fixed[labels] = True
        return True
    chosen, chosen_root, other, by_index = (
        (split.inner, inner, split.outer, whole.T) if can[1] else (split.outer[:, None], outer, split.inner, whole)
    )
    rows.append((other, None))
    fixed[root[other]] = True
    ties.append((split.whole, chosen))
    lost = fixed[chosen_root] | fixed[by_index].any(1)
    fixed[chosen_root[lost]] = True
    fixed[by_index[lost]] = True
    return True


def _excluded(coupling: Coupling, ignore: Sequence[str], only: Sequence[str]) -> Iterable[tuple[np.ndarray, Reason]]:
    """Labels that ``--ignore`` names, or that ``--only`` does not."""
    names = _names(coupling)
    known = set().union(*names.values())
    for option, globs in (("ignore", ignore), ("only", only)):
        for glob in globs:
            if not _hit(known, [glob]):
                raise UsageError(f"--{option} {glob}: matches no node, tensor or group with channels; see inspect -v")
    for group in coupling.groups:
        hit = _hit(names[group.id], ignore)
        text = f"--ignore {hit}" if hit else None
        if text is None and only and _hit(names[group.id], only) is None:
            text = "--only names other layers"
        if text and group.frozen is None:
            labels = np.flatnonzero(np.isin(coupling.classes, group.classes))
            yield labels, Reason("", "", group.members[0][0], text)


def _hit(names: set[str], globs: Sequence[str]) -> str | None:
    return next((glob for glob in globs if glob in names or any(fnmatchcase(name, glob) for name in names)), None)


def _names(coupling: Coupling) -> dict[str, set[str]]:
    """Per group its id, its members, and the nodes and tensors that carry its channels."""
    of_class = np.full(coupling.n_classes, -1)
    for number, group in enumerate(coupling.groups):
        of_class[group.classes] = number
    members = [{tensor for tensor, _ in group.members} for group in coupling.groups]
    names = [{group.id, *own} for group, own in zip(coupling.groups, members, strict=True)]
    for node in coupling.model.nodes:
        carried = [coupling.ledger.layouts[name].axes for name in node.outputs if name in coupling.ledger.layouts]
        roots = [coupling.model.aliases.get(name, name) for name in node.inputs]
        met = {number for number, own in enumerate(members) if not own.isdisjoint(roots)}
        for axes in carried:
            for axis in axes:
                for classes in coupling.atoms(axis):
                    met.update(np.unique(of_class[classes]).tolist())
        for number in met - {-1}:
            names[number].update((node.name, *node.outputs))
    return {group.id: own - {""} for group, own in zip(coupling.groups, names, strict=True)}
