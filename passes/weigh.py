"""Weigh: what an error inside the network does to its output, measured by running it.

For each bundle of channels, the original runs once more with the weights that its readers have after some of the channels
went (updated optimally, so that nothing else differs). How far the outputs move, over what ranking had predicted inside, is
the bundle's weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune import external
from onnxprune.coupling import Coupling
from onnxprune.ops.quantised import quantised
from onnxprune.passes.calibrate import Consumer, Feeds, n_samples
from onnxprune.passes.rank import Ranking
from onnxprune.protos import constant_tensor
from onnxprune.runtime import Session, in_float32

MAX_MACS = 2e10
"""Multiply-accumulates of one probe: more samples than that are left out."""

LEAST_SAMPLES = 1
Progress = Callable[[int, int], None]


def weigh(
    original: onnx.ModelProto, coupling: Coupling, consumers: Sequence[Consumer], rankings: Sequence[Ranking], feeds: Feeds,
    *, macs: float, provider: str = "", progress: Progress = lambda done, total: None,
) -> np.ndarray:  # fmt: skip
    """Relative error of the outputs per relative error inside, float64 ``(len(rankings),)``.

    Parameters
    ----------
    macs
        Multiply-accumulates of one sample, from which the number of samples follows.
    """
    feeds = _some(feeds, max(LEAST_SAMPLES, int(MAX_MACS / max(macs, 1))))
    probe = _Probe(original, coupling, consumers, provider)
    wanted = [probe.run(feed, {}) for feed in feeds]
    spread = spreads(wanted)
    weights = np.ones(len(rankings))
    for number, ranking in enumerate(rankings):
        progress(number, len(rankings))
        changes = probe.changes(ranking)
        if not changes:  # its channels are those of weights in a type that cannot be fed
            continue
        relative = relative_error((probe.run(feed, changes) for feed in feeds), wanted, spread)
        predicted = ranking.errors[: ranking.probe].sum()
        weights[number] = relative / predicted if predicted > 0 else 1.0
    finite = np.isfinite(weights)  # where a removal makes the outputs overflow, nothing weighs more
    weights[~finite] = weights[finite].max(initial=1.0)
    progress(len(rankings), len(rankings))
    return weights


def _some(feeds: Feeds, count: int) -> list[Mapping[str, np.ndarray]]:
    """Feeds of about ``count`` samples, spread over all."""
    total = sum(map(n_samples, feeds))
    if count >= total:
        return list(feeds)
    sizes = [n_samples(feed) for feed in feeds]
    wanted = max(1, round(len(feeds) * count / total))
    chosen = [feeds[i] for i in np.unique(np.linspace(0, len(feeds) - 1, wanted).astype(int))]
    if wanted > 1 or max(sizes) <= count or not all(array.shape[:1] == (sizes[0],) for array in feeds[0].values()):
        return chosen
    return [{name: array[:count] for name, array in chosen[0].items()}]


def float_outputs(session: Session, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run once; the outputs that hold floats."""
    return [v for v in session.run(feed) if isinstance(v, np.ndarray) and v.dtype.kind == "f"]


def spreads(wanted: Sequence[Sequence[np.ndarray]]) -> list[float]:
    """What the errors of each output are relative to; ``wanted`` holds the original's outputs for every feed."""
    return [_spread(values) for values in zip(*wanted, strict=True)]


def relative_error(
    given: Iterable[Sequence[np.ndarray]], wanted: Sequence[Sequence[np.ndarray]], spread: Sequence[float]
) -> float:
    """Squared error of every output over its spread, summed over outputs; those that do not vary are left out."""
    moved = np.zeros(len(spread))
    for have, want in zip(given, wanted, strict=True):
        moved += [_moved(h, w) for h, w in zip(have, want, strict=True)]
    return float(sum(m / s for m, s in zip(moved, spread, strict=True) if s > 0))


def _moved(have: np.ndarray, want: np.ndarray) -> float:
    """Sum of squared differences; infinite where only one is, nothing where both are (masks are written as infinity)."""
    with np.errstate(over="ignore", invalid="ignore"):
        apart = np.where(have == want, have.dtype.type(0), have - want)
    return float(np.square(apart, dtype=np.float64).sum())


def _spread(values: Sequence[np.ndarray]) -> float:
    """Squared deviation of an output from its mean over all samples and positions of each channel, where it is finite."""
    values = [v if np.isfinite(v).all() else v[np.isfinite(v)] for v in values]
    total = sum(np.square(v, dtype=np.float64).sum() for v in values)
    count = sum(v.size for v in values)
    mean = sum(v.sum(dtype=np.float64) for v in values) / max(count, 1)
    return float(total - count * mean * mean)


class _Probe:
    """The original, ready to run with other weights: initializers that are inputs, too, may be fed."""

    def __init__(
        self, original: onnx.ModelProto, coupling: Coupling, consumers: Sequence[Consumer], provider: str
    ) -> None:
        self.coupling = coupling
        self.by_key = {c.node.key: c for c in consumers}
        proto = onnx.ModelProto()
        proto.CopyFrom(in_float32(original) or original)
        graph = proto.graph
        for place in reversed(range(len(graph.node))):
            node = graph.node[place]
            tensor = constant_tensor(node) if node.op_type == "Constant" else None
            if tensor is not None and node.output[0] in coupling.model.constants:
                copy = graph.initializer.add()
                copy.CopyFrom(tensor)
                copy.name = node.output[0]
                del graph.node[place]
        self.biases = {c.node.key: c.bias for c in consumers if c.bias is not None}
        nodes = {node.output[0]: node for node in graph.node if node.output}
        for consumer in consumers:
            node, index = nodes.get(consumer.node.key), consumer.view.bias
            if consumer.bias is None and index is not None and node is not None:
                name = self.biases[consumer.node.key] = f"{consumer.node.key}/probed"
                while len(node.input) <= index:
                    node.input.append("")
                node.input[index] = name
                size = consumer.view.blocks * consumer.matrix.shape[2] // consumer.fold.shape[1]
                graph.initializer.append(numpy_helper.from_array(np.zeros(size, np.float32), name))
        self.values = {tensor.name: tensor for tensor in graph.initializer}
        listed = {value.name for value in graph.input}
        self.quantised = quantised(coupling.model)
        members = {member.tensor for member in coupling.members if self._zero(member.tensor) is not None}
        for name, tensor in self.values.items():
            if name not in listed and (name in members or name in self.biases.values()):
                graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
        proto.ir_version = max(proto.ir_version, 4)
        self.session = Session(proto, provider)

    def run(self, feed: Mapping[str, np.ndarray], changes: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs that hold floats."""
        entered = {name: value.astype(self.session.inputs[name][1], copy=False) for name, value in feed.items()}
        return float_outputs(self.session, {**entered, **changes})

    def changes(self, ranking: Ranking) -> dict[str, np.ndarray]:
        """Constants that differ after the removals that a ranking noted."""
        found: dict[str, np.ndarray] = {}
        for key, weights in ranking.weights.items():
            consumer = self.by_key[key]
            self._set(found, consumer.weight, consumer.view.restore(consumer.unfold(weights[:, :-1])))
            bias = self.biases.get(key)
            if bias is not None and consumer.fold.shape[1] == 1:
                old = external.array(self.values[bias]).astype(np.float64)
                self._set(found, bias, old + weights[:, -1].reshape(old.shape) / consumer.view.bias_scale)
        if not ranking.weights:
            gone = np.zeros(self.coupling.n_classes, bool)
            gone[ranking.units[: ranking.probe]] = True
            for member in self.coupling.members:
                zero = self._zero(member.tensor)
                if not member.ends and gone[member.classes].any() and member.tensor in self.values and zero is not None:
                    value = found.get(member.tensor)
                    value = external.array(self.values[member.tensor]) if value is None else value
                    self._set(found, member.tensor, _zeroed(value, member.axis, gone[member.classes], zero))
        return found

    def _zero(self, name: str) -> float | None:
        """What stands for zero in a constant; None where its scales do, or where it cannot be fed."""
        weight = self.quantised.get(name)
        if weight is None:
            return 0.0
        scalar = weight.scale is not None and weight.scale.size == 1
        if not scalar or weight.weight.itemsize < 1 or weight.weight.floating:
            return None
        return 0.0 if weight.zero is None else float(weight.zero.load().ravel()[0])

    def _set(self, found: dict[str, np.ndarray], name: str, value: np.ndarray) -> None:
        kind = helper.tensor_dtype_to_np_dtype(self.values[name].data_type)
        with np.errstate(over="ignore"):  # outputs are infinite then, and nothing weighs more
            found[name] = np.ascontiguousarray(value, kind)


def _zeroed(array: np.ndarray, axis: int, gone: np.ndarray, zero: float) -> np.ndarray:
    """A constant without the channels of one axis; ``gone`` of shape ``(size,)``, or a row for every block of axis 0."""
    array = array.copy()
    blocks = np.split(array, len(gone)) if gone.ndim > 1 else [array]
    for block, mask in zip(blocks, np.atleast_2d(gone), strict=True):
        block[(slice(None),) * axis + (mask,)] = zero
    return array
