"""Validate: the quality of a model on samples, and how much of it a change has cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxprune.data import Samples
from onnxprune.errors import ModelError, UsageError
from onnxprune.metrics import Metric, View, find
from onnxprune.runtime import Session

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Quality:
    """Mean of a metric over ``samples`` samples."""

    metric: str
    value: float
    samples: int
    higher_is_better: bool


def evaluate(
    session: Session,
    samples: Samples,
    metric: Metric | str,
    *,
    reference: Session | None = None,
    view: View | None = None,
    output: str | None = None,
    progress: Progress | None = None,
) -> Quality:
    """Run a model over samples, one feed at a time, and average a metric.

    Parameters
    ----------
    reference
        The original, whose outputs are wanted where ``metric`` needs a reference and the samples have no targets.
    view
        How outputs are read as pictures; as they are, with peak 1, by default.
    output
        Name of the output to judge; by default the first one that holds floats.
    progress
        Called after each feed with the samples done and their total.

    Raises
    ------
    UsageError
        The samples lack what the metric needs, or do not fit the outputs.
    ModelError
        The model cannot run, or predicts NaN.
    """
    metric = find(metric) if isinstance(metric, str) else metric
    view = view or View()
    if metric.needs == "label" and view.changes:
        raise UsageError(
            "residual output, clipping, cropping, luma and rounding are for pictures; "
            f"metric {metric.name} reads scores of classes"
        )
    stored = _stored(samples, metric, reference)
    name = output or _first_float(session, samples)
    if reference is not None and stored is None and name not in reference.outputs:
        raise UsageError(f"the reference model has no output {name!r}; it has {', '.join(reference.outputs)}")
    total, done = 0.0, 0
    for k, count in enumerate(samples.counts):
        prediction = _predict(session, samples, k, name, view)
        if stored is not None:
            wanted = stored[k]
        else:
            wanted = prediction if reference in (None, session) else _predict(reference, samples, k, name, view)
        total += _measure(metric, view, prediction, wanted, f"samples {done} to {done + count - 1}") * count
        done += count
        if progress is not None:
            progress(done, samples.n)
    return Quality(metric.name, total / done, done, metric.higher_is_better)


def drop(before: Quality, after: Quality) -> float:
    """How much worse ``after`` is, in units of the metric; negative where it is better."""
    if before.metric != after.metric:
        raise ValueError(f"qualities of different metrics do not compare: {before.metric}, {after.metric}")
    if before.value == after.value:  # also where both are infinite
        return 0.0
    return before.value - after.value if before.higher_is_better else after.value - before.value


def _stored(samples: Samples, metric: Metric, reference: Session | None) -> tuple[np.ndarray, ...] | None:
    """Find what the data says is wanted, one array per feed; None where the reference's outputs are."""
    stored = samples.labels if metric.needs == "label" else samples.targets
    if stored is None and metric.needs != "reference":
        raise UsageError(
            f"metric {metric.name} needs a {metric.needs} per sample, the data holds none; add an array "
            f"{metric.needs!r}, or use cosine or mse, which compare with the original model"
        )
    if stored is None and reference is None:
        raise UsageError(
            f"metric {metric.name} needs targets or a reference model; add an array 'target' to the data, or give the "
            "model to compare with"
        )
    return stored


def _first_float(session: Session, samples: Samples) -> str:
    """Name of the first output that holds floats, found by running the first feed."""
    for name, value in zip(session.outputs, session.run(samples.feeds[0]), strict=True):
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            return name
    raise UsageError(f"no output holds floats ({', '.join(session.outputs)}), so there is nothing to judge")


def _predict(session: Session, samples: Samples, k: int, name: str, view: View) -> np.ndarray:
    """Run feed ``k`` and return one prediction per sample on axis 0, without those that only fill up a batch."""
    feed = samples.feeds[k]
    entered = next(iter(feed.values()))
    (values,) = session.run(feed, [name])
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        raise UsageError(f"output {name!r} does not hold numbers; judge another output")
    if np.isnan(values).any():
        raise ModelError(f"output {name!r} holds NaN for feed {k}; the model cannot be judged on this data")
    values = view.predict(values, entered)
    if not samples.batched or (len(entered) == 1 and values.shape[:1] != (1,)):
        return values[None]
    if values.shape[:1] != entered.shape[:1]:
        raise UsageError(
            f"output {name!r} has shape {values.shape} for {len(entered)} samples fed together; its first axis must be "
            "the samples: feed them one at a time (batch 1)"
        )
    return values[: samples.counts[k]]


def _measure(metric: Metric, view: View, prediction: np.ndarray, wanted: np.ndarray, where: str) -> float:
    """Mean of the metric over the samples of one feed."""
    if metric.needs != "label":
        prediction, wanted = view.compared(prediction), view.compared(wanted)
    values = metric.function(prediction, wanted, **{name: getattr(view, name) for name in metric.options})
    value = float(np.mean(values, dtype=np.float64))
    if not np.isfinite(value):
        raise ModelError(f"metric {metric.name} is {value} for {where}; the model cannot be judged on this data")
    return value
