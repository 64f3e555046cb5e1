"""The command ``iterate``: prune a little, train, check the metric, go on."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import click

from onnxprune import cli, data, onnx_io, pipeline, runtime
from onnxprune.cli_finetune import _moments, _recipe, _recipe_options
from onnxprune.errors import BudgetError, UsageError
from onnxprune.iterate import Iterated, Pace
from onnxprune.iterate import iterate as run_loop
from onnxprune.metrics import METRICS
from onnxprune.report import pareto
from onnxprune.trainers import Command, Reference, Trainer

COLUMNS = (("mac", "MAC 1e9", 1e9), ("weights", "weights 1e3", 1e3), ("activations", "activations 1e6", 1e6),
           ("bandwidth", "BW 1e6", 1e6))  # fmt: skip
"""Columns of the paper's Table 1."""


def _own_targets(command: Callable) -> Callable:
    """Add the options of targets that the loop can step towards."""
    command = cli._target_options(command)
    options: list[click.Parameter] = getattr(command, "__click_params__", [])
    others = ("latency_table", *(f"target_{kind}" for kind in ("latency", "size")))
    options[:] = [option for option in options if option.name not in others]
    return command


@cli.commands.command()  # type: ignore[has-type]  # the two modules import each other
@click.argument("model", type=click.Path(), metavar="IN")
@click.argument("out", type=click.Path(), metavar="OUT")
@_own_targets
@cli._select_options
@cli._calib_options
@click.option("--data", "data_path", required=True, type=click.Path(), help="Training data: .npz, a folder, images.")
@click.option("--val", type=click.Path(), help="Data that steps are judged by.  [default: the training data]")
@click.option("--metric", help=f"What steps are judged by: {', '.join(METRICS)}, or your own module:function.")
@cli._data_options
@click.option("--max-drop", type=float, help="Take back a step after which the metric is lower by more than this.")
@click.option("--min-quality", type=float, help="Take back a step after which the metric is below this.")
@click.option(
    "--step",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Share of the original's cost that a step removes; halved after a step that was taken back.",
)
@click.option("--min-step", type=click.FloatRange(0, 1), default=0.01, show_default=True, help="Smallest step to try.")
@click.option("--trainer", metavar="'CMD {artifact} {data} {out}'", help="Train by a command of your own.")
@_recipe_options
@click.option(
    "--final-epochs",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Epochs of the last training.  [default: as many as of the others]",
)
@click.option("--state", type=click.Path(), help="Folder of all steps.  [default: OUT.iterations]")
@click.option("--restart", is_flag=True, help="Begin anew where the folder is of an earlier run.")
@click.option("--plan-out", type=click.Path(), help="Write the plan against the original as JSON.")
@click.option("--plot", type=click.Path(), help="Draw quality against MAC: .svg, .png or .pdf.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@cli._html_option
@cli._model_options  # fmt: skip
def iterate(model: str, out: str, **given: Any) -> None:
    """Prune IN step by step, training after each, until it meets a target or the metric forbids more.

    A run that was stopped goes on from its last step when it is started again.

    \b
    Example:  onnxprune iterate in.onnx out.onnx --target-mac 0.5 --data train.npz --val eval.npz --metric psnr
    """
    with cli._run(given) as (console, options):
        kind = _plot_kind(given["plot"])
        pipeline.check_output(model, pathlib.Path(out), force=given["force"])
        pace = Pace(given["step"], given["min_step"], given["max_drop"], given["min_quality"])
        validation, notes = given["val"] or given["data_path"], []
        if not given["val"]:
            notes.append("steps were judged by the data they were trained on; --val takes other data")
        metric = given["metric"] or _metric(model, validation, cli._reading(given))
        with _moments(given) as moment, cli._progress({**given, "quiet": True}) as progress:
            done = run_loop(
                model, out, _trainer(given, moment), validation, metric, options, pace, reading=cli._reading(given),
                folder=given["state"], force=given["force"], restart=given["restart"],
                say=(lambda line: None) if given["quiet"] else (lambda line: cli.say(line, err=True)),
                progress=progress,
            )  # fmt: skip
        given["written"] = out
        if given["plan_out"]:
            onnx_io.write(given["plan_out"], json.dumps(done.plan.to_json(), indent=1).encode())
        if kind:
            onnx_io.write(given["plot"], _plot(done, kind))
        _tell(console, done, given, notes)
        if not done.reached:
            kept = f"{100 * done.share:.1f} % is the least"
            raise BudgetError(
                f"the target is out of reach: {kept} that the preset and the limits leave; {out} holds that model. Another "
                "--preset or fewer limits may help"
                if done.spent
                else f"the target is out of reach of the floor: {kept} that keeps it; {out} holds that model. Train longer, "
                "take smaller steps, or allow a larger drop",
                done.share,
            )


def _trainer(given: dict[str, Any], moment: Any) -> Trainer:
    if given["trainer"]:
        return Command(given["trainer"], given["data_path"], bool(given["sparsity"]))
    recipe = _recipe(given)  # says so where PyTorch is missing
    return Reference(recipe, given["data_path"], cli._reading(given), given["final_epochs"], moment, given["provider"])


def _metric(model: str, path: str, reading: Any) -> str:
    """The metric that the data allows: top1 for labels, psnr for targets, else likeness to the original."""
    samples = data.load(
        pathlib.Path(path), runtime.Session(model).inputs, 1, scale=reading.scale, mean=reading.mean, std=reading.std
    )
    return "top1" if samples.labels is not None else "psnr" if samples.targets is not None else "cosine"


def _plot_kind(path: str | None) -> str:
    if not path:
        return ""
    pareto.require_matplotlib()
    kind = pathlib.Path(path).suffix.lower().lstrip(".")
    if kind not in pareto.FORMATS:
        raise UsageError(f"{path}: a plot must end in .{', .'.join(pareto.FORMATS)}")
    return kind


def _plot(done: Iterated, kind: str) -> bytes:
    assert done.report.quality is not None
    before = done.report.quality[0]
    points = [(one.kept, one.metric, one.status == "good") for one in done.iterations]
    return pareto.draw_path(points, before.metric, before.value, kind)


def _tell(console: Any, done: Iterated, given: dict[str, Any], notes: list[str]) -> None:
    steps = [{**asdict(one), "metric": one.metric if math.isfinite(one.metric) else None} for one in done.iterations]
    content = {
        **replace(done.report, command=cli._command()).to_json(),
        "iterations": steps,
        "reached": done.reached,
    }  # fmt: skip
    content["notes"] = [*content.get("notes", ()), *notes]
    cli._write_html(given["html_path"], content)  # first: what fails here is told in the JSON
    cli._write_json(given["json_path"], content)
    if given["quiet"] or given["json_path"] == "-":
        return
    for line in (*_table(done), *(f"note     {note}" for note in notes), f"written  {given['written']}"):
        cli.say(line)


def _table(done: Iterated) -> Iterator[str]:
    """Steps, and the paper's Table 1 for this model."""
    assert done.report.quality is not None
    before, after = done.report.quality
    width = max(len(before.metric), 8)
    yield f"iteration     MAC  {before.metric:>{width}}"
    for one in done.iterations:
        yield f"{one.number:9}  {100 * one.kept:5.1f}%  {one.metric:{width}.6g}  {one.status}"
    yield ""
    yield f"{'':10}" + "".join(f"{title:>24}" for _, title, _ in COLUMNS) + f"{before.metric:>12}"
    for label, cost, value in (
        ("original", done.report.before, before.value),
        ("pruned", done.report.after, after.value),
    ):
        cells = (
            f"{cost[key] / unit:.4g} ({100 * cost[key] / max(1, done.report.before[key]):.0f} %)"
            for key, _, unit in COLUMNS
        )
        yield f"{label:10}" + "".join(f"{cell:>24}" for cell in cells) + f"{value:12.6g}"
