"""Tensors that several layers share, and shapes that are computed at run time."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import oracle
from architectures import variants
from graphs import Tiny
from oracle import Case

# -- shared initializers ---------------------------------------------------------------------------------------------


def shared_bias(*, identity: bool = False) -> ModelProto:
    """Give two unrelated convolutions one bias, as exporters that remove duplicates do; the second through Identity."""
    t = Tiny()
    x = t.input(1, 2, 4, 6)
    bias = t.random(6, name="bias")
    y = t.node("Conv", x, t.random(6, 2, 1, 1, name="a.w"), bias, name="a")
    if identity:
        bias = t.node("Identity", bias, name="alias")
    y = t.node("Conv", t.node("LeakyRelu", y), t.random(6, 6, 1, 1, name="b.w"), bias, name="b")
    return t.build(t.conv(t.node("LeakyRelu", y), "z", 6, 3))


def shared_norm() -> ModelProto:
    """Give two batch normalisations one vector of ones and one of zeros, each in several roles."""
    t = Tiny()
    ones, zeros = t.constant(np.ones(6, np.float32), "ones"), t.constant(np.zeros(6, np.float32), "zeros")
    y = t.input(1, 2, 4, 6)
    for name, size in (("a", 2), ("b", 6)):
        y = t.node("BatchNormalization", t.conv(y, name, size, 6), ones, zeros, zeros, ones, name=f"{name}n")
    return t.build(t.conv(y, "z", 6, 3))


def shared_matrix() -> ModelProto:
    """Apply one matrix twice (tied weights): its labels are the same everywhere."""
    t = Tiny()
    y = t.node("LeakyRelu", t.linear(t.input(4, 2), "a", 2, 6))
    weight = t.random(6, 6, name="m")
    y = t.node("LeakyRelu", t.node("MatMul", y, weight, name="first"))
    return t.build(t.linear(t.node("MatMul", y, weight, name="second"), "z", 6, 3))


def tied_head() -> ModelProto:
    """Use one matrix as embedding table and, transposed, as output layer (language models)."""
    t = Tiny()
    table = t.random(7, 6, name="table")
    y = t.node("Gather", table, t.input(1, 4, kind=TensorProto.INT64), name="embed")
    y = t.node("Add", y, t.linear(t.node("LeakyRelu", t.linear(y, "a", 6, 5)), "b", 5, 6))
    return t.build(t.node("MatMul", y, t.node("Transpose", table), name="z"))


def shared_with_output() -> ModelProto:
    """Return a bias that a convolution uses as an output of the graph."""
    t = Tiny()
    bias = t.random(6, name="bias")
    y = t.node("Conv", t.input(1, 2, 4, 6), t.random(6, 2, 1, 1, name="a.w"), bias, name="a")
    return t.build(t.conv(t.node("LeakyRelu", y), "z", 6, 3), t.node("Identity", bias, name="copy"))


def shared_target() -> ModelProto:
    """Use one Reshape target for two tensors with channels of their own."""
    t = Tiny()
    x, target = t.input(1, 2, 4, 6), t.constant([1, 6, 24], "target")
    ends = []
    for name in "ab":
        y = t.node("Reshape", t.conv(x, name, 2, 6), target, name=f"{name}r")
        ends.append(t.linear(t.node("Transpose", y, perm=[0, 2, 1]), f"{name}z", 6, 3))
    return t.build(t.node("Add", *ends))


SHARED = [
    Case("shared", "bias", shared_bias, {
        "a.w/0": range(6), "bias@a/0": range(6), "b.w/1": range(6),
        "b.w/0": range(6, 12), "bias@b/0": range(6, 12), "z.w/1": range(6, 12)}, (6, 6)),
    Case("shared", "bias-through-identity", partial(shared_bias, identity=True), {
        "a.w/0": range(6), "bias@a/0": range(6), "b.w/1": range(6),
        "b.w/0": range(6, 12), "bias@b/0": range(6, 12), "z.w/1": range(6, 12)}, (6, 6)),
    Case("shared", "batch-norm-vectors", shared_norm, {
        "a.w/0": range(6), "a.b/0": range(6), "b.w/1": range(6), "b.w/0": range(6, 12), "b.b/0": range(6, 12),
            "z.w/1": range(6, 12),
        "ones@an/0": range(6), "zeros@an/0": range(6), "ones@bn/0": range(6, 12), "zeros@bn/0": range(6, 12)}, (6, 6)),
    Case("shared", "matrix", shared_matrix, {"a.w/1": range(6), "m/0": range(6), "m/1": range(6), "z.w/0": range(6)}, (6,)),
    Case("shared", "tied-head", tied_head, {
        "table/1": range(6), "a.w/0": range(6), "a.w/1": range(6, 11), "b.w/0": range(6, 11), "b.w/1": range(6)}, (5, 6)),
    Case("shared", "vector-is-output", shared_with_output, {"a.w/0": range(6), "bias@a/0": range(6), "z.w/1": range(6)},
         (6,)),
    Case("shared", "reshape-target", shared_target, {
        "a.w/0": range(6), "a.b/0": range(6), "az.w/0": range(6),
        "b.w/0": range(6, 12), "b.b/0": range(6, 12), "bz.w/0": range(6, 12)}, (6, 6)),
]  # fmt: skip


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_shared_vectors_untie_and_shared_matrices_tie(case):
    """A vector that exporters shared has labels per reader; a matrix that layers share has one set of labels."""
    oracle.assert_coupling(case)


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_shared_tensors_are_copied_where_readers_differ(case):
    """Every reader gets the slice that it needs."""
    oracle.assert_case_prunes(case)


def test_vector_read_twice_by_one_node():
    """A node that joins a vector with itself gets what its two slots need, or ties them."""
    t = Tiny()
    x = t.input(1, 2, 4, 6)
    vector = t.random(1, 3, 1, 1, name="v")
    y = t.node("Concat", t.conv(x, "a", 2, 3), t.conv(x, "b", 2, 3), axis=1)
    model = t.build(t.conv(t.node("Add", y, t.node("Concat", vector, vector, name="op", axis=1)), "z", 6, 3))
    coupling = oracle.couple_proto(model)
    for seed in range(4):
        oracle.assert_prunes(model, coupling, oracle.random_keep(coupling, np.random.default_rng(seed)))


def test_shared_vector_stays_shared_where_readers_agree():
    """Readers on one residual stream need the same slice: no copy is made."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    vector = t.random(6, 1, 1, name="v")
    y = t.node("LeakyRelu", t.node("Mul", t.node("Add", y, vector), vector))
    model = t.build(t.conv(y, "z", 6, 3))
    coupling = oracle.couple_proto(model)
    pruned = oracle.assert_prunes(model, coupling, oracle.random_keep(coupling, np.random.default_rng(0)))
    names = [tensor.name for tensor in model.graph.initializer]
    assert [tensor.name for tensor in pruned.model.graph.initializer] == names


@pytest.mark.parametrize(
    "change", [variants.constants_as_nodes, variants.initializers_as_inputs], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("build", [shared_bias, shared_norm, shared_target, shared_matrix], ids=lambda f: f.__name__)
def test_copies_are_valid_however_constants_are_stored(change, build):
    """Constant nodes, and initializers that are also inputs (IR 3), are sliced and copied like initializers."""
    model = change(build())
    coupling = oracle.couple_proto(model)
    oracle.assert_prunes(model, coupling, oracle.random_keep(coupling, np.random.default_rng(1)))


# -- shape arithmetic ------------------------------------------------------------------------------------------------


def size_of(t: Tiny, y: str, axis: int) -> str:
    """Read one length of a tensor at run time, as a vector of one."""
    number = t.node("Gather", t.node("Shape", y), t.constant(axis), axis=0)
    return t.node("Unsqueeze", number, t.constant([0]))


def computed_head(*, features: str = "inferred", batch: int | str = 1) -> ModelProto:
    """Flatten by Shape-Gather-Unsqueeze-Concat-Reshape, as PyTorch exports ``x.view(x.size(0), -1)``."""
    t = Tiny()
    y = t.conv(t.input(batch, 2, 2, 3), "a", 2, 4)
    rest = {"inferred": [-1], "constant": [24]}
    if features == "computed":
        last = t.node("Mul", size_of(t, y, 1), t.node("Mul", size_of(t, y, 2), size_of(t, y, 3)))
    else:
        last = t.constant(rest[features])
    target = t.node("Concat", size_of(t, y, 0), last, axis=0)
    return t.build(t.gemm(t.node("Reshape", y, target, name="op"), "z", 24, 3))


def computed_maps(*, channels: str) -> ModelProto:
    """Restore maps from tokens with lengths read at run time; the channel count is baked in or read too."""
    t = Tiny()
    y = t.conv(t.input("batch", 2, 4, 6), "a", 2, 6)
    flat = t.node("Reshape", y, t.node("Concat", size_of(t, y, 0), size_of(t, y, 1), t.constant([-1]), axis=0))
    count = t.constant([6], "six") if channels == "constant" else size_of(t, flat, 1)
    target = t.node("Concat", size_of(t, y, 0), count, size_of(t, y, 2), size_of(t, y, 3), axis=0)
    return t.build(t.conv(t.node("Reshape", flat, target, name="op"), "z", 6, 3))


def computed_shuffle() -> ModelProto:
    """Shuffle channels with a division at run time (ShuffleNet): channels // groups."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    per_group = t.node("Div", size_of(t, y, 1), t.constant([2]))
    n, h, w = (size_of(t, y, axis) for axis in (0, 2, 3))
    y = t.node("Reshape", y, t.node("Concat", n, t.constant([2]), per_group, h, w, axis=0))
    y = t.node("Transpose", y, perm=[0, 2, 1, 3, 4])
    return t.build(
        t.conv(t.node("Reshape", y, t.node("Concat", n, t.constant([-1]), h, w, axis=0), name="op"), "z", 6, 3)
    )


def unrelated(t: Tiny, n_layers: int) -> str:
    """Begin with layers that have groups of their own."""
    x = t.input(1, 2, 4, 6)
    for number in range(n_layers):
        x = t.conv(t.conv(x, f"p{number}", 2, 9), f"q{number}", 9, 2)
    return x


def computed_chunks(channels: int, before: int = 0) -> ModelProto:
    """Cut channels in halves at a bound computed at run time (``torch.chunk`` in older exports)."""
    t = Tiny()
    y = t.conv(unrelated(t, before), "a", 2, channels)
    half = t.node("Div", t.node("Add", size_of(t, y, 1), t.constant([1])), t.constant([2]))
    zero, axis, double = t.constant([0]), t.constant([1]), t.node("Mul", half, t.constant([2]))
    parts = [
        t.node("Slice", y, *bounds, axis, name=f"op{i}") for i, bounds in enumerate(((zero, half), (half, double)))
    ]
    return t.build(t.node("Add", *(t.conv(part, f"z{i}", channels // 2, 3) for i, part in enumerate(parts))))


def zeros_of_other_shape(channels: int, before: int = 0) -> ModelProto:
    """Convolve zeros that copy the shape of an unrelated tensor."""
    t = Tiny()
    y = t.conv(unrelated(t, before), "a", 2, channels)
    value = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.5])
    filled = t.node("ConstantOfShape", t.node("Shape", y), name="op", value=value)
    return t.build(t.node("Add", t.conv(y, "y", channels, 3), t.conv(filled, "z", channels, 3)))


def computed_resize() -> ModelProto:
    """Resize to the size of another map; batch and channels are read at run time (FPN)."""
    t = Tiny()
    x = t.input("batch", 2, 8, 12)
    large = t.conv(x, "a", 2, 6)
    small = t.conv(t.node("MaxPool", large, kernel_shape=[2, 2], strides=[2, 2]), "b", 6, 6)
    front = t.node("Slice", t.node("Shape", small), t.constant([0]), t.constant([2]), t.constant([0]))
    back = t.node("Slice", t.node("Shape", large), t.constant([2]), t.constant([4]), t.constant([0]))
    up = t.node("Resize", small, "", "", t.node("Concat", front, back, axis=0), name="op", mode="nearest")
    return t.build(t.conv(t.node("Concat", up, large, axis=1), "z", 12, 3))


def computed_expand() -> ModelProto:
    """Expand pooled maps to the shape of the maps themselves."""
    t = Tiny()
    y = t.conv(t.input("batch", 2, 4, 6), "a", 2, 6)
    return t.build(t.conv(t.node("Expand", t.node("GlobalAveragePool", y), t.node("Shape", y), name="op"), "z", 6, 3))


ROWS = {"a.w/0": range(4), "a.b/0": range(4), "z.w/0": np.repeat(range(4), 6)}
PASSES = {"a.w/0": range(6), "a.b/0": range(6), "z.w/1": range(6)}
COMPUTED = [
    *(Case("computed", f"head-{f}", partial(computed_head, features=f), ROWS, (4,)) for f in ("inferred", "constant",
        "computed")),
    *(Case("computed", f"head-{f}-dynamic-batch", partial(computed_head, features=f, batch="batch"), ROWS,
        (4,)) for f in ("inferred", "constant", "computed")),
    *(Case("computed", f"maps-{c}", partial(computed_maps, channels=c), PASSES, (6,)) for c in ("constant", "read")),
    Case("computed", "shuffle", computed_shuffle, {
        "a.w/0": [0, 1, 2] * 2, "a.b/0": [0, 1, 2] * 2, "z.w/1": [0, 0, 1, 1, 2, 2]}, (3,)),
    Case("computed", "resize", computed_resize, {
        "a.w/0": range(6), "a.b/0": range(6), "b.w/1": range(6), "b.w/0": range(6, 12), "b.b/0": range(6, 12),
        "z.w/1": [*range(6, 12), *range(6)]}, (6, 6)),
    Case("computed", "expand", computed_expand, PASSES, (6,)),
]  # fmt: skip


@pytest.mark.parametrize("case", COMPUTED, ids=str)
def test_shape_arithmetic_follows(case):
    """Lengths that are read at run time follow by themselves; baked ones are patched at their constant."""
    oracle.assert_coupling(case)
    oracle.assert_case_prunes(case)


@pytest.mark.parametrize(
    "build",
    [
        *(partial(computed_chunks, channels, before) for channels in (4, 6, 8) for before in (0, 1, 3)),
        *(partial(zeros_of_other_shape, channels, before) for channels in (3, 4, 8) for before in (0, 1, 3)),
    ],
    ids=lambda build: f"{build.func.__name__}-{'-'.join(map(str, build.args))}",
)
def test_arithmetic_that_would_not_follow_freezes(build: Callable[[], ModelProto]):
    """Whatever stays prunable can be pruned by any amount; contradicting arithmetic freezes its channels."""
    model = build()
    coupling = oracle.couple_proto(model)
    rng = np.random.default_rng(0)
    for share in (0.3, 0.5, 0.5, 0.7, 1.0):
        keep = oracle.random_keep(coupling, rng, share, spare=0.3)
        if not keep.all():
            oracle.assert_prunes(model, coupling, keep)


def test_dynamic_batch_runs_at_other_sizes():
    """A model pruned at batch 1 runs at batch 3 and still equals its masked original there."""
    model = computed_head(features="computed", batch="batch")
    coupling = oracle.couple_proto(model)
    pruned = oracle.assert_prunes(model, coupling, oracle.random_keep(coupling, np.random.default_rng(2)))
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 2, 2, 3)).astype(np.float32)}
    oracle.assert_close(oracle.run(pruned.model, feeds), oracle.masked_reference(model, pruned.plan, feeds))


# -- what cannot be followed -----------------------------------------------------------------------------------------


def branch(t: Tiny, name: str, *operands: Sequence) -> onnx.GraphProto:
    """Return a body that reads outer tensors and has one output."""
    nodes = [helper.make_node(op, inputs, [f"{name}.{i}"]) for i, (op, inputs) in enumerate(operands)]
    output = helper.make_tensor_value_info(f"{name}.{len(nodes) - 1}", TensorProto.FLOAT, None)
    return helper.make_graph(nodes, name, [], [output])


def conditional(*, captured_vector: bool = False) -> ModelProto:
    """Choose between two bodies that capture channels of the outer graph (or a bias that a convolution uses too)."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    condition = t.node(
        "Greater", t.node("ReduceSum", y, t.constant(np.array([0, 1, 2, 3])), keepdims=0), t.constant(0.0)
    )
    second = ("Add", ["a", "a"]) if not captured_vector else ("Identity", ["a.b"])
    first = ("Relu", ["a"]) if not captured_vector else ("Neg", ["a.b"])
    bodies = {"then_branch": branch(t, "then", first), "else_branch": branch(t, "else", second)}
    chosen = t.node("If", condition, name="op", **bodies)
    if captured_vector:
        y = t.node("Add", y, t.node("Unsqueeze", chosen, t.constant([0, 2, 3])), name="meet")
        return t.build(t.conv(y, "z", 6, 3))
    return t.build(t.conv(chosen, "z", 6, 3))


def custom() -> ModelProto:
    """Use an operator of another domain."""
    t = Tiny(domains=("com.microsoft",))
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    return t.build(t.conv(t.node("ScaledSiLU", y, name="op", domain="com.microsoft"), "z", 6, 3))


def unknown() -> ModelProto:
    """Use a standard operator without a rule."""
    t = Tiny()
    return t.build(t.node("Det", t.linear(t.input(2, 4, 2), "a", 2, 4), name="op"))


def outputs() -> ModelProto:
    """Return channels as an output of the graph, beside what uses them."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    return t.build(t.conv(t.node("LeakyRelu", y), "z", 6, 3), y)


def loose_end() -> ModelProto:
    """Compute channels that nobody consumes."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    return t.build(
        t.node("ReduceMean", t.node("Slice", y, t.constant([0]), t.constant([3]), t.constant([1])), axes=[2, 3])
    )


def frozen(node: str, op: str, text: str) -> dict[str, tuple[str, str, str]]:
    """Expect the first convolution's channels to be frozen for this reason."""
    return {"a.w/0": (node, op, text), "a.b/0": (node, op, text)}


REFUSALS = [
    Case("If", "captures-channels", conditional, frozen={"a.w/0": ("op", "If", "no rule for operator If")}),
    Case("If", "captures-vector", partial(conditional, captured_vector=True),
         frozen={"a.w/0": ("meet", "Add", "axis that cannot shrink")}),
    Case("ScaledSiLU", "custom-domain", custom,
         frozen=frozen("op", "ScaledSiLU", "no rule for operator com.microsoft::ScaledSiLU")),
    Case("Det", "no-rule", unknown, frozen={"a.w/1": ("op", "Det", "no rule for operator Det")}),
    Case("output", "of-the-graph", outputs, frozen=frozen("a", "output", "it is an output of the graph")),
    Case("output", "loose-end", loose_end, frozen={"a.w/0": ("", "", "no operator consumes these channels")}),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS, ids=str)
def test_unknown_readers_freeze_what_they_touch(case):
    """Bodies of control flow, unknown operators and outputs freeze their channels; the reason names them."""
    oracle.assert_coupling(case)
    oracle.assert_case_prunes(case)


def test_reason_names_the_output_that_freezes():
    """With several outputs, the reason's tensor is the one that shows the channels."""
    coupling = oracle.couple_proto(outputs())
    (reason,) = {coupling.reasons[coupling.reason[c]] for c in oracle.constant_axes(coupling)["a.w/0"]}
    assert reason.tensor == "a"


def test_captured_vector_keeps_its_value_for_the_body():
    """A body reads the whole bias, whatever becomes of the convolution that shares it."""
    model = conditional(captured_vector=True)
    coupling = oracle.couple_proto(model)
    assert "a.b" in coupling.read_whole
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert tensors["a.b"].shape == (6,)
