"""Calibrate: what reaches every linear operator of the original on calibration data, in one pass.

Per operator the second moments of its inputs (patches of a convolution, and a one for the bias) at sampled positions, the
weights that read them, and which channel every input belongs to. That is all that ranking needs; samples are streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx

from onnxprune.coupling import Coupling
from onnxprune.errors import ModelError
from onnxprune.model import Model, Node
from onnxprune.ops.regress import Regression, regression
from onnxprune.passes.trace import Memory, Trace

ROWS = 32
"""Sampled positions per regressor of an operator."""

LEAST_ROWS = 4096
MAX_REGRESSORS = 2400
"""Beyond it, moments are those of channels: a patch's taps then count as samples of one position."""

BEYOND = "NaN, infinite or too large to be squared on the calibration data; check the data and its scale"

ROUNDED = 1e-6
"""Share of the squared means of an operator's outputs below which their variance is that of rounding."""

Feeds = Sequence[Mapping[str, np.ndarray]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Consumer:
    """A linear operator that ends channels, and what reached it.

    Attributes
    ----------
    gram
        Mean of ``x x^T`` over sampled positions, the one last, float64 ``(blocks, p + 1, p + 1)``.
    matrix
        Weights that read them, float64 ``(blocks, p, q)``.
    columns
        Class of every regressor, int64 ``(blocks, p)``.
    fold
        Regressors of the operator that stand behind each of these, int64 ``(blocks, taps, p)``: one tap unless they
        were too many.
    """

    node: Node
    view: Regression
    weight: str
    bias: str | None
    gram: np.ndarray
    matrix: np.ndarray
    columns: np.ndarray
    fold: np.ndarray

    @property
    def varies(self) -> bool:
        """Whether the outputs vary over the samples by more than sums in float32 are rounded."""
        mean = self.gram[:, -1:, :-1] @ self.matrix
        return self.energy > ROUNDED * float(np.square(mean).sum())

    @cached_property
    def energy(self) -> float:
        """Mean over positions of the squared deviation of all outputs from their means."""
        p = self.matrix.shape[1]
        mean = self.gram[:, :p, p]
        centred = self.gram[:, :p, :p] - mean[:, :, None] * mean[:, None]
        return float(max(np.sum(self.matrix * (centred @ self.matrix)), 0.0))

    def unfold(self, matrix: np.ndarray) -> np.ndarray:
        """Put weights in the shape of ``matrix`` back into the order of the operator's own regressors."""
        blocks, taps, p = self.fold.shape
        q = matrix.shape[2] // taps
        whole = np.empty((blocks, taps * p, q))
        parts = matrix.reshape(blocks, p, taps, q).transpose(0, 2, 1, 3)
        np.put_along_axis(whole, self.fold.reshape(blocks, -1, 1), parts.reshape(blocks, -1, q), 1)
        return whole


def float_shape(model: Model, node: Node) -> Callable[[int], tuple[int, ...] | None]:
    """Tell the shapes of a node's inputs that are constants of floats."""

    def shape(index: int) -> tuple[int, ...] | None:
        constant = model.constant(node.inputs[index])
        return constant.shape if constant is not None and constant.floating else None

    return shape


def pick(n_rows: int, samples: int, quota: int, rng: np.random.Generator) -> np.ndarray:
    """Positions in order, ``quota`` of each sample at most."""
    each = n_rows // samples
    if quota >= each:  # also where there are fewer rows than samples
        return np.arange(n_rows)
    return np.concatenate([s * each + np.sort(rng.choice(each, quota, replace=False)) for s in range(samples)])


def n_samples(feed: Mapping[str, np.ndarray]) -> int:
    """Samples that a feed holds: the length of its first input's first axis."""
    first = next(iter(feed.values()))
    return first.shape[0] if first.ndim else 1


def calibrate(
    original: onnx.ModelProto, coupling: Coupling, feeds: Feeds, *, memory: int, seed: int = 0, provider: str = "",
    progress: Progress = lambda done, total: None,
) -> list[Consumer]:  # fmt: skip
    """Measure what reaches the linear operators that end prunable channels.

    Parameters
    ----------
    memory
        Bytes of live tensors that may be held between operators; samples beyond it are run again from their inputs.

    Raises
    ------
    ModelError
        The model does not run on the samples, or overflows.
    """
    found = list(_ending(coupling))
    widths = np.array([columns.shape[1] for *_, columns in found])
    limit = MAX_REGRESSORS
    while limit > 64 and sum(8 * w * w for w in np.where(widths > limit, 0, widths)) > memory / 4:
        limit //= 2
    trace = Trace(original, feeds, [node.key for node, *_ in found], Memory(memory // 2), provider)
    total = sum(map(n_samples, feeds))
    consumers, place = [], 0
    for number, (node, view, columns) in enumerate(found):
        progress(number, len(found))
        place = max(place, trace.place_of(node.key))
        fold = _fold(columns) if columns.shape[1] > limit else np.arange(columns.shape[1])[None, None]
        fold = np.broadcast_to(fold, (view.blocks, *fold.shape[1:]))
        quota = -(-max(LEAST_ROWS, ROWS * (fold.shape[2] + 1)) // total)
        gram, n = np.zeros((view.blocks, fold.shape[2] + 1, fold.shape[2] + 1)), 0
        for index in range(len(feeds)):
            x, y = trace.values(index, place, [node.inputs[view.data], node.key])
            positions = view.positions(y.shape)
            if not positions:
                continue
            rng = np.random.default_rng((seed, index, number))
            picked = pick(positions, n_samples(feeds[index]), quota, rng)
            rows = _folded(view.regressors(x, y.shape, picked), fold)
            p = rows.shape[2]
            with np.errstate(over="ignore", invalid="ignore"):  # found below
                gram[:, :p, :p] += rows.transpose(0, 2, 1) @ rows
                sums = rows.sum(1, dtype=np.float64)
                gram[:, :p, p] += sums
                gram[:, p, :p] += sums
                gram[:, p, p] += rows.shape[1]
            n += rows.shape[1]
        trace.release(node.key)
        if not n:
            continue
        if not np.isfinite(gram).all():
            raise ModelError(f"{node.title}: what reaches it is {BEYOND}")
        weight, bias = (coupling.model.constant(node.inputs[i]) if i is not None and node.has(i) else None
                        for i in (view.weight, view.bias))  # fmt: skip
        assert weight is not None
        whole = view.matrix(weight.load().astype(np.float64))
        matrix = np.take_along_axis(whole, fold.reshape(view.blocks, -1, 1), 1)
        matrix = matrix.reshape(*fold.shape, -1).transpose(0, 2, 1, 3).reshape(view.blocks, fold.shape[2], -1)
        classes = np.take_along_axis(columns, fold[:, 0], 1)
        consumers.append(
            Consumer(node, view, weight.name, bias.name if bias else None, gram / n, matrix, classes, fold)
        )
    progress(len(found), len(found))
    trace.close()
    return consumers


def _ending(coupling: Coupling) -> Iterator[tuple[Node, Regression, np.ndarray]]:
    """Linear operators whose weights end prunable channels, and the class of every regressor."""
    model = coupling.model
    for node in model.nodes:
        view = regression(node, float_shape(model, node))
        if view is None:
            continue
        axis = coupling.ledger.input(node, view.weight, ()).axes[view.input_axis]
        if len(axis) != 1 or axis[0].labels is None or axis[0].labels.ndim > 2:
            continue
        classes = coupling.classes[axis[0].labels]
        if not coupling.frozen[classes].all():
            yield node, view, view.columns(classes)


def _fold(columns: np.ndarray) -> np.ndarray:
    """Regressors of each class side by side, int64 ``(blocks, taps, classes)``; one tap where classes differ in number."""
    order = np.argsort(columns, axis=1, kind="stable")
    ranked = np.take_along_axis(columns, order, 1)
    counts = [np.unique(row, return_counts=True)[1] for row in ranked]
    taps = int(counts[0][0])
    if any((count != taps).any() for count in counts):
        return np.broadcast_to(np.arange(columns.shape[1]), (len(columns), 1, columns.shape[1]))
    return order.reshape(len(columns), -1, taps).transpose(0, 2, 1)


def _folded(rows: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Take taps as further rows: from ``(blocks, n, taps * p)`` to ``(blocks, n * taps, p)``."""
    blocks, taps, p = fold.shape
    if taps == 1 and np.array_equal(fold[0, 0], np.arange(p)):
        return rows
    order = fold.reshape(blocks, 1, -1)
    return np.take_along_axis(rows, order, 2).reshape(blocks, -1, p)
