"""Where the channels of every group come from and go to: what ``names`` reads a group's role from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from onnxprune.cost import Cost
from onnxprune.coupling import distinct
from onnxprune.labels import Atom, Axis
from onnxprune.model import Node

Groups = frozenset[int]
NOTHING: Groups = frozenset()
CUTS = frozenset(("Split", "Slice", "Gather"))  # what comes out is not the channel that went in, but another


@dataclass(slots=True)
class Use:
    """Nodes with multiply-accumulates, in graph order, by what they do to a group's channels.

    Attributes
    ----------
    layers
        All whose multiply-accumulates depend on the group.
    starts
        They compute the channels.
    ends
        They sum over the channels.
    passes
        They compute with each channel (or head) alone: depthwise convolutions, products of attention.
    """

    layers: list[Node] = field(default_factory=list)
    starts: list[Node] = field(default_factory=list)
    ends: list[Node] = field(default_factory=list)
    passes: list[Node] = field(default_factory=list)
    macs: float = 0


@dataclass(frozen=True, slots=True)
class Attention:
    """A softmax between products of computed tensors."""

    scores: tuple[Node, ...]
    values: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Meeting:
    """Two computed tensors that meet element by element at ``node``, each with the same group's channels."""

    node: Node
    left: str
    right: str


class Flow:
    """The groups of a coupling, by number, on every tensor."""

    def __init__(self, cost: Cost) -> None:
        self.coupling = cost.coupling
        self.model, self._ledger = self.coupling.model, self.coupling.ledger
        of_class = np.full(self.coupling.n_classes, -1)
        for number, group in enumerate(self.coupling.groups):
            of_class[group.classes] = number
        self._of_label = of_class[self.coupling.classes]
        self._of_atom: dict[Atom, Groups] = {}
        self._on: dict[str, tuple[Groups, ...]] = {}
        self._order = {node.key: place for place, node in enumerate(self.model.nodes)}
        self.works = {work.node.key: work for work in reversed(cost.works)}
        self.uses = self._uses(cost)

    def carried(self, axis: Axis) -> Groups:
        """Groups whose channels are on an axis."""
        return NOTHING.union(*(self._groups(atom) for atom in axis))

    def on(self, tensor: str) -> tuple[Groups, ...]:
        """Groups on each axis of a computed tensor; of others nothing is known."""
        known = self._on.get(tensor)
        if known is None:
            layout = self._ledger.layouts.get(tensor)
            computed = layout is not None and tensor not in self._ledger.derived and self.model.constant(tensor) is None
            known = tuple(self.carried(axis) for axis in layout.axes) if layout is not None and computed else ()
            self._on[tensor] = known
        return known

    def _groups(self, atom: Atom) -> Groups:
        if atom.labels is None:
            return NOTHING
        known = self._of_atom.get(atom)
        if known is None:
            known = self._of_atom[atom] = frozenset(distinct(self._of_label[atom.labels].ravel()).tolist()) - {-1}
        return known

    def _uses(self, cost: Cost) -> list[Use]:
        uses = [Use() for _ in self.coupling.groups]
        ended: dict[str, set[tuple[int, int]]] = {}
        for c in self._ledger.contractions:
            ended.setdefault(c.node.key, set()).add((c.input, c.axis))
        macs = cost.layers.values(cost.counts(np.ones(self.coupling.n_classes, bool)))
        for work, mac in zip(cost.works, macs, strict=True):
            for group in NOTHING.union(*(self.carried(axis) for axis in work.axes)):
                uses[group].macs += mac
                _note(uses[group].layers, work.node)
        for node in (work.node for work in cost.works):
            gone, stays = set[int](), set[int]()
            for index, name in enumerate(node.inputs):
                for axis, groups in enumerate(self.on(name)):
                    (gone if (index, axis) in ended.get(node.key, ()) else stays).update(groups)
            out = NOTHING.union(*(groups for name in node.outputs for groups in self.on(name)))
            for index, axis in ended.get(node.key, ()):  # a graph's input has no labels, the weight that reads it has
                gone |= self.carried(self._ledger.input(node, index, ()).axes[axis]) - out
            for group in out - stays:
                _note(uses[group].starts, node)
            for group in gone:
                _note(uses[group].ends, node)
            for group in out & stays:
                _note(uses[group].passes, node)
        return uses

    def weight(self, node: Node) -> str | None:
        """Name of the weight of a node with multiply-accumulates."""
        work = self.works.get(node.key)
        name = node.inputs[work.weight] if work and work.weight is not None else None
        return name and self.model.aliases.get(name, name)

    @cached_property
    def heads(self) -> Groups:
        """Groups of channels that are heads of attention."""
        return frozenset(g for labels in self._ledger.heads for g in distinct(self._of_label[labels].ravel()).tolist())

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """Every softmax between products of computed tensors."""
        found = []
        for node in self.model.nodes:
            if node.op == "Softmax":
                scores, values = self._products(node, forward=False), self._products(node, forward=True)
                if scores and values:
                    found.append(Attention(scores, values))
        return tuple(found)

    def _products(self, node: Node, *, forward: bool) -> tuple[Node, ...]:
        """Products of computed tensors that come straight before or after a node."""
        found: dict[str, Node] = {}
        waiting, seen = [node], {node.key}
        while waiting:
            now = waiting.pop()
            if forward:
                others = [reader for name in now.outputs for reader, _ in self.model.consumers.get(name, ())]
            else:
                others = [self.model.producer[name] for name in now.inputs if name in self.model.producer]
            for other in others:
                if other.key in seen:
                    continue
                seen.add(other.key)
                work = self.works.get(other.key)
                if work is None:
                    waiting.append(other)
                elif work.weight is None:
                    found[other.key] = other
        return tuple(found.values())

    @cached_property
    def tables(self) -> tuple[Node, ...]:
        """Look-ups in constants: embeddings."""
        return tuple(n for n in self.model.nodes if n.op == "Gather" and self.model.constant(n.inputs[0]) is not None)

    @cached_property
    def joins(self) -> dict[int, list[Node]]:
        """By group: the Concat nodes that lay its channels beside others."""
        found: dict[int, list[Node]] = {}
        for node in self.model.nodes:
            on = self.on(node.outputs[0]) if node.op == "Concat" else ()
            for group in on[node.attributes["axis"] % len(on)] if on else ():
                found.setdefault(group, []).append(node)
        return found

    def meetings(self, *ops: str) -> dict[int, list[Meeting]]:
        """By group: where two computed tensors that both carry it meet at one of ``ops``."""
        found: dict[int, list[Meeting]] = {}
        for node in self.model.nodes:
            if node.op in ops:
                axes = [(name, self.on(name)[::-1]) for name in dict.fromkeys(node.inputs) if self.on(name)]
                for place, (left, a) in enumerate(axes):
                    for right, b in axes[place + 1 :]:
                        for group in NOTHING.union(*(x & y for x, y in zip(a, b, strict=False))):
                            found.setdefault(group, []).append(Meeting(node, left, right))
        return found

    def behind(self, tensor: str, group: int) -> set[str]:
        """Tensors from which the group's channels come to ``tensor``, each from itself alone, without a layer in between."""
        found, waiting = {tensor}, [tensor]
        while waiting:
            node = self.model.producer.get(waiting.pop())
            if node is None or node.key in self.works or node.op in CUTS:
                continue
            sources = {name for name in node.inputs if any(group in groups for groups in self.on(name))}
            waiting += sources - found
            found |= sources
        return found

    def between(self, sources: Iterable[str], tensor: str) -> set[str]:
        """Keys of the layers on the ways from ``sources`` to ``tensor``; empty where no way has a layer."""
        through = dict.fromkeys(sources, False)
        first = min(self._order[self.model.producer[name].key] for name in through if name in self.model.producer)
        nodes: dict[str, Node] = {}
        waiting = [tensor]
        while waiting:
            name = waiting.pop()
            node = self.model.producer.get(name)
            if name not in through and node is not None and node.key not in nodes and self._order[node.key] > first:
                nodes[node.key] = node
                waiting += [source for source in node.inputs if source]
        met = set()
        for node in sorted(nodes.values(), key=lambda node: self._order[node.key]):
            ways = [through[name] for name in node.inputs if name in through]
            if ways:
                layer = node.key in self.works
                met |= {node.key} if layer else set()
                through |= dict.fromkeys(node.outputs, layer or any(ways))
        return met if through.get(tensor) else set()


def _note(nodes: list[Node], node: Node) -> None:
    if not nodes or nodes[-1] is not node:
        nodes.append(node)
