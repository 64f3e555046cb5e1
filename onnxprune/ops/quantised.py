"""Quantised weights: which constants hold them, and the real numbers that they stand for.

A table names, for an operator, inputs that may be a quantised weight, its scales and its zero points, and the axis along
which these differ. ``(w - zero point) * scale`` is what a float model would hold there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from onnxprune.model import Constant, Model, Node

OPERANDS: Mapping[str, tuple[tuple[int, int | None, int, int], ...]] = {
    "QLinearConv": ((3, 4, 5, 0),),
    "ConvInteger": ((1, None, 3, 0),),
    "QLinearMatMul": ((3, 4, 5, -1), (0, 1, 2, -1)),
    "MatMulInteger": ((1, None, 3, -1), (0, None, 2, -1)),
    "MatMulIntegerToFloat": ((1, 3, 5, -1),),
    "DynamicQuantizeMatMul": ((1, 2, 3, -1),),
    "QGemm": ((3, 4, 5, 1),),
    "QAttention": ((1, 4, 7, 1),),
}
"""By operator: inputs of weight, scale (None: behind the operator) and zero point, and the axis that they belong to."""


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A constant of integers (or of float8) that stands for real numbers.

    Attributes
    ----------
    axis, block
        Where scales and zero points belong to an axis of the weight: each to ``block`` of its indices (0: to one).
    bits
        Of a number, where the last axis of the weight is bytes that hold several; 0 where it is not packed.
    """

    weight: Constant
    scale: Constant | None
    zero: Constant | None
    axis: int
    block: int = 0
    bits: int = 0

    @property
    def fits(self) -> bool:
        """Whether scales and zero points are of a shape that the weight's allows."""
        rank = len(self.weight.shape)
        for parameter in (self.scale, self.zero):
            if parameter is None or self.bits or parameter.size == 1:
                continue
            lengths = parameter.shape if len(parameter.shape) == rank else (1,) * rank
            if len(parameter.shape) == 1 and rank > 1:
                lengths = tuple(parameter.size if a == self.axis % rank else 1 for a in range(rank))
            elif len(parameter.shape) != rank:
                return False
            blocked = {self.axis % rank} if self.block else set()
            if any(
                n not in (1, size)
                for a, (n, size) in enumerate(zip(lengths, self.weight.shape, strict=True))
                if a not in blocked
            ):
                return False
        return True

    def load(self) -> np.ndarray:
        """The real numbers, float32 of the weight's shape; a packed last axis has one index for each number."""
        if self.bits:
            return self._unpacked()
        values = self.weight.load().astype(np.float32)
        if self.zero is not None:
            values = values - self._spread(self.zero.load().astype(np.float32), values)
        return values if self.scale is None else values * self._spread(self.scale.load().astype(np.float32), values)

    def _spread(self, parameter: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Shape scales or zero points so that they broadcast to the weight."""
        if parameter.size == 1:
            return parameter.reshape(())
        axis = self.axis % values.ndim
        if self.block and parameter.ndim == values.ndim:
            return parameter.repeat(self.block, axis).take(np.arange(values.shape[axis]), axis)
        return parameter.reshape(-1, *[1] * (values.ndim - 1 - axis)) if parameter.ndim == 1 else parameter

    def _unpacked(self) -> np.ndarray:
        """Blocks of inputs for every output, as MatMulNBits packs them: (outputs, blocks, inputs of a block)."""
        out, blocks = self.weight.shape[:2]
        values = unpack(self.weight.load(), self.bits).astype(np.float32)
        zero: np.ndarray | float = float(1 << (self.bits - 1))
        if self.zero is not None:
            stored = self.zero.load().reshape(out, -1)
            packed = stored.dtype == np.uint8
            zero = (unpack(stored, self.bits) if packed else stored)[:, :blocks, None].astype(np.float32)
        scale = 1.0 if self.scale is None else self.scale.load().astype(np.float32).reshape(out, blocks, 1)
        return (values - zero) * scale


def unpack(array: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of so many bits in the bytes of the last axis, the lowest bits first."""
    if bits == 8:
        return array
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((array[..., None] >> shifts) & ((1 << bits) - 1)).reshape(*array.shape[:-1], -1)


def quantised(model: Model) -> dict[str, Quantised]:
    """Every constant that some node reads as a quantised weight, by name."""
    found: dict[str, Quantised] = {}
    for node in model.nodes:
        for each in _of(node, model):
            if each.weight.size > 1 and each.fits:
                found.setdefault(each.weight.name, each)
    return found


_ON_THE_WAY = frozenset(("DequantizeLinear", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Cast"))
"""Operators that may stand between a quantised weight and what multiplies by it."""


def reads_quantised(node: Node, model: Model, weights: Mapping[str, Quantised]) -> bool:
    """Whether a node reads a quantised weight, as it is or dequantised before."""
    for name in node.inputs:
        source, made = name, model.producer.get(name)
        while made is not None and made.op in _ON_THE_WAY and model.aliases.get(source, source) not in weights:
            source = made.inputs[0]
            made = model.producer.get(source)
        if model.aliases.get(source, source) in weights:
            return True
    return False


def _of(node: Node, model: Model) -> Iterator[Quantised]:
    def constant(index: int | None) -> Constant | None:
        return model.constant(node.inputs[index]) if index is not None and node.has(index) else None

    if node.op == "DequantizeLinear":
        weight = constant(0)
        if weight is not None:
            block = node.attributes.get("block_size", 0)
            yield Quantised(weight, constant(1), constant(2), node.attributes.get("axis", 1), block)
    elif node.op == "MatMulNBits":
        weight = constant(1)
        if weight is not None:
            yield Quantised(weight, constant(2), constant(3), 0, bits=node.attributes["bits"])
    for weight_index, scale_index, zero_index, axis in OPERANDS.get(node.op, ()):
        weight = constant(weight_index)
        if weight is not None and not weight.floating:
            scale = constant(scale_index) if scale_index is not None else _behind(node, model)
            transposed = node.op == "QGemm" and node.attributes.get("transB", 0)
            yield Quantised(weight, scale, constant(zero_index), 0 if transposed else axis)


def _behind(node: Node, model: Model) -> Constant | None:
    """Scales of a weight's output channels, by which a sum of integers is multiplied behind a Cast."""
    (cast, _), *others = model.consumers.get(node.key, ((None, 0),))
    if cast is None or others or cast.op != "Cast":
        return None
    for reader, index in model.consumers.get(cast.key, ()):
        if reader.op != "Mul":
            continue
        factor = reader.inputs[1 - index]
        made = model.producer.get(factor)
        for name in (factor, *(made.inputs if made is not None and made.op == "Mul" else ())):
            scale = model.constant(name)
            if scale is not None and scale.floating and scale.size == max(1, prod(scale.shape[-1:])):
                return scale
    return None
