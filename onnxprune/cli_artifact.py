"""The command ``artifact``: write a folder with all that training a pruned model takes."""

from __future__ import annotations

from typing import Any

import click

from onnxprune import cli
from onnxprune.artifact import LOSS, export_artifact
from onnxprune.manifest import Artifact


@cli.commands.command()  # type: ignore[has-type]  # the two modules import each other
@click.argument("original", type=click.Path())
@click.argument("pruned", type=click.Path())
@click.argument("directory", type=click.Path(), metavar="DIR")
@click.option(
    "--plan", type=click.Path(), help="Plan that made PRUNED of ORIGINAL; found out where weights are unchanged."
)
@click.option("--loss", default=LOSS, show_default=True, help="Loss to suggest to the trainer.")
@click.option("--metric", help="Metric to suggest to the trainer.")
@click.option("--force", is_flag=True, help="Replace the artifact that DIR holds.")
@cli._model_options
def artifact(original: str, pruned: str, directory: str, **given: Any) -> None:
    """Verify PRUNED, and write the folder DIR with all that training it takes, with or without onnxprune.

    \b
    Example:  onnxprune artifact original.onnx pruned.onnx training/ --plan plan.json
    """
    with cli._run(given) as (_, options):
        with cli._progress(given) as progress:
            made = export_artifact(
                original, pruned, directory, given["plan"], loss=given["loss"], metric=given["metric"],
                force=given["force"], options=options, progress=progress,
            )  # fmt: skip
        cli._write_json(given["json_path"], dict(made.manifest))
        if not given["quiet"] and given["json_path"] != "-":
            for line in _summary(made):
                cli.say(line)


def _summary(made: Artifact) -> list[str]:
    """What was exported, in a few lines."""
    manifest = made.manifest
    before, after = (manifest["cost"][when]["mac"] for when in ("before", "after"))
    share = f", {100 * after / before:.1f} % of the teacher's {before:,}" if before else ""
    n_channels = sum(group.size for group in made.groups)
    return [
        f"student   {after:,} MAC{share}",
        f"trainable {len(made.trainable)} tensors; {len(manifest['constant'])} constants stay as they are",
        f"groups    {len(made.groups)} with {n_channels} channels that can go",
        f"features  {len(made.features)} tensors that student and teacher share",
        f"loss      {made.loss}" + (f", metric {made.metric}" if made.metric else ""),
        f"written   {made.directory}",
    ]
