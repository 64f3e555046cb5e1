"""Calibration data for a model, and scores of its channels: from that data, or from weights alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnxprune import data
from onnxprune.cost import Cost
from onnxprune.coupling import Coupling
from onnxprune.errors import UsageError
from onnxprune.ops.quantised import quantised, reads_quantised
from onnxprune.options import MEASURED, Options, Progress
from onnxprune.passes.allocate import allocate
from onnxprune.passes.calibrate import Consumer, Feeds, calibrate, n_samples
from onnxprune.passes.rank import by_activation, rank
from onnxprune.passes.score import Scores, score
from onnxprune.passes.select import PRESETS, removals
from onnxprune.passes.sensitivities import Sensitivities
from onnxprune.passes.weigh import weigh
from onnxprune.runtime import one_blas_thread

BATCH = 32


def load_feeds(coupling: Coupling, options: Options) -> tuple[Feeds, tuple[str, ...]]:
    """Load calibration data as feeds, and notes on what was decided; nothing where none is given.

    ``options.calib`` is a path (see :mod:`onnxprune.data`), arrays by input name with samples on axis 0, or a list of feeds.

    Raises
    ------
    UsageError
        The data does not fit the model.
    """
    calib = options.calib
    if calib is None:
        return (), ()
    inputs = {
        name: (shape, _numpy_type(coupling.model.types.get(name, onnx.TensorProto.FLOAT)))
        for name, shape in coupling.model.declared.items()
    }
    if isinstance(calib, Mapping):
        feeds: Feeds = _within(_batches(calib, inputs), coupling, options)
    elif isinstance(calib, Sequence) and not isinstance(calib, str):
        feeds = list(calib)
    else:
        loaded = data.load(calib, inputs, batch=BATCH, scale=options.scale, mean=options.mean, std=options.std)
        return _within(loaded.feeds, coupling, options) if loaded.batched else loaded.feeds, loaded.notes
    for feed in feeds:
        if missing := inputs.keys() - feed.keys():
            raise UsageError(
                f"calibration data: no array for input {min(missing)}; the model takes {', '.join(inputs)}"
            )
    if not feeds:
        raise UsageError("calibration data: holds no samples")
    return feeds, ()


def _within(feeds: Feeds, coupling: Coupling, options: Options) -> Feeds:
    """Cut feeds of a dynamic batch so that the tensors of one run stay far below the bound of memory."""
    model = coupling.model
    if any(shape and isinstance(shape[0], int) for shape in model.declared.values()):
        return feeds
    known = max(1, sum(math.prod(shape) for shape in model.input_shapes.values()))
    widest = max((math.prod(shape) for shape in model.shapes.values()), default=1)
    cut = []
    for feed in feeds:
        count = n_samples(feed)
        one = 4 * widest * sum(array.size for array in feed.values()) / count / known  # bytes of the widest tensor
        size = max(1, min(count, int(options.calib_memory / 32 / max(one, 1))))
        cut += [{n: a[k : k + size] for n, a in feed.items()} for k in range(0, count, size)]
    return cut


def _numpy_type(kind: int) -> np.dtype:
    narrow = (onnx.TensorProto.BFLOAT16,)
    return np.dtype(np.float32) if kind in narrow else np.dtype(helper.tensor_dtype_to_np_dtype(kind))


def _batches(arrays: Mapping[str, np.ndarray], inputs: Mapping[str, tuple]) -> list[dict[str, np.ndarray]]:
    """Cut arrays along their samples."""
    fixed = {shape[0] for shape, _ in inputs.values() if shape and isinstance(shape[0], int)}
    size = max(fixed, default=BATCH)
    count = min((len(array) for array in arrays.values()), default=0)
    ends = range(0, count - count % size if fixed else count, size)
    return [{name: array[begin : begin + size] for name, array in arrays.items()} for begin in ends]


def quantised_layers(coupling: Coupling) -> tuple[int, int]:
    """How many layers read quantised weights, and how many read weights at all."""
    weights = quantised(coupling.model)
    layers = {work.node.key: work.node for work in coupling.ledger.works if work.weight is not None}
    return sum(reads_quantised(node, coupling.model, weights) for node in layers.values()), len(layers)


def all_quantised(coupling: Coupling) -> bool:
    """Whether no layer has weights of floats, which alone are judged and fitted on calibration data."""
    n_quantised, n_layers = quantised_layers(coupling)
    return 0 < n_layers == n_quantised


@one_blas_thread()
def score_channels(
    loaded_proto: onnx.ModelProto, coupling: Coupling, cost: Cost, options: Options, feeds: Feeds, kinds: Sequence[str],
    progress: Progress, sha256: str = "",
) -> tuple[Scores, dict[str, Any], tuple[str, ...]]:  # fmt: skip
    """Score every channel by the criterion that the options choose; also say what was measured, and what was decided.

    Calibration judges layers with weights of floats. Where all are quantised, channels are scored by the norm of the real
    numbers that these stand for (``l2``).

    Parameters
    ----------
    kinds
        Kinds of cost that the budget limits.
    sha256
        Hash of the model's file, to tell whose sensitivities a table holds; empty where there is none.
    """
    criterion = options.criterion_for(bool(len(feeds)))
    if criterion not in MEASURED:
        return score(coupling, criterion, options.seed), {"criterion": criterion}, ()
    if not len(feeds):
        raise UsageError(f"--criterion {criterion} needs calibration data (--calib)")
    magnitude = score(coupling, "l2", options.seed)
    if all_quantised(coupling) and not options.sensitivity:
        return magnitude, {"criterion": "l2"}, ()
    consumers = calibrate(
        loaded_proto, coupling, feeds, memory=options.calib_memory, seed=options.seed, provider=options.provider,
        progress=lambda done, total: progress("calibrate", done, total),
    )  # fmt: skip
    facts: dict[str, Any] = {"criterion": criterion, "samples": sum(map(n_samples, feeds)), "layers": len(consumers)}
    notes = _still(consumers, criterion)
    if criterion != "obs":
        return by_activation(coupling, consumers, magnitude, weighted=criterion == "wanda"), facts, notes
    rankings = rank(coupling, consumers, magnitude)
    weights = np.ones(len(rankings))
    allocation = "sensitivity" if options.sensitivity else options.allocation
    if options.sensitivity:
        rankings = Sensitivities.read(options.sensitivity, sha256).applied(rankings)
    elif allocation == "sensitivity":
        macs = cost.total("mac", cost.counts(np.ones(coupling.n_classes, bool)))
        weights = weigh(
            loaded_proto, coupling, consumers, rankings, feeds, macs=macs, provider=options.provider,
            progress=lambda done, total: progress("weigh", done, total),
        )  # fmt: skip
    limits = options.limits(coupling)
    blocks = [removals(r.bundle, PRESETS["a"], limits) for r in rankings] if limits.in_blocks else None
    order = allocate(cost, rankings, weights, kinds, per_cost=allocation != "error", cuts=blocks)
    value = np.zeros(coupling.n_classes)
    for ranking, weight in zip(rankings, weights, strict=True):
        value[ranking.units] = (ranking.errors * weight)[:, None]
    return Scores(value, np.ones(coupling.n_classes, np.int64), order), facts | {"allocation": allocation}, notes


def _still(consumers: Sequence[Consumer], criterion: str) -> tuple[str, ...]:
    """Say which layers the data tells nothing about, because there it is constant (or zero, where only that matters)."""
    found = [c.node.title for c in consumers if not (c.varies if criterion == "obs" else c.gram[:, :-1, :-1].any())]
    if not found:
        return ()
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    why = "puts out the same" if criterion == "obs" else "sees zeros alone"
    return (
        f"whatever calibration sample comes, {', '.join(found[:3])}{more} {why}: weights alone rank what only these read",
    )
