"""Units: the operators of a pruned graph whose weights can make up for what was removed, and where that is judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

import numpy as np

from onnxprune.coupling import Coupling
from onnxprune.model import Constant, Model, Node
from onnxprune.ops.regress import Regression, regression
from onnxprune.ops.rescale import Rescale, rescale
from onnxprune.passes.calibrate import float_shape
from onnxprune.passes.least_squares import Rectifier


@dataclass(frozen=True, slots=True, eq=False)
class Bias:
    """Where an operator's bias is read: input ``index`` of ``node``; ``factor`` is what it is multiplied by there."""

    node: Node
    index: int
    factor: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A linear operator to be solved, and what follows up to the place where it is judged.

    Attributes
    ----------
    weight
        Constant of the pruned graph.
    uses
        All nodes that read it: one, unless layers share it.
    bias
        Where its bias is read, or could be; None where it has none and can have none.
    watch
        Tensor whose value in the original is the target.
    norm
        BatchNormalization behind it, whose factors lie between the operator and ``watch``; its mean takes up the bias.
    factor
        What a Mul by a constant behind the operator multiplies by.
    skip
        Tensor of the pruned graph that is added before ``watch``.
    rectifier
        What the value at ``watch`` goes through; the error is measured behind it.
    """

    node: Node
    view: Regression
    weight: str
    uses: tuple[Node, ...]
    bias: Bias | None
    watch: str
    norm: Node | None = None
    factor: float = 1.0
    skip: str | None = None
    rectifier: Rectifier | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Rescaled:
    """A normalisation whose scale and offset are fitted to the original's output."""

    node: Node
    view: Rescale
    watch: str


def changed(coupling: Coupling, keep: np.ndarray) -> set[str]:
    """Tensors whose kept values pruning changes."""
    ended = set()
    for c in coupling.contractions:
        for classes in coupling.atoms(coupling.ledger.input(c.node, c.input, ()).axes[c.axis]):
            if not keep[classes].all():
                ended.add(c.node.key)
    found: set[str] = set()
    for node in coupling.model.nodes:
        if node.key in ended or not found.isdisjoint((*node.inputs, *node.captured)):
            found.update(filter(None, node.outputs))
    return found


def find(
    coupling: Coupling, pruned: Model, keep: np.ndarray, writable: Set[str], inner: Set[str], *, new_nodes: bool
) -> tuple[list[Unit | Rescaled], list[tuple[Node, str]]]:
    """Units in the order in which they run, and changed operators that stay as they are, with the reason.

    Parameters
    ----------
    writable
        Constants of the pruned file whose values can be set.
    inner
        First outputs of nodes whose inputs can be set.
    new_nodes
        Whether a product without a bias may get an Add behind it.
    """
    search = _Search(coupling, pruned, changed(coupling, keep), writable, inner, new_nodes)
    return list(search.units()), search.left


class _Search:
    def __init__(
        self, coupling: Coupling, pruned: Model, moved: Set[str], writable: Set[str], inner: Set[str], new_nodes: bool
    ) -> None:
        self.model, self.moved, self.writable, self.inner, self.new_nodes = pruned, moved, writable, inner, new_nodes
        self.place = {node.key: place for place, node in enumerate(pruned.nodes)}
        self.worked = {work.node.key for work in coupling.ledger.works}
        self.left: list[tuple[Node, str]] = []
        self.readers = _readers(pruned)
        self.outputs = set(pruned.outputs)

    def units(self) -> Iterator[Unit | Rescaled]:
        """Every unit; what is left is noted on the way."""
        done: set[str] = set()
        for node in self.model.nodes:
            if node.key not in self.moved or node.key in done:
                continue
            view = regression(node, float_shape(self.model, node))
            if view is not None:
                unit = self._unit(node, view)
                if isinstance(unit, str):
                    self.left.append((node, unit))
                    continue
                done.update(use.key for use in unit.uses)
                if unit.norm is not None:
                    done.add(unit.norm.key)
                yield unit
            elif (scales := rescale(node, self.model)) is not None:
                if all(self._own(node, index) is not None for index in scales.parameters):
                    yield Rescaled(node, scales, node.key)
                else:
                    self.left.append((node, "its parameters are shared or computed"))
            elif node.key in self.worked:
                self.left.append((node, "its weights are not plain constants of floats, or both operands are computed"))

    def _unit(self, node: Node, view: Regression) -> Unit | str:
        constant = self.model.constant(node.inputs[view.weight])
        assert constant is not None
        if constant.name not in self.writable:
            return "its weights lie in a body of control flow or are computed"
        uses = tuple(dict.fromkeys(reader for reader, _ in self.readers.get(constant.name, ())))
        if constant.name in self.outputs or any(index != view.weight or use.op != node.op for use, index in
                                                self.readers[constant.name]):  # fmt: skip
            return "something else reads its weights, too"
        if len(uses) > 1:
            return Unit(node, view, constant.name, uses, None, node.key)
        return self._follow(node, view, constant)

    def _follow(self, node: Node, view: Regression, constant: Constant) -> Unit:
        """Find what stands behind an operator, as far as nothing else reads what lies in between."""
        name, bias = node.key, self._bias(node, view)
        behind, index = self._reader(name)
        if view.bias is None and behind is not None and behind.op == "Add" and self._is_bias(behind, 1 - index, view):
            bias, name = Bias(behind, 1 - index), behind.key
            behind, index = self._reader(name)
        norm, factor, skip, rectifier = None, 1.0, None, None
        if behind is not None and behind.op == "BatchNormalization" and index == 0:
            scales = rescale(behind, self.model)
            known = all(self.model.constant(name) is not None for name in behind.inputs[1:5])
            if scales is not None and known and self._own(behind, 3) is not None:  # the mean takes up the bias
                norm, name = behind, behind.key
                behind, index = self._reader(name)
        if norm is None and behind is not None and behind.op == "Mul":
            value = self.model.constant(behind.inputs[1 - index])
            if value is not None and value.floating and value.size == 1 and float(value.load().ravel()[0]):
                factor, name = float(value.load().ravel()[0]), behind.key
                behind, index = self._reader(name)
        if behind is not None and behind.op == "Add" and len(behind.inputs) == 2:
            other = behind.inputs[1 - index]
            made = self.model.producer.get(other)
            early = made is None or self.place[made.key] < self.place[node.key]
            same = self.model.shapes.get(other) == self.model.shapes.get(name)
            if self.model.constant(other) is None and other not in self.model.static and early and same:
                skip, name = other, behind.key
                behind, index = self._reader(name)
        if behind is not None:
            rectifier = self._rectifier(behind)
        return Unit(node, view, constant.name, (node,), bias, name, norm, factor, skip, rectifier)

    def _reader(self, name: str) -> tuple[Node | None, int]:
        """Return the only reader of a tensor, if there is just one and the graph does not put it out."""
        edges = self.model.consumers.get(name, ())
        captured = any(name in node.captured for node in self.model.nodes) if len(edges) == 1 else False
        return edges[0] if len(edges) == 1 and name not in self.outputs and not captured else (None, 0)

    def _bias(self, node: Node, view: Regression) -> Bias | None:
        """Where the operator's own bias is read, or a new one could be."""
        if node.key not in self.inner:
            own = self._own(node, view.bias) if view.bias is not None else None
            return Bias(node, view.bias or 0, view.bias_scale) if own is not None else None
        if view.bias is None:
            return Bias(node, -1) if self.new_nodes and view.channel == -1 else None
        if node.has(view.bias):
            given = self.model.constant(node.inputs[view.bias])
            if given is None or not given.floating or given.size != self._outputs(view, node) or view.bias_scale == 0:
                return None
        return Bias(node, view.bias, view.bias_scale)

    def _is_bias(self, add: Node, index: int, view: Regression) -> bool:
        constant = self.model.constant(add.inputs[index])
        shape = self.model.shapes.get(add.key, ())
        if constant is None or not constant.floating or not shape or add.key not in self.inner:
            return False
        lined = (*[1] * (len(shape) - len(constant.shape)), *constant.shape)
        expected = [1] * len(shape)
        expected[view.channel] = shape[view.channel]
        return list(lined) == expected

    def _outputs(self, view: Regression, node: Node) -> int:
        return self.model.shapes[node.key][view.channel]

    def _own(self, node: Node, index: int) -> str | None:
        """Name of a constant that nothing but this input reads, and whose value can be set."""
        constant = self.model.constant(node.inputs[index]) if node.has(index) else None
        if constant is None or constant.name not in self.writable or constant.name in self.outputs:
            return None
        return constant.name if len(self.readers.get(constant.name, ())) == 1 else None

    def _rectifier(self, node: Node) -> Rectifier | None:
        if node.op == "Relu":
            return Rectifier()
        if node.op == "LeakyRelu":
            return Rectifier(float(node.attributes.get("alpha", 0.01)))
        if node.op != "Clip":
            return None
        low, high = (
            self.model.value(node.inputs[i]) if node.has(i) else node.attributes.get(name)
            for i, name in ((1, "min"), (2, "max"))
        )
        if low is None or float(low) != 0:
            return None
        return Rectifier(0.0, np.inf if high is None else float(high))


def _readers(model: Model) -> Mapping[str, list[tuple[Node, int]]]:
    """Every input that reads a constant, Identity looked through."""
    table: dict[str, list[tuple[Node, int]]] = {}
    for node in model.nodes:
        if node.key in model.aliases:
            continue
        for index, name in enumerate(node.inputs):
            root = model.aliases.get(name, name)
            if root in model.constants:
                table.setdefault(root, []).append((node, index))
        for name in node.captured:
            table.setdefault(model.aliases.get(name, name), []).append((node, -1))
    return table
