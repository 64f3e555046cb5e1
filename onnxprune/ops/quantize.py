"""Quantisation: values change their type, channels pass."""

from __future__ import annotations

from onnxprune.labels import Ledger, Refusal
from onnxprune.model import Node
from onnxprune.ops import couples


@couples("QuantizeLinear", "DequantizeLinear")
def quantize(node: Node, ledger: Ledger) -> None:
    """Every axis passes; where each channel has a scale and a zero point of its own, they tie to it."""
    x = ledger.input(node, 0)
    axes = list(x.axes)
    for index in (i for i in (1, 2) if node.has(i)):
        parameter = ledger.input(node, index)
        if len(parameter.axes) > 1:
            raise Refusal("scales for blocks of channels")
        if parameter.axes and parameter.axes[0]:
            position = node.attributes.get("axis", 1) % len(axes)
            axes[position] = ledger.unify(axes[position], parameter.axes[0])
    ledger.output(node, axes)
