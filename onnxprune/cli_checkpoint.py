"""The command ``apply-checkpoint``: slice the parameters of a training checkpoint as a plan says."""

from __future__ import annotations

from typing import Any

import click

from onnxprune import cli, onnx_io, pipeline
from onnxprune.checkpoint import CheckpointSummary, apply_checkpoint


@cli.commands.command("apply-checkpoint")  # type: ignore[has-type]  # the two modules import each other
@click.argument("plan", type=click.Path(), metavar="PLAN.json")
@click.argument("source", type=click.Path(), metavar="IN")
@click.argument("out", type=click.Path(), metavar="OUT")
@click.option("--map", "map_path", type=click.Path(), help="JSON: which parameters the plan's tensors are.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@cli._print_options
def command(plan: str, source: str, out: str, **given: Any) -> None:
    """Slice the parameters of checkpoint IN as a plan says, and write OUT.

    IN and OUT are .safetensors files or torch state dicts (.pt, .pth, .bin). Parameters that carry the names of the plan's
    tensors are sliced, others are copied. --map tells which parameters the other tensors of the plan are.

    \b
    Example:  onnxprune apply-checkpoint plan.json model.safetensors pruned.safetensors --map map.json
    """
    with cli._run(given):
        done = apply_checkpoint(plan, source, out, mapping=given["map_path"], force=given["force"])
        given["written"] = out
        _show(done, plan, source, out, given)


def _show(done: CheckpointSummary, plan: str, source: str, out: str, given: dict[str, Any]) -> None:
    files = {"input": source, "plan": plan, "output": out}
    content = {"schema": 1, "onnxprune": pipeline.version("onnxprune")}
    hashed = {key: {"path": path, "sha256": onnx_io.sha256(path)} for key, path in files.items()}
    cli._write_json(given["json_path"], {**content, **hashed, **done.to_json()})
    if given["quiet"]:
        return
    lines = [f"sliced   {len(done.sliced)} parameters, {len(done.mapped)} of them by the map"]
    if given["verbose"]:
        lines += [f"         {p.name}  {_shape(p.before)} -> {_shape(p.after)}" for p in done.sliced]
    lines += [f"copied   {len(done.copied)} parameters as they are"]
    if given["verbose"]:
        lines += [f"         {name}" for name in done.copied]
    lines += [*(f"note     {note}" for note in done.notes), f"written  {out}"]
    cli.say(*lines, err=given["json_path"] == "-")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
