"""What pruning each group alone does to the quality: one bundle, one share at a time, spread over processes."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx

from onnxprune import data as data_files
from onnxprune import onnx_io, parcels, quality, runtime, workers
from onnxprune.calibration import load_feeds, score_channels
from onnxprune.coupling import Bundle
from onnxprune.errors import ModelError, OnnxPruneError, UsageError
from onnxprune.metrics import Metric
from onnxprune.metrics import find as find_metric
from onnxprune.options import Clock, ModelLike, Options, Progress, silent
from onnxprune.passes import validate
from onnxprune.passes.calibrate import Feeds
from onnxprune.passes.select import PRESETS, removals
from onnxprune.passes.sensitivities import bundle_id
from onnxprune.passes.validate import Quality, drop
from onnxprune.passes.weigh import float_outputs, relative_error, spreads
from onnxprune.pipeline import Loaded, Ready, cut, load
from onnxprune.report.names import names
from onnxprune.report.sensitivity import SensitivityRow, SensitivityTable

SHARES = (0.9, 0.75, 0.5, 0.25)
"""Shares of its channels to which each bundle is pruned."""


@dataclass(frozen=True)
class Job:
    """What all rows of a table share; two are the same where their digests are."""

    run: str
    model: str = field(compare=False)
    sha256: str = field(compare=False)
    options: Options = field(compare=False)
    data: str | None = field(compare=False)
    metric: Any = field(compare=False)
    reading: quality.Reading = field(compare=False)
    threads: int = field(compare=False)


def sensitivity(
    model: ModelLike,
    data: str | os.PathLike | None = None,
    metric: Metric | Callable | str | None = None,
    *,
    shares: Sequence[float] = SHARES,
    jobs: int | None = None,
    threads: int | None = None,
    reading: quality.Reading | None = None,
    known: SensitivityTable | None = None,
    force: bool = False,
    progress: Progress = silent,
    finished: Callable[[SensitivityRow, SensitivityTable], None] = lambda row, table: None,
    options: Options | None = None,
    **chosen: Any,
) -> SensitivityTable:
    """Prune every bundle of groups alone, to every share, and measure what that does to the quality and the outputs.

    Channels go in the order that the criterion gives. Nothing is proved.

    Parameters
    ----------
    data, metric
        What :func:`onnxprune.evaluate` takes; without them only the error of the outputs is measured, on ``calib``.
    jobs
        Processes (by default one per core, and a single one where a GPU runs the models); each holds a model of its own.
        With 1 all happens in this process.
    threads
        Threads of each process (default: those of the options, and one where they name none).
    known
        An earlier table, whose rows are kept and not measured again; one of another model, other data, options or
        another version is refused unless ``force`` drops it.
    finished
        Told each new row and the table so far.
    chosen
        Fields of :class:`Options`; ``calib`` adds what compensation makes good again.

    Raises
    ------
    UsageError
        Options contradict each other, or the data does not fit the model.
    ModelError, FileError
        The model, or a file, cannot be read. A bundle that fails is a row with a note.
    """
    try:
        options = options or Options(**chosen)
    except TypeError as error:
        raise UsageError(str(error)) from error
    threads = threads or options.threads or 1
    _check(options, data, metric, shares, reading)
    with _file_of(model) as path, runtime.threads_limited(threads):
        job = _job(path, options, data, metric, reading or quality.Reading(), threads)
        try:
            state = _opened(job)
            begun = _begin(state, None if isinstance(model, onnx.ModelProto) else os.fspath(model))
            planned = list(_planned(state.loaded, job.options, shares))
            del state
            rows = _known(job, known, force=force)
            waiting = [row for row in planned if (row.group, row.share) not in rows]
            calls = [(job, row) for row in waiting]
            count = len(planned) - len(waiting)
            progress("sensitivity", count, len(planned))
            with closing(
                workers.locally(measure, calls, jobs or workers.processes(options.provider), threads)
            ) as results:
                for number, result in results if calls else ():  # without calls the generator does not even start
                    row = _row_of(waiting[number], result)
                    rows[row.group, row.share] = row
                    count += 1
                    progress("sensitivity", count, len(planned))
                    finished(row, _table(begun, planned, rows))
            return _table(begun, planned, rows)
        finally:
            _opened.cache_clear()


# -- before ----------------------------------------------------------------------------------------------------------


def _check(
    options: Options, data: str | os.PathLike | None, metric: Any, shares: Sequence[float],
    reading: quality.Reading | None,
) -> None:  # fmt: skip
    quality.check_guard(None if data is None else str(data), metric, None, None, reading)
    if data is None and options.calib is None:
        raise UsageError("nothing to measure on; give --data and --metric, or calibration data (--calib), or all three")
    if options.sensitivity:
        raise UsageError("--sensitivity names a table to read; to write one here, use --json")
    if options.targets:
        raise UsageError("a target does not go with sensitivity, which prunes to shares of channels")
    if not shares or not all(0 < share < 1 for share in shares):
        raise UsageError(f"shares {', '.join(f'{share:g}' for share in shares)}: each must lie between 0 and 1")


@contextmanager
def _file_of(model: ModelLike) -> Iterator[str]:
    """Where a model lies, absolute; one in memory lies in a temporary file as long as the context lasts."""
    if isinstance(model, onnx.ModelProto):
        with onnx_io.temporary_file(model) as path:
            yield path
    else:
        onnx_io.require_file(pathlib.Path(model))
        yield str(pathlib.Path(model).resolve())


def _job(
    path: str, options: Options, data: str | os.PathLike | None, metric: Any, reading: quality.Reading, threads: int
) -> Job:
    calib = options.calib
    if isinstance(calib, str | os.PathLike):
        calib = str(pathlib.Path(calib).resolve())
    # What only selection and the proof look at makes no other rows.
    options = replace(options, calib=calib, preset="a", allocation="error", proof=False, threads=0)
    data = None if data is None else str(pathlib.Path(data).resolve())
    of_calib = parcels.digest(calib) if isinstance(calib, str) else str(parcels.contents(calib))
    fields = {name: value for name, value in parcels.settings(options).items() if name != "calib"}
    what = [
        version("onnxprune"), parcels.digest(path), of_calib, fields, data and parcels.digest(data),
        metric and find_metric(metric).name, asdict(reading) if data else None,
    ]  # fmt: skip
    run = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return Job(run, path, onnx_io.sha256(path), options, data, metric, reading, threads)


def _begin(state: _Opened, path: str | None) -> SensitivityTable:
    """The table without rows; refuses calibration data that does not fit before any work is spread."""
    job, notes = state.job, list[str]()
    before = state.quality_of(state.original, notes.append) if job.data else None
    if job.options.calib is not None:
        load_feeds(state.loaded.coupling, job.options)
    told = {name: value for name, value in vars(job.options).items() if value not in ((), {}, "", None)}
    if "calib" in told:
        told["calib"] = told["calib"] if isinstance(told["calib"], str) else "arrays"
    for name in ("preset", "allocation", "proof"):
        del told[name]
    told |= {"provider": runtime.provider_for(job.options.provider), "threads": job.threads}
    told["criterion"] = job.options.criterion_for(job.options.calib is not None)
    told["compensate"] = job.options.compensation
    return SensitivityTable(
        model={"path": path, "sha256": job.sha256},
        options=told | ({"data": job.data} if job.data else {}),
        metric=before and before.metric,
        before=before and before.value,
        samples=before and before.samples,
        run=job.run,
        notes=tuple(dict.fromkeys((*state.loaded.prepared, *notes))),
    )


def _planned(loaded: Loaded, options: Options, shares: Sequence[float]) -> Iterator[SensitivityRow]:
    """Rows without figures: groups in graph order, shares descending; each share is rounded to what can be kept."""
    coupling, cost = loaded.coupling, loaded.cost
    every = np.ones(coupling.n_classes, bool)
    whole = max(cost.total("mac", cost.counts(every)), 1.0)
    limits = options.limits(coupling)
    called = {group.id: named.name for group, named in zip(coupling.groups, names(cost), strict=True)}
    for bundle in coupling.bundles:
        possible = removals(bundle, PRESETS["a"], limits)
        left = bundle.size - np.array(possible) * bundle.unit
        for share in sorted(set(map(float, shares)), reverse=True):
            removed = possible[int(np.argmin(np.abs(left - share * bundle.size)))]
            keep = every.copy()
            keep[bundle.units(np.zeros(len(keep)))[:removed]] = False
            yield SensitivityRow(
                group=bundle_id(bundle),
                name=" + ".join(called[group.id] for group in bundle.groups),
                size=bundle.size,
                share=share,
                kept=bundle.size - removed * bundle.unit,
                removed=removed,
                mac=cost.total("mac", cost.counts(keep)) / whole,
            )


def _known(job: Job, known: SensitivityTable | None, *, force: bool) -> dict[tuple[str, float], SensitivityRow]:
    """Finished rows of an earlier table."""
    if known is None:
        return {}
    if known.run == job.run:
        return {(row.group, row.share): row for row in known.rows if not row.note}
    if force or not known.rows:
        return {}
    other = known.model.get("sha256") != job.sha256
    why = "another model" if other else "other data, options or another version of onnxprune"
    raise UsageError(f"the table is of {why}; write another one, or drop its rows (--force)")


# -- in the worker ---------------------------------------------------------------------------------------------------


def measure(job: Job, row: SensitivityRow) -> SensitivityRow:
    """Measure one row; an error of any kind is a note in it, beside what was measured until then."""
    found: dict[str, Any] = {}
    try:
        with runtime.threads_limited(job.threads):
            _opened(job).measure(row, found)
    except OnnxPruneError as error:
        found["note"] = str(error).replace("; nothing was written", "")
    except Exception as error:  # what a bug does to one row must not end the others
        found["note"] = f"internal error: {type(error).__name__}: {error}"
    return replace(row, **found)


@lru_cache(maxsize=1)
def _opened(job: Job) -> _Opened:
    """What a process needs for every row of a table, made once."""
    return _Opened(job)


class _Opened:
    """A model that is read, coupled, calibrated and ranked, and its outputs."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.loaded = load(job.model, job.options, Clock())
        if self.loaded.sha256 != job.sha256:
            raise ModelError(f"{job.model}: has changed since the measurement began")

    def measure(self, row: SensitivityRow, found: dict[str, Any]) -> None:
        """Put the figures of a row into ``found``, one after another."""
        if not row.removed:
            found["note"] = "nothing to remove: align, min-channels or max-prune, or too few channels"
            return
        bundle = next(each for each in self.loaded.coupling.bundles if bundle_id(each) == row.group)
        pruned, fitted = cut(self.ready, self.keep(bundle, row.removed), self.job.options)
        models = {"quality": pruned, "quality_compensated": fitted}
        for name, model in models.items():
            if model is None:
                continue
            with onnx_io.temporary_file(model) as path:
                session = runtime.Session(path, self.job.options.provider)
            if self.job.data:
                after = self.quality_of(session)
                found[name] = after.value
                found[name.replace("quality", "drop")] = drop(self.before, after)
            if model is (pruned if fitted is None else fitted):
                error = self.error_of(session)
                found["error"] = error if np.isfinite(error) else None

    def keep(self, bundle: Bundle, removed: int) -> np.ndarray:
        """Bool per class, without the units of a bundle that the criterion ranks lowest."""
        scores = self.ready.scores
        keep = np.ones(self.loaded.coupling.n_classes, bool)
        keep[bundle.units(scores.value if scores.order is None else scores.order)[:removed]] = False
        return keep

    @cached_property
    def ready(self) -> Ready:
        """The model with calibrated scores."""
        loaded, options = self.loaded, self.job.options
        feeds, notes = load_feeds(loaded.coupling, options)
        scores, facts = score_channels(loaded.flat, loaded.coupling, loaded.cost, options, feeds, ["mac"], silent)
        return Ready(loaded, scores, feeds, facts, notes)

    @cached_property
    def original(self) -> runtime.Session:
        """The original, ready to run."""
        return runtime.Session(self.job.model, self.job.options.provider)

    @cached_property
    def samples(self) -> data_files.Samples:
        """The data that quality is measured on."""
        reading, path = self.job.reading, pathlib.Path(str(self.job.data))
        return data_files.load(path, self.original.inputs, scale=reading.scale, mean=reading.mean, std=reading.std)

    @cached_property
    def before(self) -> Quality:
        """Quality of the original."""
        return self.quality_of(self.original)

    def quality_of(self, session: runtime.Session, note: validate.Note = quality.silent_note) -> Quality:
        """Quality of a model, compared with the original where the metric does."""
        if session is self.original:
            for text in self.samples.notes:
                note(text)
        view, metric = self.job.reading, self.job.metric
        return validate.evaluate(session, self.samples, metric, reference=self.original, view=view, note=note)

    @cached_property
    def wanted(self) -> tuple[Feeds, list[list[np.ndarray]], list[float]]:
        """Feeds, as many as memory allows, the original's outputs for each, and what errors are relative to."""
        feeds = self.ready.feeds if len(self.ready.feeds) else self.samples.feeds
        wanted, held = list[list[np.ndarray]](), 0
        for feed in feeds:
            wanted.append(float_outputs(self.original, feed))
            held += sum(values.nbytes for values in wanted[-1])
            if held > self.job.options.calib_memory // 4:
                break
        return feeds[: len(wanted)], wanted, spreads(wanted)

    def error_of(self, session: runtime.Session) -> float:
        """Relative squared error of a model's outputs."""
        feeds, wanted, spread = self.wanted
        return relative_error((float_outputs(session, feed) for feed in feeds), wanted, spread)


# -- after -----------------------------------------------------------------------------------------------------------


def _row_of(row: SensitivityRow, result: SensitivityRow | workers.WorkerLostError) -> SensitivityRow:
    return replace(row, note=str(result)) if isinstance(result, workers.WorkerLostError) else result


def _table(
    begun: SensitivityTable, planned: Sequence[SensitivityRow], rows: Mapping[tuple[str, float], SensitivityRow]
) -> SensitivityTable:
    turn = {group: number for number, group in enumerate(dict.fromkeys(row.group for row in planned))}
    return replace(
        begun, rows=tuple(sorted(rows.values(), key=lambda row: (turn.get(row.group, len(turn)), -row.share)))
    )
