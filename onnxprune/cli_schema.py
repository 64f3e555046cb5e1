"""``onnxprune schema``: what a report or a plan looks like, as JSON Schema."""

from __future__ import annotations

from importlib import resources

import click

from onnxprune import cli


@cli.commands.command()  # type: ignore[has-type]  # the two modules import each other
@click.argument("name", type=click.Choice(["report", "plan"]))
def schema(name: str) -> None:
    """Print the JSON Schema (draft 2020-12) of reports or of plans.

    \b
    Example:  onnxprune schema report > report.schema.json
    """
    click.echo(resources.files("onnxprune").joinpath("schemas", f"{name}.json").read_text(encoding="utf-8"), nl=False)
