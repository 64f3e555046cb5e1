"""Labels: one integer per index of a tensor axis, and the moves that operators make with them.

An *atom* is a run of indices: labelled (prunable unless frozen) or unlabelled (fixed). An *axis* is a product of atoms,
outermost first; an axis of length one has none. A *layout* is a tensor's axes. Operators only move, split, merge and tie
atoms; nothing is decided while walking. What was tied, frozen, split and contracted is kept in a :class:`Ledger` and solved
once by ``passes.couple``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import gcd, prod

import numpy as np

from onnxprune.model import Constant, Model, Node


class Atom:
    """A run of ``size`` indices; ``labels`` is int64 of shape ``(size,)``, or None where the indices are fixed.

    Atoms compare by identity: two atoms with equal labels may stand on two axes of one tensor (X times X transposed).
    """

    __slots__ = ("labels", "size")

    def __init__(self, size: int, labels: np.ndarray | None = None) -> None:
        self.size = size
        self.labels = labels


Axis = tuple[Atom, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """``parts`` multiply to ``whole``: label (i, j, ..) of the parts' grid is ``whole.labels`` in row-major order."""

    whole: Atom
    parts: tuple[Atom, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The axes of one tensor, and the joints among their atoms."""

    axes: tuple[Axis, ...]
    joints: tuple[Joint, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        return tuple(length(axis) for axis in self.axes)


@dataclass(frozen=True, slots=True, eq=False)
class Reason:
    """Why labels were frozen: the node and tensor that did it, and the cause in words."""

    node: str
    op: str
    tensor: str
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """An axis seen as a grid: ``whole`` int64 of shape ``[p.size for p in parts]``, one label vector per dimension.

    The tensor stays rectangular only if exactly one dimension shrinks, by whole rows.
    """

    whole: np.ndarray
    parts: tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Contraction:
    """Axis ``axis`` of input ``input`` of ``node`` ends there.

    ``redefined`` marks statistics (means, norms, maxima) that are taken over the kept channels alone.
    """

    node: Node
    input: int
    axis: int
    redefined: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Multiply-accumulates of a node: ``factor`` times the kept length of every axis; ``weight`` is its weight's input."""

    node: Node
    axes: tuple[Axis, ...]
    factor: float
    weight: int | None


class Refusal(Exception):  # noqa: N818 (it is an answer, not an error)
    """A rule does not cover this node; the labels it touches freeze with this message as the reason."""


def length(axis: Axis) -> int:
    """Number of indices on an axis."""
    return prod(atom.size for atom in axis)


def fixed(size: int) -> Axis:
    """Return an unlabelled axis."""
    return (Atom(size),) if size != 1 else ()


def unlabelled(shape: Sequence[int]) -> Layout:
    """Return the layout of a tensor none of whose axes can shrink."""
    return Layout(tuple(fixed(size) for size in shape))


def is_fixed(axis: Axis) -> bool:
    """Whether no index of the axis carries a label."""
    return all(atom.labels is None for atom in axis)


@dataclass(eq=False)
class Ledger:
    """Labels of every tensor of one walk, and everything the walk found out about them."""

    model: Model
    start: Callable[[Node, int, int], np.ndarray | None] | None = None
    layouts: dict[str, Layout] = field(default_factory=dict)
    ties: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    frozen: list[tuple[np.ndarray, Reason]] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    atoms: list[np.ndarray] = field(default_factory=list)
    constants: dict[tuple[str, str], dict[int, Atom]] = field(default_factory=dict)
    n_labels: int = 0
    node: Node | None = None
    derived: set[str] = field(default_factory=set)
    refusals: dict[str, str] = field(default_factory=dict)
    _grids: dict[tuple[int, tuple[int, ...]], Joint] = field(default_factory=dict)

    # -- reading and writing layouts ---------------------------------------------------------------------------------

    def shape(self, name: str) -> tuple[int, ...]:
        """Static shape of a tensor; :class:`Refusal` where it is unknown."""
        shape = self.model.shapes.get(name)
        if shape is None:
            raise Refusal(f"the shape of {name} is unknown")
        return shape

    def input(self, node: Node, index: int, axes: Iterable[int] | None = None) -> Layout:
        """Layout of an input; ``axes`` limits which axes of a constant get labels (default: all)."""
        name = node.inputs[index]
        constant = self.model.constant(name)
        return self.layout(name) if constant is None else self._constant_layout(constant, node, index, axes)

    def layout(self, name: str) -> Layout:
        """Layout of a computed tensor; unlabelled where nothing is known of it."""
        known = self.layouts.get(name)
        return known if known is not None else unlabelled(self.shape(name))

    def output(self, node: Node, layout: Layout | Sequence[Axis], index: int = 0, joints: Iterable[Joint] = ()) -> None:
        """Set the layout of an output."""
        if not isinstance(layout, Layout):
            layout = self.arrange(layout, joints)
        self.layouts[node.outputs[index]] = layout

    def arrange(self, axes: Sequence[Axis], joints: Iterable[Joint] = ()) -> Layout:
        """Build a layout: join neighbours that a joint reunites, and keep only the joints still in use."""
        joints = tuple(dict.fromkeys(joints))
        merged = [self._fuse(axis, joints) for axis in axes]
        seen: set[int] = set()
        distinct = []
        for axis in merged:
            distinct.append(tuple(Atom(a.size, a.labels) if id(a) in seen else a for a in axis))
            seen.update(map(id, axis))
        return Layout(tuple(distinct), tuple(j for j in joints if all(id(part) in seen for part in j.parts)))

    def _constant_layout(self, constant: Constant, node: Node, index: int, axes: Iterable[int] | None) -> Layout:
        # Vectors are shared by exporters between unrelated layers (equal biases), so each reader has labels of its own.
        # A copy is called NAME@READER; where the file itself has such names, all readers share one slice.
        own = constant.is_vector and constant.name not in self.model.names_before_at
        key = (constant.name, node.key if own else "")
        known = self.constants.setdefault(key, {})
        wanted = range(len(constant.shape)) if axes is None else axes
        for axis in wanted:
            if axis not in known and constant.shape[axis] != 1:
                given = self.start(node, index, axis) if self.start else None
                known[axis] = self.atom(constant.shape[axis]) if given is None else self.labelled(given)
        return Layout(tuple((known[a],) if a in known else fixed(n) for a, n in enumerate(constant.shape)))

    def whole(self, constant: Constant, node: Node, index: int) -> Layout:
        """Layout of a constant with every axis labelled."""
        return self._constant_layout(constant, node, index, None)

    # -- making atoms ------------------------------------------------------------------------------------------------

    def fresh(self, size: int) -> np.ndarray:
        """Return ``size`` labels never used before."""
        self.n_labels += size
        return np.arange(self.n_labels - size, self.n_labels)

    def atom(self, size: int) -> Atom:
        """Return an atom with fresh labels."""
        return self.labelled(self.fresh(size))

    def labelled(self, labels: np.ndarray) -> Atom:
        """Return an atom that carries these labels."""
        self.atoms.append(labels)
        return Atom(len(labels), labels)

    # -- what a walk can find out ------------------------------------------------------------------------------------

    def freeze(self, axes: Iterable[Axis], text: str, tensor: str = "") -> None:
        """Labels on these axes can never be removed, because of ``text`` at the current node."""
        node = self.node
        labels = [atom.labels for axis in axes for atom in axis if atom.labels is not None]
        if labels:
            origin = (node.title, node.op) if node else ("", "")
            self.frozen.append((np.concatenate(labels), Reason(*origin, tensor, text)))

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Labels ``a[i]`` and ``b[i]`` live or die together."""
        if a is not b:
            self.ties.append((a, b))

    def contract(self, node: Node, index: int, axis: int, *, redefined: bool = False) -> None:
        """Record that an axis of an input ends at this node.

        Where only constants take part, as in weight normalisation, a result computed from fewer would be another weight: the
        axis freezes.
        """
        if all(self.model.constant(name) is not None or name in self.derived for name in node.inputs if name):
            self.freeze([self.input(node, index).axes[axis]], "a weight is computed from all of it", node.inputs[index])
        self.contractions.append(Contraction(node, index, axis, redefined))

    def work(self, node: Node, axes: Sequence[Axis], factor: float = 1, weight: int | None = None) -> None:
        """Record the node's multiply-accumulates as a product over axes."""
        self.works.append(Work(node, tuple(axes), factor, weight))

    # -- primitives --------------------------------------------------------------------------------------------------

    def split(self, atom: Atom, sizes: Sequence[int]) -> Joint:
        """See an atom as a grid of ``sizes`` (row-major); a part of size one carries no labels."""
        sizes = tuple(sizes)
        joint = self._grids.get((id(atom), sizes))
        if joint is None:
            if atom.labels is None:
                joint = Joint(atom, tuple(Atom(size) for size in sizes))
            else:
                parts = [self.fresh(size) for size in sizes]
                joint = Joint(atom, tuple(self.labelled(labels) for labels in parts))
                self.splits.append(Split(atom.labels.reshape(sizes), tuple(parts)))
            self._grids[id(atom), sizes] = joint
        return joint

    def unify(self, a: Axis, b: Axis, joints: list[Joint]) -> Axis:
        """Align two axes index by index (a single index meets anything) and return the finer of the two."""
        if a is b or not b:
            return a
        if not a:
            return b
        if length(a) != length(b):
            raise Refusal(f"axes of {length(a)} and {length(b)} indices meet")
        left, right, out = list(a), list(b), []
        while left and right:
            x, y = left.pop(0), right.pop(0)
            if x.size == y.size:
                out.append(self._meet(x, y))
                continue
            small, large, rest = (x, y, right) if x.size < y.size else (y, x, left)
            if large.size % small.size:
                self.freeze([(x, *left), (y, *right)], "its axis factors do not divide those it meets")
                out.append(Atom(prod(p.size for p in (x, *left))))
                break
            joint = self.split(large, (small.size, large.size // small.size))
            joints[:] = [joint, *(self._refine(j, large, joint) for j in joints)]
            out.append(self._meet(small, joint.parts[0]))
            rest.insert(0, joint.parts[1])
        return tuple(out)

    def _meet(self, x: Atom, y: Atom) -> Atom:
        if x is y:
            return x
        if x.labels is not None and y.labels is not None:
            self.tie(x.labels, y.labels)
            return x
        self.freeze([(x,), (y,)], "it meets an axis that cannot shrink (an input of the graph, or positions)")
        return x if x.labels is None else y

    def flat(self, axis: Axis) -> Atom | None:
        """Return the axis as a single atom (None for a single index), with labels of its own where factors differ."""
        if len(axis) <= 1:
            return axis[0] if axis else None
        if is_fixed(axis):
            return Atom(length(axis))
        parts = []
        for atom in axis:
            labels = atom.labels
            if labels is None:
                labels = self.fresh(atom.size)
                self.freeze([(self.labelled(labels),)], "it is merged with channels")
            parts.append(labels)
        whole = self.fresh(length(axis))
        self.splits.append(Split(whole.reshape([a.size for a in axis]), tuple(parts)))
        return self.labelled(whole)

    def take(self, axis: Axis, indices: np.ndarray) -> Axis:
        """Pick indices of an axis, in order; a single picked index loses its label and is frozen."""
        size = length(axis)
        if len(indices) == size and np.array_equal(indices, np.arange(size)):
            return axis
        atom = self.flat(axis)
        if atom is None or atom.labels is None:
            return fixed(len(indices))
        labels = atom.labels[indices]
        if len(labels) == 1:
            self.freeze([(Atom(1, labels),)], "one index is taken out alone")
            return ()
        return (self.labelled(labels),)

    def concat(self, axes: Sequence[Axis]) -> Axis:
        """Lay axes end to end."""
        if all(is_fixed(axis) for axis in axes):
            return fixed(sum(length(axis) for axis in axes))
        runs = []
        for axis in axes:
            atom = self.flat(axis)
            labels = None if atom is None else atom.labels
            if labels is None:
                labels = self.fresh(length(axis))
                self.freeze([(self.labelled(labels),)], "it is concatenated and cannot shrink")
            runs.append(labels)
        return (self.labelled(np.concatenate(runs)),)

    def regroup(self, layout: Layout, shape: Sequence[int]) -> Layout:
        """Reshape: walk the atoms in row-major order and cut them where the new axes end."""
        atoms = [atom for axis in layout.axes for atom in axis]
        joints = list(layout.joints)
        axes: list[Axis] = []
        for length_wanted in shape:
            size, axis = length_wanted, list[Atom]()
            while size > 1:
                atom = atoms.pop(0)
                if atom.size == size or (atom.size < size and size % atom.size == 0):
                    axis.append(atom)
                    size //= atom.size
                    continue
                common = gcd(atom.size, size)
                if common == 1:
                    self.freeze([(atom, *atoms), *axes, tuple(axis)], "it is reshaped across channel boundaries")
                    return unlabelled(shape)
                joint = self.split(atom, (common, atom.size // common))
                joints = [self._refine(j, atom, joint) for j in joints] + [joint, *joints]
                atoms[:0] = joint.parts
            axes.append(tuple(axis))
        return self.arrange(axes, joints)

    @staticmethod
    def _refine(joint: Joint, atom: Atom, finer: Joint) -> Joint:
        """Express a joint that contains ``atom`` through the parts of ``atom``."""
        parts = [p for part in joint.parts for p in (finer.parts if part is atom else (part,))]
        return Joint(joint.whole, tuple(parts))

    def _fuse(self, axis: Axis, joints: Sequence[Joint]) -> Axis:
        """Merge fixed neighbours, and replace all parts of a joint that stand side by side by the whole."""
        for joint in joints if len(axis) > 1 else ():
            n = len(joint.parts)
            order = {id(part): position for position, part in enumerate(joint.parts)}
            for begin in range(len(axis) - n + 1):
                run = [order.get(id(atom), -1) for atom in axis[begin : begin + n]]
                if -1 not in run and len(set(run)) == n:
                    whole = joint.whole
                    if run != sorted(run):
                        grid = whole.labels
                        if grid is not None:
                            grid = grid.reshape([part.size for part in joint.parts]).transpose(run).ravel()
                        whole = Atom(whole.size) if grid is None else self.labelled(grid)
                    return self._fuse((*axis[:begin], whole, *axis[begin + n :]), joints)
        out: list[Atom] = []
        for atom in axis:
            if out and out[-1].labels is None and atom.labels is None:
                out[-1] = Atom(out[-1].size * atom.size)
            else:
                out.append(atom)
        return tuple(out)
