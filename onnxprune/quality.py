"""Measure models: quality on data, the quality guard, latency."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnxprune import data, onnx_io, runtime
from onnxprune.data import Part
from onnxprune.errors import UsageError
from onnxprune.metrics import Metric, View
from onnxprune.metrics import find as find_metric
from onnxprune.options import ModelLike, Progress, silent
from onnxprune.passes import validate
from onnxprune.passes.validate import Note, Quality
from onnxprune.report import Report
from onnxprune.report.pictures import Picture, worst
from onnxprune.stopwatch import Race


def silent_note(text: str) -> None:
    """Keep a note to oneself."""


@dataclass(frozen=True)
class Reading(View):
    """How data enters a model and how its output is read: see :func:`onnxprune.data.load` and ``metrics.View``."""

    scale: float | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


def evaluate(
    model: ModelLike,
    data_path: str | os.PathLike,
    metric: Metric | Callable | str,
    *,
    reference: ModelLike | None = None,
    reading: Reading | None = None,
    part: Part = "all",
    provider: str = "",
    threads: int = 0,
    progress: Progress = silent,
    note: Note = silent_note,
) -> Quality:
    """Measure the quality of a model on a data set (see :mod:`onnxprune.data` for what it may be).

    Parameters
    ----------
    metric
        A name (``module:function`` names one of your own), a function, or a :class:`onnxprune.metrics.Metric`.
    reference
        Original to compare with, where ``metric`` measures agreement, or likeness and the data has no targets.
    part
        ``search`` and ``check`` are two halves of the data with no sample in common; see :func:`onnxprune.data.halves`.
    provider, threads
        As in :class:`onnxprune.Options`.
    note
        Told what was decided on the user's behalf.
    """
    metric, reading = find_metric(metric), reading or Reading()
    with runtime.threads_limited(threads):
        session = _session(model, provider)
        other = session if _same(model, reference) else _session(reference, provider) if reference is not None else None
    for text in runtime.provider_notes(provider):
        note(text)
    return validate.evaluate(
        session,
        _samples(data_path, session, reading, part, note),
        metric,
        reference=other,
        view=reading,
        progress=lambda done, total: progress("evaluate", done, total),
        note=note,
    )


def compare_quality(
    before: ModelLike,
    after: ModelLike,
    data_path: str | os.PathLike | None,
    metric: Metric | Callable | str | None,
    *,
    reading: Reading | None = None,
    part: Part = "all",
    provider: str = "",
    progress: Progress = silent,
    note: Note = silent_note,
) -> tuple[Quality, Quality] | None:
    """Quality of an original and what was made of it on the same data; None where no data is given.

    Each model runs once, also where the metric compares with the original. Parameters are those of :func:`evaluate`.
    """
    if data_path is None or metric is None:
        return None
    metric, reading = find_metric(metric), reading or Reading()
    first, second = _session(before, provider), _session(after, provider)
    return validate.compare(
        first,
        second,
        _samples(data_path, first, reading, part, note),
        metric,
        view=reading,
        progress=lambda done, total: progress("evaluate", done, total),
        note=note,
    )


def compare_pictures(
    before: ModelLike, after: ModelLike, data_path: str | os.PathLike, metric: Metric | Callable | str,
    reading: Reading | None = None, provider: str = "",
) -> tuple[Picture, ...]:  # fmt: skip
    """Show where outputs differ most on the first :data:`LOOKED_AT` samples; nothing where they are no pictures.

    White is the data range where one is given or the metric has one (1), else the largest value of the original.
    """
    metric, reading = find_metric(metric), reading or Reading()
    if metric.of_classes:
        return ()
    first, second = _session(before, provider), _session(after, provider)
    samples = _samples(data_path, first, reading, "all", silent_note)
    peak = reading.peak if reading.data_range is not None or "peak" in metric.options else None
    return worst(validate.predictions(first, second, samples, reading, LOOKED_AT), peak)


LOOKED_AT = 64
"""Samples among which the largest differences are looked for."""


def _samples(
    data_path: str | os.PathLike, session: runtime.Session, reading: Reading, part: Part, note: Note
) -> data.Samples:
    samples = data.load(
        pathlib.Path(data_path), session.inputs, scale=reading.scale, mean=reading.mean, std=reading.std
    )
    for text in samples.notes:
        note(text)
    return data.part_of(samples, part)


def _same(model: ModelLike, other: ModelLike | None) -> bool:
    if isinstance(model, onnx.ModelProto) or isinstance(other, onnx.ModelProto) or other is None:
        return model is other
    return pathlib.Path(model) == pathlib.Path(other)


def check_guard(
    data_path: str | None,
    metric: str | None,
    max_drop: float | None,
    min_quality: float | None,
    reading: Reading | None = None,
) -> None:
    """Refuse options that do not belong together, before any work."""
    if (data_path is None) != (metric is None):
        raise UsageError("--data and --metric go together")
    if data_path is None and (max_drop is not None or min_quality is not None):
        raise UsageError("--max-drop and --min-quality need --data and --metric")
    if any(value is not None and not np.isfinite(value) for value in (max_drop, min_quality)):
        raise UsageError("--max-drop and --min-quality must be finite numbers")
    if metric is not None:
        find_metric(metric).check(reading or Reading())


def guard(quality: tuple[Quality, Quality] | None, max_drop: float | None, min_quality: float | None) -> str | None:
    """Say in words which limit a pruned model breaks; None where it is good enough."""
    if max_drop is None and min_quality is None:
        return None
    if quality is None:
        raise UsageError("--max-drop and --min-quality need --data and --metric")
    before, after = quality
    lost = validate.drop(before, after)
    if max_drop is not None and not lost <= max_drop:
        return f"{after.metric} falls from {before.value:.6g} to {after.value:.6g}, by more than {max_drop:g}"
    worse = after.value < min_quality if min_quality is not None and after.higher_is_better else False
    if min_quality is not None and (worse or (not after.higher_is_better and after.value > min_quality)):
        return f"{after.metric} is {after.value:.6g}, {min_quality:g} is asked for"
    return None


def _session(model: ModelLike, provider: str) -> runtime.Session:
    if isinstance(model, onnx.ModelProto):
        return runtime.Session(model, provider)
    onnx_io.require_file(pathlib.Path(model))
    return runtime.Session(str(model), provider)


def with_latency(done: Report, provider: str = "") -> Report:
    """Measure both files of a finished run side by side, and add their median milliseconds to its report."""
    files = [str(done.input["path"]), str(done.output["path"])]
    # Floats may be four times as wide in float32; only where that matters the file is read again.
    if 4 * done.before["bytes"] > runtime.WHOLE_BYTES and not runtime.fits(onnx_io.load(files[0])):
        note = "the latency was not measured: the original is too large to run in one piece"
        return replace(done, notes=(*done.notes, note))
    found = Race(files[0], done.input_shapes, provider).run(files[1], seconds=1.0, least=4)
    before, after = found.before, found.after
    notes = done.notes
    if after > before and done.after["mac"] < done.before["mac"]:
        aligned = done.options.get("profile") or done.options.get("align", 1) > 1
        hint = "" if aligned else "; try --profile ort-cpu"
        notes = (*notes, f"fewer MAC, but not faster here: onnxruntime computes in blocks of channels{hint}")
    return replace(done, latency_ms=(before, after), notes=notes)
