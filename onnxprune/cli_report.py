"""``onnxprune report`` and ``onnxprune diff``: the page of a report written as JSON; what differs between two models."""

from __future__ import annotations

import json
import pathlib
from functools import partial
from typing import Any

import click

from onnxprune import cli
from onnxprune.difference import difference
from onnxprune.errors import FileError, UsageError
from onnxprune.report import text

FOREIGN = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What making a page raises of values that no report holds: of another type, without end, or no Unicode."""


@cli.commands.command("report")  # type: ignore[has-type]  # the two modules import each other
@click.argument("source", type=click.Path(), metavar="R.json")
@click.option("-o", "--out", "html_path", type=click.Path(), help="The page; R.html beside R.json by default.")
@click.option("--force", is_flag=True, help="Overwrite the page.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("-v", "--verbose", is_flag=True, help="Print tracebacks.")
def report(source: str, **given: Any) -> None:
    """Make the HTML page of a report that --json wrote.

    \b
    Example:  onnxprune report r.json
    """
    path = pathlib.Path(source)
    target = pathlib.Path(given["html_path"] or path.parent / f"{path.stem}.html")
    given |= {"json_path": None, "html_path": str(target)}
    with cli._run(given):
        if not path.is_file():
            raise FileError(f"{source}: no such file")
        if target.exists() and not given["force"]:
            raise UsageError(f"{target}: exists; choose another name with -o or use --force to overwrite it")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise FileError(f"{source}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{source}: is not valid JSON ({error})") from error
        try:
            cli._write_html(given["html_path"], content)
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from error
        except FOREIGN as error:
            raise UsageError(f"{source}: is no report that onnxprune wrote ({error!r:.200}); write it again") from error
        if not given["quiet"]:
            cli.say(f"written  {target}")


@cli.commands.command()  # type: ignore[has-type]
@click.argument("a", type=click.Path(), metavar="A.onnx")
@click.argument("b", type=click.Path(), metavar="B.onnx")
@cli._model_options
def diff(a: str, b: str, **given: Any) -> None:
    """Show what differs between two related models: costs, layers, nodes, constants.

    \b
    Example:  onnxprune diff original.onnx pruned.onnx
    """
    with cli._run(given) as (console, options):
        found = difference(a, b, options)
        cli._write_json(given["json_path"], found.to_json())
        if not given["quiet"]:
            cli._print(console, partial(text.difference, verbose=given["verbose"]), found)
