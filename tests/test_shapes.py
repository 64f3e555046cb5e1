"""Every tensor's shape is found: by inference, by evaluating the graph's shape arithmetic, or by running the model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

import onnxprune
from graphs import Tiny
from onnxprune import onnx_io, shapes
from oracle import assert_close, masked_reference, run

MICROSOFT = "com.microsoft"


def begin(
    batch: int | str = 1, width: int | str = 6, opset: int = 17, domains: tuple[str, ...] = ()
) -> tuple[Tiny, str]:
    """Begin a graph with Conv ``a`` (8 channels) and a Relu."""
    t = Tiny(opset=opset, domains=domains)
    return t, t.node("Relu", t.conv(t.input(batch, 2, 4, width), "a", 2, 8, 3))


def end(t: Tiny, y: str) -> ModelProto:
    """Finish with Conv ``b``, a Relu and Conv ``z``."""
    return t.build(t.conv(t.node("Relu", t.conv(y, "b", 8, 8, 3)), "z", 8, 3))


def image(model: ModelProto, **lengths: int) -> dict[str, np.ndarray]:
    """Random values for the input, with these lengths in the place of its dynamic axes (1 where none is given)."""
    rng = np.random.default_rng(0)
    (value,) = model.graph.input
    shape = [
        lengths.get(dim.dim_param, 1) if dim.dim_param else dim.dim_value for dim in value.type.tensor_type.shape.dim
    ]
    return {value.name: rng.standard_normal(shape).astype(np.float32)}


def assert_pruned(model: ModelProto, target: float = 0.75, **lengths: int) -> onnxprune.Result:
    """The model prunes, is proved, and gives what the masked original gives, at these lengths of dynamic axes too."""
    result = onnxprune.prune(model, target_mac=target)
    assert result.report.proof is not None
    assert result.report.proof.ok
    assert result.plan.initializers
    for feeds in (image(model, W=64), image(model, **lengths)):
        assert_close(run(result.model, feeds), masked_reference(model, result.plan, feeds))
    return result


def measured(model: ModelProto, names: list[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors as onnxruntime computes them."""
    probe = ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return {name: value.shape for name, value in zip(names, run(probe, image(model)), strict=True)}


def computed_reshapes(blocks: int, batch: int | str = 1) -> ModelProto:
    """Flatten and restore many times, each time to sizes computed from the shape then; a convolution here and there."""
    t, y = begin(batch)
    for block in range(blocks):
        shape = t.node("Shape", y)
        n, c, h, w = (t.node("Gather", shape, t.constant([axis]), axis=0) for axis in range(4))
        space = t.node("Mul", h, w)
        y = t.node("Relu", t.node("Reshape", y, t.node("Concat", n, c, space, axis=0)))
        y = t.node("Reshape", y, t.node("Concat", n, c, t.node("Div", space, w), t.constant([6]), axis=0))
        if block % 8 == 0:
            y = t.conv(y, f"c{block}", 8, 8)
    return end(t, y)


@pytest.mark.parametrize("batch", [1, "N"])
def test_long_chains_of_computed_reshapes(batch: int | str) -> None:
    """Forty reshapes, each known only when the one before is, are all resolved, and follow when channels go."""
    model = computed_reshapes(40, batch)
    read = onnx_io.read(model)
    names = [name for node in read.nodes for name in node.outputs]
    assert {name: read.shapes[name] for name in names} == measured(model, names)
    result = assert_pruned(model, N=3)
    assert [node.op_type for node in result.model.graph.node] == [node.op_type for node in model.graph.node]


def test_reading_a_chain_asks_inference_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference looks at a window of the graph at a time: its work grows with the graph, not with its square."""
    work = []
    infer = shapes.infer

    def counted(model: ModelProto):
        work.append(len(model.graph.node))
        return infer(model)

    monkeypatch.setattr(shapes, "infer", counted)
    onnx_io.read(computed_reshapes(60))
    assert sum(work) < 60 * 2 * shapes.WINDOW
    assert max(work[1:]) <= shapes.WINDOW


# -- what inference cannot know ----------------------------------------------------------------------------------------


def runtime_operator(t: Tiny, y: str) -> str:
    return t.node("Gelu", y, domain=MICROSOFT)


def target_by_way_of_floats(t: Tiny, y: str) -> str:
    scaled = t.node("Mul", t.node("Cast", t.node("Shape", y), to=TensorProto.FLOAT), t.constant(1.0))
    return t.node("Reshape", y, t.node("Cast", scaled, to=TensorProto.INT64))


def target_from_data(t: Tiny, y: str) -> str:
    """Reshape to a target that is computed from the image (and always the same)."""
    zero = t.node("Cast", t.node("Mul", t.node("ReduceMean", "x", keepdims=0), t.constant(0.0)), to=TensorProto.INT64)
    return t.node("Reshape", y, t.node("Add", t.constant([1, 8, 6, 4]), zero))


def expanded_to_a_shape(t: Tiny, y: str) -> str:
    return t.node("Add", y, t.node("Expand", t.constant(0.5), t.node("Shape", y)))


def range_over_the_width(t: Tiny, y: str) -> str:
    width = t.node("Gather", t.node("Shape", y), t.constant(3), axis=0)
    ramp = t.node("Range", t.constant(0), width, t.constant(1))
    return t.node("Add", y, t.node("Cast", ramp, to=TensorProto.FLOAT))


def resized_to_computed_sizes(t: Tiny, y: str) -> str:
    shape = t.node("Shape", y)
    space = t.node("Mul", t.node("Slice", shape, t.constant([2]), t.constant([4])), t.constant([2, 2]))
    sizes = t.node("Concat", t.node("Slice", shape, t.constant([0]), t.constant([2])), space, axis=0)
    return t.node("Resize", y, "", "", sizes)


def padded_by_computed_amounts(t: Tiny, y: str) -> str:
    """Pad the width to the next multiple of four."""
    width = t.node("Gather", t.node("Shape", y), t.constant([3]), axis=0)
    more = t.node("Mod", t.node("Neg", width), t.constant([4]))
    return t.node("Pad", y, t.node("Concat", t.constant([0] * 7), more, axis=0))


HARD = [
    runtime_operator, target_by_way_of_floats, expanded_to_a_shape, range_over_the_width, resized_to_computed_sizes,
    padded_by_computed_amounts,
]  # fmt: skip


@pytest.mark.parametrize("width", [6, "W"])
@pytest.mark.parametrize("middle", HARD, ids=lambda middle: middle.__name__)
def test_shapes_behind_computed_ones(middle: Callable[[Tiny, str], str], width: int | str) -> None:
    """All shapes are those that onnxruntime measures, and the model prunes, for a width that nobody gave, too."""
    t, y = begin(width=width, domains=(MICROSOFT,))
    y = middle(t, y)
    model = end(t, middle(t, y))
    read = onnx_io.read(model, {"x": (1, 2, 4, 7)} if width == "W" else None)
    names = [name for node in read.nodes for name in node.outputs]
    probe = ModelProto()
    probe.CopyFrom(model)
    probe.graph.input[0].type.tensor_type.shape.dim[3].dim_value = read.input_shapes["x"][3]
    assert {name: read.shapes[name] for name in names} == measured(probe, names)
    assert_pruned(model, W=10)


def test_shape_that_depends_on_data_is_measured() -> None:
    """Where a Reshape's target is computed from the image, one run tells; the channels in front of it stay."""
    t, y = begin()
    model = end(t, target_from_data(t, y))
    read = onnx_io.read(model)
    assert read.shapes["b"] == (1, 8, 6, 4)
    result = assert_pruned(model, 0.9)
    assert "a.w" not in result.plan.initializers


def test_length_that_data_decide() -> None:
    """The number of non-zeros is a length like any other at the example's values, and no channel depends on it."""
    t, y = begin()
    t.node("NonZero", t.node("Relu", t.conv("x", "q", 2, 4, 3)), name="found")
    model = end(t, y)
    model.graph.output.append(helper.make_tensor_value_info("found", TensorProto.INT64, (4, None)))
    result = assert_pruned(model)
    assert "q.w" not in result.plan.initializers


def test_unknown_operator_of_somebody_else() -> None:
    """Where an operator that onnxruntime does not know keeps shapes from being found, the rest is read, with a note."""
    t, y = begin(domains=("acme",))
    y = t.node("Warp", t.conv(t.node("Relu", t.conv(y, "b", 8, 8, 3)), "c", 8, 8, 3), domain="acme", name="warp")
    t.conv(y, "z", 8, 3)
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, (1, 3, 4, 6))
    graph = helper.make_graph(t.nodes, "foreign", t.inputs, [output], t.initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("acme", 1)]
    read = onnx_io.read(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    assert read.shapes["c"] == (1, 8, 4, 6)
    assert "warp" not in read.shapes
    assert any("no known shape" in note for note in read.notes)


# -- files that lie ----------------------------------------------------------------------------------------------------


def stale_value_info(model: ModelProto) -> None:
    model.graph.value_info.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, (1, 99, 4, 6)))


def wrong_rank_of_output(model: ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim.add(dim_value=1)


def wrong_output_size(model: ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5


def reversed_nodes(model: ModelProto) -> None:
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))


@pytest.mark.parametrize(
    "spoil",
    [stale_value_info, wrong_rank_of_output, wrong_output_size, reversed_nodes],
    ids=lambda spoil: spoil.__name__,
)
def test_what_the_file_says_wrongly_is_not_believed(spoil: Callable[[ModelProto], None]) -> None:
    """Declared shapes that contradict the graph and nodes out of order change nothing: shapes are found from the inputs."""
    t, y = begin()
    model = end(t, y)
    right = onnx_io.read(model).shapes
    spoil(model)
    read = onnx_io.read(model)
    assert {name: read.shapes[name] for name in right} == right
    assert [node.key for node in read.nodes] == ["a", "relu1", "b", "relu3", "z"]
    assert_pruned(model)


def test_cycle_is_a_model_error() -> None:
    """A graph with a cycle is refused in words."""
    t, y = begin()
    model = end(t, y)
    model.graph.node[0].input[0] = "b"
    with pytest.raises(onnxprune.ModelError, match=r"[Cc]ycle"):
        onnxprune.inspect(model)


def test_types_that_do_not_match_are_a_model_error() -> None:
    """A cycle of types (integers added to floats) that no inference resolves and no runtime runs is the model's fault."""
    t, y = begin()
    t.node("Add", y, t.constant(np.arange(6)), name="sum")
    t.node("Reshape", "sum", t.node("Cast", "sum", to=TensorProto.INT64), name="shaped")
    t.conv("shaped", "z", 8, 3)
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    graph = helper.make_graph(t.nodes, "mismatch", t.inputs, [output], t.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(onnxprune.ModelError):
        onnxprune.prune(model, target_mac=0.5)


def test_reshape_that_does_not_fit() -> None:
    """A computed target of another number of elements is refused in words."""
    t, y = begin()
    shape = t.node("Add", t.node("Shape", y), t.constant([0, 1, 0, 0]))
    t.node("Reshape", y, shape, name="wrong")
    t.conv("wrong", "z", 9, 3)
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    graph = helper.make_graph(t.nodes, "misfit", t.inputs, [output], t.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(onnxprune.OnnxPruneError):
        onnxprune.prune(model, target_mac=0.5)


# -- what is static ----------------------------------------------------------------------------------------------------


def test_static_values_are_what_onnxruntime_computes() -> None:
    """Values computed from shapes alone are known, also by way of floats, and nothing else is called static."""
    t, y = begin()
    shape = t.node("Shape", y, name="shape")
    t.node("Gather", shape, t.constant(3), axis=0, name="width")
    t.node("Cast", "width", to=TensorProto.FLOAT, name="float")
    t.node("Sqrt", "float", name="root")
    t.node("Size", y, name="size")
    y = t.node("Mul", y, t.node("Mul", "root", t.node("Cast", "size", to=TensorProto.FLOAT, name="sized")))
    read = onnx_io.read(end(t, t.node("Reshape", y, shape)))
    assert read.static == {"shape", "width", "float", "root", "size", "sized", "mul8"}
    assert read.static_values["shape"].tolist() == [1, 8, 4, 6]
    assert read.static_values["root"] == np.sqrt(np.float32(6))
    assert read.static_values["mul8"] == np.sqrt(np.float32(6)) * np.float32(192)


def test_random_numbers_and_large_tables_are_not_static() -> None:
    """What differs from run to run, and what is too large to be a shape, is computed by the graph alone."""
    t, y = begin()
    noise = t.node("RandomNormalLike", y, name="noise")
    wide = t.node("ConstantOfShape", t.constant([shapes.SMALL + 1]), name="wide")
    t.node("Cast", wide, to=TensorProto.INT64, name="table")
    y = t.node("Add", y, t.node("Mul", noise, t.node("Cast", t.node("ReduceMax", "table", keepdims=0), to=1)))
    read = onnx_io.read(end(t, y))
    assert read.static.isdisjoint({"noise", "table"})
    assert read.shapes["table"] == (shapes.SMALL + 1,)
