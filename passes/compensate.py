"""Compensate: fit what is left of the weights to what the original computed, from the inputs to the outputs.

Every linear operator whose input lost channels, or carries what earlier losses changed, is solved in turn: its inputs come
from the pruned graph as compensated so far, its target is the original's value. Where a branch joins a residual stream, the
target is the sum, so that the branch makes up for what the stream lost; where a rectifier follows, the error is measured
behind it. Normalisations that no solved operator stands before get their statistics or scales fitted. Structure never
changes: values of weights do, and biases are added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import onnx

from onnxprune.amend import AddedBias
from onnxprune.coupling import Coupling
from onnxprune.errors import ModelError
from onnxprune.model import Model, Node
from onnxprune.ops.regress import Regression
from onnxprune.passes.calibrate import BEYOND, Feeds, n_samples, pick
from onnxprune.passes.least_squares import Fit, Rows, Weights, fit
from onnxprune.passes.pairs import RIDGE, PairRows, refine
from onnxprune.passes.trace import Memory, Trace
from onnxprune.passes.units import Rescaled, Unit, find
from onnxprune.protos import constant_tensor

ROWS = 48
"""Sampled positions per unknown of an operator's regression."""

LEAST_ROWS = 8192
PAIR_ROWS = 6000
"""Sampled positions of a pair's second operator."""

HELD_BACK = 5
"""Every fifth sample judges instead of training."""

Mode = Literal["least-squares", "bias"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """What became of one operator: mean squared error at the place where it is judged, on samples held back.

    ``ridge`` is infinite, and ``note`` says why, where its weights stayed as they were.
    """

    node: str
    op: str
    error_before: float
    error: float
    ridge: float
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Compensation:
    """New values by constant of the pruned graph, biases that were added, and what happened to every operator."""

    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    added: Mapping[str, AddedBias] = field(default_factory=dict)
    solved: tuple[Solved, ...] = ()
    held_back: int = 0


def compensate(
    original: onnx.ModelProto, coupling: Coupling, pruned: onnx.ModelProto, pruned_model: Model, file: onnx.ModelProto,
    keep: np.ndarray, feeds: Feeds, *, mode: Mode = "least-squares", memory: int = 2 << 30, new_nodes: bool = True,
    seed: int = 0, provider: str = "", progress: Progress = lambda done, total: None,
) -> Compensation:  # fmt: skip
    """Solve every operator that pruning disturbs.

    Parameters
    ----------
    original, pruned
        The graphs as they are reasoned about (control flow laid out, functions inlined).
    file
        The pruned model as it will be written: constants and nodes outside its main graph stay as they are.
    keep
        Which channels ``pruned`` keeps, bool per class.
    mode
        ``bias`` changes offsets only: it replaces what is lost by its mean.
    memory
        Bytes of live tensors and of sampled rows that may be held.
    new_nodes
        Whether a product without a bias may get an Add node.
    """
    writable = {tensor.name for tensor in file.graph.initializer} | {
        node.output[0] for node in file.graph.node if node.op_type == "Constant" and constant_tensor(node) is not None
    }
    inner = {node.output[0] for node in file.graph.node if node.output}
    units, left = find(coupling, pruned_model, keep, writable, inner, new_nodes=new_nodes)
    run = _Run(original, coupling, pruned, pruned_model, keep, feeds, units, mode, memory, seed, provider)
    solved = []
    for number, unit in enumerate(units):
        progress(number, len(units))
        solved.append(run.solve(number, unit))
    progress(len(units), len(units))
    run.close()
    solved += [Solved(node.title, node.op, np.nan, np.nan, np.inf, f"left: {reason}") for node, reason in left]
    return Compensation(run.values, run.added, tuple(solved), run.n_judging)


class _Run:
    """Two graphs on their way through the samples, and what has been solved so far."""

    def __init__(
        self, original: onnx.ModelProto, coupling: Coupling, pruned: onnx.ModelProto, pruned_model: Model, keep: np.ndarray,
        feeds: Feeds, units: Sequence[Unit | Rescaled], mode: Mode, memory: int, seed: int, provider: str,
    ) -> None:  # fmt: skip
        self.coupling, self.model, self.keep, self.feeds = coupling, pruned_model, keep, feeds
        self.mode, self.seed, self.units = mode, seed, units
        held = Memory(memory // 2)
        watched = [name for unit in units for name in _watched(unit)]
        self.teacher = Trace(original, feeds, watched, held, provider)
        self.student = Trace(pruned, feeds, (), held, provider)
        self.row_bytes = memory // 8  # of rows as they are; fitting takes up to four times that
        self.front = 0
        self.values: dict[str, np.ndarray] = {}
        self.added: dict[str, AddedBias] = {}
        counts = [n_samples(feed) for feed in feeds]
        self.total = sum(counts)
        self.first = np.concatenate([[0], np.cumsum(counts)])
        judges = np.arange(self.total) % HELD_BACK == HELD_BACK // 2
        self.judges = judges if self.total > 1 and judges.any() else np.zeros(self.total, bool)
        self.n_judging = int(self.judges.sum())

    def close(self) -> None:
        """Give back all memory."""
        self.teacher.close()
        self.student.close()

    def solve(self, number: int, unit: Unit | Rescaled) -> Solved:
        """Fit one unit, and let the pruned graph go on with the result."""
        self.front = max(self.front, *(self.teacher.place_of(name) for name in _watched(unit)))
        if isinstance(unit, Rescaled):
            found = self._rescale(number, unit)
        elif len(unit.uses) > 1:
            found = self._shared(number, unit)
        else:
            found = self._linear(number, unit)
        for name in _watched(unit):
            self.teacher.release(name)
        if not np.isfinite(found.error_before):
            raise ModelError(f"{unit.node.title}: what reaches it, or what it computes, is {BEYOND}")
        note = "" if np.isfinite(found.ridge) else f"unchanged: {found.note}"
        return Solved(unit.node.title, unit.node.op, found.error_before, found.error, found.ridge, note)

    # -- rows --------------------------------------------------------------------------------------------------------

    def _picked(self, number: int, index: int, positions: int, quota: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, index, number))
        return pick(positions, n_samples(self.feeds[index]), quota, rng)

    def _images(self, index: int, picked: np.ndarray, positions: int) -> np.ndarray:
        """Which sample each position belongs to; nearly, where an axis in front of the samples makes that unclear."""
        count = n_samples(self.feeds[index])
        return self.first[index] + np.minimum(picked * count // positions, count - 1)

    def _quota(self, unknowns: int, width: int) -> int:
        """Positions per sample; ``width`` numbers are stored for each."""
        wanted = max(LEAST_ROWS, ROWS * (unknowns + 1))
        return max(1, min(-(-wanted // self.total), self.row_bytes // (4 * width * self.total)))

    def _target(self, index: int, name: str) -> np.ndarray:
        (value,) = self.teacher.values(index, self.front, [name])
        return self.coupling.extract(self.coupling.axes(name), self.keep, value)

    def _sorted(self, parts: Sequence[tuple[np.ndarray, ...]], images: Sequence[np.ndarray]) -> Rows:
        """Put training rows first; ``parts`` hold regressors, targets and what is added (or nothing)."""
        judging = self.judges[np.concatenate(images)]
        order = np.argsort(judging, kind="stable")
        joined = [np.concatenate(arrays, 1)[:, order] for arrays in zip(*parts, strict=True)]
        return Rows(joined[0], joined[1], joined[2] if len(joined) > 2 else None, int((~judging).sum()))

    # -- operators ---------------------------------------------------------------------------------------------------

    def _linear(self, number: int, unit: Unit) -> Fit:
        view, parts, images, quota = unit.view, [], [], 0
        names = [unit.node.inputs[view.data], *([unit.skip] if unit.skip else [])]
        for index in range(len(self.feeds)):
            y = self._target(index, unit.watch)
            x, *skip = self.student.values(index, self.student.place_before(unit.node.key), names)
            positions = view.positions(y.shape)
            if not positions:
                continue
            quota = quota or self._quota(*self._widths(view, x, y))
            picked = self._picked(number, index, positions, quota)
            parts.append((view.regressors(x, y.shape, picked), *(view.targets(a, picked) for a in (y, *skip))))
            images.append(self._images(index, picked, positions))
        rows = self._sorted(parts, images)
        old = self._old(unit.weight)
        matrix = view.matrix(old)
        shape = matrix.shape[0], matrix.shape[2]
        gain, shift = self._behind(unit, shape)
        bias = self._old_bias(unit, shape)
        free_offset = unit.bias is not None or unit.norm is not None
        found = fit(
            rows, matrix * gain[:, None], bias * gain + shift, unit.rectifier,
            free_matrix=self.mode == "least-squares", free_offset=free_offset,
        )  # fmt: skip
        if self.mode == "least-squares" and (follower := self._follower(number, unit)) is not None:
            found = self._paired(number, unit, follower, found)
        if np.isfinite(found.ridge):
            alive = np.abs(gain) > 1e-12
            safe = np.where(alive, gain, 1.0)
            fresh = np.where(alive[:, None], found.matrix / safe[:, None], matrix)
            offset = np.where(alive, (found.offset - shift) / safe, bias)
            if not self._fits(unit.weight, fresh, offset):
                return _beyond(found)
            if self.mode == "least-squares":
                self._set(unit.weight, view.restore(fresh))
            if free_offset:
                self._set_bias(unit, bias, offset)
        return found

    def _follower(self, number: int, unit: Unit) -> Unit | None:
        """The unit that alone reads what this one puts out, where the two can be fitted as a pair."""
        if unit.view.blocks > 1 or unit.skip is not None:
            return None
        name = unit.watch
        edges = self.model.consumers.get(name, ())
        if unit.rectifier is not None:
            name = edges[0][0].key
            edges = self.model.consumers.get(name, ())
        if len(edges) != 1 or name in self.model.outputs:
            return None
        node, index = edges[0]
        for other in self.units[number + 1 :]:
            if isinstance(other, Unit) and other.node is node:
                fits = other.view.data == index and other.view.blocks == 1 and len(other.uses) == 1
                made = self.model.producer.get(other.skip) if other.skip else None
                early = made is None or self.student.place_of(made.key) <= self.student.place_before(unit.node.key)
                return other if fits and early else None
        return None

    def _paired(self, number: int, unit: Unit, other: Unit, found: Fit) -> Fit:
        """Fit a unit and its only reader together; the reader is solved again in its turn, beginning from the result."""
        view, parts, images, quota = unit.view, [], [], 0
        self.front = max(self.front, self.teacher.place_of(other.watch))
        names = [unit.node.inputs[view.data], *([other.skip] if other.skip else [])]
        for index in range(len(self.feeds)):
            y, hidden = self._target(index, other.watch), self._target(index, unit.watch)
            x, *skip = self.student.values(index, self.student.place_before(unit.node.key), names)
            positions = other.view.positions(y.shape)
            sources = other.view.sources(hidden.shape, y.shape, np.zeros(1, np.int64))
            width = sources.shape[1] * (self._widths(view, x, hidden)[0] + 4 * hidden.shape[view.channel])
            quota = quota or min(-(-PAIR_ROWS // self.total), max(1, self.row_bytes // (4 * width * self.total)))
            picked = self._picked(number + 100_000, index, positions, quota)
            sources = other.view.sources(hidden.shape, y.shape, picked)
            rows = view.regressors(x, hidden.shape, np.maximum(sources.ravel(), 0))[0]
            parts.append(
                (rows.reshape(len(picked), -1), (sources >= 0), *(other.view.targets(a, picked)[0] for a in (y, *skip)))
            )
            images.append(self._images(index, picked, positions))
        judging = self.judges[np.concatenate(images)]
        order = np.argsort(judging, kind="stable")
        joined = [np.concatenate(arrays)[order] for arrays in zip(*parts, strict=True)]
        taps = joined[1].shape[1]
        rows = PairRows(
            joined[0].reshape(len(order) * taps, -1), joined[1].ravel(), joined[2], joined[3] if len(joined) > 3 else None,
            int((~judging).sum()),
        )  # fmt: skip
        matrix = other.view.matrix(self._old(other.weight))
        shape = matrix.shape[0], matrix.shape[2]
        gain, shift = self._behind(other, shape)
        bias = self._old_bias(other, shape)
        alive = np.abs(gain) > 1e-12
        free = [each.bias is not None or each.norm is not None for each in (unit, other)]
        if not alive.all():
            return found
        refined = refine(
            rows, Weights(found.matrix, found.offset), unit.rectifier, Weights(matrix * gain[:, None], bias * gain + shift),
            other.rectifier, free_offsets=(free[0], free[1]),
        )  # fmt: skip
        fresh, offset = refined.second.matrix / gain[:, None], (refined.second.offset - shift) / gain
        if not refined.error < refined.error_before or not self._fits(other.weight, fresh, offset):
            return found
        self._set(other.weight, other.view.restore(fresh))
        if (free[1] and self._given_bias(other) is not None) or other.norm is not None:
            self._set_bias(other, bias, offset)
        return Fit(refined.first.matrix, refined.first.offset, found.error_before, found.error, min(found.ridge, RIDGE))

    @staticmethod
    def _widths(view: Regression, x: np.ndarray, y: np.ndarray) -> tuple[int, int]:
        """Unknowns per output, and numbers stored per position."""
        x_width = view.regressors(x, y.shape, np.zeros(1, np.int64)).shape[2]
        return x_width, view.blocks * (x_width + 2 * view.targets(y, np.zeros(1, np.int64)).shape[2])

    def _shared(self, number: int, unit: Unit) -> Fit:
        """Weights that several nodes read: one solution for all, from the original's own inputs, cut to what is kept."""
        view, parts, images, quota = unit.view, [], [], 0
        for place, use in enumerate(unit.uses):
            name = use.inputs[view.data]
            for index in range(len(self.feeds)):
                y, x = self._target(index, use.key), self._target(index, name)
                positions = view.positions(y.shape)
                quota = quota or -(-self._quota(*self._widths(view, x, y)) // len(unit.uses))
                picked = self._picked(number + 1000 * place, index, positions, quota)
                offset = self._use_bias(use, view)
                parts.append((view.regressors(x, y.shape, picked), view.targets(y, picked) - offset[:, None]))
                images.append(self._images(index, picked, positions))
        old = self._old(unit.weight)
        matrix = view.matrix(old)
        zero = np.zeros((matrix.shape[0], matrix.shape[2]))
        found = fit(
            self._sorted(parts, images), matrix, zero, free_matrix=self.mode == "least-squares", free_offset=False
        )
        if np.isfinite(found.ridge):
            if not self._fits(unit.weight, found.matrix):
                return _beyond(found)
            self._set(unit.weight, view.restore(found.matrix))
        return found

    def _use_bias(self, use: Node, view: Regression) -> np.ndarray:
        constant = self.model.constant(use.inputs[view.bias]) if view.bias is not None and use.has(view.bias) else None
        if constant is None:
            return np.zeros((view.blocks, 1), np.float32)
        return (view.bias_scale * constant.load().astype(np.float32)).reshape(view.blocks, -1)

    def _rescale(self, number: int, unit: Rescaled) -> Fit:
        """Fit a scale and an offset per channel to a normalisation's output."""
        view, parts, images, quota = unit.view, [], [], 0
        for index in range(len(self.feeds)):
            y = self._target(index, unit.watch)
            (own,) = self.student.values(index, self.student.place_of(unit.node.key), [unit.node.key], stay=True)
            positions = view.positions(y.shape)
            quota = quota or self._quota(1, 3 * y.shape[view.channel])
            picked = self._picked(number, index, positions, quota)
            parts.append((view.rows(own, picked), view.rows(y, picked)))
            images.append(self._images(index, picked, positions))
        rows = self._sorted(parts, images)
        channels = rows.x.shape[0]
        ones, zeros = np.ones((channels, 1, 1)), np.zeros((channels, 1))
        found = fit(rows, ones, zeros, free_matrix=self.mode == "least-squares", free_offset=view.has_offset)
        names = [self._root(unit.node.inputs[index]) for index in view.parameters]
        if np.isfinite(found.ridge):
            fresh = view.refit([self._old(name) for name in names], found.matrix.ravel(), found.offset.ravel()) or ()
            if not all(self._fits(name, value) for name, value in zip(names, fresh, strict=False)):
                return _beyond(found)
            for name, value in zip(names, fresh, strict=False):
                self._set(name, value)
        return found

    # -- constants ---------------------------------------------------------------------------------------------------

    def _root(self, name: str) -> str:
        return self.model.aliases.get(name, name)

    def _old(self, name: str) -> np.ndarray:
        known = self.values.get(name)
        return self.model.constants[name].load().astype(np.float64) if known is None else known.astype(np.float64)

    def _fits(self, name: str, *values: np.ndarray) -> bool:
        """Whether values lie within the range of a constant's type."""
        dtype = self.model.constants[name].load().dtype
        with np.errstate(over="ignore"):
            return all(np.isfinite(value.astype(dtype)).all() for value in values)

    def _set(self, name: str, value: np.ndarray) -> None:
        self.values[name] = np.asarray(value).astype(self.model.constants[name].load().dtype)
        self.student.replace(name, self.values[name])

    def _behind(self, unit: Unit, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Factor and offset per output channel between the operator and the place where it is judged."""
        if unit.norm is None:
            return np.full(shape, unit.factor), np.zeros(shape)
        scale, offset, mean, variance = (self._old(self._root(name)) for name in unit.norm.inputs[1:5])
        gain = scale / np.sqrt(variance + float(unit.norm.attributes.get("epsilon", 1e-5)))
        return gain.reshape(shape), (offset - mean * gain).reshape(shape)

    def _old_bias(self, unit: Unit, shape: tuple[int, int]) -> np.ndarray:
        """What the operator adds per output channel."""
        bias = self._given_bias(unit)
        if bias is None:
            return np.zeros(shape)
        assert unit.bias is not None
        return unit.bias.factor * bias.reshape(shape)

    def _given_bias(self, unit: Unit) -> np.ndarray | None:
        bias = unit.bias
        if bias is None:
            index = unit.view.bias
            given = self.model.constant(unit.node.inputs[index]) if index is not None and unit.node.has(index) else None
            return None if given is None else unit.view.bias_scale * given.load().astype(np.float64)
        given = bias.index >= 0 and bias.node.has(bias.index)
        return self._old(self._root(bias.node.inputs[bias.index])) if given else None

    def _set_bias(self, unit: Unit, old: np.ndarray, new: np.ndarray) -> None:
        """Write an offset where it is read alone, into a BatchNormalization's mean, or as a constant of its own."""
        bias = unit.bias
        if unit.norm is not None:
            name = self._root(unit.norm.inputs[3])
            mean = self._old(name)
            self._set(name, mean - (new - old).reshape(mean.shape))
            return
        assert bias is not None
        dtype = self.model.constants[unit.weight].load().dtype
        given = bias.node.inputs[bias.index] if bias.index >= 0 and bias.node.has(bias.index) else ""
        value = new / bias.factor
        if given and self._alone(given):
            root = self._root(given)
            self._set(root, value.reshape(self.model.constants[root].shape))
            return
        shape = self.model.constants[self._root(given)].shape if given else (value.size,)
        name = f"{bias.node.key}/bias"
        added = AddedBias(
            bias.node.key, bias.index if bias.index >= 0 else None, given, value.reshape(shape).astype(dtype)
        )
        self.added[name] = added
        if added.index is None:
            self.student.add_behind(bias.node.key, name, added.value)
        else:
            self.student.rewire(bias.node.key, added.index, name, added.value)

    def _alone(self, name: str) -> bool:
        """Whether a constant is read once only, and can be set."""
        root = self._root(name)
        readers = [n for n in self.model.nodes for i in (*n.inputs, *n.captured) if self._root(i) == root and i]
        real = [n for n in readers if n.key not in self.model.aliases]
        return len(real) == 1 and root not in self.model.outputs


def _beyond(found: Fit) -> Fit:
    """Say that nothing was changed, because the type of the weights cannot hold what was found."""
    return replace(
        found, error=found.error_before, ridge=np.inf, note="the fitted values exceed the type of the weights"
    )


def _watched(unit: Unit | Rescaled) -> list[str]:
    if isinstance(unit, Unit) and len(unit.uses) > 1:
        return [name for use in unit.uses for name in (use.key, use.inputs[unit.view.data])]
    return [unit.watch]
