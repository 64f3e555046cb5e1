"""What each group is in the reader's terms: a residual stream, heads of an attention, a hidden layer between two others.

A name states what the graph shows; where nothing special is known it only says which layers the channels belong to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from onnxprune.cost import Cost
from onnxprune.labels import length
from onnxprune.model import Node
from onnxprune.ops.linear import CONVOLUTIONS, PRODUCTS
from onnxprune.report.flow import Flow, Meeting, Use
from onnxprune.report.titles import Path, Titles, shared, text

ADDS, MULTIPLIES = ("Add", "Sum", "Sub", "QLinearAdd"), ("Mul", "QLinearMul")
RECURRENT = frozenset(("LSTM", "GRU", "RNN"))


@dataclass(frozen=True, slots=True)
class Named:
    """A group's name, and the multiply-accumulates of all layers that it takes part in."""

    name: str
    mac: int


def names(cost: Cost) -> tuple[Named, ...]:
    """Name every group of a coupling, in their order; those that would be called alike are numbered."""
    naming = _Naming(cost)
    uses = naming.flow.uses
    found = [naming.name(number) for number in range(len(uses))]
    times, met = Counter(found), Counter[str]()
    for number, name in enumerate(found):
        met[name] += 1
        if times[name] > 1:
            found[number] = f"{name} ({met[name]} of {times[name]})"
    return tuple(Named(name, round(use.macs)) for name, use in zip(found, uses, strict=True))


class _Naming:
    def __init__(self, cost: Cost) -> None:
        self.flow = Flow(cost)
        self._titles = Titles(cost.coupling.ledger)

    def name(self, group: int) -> str:
        """Name of a group, by number."""
        use = self.flow.uses[group]
        recurrent = [node for node in use.starts if node.op in RECURRENT]
        if recurrent and len(recurrent) == len(use.starts):
            return f"hidden state of {self._listed(recurrent)}"
        if group in self._residuals:
            return self._residual(group)
        return self._of_attention(group) or self._hidden(group, use)

    # -- residual streams --------------------------------------------------------------------------------------------

    @cached_property
    def _added(self) -> dict[int, list[Meeting]]:
        return self.flow.meetings(*ADDS)

    @cached_property
    def _multiplied(self) -> dict[int, list[Meeting]]:
        return self.flow.meetings(*MULTIPLIES)

    def _is_residual(self, group: int) -> bool:
        """Whether somewhere the channels are added to what layers computed from them."""
        return any(self._detour(group, meeting) for meeting in self._added.get(group, ()))

    def _detour(self, group: int, meeting: Meeting) -> tuple[str, set[str]] | None:
        """The operand that layers computed from the other one, and those layers."""
        for straight, other in ((meeting.left, meeting.right), (meeting.right, meeting.left)):
            layers = self.flow.between(self.flow.behind(straight, group), other)
            if layers:
                return other, layers
        return None

    @cached_property
    def _residuals(self) -> dict[int, str]:
        """Residual streams, by group, with the place where all layers that add to one are ("" where others add, too)."""
        found = [group for group in range(len(self.flow.uses)) if self._is_residual(group)]
        places = {group: shared([self._titles.path(node) for node in self.flow.uses[group].starts]) for group in found}

        def is_alone(own: int) -> bool:
            size = len(places[own])
            return not any(place[:size] == places[own] for group, place in places.items() if group != own)

        return {group: text(place) if is_alone(group) else "" for group, place in places.items()}

    def _residual(self, group: int) -> str:
        use, place = self.flow.uses[group], self._residuals[group]
        if len(self._residuals) == 1 or not use.starts:
            return f"residual stream of {count(use.layers)}"
        if place and len(use.starts) > 1:
            return f"residual stream of {place} ({count(use.layers)})"
        return f"residual stream of {count(use.layers)} from {self._titles.name(use.starts[0])}"

    # -- attention ---------------------------------------------------------------------------------------------------

    def _of_attention(self, group: int) -> str | None:
        use = self.flow.uses[group]
        ends, passes = {node.key for node in use.ends}, {node.key for node in use.passes}
        roles, labels = dict[str, None](), []
        for attention in self.flow.attentions:
            scores = {node.key for node in attention.scores}
            values = {node.key for node in attention.values}
            found = []
            if group in self.flow.heads and passes & (scores | values):
                found.append("heads")
            else:
                found += ["query and key"] if ends & scores else []
                found += ["value"] if passes & values else []
            if found:
                roles |= dict.fromkeys(found)
                labels.append(self._attention((*attention.scores, *attention.values), use.starts))
        if not labels:
            return None
        several = f"{len(labels)} attentions" if len(labels) > 1 else ""
        if "heads" in roles:
            return f"attention heads of {several or labels[0]}"
        what = " and ".join(roles).replace("query and key and value", "query, key and value")
        return f"{what} dimensions of {several or f'attention {labels[0]}'}"

    def _attention(self, products: Sequence[Node], starts: Sequence[Node]) -> str:
        """Where an attention is: what its products' names begin with, else its projections', else its first product."""
        paths = [self._titles.path(node) for node in products]
        before = [self._titles.path(node)[:-1] for node in starts]
        return text(shared(paths)) or text(shared(before)) or text(paths[0])

    # -- everything else ---------------------------------------------------------------------------------------------

    def _hidden(self, group: int, use: Use) -> str:
        gated, attending = False, set[str]()
        for meeting in self._multiplied.get(group, ()):
            detour = self._detour(group, meeting)
            if detour is None:
                gated = gated or self._are_apart(group, meeting)
            elif self._is_broadcast(group, detour[0], meeting):
                attending |= detour[1]
        starts = [node for node in use.starts if node.key not in attending]
        ends = [node for node in use.ends if node.key not in attending]
        attended = " with channel attention" if attending else ""
        return self._between(group, starts, ends, gated=gated and bool(ends)) + attended

    def _between(self, group: int, every_start: Sequence[Node], every_end: Sequence[Node], *, gated: bool) -> str:
        starts, ends = self._distinct(every_start), self._distinct(every_end)
        if not starts:
            return self._unmade(group, ends)
        if any(group in groups for name in self.flow.model.outputs for groups in self.flow.on(name)):
            return f"output channels of {self._listed(starts)}"
        times = f", applied {len(every_start)} times" if len(starts) == 1 < len(every_start) else ""
        kind = "gated " if gated else ""
        if len(ends) == 1 and (len(starts) == 1 or (gated and len(starts) == 2)):
            kind += "depthwise " if any(node.op.startswith("Conv") for node in self.flow.uses[group].passes) else ""
            (*before, after), place = self._titles.names([*starts, *ends])
            if place and self._titles.within(place) == {node.key for node in self.flow.uses[group].layers}:
                return f"{kind}hidden layer of {text(place)}{times}"
            return f"{kind}hidden layer between {', '.join(before)} and {after}{of(place)}{times}"
        readers = f", read by {count(ends)}" if len(ends) > 1 else ""
        if len(starts) > 1:
            what = "sum of" if self._are_added(group) else "channels shared by"
        else:
            what = "skip connection from" if not gated and self._is_skip(group) else "channels of"
        return f"{kind}{what} {self._listed(starts)}{times}{readers}"

    def _are_added(self, group: int) -> bool:
        return any(self._are_apart(group, meeting) for meeting in self._added.get(group, ()))

    def _are_apart(self, group: int, meeting: Meeting) -> bool:
        """Whether two tensors that meet come from different sources, unlike x and its sigmoid."""
        return self.flow.behind(meeting.left, group).isdisjoint(self.flow.behind(meeting.right, group))

    def _distinct(self, nodes: Sequence[Node]) -> list[Node]:
        """One node of all that share a weight."""
        return list({self.flow.weight(node) or node.key: node for node in reversed(nodes)}.values())[::-1]

    def _unmade(self, group: int, ends: Sequence[Node]) -> str:
        """Name of channels that no layer computes: they come in, or from a table."""
        tables = [node for node in self.flow.tables if any(group in groups for groups in self.flow.on(node.key))]
        if tables:
            return f"embedding dimensions of {self._listed(tables)}"
        weights = {self.flow.weight(node) for node in ends}
        own = [name for name, _ in self.flow.coupling.groups[group].members if name not in weights]
        if own:
            return f"channels of constant {own[0]}"
        return f"input channels of {self._listed(ends)}" if ends else "channels that no layer computes"

    def _is_skip(self, group: int) -> bool:
        """Whether the channels are concatenated with what layers computed from them."""
        for node in self.flow.joins.get(group, ()):
            for name in node.inputs:
                if any(group in groups for groups in self.flow.on(name)):
                    own = self.flow.behind(name, group)
                    if any(self.flow.between(own, other) for other in node.inputs if other not in own):
                        return True
        return False

    def _is_broadcast(self, group: int, tensor: str, meeting: Meeting) -> bool:
        """Whether one of the two tensors that meet has fewer numbers per channel of the group than the other."""
        sizes = {name: self._numbers(group, name) for name in (meeting.left, meeting.right)}
        return sizes.pop(tensor) < min(sizes.values())

    def _numbers(self, group: int, tensor: str) -> int:
        axes = self.flow.coupling.ledger.layouts[tensor].axes
        return prod(length(axis) for axis, on in zip(axes, self.flow.on(tensor), strict=True) if group not in on)

    def _listed(self, nodes: Sequence[Node]) -> str:
        if len(nodes) > 2:
            place = text(shared([self._titles.path(node) for node in nodes]))
            return f"{count(nodes)} {f'of {place}' if place else f'from {self._titles.name(nodes[0])}'}"
        parts, common = self._titles.names(nodes)
        return f"{' and '.join(parts)}{of(common)}"


def of(place: Path) -> str:
    """Say where something is."""
    return f" of {text(place)}" if place else ""


def count(nodes: Sequence[Node]) -> str:
    """Say how many layers these are, and of what kind."""
    convolutions = all(node.op in CONVOLUTIONS for node in nodes)
    linear = all(node.op in PRODUCTS for node in nodes)
    word = "conv" if convolutions else "linear layer" if linear else "layer"
    return f"{len(nodes)} {word}{'s' if len(nodes) != 1 else ''}"
