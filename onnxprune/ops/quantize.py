"""Quantisation: values change their type, channels pass."""

from __future__ import annotations

from onnxprune.labels import Axis, Ledger, is_fixed, length
from onnxprune.model import Node
from onnxprune.ops import couples
from onnxprune.ops.attention import MICROSOFT


@couples("QuantizeLinear", "DequantizeLinear")
@couples("QuantizeLinear", "DequantizeLinear", domain=MICROSOFT)
def quantize(node: Node, ledger: Ledger) -> None:
    """Every axis passes; where each channel, or each block of channels, has a scale and a zero point, they go together."""
    x = ledger.input(node, 0)
    axes = list(x.axes)
    position = node.attributes.get("axis", 1) % max(1, len(axes))
    for index in (i for i in (1, 2) if node.has(i)):
        parameter = ledger.input(node, index)
        if node.attributes.get("block_size", 0) and len(parameter.axes) == len(axes):
            for place, axis in enumerate(parameter.axes):
                if place == position:
                    by_blocks(ledger, axes[place], axis, node.attributes["block_size"])
                else:
                    axes[place] = ledger.unify(axes[place], axis)
        elif parameter.axes and parameter.axes[0]:
            axes[position] = ledger.unify(axes[position], parameter.axes[0])
    ledger.output(node, axes)


def by_blocks(ledger: Ledger, axis: Axis, blocks: Axis, size: int) -> None:
    """Runs of ``size`` indices of an axis go together, with their index of ``blocks``; a last run that is not full stays."""
    if length(axis) % size:
        ledger.freeze([axis, blocks], "its last quantisation block is not full")
        return
    rows, columns = ledger.grid(axis, length(axis) // size)
    if not is_fixed(columns):
        ledger.freeze([columns], "a quantisation block goes as a whole")
    ledger.unify(rows, blocks)


@couples("DynamicQuantizeLinear")
def dynamic_quantize(node: Node, ledger: Ledger) -> None:
    """Scale and zero point follow from the range of all elements: of those that are kept."""
    x = ledger.input(node, 0)
    over = [position for position, axis in enumerate(x.axes) if not is_fixed(axis)]
    for position in over:
        ledger.contract(node, 0, position, redefined=True)
    ledger.output(node, ledger.mix(x, over))
    for index in (1, 2):
        ledger.output(node, (), index)
