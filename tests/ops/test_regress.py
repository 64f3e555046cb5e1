"""A linear operator seen as a regression computes what onnxruntime computes, at every output position."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import oracle
from onnxprune.model import Node
from onnxprune.ops.regress import Regression, regression

TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Case:
    """One node: ``shapes`` are those of its inputs in order, ``weight`` says which of them is the weight."""

    op: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    weight: int = 1

    def __str__(self) -> str:
        """Return the test id."""
        return f"{self.op}-{self.name}"


def conv(name: str, x: tuple[int, ...], w: tuple[int, ...], *, bias: bool = True, **attributes: Any) -> Case:
    """Describe a convolution."""
    shapes = (x, w, (w[0],)) if bias else (x, w)
    return Case("Conv", name, shapes, attributes)


def turned(name: str, x: tuple[int, ...], w: tuple[int, ...], *, bias: bool = True, **attributes: Any) -> Case:
    """Describe a transposed convolution."""
    outputs = w[1] * attributes.get("group", 1)
    return Case("ConvTranspose", name, (x, w, (outputs,)) if bias else (x, w), attributes)


REGRESSIONS = [
    conv("1d", (2, 3, 9), (4, 3, 3)),
    conv("1d-padded", (2, 3, 9), (4, 3, 3), pads=[2, 1]),
    conv("2d", (2, 3, 7, 8), (4, 3, 3, 2)),
    conv("2d-pointwise", (2, 3, 4, 5), (4, 3, 1, 1)),
    conv("2d-no-bias", (2, 3, 7, 8), (4, 3, 3, 3), bias=False, pads=[1, 1, 1, 1]),
    conv("2d-asymmetric-pads", (2, 3, 7, 8), (4, 3, 3, 3), pads=[0, 2, 1, 0]),
    conv("2d-strides", (2, 3, 9, 8), (4, 3, 3, 3), strides=[2, 3], pads=[1, 1, 1, 1]),
    conv("2d-dilations", (2, 3, 9, 8), (4, 3, 3, 2), dilations=[2, 3], pads=[2, 1, 2, 1]),
    conv("2d-strides-and-dilations", (2, 3, 11, 10), (4, 3, 3, 3), strides=[2, 2], dilations=[2, 1], pads=[1, 0, 3, 2]),
    conv("2d-groups", (2, 6, 5, 6), (4, 3, 3, 3), group=2, pads=[1, 1, 1, 1]),
    conv("2d-depthwise", (2, 4, 5, 6), (4, 1, 3, 3), group=4, pads=[1, 1, 1, 1]),
    conv("2d-depthwise-multiplier", (2, 3, 5, 6), (6, 1, 3, 3), group=3, strides=[2, 1]),
    conv("2d-same-upper", (2, 3, 7, 8), (4, 3, 4, 3), auto_pad="SAME_UPPER", strides=[2, 2]),
    conv("2d-same-lower", (2, 3, 7, 8), (4, 3, 4, 3), auto_pad="SAME_LOWER", strides=[2, 3]),
    conv("2d-same-lower-even-kernel", (2, 3, 6, 5), (4, 3, 2, 2), auto_pad="SAME_LOWER"),
    conv("2d-same-upper-even-kernel", (2, 3, 6, 5), (4, 3, 2, 4), auto_pad="SAME_UPPER"),
    conv("2d-valid", (2, 3, 7, 8), (4, 3, 3, 3), auto_pad="VALID", strides=[2, 1]),
    conv("2d-notset", (2, 3, 7, 8), (4, 3, 3, 3), auto_pad="NOTSET", pads=[1, 2, 0, 1]),
    conv("3d", (2, 2, 4, 5, 6), (3, 2, 2, 3, 2), strides=[1, 2, 1], pads=[1, 0, 1, 0, 1, 0]),
    conv("3d-groups", (1, 4, 4, 3, 4), (6, 2, 2, 2, 3), group=2, dilations=[2, 1, 1]),
    turned("1d", (2, 3, 5), (3, 4, 3), strides=[2]),
    turned("2d", (2, 3, 4, 5), (3, 4, 3, 2)),
    turned("2d-no-bias", (2, 3, 4, 5), (3, 4, 3, 3), bias=False, strides=[2, 2], pads=[1, 1, 1, 1]),
    turned("2d-strides", (2, 3, 4, 5), (3, 4, 3, 4), strides=[2, 3], pads=[1, 0, 0, 1]),
    turned("2d-gaps", (2, 3, 3, 4), (3, 4, 2, 2), strides=[3, 4]),
    turned("2d-dilations", (2, 3, 4, 5), (3, 4, 3, 2), dilations=[2, 3], strides=[2, 1]),
    turned("2d-groups", (2, 6, 4, 5), (6, 2, 3, 3), group=3, strides=[2, 2], pads=[1, 1, 1, 1]),
    turned("2d-depthwise", (2, 4, 4, 5), (4, 1, 4, 4), group=4, strides=[2, 2], pads=[1, 1, 1, 1]),
    turned("2d-output-padding", (2, 3, 4, 5), (3, 4, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 0]),
    turned("2d-output-shape", (2, 3, 4, 5), (3, 4, 3, 3), strides=[2, 2], output_shape=[8, 10]),
    turned("2d-output-shape-odd", (2, 3, 4, 5), (3, 4, 4, 3), strides=[2, 2], output_shape=[7, 10]),
    turned("2d-same-upper", (2, 3, 4, 5), (3, 4, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    turned("2d-same-lower", (2, 3, 4, 5), (3, 4, 3, 3), strides=[2, 2], auto_pad="SAME_LOWER"),
    turned("2d-same-upper-shape", (2, 3, 4, 5), (3, 4, 4, 4), strides=[2, 2], auto_pad="SAME_UPPER", output_shape=[7, 9]),
    turned("2d-same-lower-shape", (2, 3, 4, 5), (3, 4, 4, 4), strides=[2, 2], auto_pad="SAME_LOWER", output_shape=[7, 9]),
    turned("2d-same-kernel-below-stride", (2, 3, 4, 5), (3, 4, 2, 2), strides=[3, 3], auto_pad="SAME_UPPER"),
    turned("2d-shape-and-padding", (2, 3, 4, 5), (3, 4, 4, 4), strides=[2, 2], output_shape=[8, 9], output_padding=[1, 1]),
    turned("2d-valid-shape", (2, 3, 4, 5), (3, 4, 4, 4), strides=[2, 2], auto_pad="VALID", output_shape=[7, 11]),
    turned("2d-valid", (2, 3, 4, 5), (3, 4, 3, 3), strides=[2, 2], auto_pad="VALID"),
    turned("3d", (1, 2, 2, 3, 3), (2, 3, 2, 3, 2), strides=[2, 1, 2], pads=[1, 0, 0, 0, 1, 1]),
    Case("Gemm", "plain", ((5, 3), (3, 4))),
    Case("Gemm", "vector", ((5, 3), (3, 4), (4,))),
    Case("Gemm", "row", ((5, 3), (3, 4), (1, 4))),
    Case("Gemm", "transA", ((3, 5), (3, 4), (4,)), {"transA": 1}),
    Case("Gemm", "transB", ((5, 3), (4, 3), (4,)), {"transB": 1}),
    Case("Gemm", "both", ((3, 5), (4, 3), (4,)), {"transA": 1, "transB": 1}),
    Case("Gemm", "alpha-beta", ((5, 3), (4, 3), (4,)), {"transB": 1, "alpha": 0.5, "beta": -2.0}),
    Case("Gemm", "alpha-alone", ((5, 3), (3, 4)), {"alpha": -3.0}),
    Case("MatMul", "right", ((5, 3), (3, 4))),
    Case("MatMul", "right-batched", ((2, 6, 5, 3), (3, 4))),
    Case("MatMul", "left", ((4, 3), (3, 5)), weight=0),
    Case("MatMul", "left-batched", ((4, 3), (2, 6, 3, 5)), weight=0),
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Ready:
    """A node with arrays for its inputs, seen as a regression."""

    case: Case
    view: Regression
    arrays: list[np.ndarray]

    @property
    def x(self) -> np.ndarray:
        """What the weight is applied to."""
        return self.arrays[self.view.data]

    @property
    def w(self) -> np.ndarray:
        """The weight."""
        return self.arrays[self.view.weight]

    def run(self, arrays: list[np.ndarray] | None = None) -> np.ndarray:
        """Output of the node as onnxruntime computes it."""
        arrays = self.arrays if arrays is None else arrays
        names = [f"i{index}" for index in range(len(arrays))]
        node = helper.make_node(self.case.op, names, ["y"], **self.case.attributes)
        data = helper.make_tensor_value_info(names[self.view.data], TensorProto.FLOAT, arrays[self.view.data].shape)
        constants = [numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True) if n != data.name]
        graph = helper.make_graph([node], "one", [data], [onnx.ValueInfoProto(name="y")], constants)
        model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
        return oracle.run(model, {data.name: arrays[self.view.data]})[0]

    def predicted(self, y: np.ndarray) -> np.ndarray:
        """What the regression says of every position, float64 ``(blocks, n, q)``."""
        every = np.arange(self.view.positions(y.shape))
        rows = self.view.regressors(self.x, y.shape, every) @ self.view.matrix(self.w.astype(np.float64))
        if self.view.bias is not None and self.view.bias < len(self.arrays):
            bias = self.arrays[self.view.bias].astype(np.float64)
            rows = rows + self.view.bias_scale * bias.reshape(self.view.blocks, 1, -1)
        return rows


def ready(case: Case, seed: int = 0) -> Ready:
    """Draw the arrays of a case."""
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in case.shapes]
    names = tuple(f"i{index}" for index in range(len(arrays)))
    node = Node("n", case.op, "", names, ("y",), case.attributes)
    view = regression(node, lambda index: case.shapes[index] if index == case.weight else None)
    assert view is not None
    assert view.weight == case.weight
    return Ready(case, view, arrays)


def assert_regression(found: Ready) -> None:
    """Every position of the output is what the regression says."""
    y = found.run()
    every = np.arange(found.view.positions(y.shape))
    targets = found.view.targets(y, every)
    predicted = found.predicted(y)
    assert targets.size == y.size
    assert targets.shape == predicted.shape
    assert targets.dtype == np.float32
    assert np.abs(predicted - targets).max() <= TOLERANCE


@pytest.mark.parametrize("case", REGRESSIONS, ids=str)
def test_regression_computes_what_onnxruntime_computes(case: Case) -> None:
    """Regressors times matrix plus bias is the operator's output at all positions."""
    assert_regression(ready(case))


@pytest.mark.parametrize("case", REGRESSIONS, ids=str)
def test_some_positions_are_rows_of_all(case: Case) -> None:
    """Regressors and targets of picked positions are those rows of all positions, in the order in which they were picked."""
    found = ready(case)
    y = found.run()
    n = found.view.positions(y.shape)
    picked = np.random.default_rng(3).integers(0, n, 7)
    whole = found.view.regressors(found.x, y.shape, np.arange(n))
    assert np.array_equal(found.view.regressors(found.x, y.shape, picked), whole[:, picked])
    assert np.array_equal(found.view.targets(y, picked), found.view.targets(y, np.arange(n))[:, picked])


@pytest.mark.parametrize("case", [c for c in REGRESSIONS if c.shapes[1 - c.weight][0] == 2], ids=str)
def test_samples_are_slowest(case: Case) -> None:
    """The first half of the positions comes from the first half of the samples alone."""
    found = ready(case)
    y = found.run()
    n, half = found.view.positions(y.shape), found.x.shape[0] // 2
    other = found.x.copy()
    other[half:] += 1
    before, after = (found.view.regressors(x, y.shape, np.arange(n)) for x in (found.x, other))
    assert np.array_equal(before[:, : n // 2], after[:, : n // 2])
    assert not np.array_equal(before[:, n // 2 :], after[:, n // 2 :])


@pytest.mark.parametrize("case", REGRESSIONS, ids=str)
def test_restore_undoes_matrix(case: Case) -> None:
    """A weight is what its matrix restores to, bit by bit, and keeps its shape."""
    found = ready(case)
    restored = found.view.restore(found.view.matrix(found.w))
    assert restored.shape == found.w.shape
    assert np.array_equal(restored, found.w)


@pytest.mark.parametrize("case", REGRESSIONS, ids=str)
def test_columns_name_the_channel_that_every_regressor_weighs(case: Case) -> None:
    """Zeroing an input channel of the weight zeroes just the rows of the matrix that carry its class."""
    found = ready(case)
    axis = found.view.input_axis
    size = found.w.shape[axis]
    grouped = found.view.blocks > 1 and case.op == "Conv"
    classes = (
        100 + np.arange(found.view.blocks * size).reshape(found.view.blocks, size) if grouped else 100 + np.arange(size)
    )
    columns = found.view.columns(classes)
    matrix = found.view.matrix(found.w)
    assert columns.shape == matrix.shape[:2]
    for block, index in np.ndindex(found.view.blocks if grouped else 1, size):
        weight = found.w.copy()
        rows = slice(block * weight.shape[0] // found.view.blocks, (block + 1) * weight.shape[0] // found.view.blocks)
        np.moveaxis(weight[rows] if grouped else weight, axis, 0)[index] = 0
        gone = ~found.view.matrix(weight).any(2)
        assert np.array_equal(gone, columns == (classes[block, index] if grouped else classes[index]))


def test_groups_may_read_the_same_classes() -> None:
    """Where groups share the classes of their inputs, these are given once, and stand in every block."""
    view = ready(conv("2d-groups", (2, 6, 5, 6), (4, 3, 3, 2), group=2)).view
    classes = np.array([7, 8, 9])
    assert np.array_equal(view.columns(classes), view.columns(np.stack([classes, classes])))


@pytest.mark.parametrize("case", REGRESSIONS, ids=str)
def test_regressors_of_a_class_see_that_channel_of_the_data(case: Case) -> None:
    """Changing one channel of the data changes regressors of its class and no other."""
    found = ready(case)
    y = found.run()
    every = np.arange(found.view.positions(y.shape))
    if case.op.startswith("Conv"):
        axis = 1
    else:
        axis = 0 if case.attributes.get("transA") else found.x.ndim - (1 if case.weight == 1 else 2)
    size = found.x.shape[axis]
    classes = np.arange(size)
    if found.view.blocks > 1 and case.op == "Conv":
        classes = classes.reshape(found.view.blocks, -1)
    columns = found.view.columns(classes)
    before = found.view.regressors(found.x, y.shape, every)
    for channel in range(size):
        x = found.x.copy()
        np.moveaxis(x, axis, 0)[channel] += 1
        moved = (found.view.regressors(x, y.shape, every) != before).any(1)
        assert moved.any()
        assert not moved[columns != channel].any()


@pytest.mark.parametrize("case", [c for c in REGRESSIONS if len(c.shapes) > 2], ids=str)
def test_bias_scale_is_the_slope_of_the_output(case: Case) -> None:
    """Adding one to a bias adds ``bias_scale`` to its channel of the output."""
    found = ready(case)
    assert found.view.bias == 2
    bias = found.arrays[2].copy()
    bias.reshape(-1)[1] += 1
    moved = found.run([*found.arrays[:2], bias]) - found.run()
    channels = np.moveaxis(moved, found.view.channel, 0)
    assert np.allclose(channels[1], found.view.bias_scale, atol=TOLERANCE)
    assert np.array_equal(channels[0], np.zeros_like(channels[0]))


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    """Convolutions with attributes that onnx allows."""
    rank = draw(st.integers(1, 3))
    each = lambda low, high: draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))  # noqa: E731
    group, inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel, size = each(1, 3), each(3, 7 if rank < 3 else 4)
    auto = draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    attributes: dict[str, Any] = {"group": group, "auto_pad": auto, "strides": each(1, 3)}
    attributes["dilations"] = each(1, 2) if not auto.startswith("SAME") else [1] * rank
    if auto == "NOTSET":
        attributes["pads"] = each(0, 2) + each(0, 2)
    w = (group * outer, inner, *kernel)
    pads = attributes.get("pads", [0] * 2 * rank)
    for d in range(rank):
        assume(size[d] + pads[d] + pads[rank + d] >= (kernel[d] - 1) * attributes["dilations"][d] + 1)
    return Case("Conv", "drawn", ((draw(st.integers(1, 2)), group * inner, *size), w, (w[0],)), attributes)


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> Case:
    """Transposed convolutions with attributes that onnx allows."""
    rank = draw(st.integers(1, 2))
    each = lambda low, high: draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))  # noqa: E731
    group, inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel, size, strides, dilations = each(1, 4), each(2, 5), each(1, 3), each(1, 2)
    attributes: dict[str, Any] = {"group": group, "strides": strides, "dilations": dilations}
    begins, ends = each(0, 2), each(0, 2)
    attributes["pads"] = begins + ends
    attributes["output_padding"] = [draw(st.integers(0, stride - 1)) for stride in strides]
    for d in range(rank):
        whole = strides[d] * (size[d] - 1) + (kernel[d] - 1) * dilations[d] + 1 + attributes["output_padding"][d]
        assume(whole - begins[d] - ends[d] >= 1)
    w = (group * inner, outer, *kernel)
    return Case("ConvTranspose", "drawn", ((draw(st.integers(1, 2)), w[0], *size), w, (group * outer,)), attributes)


@given(case=st.one_of(convolutions(), transposed_convolutions()), seed=st.integers(0, 99))
@settings(max_examples=120, deadline=None, derandomize=True)
def test_any_convolution_is_a_regression(case: Case, seed: int) -> None:
    """Whatever the attributes, the regression computes what onnxruntime computes, and restores its weight."""
    found = ready(case, seed)
    assert_regression(found)
    assert np.array_equal(found.view.restore(found.view.matrix(found.w)), found.w)


@pytest.mark.parametrize(
    ("node", "shapes"),
    [
        (Node("n", "Relu", "", ("x",), ("y",), {}), [None]),
        (Node("n", "MatMul", "", ("a", "b"), ("y",), {}), [None, None]),
        (Node("n", "MatMul", "", ("a", "b"), ("y",), {}), [None, (2, 3, 4)]),
        (Node("n", "MatMul", "", ("a", "b"), ("y",), {}), [(2, 3, 4), None]),
        (Node("n", "MatMul", "", ("a", "b"), ("y",), {}), [None, (3,)]),
        (Node("n", "Gemm", "", ("a", "b"), ("y",), {}), [(3, 4), None]),
        (Node("n", "Conv", "", ("x", "w"), ("y",), {}), [None, None]),
        (Node("n", "Conv", "com.example", ("x", "w"), ("y",), {}), [None, (4, 3, 1, 1)]),
    ],
    ids=["other-op", "two-computed", "stack-right", "stack-left", "vector", "gemm-left", "computed-kernel", "domain"],
)
def test_other_forms_are_no_regression(node: Node, shapes: list[tuple[int, ...] | None]) -> None:
    """An operator whose weight is computed, stacked, or of another domain is not fitted."""
    assert regression(node, lambda index: shapes[index]) is None
