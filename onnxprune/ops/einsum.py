"""Einsum: axes with one letter are one axis; letters that the output lacks end."""

from __future__ import annotations

from onnxprune.labels import Atom, Axis, Channels, Layout, Ledger, Refusal
from onnxprune.model import Node
from onnxprune.ops import couples


@couples("Einsum")
def einsum(node: Node, ledger: Ledger) -> None:
    """Aligned letters tie; letters missing in the output are summed over; a weight may stand anywhere."""
    operands = [ledger.input(node, index) for index in range(len(node.inputs))]
    terms, result = _equation(node.attributes["equation"], [len(operand.axes) for operand in operands])
    operands = _apart(ledger, operands, terms)
    axes: dict[str, Axis] = {}
    for term, operand in zip(terms, operands, strict=True):
        for letter, axis in zip(term, operand.axes, strict=True):
            axes[letter] = ledger.unify(axes[letter], axis) if letter in axes else axis
    weights = [ledger.is_weight(name) for name in node.inputs]
    computed = {letter for term, is_weight in zip(terms, weights, strict=True) if not is_weight for letter in term}
    for index, term in enumerate(terms):
        for position, letter in enumerate(term):
            if letter not in computed | set(result):
                ledger.freeze([axes[letter]], "a weight is computed from all of it", node.inputs[index])
            if letter not in result:
                ledger.contract(node, index, position)
    if not any(weights):
        shared = [letter for letter in result if all(letter in term for term in terms)]
        ledger.attend((axes[letter] for letter in shared), (axes[letter] for letter in axes if letter not in shared))
    if len(operands) > 1:
        weight = weights.index(True) if any(weights) else None
        channels = None if weight is None else _channels(axes, terms[weight], computed, result)
        ledger.work(node, tuple(axes.values()), weight=weight, channels=channels)
    ledger.output(node, [axes[letter] for letter in result])


def _channels(axes: dict[str, Axis], term: list[str], computed: set[str], result: list[str]) -> Channels:
    """A weight's letters that end are its input channels; those that only it has are its output channels."""
    inputs: Axis = sum((axes[letter] for letter in term if letter not in result), ())
    outputs: Axis = sum((axes[letter] for letter in term if letter in result and letter not in computed), ())
    return Channels("MatMul", inputs, outputs, inputs)


def _apart(ledger: Ledger, operands: list[Layout], terms: list[list[str]]) -> list[Layout]:
    """Labels must not differ by rows that stand under two letters, as where a tensor meets its transpose: they mix."""
    letters: dict[Atom, set[str]] = {}
    for term, operand in zip(terms, operands, strict=True):
        for letter, axis in zip(term, operand.axes, strict=True):
            for atom in (atom for atom in axis if atom.labels is None):
                letters.setdefault(atom, set()).add(letter)
    several = {atom for atom, found in letters.items() if len(found) > 1}
    return [ledger.mix(o, [i for i, axis in enumerate(o.axes) if not several.isdisjoint(axis)]) for o in operands]


def _equation(text: str, ranks: list[int]) -> tuple[list[list[str]], list[str]]:
    """Letters of every operand's axes and of the output's; axes behind an ellipsis count from the right ("-1")."""
    left, arrow, right = text.replace(" ", "").partition("->")
    parts = left.split(",")
    terms = [_term(term, rank) for term, rank in zip(parts, ranks, strict=False)]
    if [len(term) for term in terms] != ranks or len(parts) != len(ranks):
        raise Refusal("an Einsum whose equation does not fit its inputs")
    every = [letter for term in terms for letter in term]
    hidden = sorted({letter for letter in every if len(letter) > 1}, key=int)
    if arrow:
        before, dots, behind = right.partition("...")
        result = [*before, *(hidden if dots else ()), *behind]
    else:
        result = [*hidden, *sorted(letter for letter in every if every.count(letter) == 1 and len(letter) == 1)]
    if any(len(set(term)) < len(term) for term in (*terms, result)):
        raise Refusal("an Einsum that takes a diagonal")
    return terms, result


def _term(term: str, rank: int) -> list[str]:
    before, dots, behind = term.partition("...")
    n_hidden = rank - len(before) - len(behind) if dots else 0
    return [*before, *(str(number) for number in range(-n_hidden, 0)), *behind]
