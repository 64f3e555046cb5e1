"""The only place that knows ONNX operators: one registry, one file per family, everything about an operator side by side.

A *couple* rule ``(node, ledger) -> None`` states how labels travel through the operator and what it costs, in terms of the
ledger's primitives. A *rewrite* rule ``(node, change) -> list[Edit]`` states which attributes and shape-like inputs must
follow when an axis shrinks; operators without one need no edit. An operator without a couple rule freezes what it touches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnxprune.labels import Axis, Ledger, Refusal, is_fixed
from onnxprune.model import Node, Shape


class Change(Protocol):
    """What a rewrite rule may ask about the pruned graph."""

    opset: int

    def before(self, name: str) -> Shape:
        """Shape of a tensor in the original."""

    def after(self, name: str) -> Shape:
        """Shape of the same tensor in the pruned graph."""

    def kept(self, name: str, axis: int) -> np.ndarray:
        """Kept indices of one axis, ascending, int64."""

    def original(self, name: str) -> np.ndarray | None:
        """Value of a shape-like tensor in the original."""

    def value(self, name: str) -> np.ndarray | None:
        """Value that a shape-like tensor will have in the pruned graph if nobody edits it."""


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """Required value of an attribute (``where`` a name; None removes it) or of an input (``where`` an index)."""

    where: str | int
    value: object


CoupleRule = Callable[[Node, Ledger], None]
RewriteRule = Callable[[Node, Change], list[Edit]]

_SHAPE_ONLY = frozenset(("Squeeze", "Unsqueeze", "Shape", "Size", "Range"))

_COUPLE: dict[tuple[str, str], CoupleRule] = {}
_REWRITE: dict[tuple[str, str], RewriteRule] = {}


def couples(*ops: str, domain: str = "") -> Callable[[CoupleRule], CoupleRule]:
    """Register a rule that says how labels travel through ``ops``, and what they cost."""

    def decorate(rule: CoupleRule) -> CoupleRule:
        _COUPLE.update({(domain, op): rule for op in ops})
        return rule

    return decorate


def rewrites(*ops: str, domain: str = "") -> Callable[[RewriteRule], RewriteRule]:
    """Register a rule that says what to edit in ``ops`` when an axis shrinks."""

    def decorate(rule: RewriteRule) -> RewriteRule:
        _REWRITE.update({(domain, op): rule for op in ops})
        return rule

    return decorate


def register(op: str, couple: CoupleRule, rewrite: RewriteRule | None = None, *, domain: str = "") -> None:
    """Teach onnxprune an operator, for example of a custom domain.

    Parameters
    ----------
    couple
        ``couple(node, ledger)`` sets the layout of every output and records ties and contractions.
    rewrite
        ``rewrite(node, change)`` returns the edits that shrunk axes require.
    """
    couples(op, domain=domain)(couple)
    if rewrite is not None:
        rewrites(op, domain=domain)(rewrite)


def supported() -> frozenset[tuple[str, str]]:
    """Every ``(domain, operator)`` that has a rule."""
    return frozenset(_COUPLE)


def couple(node: Node, ledger: Ledger) -> None:
    """Walk one node; where no rule covers it, freeze what it touches and say why."""
    ledger.node = node
    rule = _COUPLE.get((node.domain, node.op))
    try:
        if rule is None:
            raise Refusal(f"no rule for operator {node.domain + '::' if node.domain else ''}{node.op}")
        rule(node, ledger)
    except Refusal as refusal:
        ledger.refusals[node.key] = str(refusal)
        _freeze_around(node, ledger, str(refusal))
    ledger.settle()


def rewrite(node: Node, change: Change) -> list[Edit]:
    """Return the edits that the node needs under ``change``."""
    rule = _REWRITE.get((node.domain, node.op))
    return rule(node, change) if rule else []


def reads_shapes(node: Node) -> bool:
    """Whether the node's integer operands say how it moves data, so that its rewrite rule keeps them right."""
    return (node.domain, node.op) in _REWRITE or node.op in _SHAPE_ONLY


def _freeze_around(node: Node, ledger: Ledger, text: str) -> None:
    for name in (*node.inputs, *node.captured):
        constant = ledger.model.constant(name) if name else None
        if constant is not None and not constant.is_vector:
            index = node.inputs.index(name) if name in node.inputs else 0
            layout = ledger.whole(constant, node, index)
        elif name and constant is None and name in ledger.layouts:
            layout = ledger.layouts[name]
        else:
            continue
        ledger.freeze(layout.axes, text, name)
    for name in node.outputs:
        ledger.layouts.pop(name, None)


def channels_only(node: Node, ledger: Ledger, axes: tuple[Axis, ...], text: str) -> None:
    """Freeze axes that the operator mixes or resamples, if any of them carries labels."""
    if not all(is_fixed(axis) for axis in axes):
        ledger.freeze(axes, text, node.inputs[0])


from onnxprune.ops import (  # noqa: E402  (they register)
    attention,  # noqa: F401
    einsum,  # noqa: F401
    elementwise,  # noqa: F401
    fused,  # noqa: F401
    indexing,  # noqa: F401
    integer,  # noqa: F401
    linear,  # noqa: F401
    movement,  # noqa: F401
    norm,  # noqa: F401
    pool,  # noqa: F401
    quantize,  # noqa: F401
    recurrent,  # noqa: F401
    reduce,  # noqa: F401
    regions,  # noqa: F401
    sampling,  # noqa: F401
)
