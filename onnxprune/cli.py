"""The command line: options in, exit code out; no logic."""

from __future__ import annotations

import io
import json
import os
import pathlib
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from functools import partial
from typing import Any, NoReturn, TextIO

import click
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from onnxprune import onnx_io, pipeline, quality, report, runtime
from onnxprune import profile as profiles
from onnxprune.arrays import SAMPLES
from onnxprune.coupling import ATTENTION
from onnxprune.encodings import SlicedEncodings, slice_encodings
from onnxprune.errors import FileError, OnnxPruneError, QualityError, UsageError
from onnxprune.files import alone_in, read_toml, require_plain
from onnxprune.manifest import FILE as MANIFEST
from onnxprune.manifest import PARTS
from onnxprune.metrics import METRICS
from onnxprune.options import COMPENSATE, MEASURED, MOST_CHANNELS, MOST_THREADS, Options, silent
from onnxprune.options import Progress as RunProgress
from onnxprune.parameters import Amount, InputShape, Numbers, Time
from onnxprune.passes.allocate import ALLOCATIONS
from onnxprune.passes.score import NAMES
from onnxprune.passes.select import PRESETS
from onnxprune.report import Report, page, text
from onnxprune.report.pictures import Picture
from onnxprune.report.rows import with_error
from onnxprune.search import Guard, prune_to_quality

PIPE_WIDTH = 200  # columns; tables are not folded where nobody watches
LONGEST_MESSAGE = 1000
CHANNELS: click.IntRange = click.IntRange(1, MOST_CHANNELS)
THREADS: click.IntRange = click.IntRange(1, MOST_THREADS)
RUNS_CODE = ("trainer", "scheduler")  # one is a command; with the other, pickled objects are exchanged
TEXTUAL = (click.Path, click.Choice, click.types.StringParamType, InputShape)
METRIC_NAMES = f"{', '.join(METRICS)}, or your own module:function"


class DefaultPrune(click.Group):
    """A group whose default command is ``prune``: ``onnxprune in.onnx out.onnx --target-mac 0.6``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert ``prune`` before arguments that name no command."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            args = ["prune", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete commands, and files, which the default command takes."""
        return [*super().shell_complete(ctx, incomplete), CompletionItem(incomplete, type="file")]

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **_: Any
    ) -> NoReturn:
        """Run a command and leave with its exit code; a wrong option costs one line, not click's four."""
        given = list(sys.argv[1:] if args is None else args) or ["--help"]
        try:
            line = shlex.join(["onnxprune", *given])
            code = super().main(given, prog_name or "onnxprune", standalone_mode=False, obj=line)
        except (click.ClickException, OnnxPruneError) as error:
            message = error.format_message() if isinstance(error, click.ClickException) else str(error)
            _fail(error, {"json_path": _json_path(given), "verbose": False}, message)
        except click.exceptions.Abort as error:
            _fail(error, {"json_path": _json_path(given), "verbose": False}, "interrupted", code=130)
        except OSError as error:  # of --help, say; commands turn theirs into others
            _discard(sys.stdout)
            where = error.filename or "standard output"
            message = f"{where}: cannot be used ({error.strerror})"
            _fail(error, {"json_path": None, "verbose": False}, message, code=FileError.exit_code)
        sys.exit(code if isinstance(code, int) else 0)


def _model_options(command: Callable) -> Callable:
    option = click.option("--threads", type=click.IntRange(0, THREADS.max), default=0, show_default=True,
                          help="Threads of onnxruntime; 0 leaves that to onnxruntime.")  # fmt: skip
    return option(_shared_options(command))


def _provider_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    names = [name.removesuffix("ExecutionProvider") for name in runtime.available()]
    return [name for name in names if name.lower().startswith(incomplete.lower())]


def _shared_options(command: Callable) -> Callable:
    for option in reversed(
        (
            click.option("--input-shape", "input_shapes", type=InputShape(), multiple=True, help="NAME:1,3,224,224."),
            click.option("--provider", default="", metavar="NAME", shell_complete=_provider_names,
                         help="onnxruntime execution provider.  [default: CUDA where it works; the CPU for proofs]"),
            click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of everything random."),
            _print_options,
        )
    ):  # fmt: skip
        command = option(command)
    return command


def _print_options(command: Callable) -> Callable:
    for option in reversed(
        (
            click.option("--json", "json_path", type=click.Path(), help="Write the report as JSON (- for stdout)."),
            click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
            click.option("-v", "--verbose", is_flag=True, help="Print every layer, and tracebacks."),
            click.option("--config", type=click.Path(), callback=_read_config, is_eager=True, expose_value=False,
                         help="Read options from a TOML file."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def _html_option(command: Callable) -> Callable:
    return click.option("--html", "html_path", type=click.Path(), help="Write the report as one HTML page.")(command)


def _read_config(ctx: click.Context, _: click.Parameter, path: str | None) -> None:
    """Use the table named like the command (or the top level) of a TOML file as defaults."""
    if path is None:
        return
    ctx.meta[_CONFIG] = path
    data = read_toml(path)
    own = data.get(ctx.info_name or "", {})
    if not isinstance(own, dict):
        raise UsageError(f"{path}: [{ctx.info_name}] is not a table")
    strangers = [name for name, value in data.items() if isinstance(value, dict) and name not in commands.commands]
    if strangers:
        raise UsageError(f"{path}: [{strangers[0]}] is no command")
    table = {**{k: v for k, v in data.items() if not isinstance(v, dict)}, **own}
    known = {name.lstrip("-"): option for option in ctx.command.params for name in option.opts}
    unknown = [key for key in table if key not in known]
    if unknown:
        raise UsageError(f"{path}: unknown option {unknown[0]}")
    chosen = {known[key].name: _setting(path, key, value, known[key]) for key, value in table.items()}
    ctx.default_map = {**(ctx.default_map or {}), **chosen}


def _setting(path: str, key: str, value: Any, option: click.Parameter) -> Any:
    """A value of a file of options as the command line would give it.

    Raises
    ------
    UsageError
        The option takes no such value, or it would run code: the file may be a stranger's.
    """
    if not isinstance(option, click.Option):
        raise UsageError(f"{path}: {key} is an argument, not an option; give it on the command line")
    values = value if isinstance(value, list) else [value]
    if key in RUNS_CODE or (key == "metric" and any(":" in str(each) for each in values)):
        raise UsageError(f"{path}: {key} = {value!r} would run code; give it on the command line")
    listed = option.multiple or isinstance(option.type, Numbers)
    kind = bool if option.is_flag else str if isinstance(option.type, TEXTUAL) else (str, int, float)
    fits = all(isinstance(each, kind) and isinstance(each, bool) == option.is_flag for each in values)
    if not fits or (isinstance(value, list) and not listed) or any("\0" in str(each) for each in values):
        raise UsageError(f"{path}: {key} = {value!r} is no value of --{key}")
    if option.is_flag:
        return not value if option.flag_value is False else value
    return [str(each) for each in values] if option.multiple else str(value)


def _select_options(command: Callable) -> Callable:
    for option in reversed(
        (
            click.option("--preset", type=click.Choice(list(PRESETS)), default="d", show_default=True,
                         help="How thresholds adapt per group."),
            click.option("--criterion", default="auto", show_default=True,
                         help=f"What makes a channel important: {', '.join((*MEASURED, *NAMES))}; auto is obs where "
                              "there is calibration data, else l2."),
            click.option("--profile", default="", metavar="NAME|FILE.toml",
                         help=f"Hardware that channel counts are for: {', '.join(profiles.names())}, or a file of yours."),
            click.option("--align", type=CHANNELS, default=1, help="Kept channels are a multiple of N."),
            click.option("--min-channels", type=CHANNELS, default=1, help="Least number of channels per group."),
            click.option("--max-prune", type=click.FloatRange(0, 1), default=1.0, help="Largest share to remove per group."),
            click.option("--ignore", multiple=True, help="Leave nodes, tensors or groups alone (glob, repeatable)."),
            click.option("--only", multiple=True, help="Prune nothing but these (glob, repeatable)."),
            click.option("--attention", type=click.Choice(ATTENTION), default="auto", show_default=True,
                         help="Remove whole heads, dimensions inside every head, or dimensions where they can (auto)."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def _target_options(command: Callable) -> Callable:
    command = click.option(
        "--latency-table",
        type=click.Path(),
        default="",
        help="CSV of the target's latencies (layer,inputs,outputs,ms); nothing is measured here.",
    )(command)
    command = click.option(
        "--target-latency",
        type=Time(),
        help="Share of latency to keep (at most 1), or a time (12ms); measured in onnxruntime.",
    )(command)
    for kind, what in (("size", "file size"), ("bandwidth", "bandwidth"), ("params", "parameters"), ("mac", "MAC")):
        text_ = f"Share of {what} to keep (at most 1), or an absolute amount (K, M, G, T)."
        command = click.option(f"--target-{kind}", type=Amount(), help=text_)(command)
    return command


def _calib_options(command: Callable) -> Callable:
    for option in reversed(
        (
            click.option("--calib", type=click.Path(), help="Calibration inputs, without labels: .npz, a folder, images."),
            click.option("--calib-memory", type=Amount(), default="2G", show_default=True,
                         help="Bytes that calibration may hold; what exceeds it is computed again."),
            click.option("--compensate", type=click.Choice(COMPENSATE), default="auto", show_default=True,
                         help="Fit the weights that stay: least-squares (auto with --calib), biases only, or not at all."),
            click.option("--allocation", type=click.Choice(ALLOCATIONS), default=ALLOCATIONS[0], show_default=True,
                         help="How groups compare under criterion obs."),
            click.option("--sensitivity", type=click.Path(), default="",
                         help="Table of onnxprune sensitivity by which groups compare."),
            click.option("--no-new-nodes", "new_nodes", is_flag=True, flag_value=False, default=True,
                         help="Add no Add node for a bias that compensation needs."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def _data_options(command: Callable) -> Callable:
    for option in reversed(
        (
            click.option("--output", type=click.Choice(["direct", "residual"]), default="direct",
                         help="What the network predicts."),
            click.option("--clip", is_flag=True, help="Limit predictions to 0..data range before comparing."),
            click.option("--crop-border", type=click.IntRange(0), default=0, metavar="N",
                         help="Rows and columns to leave out at each side of a picture."),
            click.option("--channels", type=click.Choice(["rgb", "y"]), default="rgb", show_default=True,
                         help="Compare all channels, or the luma (BT.601, 16 to 235) of RGB pictures."),
            click.option("--data-range", type=float, metavar="X", help="Largest value of a picture (default 1)."),
            click.option("--round-bits", type=click.IntRange(1, 16), metavar="N",
                         help="Round pictures (and their luma) to N bits before comparing, as files do: 8."),
            click.option("--scale", type=float, help="Factor for integer data (default for uint8: 1/255)."),
            click.option("--mean", type=Numbers(), help="Subtracted from scaled integer data."),
            click.option("--std", type=Numbers(), help="Divides scaled integer data."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def _encodings_options(command: Callable) -> Callable:
    for option in reversed(
        (
            click.option("--encodings", type=click.Path(), help="JSON of the model's quantization encodings (AIMET)."),
            click.option("--encodings-out", type=click.Path(), help="Write the encodings of the pruned model."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def silent_line(text_: str) -> None:
    """Say nothing."""


def _reading(given: Mapping[str, Any]) -> quality.Reading:
    return quality.Reading(**{field.name: given[field.name] for field in fields(quality.Reading)})


@click.group(cls=DefaultPrune, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="onnxprune")
def commands() -> None:
    """Remove channels from an ONNX graph until it meets a budget, and prove that nothing broke.

    \b
    Example:  onnxprune in.onnx out.onnx --target-mac 0.6
    """


@commands.command()
@click.argument("model", type=click.Path(), metavar="IN.onnx")
@click.argument("out", type=click.Path(), metavar="OUT.onnx")
@_target_options
@_select_options
@_calib_options
@click.option("--data", type=click.Path(), help="Evaluation data; shows the quality before and after.")
@click.option("--metric", help=f"Quality metric for --data: {METRIC_NAMES}.")
@_data_options
@click.option("--max-drop", type=float, help="Refuse a result whose metric falls by more than this.")
@click.option("--min-quality", type=float, help="Refuse a result whose metric is below this.")
@click.option("--keep-going", is_flag=True, help="Write the model although the quality guard failed (exit code 6).")
@click.option("--plan-out", type=click.Path(), help="Write the plan as JSON.")
@_encodings_options
@click.option("--proof/--no-proof", default=True, help="Prove the result (default), or skip that.")
@click.option(
    "--latency/--no-latency", default=True, help="Measure both models in onnxruntime (default), or skip that."
)
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@_html_option
@_model_options
def prune(model: str, out: str, **given: Any) -> None:
    """Prune IN.onnx until it meets a target, prove it, write OUT.onnx.

    \b
    Example:  onnxprune in.onnx out.onnx --target-mac 0.6 --preset d
    """
    with _run(given) as (console, options):
        guarded = given["max_drop"] is not None or given["min_quality"] is not None
        if not options.targets and not guarded:
            raise UsageError(
                "no target; give one, for example --target-mac 0.6, or a guard (--data, --metric, --max-drop) to search by"
            )
        _check_encodings(given)
        pipeline.check_output(model, pathlib.Path(out), force=given["force"])
        reading, notes = _reading(given), list[str]()
        quality.check_guard(given["data"], given["metric"], given["max_drop"], given["min_quality"], reading)
        with _progress(given) as progress:
            if options.targets:
                result = pipeline.prune(model, options, progress)
                measured = quality.compare_quality(
                    model, result.model, given["data"], given["metric"], reading=reading,
                    provider=options.provider, progress=progress, note=notes.append,
                )  # fmt: skip
            else:
                limits = Guard(given["data"], given["metric"], given["max_drop"], given["min_quality"], reading)
                tell = silent_line if given["quiet"] else partial(say, err=True)
                result = prune_to_quality(model, limits, options, progress, tell)
                measured = result.report.quality
        failed = quality.guard(measured, given["max_drop"], given["min_quality"])
        if failed and not given["keep_going"]:
            raise QualityError(f"{failed}; nothing was written (--keep-going writes it all the same)")
        shown: tuple[Picture, ...] = ()
        if given["html_path"] and given["data"]:
            shown = quality.compare_pictures(
                model, result.model, given["data"], given["metric"], reading, options.provider
            )
        encodings = _sliced_encodings(model, result, options, given)
        with alone_in(pathlib.Path(out).parent):
            done = pipeline.write(result, model, out, force=given["force"])
            done = replace(done, quality=measured, pictures=shown, notes=(*done.notes, *notes, *encodings.notes))
            given["written"] = out
            _write_encodings(given, encodings)
            plan = result.plan
            del result
            if given["plan_out"]:
                onnx_io.write(given["plan_out"], json.dumps(plan.to_json(), indent=1).encode())
            if given["latency"] and done.latency_ms is None and not given["latency_table"]:
                done = quality.with_latency(done, options.provider)
            _finish(console, done, given, text.summary)
        if failed:
            raise QualityError(f"{failed}; {out} was written because of --keep-going")


@commands.command()
@click.argument("model", type=click.Path())
@_select_options
@click.option("--tree", is_flag=True, help="Show the tree of modules and what each costs.")
@_html_option
@_model_options
def inspect(model: str, **given: Any) -> None:
    """Show cost per layer, groups of channels, what is frozen and why, and the reachable floor.

    \b
    Example:  onnxprune inspect model.onnx
    """
    with _run(given) as (console, options):
        _finish(console, pipeline.inspect(model, options), given, text.tree if given["tree"] else text.inspection)


@commands.command()
@click.argument("model", type=click.Path(), metavar="IN")
@click.argument("out", type=click.Path(), metavar="OUT")
@click.option("--plan", required=True, type=click.Path(), help="Plan written by prune --plan-out.")
@_encodings_options
@click.option("--proof/--no-proof", default=True, help="Prove the result (default), or skip that.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@_html_option
@_model_options
def apply(model: str, out: str, plan: str, **given: Any) -> None:
    """Replay a plan, on the same model or on a sibling with the same tensor names.

    \b
    Example:  onnxprune apply finetuned.onnx pruned.onnx --plan plan.json
    """
    with _run(given) as (console, options):
        _check_encodings(given)
        pipeline.check_output(model, pathlib.Path(out), force=given["force"])
        with _progress(given) as progress:
            result = pipeline.apply(model, plan, options, progress)
        encodings = _sliced_encodings(model, result, options, given)
        with alone_in(pathlib.Path(out).parent):
            done = pipeline.write(result, model, out, force=given["force"])
            done = replace(done, notes=(*done.notes, *encodings.notes))
            given["written"] = out
            _write_encodings(given, encodings)
            _finish(console, done, given, text.summary)


@commands.command()
@click.argument("original", type=click.Path())
@click.argument("pruned", type=click.Path())
@click.option("--plan", required=True, type=click.Path(), help="Plan that made PRUNED of ORIGINAL.")
@_html_option
@_model_options
def verify(original: str, pruned: str, plan: str, **given: Any) -> None:
    """Prove a pruned model again from files alone; weight values may differ.

    \b
    Example:  onnxprune verify original.onnx trained.onnx --plan plan.json
    """
    with _run(given) as (console, options):
        with _progress(given) as progress:
            done = pipeline.verify(original, pruned, plan, options, progress)
        _finish(console, done, given, partial(text.summary, verb="verified"))


@commands.command()
@click.argument("model", type=click.Path())
@click.option(
    "--data", required=True, type=click.Path(), help="Evaluation data: .npz, a folder, an ONNX test_data_set."
)
@click.option("--metric", required=True, help=f"{METRIC_NAMES}.")
@click.option(
    "--reference",
    type=click.Path(),
    help="Original to compare with: for agreement, or cosine and mse where the data has no targets.",
)
@_data_options
@_model_options
def evaluate(model: str, data: str, metric: str, **given: Any) -> None:
    """Measure the quality of a model on a data set.

    \b
    Example:  onnxprune evaluate model.onnx --data eval.npz --metric psnr
    """
    with _run(given) as (_, options):
        notes: list[str] = []
        with _progress(given) as progress:
            found = quality.evaluate(
                model, data, metric, reference=given["reference"], reading=_reading(given),
                provider=options.provider, progress=progress, note=notes.append,
            )  # fmt: skip
        content = {
            "schema": 1,
            "quality": {"metric": found.metric, "value": found.value, "samples": found.samples},
            "provider": runtime.provider_for(options.provider),
            "threads": options.threads,
            "notes": notes,
        }
        _write_json(given["json_path"], content)
        if not given["quiet"] and given["json_path"] != "-":
            say(f"{found.metric} {found.value:.6g} over {found.samples} samples")
            for note in notes:
                say(f"note {note}")


@contextmanager
def _run(given: dict[str, Any]) -> Iterator[tuple[Console, Options]]:
    """Check files, build options, and turn errors into an exit code, a message and an ``error`` in the JSON report."""
    try:
        console = Console(stderr=given["json_path"] == "-")
        if not console.is_terminal:
            console.width = PIPE_WIDTH
        _check_places(given)
        _check_reads(given)
        _check_writes(given)
        options = _options(given)
        with runtime.threads_limited(options.threads):
            yield console, options
    except FileError as error:
        kept = f"; {given['written']} was written before" if given.get("written") else ""
        _fail(error, given, f"{error}{kept}")
    except OnnxPruneError as error:
        _fail(error, given, str(error))
    except (KeyboardInterrupt, click.exceptions.Abort) as error:
        kept = f"{given['written']} was written" if given.get("written") else "nothing was written"
        _fail(error, given, f"interrupted; {kept}", code=130)
    except click.ClickException:
        raise
    except MemoryError as error:
        what = f" ({error})" if str(error) else ""
        _fail(error, given, f"out of memory{what}; give a smaller --input-shape or less data, or more memory", code=3)
    except Exception as error:
        _fail(
            error,
            given,
            f"internal error: {type(error).__name__}: {error}",
            advice=["This is a bug; please report it with the output of -v."],
        )


MODELS = ("model", "models", "original", "pruned", "a", "b", "reference")
FILES = ("calib", "data", "data_path", "val", "sensitivity", "latency_table", "profile", "encodings", "plan", "map_path",
         "source", "directory")  # fmt: skip
OUTPUTS = ("out", "json_path", "html_path", "plan_out", "encodings_out", "csv_path", "plot")
FOLDERS = ("state", "out_dir")
"""Parameters of all commands that name models and other files to read, files to write, and folders of runs."""

_CONFIG = "onnxprune.config"  # where click keeps the path of --config


def _check_places(given: dict[str, Any]) -> None:
    """Refuse paths that lead nowhere: names that are too long, links in a circle, a current folder that is gone."""
    named = {**click.get_current_context().params, **given}
    for path in _paths(named, MODELS + FILES + OUTPUTS + FOLDERS):
        try:
            with suppress(FileNotFoundError, NotADirectoryError):
                pathlib.Path(path).stat()
            pathlib.Path(path).resolve()
        except (OSError, ValueError) as error:
            if path == named["json_path"]:
                given["json_path"] = None
            raise FileError(
                f"{path}: cannot be found ({getattr(error, 'strerror', error)}); name another path"
            ) from error


def _check_reads(given: dict[str, Any]) -> None:
    """Refuse to read pipes and devices, which may never end."""
    for path in _paths({**click.get_current_context().params, **given}, MODELS + FILES):
        require_plain(path)


def _check_writes(given: dict[str, Any]) -> None:
    """Refuse to write one file over another that is read or written, and into folders that do not exist.

    A report that would go over another file is not written at all, not even to tell of the refusal.
    """
    context = click.get_current_context()
    named = {**context.params, **given}
    report_path = named["json_path"]
    taken = {
        pathlib.Path(path).resolve() for path in (*_paths(named, MODELS + FILES), context.meta.get(_CONFIG)) if path
    }
    targets = [path for path in _paths(named, OUTPUTS) if path != "-"]
    # Data can be overwritten where a file is there, or beside OUT, and only then is a model worth reading twice.
    beside = named.get("out") and len(targets) > 1
    at_risk = beside or any(pathlib.Path(path).is_file() for path in targets)
    data = _data_of(_paths(named, MODELS)) if at_risk else {}
    twins = (
        {pathlib.Path(named["out"]).parent.resolve() / name for name in data.values()} if named.get("out") else set()
    )
    for path in sorted(targets, key=lambda path: path == report_path):
        target = pathlib.Path(path).resolve()
        for others, what in (
            (taken, "is also another file of this command"),
            (data.keys(), "holds the input's data"),
            (twins if path != named.get("out") else (), "is where the input's data belongs beside OUT"),
            (
                {target} if _is_part(target, taken, named.get("directory")) else (),
                "is part of a folder of this command",
            ),
        ):
            if target in others or any(_same_file(target, other) for other in others):
                if path == report_path:
                    given["json_path"] = None
                raise UsageError(f"{path}: {what}; choose another name")
        taken.add(target)
    for file in map(pathlib.Path, targets):
        if file.is_dir():
            raise UsageError(f"{file}: is a folder; name a file in it")
        if not file.parent.is_dir():
            raise FileError(f"{file}: the folder {file.parent} does not exist")
    if given.get("html_path") == "-":
        raise UsageError("--html -: a page goes into a file; name one")
    if given.get("html_path"):
        page.require_library()


def _check_encodings(given: Mapping[str, Any]) -> None:
    if bool(given["encodings"]) != bool(given["encodings_out"]):
        raise UsageError("--encodings and --encodings-out go together")


def _sliced_encodings(
    model: str, result: pipeline.Result, options: Options, given: Mapping[str, Any]
) -> SlicedEncodings:
    """Slice encodings, if any, before anything is written."""
    if not given["encodings"]:
        return SlicedEncodings({})
    done = slice_encodings(given["encodings"], result.plan, model, result.model, options)
    if result.report.weights == "exact":
        return done
    return replace(
        done, notes=(*done.notes, "weights were fitted: make their encodings anew, only channels were sliced")
    )


def _write_encodings(given: Mapping[str, Any], sliced: SlicedEncodings) -> None:
    if given["encodings_out"]:
        onnx_io.write(given["encodings_out"], json.dumps(sliced.encodings, indent=4).encode())


def _paths(named: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Paths that parameters of these names hold; a profile that goes by its name holds none."""
    values = {name: named.get(name) for name in names}
    if not str(values.get("profile")).endswith(".toml"):
        values["profile"] = None
    return [path for value in values.values() if value for path in ([value] if isinstance(value, str) else value)]


def _data_of(models: Sequence[str]) -> dict[pathlib.Path, str]:
    """Files with external data of models, as far as these can be read, and what the models call them."""
    paths = map(pathlib.Path, models)
    return {path.parent / name: name for path in paths for name in onnx_io.locations(path)}


def _is_part(target: pathlib.Path, folders: Iterable[pathlib.Path], directory: str | None) -> bool:
    """Whether a file is a sample in a folder of data, or one of those that the artifact in ``directory`` consists of."""
    if directory and target.parent == pathlib.Path(directory).resolve():
        return target.name in (MANIFEST, *PARTS)
    sample = target.is_file() and target.suffix.lower() in SAMPLES
    return sample and any(target.is_relative_to(folder) for folder in folders if folder.is_dir())


def _same_file(a: pathlib.Path, b: pathlib.Path) -> bool:
    return a.is_file() and b.is_file() and a.samefile(b)


def say(*lines: str, err: bool = False) -> None:
    """Print lines that hold names from files: nothing in them commands a terminal, or begins a line of its own."""
    with _printing(err=err):
        click.echo("\n".join(map(text.clean, lines)), err=err)


@contextmanager
def _printing(*, err: bool = False) -> Iterator[None]:
    """Tell of output that is not taken; of standard error's there is no place to tell.

    Raises
    ------
    FileError
        Standard output does not take it.
    """
    try:
        yield
    except OSError as error:
        _discard(sys.stderr if err else sys.stdout)
        why = "its reader is gone" if isinstance(error, BrokenPipeError) else f"cannot be written ({error.strerror})"
        if not err:
            raise FileError(f"standard output: {why}") from error


def _discard(stream: TextIO) -> None:
    """Send what a stream still holds nowhere: Python would try again as it ends, and end with a code of its own."""
    with suppress(OSError, ValueError):  # it is none of the system's
        handle = stream.fileno()
        os.dup2(os.open(os.devnull, os.O_WRONLY), handle)


def _one_line(message: str) -> str:
    """A message as one line; of a long one, which quotes what is in a file, the middle is left out."""
    line = " ".join(message.split())
    if len(line) <= LONGEST_MESSAGE:
        return line
    return f"{line[: 2 * LONGEST_MESSAGE // 3]} ... {line[-LONGEST_MESSAGE // 3 :]}"


def _fail(
    error: BaseException, given: Mapping[str, Any], message: str, code: int | None = None, advice: Sequence[str] = ()
) -> NoReturn:
    code = getattr(error, "exit_code", 1) if code is None else code
    if given["verbose"]:
        say(*"".join(traceback.format_exception(error)).splitlines(), err=True)
    message = _one_line(message)
    say(f"onnxprune: {message}", *advice, err=True)
    try:
        kept = with_error(given["json_path"], code, message)
        _write_json(given["json_path"], kept or report.error_json(code, message))
    except OnnxPruneError as second:
        if not message.startswith((f"{given['json_path']}: ", str(second))):  # which tell of the report already
            say(f"onnxprune: {_one_line(str(second))}", err=True)
    sys.exit(code)


def _options(given: Mapping[str, Any]) -> Options:
    kinds = ("mac", "params", "bandwidth", "size", "latency")
    targets = {kind: given[f"target_{kind}"] for kind in kinds if given.get(f"target_{kind}") is not None}
    names = Options.__dataclass_fields__
    chosen = {name: value for name, value in given.items() if name in names and name != "input_shapes"}
    if "calib_memory" in chosen:
        chosen["calib_memory"] = int(chosen["calib_memory"])
    return Options(targets=targets, input_shapes=dict(given.get("input_shapes", ())), **chosen)


@contextmanager
def _progress(given: Mapping[str, Any]) -> Iterator[RunProgress]:
    """Show a progress bar on a terminal, and nothing in a pipe."""
    console = Console(stderr=True)
    if given["quiet"] or not console.is_terminal:
        yield silent
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield progress


def _finish(console: Console, done: Report, given: Mapping[str, Any], show: Callable[..., None]) -> None:
    content = replace(done, command=_command()).to_json()
    _write_html(given["html_path"], content)  # first: what fails here is told in the JSON
    _write_json(given["json_path"], content)
    if not given["quiet"]:
        _print(console, partial(show, verbose=given["verbose"]), done)


def _print(console: Console, show: Callable[[Console, Any], None], what: Any) -> None:
    """Print what a function shows on a console, in its colours."""
    with _printing(err=console.stderr):
        with console.capture() as shown:
            show(console, what)
        lines = (line.rstrip() for line in shown.get().splitlines())
        click.echo("\n".join(lines), err=console.stderr, color=console.is_terminal or None)


def _write_json(path: str | None, content: Mapping[str, Any]) -> None:
    if path == "-":
        with _printing():
            click.echo(json.dumps(content, indent=1))
    elif path:
        onnx_io.write(path, json.dumps(content, indent=1).encode())


def _write_html(path: str | None, content: Mapping[str, Any]) -> None:
    if path:
        onnx_io.write(path, page.page(content).encode(errors="backslashreplace"))  # names of files may be no UTF-8


def _command() -> str:
    """The command line that is running, as a shell takes it."""
    return str(click.get_current_context().find_root().obj)


def _json_path(args: Sequence[str]) -> str | None:
    """Where ``--json`` points in arguments that could not be parsed; None where that is a file of another argument, too."""
    values = [word.partition("=")[2] if word.startswith("--") else word for word in args]
    paths = [values[i + 1] for i, word in enumerate(args[:-1]) if word == "--json"]
    paths += [value for word, value in zip(args, values, strict=True) if word.startswith("--json=")]
    if not paths:
        return None
    try:
        models = [value for value in values if pathlib.Path(value).is_file()]
        resolved = [pathlib.Path(value).resolve() for value in values if value] + [
            path.resolve() for path in _data_of(models)
        ]
        mine = pathlib.Path(paths[0]).resolve()
        shared = resolved.count(mine) > 1 or any(other != mine and _same_file(other, mine) for other in resolved)
    except (OSError, RuntimeError, ValueError):  # names that are too long, links in a circle
        return None
    return None if shared else paths[0]


def main() -> None:
    """Run the command line; characters that its streams do not know are written as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    commands.main()


import onnxprune.cli_artifact  # noqa: E402 (these add their commands to the group above)
import onnxprune.cli_checkpoint  # noqa: E402
import onnxprune.cli_completion  # noqa: E402
import onnxprune.cli_finetune  # noqa: E402
import onnxprune.cli_iterate  # noqa: E402
import onnxprune.cli_report  # noqa: E402
import onnxprune.cli_schema  # noqa: E402
import onnxprune.cli_sensitivity  # noqa: E402
import onnxprune.cli_sweep  # noqa: E402, F401
