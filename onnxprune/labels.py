"""Labels: one integer per index of a tensor axis, and the moves that operators make with them.

An *atom* is a run of indices: labelled (prunable unless frozen) or unlabelled (fixed). An *axis* is a product of atoms,
outermost first; an axis of length one has none. A *layout* is a tensor's axes. Operators only move, split, merge and tie
atoms; nothing is decided while walking. What was tied, frozen, split and contracted is kept in a :class:`Ledger` and solved
once by ``passes.couple``.

A first walk finds out which factor of every split axis shrinks. Where it is the inner one (channels seen as groups x n), a
second walk knows that: the inner atom then carries labels of its own in every *row* (index of the outer atom), and rows only
have to keep equally many. What forces rows to keep the same indices (a table that all heads share) ties them by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import gcd, prod
from typing import Protocol

import numpy as np

from onnxprune.errors import ModelError
from onnxprune.model import Constant, Model, Node


class Atom:
    """A run of ``size`` indices.

    Atoms compare by identity: two atoms with equal labels may stand on two axes of one tensor (X times X transposed).

    Attributes
    ----------
    labels
        int64 of shape ``(*[row.size for row in rows], size)``, or None where the indices are fixed.
    rows
        Unlabelled atoms of the same tensor by whose indices the labels differ; every row keeps equally many.
    joint
        The split that this atom is a part of.
    """

    __slots__ = ("joint", "labels", "rows", "size")

    def __init__(self, size: int, labels: np.ndarray | None = None, rows: tuple[Atom, ...] = ()) -> None:
        self.size = size
        self.labels = labels
        self.rows = rows
        self.joint: Joint | None = None


Axis = tuple[Atom, ...]

MAX_LABELS = 1 << 26
"""Labels that the axes of a model may carry in all: networks of ten billion weights stay far below it."""


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """Atom ``whole`` seen as a grid, row-major: index ``i * inner.size + j`` is (i, j)."""

    whole: Atom
    outer: Atom
    inner: Atom


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The axes of one tensor."""

    axes: tuple[Axis, ...]

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
    """An axis seen as a grid: ``whole`` int64 of shape ``(len(outer), len(inner))``, one label vector per dimension.

    The tensor stays rectangular only if exactly one dimension shrinks, by whole rows.
    """

    whole: np.ndarray
    outer: np.ndarray
    inner: np.ndarray


class Decisions(Protocol):
    """What an earlier walk found out about splits."""

    def shrinking(self, grid: np.ndarray) -> str | None:
        """Which dimension of a grid of labels (last axis: inner) shrinks: "outer", "inner", or None for neither."""

    def can_shrink(self, labels: np.ndarray) -> bool:
        """Whether any of the labels may be removed."""

    def reason(self, labels: np.ndarray) -> Reason:
        """Why none of the labels may be removed."""


@dataclass(frozen=True, slots=True, eq=False)
class Contraction:
    """Axis ``axis`` of input ``input`` of ``node`` ends there.

    ``redefined`` marks statistics (means, norms, maxima) that are taken over the kept channels alone; ``state`` a weight
    that meets channels which no input carries, because they come from the node's last step; ``zero`` is the input that
    holds what stands for zero on a quantised one (None: zero itself does).
    """

    node: Node
    input: int
    axis: int
    redefined: bool = False
    state: bool = False
    zero: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Multiply-accumulates of a node: ``factor`` times the kept length of every axis; ``weight`` is its weight's input.

    Attributes
    ----------
    channels
        What hardware sees as its channels; None where it is not known.
    packed
        Axes of the weight where its tensor holds several numbers in an element.
    """

    node: Node
    axes: tuple[Axis, ...]
    factor: float
    weight: int | None
    channels: Channels | None = None
    packed: tuple[Axis, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Channels:
    """Channels of an operator that multiplies and accumulates.

    Attributes
    ----------
    kind
        Conv, ConvTranspose, MatMul or Recurrent: what hardware tells apart.
    inputs, outputs
        Axes of all its input channels and of all its output channels.
    summed
        The part of ``inputs`` that one output channel sums over: fewer in a grouped convolution.
    made
        The part of ``outputs`` that one group of a grouped convolution makes; None: all of them.
    """

    kind: str
    inputs: Axis
    outputs: Axis
    summed: Axis
    made: Axis | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Picked:
    """What became of an unlabelled atom at the current node: these of its indices, as another atom (None: one index)."""

    indices: np.ndarray
    atom: Atom | None


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


def spread(atom: Atom, rows: Sequence[Atom]) -> np.ndarray:
    """Labels of an atom with one dimension for each of ``rows`` (length one where the atom does not depend on it)."""
    assert atom.labels is not None
    order = [atom.rows.index(row) for row in rows if row in atom.rows]
    labels = atom.labels.transpose(*order, len(atom.rows))
    return labels.reshape(*[row.size if row in atom.rows else 1 for row in rows], atom.size)


@dataclass(eq=False)
class Ledger:
    """Labels of every tensor of one walk, and everything the walk found out about them.

    Attributes
    ----------
    start
        Gives the labels of a constant's axis (default: fresh ones).
    decisions
        What an earlier walk decided about splits; None in a first walk, which records them.
    decided
        Grids of a walk with ``decisions``, and which of their dimensions shrinks.
    original
        What the walked model was made from, where it is a pruned one.
    balances
        Label grids (last axis: indices) all of whose rows must keep equally many.
    heads
        Labels of batch axes over which two computed tensors are multiplied: heads of attention.
    head_dims
        Labels of the other axes of such products.
    readers
        (node, constant): who reads which constant with labels.
    """

    model: Model
    start: Callable[[Node, int, int], np.ndarray | None] | None = None
    decisions: Decisions | None = None
    original: Model | None = None
    layouts: dict[str, Layout] = field(default_factory=dict)
    ties: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    frozen: list[tuple[np.ndarray, Reason]] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    decided: list[tuple[np.ndarray, str | None]] = field(default_factory=list)
    balances: list[np.ndarray] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    heads: list[np.ndarray] = field(default_factory=list)
    head_dims: list[np.ndarray] = field(default_factory=list)
    readers: set[tuple[str, str]] = field(default_factory=set)
    atoms: list[np.ndarray] = field(default_factory=list)
    constants: dict[tuple[str, str], dict[int, Atom]] = field(default_factory=dict)
    n_labels: int = 0
    n_carried: int = 0
    node: Node | None = None
    derived: set[str] = field(default_factory=set)
    refusals: dict[str, str] = field(default_factory=dict)
    _joints: dict[tuple[int, int], Joint] = field(default_factory=dict)
    _moved: dict[Atom, tuple[Atom, ...] | _Picked] = field(default_factory=dict)
    _met: list[tuple[Atom, Atom]] = field(default_factory=list)
    _aligned: set[Atom] = field(default_factory=set)

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

    def output(self, node: Node, layout: Layout | Sequence[Axis], index: int = 0) -> None:
        """Set the layout of an output; :class:`Refusal` where its labels do not lie as the tensor does."""
        if not isinstance(layout, Layout):
            layout = self.arrange(layout)
        name = node.outputs[index]
        shape, axes = self.model.shapes.get(name), layout.axes
        if shape is not None and not all(map(is_fixed, axes)):
            lengths = [n if is_fixed(axis) else length(axis) for n, axis in zip(shape, axes, strict=False)]
            if len(axes) != len(shape) or lengths != list(shape):
                raise Refusal(
                    f"its operands do not go together: {[length(axis) for axis in axes]} is not {list(shape)}"
                )
        self.layouts[name] = layout

    def arrange(self, axes: Sequence[Axis]) -> Layout:
        """Build a layout: rejoin parts that stand side by side; rows that are gone tie what they told apart."""
        now = list(axes)
        rows: set[Atom] = set()
        if any(atom.rows for axis in axes for atom in axis):
            now = [tuple(self._current(atom) for atom in axis) for axis in axes]
            rows = {row for axis in now for atom in axis for row in atom.rows}
        seen: set[Atom] = set()
        twice: set[Atom] = set()
        distinct = []
        for axis in now:
            again = [atom for atom in axis if atom in seen]
            twice.update(again)
            distinct.append(tuple(Atom(a.size, a.labels, a.rows) if a in again else a for a in axis) if again else axis)
            seen.update(axis)
        if lost := (rows - seen) | (rows & twice):
            distinct = [tuple(self._collapse(atom, lost) for atom in axis) for axis in distinct]
        readers: dict[Atom, int] = {}
        for row in (row for axis in distinct for atom in axis for row in atom.rows) if rows else ():
            readers[row] = readers.get(row, 0) + 1
        return Layout(tuple(self._fuse(axis, readers) if len(axis) > 1 else axis for axis in distinct))

    def _constant_layout(self, constant: Constant, node: Node, index: int, axes: Iterable[int] | None) -> Layout:
        known = self._constant(constant, node)
        self.readers.add((node.key, constant.name))
        wanted = range(len(constant.shape)) if axes is None else axes
        for axis in wanted:
            if axis not in known and constant.shape[axis] > 1:
                given = self.start(node, index, axis) if self.start else None
                given = None if given is not None and given.ndim > 1 else given
                known[axis] = self.atom(constant.shape[axis]) if given is None else self.labelled(given)
        laid = [(known[a],) if a in known else fixed(n) for a, n in enumerate(constant.shape)]
        rows = next((atom.rows for atom in known.values() if atom.rows), ())
        if rows and length(rows) == constant.shape[0]:  # axis 0 counts rows, else they are a part of it
            laid[0] = rows
        return Layout(tuple(laid))

    def _constant(self, constant: Constant, node: Node) -> dict[int, Atom]:
        # Vectors are shared by exporters between unrelated layers (equal biases), so each reader has labels of its own.
        # A copy is called NAME@READER; where the file itself has such names, all readers share one slice.
        own = constant.is_vector and not (self.original or self.model).has_copies(constant.name)
        return self.constants.setdefault((constant.name, node.key if own else ""), {})

    def is_weight(self, name: str) -> bool:
        """Whether a tensor is a constant or computed from constants alone."""
        return self.model.constant(name) is not None or name in self.derived

    def whole(self, constant: Constant, node: Node, index: int) -> Layout:
        """Layout of a constant with every axis labelled."""
        return self._constant_layout(constant, node, index, None)

    def per_row(self, node: Node, index: int, axis: int, rows: Axis) -> Axis:
        """Axis of a constant whose indices mean other channels in every row (weights of a grouped convolution)."""
        name = node.inputs[index]
        constant, reader, place = self.model.constant(name), node, index
        if constant is None and (real := self._dequantised(name, axis)) is not None:
            constant, reader, place = self.model.constant(real.inputs[0]), real, 0
        if constant is None or self.decisions is None or len(rows) != 1 or constant.shape[axis] == 1:
            return self.input(node, index, (axis,)).axes[axis]
        known = self._constant(constant, reader)
        if axis not in known or (reader is not node and not known[axis].rows):
            given = self.start(reader, place, axis) if self.start else None
            shape = (rows[0].size, constant.shape[axis])
            if given is not None and given.shape == shape:
                known[axis] = self.labelled(given, rows)
            elif self._representative(rows[0]).labels is None:
                known[axis] = self.labelled(self.fresh(prod(shape)).reshape(shape), rows)
            else:
                return self.input(node, index, (axis,)).axes[axis]
        if reader is not node:
            axes = list(self.layouts[name].axes)
            axes[axis] = (known[axis],)
            if known[axis].rows and length(known[axis].rows) == constant.shape[0]:
                axes[0] = known[axis].rows
            self.layouts[name] = Layout(tuple(axes))
        return (known[axis],)

    def _dequantised(self, name: str, axis: int) -> Node | None:
        """The DequantizeLinear that makes a tensor of a constant for one reader alone, by one scale all along an axis."""
        made = self.model.producer.get(name)
        if made is None or made.op != "DequantizeLinear" or len(self.model.consumers[name]) > 1:
            return None
        constant = self.model.constant(made.inputs[0])
        if constant is None or len(self.model.consumers[made.inputs[0]]) > 1 or made.attributes.get("block_size", 0):
            return None
        single = prod(self.shape(made.inputs[1])) == 1
        return made if single or made.attributes.get("axis", 1) % len(constant.shape) != axis else None

    # -- making atoms ------------------------------------------------------------------------------------------------

    def fresh(self, size: int) -> np.ndarray:
        """Return ``size`` labels never used before."""
        self.n_labels += size
        return np.arange(self.n_labels - size, self.n_labels)

    def atom(self, size: int) -> Atom:
        """Return an atom with fresh labels; one without indices has none."""
        return self.labelled(self.fresh(size)) if size else Atom(0)

    def labelled(self, labels: np.ndarray, rows: tuple[Atom, ...] = ()) -> Atom:
        """Return an atom that carries these labels, in rows that keep equally many."""
        self.atoms.append(labels)
        self.n_carried += labels.size
        if self.n_carried > MAX_LABELS:
            where = f" at {self.node.title}" if self.node else ""
            raise ModelError(f"the model multiplies its channels without measure{where}; nobody can prune such a graph")
        if rows:
            self.balances.append(labels)
        return Atom(labels.shape[-1], labels, rows)

    # -- what a walk can find out ------------------------------------------------------------------------------------

    def freeze(self, axes: Iterable[Axis], text: str, tensor: str = "") -> None:
        """Labels on these axes can never be removed, because of ``text`` at the current node."""
        node = self.node
        labels = [atom.labels.ravel() for axis in axes for atom in axis if atom.labels is not None]
        if labels:
            origin = (node.title, node.op) if node else ("", "")
            self.frozen.append((np.concatenate(labels), Reason(*origin, tensor, text)))

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Labels ``a[i]`` and ``b[i]`` live or die together; the arrays broadcast."""
        if a is not b:
            self.ties.append((a, b))

    def contract(
        self,
        node: Node,
        index: int,
        axis: int,
        *,
        redefined: bool = False,
        state: bool = False,
        zero: int | None = None,
    ) -> None:
        """Record that an axis of an input ends at this node.

        Where only constants take part, as in weight normalisation, a result computed from fewer would be another weight: the
        axis freezes.
        """
        if all(self.is_weight(name) for name in node.inputs if name):
            self.freeze([self.input(node, index).axes[axis]], "a weight is computed from all of it", node.inputs[index])
        self.contractions.append(Contraction(node, index, axis, redefined, state, zero))

    def work(
        self, node: Node, axes: Sequence[Axis], factor: float = 1, weight: int | None = None,
        channels: Channels | None = None, packed: tuple[Axis, ...] | None = None,
    ) -> None:  # fmt: skip
        """Record the node's multiply-accumulates as a product over axes."""
        self.works.append(Work(node, tuple(axes), factor, weight, channels, packed))

    def attend(self, heads: Iterable[Axis], dims: Iterable[Axis]) -> None:
        """Record that the indices of some axes are heads of attention, and those of others its dimensions."""
        found = [atom.labels for axis in heads for atom in axis if atom.labels is not None]
        if found:
            self.heads += found
            self.head_dims += [atom.labels for axis in dims for atom in axis if atom.labels is not None]

    def settle(self) -> None:
        """Tie what met at this node, now that it is known which rows met."""
        for x, y in self._met:
            now = (self._current(x), self._current(y))
            apart = {row for row in now[0].rows if row in now[1].rows} - self._aligned  # one row of x meets all of y
            now = (self._collapse(now[0], apart), self._collapse(now[1], apart))
            rows = list(dict.fromkeys((*now[0].rows, *now[1].rows)))
            self.tie(spread(now[0], rows), spread(now[1], rows))
        self._met.clear()
        self._moved.clear()
        self._aligned.clear()

    # -- primitives --------------------------------------------------------------------------------------------------

    def split(self, atom: Atom, outer: int) -> Axis:
        """See an atom as a grid of ``outer`` rows (row-major)."""
        joint = self._joints.get((id(atom), outer))
        if joint is None:
            parts = self._parts(atom, outer, atom.size // outer)
            joint = self._joints[id(atom), outer] = Joint(atom, *parts)  # and keeps the atom alive, hence its id
            for part in parts:
                part.joint = joint
        if atom.labels is None:
            self._moved[atom] = (joint.outer, joint.inner)
        return joint.outer, joint.inner

    def _parts(self, atom: Atom, outer: int, inner: int) -> tuple[Atom, Atom]:
        if atom.labels is None:
            return Atom(outer), Atom(inner)
        if self.decisions is None:
            parts = self.fresh(outer), self.fresh(inner)
            self.splits.append(Split(atom.labels.reshape(outer, inner), *parts))
            return self.labelled(parts[0]), self.labelled(parts[1])
        grid = atom.labels.reshape(*atom.labels.shape[:-1], outer, inner)
        shrinking = self.decisions.shrinking(grid)
        self.decided.append((grid, shrinking))
        rows = Atom(outer)
        if shrinking == "inner":
            return rows, self.labelled(grid, (*atom.rows, rows))
        if shrinking == "outer":
            self.tie(grid, grid[..., :1])
            return self.labelled(grid[..., 0], atom.rows), Atom(inner)
        self.frozen.append((atom.labels.ravel(), self.decisions.reason(grid)))
        return rows, Atom(inner)

    def unify(self, a: Axis, b: Axis) -> Axis:
        """Align two axes index by index (a single index meets anything) and return the finer of the two."""
        if not b:
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
            outer, inner = self.split(large, small.size)
            out.append(self._meet(small, outer) if small is x else self._meet(outer, small))
            rest.insert(0, inner)
        return tuple(out)

    def _meet(self, x: Atom, y: Atom) -> Atom:
        """Align two atoms of one size: the simpler of the two stands for both in what this node puts out."""
        if x is y:
            self._aligned.add(x)
            if x.rows:
                self._met.append((x, y))
            return x
        if x.labels is None or y.labels is None:
            self.freeze([(x,), (y,)], "it meets an axis that cannot shrink (an input of the graph, or positions)")
            stays, goes = (x, y) if x.labels is None else (y, x)
        else:
            stays, goes = (x, y) if len(x.rows) <= len(y.rows) else (y, x)
            if x.rows or y.rows:
                self._met.append((x, y))
            else:
                self.tie(x.labels, y.labels)
        self._aligned.add(stays)
        if stays.labels is None and self._representative(stays) is not self._representative(goes):
            self._moved.setdefault(goes, (stays,))
        return stays

    def _representative(self, atom: Atom) -> Atom:
        while isinstance(moved := self._moved.get(atom), tuple) and len(moved) == 1:
            atom = moved[0]
        return atom

    def _current(self, atom: Atom) -> Atom:
        """The atom with its rows as they stand at the current node."""
        if atom.labels is None or not atom.rows:
            return atom
        labels, rows = atom.labels, list(atom.rows)
        place = 0
        while place < len(rows):
            moved = self._moved.get(rows[place])
            if moved is None:
                place += 1
            elif isinstance(moved, _Picked):
                labels = labels.take(moved.indices if moved.atom else moved.indices[0], place)
                rows[place : place + 1] = [moved.atom] if moved.atom else []
            else:
                labels = labels.reshape(*labels.shape[:place], *[a.size for a in moved], *labels.shape[place + 1 :])
                rows[place : place + 1] = moved
        if tuple(rows) == atom.rows:
            return atom
        twice = [i for i, row in enumerate(rows) if rows.count(row) > 1]
        if twice:  # rows (i, j) meet rows (j, i)
            labels = np.moveaxis(labels, twice, range(len(twice))).reshape(-1, *np.delete(labels.shape, twice))
            self.tie(labels, labels[:1])
            labels, rows = labels[0], [row for row in rows if rows.count(row) == 1]
        now = self.labelled(labels, tuple(rows))
        now.joint = atom.joint
        return now

    def _collapse(self, atom: Atom, lost: Iterable[Atom]) -> Atom:
        """Tie an atom's labels by index across rows that no longer stand in its tensor."""
        gone = [row for row in atom.rows if row in lost]
        if not gone:
            return atom
        left = tuple(row for row in atom.rows if row not in gone)
        labels = spread(atom, (*gone, *left)).reshape(-1, *[row.size for row in left], atom.size)
        self.tie(labels, labels[:1])
        return self.labelled(labels[0], left)

    def flat(self, axis: Axis) -> Atom | None:
        """Return the axis as a single atom (None for a single index)."""
        if not axis:
            return None
        whole = axis[0]
        for atom in axis[1:]:
            whole = self._product(whole, atom)
        return whole

    def _product(self, a: Atom, b: Atom) -> Atom:
        """Lay out (a, b) along one axis: b runs faster."""
        if a.labels is None and b.labels is None:
            return Atom(a.size * b.size)
        a, b = self._current(a), self._current(b)
        if a in b.rows:
            self.freeze([(a,)], "another factor of the same axis shrinks instead")
        elif a.labels is not None and b.labels is not None:
            return self._fresh_product(a, b)
        atom, fixed_one = (b, a) if a.labels is None or a in b.rows else (a, b)
        if atom is a:
            atom = self._collapse(atom, (fixed_one,))  # else the survivors' order would depend on who survives
        rows = tuple(row for row in atom.rows if row is not fixed_one)
        labels = spread(atom, (*rows, fixed_one))
        labels = labels if atom is b else labels.swapaxes(-1, -2)
        labels = np.broadcast_to(labels, (*[row.size for row in rows], a.size, b.size))
        return self.labelled(labels.reshape(*[row.size for row in rows], -1), rows)

    def _fresh_product(self, a: Atom, b: Atom) -> Atom:
        """A grid of new labels over two labelled atoms, of which only one can shrink."""
        assert a.labels is not None
        assert b.labels is not None
        if self.decisions is None:
            whole = self.fresh(a.size * b.size)
            self.splits.append(Split(whole.reshape(a.size, b.size), a.labels, b.labels))
            return self.labelled(whole)
        inner = self.decisions.can_shrink(b.labels)
        self.decided.append((b.labels[..., None, :], "inner" if inner else None))
        shrinks, stays = (b, a) if inner else (a, b)
        self.freeze([(stays,)], "another factor of the same axis shrinks instead")
        plain = Atom(stays.size)
        return self._product(plain, shrinks) if shrinks is b else self._product(shrinks, plain)

    def take(self, axis: Axis, indices: np.ndarray) -> Axis:
        """Pick indices of an axis, in order; a single picked index loses its label and is frozen."""
        size = length(axis)
        if not len(indices):
            self.freeze([axis], "none of it is picked")
            return fixed(0)
        if not 0 <= np.min(indices) <= np.max(indices) < size:
            raise Refusal(f"an index is outside of its {size} channels")
        if len(indices) == size and np.array_equal(indices, np.arange(size)):
            return axis
        atom = self.flat(axis)
        if atom is None or atom.labels is None:
            picked = fixed(len(indices))
            if atom is not None:
                self._moved[atom] = _Picked(indices, picked[0] if picked else None)
            return picked
        atom = self._current(atom)
        first = int(indices[0]) if len(indices) else 0
        if not np.array_equal(indices, np.arange(first, first + len(indices))):
            atom = self._collapse(atom, atom.rows)
        assert atom.labels is not None
        labels = atom.labels[..., indices]
        if atom.rows and first:
            self.balances.append(atom.labels[..., :first])  # all rows' pieces begin at one position
        if len(indices) == 1:
            self.freeze([(Atom(1, labels),)], "one index is taken out alone")
            return ()
        return (self.labelled(labels, atom.rows),)

    def concat(self, axes: Sequence[Axis]) -> Axis:
        """Lay axes end to end."""
        if all(is_fixed(axis) for axis in axes):
            return fixed(sum(length(axis) for axis in axes))
        runs: list[Atom] = []
        for axis in axes:
            if not length(axis):
                continue
            atom = self.flat(axis)
            if atom is None or atom.labels is None:
                atom = self.atom(length(axis))
                self.freeze([(atom,)], "it is concatenated and cannot shrink")
            runs.append(self._current(atom))
        rows = tuple(dict.fromkeys(row for run in runs for row in run.rows))
        sizes = [row.size for row in rows]
        labels = [np.broadcast_to(spread(run, rows), (*sizes, run.size)) for run in runs]
        return (self.labelled(np.concatenate(labels, -1), rows),)

    def stack(self, parts: Sequence[Layout]) -> list[Axis]:
        """Lay tensors end to end along their fixed first axis (layers, directions): each may keep indices of its own."""
        counts = [length(part.axes[0]) for part in parts]
        first, stacked, total = fixed(sum(counts)), list[Axis](), sum(counts)
        for axes in zip(*(part.axes[1:] for part in parts), strict=True):
            if not first or any(is_fixed(axis) for axis in axes):
                stacked.append(reduce(self.unify, axes))
                continue
            row, column = self.split(self.atom(total * length(axes[0])), total)
            first, begin = self.unify(first, (row,)), 0
            labels = np.broadcast_to(spread(column, (row,)), (total, column.size))
            for part, axis, count in zip(parts, axes, counts, strict=True):
                self.tie(labels[begin : begin + count, None], self._by_row(axis, part.axes[0]))
                begin += count
            stacked.append((column,))
        return [first, *stacked]

    def _by_row(self, axis: Axis, rows: Axis) -> np.ndarray:
        """Labels of an axis, int64 of shape ``(length of rows, any, length of axis)``."""
        atom = self.flat(axis)
        assert atom is not None
        atom = self._current(atom)
        labels = spread(atom, (*rows, *(row for row in atom.rows if row not in rows)))
        labels = np.broadcast_to(labels, (*[row.size for row in rows], *labels.shape[len(rows) :]))
        return labels.reshape(length(rows), -1, atom.size)

    def mix(self, layout: Layout, positions: Iterable[int]) -> Layout:
        """Combine the indices of some axes with one another: what is on the other axes must not depend on them."""
        mixed = {atom for position in positions for atom in layout.axes[position]}
        return Layout(
            tuple(
                axis if mixed.issuperset(axis) else tuple(self._collapse(atom, mixed) for atom in axis)
                for axis in layout.axes
            )
        )

    def regroup(self, layout: Layout, shape: Sequence[int]) -> Layout:
        """Reshape: walk the atoms in row-major order and cut them where the new axes end."""
        if prod(length(axis) for axis in layout.axes) != prod(shape):
            raise Refusal(f"{[length(axis) for axis in layout.axes]} cannot be reshaped to {list(shape)}")
        if not prod(shape):
            self.freeze(layout.axes, "it is reshaped without an element")
            return unlabelled(shape)
        axes = self._cut([atom for axis in layout.axes for atom in axis], shape)
        return unlabelled(shape) if axes is None else self.arrange(axes)

    def grid(self, axis: Axis, outer: int) -> tuple[Axis, Axis]:
        """See an axis as ``outer`` rows: return its two factors."""
        size = length(axis)
        if outer < 1 or size % outer:
            raise Refusal(f"{size} channels do not divide into {outer} groups")
        rows, columns = self._cut(list(axis), (outer, size // outer)) or (fixed(outer), fixed(size // outer))
        return rows, columns

    def _cut(self, atoms: list[Atom], shape: Sequence[int]) -> list[Axis] | None:
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
                    return None
                atoms[:0] = self.split(atom, common)
            axes.append(tuple(axis))
        return axes

    def _fuse(self, axis: Axis, readers: dict[Atom, int]) -> Axis:
        """Merge neighbours: the parts of a split, and fixed atoms that are nobody's rows."""
        out: list[Atom] = []
        for atom in axis:
            out.append(atom)
            while len(out) > 1 and (merged := self._merged(out[-2], out[-1], readers)) is not None:
                out[-2:] = [merged]
        return tuple(out)

    def _merged(self, a: Atom, b: Atom, readers: dict[Atom, int]) -> Atom | None:
        if a.labels is None and b.labels is None:
            return None if a in readers or b in readers else Atom(a.size * b.size)
        joint = a.joint
        rows, atom = (a, b) if a.labels is None else (b, a)
        if rows in atom.rows and readers[rows] > 1:
            return None  # another atom's labels differ by these rows, too
        if joint is None or joint is not b.joint:
            return self._product(a, b) if a in b.rows else None
        if (a, b) == (joint.outer, joint.inner):
            return joint.whole
        if (b, a) == (joint.outer, joint.inner) and self.decisions is None and joint.whole.labels is not None:
            grid = joint.whole.labels.reshape(b.size, a.size)
            return self.labelled(grid.T.ravel())
        return self._product(a, b)
