"""The command ``finetune``: train an artifact's student (extra ``train``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from onnxprune import cli, onnx_io
from onnxprune.metrics import METRICS

if TYPE_CHECKING:
    from onnxprune.train import Recipe, Trained
    from onnxprune.train.trainer import Moment


def _recipe_options(command: Callable) -> Callable:
    """Add the fields of :class:`onnxprune.train.Recipe`, but for the seed, which every command has."""
    for option in reversed(
        (
            click.option("--epochs", type=click.IntRange(1), default=20, show_default=True, help="Passes over the data."),
            click.option("--batch", type=click.IntRange(1), default=32, show_default=True,
                         help="Samples of a step, over all processes."),
            click.option("--loss", type=click.Choice(["auto", "l1", "l2", "charbonnier", "cross-entropy", "none"]),
                         default="auto", show_default=True,
                         help="Distance to targets or labels: cross-entropy for labels, l1 for targets."),
            click.option("--distill", type=click.FloatRange(0), metavar="W",
                         help="Weight of the distance to the teacher's outputs.  [default: 1 unless there are targets]"),
            click.option("--temperature", type=click.FloatRange(0, min_open=True), default=4.0, show_default=True,
                         help="Softens classes where student and teacher are compared by them."),
            click.option("--features", type=click.FloatRange(0), default=0.0, metavar="W",
                         help="Weight of the distance to the teacher's features."),
            click.option("--sparsity", type=click.FloatRange(0), default=0.0, metavar="W",
                         help="Weight of the group lasso over channels."),
            click.option("--optimizer", type=click.Choice(["adam", "soap", "sgd"]), default="adam", show_default=True,
                         help="soap: Adam in a basis that fits each layer."),
            click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=5e-4, show_default=True),
            click.option("--weight-decay", type=click.FloatRange(0), default=0.0),
            click.option("--warmup", type=click.FloatRange(0, 1, max_open=True), default=0.05, show_default=True,
                         help="Share of the steps in which the rate rises; then it falls along a cosine."),
            click.option("--clip-gradient", "clip_gradient", type=click.FloatRange(0), default=1.0, show_default=True,
                         help="Largest norm of the gradient; 0 for none."),
            click.option("--ema", type=click.FloatRange(0, 1, max_open=True), default=0.0,
                         help="Decay of a moving average of the weights, which is then judged and written."),
            click.option("--crop", type=click.IntRange(0), default=0, metavar="N", help="Random crops of NxN (of inputs)."),
            click.option("--pad", type=click.IntRange(0), default=0, metavar="N",
                         help="Zeros around pictures before they are cropped back."),
            click.option("--flip", type=click.Choice(["none", "horizontal", "all"]), default="none", show_default=True,
                         help="Mirror images; all: the eight symmetries of the square."),
            click.option("--noise", type=click.FloatRange(0), default=0.0, metavar="X",
                         help="Deviation of Gaussian noise added to inputs; without targets the clean input is one."),
            click.option("--mixup", type=click.FloatRange(0), default=0.0, metavar="A",
                         help="Blend inputs by shares from Beta(A, A), for learning from the teacher alone (--loss none)."),
            click.option("--precision", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32",
                         show_default=True, help="Type of convolutions and products; weights stay float32."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def _recipe(given: Mapping[str, Any], **changes: Any) -> Recipe:
    """The recipe that the options name."""
    from onnxprune.train import Recipe  # noqa: PLC0415 (needs torch)

    names = Recipe.__dataclass_fields__
    chosen = {name: given[name] for name in names if name in given and name != "clip"}
    return Recipe(**{**chosen, "clip": given["clip_gradient"], **changes})


@cli.commands.command()  # type: ignore[has-type]  # the two modules import each other
@click.argument("directory", type=click.Path(), metavar="DIR")
@click.argument("out", type=click.Path(), metavar="OUT.onnx")
@click.option("--data", required=True, type=click.Path(), help="Training data: .npz, a folder, images.")
@click.option("--val", type=click.Path(), help="Data that each epoch is judged by; the best epoch is kept.")
@click.option("--metric", help=f"Metric for --val: {', '.join(METRICS)}, or your own module:function.")
@_recipe_options
@cli._data_options
@click.option("--state", type=click.Path(), help="Folder of checkpoints and metrics.csv.  [default: OUT.onnx.training]")
@click.option("--restart", is_flag=True, help="Begin anew where an interrupted run left a checkpoint.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@cli._model_options
def finetune(directory: str, out: str, **given: Any) -> None:
    """Train the student of a training artifact, and write it as the same graph with other weights.

    A run that was stopped goes on from its last checkpoint when it is started again. Several processes:
    torchrun --nproc-per-node N -m onnxprune finetune ...

    \b
    Example:  onnxprune finetune artifact/ out.onnx --data train.npz --val eval.npz --metric psnr
    """
    with cli._run(given) as (_, options):
        recipe = _recipe(given)
        from onnxprune.train import finetune as train  # noqa: PLC0415 (needs torch)

        with _moments(given) as moment:
            done = train(
                directory, given["data"], out, recipe, validation=given["val"], metric=given["metric"],
                reading=cli._reading(given), folder=given["state"], force=given["force"], restart=given["restart"],
                provider=options.provider, threads=options.threads, moment=moment,
            )  # fmt: skip
        if done is None:
            return  # another process tells
        cli._write_json(given["json_path"], _report(directory, out, done))
        if not given["quiet"] and given["json_path"] != "-":
            for line in _summary(out, done):
                cli.say(line)


def _report(directory: str, out: str, done: Trained) -> dict[str, Any]:
    return {
        "schema": 1,
        "artifact": str(directory),
        "output": {"path": str(out), "sha256": onnx_io.sha256(out)},
        "metric": None if done.metric is None else {"name": done.name, "before": done.before, "after": done.metric},
        "epochs": [vars(epoch) for epoch in done.history],
        "notes": list(done.notes),
    }


def _summary(out: str, done: Trained) -> Iterator[str]:
    if done.resumed:
        yield f"note    went on after epoch {done.resumed} of an interrupted run"
    if done.history:
        first, last = done.history[0], done.history[-1]
        yield f"loss    {first.loss:.5g} in epoch 1, {last.loss:.5g} in epoch {last.epoch}"
    if done.metric is not None:
        yield f"{done.name:7} {done.before:.6g} -> {done.metric:.6g}"
    yield from (f"note    {note}" for note in done.notes)
    yield f"wrote   {out}: the pruned graph with other weights, verified against the plan"


@contextmanager
def _moments(given: Mapping[str, Any]) -> Iterator[Callable[[Moment], None]]:
    """Show epoch, loss, metric and time left: a bar on a terminal, else a line per epoch."""
    console = Console(stderr=True)
    if given["quiet"] or int(os.environ.get("RANK", "0")) > 0:
        yield lambda now: None
        return
    if not console.is_terminal:
        yield _lines
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("train", total=None)

        def show(now: Moment) -> None:
            metric = "" if now.metric is None else f" best {now.metric:.5g}"
            bar.update(
                task, completed=now.step, total=now.steps,
                description=f"epoch {now.epoch}/{now.epochs} loss {now.loss:.4g}{metric}",
            )  # fmt: skip

        yield show


def _lines(now: Moment) -> None:
    if now.step * now.epochs % now.steps == 0:
        metric = "" if now.metric is None else f", best so far {now.metric:.6g}"
        cli.say(f"epoch {now.epoch}/{now.epochs}: loss {now.loss:.5g}{metric}", err=True)
