"""The command ``sweep``: many models, budgets and ways of pruning in one table."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import click

from onnxprune import cli, onnx_io, runtime
from onnxprune.errors import UsageError
from onnxprune.options import Options
from onnxprune.report import environment, pareto, rows, text
from onnxprune.report.rows import Row
from onnxprune.sweep import BACKENDS
from onnxprune.sweep import sweep as run_sweep

AXES = {"preset": "presets", "criterion": "criteria", "compensate": "compensations"}
"""Options of ``prune`` that a sweep takes several of, and what ``onnxprune.sweep`` calls them."""


def repeatable(command: Callable) -> Callable:
    """Let options that span the sweep be given several times."""
    options: list[click.Parameter] = getattr(command, "__click_params__", [])
    for place, old in enumerate(options):
        if isinstance(old, click.Option) and old.name and (old.name in AXES or old.name.startswith("target_")):
            default = (getattr(Options(), old.name),) if old.name in AXES else None
            options[place] = click.Option(
                [*old.opts, old.name], type=old.type, multiple=True, default=default, show_default=bool(default),
                help=f"{old.help} Repeatable.",
            )  # fmt: skip
    return command


@cli.commands.command()  # type: ignore[has-type]  # the two modules import each other
@click.argument("models", type=click.Path(), metavar="MODEL...", nargs=-1, required=True)
@repeatable
@cli._target_options
@cli._select_options
@cli._calib_options
@click.option("--data", type=click.Path(), help="Evaluation data; shows the quality before and after.")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    help="Quality metric for --data. Repeatable; the first decides what is Pareto-optimal.",
)
@cli._data_options
@click.option("--proof/--no-proof", default=True, help="Prove every result (default), or skip that.")
@click.option("--jobs", type=click.IntRange(1), help="Processes; each holds one model.  [default: all cores]")
@click.option("--threads", type=cli.THREADS, default=1, show_default=True, help="Threads of each run.")
@click.option("--backend", type=click.Choice(BACKENDS), default="local", show_default=True, help="Where to run.")
@click.option("--scheduler", default="", metavar="ADDRESS", help="Dask scheduler, such as tcp://10.0.0.1:8786.")
@click.option("--ship", is_flag=True, help="Send models and data to workers that share no folder with this machine.")
@click.option("--csv", "csv_path", type=click.Path(), help="Write the table as CSV (- for stdout).")
@click.option("--plot", type=click.Path(), help="Draw MAC share against quality: .svg, .png or .pdf.")
@cli._html_option
@click.option("--out-dir", type=click.Path(), help="Write the pruned models and their plans to this folder.")
@click.option("--resume", is_flag=True, help="Go on with the tables: what they hold does not run again.")
@click.option("--force", is_flag=True, help="Overwrite tables and models; with --resume, drop runs of another sweep.")
@cli._shared_options
def sweep(models: tuple[str, ...], **given: Any) -> None:
    """Prune every MODEL to every target in every way, and show the results in one table.

    Runs are spread over the cores of this machine, or over a Dask cluster. A run that fails is a row of the table, too;
    the exit code is 0 if any run succeeded.

    \b
    Example:  onnxprune sweep *.onnx --target-mac 0.8 --target-mac 0.6 --preset c --preset d --csv table.csv
    """
    # What all runs share is checked and put together as for a single run.
    single = given | {name: given[name][0] for name in AXES if given.get(name)}
    single |= {name: None for name in given if name.startswith("target_")}
    with cli._run(single) as (console, base):
        tables = [path for path in (given["csv_path"], given["json_path"]) if path]
        known = _prepare(given, single)
        writer = _Writer(given, vars(base), single)
        with cli._progress(given) as progress:
            shared = {name: value for name, value in vars(base).items() if name not in (*AXES, "targets")}
            axes = {long: given[name] for name, long in AXES.items() if given.get(name)}
            targets = {name[7:]: given[name] for name in given if name.startswith("target_") and given[name]}
            chosen = {name: given[name] for name in ("data", "metrics", "jobs", "backend", "scheduler", "ship",
                                                     "out_dir")}  # fmt: skip
            found = run_sweep(
                models, targets, **axes, **chosen, reading=cli._reading(given), known=known,
                force=given["force"], progress=progress, finished=writer.finished, note=writer.say, **shared,
            )  # fmt: skip
        failed = [row for row in found if not row.ok]
        error = None
        if len(failed) == len(found):
            error = (failed[0].code, f"all {len(found)} runs failed; the first: {failed[0].error}")
        cli._write_html(given["html_path"], writer.content(found, error))  # first: what fails here is told in the JSON
        writer.write(found, error)
        if given["plot"] and not error:
            onnx_io.write(given["plot"], pareto.draw(found, pathlib.Path(given["plot"]).suffix[1:]))
        if not given["quiet"] and "-" not in tables:
            cli._print(console, text.sweep, found)
        if error:
            cli._fail(UsageError(error[1]), single | {"json_path": None}, error[1], code=error[0])
        if failed and not given["quiet"]:
            cli.say(f"{len(failed)} of {len(found)} runs failed", err=True)


def _prepare(given: dict[str, Any], single: dict[str, Any]) -> list[Row]:
    """Refuse what cannot be written before any run; returns the rows to go on with."""
    if given["csv_path"] == given["json_path"] == "-":
        raise UsageError("--csv - and --json - both want stdout; write one of them to a file")
    if given["jobs"] and given["backend"] == "dask":
        raise UsageError("--jobs is for this machine; a cluster has the workers that it has")
    if given["plot"]:
        if not given["metrics"]:
            raise UsageError("--plot shows the quality; it needs --data and --metric")
        if pathlib.Path(given["plot"]).suffix[1:] not in pareto.FORMATS:
            raise UsageError(f"{given['plot']}: the picture's name must end with one of .{', .'.join(pareto.FORMATS)}")
        pareto.require_matplotlib()
    known: list[Row] = []
    for path in (given["csv_path"], given["json_path"]):
        if path and path != "-" and pathlib.Path(path).is_file() and (given["resume"] or not given["force"]):
            earlier = rows.read(pathlib.Path(path))
            if earlier and not given["resume"]:
                single["json_path"] = None
                raise UsageError(f"{path}: exists; --resume goes on with it, --force replaces it")
            known += earlier
    return known


class _Writer:
    """Writes the tables after every run, so that nothing of an interrupted sweep is lost, and says what is done."""

    def __init__(self, given: dict[str, Any], options: dict[str, Any], single: dict[str, Any]) -> None:
        self._given, self._single = given, single
        self._options = {name: value for name, value in options.items() if name not in (*AXES, "targets")}
        if given["backend"] == "local":
            self._options["provider"] = runtime.provider_for(options["provider"])

    def finished(self, row: Row, table: list[Row]) -> None:
        """Take note of a run."""
        self.write(table, final=False)
        what = f"{row.model} {row.preset} {row.criterion} {row.kind} {row.target:g}"
        quality = "".join(f", {measured.metric} {measured.after:.4g}" for measured in row.quality)
        result = f"MAC {100 * row.mac:.1f} %{quality}" if row.mac is not None else f"failed: {row.error}"
        self.say(f"{what}: {result} ({row.seconds:.1f} s)")

    def say(self, line: str) -> None:
        """Print a line to stderr."""
        if not self._given["quiet"]:
            cli.say(cli._one_line(line), err=True)

    def content(self, table: list[Row], error: tuple[int, str] | None = None) -> dict[str, Any]:
        """Return what the JSON table holds: the rows, and what made them."""
        made = {"command": cli._command(), "environment": environment()}
        return rows.to_json(table, self._options, error) | made

    def write(self, table: list[Row], error: tuple[int, str] | None = None, *, final: bool = True) -> None:
        """Write the tables, each whole; to stdout only in the end."""
        csv_path, json_path = self._given["csv_path"], self._given["json_path"]
        if csv_path == "-" and final:
            cli.say(*rows.to_csv(table).splitlines())
        elif csv_path and csv_path != "-":
            onnx_io.write(csv_path, rows.to_csv(table).encode())
        if json_path and (final or json_path != "-"):
            cli._write_json(json_path, self.content(table, error))
        files = [path for path in (csv_path, json_path) if path and path != "-"]
        if files:
            self._single["written"] = f"what was finished, {' and '.join(files)},"
