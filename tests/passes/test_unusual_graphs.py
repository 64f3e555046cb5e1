"""Graphs that are valid but rare either prune and are proved, or refuse with the reason that holds."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxprune
from graphs import Middle, Tiny
from onnxprune.cost import Cost
from onnxprune.passes.select import PRESETS
from oracle import TOLERANCE, assert_close, assert_prunes, constant_axes, constants_of, couple_proto, run

TARGETS = (0.8, 0.7)
STATISTIC = "a weight is computed from all of it"


def chain(middle: Middle, batch: int | str = 1, *, after: int = 8, opset: int = 17) -> ModelProto:
    """Build input -> Conv ``a`` -> Relu -> Conv ``b`` (8 channels) -> Relu -> ``middle`` -> Conv ``z`` -> output."""
    t = Tiny(opset=opset)
    x = t.input(batch, 2, 4, 6)
    y = t.node("Relu", t.conv(x, "a", 2, 8, 3))
    y = t.node("Relu", t.conv(y, "b", 8, 8, 3))
    return t.build(t.conv(middle(t, y), "z", after, 3))


def assert_pruned(model: ModelProto, target: float = 0.75, **options: object) -> onnxprune.Result:
    """The model prunes to its target and is proved; the result is a valid model."""
    result = onnxprune.prune(model, target_mac=target, **options)
    assert result.report.proof is not None
    assert result.report.proof.ok
    assert result.report.target is not None
    assert result.report.target.achieved <= target
    assert result.plan.initializers
    onnx.checker.check_model(result.model, full_check=True)
    return result


def shapes(model: ModelProto) -> dict[str, list[int]]:
    """Shape of every initializer."""
    return {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}


def oracle_run(model: ModelProto, name: str) -> list[np.ndarray]:
    """Value of a tensor that the graph computes from constants alone."""
    probe = ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.append(onnx.ValueInfoProto(name=name))
    return run(probe, {"x": np.zeros((1, 2, 4, 6), np.float32)})


def reasons(model: ModelProto, axis: str) -> set[str]:
    """Reasons why an axis (``tensor/axis``) is frozen; "free" for indices that are not."""
    coupling = couple_proto(model)
    classes = constant_axes(coupling)[axis]
    return {coupling.reasons[coupling.reason[c]].text if coupling.frozen[c] else "free" for c in classes}


# -- scalars -----------------------------------------------------------------------------------------------------------


def scalar_input(t: Tiny, y: str) -> str:
    return t.node("Mul", y, t.input(name="gain"))


def condition(t: Tiny, computed: bool) -> str:
    """Add a rank-0 bool: a graph input, or computed from the image."""
    if not computed:
        return t.input(name="flag", kind=TensorProto.BOOL)
    return t.node("Greater", t.node("ReduceMean", "x", keepdims=0), t.constant(np.float32(0)))


def branch(t: Tiny, y: str, *, computed: bool) -> str:
    bodies = []
    for op in ("Relu", "Tanh"):
        node = helper.make_node(op, [y], [f"{op}.inner"], name=f"{op}.inner")
        output = helper.make_tensor_value_info(f"{op}.inner", TensorProto.FLOAT, (1, 8, 4, 6))
        bodies.append(helper.make_graph([node], op, [], [output]))
    return t.node("If", condition(t, computed), then_branch=bodies[0], else_branch=bodies[1])


def where(t: Tiny, y: str, *, computed: bool) -> str:
    return t.node("Where", condition(t, computed), y, t.node("Tanh", y))


def mean_of_everything(t: Tiny, y: str) -> str:
    mean = t.node("ReduceMean", y, keepdims=0)
    return t.node("Add", t.conv(y, "c", 8, 8), mean)


def scalar_behind_two_convolutions(t: Tiny, y: str) -> str:
    mean = t.node("ReduceMean", "x", keepdims=0)
    later = t.conv(t.node("Relu", t.conv(y, "c", 8, 8)), "d", 8, 8)
    return t.node("Mul", later, mean)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "middle",
    [
        pytest.param(scalar_input, id="scalar_input"),
        pytest.param(lambda t, y: branch(t, y, computed=False), id="if_input"),
        pytest.param(lambda t, y: branch(t, y, computed=True), id="if_computed"),
        pytest.param(lambda t, y: where(t, y, computed=False), id="where_input"),
        pytest.param(lambda t, y: where(t, y, computed=True), id="where_computed"),
        pytest.param(mean_of_everything, id="mean_of_everything"),
        pytest.param(scalar_behind_two_convolutions, id="scalar_across_segments"),
    ],
)
def test_scalars_are_proved(middle: Middle, target: float) -> None:
    """Tensors of rank 0, fed or computed, enter segments as scalars, and the model around them prunes and is proved."""
    model = chain(middle)
    result = assert_pruned(model, target)
    assert shapes(result.model)["a.w"][0] < 8


# -- statistics of weights ---------------------------------------------------------------------------------------------


def standardised(t: Tiny, y: str) -> str:
    w = t.random(8, 8, 3, 3, name="w")
    centred = t.node("Sub", w, t.node("ReduceMean", w, axes=[1, 2, 3], keepdims=1))
    return t.node("Conv", y, centred, name="c", pads=[1] * 4)


def weight_norm(t: Tiny, y: str) -> str:
    v, g = t.random(8, 8, 3, 3, name="v"), t.random(8, 1, 1, 1, name="g", offset=1.0, scale=0.2)
    direction = t.node("Div", v, t.node("ReduceL2", v, axes=[1, 2, 3], keepdims=1))
    return t.node("Conv", y, t.node("Mul", g, direction), name="c", pads=[1] * 4)


def normalised_constant(t: Tiny, y: str) -> str:
    scale, shift = t.random(8, name="scale", offset=1.0, scale=0.2), t.random(8, name="shift")
    weight = t.node("LayerNormalization", t.random(8, 8, name="w"), scale, shift)
    return _rows(t, y, weight)


def low_rank(t: Tiny, y: str) -> str:
    update = t.node("MatMul", t.random(8, 4, name="A"), t.random(4, 8, name="B"))
    return _rows(t, y, t.node("Add", t.random(8, 8, name="W0"), update))


def cosine(t: Tiny, y: str) -> str:
    w = t.random(8, 8, name="W")
    return _rows(t, y, t.node("Div", w, t.node("ReduceL2", w, axes=[0], keepdims=1)))


def _rows(t: Tiny, y: str, weight: str) -> str:
    """Multiply pixels by a computed weight (channels in, channels out), and return to an image."""
    pixels = t.node("Transpose", y, perm=[0, 2, 3, 1])
    return t.node("Transpose", t.node("MatMul", pixels, weight, name="c"), perm=[0, 3, 1, 2])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("middle", "frozen"),
    [
        pytest.param(standardised, ["w/1", "w/2", "w/3"], id="weight_standardisation"),
        pytest.param(weight_norm, ["v/1", "v/2", "v/3"], id="weight_norm"),
        pytest.param(low_rank, ["A/1", "B/0"], id="lora"),
        pytest.param(cosine, ["W/0"], id="cosine"),
    ],
)
def test_weights_computed_from_all_channels_are_folded(middle: Middle, frozen: Sequence[str], target: float) -> None:
    """As the graph has it, an axis that a constant is reduced along must stay whole; the weight itself becomes a constant.

    The weights of the channels that stay are then what they were, to the bit, although others are gone.
    """
    model = chain(middle)
    assert {axis: reasons(model, axis) for axis in frozen} == {axis: {STATISTIC} for axis in frozen}
    result = assert_pruned(model, target)
    assert any("folded into constants" in note for note in result.report.notes)
    assert {axis.partition("/")[0] for axis in frozen}.isdisjoint(shapes(result.model))
    (name,) = shapes(result.model).keys() - shapes(model).keys()
    (before,) = oracle_run(model, name)
    after = next(numpy_helper.to_array(t) for t in result.model.graph.initializer if t.name == name)
    for axis, kept in result.plan.initializers.get(name, {}).items():
        before = before.take(kept, axis)
    assert np.array_equal(before, after)


@pytest.mark.parametrize("target", TARGETS)
def test_layer_normalisation_of_a_constant(target: float) -> None:
    """A normalised table of weights is folded, and the model prunes and is proved."""
    model = chain(normalised_constant)
    assert reasons(model, "w/1") == {STATISTIC}
    assert "w" not in shapes(assert_pruned(model, target).model)


# -- domains behind a cut ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("before", "op"),
    [("Tanh", "Acos"), ("Tanh", "Asin"), ("Tanh", "Atanh"), ("Cosh", "Acosh"), ("Sigmoid", "Log"), ("Sigmoid", "Sqrt")],
)
def test_functions_with_a_domain_behind_a_cut(before: str, op: str, target: float) -> None:
    """Acos and its like at the start of a segment see values that they accept: no false alarm."""

    def middle(t: Tiny, y: str) -> str:
        bounded = t.node(before, y)
        unrelated = t.conv("x", "u", 2, 8, 3)
        return t.node("Add", t.node(op, bounded), unrelated)

    t = Tiny()
    x = t.input(1, 2, 4, 6)
    y = middle(t, t.conv(t.node("Tanh", t.conv(x, "a", 2, 8, 3)), "b", 8, 8, 3))
    assert_pruned(t.build(t.conv(y, "z", 8, 3)), target)


# -- Squeeze -----------------------------------------------------------------------------------------------------------


def squeezed(batch: int | str) -> ModelProto:
    """Build Conv ``a`` -> GlobalAveragePool -> Squeeze without axes -> MatMul ``z``, beside Conv ``c`` -> Conv ``d``."""
    t = Tiny()
    x = t.input(batch, 2, 4, 6)
    flat = t.node("Squeeze", t.node("GlobalAveragePool", t.conv(x, "a", 2, 8, 3)), name="squeeze")
    other = t.conv(t.node("Relu", t.conv(x, "c", 2, 8, 3)), "d", 8, 3)
    return t.build(t.linear(flat, "z", 8, 3), other)


def test_squeeze_without_axes_freezes_with_a_dynamic_batch() -> None:
    """Nothing can name the axes of a Squeeze when the batch may be one: its channels stay, with that reason."""
    model = squeezed("N")
    assert reasons(model, "a.w/0") == {"a Squeeze without axes and a dynamic batch: one channel left would be dropped"}
    result = assert_pruned(model, 0.75)
    assert shapes(result.model)["a.w"] == shapes(model)["a.w"]


def test_squeeze_without_axes_names_them_when_one_channel_is_left() -> None:
    """With a static batch the Squeeze gets explicit axes where it would otherwise drop the last channel."""
    model = squeezed(1)
    floor = onnxprune.inspect(model, preset="a").floor["mac"]
    result = assert_pruned(model, floor * 1.0001, preset="a")
    assert shapes(result.model)["a.w"][0] == 1
    (node,) = [node for node in result.model.graph.node if node.name == "squeeze"]
    constants = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in result.model.graph.initializer}
    assert constants[node.input[1]] == [0, 2, 3]
    outputs = run(result.model, {"x": np.ones((1, 2, 4, 6), np.float32)})
    assert [output.shape for output in outputs] == [(3,), (1, 3, 4, 6)]


def test_squeeze_without_axes_stays_while_channels_are_left() -> None:
    """A Squeeze whose channels remain several is not touched."""
    model = squeezed(1)
    result = assert_pruned(model, 0.75, min_channels=2)
    assert [node for node in model.graph.node if node.name == "squeeze"] == [
        node for node in result.model.graph.node if node.name == "squeeze"
    ]


# -- dead nodes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_dead_nodes(target: float) -> None:
    """Nodes that nobody reads go where they read pruned tensors, and stay otherwise."""

    def middle(t: Tiny, y: str) -> str:
        t.node("Reshape", y, t.constant([1, 8, 24]), name="dead_reshape")
        t.node("Concat", "dead_reshape", "dead_reshape", name="dead_concat", axis=0)
        t.node("Neg", "x", name="dead_neg")
        return y

    result = assert_pruned(chain(middle), target)
    assert shapes(result.model)["b.w"][0] < 8
    assert [node.name for node in result.model.graph.node if "dead" in node.name] == ["dead_neg"]


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("vector", "reader"), [("w1", "d"), ("w", "1")])
def test_names_that_look_like_a_readers_slice(vector: str, reader: str, target: float) -> None:
    """A tensor NAME@OUTPUT beside a shared NAME whose second reader is OUTPUT is kept apart from that reader's slice."""
    t = Tiny()
    x = t.input(1, 2, 4, 6)
    shared = [t.constant(np.linspace(0.5, 1.5, 8, dtype=np.float32), name=vector), *(f"{vector}.{i}" for i in range(3))]
    for name in shared[1:]:
        t.constant(np.linspace(0.5, 1.0, 8, dtype=np.float32), name=name)
    y = t.node("BatchNormalization", t.conv(x, "a", 2, 8, 3), *shared, name="c")
    y = t.conv(t.node("Relu", y), "b", 8, 8, 3)
    y = t.node("BatchNormalization", y, *shared, name=reader)
    y = t.node("Mul", y, t.random(8, 1, 1, name=f"{vector}@{reader}", offset=1.0))
    model = t.build(t.conv(y, "z", 8, 3))
    result = assert_pruned(model, target)
    names = [tensor.name for tensor in result.model.graph.initializer]
    assert len(names) == len(set(names))
    again = onnxprune.apply(model, onnxprune.Plan.from_json(as_text(result.plan)))
    assert again.model == result.model
    assert onnxprune.verify(model, result.model, result.plan).proof.ok


def as_text(plan: onnxprune.Plan) -> str:
    """Return a plan's text as it would be written."""
    return json.dumps(plan.to_json())


@pytest.mark.parametrize("names", [("w1", "w1@d"), ("w", "w@1")], ids="-".join)
def test_weights_named_like_slices(names: tuple[str, str]) -> None:
    """Two convolution weights of which one is named like a slice of the other prune, replay and verify."""
    t = Tiny()
    y = t.input(1, 2, 4, 6)
    for name, fan_in, result in zip(names, (2, 8), ("c", names[1].partition("@")[2]), strict=True):
        weight = t.random(8, fan_in, 3, 3, name=name, scale=0.2)
        y = t.node("Relu", t.node("Conv", y, weight, name=result, pads=[1] * 4))
    model = t.build(t.conv(y, "z", 8, 3))
    result = assert_pruned(model)
    assert all(shapes(result.model)[name][0] < 8 for name in names)
    again = onnxprune.apply(model, onnxprune.Plan.from_json(as_text(result.plan)))
    assert again.model == result.model
    assert onnxprune.verify(model, result.model, result.plan).proof.ok


# -- reshaped weights and computed bounds ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_reshaped_weight_prunes_channels_not_windows(target: float) -> None:
    """A convolution weight stored flat loses whole channels of nine taps; the window stays three by three."""

    def middle(t: Tiny, y: str) -> str:
        weight = t.node("Reshape", t.random(8, 72, name="flat", scale=0.2), t.constant([8, 8, 3, 3], name="to"))
        return t.node("Conv", y, weight, name="c", pads=[1] * 4)

    model = chain(middle)
    result = assert_pruned(model, target)
    after = shapes(result.model)
    assert after["flat"][1] == 9 * after["b.w"][0] < 72
    assert after["flat"][0] == after["z.w"][1]
    kept = result.plan.initializers["flat"][1]
    assert kept == [9 * channel + tap for channel in result.plan.initializers["b.w"][0] for tap in range(9)]
    taps = {tensor.name: numpy_helper.to_array(tensor) for tensor in result.model.graph.initializer}
    assert taps["to"].tolist()[2:] == [3, 3]


def computed_chunks(t: Tiny, y: str) -> str:
    """Halve the channels as exporters do: Shape, Gather, Div, Slice; gate one half with the other."""
    channels = t.node("Gather", t.node("Shape", y), t.constant([1]), axis=0)
    half = t.node("Div", channels, t.constant([2]))
    axes = t.constant([1])
    first = t.node("Slice", y, t.constant([0]), half, axes)
    second = t.node("Slice", y, half, t.node("Mul", half, t.constant([2])), axes)
    return t.node("Mul", first, t.node("Sigmoid", second))


@pytest.mark.parametrize("target", TARGETS)
def test_computed_chunk_bounds_prune_in_a_static_model(target: float) -> None:
    """Bounds that follow from shapes alone are known in a static model, so both halves lose the same channels."""
    result = assert_pruned(chain(computed_chunks, after=4), target, ignore=("a",))
    kept = result.plan.initializers["b.w"][0]
    assert len(kept) < 8
    assert [k for k in kept if k < 4] == [k - 4 for k in kept if k >= 4]


# -- nothing more could be kept ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("target", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_unequal_duplicates_leave_nothing_restorable(target: float, seed: int) -> None:
    """Where a Gather repeats channels unequally, no removed channel could come back within the target."""
    indices = [0, 0, 0, 1, 2, 2, 3, 4, 5, 5, 5, 5, 6, 7]
    model = chain(lambda t, y: t.node("Gather", y, t.constant(indices), axis=1), after=len(indices))
    result = assert_pruned(model, target, criterion="random", seed=seed)
    coupling = couple_proto(model)
    cost = Cost(coupling)
    keep = np.ones(coupling.n_classes, bool)
    for group, (_, _, kept) in zip(coupling.groups, result.plan.groups, strict=True):
        keep[group.classes] = kept
    whole = cost.total("mac", cost.counts(np.ones_like(keep)))

    def share(mask: np.ndarray) -> float:
        return cost.total("mac", cost.counts(mask)) / whole

    assert share(keep) <= target
    removed = np.flatnonzero(~keep)
    assert len(removed)
    for channel in removed:
        more = keep.copy()
        more[channel] = True
        assert share(more) > target, f"class {channel} could be restored"


# -- dynamic batch -----------------------------------------------------------------------------------------------------


def squeeze_excite(t: Tiny, y: str) -> str:
    gate = t.conv(t.node("Relu", t.conv(t.node("GlobalAveragePool", y), "s1", 8, 4)), "s2", 4, 8)
    return t.node("Mul", y, t.node("Sigmoid", gate))


def tokens(t: Tiny, y: str) -> str:
    flat = t.node("Transpose", t.node("Reshape", y, t.constant([0, 8, -1])), perm=[0, 2, 1])
    flat = t.node("Add", flat, t.linear(flat, "l", 8, 8))
    return t.node("Reshape", t.node("Transpose", flat, perm=[0, 2, 1]), t.constant([-1, 8, 4, 6]))


def shuffled(t: Tiny, y: str) -> str:
    grid = t.node("Reshape", y, t.constant([-1, 2, 4, 4, 6]))
    return t.node("Reshape", t.node("Transpose", grid, perm=[0, 2, 1, 3, 4]), t.constant([-1, 8, 4, 6]))


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize(
    ("middle", "after"),
    [
        pytest.param(lambda t, y: t.node("Relu", y), 8, id="plain"),
        pytest.param(squeeze_excite, 8, id="squeeze_excite"),
        pytest.param(tokens, 8, id="tokens"),
        pytest.param(shuffled, 8, id="channel_shuffle"),
        pytest.param(computed_chunks, 4, id="computed_chunks"),
    ],
)
def test_dynamic_batch_runs_at_three(middle: Middle, after: int, preset: str) -> None:
    """A pruned model with a dynamic batch runs at batch 3, and each sample gives what it gives alone."""
    result = assert_pruned(chain(middle, "N", after=after), 0.75, preset=preset)
    x = np.random.default_rng(0).standard_normal((3, 2, 4, 6)).astype(np.float32)
    together = run(result.model, {"x": x})
    alone = [run(result.model, {"x": x[i : i + 1]})[0] for i in range(3)]
    assert_close(together, [np.concatenate(alone)], TOLERANCE)


# -- what cannot run ---------------------------------------------------------------------------------------------------


def test_double_is_proved_in_single_precision() -> None:
    """A float64 convolution, for which onnxruntime has no kernel, is proved in float32; the file stays float64."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape), name)
        for name, shape in (("w", (8, 2, 3, 3)), ("v", (3, 8, 1, 1)))
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="a", pads=[1] * 4),
        helper.make_node("Conv", ["a", "v"], ["y"], name="y"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.DOUBLE, (1, 2, 4, 6))
    y = helper.make_tensor_value_info("y", TensorProto.DOUBLE, (1, 3, 4, 6))
    graph = helper.make_graph(nodes, "double", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    result = assert_pruned(model)
    assert {tensor.data_type for tensor in result.model.graph.initializer} == {TensorProto.DOUBLE}


def test_no_kernel_is_a_model_error() -> None:
    """An operator for which onnxruntime has no kernel here is the model's fault (3), not a failed proof (5)."""
    model = chain(lambda t, y: t.node("Identity", y))
    node = next(node for node in model.graph.node if node.op_type == "Identity")
    node.op_type, node.domain = "NoSuchOperator", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(onnxprune.ModelError, match="onnxruntime cannot") as caught:
        onnxprune.prune(model, target_mac=0.75)
    assert caught.value.exit_code == 3


def test_copies_of_which_one_is_left() -> None:
    """Channels that cannot go, times two copies of which one goes: each channel meets the one that is left."""
    t = Tiny()
    y = t.node("Reshape", t.gemm(t.input(1, 6), "a", 6, 6), t.constant([1, 6, 1]))
    parts = [t.node("Split", y, t.constant([1, 5]), name=f"s{k}", outputs=2, axis=1) for k in range(2)]
    y = t.node("Add", *(t.node("Concat", t.node("Relu", first), rest, axis=1) for first, rest in parts))
    y = t.node("Flatten", t.node("Relu", t.node("Tile", y, t.constant([1, 1, 2]), name="t")), axis=1)
    model = t.build(t.gemm(y, "z", 12, 3))
    coupling = couple_proto(model)
    (copies,) = (group for group in coupling.groups if group.frozen is None)
    keep = np.ones(coupling.n_classes, bool)
    keep[copies.classes[1]] = False
    pruned = assert_prunes(model, coupling, keep)
    assert list(dict(constants_of(pruned.model))["z.w"].shape) == [6, 3]
