"""Changes of what a graph declares: inputs, outputs, shapes, types, operator sets."""

from __future__ import annotations

import random

from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from .common import WORDS, Unfit, copy, graph_of, integer, names, pick

SIZES = (0, 1, 2, 3, 5, 7, 16, -1, 1000, 2**20, 2**31, 2**40, 2**62)


def _values(model: ModelProto, rng: random.Random):
    graph = graph_of(model, rng)
    graph = graph if hasattr(graph, "initializer") else model.graph
    return rng.choice((graph.input, graph.output, graph.value_info))


def _value(model: ModelProto, rng: random.Random) -> ValueInfoProto:
    return pick(rng, _values(model, rng))


def drop(model: ModelProto, rng: random.Random) -> None:
    """Take an input or output away."""
    values = _values(model, rng)
    if not values:
        raise Unfit
    del values[rng.randrange(len(values))]


def repeat(model: ModelProto, rng: random.Random) -> None:
    """Declare an input or output twice."""
    values = _values(model, rng)
    values.append(copy(pick(rng, values)))


def rename(model: ModelProto, rng: random.Random) -> None:
    """Declare an input or output under another name: of another tensor, none, or a strange one."""
    _value(model, rng).name = rng.choice((*names(model.graph), *WORDS))


def more(model: ModelProto, rng: random.Random) -> None:
    """Declare another tensor as an output, or as an input although it is computed."""
    values = rng.choice((model.graph.output, model.graph.output, model.graph.input))
    shape = rng.choice((None, [1], ["n", 3]))
    values.append(helper.make_tensor_value_info(rng.choice(names(model.graph)), rng.choice((1, 1, 7)), shape))


def dims(model: ModelProto, rng: random.Random) -> None:
    """Declare another size, a name in its place, or nothing."""
    shape = _value(model, rng).type.tensor_type.shape
    dim = pick(rng, shape.dim)
    way = rng.randrange(4)
    if way == 0:
        dim.dim_value = rng.choice(SIZES)
    elif way == 1:
        dim.dim_value = integer(rng, dim.dim_value)
    elif way == 2:
        dim.dim_param = rng.choice(("n", "batch", "", "n + 1"))
    else:
        dim.Clear()


def rank(model: ModelProto, rng: random.Random) -> None:
    """Declare another number of axes, or no shape."""
    kind = _value(model, rng).type.tensor_type
    way = rng.randrange(3)
    if way == 0:
        kind.ClearField("shape")
    elif way == 1:
        kind.shape.dim.add().dim_value = rng.choice(SIZES)
    else:
        if not kind.shape.dim:
            raise Unfit
        del kind.shape.dim[rng.randrange(len(kind.shape.dim))]


def kind(model: ModelProto, rng: random.Random) -> None:
    """Declare another type of numbers, another kind of value, or none."""
    value = _value(model, rng)
    way = rng.randrange(5)
    if way < 2:
        value.type.tensor_type.elem_type = rng.choice((*range(26), 99))
    elif way == 2:
        value.type.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT
    elif way == 3:
        value.type.optional_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT
    else:
        value.ClearField("type")


def opset(model: ModelProto, rng: random.Random) -> None:
    """Import another version of an operator set, none, or one twice."""
    opsets = model.opset_import
    way = rng.randrange(6)
    if way == 0:
        opsets.append(
            helper.make_opsetid(rng.choice(("", "ai.onnx", "com.microsoft", "custom")), rng.choice((1, 13, 17)))
        )
    elif way == 1 and opsets:
        del opsets[rng.randrange(len(opsets))]
    else:
        pick(rng, opsets).version = rng.choice((*range(1, 27), 0, -1, 999, 2**40))


def opset_domain(model: ModelProto, rng: random.Random) -> None:
    """Import an operator set under another name."""
    pick(rng, model.opset_import).domain = rng.choice(("ai.onnx", "com.microsoft", "custom", "ai.onnx.ml", ""))


def versions(model: ModelProto, rng: random.Random) -> None:
    """Change the version of the format, or fields beside the graph."""
    way = rng.randrange(4)
    if way < 2:
        model.ir_version = rng.choice((*range(15), 999, -1))
    elif way == 2:
        model.metadata_props.add(key=rng.choice(WORDS), value=rng.choice(WORDS))
    else:
        model.graph.name = rng.choice(WORDS)


def quantisation(model: ModelProto, rng: random.Random) -> None:
    """Annotate a tensor with scales that are nowhere."""
    note = model.graph.quantization_annotation.add(tensor_name=rng.choice(names(model.graph)))
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=rng.choice(names(model.graph)))


def computed_output(model: ModelProto, rng: random.Random) -> None:
    """Make an input or an initializer an output as it is."""
    options = [v.name for v in model.graph.input] + [t.name for t in model.graph.initializer]
    value = helper.make_tensor_value_info(pick(rng, options), TensorProto.FLOAT, None)
    if rng.random() < 0.3:
        del model.graph.output[:]
    model.graph.output.append(value)


CHANGES = {
    "interface: drop": drop, "interface: repeat": repeat, "interface: rename": rename, "interface: more": more,
    "interface: dims": dims, "interface: rank": rank, "interface: type": kind, "interface: opset": opset,
    "interface: domain": opset_domain, "interface: versions": versions, "interface: annotation": quantisation,
    "interface: input as output": computed_output,
}  # fmt: skip
