"""Changes of quantisation: pairs that are put in, and parameters that do not fit."""

from __future__ import annotations

import random

import numpy as np
from onnx import ModelProto, helper, numpy_helper

from .common import FLOATS, Unfit, pick

QUANTISERS = (
    "QuantizeLinear DequantizeLinear QLinearConv QLinearMatMul ConvInteger MatMulInteger DynamicQuantizeLinear".split()
)


def weight(model: ModelProto, rng: random.Random) -> None:
    """Store a weight in 8 bits behind DequantizeLinear, per tensor or per channel of a right or a wrong axis."""
    stored = [t for t in model.graph.initializer if t.data_type == 1 and len(t.dims) > 1 and 0 not in t.dims]
    tensor = pick(rng, stored)
    try:
        array = numpy_helper.to_array(tensor)
    except ValueError as error:  # another change was before
        raise Unfit from error
    axis, kind = rng.randrange(array.ndim), rng.choice((np.int8, np.uint8))
    whole = rng.random() < 0.4
    name, other = tensor.name, rng.randrange(array.ndim)
    peak = np.abs(array).max() if whole else np.abs(array).max(tuple(a for a in range(array.ndim) if a != axis))
    scale = np.asarray(np.nan_to_num(peak) / 127 + 1e-6, np.float32)
    shape = [-1 if a == axis and not whole else 1 for a in range(array.ndim)]
    zero = 128 if kind == np.uint8 else 0
    with np.errstate(all="ignore"):
        codes = np.clip(np.rint(array / scale.reshape(shape)) + zero, *((0, 255) if zero else (-127, 127))).astype(kind)
    model.graph.initializer.remove(tensor)
    parts = [
        numpy_helper.from_array(codes, f"{name}.codes"),
        numpy_helper.from_array(scale, f"{name}.scale"),
        numpy_helper.from_array(np.full(scale.shape, zero, kind), f"{name}.zero"),
    ]
    model.graph.initializer.extend(parts[: rng.choice((3, 3, 2))])
    read = [p.name for p in parts][: rng.choice((3, 3, 2))]
    node = helper.make_node("DequantizeLinear", read, [name], axis=axis if rng.random() < 0.8 else other)
    model.graph.node.insert(0, node)


def pair(model: ModelProto, rng: random.Random) -> None:
    """Put a pair of QuantizeLinear and DequantizeLinear between a node and what it reads."""
    node = pick(rng, [n for n in model.graph.node if n.input and n.input[0]])
    x, tag = node.input[0], f"pair{len(model.graph.node)}"
    place = list(model.graph.node).index(node)
    kind = rng.choice((np.int8, np.uint8, np.int16))
    n = rng.choice((None, None, 2, 6, 8))
    scale = np.full(() if n is None else (n,), rng.choice((0.1, 0.1, 0.0, np.nan)), np.float32)
    for part, values in (("scale", scale), ("zero", np.zeros(scale.shape, kind))):
        model.graph.initializer.append(numpy_helper.from_array(values, f"{tag}.{part}"))
    given, axis = [f"{tag}.scale", f"{tag}.zero"], rng.choice((0, 1, -1))
    node.input[0] = f"{tag}.back"
    model.graph.node.insert(
        place, helper.make_node("DequantizeLinear", [f"{tag}.codes", *given], [f"{tag}.back"], axis=axis)
    )
    model.graph.node.insert(place, helper.make_node("QuantizeLinear", [x, *given], [f"{tag}.codes"], axis=axis))


def parameters(model: ModelProto, rng: random.Random) -> None:
    """Change a scale or a zero point: its value, its length, its type; or the axis."""
    node = pick(rng, [n for n in model.graph.node if n.op_type in QUANTISERS])
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    if rng.random() < 0.2:
        node.attribute.append(helper.make_attribute("axis", rng.choice((0, 1, -1, 7))))
        return
    tensor = pick(rng, [stored[name] for name in node.input[1:] if name in stored])
    try:
        array = numpy_helper.to_array(tensor).copy()
    except ValueError as error:
        raise Unfit from error
    way = rng.randrange(4)
    if way == 0 and array.dtype.kind == "f":
        array = np.full(array.shape, rng.choice(FLOATS), array.dtype)
    elif way == 1:
        array = np.resize(array, rng.choice(((), (1,), (2,), (array.size + 1,), (0,))))
    elif way == 2:
        with np.errstate(all="ignore"):
            array = array.astype(rng.choice((np.float32, np.int8, np.uint8, np.int32, np.float16)))
    else:
        array = array.reshape((*array.shape, 1))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


CHANGES = {"quantised: weight": weight, "quantised: pair": pair, "quantised: parameters": parameters}
