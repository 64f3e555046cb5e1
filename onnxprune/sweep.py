"""Many runs: models under many budgets and ways of pruning, spread over processes or a cluster; one row per run."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

import onnx

from onnxprune import onnx_io, parcels, pipeline, quality, runtime, storage, workers
from onnxprune.errors import FileError, ModelError, OnnxPruneError, UsageError
from onnxprune.options import Options, Progress, silent
from onnxprune.parcels import Parcel
from onnxprune.report.rows import Measured, Row, mark

BACKENDS = ("local", "dask")


@dataclass(frozen=True)
class Run:
    """What one worker is asked for; ``row`` says which row of the table it is.

    Attributes
    ----------
    model, digest
        Absolute path of the model, and a digest of its bytes (external data included); "" where it cannot be read.
    options
        Fields of :class:`Options`.
    whole
        Whether to return the pruned model, too.
    """

    row: Row
    model: str
    digest: str
    options: Mapping[str, Any]
    data: str | None
    metrics: tuple[str, ...]
    reading: quality.Reading
    threads: int
    whole: bool
    version: str = field(default_factory=lambda: version("onnxprune"))


@dataclass(frozen=True)
class Done:
    """A finished run; ``model`` holds the pruned model's files where it was asked for and something was removed."""

    row: Row
    model: Parcel | None = None
    plan: Mapping[str, Any] | None = None


def sweep(
    models: Sequence[str | os.PathLike] | str | os.PathLike,
    targets: Mapping[str, Sequence[float]] | Sequence[float],
    *,
    presets: Sequence[str] | None = None,
    criteria: Sequence[str] | None = None,
    compensations: Sequence[str] | None = None,
    data: str | os.PathLike | None = None,
    metrics: Sequence[str] | str = (),
    reading: quality.Reading | None = None,
    jobs: int | None = None,
    threads: int = 1,
    backend: str = "local",
    scheduler: str = "",
    ship: bool = False,
    known: Iterable[Row] = (),
    out_dir: str | os.PathLike | None = None,
    force: bool = False,
    progress: Progress = silent,
    finished: Callable[[Row, list[Row]], None] = lambda row, rows: None,
    note: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> list[Row]:
    """Prune every model to every target in every way, and put the results side by side.

    Parameters
    ----------
    targets
        Shares of MAC to keep (above 1: absolute), or such a list per kind: ``{"params": [0.8, 0.5]}``. Each is a run of
        its own.
    presets, criteria, compensations
        Values of the options ``preset``, ``criterion`` and ``compensate``; the default alone where not given.
    jobs
        Processes on this machine (by default one per core, and a single one where a GPU runs the models); each holds a
        model of its own. With 1 all runs in this process.
    threads
        Threads of each run. The same number on every machine gives the same figures to the last digit.
    scheduler
        Address of a Dask scheduler, for ``backend="dask"``. The workers read the same files under the same paths, or
        get them sent with ``ship``.
    known
        Rows of an earlier sweep; those without an error, of the same model, data, options and version are not run again.
        Others without an error are refused unless ``force`` drops them, so that no table loses what was finished.
    out_dir
        Folder for the pruned models and their plans, named after what was done.
    finished
        Told each new row and the table so far, in order and marked.
    options
        Fields of :class:`Options` that all runs share.

    Returns
    -------
    list of Row
        In the order models, presets, criteria, compensations, targets, each as given; the same on any backend. A run
        that failed is a row with its error, and the others go on.

    Raises
    ------
    UsageError
        Options contradict each other, an extra is missing, or no scheduler answers.
    """
    metrics = (metrics,) if isinstance(metrics, str) else tuple(dict.fromkeys(metrics))
    _check(data, metrics, backend, scheduler, ship)
    folder = None if out_dir is None else pathlib.Path(out_dir)
    axes = {"preset": presets, "criterion": criteria, "compensate": compensations}
    shared = {
        "data": None if data is None else str(pathlib.Path(data).resolve()),
        "metrics": metrics,
        "reading": reading or quality.Reading(),
        "threads": threads,
        "whole": folder is not None,
    }
    listed = [models] if isinstance(models, str | os.PathLike) else list(models)
    runs = list(_runs(listed, list(_choices(targets, axes, options)), shared, folder))
    rows = _known(runs, known, force=force)
    waiting = [run for run in runs if _key(run.row) not in rows]
    if folder is not None:
        _check_outputs(folder, waiting, force=force)
    progress("sweep", len(rows), len(runs))
    calls = _calls(waiting, ship=ship)
    with closing(
        workers.on_dask(execute, calls, scheduler, note)
        if backend == "dask"
        else workers.locally(execute, calls, jobs or workers.processes(options.get("provider", "")), threads)
    ) as results:
        for number, result in results if calls else ():  # without calls the generator does not even start
            row = _finish(waiting[number], result)
            rows[_key(row)] = row
            progress("sweep", len(rows), len(runs))
            finished(row, _table(runs, rows))
    return _table(runs, rows)


# -- before ----------------------------------------------------------------------------------------------------------


def _check(data: str | os.PathLike | None, metrics: Sequence[str], backend: str, scheduler: str, ship: bool) -> None:
    for metric in metrics or (None,):
        quality.check_guard(None if data is None else str(data), metric, None, None)
    if backend not in BACKENDS:
        raise UsageError(f"backend {backend!r}: unknown; choose from {', '.join(BACKENDS)}")
    if backend == "dask" and not scheduler:
        raise UsageError("the dask backend needs the address of a scheduler, for example tcp://10.0.0.1:8786")
    if backend != "dask" and (scheduler or ship):
        raise UsageError("a scheduler, and sending files to it, go with the dask backend")


def _choices(
    targets: Mapping[str, Sequence[float]] | Sequence[float],
    axes: Mapping[str, Sequence[str] | None],
    options: Mapping[str, Any],
) -> Iterator[Options]:
    """Every combination, each once; a wrong one is refused before any run."""
    budgets = targets if isinstance(targets, Mapping) else {"mac": targets}
    pairs = list(dict.fromkeys((kind, float(value)) for kind, values in budgets.items() for value in values))
    if not pairs:
        raise UsageError("no target; give one or more, for example --target-mac 0.8 --target-mac 0.6")
    if "latency" in budgets and not options.get("latency_table"):
        raise UsageError("runs side by side spoil measured latencies; give --latency-table, or prune for one at a time")
    files = {name: str(pathlib.Path(path).resolve()) for name, path in parcels.named_files(options).items()}
    shared = {**options, **files}
    given = {name: tuple(dict.fromkeys(values)) for name, values in axes.items() if values}
    for chosen in itertools.product(*given.values()):
        for kind, value in pairs:
            try:
                yield Options(**{**shared, **dict(zip(given, chosen, strict=True)), "targets": {kind: value}})
            except TypeError as error:
                raise UsageError(str(error)) from error


def _runs(
    models: Sequence[str | os.PathLike],
    choices: Sequence[Options],
    shared: Mapping[str, Any],
    folder: pathlib.Path | None,
) -> Iterator[Run]:
    digests = {str(model): parcels.digest(model) for model in models}
    stems = [pathlib.Path(model).stem for model in digests]
    data = parcels.digest(shared["data"]) if shared["data"] else ""
    for model, digest in digests.items():
        path = pathlib.Path(model)
        sha256 = onnx_io.sha256(path) if digest else ""
        name = path.stem if stems.count(path.stem) == 1 else f"{path.stem}-{digest[:8]}"
        for options in choices:
            row = _row(model, options)
            yield Run(
                row=replace(
                    row,
                    sha256=sha256,
                    run=_identity(model, digest, data, options, shared),
                    output=str(folder / _file_name(name, row)) if folder else "",
                ),
                model=str(path.resolve()),
                digest=digest,
                options=vars(options),
                **shared,
            )


def _row(model: str, options: Options) -> Row:
    ((kind, target),) = options.targets.items()
    criterion = options.criterion_for(options.calib is not None)
    return Row(model, options.preset, criterion, options.compensation, kind, target)


def _file_name(name: str, row: Row) -> str:
    compensation = () if row.compensation == "none" else (row.compensation,)
    return "-".join((name, row.preset, row.criterion, *compensation, f"{row.kind}{row.target!r}")) + ".onnx"


def _identity(model: str, digest: str, data: str, options: Options, shared: Mapping[str, Any]) -> str:
    """Digest of all that a row follows from; a model that cannot be read stands for itself by its path."""
    reading = asdict(shared["reading"]) if data else None
    what = [version("onnxprune"), digest or model, data, list(shared["metrics"]), reading, parcels.settings(options)]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _known(runs: Sequence[Run], known: Iterable[Row], *, force: bool) -> dict[tuple[str, str], Row]:
    """Rows of an earlier sweep that this one asks for, whose models lie where this one would put them."""
    earlier = {row.run: row for row in known if row.ok}
    strangers = earlier.keys() - {run.row.run for run in runs}
    if strangers and not force:
        raise UsageError(
            f"{len(strangers)} finished runs of the table are not of this sweep (other models, options, targets or version) "
            "and would be lost; ask for them, too, write another table, or drop them (--force)"
        )
    kept = {}
    for run in runs:
        row = earlier.get(run.row.run)
        if row is not None and (not run.row.output or pathlib.Path(run.row.output).is_file()):
            kept[_key(run.row)] = replace(row, model=run.row.model, output=run.row.output or row.output)
    return kept


def _check_outputs(folder: pathlib.Path, runs: Sequence[Run], *, force: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: is not a folder and cannot become one ({error.strerror})") from error
    for run in runs:
        pipeline.check_output(run.model, pathlib.Path(run.row.output), force=force)


def _calls(runs: Sequence[Run], *, ship: bool) -> list[tuple[Any, ...]]:
    if not ship:
        return [(run,) for run in runs]
    wanted = [[run.model, run.data, *parcels.named_files(run.options).values()] for run in runs]
    packed = {path: parcels.pack(path) for paths in wanted for path in paths if path}
    return [(run, *(packed[path] for path in paths if path)) for run, paths in zip(runs, wanted, strict=True)]


# -- in the worker ---------------------------------------------------------------------------------------------------


def execute(run: Run, *sent: Parcel) -> Done:
    """Run once, with the files that were sent along; an error of any kind is a row, too."""
    begin = time.perf_counter()
    with parcels.unpacked(sent) as placed, runtime.threads_limited(run.threads):
        try:
            done = _execute(run, placed)
        except OnnxPruneError as error:
            done = _failed(run, error.exit_code, str(error))
        except Exception as error:  # what a bug does to one run must not end the others
            done = _failed(run, 1, f"internal error: {type(error).__name__}: {error}")
        for path, place in placed.items():
            done = replace(done, row=replace(done.row, error=done.row.error.replace(place, path)))
    return replace(done, row=replace(done.row, seconds=round(time.perf_counter() - begin, 3)))


def _execute(run: Run, placed: Mapping[str, str]) -> Done:
    model = placed.get(run.model, run.model)
    _check_same(run, model)
    files = {name: placed.get(path, path) for name, path in parcels.named_files(run.options).items()}
    options = Options(**{**run.options, **files})
    result = pipeline.prune(model, options)
    data = None if run.data is None else placed.get(run.data, run.data)
    pairs = [
        quality.compare_quality(model, result.model, data, metric, reading=run.reading, provider=options.provider)
        for metric in run.metrics
    ]
    report = result.report
    shares = {kind: report.after[kind] / report.before[kind] if report.before[kind] else 1.0 for kind in report.before}
    row = replace(
        run.row,
        mac=shares["mac"],
        params=shares["params"],
        bandwidth=shares["bandwidth"],
        quality=tuple(Measured.of(pair) for pair in pairs if pair is not None),
        proof=report.proof.ok if report.proof else None,
    )
    if not run.whole:
        return Done(row)
    return Done(row, _written(run, result.model) if result.plan.initializers else None, result.plan.to_json())


def _check_same(run: Run, model: str) -> None:
    """Refuse to run on other bytes, or with another version, than the row will say."""
    if run.version != version("onnxprune"):
        raise UsageError(
            f"the worker has onnxprune {version('onnxprune')}, this machine {run.version}; install the same"
        )
    if not run.digest or parcels.digest(model) == run.digest:
        return
    if not pathlib.Path(model).exists():
        raise UsageError(f"{model}: the worker has no such file; share the folder with it, or send the files (--ship)")
    raise UsageError(
        f"{model}: has changed since the sweep began, or the worker has another file there (--ship sends it)"
    )


def _written(run: Run, model: onnx.ModelProto) -> Parcel:
    """The files of a model as it is written: its data may lie in a file of its own."""
    with storage.temporary_folder() as folder:
        path = pathlib.Path(folder) / pathlib.Path(run.row.output).name
        onnx_io.save(model, path)
        return parcels.pack(path)


def _failed(run: Run, code: int, message: str) -> Done:
    return Done(replace(run.row, output="", code=code, error=" ".join(message.split())))


# -- after -----------------------------------------------------------------------------------------------------------


def _finish(run: Run, result: Done | workers.WorkerLostError) -> Row:
    """Write what a run made, if anything, and return its row; that it could not be written is an error of the row."""
    if isinstance(result, workers.WorkerLostError):
        return _failed(run, result.exit_code, str(result)).row
    if not run.whole or not result.row.ok:
        return result.row
    out = pathlib.Path(run.row.output)
    try:
        if result.model is None:
            onnx_io.copy_apart(pathlib.Path(run.model), out)
        else:
            onnx_io.place(result.model.files, out)
        onnx_io.write(out.with_suffix(".plan.json"), json.dumps(result.plan, indent=1).encode())
    except (FileError, ModelError, UsageError) as error:
        return replace(_failed(run, error.exit_code, str(error)).row, seconds=result.row.seconds)
    return result.row


def _key(row: Row) -> tuple[str, str]:
    """What tells rows apart: two copies of one model make the same run."""
    return row.model, row.run


def _table(runs: Sequence[Run], rows: Mapping[tuple[str, str], Row]) -> list[Row]:
    return mark([rows[_key(run.row)] for run in runs if _key(run.row) in rows])
