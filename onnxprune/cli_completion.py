"""``onnxprune completion``: what a shell reads to complete commands, options and file names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from onnxprune import cli


@cli.commands.command()  # type: ignore[has-type]  # the two modules import each other
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that makes a shell complete commands and options.

    \b
    Example:  onnxprune completion bash >> ~/.bashrc
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli.commands, {}, "onnxprune", "_ONNXPRUNE_COMPLETE").source())
