"""Changes of initializers and other constants: names, owners, shapes, types, bytes, values."""

from __future__ import annotations

import random

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from .common import FLOATS, Unfit, copy, graph_of, integer, names, pick, tensor_of

HUGE = (2**20, 2**31, 2**40, 2**62)


def drop(model: ModelProto, rng: random.Random) -> None:
    """Take an initializer away."""
    stored = _stored(model, rng)
    if not stored:
        raise Unfit
    del stored[rng.randrange(len(stored))]


def _stored(model: ModelProto, rng: random.Random):
    graph = graph_of(model, rng)
    return graph.initializer if hasattr(graph, "initializer") else model.graph.initializer


def _pair(model: ModelProto, rng: random.Random) -> tuple[TensorProto, TensorProto]:
    stored = _stored(model, rng)
    if len(stored) < 2:
        raise Unfit
    a, b = rng.sample(list(stored), 2)
    return a, b


def swap_names(model: ModelProto, rng: random.Random) -> None:
    """Let two initializers swap owners."""
    a, b = _pair(model, rng)
    a.name, b.name = b.name, a.name


def swap_alike(model: ModelProto, rng: random.Random) -> None:
    """Let two initializers of one shape swap owners, or give both owners one of them."""
    stored = model.graph.initializer
    pairs = [(a, b) for i, a in enumerate(stored) for b in stored[:i] if (a.dims, a.data_type) == (b.dims, b.data_type)]
    a, b = pick(rng, pairs[:200])
    if rng.random() < 0.5:
        a.name, b.name = b.name, a.name
        return
    for node in model.graph.node:
        node.input[:] = [a.name if name == b.name else name for name in node.input]


def same_name(model: ModelProto, rng: random.Random) -> None:
    """Give two initializers one name."""
    a, b = _pair(model, rng)
    a.name = b.name


def rename(model: ModelProto, rng: random.Random) -> None:
    """Give an initializer no name, or that of a tensor which a node computes."""
    tensor_of(model, rng).name = rng.choice(("", "nowhere", *names(model.graph)))


def repeat(model: ModelProto, rng: random.Random) -> None:
    """List an initializer twice."""
    stored = _stored(model, rng)
    stored.append(copy(pick(rng, stored)))


def dims(model: ModelProto, rng: random.Random) -> None:
    """Declare other dims for the same bytes."""
    tensor = tensor_of(model, rng)
    sizes = list(tensor.dims)
    way = rng.randrange(6)
    if way == 0 and sizes:
        place = rng.randrange(len(sizes))
        sizes[place] = integer(rng, sizes[place])
    elif way == 1:
        rng.shuffle(sizes)
    elif way == 2:
        sizes.insert(rng.randint(0, len(sizes)), rng.choice((0, 1, 1, 2, -1)))
    elif way == 3 and sizes:
        del sizes[rng.randrange(len(sizes))]
    elif way == 4:
        sizes = [rng.choice(HUGE) for _ in sizes] or [rng.choice(HUGE)]
    else:
        sizes = [int(np.prod(sizes, dtype=np.int64))]
    tensor.dims[:] = sizes


def reshape(model: ModelProto, rng: random.Random) -> None:
    """Make an initializer larger or smaller along an axis, consistently within itself."""
    tensor = tensor_of(model, rng)
    array = _array(tensor)
    if not array.ndim:
        raise Unfit
    axis = rng.randrange(array.ndim)
    size = rng.choice((0, 1, array.shape[axis] + 1, max(array.shape[axis] - 1, 0), 2 * array.shape[axis]))
    if not array.shape[axis]:
        raise Unfit
    _set(tensor, np.take(array, np.arange(size) % array.shape[axis], axis))


def transpose(model: ModelProto, rng: random.Random) -> None:
    """Store an initializer with its axes in another order."""
    tensor = tensor_of(model, rng)
    array = _array(tensor)
    order = list(range(array.ndim))
    rng.shuffle(order)
    _set(tensor, array.transpose(order))


def _array(tensor: TensorProto) -> np.ndarray:
    try:
        return numpy_helper.to_array(tensor)
    except Exception as error:  # another change was before
        raise Unfit from error


def _set(tensor: TensorProto, array: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), tensor.name))


def cast(model: ModelProto, rng: random.Random) -> None:
    """Store an initializer's values in another type."""
    tensor = tensor_of(model, rng)
    array = _array(tensor)
    if array.dtype.kind not in "fiub":
        raise Unfit
    kinds = (np.float32, np.float16, np.float64, np.int64, np.int32, np.int8, np.uint8, np.bool_)
    with np.errstate(all="ignore"):
        _set(tensor, array.astype(rng.choice(kinds)))


def data_type(model: ModelProto, rng: random.Random) -> None:
    """Declare another type for the same bytes, known or not."""
    tensor_of(model, rng).data_type = rng.choice((*range(27), 99, -1))


def raw_length(model: ModelProto, rng: random.Random) -> None:
    """Cut the bytes short, add some, or leave none."""
    tensor = tensor_of(model, rng)
    data = tensor.raw_data
    tensor.raw_data = rng.choice((data[:-1], data + b"\0", data[: len(data) // 2], b"", 2 * data))


def raw_bytes(model: ModelProto, rng: random.Random) -> None:
    """Flip bits of the values."""
    tensor = pick(rng, [t for t in model.graph.initializer if t.raw_data])
    data = bytearray(tensor.raw_data)
    for _ in range(rng.choice((1, 4, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    tensor.raw_data = bytes(data)


def fields(model: ModelProto, rng: random.Random) -> None:
    """Keep values in a field of another type, in two fields, or in segments."""
    tensor = tensor_of(model, rng)
    way = rng.randrange(5)
    if way == 0:
        tensor.float_data.extend([1.0, 2.0])
    elif way == 1:
        tensor.int64_data.extend([1, 2, 3])
    elif way == 2:
        tensor.string_data.append(b"text")
    elif way == 3:
        tensor.segment.begin, tensor.segment.end = 0, integer(rng)
    else:
        tensor.data_location = TensorProto.EXTERNAL


def floats(model: ModelProto, rng: random.Random) -> None:
    """Make some or all numbers of a floating-point initializer zero, denormal, huge, infinite or not a number."""
    tensor = pick(rng, [t for t in model.graph.initializer if t.data_type in (1, 10, 11)])
    array = _array(tensor).copy()
    if not array.size:
        raise Unfit
    flat, value = array.reshape(-1), rng.choice(FLOATS)
    with np.errstate(all="ignore"):
        if rng.random() < 0.5:
            flat[:] = value
        else:
            flat[rng.randrange(len(flat)) :: rng.choice((1, 3, len(flat)))] = value
    _set(tensor, array)


def integers(model: ModelProto, rng: random.Random) -> None:
    """Change a number of an integer constant: shapes, axes, bounds, indices."""
    tensor = pick(rng, [t for t in _constants(model) if t.data_type in (6, 7) and t.dims != [0]])
    array = _array(tensor).copy()
    if not array.size:
        raise Unfit
    flat = array.reshape(-1)
    place = rng.randrange(len(flat))
    limits = np.iinfo(array.dtype)
    flat[place] = min(max(integer(rng, int(flat[place])), limits.min), limits.max)
    _set(tensor, array)


def _constants(model: ModelProto) -> list[TensorProto]:
    return [*model.graph.initializer, *(a.t for n in model.graph.node for a in n.attribute if a.HasField("t"))]


def becomes_input(model: ModelProto, rng: random.Random) -> None:
    """List an initializer among the inputs, as IR version 3 wants it, or turn it into an input altogether."""
    tensor = pick(rng, model.graph.initializer)
    kind = rng.choice((tensor.data_type, tensor.data_type, TensorProto.INT64))
    model.graph.input.append(helper.make_tensor_value_info(tensor.name, kind, list(tensor.dims)))
    if rng.random() < 0.5:
        model.graph.initializer.remove(tensor)
    elif rng.random() < 0.5:
        model.ir_version = 3


def becomes_node(model: ModelProto, rng: random.Random) -> None:
    """Move an initializer into a Constant node, its value perhaps in an attribute of another name."""
    tensor = pick(rng, model.graph.initializer)
    key = rng.choice(
        ("value", "value", "value", "value_floats", "value_int", "value_string", "sparse_value", "nothing")
    )
    value = {"value_floats": [1.0, 2.0], "value_int": 3, "value_string": "text"}.get(key, tensor)
    node = helper.make_node("Constant", [], [tensor.name], **{key: value})
    model.graph.node.insert(rng.choice((0, 0, len(model.graph.node))), node)
    if rng.random() < 0.8:
        model.graph.initializer.remove(tensor)


def computed(model: ModelProto, rng: random.Random) -> None:
    """Compute an initializer from itself: through Identity, Cast, a product with one, or twice a transposition."""
    tensor = pick(rng, model.graph.initializer)
    name, inner = tensor.name, f"{tensor.name}.stored"
    way = rng.choice(("Identity", "Cast", "Mul", "Neg", "Transpose", "ConstantOfShape", "Reshape"))
    steps = {
        "Identity": [("Identity", [inner], name)],
        "Cast": [("Cast", [inner], name)],
        "Mul": [("Mul", [inner, inner], name)],
        "Neg": [("Neg", [inner], name)],
        "Transpose": [("Transpose", [inner], f"{name}.t"), ("Transpose", [f"{name}.t"], name)],
        "ConstantOfShape": [("Shape", [inner], f"{name}.s"), ("ConstantOfShape", [f"{name}.s"], name)],
        "Reshape": [("Shape", [inner], f"{name}.s"), ("Reshape", [inner, f"{name}.s"], name)],
    }[way]
    nodes = [helper.make_node(op, read, [made]) for op, read, made in steps]
    if way == "Cast":
        nodes[0].attribute.append(helper.make_attribute("to", tensor.data_type))
    tensor.name = inner
    for node in reversed(nodes):
        model.graph.node.insert(0, node)


CHANGES = {
    "initializer: drop": drop, "initializer: swap owners": swap_names, "initializer: swap owners of one shape": swap_alike,
    "initializer: same name": same_name, "initializer: rename": rename, "initializer: repeat": repeat,
    "initializer: dims": dims, "initializer: size": reshape, "initializer: transpose": transpose, "initializer: cast": cast,
    "initializer: data type": data_type, "initializer: length": raw_length, "initializer: bits": raw_bytes,
    "initializer: fields": fields, "initializer: floats": floats, "initializer: integers": integers,
    "initializer: as input": becomes_input, "initializer: as node": becomes_node, "initializer: computed": computed,
}  # fmt: skip
