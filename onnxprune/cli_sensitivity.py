"""The command ``sensitivity``: quality against kept share, group by group."""

from __future__ import annotations

import pathlib
from typing import Any

import click

from onnxprune import cli, onnx_io
from onnxprune.errors import UsageError
from onnxprune.parameters import Numbers
from onnxprune.report import text
from onnxprune.report.sensitivity import SensitivityRow, SensitivityTable
from onnxprune.sensitivity import SHARES
from onnxprune.sensitivity import sensitivity as measure


@cli.commands.command()  # type: ignore[has-type]  # the two modules import each other
@click.argument("model", type=click.Path())
@click.option("--data", type=click.Path(), help="Evaluation data: .npz, a folder, an ONNX test_data_set.")
@click.option("--metric", help="Quality metric for --data, as for evaluate.")
@click.option(
    "--shares",
    type=Numbers(),
    default=",".join(map(str, SHARES)),
    show_default=True,
    help="Shares of its channels that each group is pruned to.",
)
@cli._select_options
@cli._calib_options
@cli._data_options
@click.option("--jobs", type=click.IntRange(1), help="Processes; each holds one model.  [default: all cores]")
@click.option("--threads", type=cli.THREADS, default=1, show_default=True, help="Threads of each process.")
@click.option("--csv", "csv_path", type=click.Path(), help="Write the table as CSV (- for stdout).")
@click.option("--resume", is_flag=True, help="Go on with the table of --json: what it holds is not measured again.")
@click.option("--force", is_flag=True, help="Overwrite tables; with --resume, drop rows of another measurement.")
@cli._shared_options
def sensitivity(model: str, **given: Any) -> None:
    """Prune each group of MODEL alone, and show how much quality that costs, with and without compensation.

    The table that --json writes tells ``prune --sensitivity`` by what groups compare.

    \b
    Example:  onnxprune sensitivity model.onnx --data eval.npz --metric psnr --calib calib.npz --json table.json
    """
    with cli._run(given) as (console, options):
        known = _prepare(given)
        writer = _Writer(given)
        with cli._progress(given) as progress:
            table = measure(
                model, given["data"], given["metric"], shares=given["shares"], jobs=given["jobs"],
                reading=cli._reading(given), known=known, force=given["force"],
                progress=progress, finished=writer.finished, options=options,
            )  # fmt: skip
        writer.write(table)
        if not given["quiet"] and "-" not in (given["json_path"], given["csv_path"]):
            cli._print(console, text.sensitivity, table)


def _prepare(given: dict[str, Any]) -> SensitivityTable | None:
    """Refuse what cannot be written before any work; returns the table to go on with."""
    json_path, csv_path = given["json_path"], given["csv_path"]
    if csv_path == json_path == "-":
        raise UsageError("--csv - and --json - both want stdout; write one of them to a file")
    if given["resume"] and json_path in (None, "-"):
        raise UsageError("--resume goes on with the table that --json names; give --json T.json")
    known = None
    try:
        if given["resume"] and pathlib.Path(json_path).is_file():
            known = SensitivityTable.read(json_path)
        taken = [path for path in (json_path, csv_path) if path and path != "-" and pathlib.Path(path).exists()]
        if taken and not (given["force"] or given["resume"]):
            raise UsageError(f"{taken[0]}: exists; --resume goes on with it, --force replaces it")
    except UsageError:
        given["json_path"] = None  # the error must not take the place of what is there
        raise
    return known


class _Writer:
    """Writes the tables after every row, each whole, so that nothing of an interrupted measurement is lost."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._given = given

    def finished(self, row: SensitivityRow, table: SensitivityTable) -> None:
        """Take note of a row."""
        self.write(table, final=False)
        if self._given["verbose"]:
            figure = row.note or f"{row.figure:.4g}"
            cli.say(f"{row.group} {100 * row.share:g} %: {figure}", err=True)

    def write(self, table: SensitivityTable, *, final: bool = True) -> None:
        """Write the tables; to stdout only in the end."""
        csv_path, json_path = self._given["csv_path"], self._given["json_path"]
        if csv_path == "-" and final:
            cli.say(*table.to_csv().splitlines())
        elif csv_path and csv_path != "-":
            onnx_io.write(csv_path, table.to_csv().encode())
        if json_path and (final or json_path != "-"):
            cli._write_json(json_path, table.to_json())
        files = [path for path in (csv_path, json_path) if path and path != "-"]
        if files:
            self._given["written"] = f"what was finished, {' and '.join(files)},"
