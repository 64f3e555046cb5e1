"""Models that were made to hurt: sizes that no machine has, graphs without end, names that clash."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

OPSETS = [helper.make_opsetid("", 17)]
GIANT = 1 << 40


def build(nodes: list[onnx.NodeProto], tensors: dict[str, np.ndarray] | None = None, **more: object) -> ModelProto:
    """A graph from ``x`` (1, 2, 6, 6) through a convolution ``c`` of 4 channels and ``nodes`` to ``y`` of any shape."""
    weight = np.random.default_rng(0).standard_normal((4, 2, 1, 1), np.float32)
    held = {"w": weight, **(tensors or {})}
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["c"], name="first"), *nodes],
        "hostile",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, more.pop("shape", [1, 2, 6, 6]))],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()],
    )
    graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    return helper.make_model(graph, opset_imports=[*OPSETS, *more.pop("opsets", [])], ir_version=8, **more)


def node(op: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    """A node; ``inputs`` are words."""
    domain = attributes.pop("domain", "")
    return helper.make_node(op, inputs.split(), [output], name=f"n_{output}", domain=domain, **attributes)


def integers(*values: int) -> np.ndarray:
    """An int64 vector."""
    return np.array(values, np.int64)


def claims(*dims: int) -> ModelProto:
    """An initializer whose shape claims more than the file holds."""
    model = build([node("Add", "c giant", "y")])
    model.graph.initializer.add(name="giant", data_type=TensorProto.FLOAT, dims=dims)
    return model


def claims_in_constant() -> ModelProto:
    """A Constant node whose shape claims more than the file holds."""
    held = TensorProto(data_type=TensorProto.FLOAT, dims=[GIANT, GIANT])
    return build([node("Constant", "", "giant", value=held), node("Add", "c giant", "y")])


def claims_in_sparse() -> ModelProto:
    """A sparse initializer of an exabyte when it is dense."""
    model = build([node("Add", "c giant", "y")])
    values = numpy_helper.from_array(np.ones(1, np.float32), "giant")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "giant_i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [GIANT, GIANT]))
    return model


def doubled(times: int = 40) -> ModelProto:
    """Channels that a short graph doubles over and over."""
    names = ["c", *(f"d{k}" for k in range(times))]
    nodes = [node("Concat", f"{a} {a}", b, axis=1) for a, b in pairwise(names)]
    return build([*nodes, node("Relu", names[-1], "y")])


def tiled_labels() -> ModelProto:
    """Channels that Tile repeats a trillion times."""
    return build([node("Tile", "c times", "y")], {"times": integers(1, GIANT, 1, 1)})


def expanded_constant(op: str = "Expand") -> ModelProto:
    """A vector of weights that one node blows up before another mixes it: a weight that pruning would fold."""
    tensors = {"v": np.ones((4, 1), np.float32), "to": integers(4, GIANT)}
    if op == "Tile":
        tensors["to"] = integers(1, GIANT)
    return build(
        [
            node(op, "v to", "wide"),
            node("Softmax", "wide", "s", axis=0),
            node("ReduceMean", "s", "m", axes=[1], keepdims=1),
            node("Reshape", "m four", "r"),
            node("Mul", "c r", "y"),
        ],
        {**tensors, "four": integers(1, 4, 1, 1)},
    )


def filled() -> ModelProto:
    """A ConstantOfShape of a terabyte."""
    nodes = [
        node("ConstantOfShape", "to", "wide"),
        node("ReduceMean", "wide", "m", keepdims=0),
        node("Add", "c m", "y"),
    ]
    return build(nodes, {"to": integers(GIANT)})


def filled_with_integers() -> ModelProto:
    """A ConstantOfShape of integers, which shape arithmetic would evaluate."""
    fill = numpy_helper.from_array(integers(1))
    return build(
        [
            node("ConstantOfShape", "to", "wide", value=fill),
            node("ReduceSum", "wide", "m", keepdims=0),
            node("Cast", "m", "f", to=TensorProto.FLOAT),
            node("Add", "c f", "y"),
        ],
        {"to": integers(GIANT)},
    )


def ranged() -> ModelProto:
    """A Range of a trillion numbers between scalars."""
    return build(
        [
            node("Range", "zero many one", "r"),
            node("ReduceSum", "r", "m", keepdims=0),
            node("Cast", "m", "f", to=TensorProto.FLOAT),
            node("Add", "c f", "y"),
        ],
        {"zero": np.array(0), "one": np.array(1), "many": np.array(GIANT)},
    )


def expanded_integers() -> ModelProto:
    """Shape arithmetic that passes through a giant whose size only evaluation tells."""
    return build(
        [
            node("Shape", "c", "s"),
            node("Expand", "s to", "wide"),
            node("Gather", "wide first", "row", axis=0),
            node("Reshape", "c row", "y"),
        ],
        {"to": integers(GIANT, 4), "first": np.array(0)},
    )


def padded() -> ModelProto:
    """A Pad of a trillion channels."""
    return build([node("Pad", "c pads", "y")], {"pads": integers(0, GIANT, 0, 0, 0, 0, 0, 0)})


def resized() -> ModelProto:
    """A Resize to a trillion columns."""
    return build([node("Resize", "c  sizes".replace("  ", " none none "), "y", mode="nearest")], {
        "sizes": integers(1, 4, 6, GIANT), "none": np.zeros(0, np.float32),
    })  # fmt: skip


def flattened() -> ModelProto:
    """A Flatten of channels times a trillion pixels."""
    return build([node("Flatten", "c", "y", axis=1)], shape=[1, 2, 1 << 20, 1 << 20])


def wide_input() -> ModelProto:
    """An input whose declared shape is an exabyte."""
    return build([node("Relu", "c", "y")], shape=[1, 2, 1 << 30, 1 << 30])


def long_vector(length: int) -> ModelProto:
    """An input of many integers, as a shape might be."""
    model = build([node("Cast", "v", "i", to=TensorProto.INT64), node("Expand", "c i", "y")])
    model.graph.input.append(helper.make_tensor_value_info("v", TensorProto.INT64, [length]))
    return model


def looped(trips: int = 1 << 60) -> ModelProto:
    """A Loop of 2**60 trips with a trivial body."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["on_out"]), helper.make_node("Add", ["v", "v"], ["v_out"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_out", TensorProto.FLOAT, None),
        ],
    )
    nodes = [node("Loop", "trips yes c", "y", body=body)]
    return build(nodes, {"trips": np.array(trips), "yes": np.array(True)})


def chain(n: int = 1_000_000) -> ModelProto:
    """So many nodes in a row."""
    names = ["c", *(f"t{k}" for k in range(n)), "y"]
    return build([helper.make_node("Relu", [a], [b]) for a, b in pairwise(names)])


def nested(depth: int) -> bytes:
    """Branches within branches, as a file has them: deeper than protobuf's own limit, too."""

    def field(number: int, content: bytes | str) -> bytes:
        content = content.encode() if isinstance(content, str) else content
        size, length = b"", len(content)
        while length > 127:
            size, length = size + bytes([length & 127 | 128]), length >> 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + content

    def branch(inner: bytes, output: str) -> bytes:
        return field(1, inner) + field(2, "b") + field(12, field(1, output))

    inner = field(1, "c") + field(2, f"o{depth}") + field(4, "Relu")
    for level in reversed(range(depth)):
        other = field(1, "c") + field(2, f"p{level}") + field(4, "Neg")
        both = [
            field(5, field(1, name) + field(6, content) + b"\xa0\x01\x05")
            for name, content in (
                ("then_branch", branch(inner, f"o{level + 1}")),
                ("else_branch", branch(other, f"p{level}")),
            )
        ]
        inner = field(1, "yes") + field(2, f"o{level}") + field(4, "If") + b"".join(both)
    last = field(1, "o0") + field(2, "y") + field(4, "Relu")
    model = build([], {"yes": np.array(True)})
    return model.SerializeToString() + field(7, field(1, inner) + field(1, last))


def cyclic() -> ModelProto:
    """Two nodes that read each other."""
    return build([node("Add", "c b", "a"), node("Relu", "a", "b"), node("Relu", "b", "y")])


def itself() -> ModelProto:
    """A node that reads its own output."""
    return build([node("Add", "c a", "a"), node("Relu", "a", "y")])


def twice() -> ModelProto:
    """Two nodes that write one tensor."""
    return build([node("Relu", "c", "a"), node("Neg", "c", "a"), node("Relu", "a", "y")])


def named_twice() -> ModelProto:
    """Two initializers of one name and different shapes."""
    model = build([node("Mul", "c s", "y")], {"s": np.ones((1, 4, 1, 1), np.float32)})
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "s"))
    return model


def over_an_initializer() -> ModelProto:
    """A node that writes the tensor that an initializer holds."""
    return build([node("Relu", "c", "s"), node("Mul", "c s", "y")], {"s": np.ones((1, 4, 1, 1), np.float32)})


def function(name: str, *calls: str) -> onnx.FunctionProto:
    """A local function that calls others one after the other."""
    names = ["v", *(f"v{k}" for k in range(len(calls) - 1)), "r"]
    nodes = [
        helper.make_node(call, [a], [b], domain="" if call == "Relu" else "local")
        for call, a, b in zip(calls, names, names[1:], strict=False)
    ]
    opsets = [*OPSETS, helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["v"], ["r"], nodes, opsets)


def calling(*functions: onnx.FunctionProto) -> ModelProto:
    """A model that calls the first of some local functions."""
    call = node(functions[0].name, "c", "y", domain="local")
    return build([call], opsets=[helper.make_opsetid("local", 1)], functions=functions)


def laughs(levels: int = 12, width: int = 10) -> ModelProto:
    """Local functions that call the next one tenfold: 10**12 nodes when they are inlined."""
    inner = [function(f"F{k}", *[f"F{k + 1}"] * width) for k in range(levels)]
    return calling(*inner, function(f"F{levels}", "Relu"))


def wrong_attribute(**attributes: object) -> ModelProto:
    """A convolution with nonsense in its attributes."""
    return build([node("Conv", "c v", "y", **attributes)], {"v": np.ones((4, 4, 1, 1), np.float32)})


MODELS: dict[str, Callable[[], ModelProto | bytes]] = {
    "claims_exabytes": lambda: claims(GIANT, 1 << 20),
    "claims_overflow": lambda: claims(1 << 62, 1 << 62),
    "claims_negative": lambda: claims(-4, 4),
    "claims_a_little": lambda: claims(1, 4, 1, 1),
    "claims_in_constant": claims_in_constant,
    "claims_in_sparse": claims_in_sparse,
    "doubled": doubled,
    "doubled_30": lambda: doubled(30),
    "tiled_labels": tiled_labels,
    "expanded_constant": expanded_constant,
    "tiled_constant": lambda: expanded_constant("Tile"),
    "filled": filled,
    "filled_with_integers": filled_with_integers,
    "ranged": ranged,
    "expanded_integers": expanded_integers,
    "padded": padded,
    "resized": resized,
    "flattened": flattened,
    "wide_input": wide_input,
    "long_vector": lambda: long_vector(1 << 62),
    "looped": looped,
    "nested_25": lambda: nested(25),
    "nested_60": lambda: nested(60),
    "nested_400": lambda: nested(400),
    "cyclic": cyclic,
    "itself": itself,
    "twice": twice,
    "named_twice": named_twice,
    "over_an_initializer": over_an_initializer,
    "recursive": lambda: calling(function("F", "F")),
    "mutually_recursive": lambda: calling(function("F", "G"), function("G", "F")),
    "laughs": laughs,
    "deep_functions": lambda: laughs(2_000, 1),
    "group": lambda: wrong_attribute(group=1 << 60),
    "group_zero": lambda: wrong_attribute(group=0),
    "group_negative": lambda: wrong_attribute(group=-2),
    "strides": lambda: wrong_attribute(strides=[0, 0]),
    "pads": lambda: wrong_attribute(pads=[1 << 40] * 4),
    "dilations": lambda: wrong_attribute(dilations=[1 << 40, 1 << 40]),
}

HARMLESS = frozenset(("nested_25", "group", "group_zero", "group_negative", "dilations"))
"""Models that can be inspected all the same."""
