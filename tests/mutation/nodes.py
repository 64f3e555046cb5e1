"""Changes of nodes, their inputs and outputs, operators and attributes."""

from __future__ import annotations

import random

import onnx
from onnx import AttributeProto, ModelProto, TensorProto, helper

import onnxprune.ops

from .common import FLOATS, WORDS, Unfit, copy, graph_of, integer, names, node_of, pick, replace

OPERATORS = sorted(
    {op for _, op in onnxprune.ops.supported()} | {schema.name for schema in onnx.defs.get_all_schemas()}
)
DOMAINS = ("", "ai.onnx", "com.microsoft", "ai.onnx.ml", "ai.onnx.training", "custom")
STRAY = {
    "axis": (0, 1, -1, 5), "axes": ([0], [1, 2], [-1, 9], []), "perm": ([1, 0], [0, 1, 2, 3], [0, 0], [-1]),
    "group": (0, 1, 2, 3, -1), "kernel_shape": ([1, 1], [3], [0, 0], [-1, 3]), "pads": ([1, 1], [0, 0, 0, 0], [-1] * 4),
    "strides": ([2, 2], [0, 0], [1]), "dilations": ([2, 2], [0]), "transA": (0, 1, 2), "transB": (0, 1, -1),
    "alpha": (0.0, 2.0, float("nan")), "keepdims": (0, 1, 2), "to": (1, 7, 10, 0, 99), "blocksize": (0, 1, 2, 3),
    "num_outputs": (0, 1, 3), "split": ([1, 1], [0], [-1]), "equation": ("ab,bc->ac", "a->", "", "ii", "...i,ij"),
    "num_heads": (0, 1, 3), "auto_pad": ("SAME_UPPER", "NOTSET", "nonsense"), "mode": ("", "CRD", "linear", "edge"),
    "training_mode": (0, 1), "hidden_size": (0, 1, 7), "direction": ("reverse", "bidirectional", "up"),
    "epsilon": (0.0, float("nan")), "allowzero": (0, 1), "block_size": (0, 1, 16), "output_dtype": (0, 2, 10),
}  # fmt: skip


def drop(model: ModelProto, rng: random.Random) -> None:
    """Take a node out; its readers read nothing."""
    graph = graph_of(model, rng)
    if not graph.node:
        raise Unfit
    del graph.node[rng.randrange(len(graph.node))]


def bypass(model: ModelProto, rng: random.Random) -> None:
    """Take a node out and let its readers read what it read."""
    graph = graph_of(model, rng)
    node = pick(rng, [n for n in graph.node if n.input and n.output])
    old, new = node.output[0], rng.choice(node.input)
    for other in graph.node:
        for index, name in enumerate(other.input):
            if name == old:
                other.input[index] = new
    for value in graph.output:
        if not isinstance(value, str) and value.name == old:
            value.name = new
    graph.node.remove(node)


def duplicate(model: ModelProto, rng: random.Random) -> None:
    """Compute the same names twice."""
    graph = graph_of(model, rng)
    graph.node.insert(rng.randint(0, len(graph.node)), copy(pick(rng, graph.node)))


def fork(model: ModelProto, rng: random.Random) -> None:
    """Repeat a node under other names, and let some of its readers read those."""
    graph = graph_of(model, rng)
    place = rng.randrange(len(graph.node)) if graph.node else 0
    twin = copy(pick(rng, graph.node[place : place + 1]))
    new = {name: f"{name}.twin" for name in twin.output if name}
    replace_names(twin.output, new)
    for other in graph.node[place + 1 :]:
        if rng.random() < 0.5:
            replace_names(other.input, new)
    graph.node.insert(place + 1, twin)


def replace_names(names_: list[str], new: dict[str, str]) -> None:
    """Rename in place."""
    names_[:] = [new.get(name, name) for name in names_]


def shuffle(model: ModelProto, rng: random.Random) -> None:
    """Put the nodes in another order: any, or the reverse, or with two swapped."""
    graph = graph_of(model, rng)
    order = list(graph.node)
    if len(order) < 2:
        raise Unfit
    way = rng.randrange(3)
    if way == 0:
        rng.shuffle(order)
    elif way == 1:
        order.reverse()
    else:
        a, b = rng.sample(range(len(order)), 2)
        order[a], order[b] = order[b], order[a]
    replace(graph.node, order)


def rewire(model: ModelProto, rng: random.Random) -> None:
    """Let a node read another tensor, whatever its shape, be it computed later, by itself or nowhere."""
    graph = graph_of(model, rng)
    node = pick(rng, [n for n in graph.node if n.input])
    node.input[rng.randrange(len(node.input))] = rng.choice(names(graph))


def rewire_alike(model: ModelProto, rng: random.Random) -> None:
    """Let a node read another tensor of the same shape and type, which makes a valid graph nearly always."""
    try:
        known = onnx.shape_inference.infer_shapes(model).graph
    except Exception as error:  # another change was before
        raise Unfit from error
    shapes = {v.name: v.type.SerializeToString() for v in (*known.value_info, *known.input, *known.output)}
    earlier: list[str] = [value.name for value in model.graph.input]
    options = []
    for number, node in enumerate(model.graph.node):
        for index, name in enumerate(node.input):
            options += [
                (number, index, e)
                for e in earlier[-60:]
                if e != name and name in shapes and shapes.get(e) == shapes[name]
            ]
        earlier += node.output
    number, index, name = pick(rng, options)
    model.graph.node[number].input[index] = name


def swap_inputs(model: ModelProto, rng: random.Random) -> None:
    """Give a node its inputs in another order."""
    node = pick(rng, [n for n in graph_of(model, rng).node if len(n.input) > 1])
    order = list(node.input)
    rng.shuffle(order)
    node.input[:] = order


def swap_outputs(model: ModelProto, rng: random.Random) -> None:
    """Let two nodes compute each other's names."""
    graph = graph_of(model, rng)
    if len(graph.node) < 2:
        raise Unfit
    a, b = rng.sample(list(graph.node), 2)
    first, second = list(a.output), list(b.output)
    a.output[:], b.output[:] = second, first


def count_inputs(model: ModelProto, rng: random.Random) -> None:
    """Give a node more inputs or outputs, fewer, or none."""
    graph = graph_of(model, rng)
    node = pick(rng, graph.node)
    which = rng.choice((node.input, node.output))
    way = rng.randrange(4)
    if way == 0 and which:
        del which[rng.randrange(len(which))]
    elif way == 1:
        del which[:]
    elif way == 2:
        which.append(rng.choice(names(graph)))
    else:
        which.extend(["", rng.choice(names(graph))])


def empty_name(model: ModelProto, rng: random.Random) -> None:
    """Leave out an input or output that may not be optional."""
    node = node_of(model, rng)
    which = pick(rng, [names_ for names_ in (node.input, node.output) if names_])
    which[rng.randrange(len(which))] = ""


def operator(model: ModelProto, rng: random.Random) -> None:
    """Make a node another operator, or none that exists."""
    node_of(model, rng).op_type = rng.choice((rng.choice(OPERATORS), rng.choice(OPERATORS), "Nonsense", ""))


def domain(model: ModelProto, rng: random.Random) -> None:
    """Move a node to another domain, which the model may not import."""
    node_of(model, rng).domain = rng.choice(DOMAINS)


def node_name(model: ModelProto, rng: random.Random) -> None:
    """Give two nodes one name, or a node a strange one."""
    graph = graph_of(model, rng)
    pick(rng, graph.node).name = rng.choice((*WORDS, rng.choice(graph.node).name))


def drop_attribute(model: ModelProto, rng: random.Random) -> None:
    """Leave an attribute out."""
    node = pick(rng, [n for n in graph_of(model, rng).node if n.attribute])
    del node.attribute[rng.randrange(len(node.attribute))]


def attribute_value(model: ModelProto, rng: random.Random) -> None:
    """Change an attribute's value and keep its type."""
    attribute = _attribute(model, rng)
    kinds = AttributeProto
    if attribute.type == kinds.INT:
        attribute.i = integer(rng, attribute.i)
    elif attribute.type == kinds.FLOAT:
        attribute.f = rng.choice(FLOATS)
    elif attribute.type == kinds.STRING:
        attribute.s = rng.choice((*(word.encode() for word in WORDS), b"\xff\xfe"))
    elif attribute.type == kinds.INTS:
        numbers = list(attribute.ints)
        way = rng.randrange(3)
        if way == 0 and numbers:
            place = rng.randrange(len(numbers))
            numbers[place] = integer(rng, numbers[place])
        elif way == 1:
            numbers = numbers[: rng.randrange(len(numbers) + 1)]
        else:
            numbers.append(integer(rng))
        attribute.ints[:] = numbers
    elif attribute.type == kinds.FLOATS:
        attribute.floats[:] = [*list(attribute.floats)[: rng.randrange(3)], rng.choice(FLOATS)]
    else:
        raise Unfit


def _attribute(model: ModelProto, rng: random.Random) -> AttributeProto:
    return pick(rng, [a for n in graph_of(model, rng).node for a in n.attribute])


def attribute_type(model: ModelProto, rng: random.Random) -> None:
    """Give an attribute a value of another type, or a type that its value does not have."""
    attribute = _attribute(model, rng)
    if rng.random() < 0.5:
        attribute.type = rng.randrange(15)
        return
    value = rng.choice(
        (3, [1, 2], 0.5, [0.5], "text", ["a", "b"], helper.make_tensor("t", TensorProto.FLOAT, [2], [1, 2]))
    )
    attribute.CopyFrom(helper.make_attribute(attribute.name, value))


def stray_attribute(model: ModelProto, rng: random.Random) -> None:
    """Add an attribute that other operators have, or one twice."""
    node = node_of(model, rng)
    name = rng.choice(list(STRAY))
    value = rng.choice(STRAY[name])
    node.attribute.append(helper.make_attribute(name, value, attr_type=AttributeProto.INTS if value == [] else None))


def attribute_reference(model: ModelProto, rng: random.Random) -> None:
    """Let an attribute refer to one of a function, or have another's name, or none."""
    attribute = _attribute(model, rng)
    if rng.random() < 0.5:
        attribute.ref_attr_name = "outer"
    else:
        attribute.name = rng.choice(("", "axis", "value", rng.choice(list(STRAY))))


CHANGES = {
    "node: drop": drop, "node: bypass": bypass, "node: duplicate": duplicate, "node: fork": fork, "node: reorder": shuffle,
    "node: rewire": rewire, "node: rewire to the same shape": rewire_alike, "node: swap inputs": swap_inputs,
    "node: swap outputs": swap_outputs, "node: count of inputs": count_inputs, "node: empty name": empty_name,
    "node: operator": operator, "node: domain": domain, "node: name": node_name, "attribute: drop": drop_attribute,
    "attribute: value": attribute_value, "attribute: type": attribute_type, "attribute: stray": stray_attribute,
    "attribute: reference": attribute_reference,
}  # fmt: skip
