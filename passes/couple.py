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
from onnxprune.labels import Ledger, Reason, Split
from onnxprune.model import Model, Node
from onnxprune.passes.follow import unfollowed


def couple(model: Model, ignore: Sequence[str] = (), only: Sequence[str] = ()) -> Coupling:
    """Walk the graph once, then solve for classes.

    Parameters
    ----------
    ignore
        Globs of node names, tensor names or group ids that must not be pruned.
    only
        Globs: everything that matches none of them is frozen.
    """
    ledger = walk(model)
    coupling = solve(ledger)
    while extra := unfollowed(coupling):
        ledger.frozen += extra
        coupling = solve(ledger)
    if ignore or only:
        frozen = list(_excluded(coupling, ignore, only))
        if frozen:
            ledger.frozen += frozen
            coupling = solve(ledger)
    return coupling


def walk(model: Model, start: Callable[[Node, int, int], np.ndarray | None] | None = None, n_labels: int = 0) -> Ledger:
    """Let labels travel through every node; ``start`` gives the labels of a constant's axis (default: fresh ones)."""
    ledger = Ledger(model, start, n_labels=n_labels)
    for node in model.nodes:
        if node.key in model.static or node.key in model.aliases:
            continue
        ops.couple(node, ledger)
        if all(not name or name in ledger.derived or model.constant(name) is not None for name in node.inputs):
            ledger.derived.update(node.outputs)
    for name in model.outputs:
        ledger.node = Node("", "output", "", (), (name,), {})
        constant = model.constant(name)
        if constant is not None:
            ledger.freeze(ledger.whole(constant, ledger.node, 0).axes, "it is an output of the graph", name)
        elif name in ledger.layouts:
            ledger.freeze(ledger.layouts[name].axes, "it is an output of the graph", name)
    ledger.node = None
    return ledger


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
    """Choose which dimension of every split shrinks: the innermost one that can. All rows keep the same indices.

    Returns ties that make the choice true, and labels that stay: because of other labels, or (None) because another
    dimension was chosen.
    """
    ties: list[tuple[np.ndarray, np.ndarray]] = []
    rows: list[tuple[np.ndarray, np.ndarray | None]] = []
    pending = [(root[s.whole], tuple(root[part] for part in s.parts), s) for s in splits]
    waiting: list[tuple] = []
    while len(pending) != len(waiting):  # first what leaves no choice, to a fixed point
        waiting = pending
        pending = [item for item in waiting if not _settle(item, fixed, ties, rows, forced=True)]
    for item in pending:
        _settle(item, fixed, ties, rows, forced=False)
    return ties, rows


def _settle(item: tuple, fixed: np.ndarray, ties: list, rows: list, *, forced: bool) -> bool:
    """Decide one split if at most one of its dimensions can shrink, or in any case where ``forced`` is False."""
    whole, parts, split = item
    open_parts = [] if fixed[whole].all() else [i for i, part in enumerate(parts) if not fixed[part].all()]
    if forced and len(open_parts) > 1:
        return False
    if not open_parts:
        cause = split.parts[-1] if not fixed[whole].all() else split.whole.ravel()
        rows += [(labels, cause) for labels in (split.whole.ravel(), *split.parts)]
        for labels in (whole, *parts):
            fixed[labels] = True
        return True
    chosen = open_parts[-1]
    for i, part in enumerate(split.parts):
        if i != chosen:
            rows.append((part, None))
            fixed[parts[i]] = True
    axis = _dimension(split, chosen)
    shape = [1] * split.whole.ndim
    shape[axis] = -1
    ties.append((split.whole, split.parts[chosen].reshape(shape)))
    by_index = np.moveaxis(whole, axis, 0).reshape(whole.shape[axis], -1)
    lost = fixed[parts[chosen]] | fixed[by_index].any(1)
    fixed[parts[chosen][lost]] = True
    fixed[by_index[lost]] = True
    return True


def _dimension(split: Split, chosen: int) -> int:
    """Axis of ``split.whole`` that belongs to a part (parts of one index have no labels)."""
    return [axis for axis, size in enumerate(split.whole.shape) if size > 1][chosen]


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
