"""Validate: the quality of a model on samples, and how much of it a change has cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.data import Samples
from onnxprune.errors import ModelError, UsageError
from onnxprune.metrics import Metric, View, find
from onnxprune.runtime import Session

Progress = Callable[[int, int], None]
Note = Callable[[str], None]


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
    metric: Metric | Callable | str,
    *,
    reference: Session | None = None,
    view: View | None = None,
    output: str | None = None,
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> Quality:
    """Run a model over samples, one feed at a time, and average a metric.

    Parameters
    ----------
    metric
        A name, a function, or a metric: what :func:`onnxprune.metrics.find` takes.
    reference
        The original, whose outputs are wanted where ``metric`` needs the original, or needs a reference and the samples
        have no targets. It may be ``session`` itself, which then runs once.
    view
        How outputs are read as pictures; as they are, with peak 1, by default.
    output
        Name of the output to judge; by default the first one that holds floats.
    progress
        Called after each feed with the samples done and their total.
    note
        Told what was decided on the user's behalf.

    Raises
    ------
    UsageError
        The samples lack what the metric needs, or do not fit the outputs.
    ModelError
        The model cannot run, or predicts NaN.
    """
    (quality,) = _judge((session,), samples, metric, reference, view, output, progress, note)
    return quality


def compare(
    before: Session,
    after: Session,
    samples: Samples,
    metric: Metric | Callable | str,
    *,
    view: View | None = None,
    output: str | None = None,
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> tuple[Quality, Quality]:
    """Judge an original and what was made of it, running each once; the original is the reference of both.

    Parameters and errors are those of :func:`evaluate`.
    """
    first, second = _judge((before, after), samples, metric, before, view, output, progress, note)
    return first, second


@np.errstate(over="ignore", invalid="ignore")  # outputs may be infinite; a metric that is not finite is refused
def _judge(
    sessions: Sequence[Session],
    samples: Samples,
    metric: Metric | Callable | str,
    reference: Session | None,
    view: View | None,
    output: str | None,
    progress: Progress | None,
    note: Note,
) -> list[Quality]:
    metric, view = find(metric), view or View()
    metric.check(view)
    stored = _stored(samples, metric, reference)
    name = output or _first_float(sessions[0], samples)
    runs = list(dict.fromkeys([*sessions, *([reference] if reference is not None and stored is None else [])]))
    for session in runs:
        if name not in session.outputs:
            which = "reference model" if session is reference else "model"
            raise UsageError(f"the {which} has no output {name!r}; it has {', '.join(session.outputs)}")
    values: list[list[np.ndarray]] = [[] for _ in sessions]
    low, high, done = np.inf, -np.inf, 0
    for k, count in enumerate(samples.counts):
        predictions = {session: _predict(session, samples, k, name, view) for session in runs}
        wanted = stored[k] if stored is not None else predictions[reference]  # type: ignore[index]
        if not metric.of_classes:
            predictions = {session: view.compared(prediction) for session, prediction in predictions.items()}
            wanted = view.compared(wanted)
        if metric.finish is not None:
            low, high = min(low, float(wanted.min())), max(high, float(wanted.max()))
        for found, session in zip(values, sessions, strict=True):
            found.append(_measure(metric, view, predictions[session], wanted, f"samples {done} to {done + count - 1}"))
        done += count
        if progress is not None:
            progress(done, samples.n)
    per_sample = [np.concatenate(found) for found in values]
    if metric.finish is not None:
        peak = view.data_range or _own_range(metric, low, high, note)
        per_sample = [metric.finish(errors, peak) for errors in per_sample]
    return [Quality(metric.name, float(one.mean()), done, metric.higher_is_better) for one in per_sample]


def predictions(
    before: Session, after: Session, samples: Samples, view: View, limit: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """What two models make of the first ``limit`` samples, one at a time, and what is wanted where the data has targets."""
    name, left = _first_float(before, samples), limit
    for k, count in enumerate(samples.counts):
        if left <= 0:
            return
        first, second = (_predict(session, samples, k, name, view) for session in (before, after))
        for row in range(min(count, left)):
            yield first[row], second[row], samples.targets[k][row] if samples.targets is not None else None
        left -= count


def _own_range(metric: Metric, low: float, high: float, note: Note) -> float:
    """Range of the original's outputs over the data, which a network that computes no pictures has for a peak."""
    if not 0 < high - low < np.inf:
        raise UsageError(
            f"metric {metric.name}: the original's output reaches from {low:g} to {high:g}; give a data range"
        )
    note(
        f"{metric.name}: peak {high - low:.6g}, the range of the original's output on this data; a data range fixes it"
    )
    return high - low


def drop(before: Quality, after: Quality) -> float:
    """How much worse ``after`` is, in units of the metric; negative where it is better."""
    if before.metric != after.metric:
        raise ValueError(f"qualities of different metrics do not compare: {before.metric}, {after.metric}")
    if before.value == after.value:  # also where both are infinite
        return 0.0
    return before.value - after.value if before.higher_is_better else after.value - before.value


def _stored(samples: Samples, metric: Metric, reference: Session | None) -> tuple[np.ndarray, ...] | None:
    """Find what the data says is wanted, one array per feed; None where the original's outputs are."""
    if metric.needs == "original":
        if reference is None:
            raise UsageError(f"metric {metric.name} compares with the original model; give it as the reference model")
        return None
    stored = samples.labels if metric.needs == "label" else samples.targets
    if stored is None and metric.needs != "reference":
        other = "agreement-top1" if metric.needs == "label" else "agreement-psnr, cosine or mse"
        raise UsageError(
            f"metric {metric.name} needs a {metric.needs} per sample, the data holds none; add an array "
            f"{metric.needs!r}, or use {other} to compare with the original model"
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


def _measure(metric: Metric, view: View, prediction: np.ndarray, wanted: np.ndarray, where: str) -> np.ndarray:
    """Compute the metric of each sample of one feed."""
    options = {name: getattr(view, name) for name in metric.options}
    values = np.asarray(metric.function(prediction, wanted, **options))
    if values.shape != prediction.shape[:1] or values.dtype.kind not in "biuf":
        raise UsageError(
            f"metric {metric.name} returns {values.dtype} of shape {values.shape} for {len(prediction)} samples; "
            "it must return one number per sample"
        )
    if not np.isfinite(values).all():
        value = float(np.mean(values, dtype=np.float64))
        raise ModelError(f"metric {metric.name} is {value} for {where}; the model cannot be judged on this data")
    return values.astype(np.float64)
