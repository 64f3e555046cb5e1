"""Compensation lowers the error that pruning leaves, on data it has not seen, and changes no structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import oracle
from graphs import Tiny
from onnxprune import onnx_io
from onnxprune.amend import AddedBias, amend, strip
from onnxprune.coupling import Coupling
from onnxprune.errors import ModelError
from onnxprune.passes.apply import apply
from onnxprune.passes.compensate import Compensation, compensate
from onnxprune.plan import make_plan


def smooth(n: int, shape: Sequence[int], seed: int) -> np.ndarray:
    """Draw random pictures or rows whose neighbours are alike, float32 ``(n, *shape)``."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((shape[0], shape[0]))
    value = np.einsum("nc...,dc->nd...", rng.standard_normal((n, *shape)), mix)
    for axis in range(2, value.ndim):
        value = value + np.roll(value, 1, axis) + np.roll(value, 2, axis)
    return (value / value.std() + 0.3).astype(np.float32)


def feeds_of(model: ModelProto, n: int = 40, batch: int = 16, seed: int = 1) -> list[dict[str, np.ndarray]]:
    """Feeds of a model's first input; its first axis is dynamic."""
    value = model.graph.input[0]
    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:]
    dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    x = smooth(n, shape, seed).astype(dtype)
    return [{value.name: x[begin : begin + batch]} for begin in range(0, n, batch)]


@dataclass(frozen=True, eq=False)
class Done:
    """A model, pruned and compensated."""

    model: ModelProto
    coupling: Coupling
    keep: np.ndarray
    pruned: ModelProto
    found: Compensation
    amended: ModelProto

    def errors(self, seed: int = 77) -> tuple[float, float]:
        """Mean squared error of the outputs on fresh data: as pruned, and as compensated."""
        feed = feeds_of(self.model, 32, 32, seed)[0]
        want, before, after = (oracle.run(m, feed) for m in (self.model, self.pruned, self.amended))
        return distance(before, want), distance(after, want)


def distance(have: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> float:
    """Mean squared error over the variance of what is wanted."""
    return float(
        sum(np.square(h - w, dtype=float).mean() / w.var(dtype=float) for h, w in zip(have, want, strict=True))
    )


def prune_some(coupling: Coupling, share: float = 0.4, seed: int = 0) -> np.ndarray:
    """Remove a share of every bundle."""
    keep = np.ones(coupling.n_classes, bool)
    rng = np.random.default_rng(seed)
    for bundle in coupling.bundles:
        units = oracle.spare_units(bundle, rng.random(coupling.n_classes))
        keep[units[: max(1, round(share * bundle.n_units))]] = False
    return keep


def run(
    model: ModelProto, keep: np.ndarray | None = None, feeds: list[dict[str, np.ndarray]] | None = None, **options: Any
) -> Done:
    """Prune by a mask and compensate on smooth random data."""
    onnx.checker.check_model(model)
    coupling = oracle.couple_proto(model)
    keep = prune_some(coupling) if keep is None else keep
    assert not keep.all()
    pruned = apply(model, coupling, make_plan(coupling, keep), keep)
    graph = onnx_io.read(pruned, coupling.model.input_shapes)
    copies = [m.SerializeToString(deterministic=True) for m in (model, pruned)]
    found = compensate(model, coupling, pruned, graph, pruned, keep, feeds or feeds_of(model), **options)
    assert copies == [m.SerializeToString(deterministic=True) for m in (model, pruned)]
    return Done(model, coupling, keep, pruned, found, amend(pruned, found.values, found.added))


# -- nets --------------------------------------------------------------------------------------------------------------


def chain(*, bias: bool = True, kernel: int = 3, **attributes: Any) -> ModelProto:
    """Conv, Relu, Conv."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input("N", 3, 6, 7), "a", 3, 10, 3), name="r")
    return t.build(t.conv(y, "b", 10, 4, kernel, bias=bias, **attributes))


def residual(*, norm: bool) -> ModelProto:
    """Two residual blocks; only inner channels and the stream are pruned."""
    t = Tiny()

    def conv(x: str, name: str, channels_in: int, channels: int) -> str:
        y = t.conv(x, name, channels_in, channels, 3, bias=not norm)
        return t.batch_norm(y, f"{name}n", channels) if norm else y

    y = t.node("Relu", conv(t.input("N", 3, 6, 7), "stem", 3, 8), name="r")
    for block in "pq":
        inner = t.node("Relu", conv(y, f"{block}1", 8, 10), name=f"{block}r")
        y = t.node("Relu", t.node("Add", conv(inner, f"{block}2", 10, 8), y, name=f"{block}s"), name=f"{block}o")
    return t.build(t.conv(y, "z", 8, 3))


def depthwise() -> ModelProto:
    """Pointwise, depthwise and pointwise convolutions with Clip between them."""
    t = Tiny()
    low, high = t.constant(np.float32(0), "low"), t.constant(np.float32(6), "high")
    y = t.node("Clip", t.conv(t.input("N", 4, 6, 7), "a", 4, 12), low, high, name="ac")
    y = t.node("Clip", t.conv(y, "d", 12, 12, 3, group=12), low, high, name="dc")
    return t.build(t.conv(t.conv(y, "b", 12, 5), "c", 5, 3, 3))


def transposed() -> ModelProto:
    """Conv, LeakyRelu, ConvTranspose of stride two."""
    t = Tiny()
    y = t.node("LeakyRelu", t.conv(t.input("N", 3, 5, 6), "a", 3, 10, 3), name="r", alpha=0.1)
    return t.build(t.conv(y, "b", 10, 4, 4, transpose=True, strides=[2, 2], pads=[1, 1, 1, 1]))


def mlp(**attributes: Any) -> ModelProto:
    """Gemm, Relu, Gemm, Relu, Gemm."""
    t = Tiny()
    y = t.node("Relu", t.gemm(t.input("N", 5), "a", 5, 12, **attributes), name="ar")
    y = t.node("Relu", t.gemm(y, "b", 12, 10, **attributes), name="br")
    return t.build(t.gemm(y, "c", 10, 3, **attributes))


def products(*, bias: bool) -> ModelProto:
    """MatMul, Add, Relu, MatMul, and Add where there is a bias."""
    t = Tiny()
    y = t.node("Add", t.linear(t.input("N", 5), "a", 5, 12), t.random(12, name="ab", scale=0.3), name="as")
    y = t.linear(t.node("Relu", y, name="r"), "b", 12, 4)
    return t.build(t.node("Add", y, t.random(4, name="bb"), name="bs") if bias else y)


def shared_weights() -> ModelProto:
    """One convolution is applied twice."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input("N", 3, 6, 7), "a", 3, 8, 3), name="r")
    y = t.node("Relu", t.conv(y, "b", 8, 8, 3), name="s")
    y = t.node("Relu", t.node("Conv", y, "b.w", "b.b", name="b2", pads=[1] * 4, kernel_shape=[3, 3]), name="u")
    return t.build(t.conv(y, "z", 8, 3))


def shared_vectors() -> ModelProto:
    """Two convolutions and two norms read the same bias vector."""
    t = Tiny()
    zeros = t.constant(np.full(6, 0.1, np.float32), "zeros")
    x = t.input("N", 3, 6, 7)
    y = t.conv(x, "a", 3, 10, 3)
    for name, before in (("b", 10), ("c", 6)):
        weight = t.random(6, before, 3, 3, name=f"{name}.w", scale=(9 * before) ** -0.5)
        y = t.node("Relu", y, name=f"{name}r")
        y = t.node("Conv", y, weight, zeros, name=name, pads=[1] * 4)
    return t.build("b", "c")


def layer_norm() -> ModelProto:
    """Layer normalisation of the stream before a two-layer branch."""
    t = Tiny()
    y = t.linear(t.input("N", 4, 5), "a", 5, 10)
    n = t.node(
        "LayerNormalization", y, t.random(10, name="n.s", offset=1, scale=0.2), t.random(10, name="n.b"), name="n"
    )
    h = t.node("Add", t.linear(n, "b", 10, 12), t.random(12, name="bb"), name="bs")
    h = t.node("Add", t.linear(t.node("Relu", h, name="r"), "c", 12, 10), t.random(10, name="cb"), name="cs")
    return t.build(t.linear(t.node("Add", h, y, name="s"), "z", 10, 3))


def pre_activation() -> ModelProto:
    """BatchNormalization and Relu stand before each convolution of a residual branch."""
    t = Tiny()
    y = t.conv(t.input("N", 3, 6, 7), "stem", 3, 8, 3, bias=False)
    h = t.node("Relu", t.batch_norm(y, "n", 8), name="nr")
    h = t.conv(h, "p", 8, 10, 3, bias=False)
    h = t.conv(t.node("Relu", t.batch_norm(h, "m", 10), name="mr"), "q", 10, 8, 3, bias=False)
    y = t.node("Add", h, y, name="s")
    return t.build(t.conv(t.node("Relu", t.batch_norm(y, "e", 8), name="er"), "z", 8, 3))


def grouped() -> ModelProto:
    """Conv, grouped Conv, Conv."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input("N", 3, 6, 7), "a", 3, 12, 3), name="r")
    y = t.node("Relu", t.conv(y, "g", 12, 8, 3, group=2), name="s")
    return t.build(t.conv(y, "z", 8, 3))


def scaled() -> ModelProto:
    """A branch is scaled by a constant before it joins the stream."""
    t = Tiny()
    y = t.conv(t.input("N", 3, 6, 7), "stem", 3, 8, 3)
    h = t.conv(t.node("Relu", t.conv(y, "p", 8, 10, 3), name="r"), "q", 10, 8, 3)
    h = t.node("Mul", h, t.constant(np.float32(0.1), "tenth"), name="m")
    return t.build(t.conv(t.node("Add", h, y, name="s"), "z", 8, 3))


def weights_in_nodes() -> ModelProto:
    """Weights and biases in Constant nodes."""
    model = chain()
    for tensor in reversed(list(model.graph.initializer)):
        node = helper.make_node("Constant", [], [tensor.name], name=f"make {tensor.name}", value=tensor)
        model.graph.node.insert(0, node)
    del model.graph.initializer[:]
    return model


def half(model: ModelProto, kind: int = TensorProto.FLOAT16) -> ModelProto:
    """The same model in another type."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    return model


def old_style(model: ModelProto) -> ModelProto:
    """The same model as IR version 3 has it: initializers are inputs, too."""
    model.ir_version = 3
    model.opset_import[0].version = min(model.opset_import[0].version, 11)
    model.graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in model.graph.initializer
    )
    return model


NETS: dict[str, Callable[[], ModelProto]] = {
    "conv": chain,
    "conv-no-bias": lambda: chain(bias=False),
    "conv-strided": lambda: chain(strides=[2, 2]),
    "residual-folded": lambda: residual(norm=False),
    "residual-norm": lambda: residual(norm=True),
    "depthwise": depthwise,
    "transposed": transposed,
    "mlp": mlp,
    "mlp-scaled": lambda: mlp(alpha=0.7, beta=-1.3, transB=1),
    "products": lambda: products(bias=True),
    "products-no-bias": lambda: products(bias=False),
    "shared-weights": shared_weights,
    "shared-vectors": shared_vectors,
    "layer-norm": layer_norm,
    "pre-activation": pre_activation,
    "grouped": grouped,
    "scaled": scaled,
    "constant-nodes": weights_in_nodes,
    "fp16": lambda: half(chain()),
    "fp16-no-bias": lambda: half(chain(bias=False)),
    "double": lambda: half(mlp(), TensorProto.DOUBLE),
    "ir-3": lambda: old_style(chain(bias=False)),
}
every_net = pytest.mark.parametrize("build", NETS.values(), ids=NETS)


def expected_nodes(nodes: Sequence[onnx.NodeProto], added: Sequence[AddedBias]) -> list[onnx.NodeProto]:
    """Nodes of a pruned graph with the biases that are listed as added."""
    expected = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        expected.append(copy)
        for bias in added:
            if bias.node == node.output[0] and bias.index is None:
                copy.output[0] = f"{bias.node}/unbiased"
                inputs = [copy.output[0], f"{bias.node}/bias"]
                expected.append(helper.make_node("Add", inputs, [bias.node], name=inputs[1]))
            elif bias.node == node.output[0]:
                assert bias.replaces == (node.input[bias.index] if bias.index < len(node.input) else "")
                copy.input[:] = [*node.input[: bias.index], f"{bias.node}/bias"]
    return expected


def without_values(nodes: Sequence[onnx.NodeProto]) -> list[bytes]:
    """Nodes as bytes, without what Constant nodes hold."""
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    for node in copies:
        if node.op_type == "Constant":
            del node.attribute[:]
    return [node.SerializeToString(deterministic=True) for node in copies]


@every_net
def test_the_error_on_fresh_data_falls(build: Callable[[], ModelProto]) -> None:
    """Outputs of the compensated model are nearer to the original's than those of the pruned one, on other data."""
    done = run(build())
    before, after = done.errors()
    assert after < 0.8 * before
    assert done.found.values
    assert done.found.held_back == 8


@every_net
@pytest.mark.parametrize("mode", ["least-squares", "bias"])
def test_structure_stays(build: Callable[[], ModelProto], mode: str) -> None:
    """Nodes, names, shapes and types are those of the pruned model; biases that are new are listed and no more."""
    done = run(build(), mode=mode)
    added = done.found.added
    amended, pruned = done.amended.graph, done.pruned.graph
    oracle.check(done.amended)
    assert oracle.signature(done.amended) == oracle.signature(done.pruned)
    expected = expected_nodes(pruned.node, list(added.values()))
    assert without_values(amended.node) == without_values(expected)
    fresh = {t.name: (tuple(t.dims), t.data_type) for t in amended.initializer}
    old = {t.name: (tuple(t.dims), t.data_type) for t in pruned.initializer}
    assert fresh.keys() - old.keys() == added.keys()
    assert {name: fresh[name] for name in old} == old
    assert [t.name for t in amended.initializer][: len(old)] == list(old)
    assert all(value.dtype == numpy_helper.to_array(t).dtype for t in pruned.initializer
               for name, value in done.found.values.items() if name == t.name)  # fmt: skip
    stripped = strip(done.amended, {name: bias.to_json() for name, bias in added.items()})
    assert onnx_io.compare(done.pruned, stripped)[0] == ()


@every_net
def test_what_pruning_does_not_reach_is_untouched(build: Callable[[], ModelProto]) -> None:
    """Constants that are not listed as changed keep their bytes, and the first layer, whose input is whole, is one."""
    done = run(build())
    values = {name: array.tobytes() for name, array in oracle.constants_of(done.amended)}
    for name, array in oracle.constants_of(done.pruned):
        if name not in done.found.values:
            assert values[name] == array.tobytes()
    first = next(n for n in done.pruned.graph.node if n.op_type in ("Conv", "Gemm", "MatMul"))
    assert first.input[1] not in done.found.values


@every_net
def test_every_operator_is_accounted_for(build: Callable[[], ModelProto]) -> None:
    """Each one that was solved says its errors, none of which rose; one that was not says why."""
    done = run(build())
    assert done.found.solved
    for solved in done.found.solved:
        if np.isfinite(solved.ridge):
            assert solved.error < solved.error_before
            assert not solved.note
        else:
            assert solved.note
    assert any(np.isfinite(solved.ridge) for solved in done.found.solved)


@every_net
@pytest.mark.parametrize("mode", ["least-squares", "bias"])
def test_the_same_seed_gives_the_same_values(build: Callable[[], ModelProto], mode: str) -> None:
    """Two runs agree bit by bit."""
    first, second = (run(build(), mode=mode).amended.SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


@every_net
def test_memory_does_not_change_the_result(build: Callable[[], ModelProto], monkeypatch: pytest.MonkeyPatch) -> None:
    """With no memory for live tensors everything is run again, to the same values."""
    model = build()
    plenty = run(model)
    monkeypatch.setattr("onnxprune.passes.compensate.Memory", lambda limit: _Memory(0))
    scarce = run(model)
    assert plenty.found.values.keys() == scarce.found.values.keys()
    assert plenty.found.added.keys() == scarce.found.added.keys()
    for name, value in plenty.found.values.items():
        tolerance = 2e-2 if value.dtype == np.float16 else 1e-4
        assert np.allclose(scarce.found.values[name], value, rtol=tolerance, atol=tolerance)


def test_one_byte_of_memory_still_compensates() -> None:
    """A bound below a single row takes one position of every sample, and still runs."""
    done = run(chain(), feeds=feeds_of(chain(), 400, 100), memory=1)
    before, after = done.errors()
    assert after < before


class _Memory:
    """A bound that nothing fits in; what is held must have been granted."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0

    def hold(self, n_bytes: int) -> bool:
        """Refuse."""
        return n_bytes == 0


# -- exact cases -------------------------------------------------------------------------------------------------------


def with_values(model: ModelProto, **values: np.ndarray) -> ModelProto:
    """Set initializers by name, a dot written as two underscores."""
    for tensor in model.graph.initializer:
        value = values.get(tensor.name.replace(".", "__"))
        if value is not None:
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))
    return model


def value_of(model: ModelProto, name: str) -> np.ndarray:
    """Value of a constant."""
    return dict(oracle.constants_of(model))[name].copy()


def keep_without(coupling: Coupling, full: str, gone: Sequence[int]) -> np.ndarray:
    """Keep everything but some indices of a constant's axis."""
    keep = np.ones(coupling.n_classes, bool)
    keep[oracle.constant_axes(coupling)[full][list(gone)]] = False
    return keep


def dependent(model: ModelProto, weight: str, bias: str, axis: int) -> ModelProto:
    """Make channels 1 and 4 of the first layer combinations of others, its bias included."""
    w, b = np.moveaxis(value_of(model, weight), axis, 0), value_of(model, bias)
    w[1], b[1] = 0.5 * w[0] - 0.7 * w[2], 0.5 * b[0] - 0.7 * b[2] + 0.3
    w[4], b[4] = 1.5 * w[3], 1.5 * b[3]
    key = {weight.replace(".", "__"): np.moveaxis(w, 0, axis), bias.replace(".", "__"): b}
    return with_values(model, **key)


def linear_nets() -> dict[str, ModelProto]:
    """Nets whose hidden channels 1 and 4 are combinations of others where they are read."""
    t = Tiny()
    conv = t.build(t.conv(t.conv(t.input("N", 3, 6, 7), "a", 3, 6, 3), "b", 6, 4, 3, pads=[0] * 4))
    t = Tiny()
    turned = t.build(t.conv(t.conv(t.input("N", 3, 6, 7), "a", 3, 6, 3), "b", 6, 4, 1, transpose=True, strides=[1, 1]))
    t = Tiny()
    perceptron = t.build(t.gemm(t.gemm(t.input("N", 5), "a", 5, 6, transB=1), "b", 6, 4))
    t = Tiny()
    y = t.node("Relu", t.gemm(t.gemm(t.input("N", 5), "a", 5, 6, transB=1), "b", 6, 7), name="r")
    deep = t.build(t.gemm(y, "c", 7, 3))
    t = Tiny()
    y = t.conv(t.conv(t.input("N", 3, 6, 7), "a", 3, 6, 3), "b", 6, 4, 3, pads=[0] * 4, bias=False)
    norm = t.build(t.node("Relu", t.batch_norm(y, "n", 4), name="r"))
    t = Tiny()
    y = t.conv(t.conv(t.input("N", 3, 6, 7), "a", 3, 6, 3), "b", 6, 4, 3, pads=[0] * 4)
    factor = t.build(t.node("Mul", y, t.constant(np.float32(-0.1), "tenth"), name="m"))
    t = Tiny()
    x = t.input("N", 3, 6, 7)
    stream = t.conv(x, "s", 3, 4)
    y = t.node("Mul", t.conv(t.conv(x, "a", 3, 6, 3), "b", 6, 4, 1), t.constant(np.float32(2), "two"), name="m")
    skip = t.build(t.node("Relu", t.node("Add", stream, y, name="sum"), name="r"))
    nets = {"conv": conv, "transposed": turned, "mlp": perceptron, "deep": deep}
    return nets | {"norm": norm, "factor": factor, "skip": skip}


@pytest.mark.parametrize("name", ["conv", "transposed", "mlp", "deep", "norm", "factor", "skip"])
def test_a_combination_of_other_channels_goes_without_error(name: str) -> None:
    """Channels that others make up for exactly are removed without any error of the outputs."""
    model = dependent(linear_nets()[name], "a.w", "a.b", 0)
    keep = keep_without(oracle.couple_proto(model), "a.w/0", [1, 4])
    done = run(model, keep, feeds_of(model, 400, 100))
    before, after = done.errors()
    assert before > 1e-2
    assert after < 1e-8


def test_copies_behind_a_rectifier_go_without_error() -> None:
    """A channel that is a multiple of another behind Relu is removed without any error."""
    model = chain()
    w, b = value_of(model, "a.w"), value_of(model, "a.b")
    w[1], b[1], w[4], b[4] = 2 * w[0], 2 * b[0], 0.5 * w[3], 0.5 * b[3]
    model = with_values(model, a__w=w, a__b=b)
    done = run(model, keep_without(oracle.couple_proto(model), "a.w/0", [1, 4]), feeds_of(model, 400, 100))
    before, after = done.errors()
    assert before > 1e-2
    assert after < 1e-8


@pytest.mark.parametrize("name", ["mlp", "products", "products-no-bias", "mlp-scaled"])
@pytest.mark.parametrize("mode", ["least-squares", "bias"])
def test_constants_that_are_lost_go_into_the_bias(name: str, mode: str) -> None:
    """Where inputs never change, the bias alone makes up for everything that was removed."""
    model = NETS[name]()
    feed = {"x": np.repeat(smooth(1, [5], 3), 40, 0)}
    done = run(model, feeds=[feed], mode=mode)
    want, before, after = (oracle.run(m, feed)[0] for m in (model, done.pruned, done.amended))
    assert np.abs(before - want).max() > 1e-2
    assert np.abs(after - want).max() < 1e-4


@pytest.mark.parametrize("name", ["conv", "conv-no-bias", "residual-norm", "mlp", "products-no-bias"])
def test_bias_mode_changes_no_weights(name: str) -> None:
    """Only biases and a norm's means change, and the mean of the outputs on calibration data is the original's."""
    model = NETS[name]()
    done = run(model, mode="bias")
    assert all(len(array.shape) == 1 for array in done.found.values.values())
    before, after = done.errors()
    assert after < before


def test_bias_mode_restores_the_mean() -> None:
    """After bias compensation of a linear net each output channel has the original's mean on the calibration data."""
    model = linear_nets()["mlp"]
    feeds = feeds_of(model, 400)
    done = run(model, feeds=feeds, mode="bias")
    want, before, after = (
        np.concatenate([oracle.run(m, feed)[0] for feed in feeds]).mean(0) for m in (model, done.pruned, done.amended)
    )
    assert np.abs(before - want).max() > 1e-2
    assert np.abs(after - want).max() < 1e-4


# -- added biases ------------------------------------------------------------------------------------------------------


def test_a_product_gets_an_add_only_where_new_nodes_may_be() -> None:
    """MatMul without a bias gets an Add behind it, unless new nodes are forbidden; then its weights alone change."""
    model = products(bias=False)
    having, lacking = run(model), run(model, new_nodes=False)
    assert {name: (b.node, b.index) for name, b in having.found.added.items()} == {"b/bias": ("b", None)}
    assert [n.op_type for n in having.amended.graph.node] == [*(n.op_type for n in model.graph.node), "Add"]
    assert not lacking.found.added
    assert len(lacking.amended.graph.node) == len(model.graph.node)
    assert having.errors()[1] < lacking.errors()[1] < lacking.errors()[0]


def test_a_shared_vector_is_replaced_where_it_is_read() -> None:
    """Convolutions that read one bias vector get vectors of their own, and the shared one stays for the others."""
    done = run(shared_vectors())
    assert {bias.replaces for bias in done.found.added.values()} == {"zeros"}
    assert {(bias.node, bias.index) for bias in done.found.added.values()} <= {("b", 2), ("c", 2)}
    assert "zeros" not in done.found.values


ADDED: dict[str, Callable[[], ModelProto]] = {
    name: NETS[name]
    for name in ("conv-no-bias", "products-no-bias", "shared-vectors", "fp16-no-bias", "ir-3", "conv", "layer-norm")
} | {
    "ir-3-product": lambda: old_style(products(bias=False)),
    "ir-3-shared": lambda: old_style(shared_vectors()),
}  # fmt: skip


@pytest.mark.parametrize("build", ADDED.values(), ids=ADDED)
def test_added_biases_come_out_again(build: Callable[[], ModelProto]) -> None:
    """Stripping a model to which biases were added gives back its bytes, and the amended model is valid and runs."""
    done = run(build())
    added = {name: bias.to_json() for name, bias in done.found.added.items()}
    amended = amend(done.pruned, {}, done.found.added)
    oracle.check(amended)
    oracle.run(amended, feeds_of(done.model, 2)[0])
    stripped = strip(amended, added)
    assert stripped.SerializeToString(deterministic=True) == done.pruned.SerializeToString(deterministic=True)
    if added:
        listed = {value.name for value in amended.graph.input}
        assert (added.keys() <= listed) == (done.model.ir_version == 3)


def test_stripping_refuses_what_is_not_there() -> None:
    """A bias that the model does not have where the plan says is an error that names it."""
    done = run(products(bias=False))
    added = {name: bias.to_json() for name, bias in done.found.added.items()}
    for model in (done.pruned, done.model):
        with pytest.raises(ModelError, match="b/bias"):
            strip(model, added)
    with pytest.raises(ModelError, match="b/bias"):
        strip(done.amended, {"b/bias": {"node": "b", "input": 2, "replaces": "", "size": 4}})
    with pytest.raises(ModelError, match="b/bias"):
        strip(done.amended, {"b/bias": {"node": "nowhere", "input": None, "replaces": "", "size": 4}})
    assert strip(done.pruned, {}) is done.pruned


def test_amending_keeps_documentation_and_copies() -> None:
    """New values keep a tensor's name, type, text and metadata; the model that was given is not changed."""
    model = chain()
    tensor = next(t for t in model.graph.initializer if t.name == "b.w")
    tensor.doc_string = "about b.w"
    tensor.metadata_props.add(key="origin", value="here")
    before = model.SerializeToString(deterministic=True)
    value = np.ones((4, 10, 3, 3))
    amended = amend(model, {"b.w": value}, {})
    fresh = next(t for t in amended.graph.initializer if t.name == "b.w")
    assert np.array_equal(numpy_helper.to_array(fresh), value.astype(np.float32))
    assert (fresh.doc_string, fresh.metadata_props[0].value) == ("about b.w", "here")
    assert model.SerializeToString(deterministic=True) == before


def test_nothing_pruned_is_nothing_to_solve() -> None:
    """With every channel kept there are no operators to solve."""
    model = residual(norm=True)
    coupling = oracle.couple_proto(model)
    keep = np.ones(coupling.n_classes, bool)
    graph = onnx_io.read(model, coupling.model.input_shapes)
    found = compensate(model, coupling, model, graph, model, keep, feeds_of(model))
    assert not found.values
    assert not found.added
    assert not found.solved
