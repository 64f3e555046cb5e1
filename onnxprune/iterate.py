"""Iterate: the paper's loop. Train with the regularizer, prune a step, train again, measure; back off where quality drops.

Every step's result lies in a folder of its own and is found there by a run that goes on after a kill: the loop itself is a
function of those results, so that it ends where an undisturbed one does.
"""

from __future__ import annotations

import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from onnxprune import external, onnx_io, parcels, pipeline, quality, runtime
from onnxprune.artifact import export_artifact
from onnxprune.budget import Budget
from onnxprune.compose import compose
from onnxprune.coupling import Coupling
from onnxprune.errors import BudgetError, ModelError, ProofError, QualityError, UsageError
from onnxprune.manifest import read_artifact
from onnxprune.metrics import Metric
from onnxprune.metrics import find as find_metric
from onnxprune.options import Clock, Options, Progress, silent
from onnxprune.passes.validate import Quality
from onnxprune.plan import Plan, make_plan
from onnxprune.protos import named_tensors
from onnxprune.quality import Reading
from onnxprune.report import Report
from onnxprune.steps import OUT_OF_REACH, Iteration, open_folder, recall, remember
from onnxprune.trainers import Trainer

KINDS = ("mac", "params", "bandwidth")


@dataclass(frozen=True)
class Pace:
    """How the loop steps, and what it must not lose.

    Attributes
    ----------
    step, min_step
        Share of the original's cost that a step removes; it is halved after a step that lost too much, and the loop ends
        once it is below ``min_step``.
    max_drop, min_quality
        Floor of the metric; None for none.
    """

    step: float = 0.1
    min_step: float = 0.01
    max_drop: float | None = None
    min_quality: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.min_step <= self.step < 1:
            raise UsageError(f"step {self.step}, min-step {self.min_step}: 0 < min-step <= step < 1")
        if any(limit is not None and not math.isfinite(limit) for limit in (self.max_drop, self.min_quality)):
            raise UsageError("max-drop and min-quality must be finite numbers")


@dataclass(frozen=True)
class Iterated:
    """What ``iterate`` returns.

    Attributes
    ----------
    report
        Of the model that was written against the original, as ``verify`` gives it, with quality.
    reached
        Whether the target was met (True where there was none).
    """

    iterations: tuple[Iteration, ...]
    plan: Plan
    report: Report
    share: float
    reached: bool
    notes: tuple[str, ...] = ()

    @property
    def spent(self) -> bool:
        """Whether the loop ended for want of channels alone: no step lost too much."""
        return all(one.status in ("good", OUT_OF_REACH) for one in self.iterations)


@dataclass
class _Loop:
    """Everything that the steps share."""

    original: pathlib.Path
    folder: pathlib.Path
    options: Options
    pace: Pace
    trainer: Trainer
    measure: Callable[[pathlib.Path], Quality]
    before: Quality
    coupling: Coupling
    whole: Mapping[str, float]
    goals: Mapping[str, float]
    say: Callable[[str], None]
    progress: Progress
    done: list[Iteration] = field(default_factory=list)


def iterate(
    model: str | pathlib.Path, out: str | pathlib.Path, trainer: Trainer, validation: str | pathlib.Path,
    metric: str | Metric, options: Options, pace: Pace | None = None, *, reading: Reading | None = None,
    folder: str | pathlib.Path | None = None, force: bool = False, restart: bool = False,
    say: Callable[[str], None] = lambda line: None, progress: Progress = silent,
) -> Iterated:  # fmt: skip
    """Prune a little, train, check the metric, go on, until the target is met or the metric forbids more.

    Parameters
    ----------
    validation, metric
        What a step is judged by; the original's value is the reference of ``max_drop``.
    options
        The final targets (any of ``mac``, ``params``, ``bandwidth``), preset, criterion, calibration data and so on.
        Without a target the pace's floor decides alone.
    folder
        Where every step's model, plan, metric and settings go (default: ``OUT.iterations``). A run that was killed goes
        on from there.

    Raises
    ------
    QualityError
        Not even the smallest step keeps the metric; nothing was written.
    BudgetError
        Not even the smallest step is possible under the preset and the limits; nothing was written.
    UsageError
        Options contradict each other, or the folder is of another run.
    """
    pace, reading = pace or Pace(), reading or Reading()
    original, out = pathlib.Path(model), pathlib.Path(out)
    chosen = find_metric(metric)
    _check(options, pace, chosen, reading)
    pipeline.check_output(original, out, force=force)
    folder = pathlib.Path(folder) if folder is not None else out.with_name(f"{out.name}.iterations")
    with runtime.threads_limited(options.threads):
        loop = _begin(
            original,
            folder,
            options,
            pace,
            trainer,
            validation,
            chosen,
            reading,
            restart=restart,
            say=say,
            progress=progress,
        )
        return _run(loop, out)


def _begin(
    original: pathlib.Path, folder: pathlib.Path, options: Options, pace: Pace, trainer: Trainer,
    validation: str | pathlib.Path, metric: Metric, reading: Reading, *, restart: bool, say: Callable[[str], None],
    progress: Progress,
) -> _Loop:  # fmt: skip
    """Read and measure the original, and open the folder."""
    clock = Clock()
    loaded = pipeline.load(original, options, clock)
    before = loaded.cost.of(np.ones(loaded.coupling.n_classes, bool))
    budget = Budget(options.targets, before, 0)

    def measure(path: pathlib.Path) -> Quality:
        return quality.evaluate(
            path, validation, metric, reference=original, reading=reading, provider=options.provider
        )

    goals = {kind: budget.limit(kind) for kind in budget.kinds}  # effective MAC, too: shares of the original's
    goals = goals or {"mac": pipeline.floor(loaded, options)["mac"]}
    first = measure(original)
    settings = {
        **{"model": parcels.digest(original), "validation": parcels.contents(validation), "metric": metric.name},
        **{name: value for name, value in parcels.settings(options).items() if name != "threads"},
        **vars(pace),
        **{"how outputs are read": vars(reading), **trainer.settings()},
    }
    open_folder(folder, settings, restart=restart)
    loop = _Loop(
        original, folder, options, pace, trainer, measure, first, loaded.coupling, before, goals, say, progress
    )
    say(f"original: {metric.name} {loop.before.value:.6g}")
    return loop


def _check(options: Options, pace: Pace, metric: Metric, reading: Reading) -> None:
    if strange := sorted(options.targets.keys() - set(KINDS)):
        raise UsageError(f"target {strange[0]}: iterate takes targets of {', '.join(KINDS)}")
    if not options.targets and pace.max_drop is None and pace.min_quality is None:
        raise UsageError("no target and no floor; give --target-mac, or --max-drop, or both")
    metric.check(reading)


# -- the loop ------------------------------------------------------------------------------------------------------------


def _run(loop: _Loop, out: pathlib.Path) -> Iterated:
    share, step, best = 1.0, loop.pace.step, None
    goal = min(value / loop.whole[kind] for kind, value in loop.goals.items() if loop.whole[kind])  # all are met there
    number = 0
    if loop.trainer.sparse and goal < 1:
        first = _iteration(loop, number, 1.0, None, last=False)
        best = number if first.status == "good" else None
    while share > goal and step >= loop.pace.min_step:
        number += 1
        ask = share - step if share - step > goal + 1e-9 else goal
        found = _iteration(loop, number, ask, best, last=ask <= goal)
        if found.status == "good":
            share, best = ask, number
        else:
            step /= 2
    taken = any(one.status == "good" and one.share < 1 for one in loop.done)
    if taken and share > goal and loop.trainer.sparse:
        number += 1
        polished = _iteration(loop, number, share, best, last=True, prune=False)
        sign = 1 if loop.before.higher_is_better else -1
        best_metric = next(one.metric for one in loop.done if one.number == best)
        best = number if polished.status == "good" and sign * polished.metric >= sign * best_metric else best
    if goal < 1 and not taken and all(one.status == OUT_OF_REACH for one in loop.done if one.share < 1):
        raise BudgetError(
            "target out of reach: not even the smallest step leaves a model that the preset and the limits allow; "
            'see "onnxprune inspect" for what is frozen and why'
        )
    if goal < 1 and not taken:
        raise QualityError(
            f"not even {100 * step * 2:.3g} % could be taken without losing more {loop.before.metric} than allowed; "
            "nothing was written. Train longer, or allow a larger drop"
        )
    return _finish(loop, out, best, share, reached=share <= goal or not loop.options.targets)


def _finish(loop: _Loop, out: pathlib.Path, best: int | None, share: float, *, reached: bool) -> Iterated:
    """Verify the last good model against the original once more, and write it."""
    folder = _folder(loop, best or 0)
    trained = folder / "trained.onnx" if best is not None else loop.original
    plan = pipeline.read_plan(folder / "plan.json") if best is not None else _everything(loop)
    report = pipeline.verify(loop.original, trained, plan, replace(loop.options, targets={}))
    onnx_io.copy_apart(trained, out)
    after = loop.measure(out)
    report = replace(report, quality=(loop.before, after), output={"path": str(out), "sha256": onnx_io.sha256(out)})
    return Iterated(tuple(loop.done), plan, report, share, reached)


def _everything(loop: _Loop) -> Plan:
    return make_plan(loop.coupling, np.ones(loop.coupling.n_classes, bool))


def _folder(loop: _Loop, number: int) -> pathlib.Path:
    return loop.folder / f"iteration-{number:03}"


def _iteration(
    loop: _Loop, number: int, share: float, base: int | None, *, last: bool, prune: bool = True
) -> Iteration:
    """Prune the model of iteration ``base`` (None: the original) to a share of the original's cost, train, measure.

    What an earlier run has done of it is not done again.
    """
    folder, begin = _folder(loop, number), time.monotonic()
    folder.mkdir(exist_ok=True)
    found = recall(folder)
    if found is None:
        try:
            plan, kept = _pruned(loop, folder, share, base, prune=prune and share < 1)
        except BudgetError:
            found = Iteration(number, share, 0.0, math.nan, OUT_OF_REACH, time.monotonic() - begin)
        else:
            loop.say(f"iteration {number}: pruned to {100 * kept:.1f} % of MAC, training")
            if not (folder / "trained.onnx").exists():
                loop.trainer(folder / "artifact", folder / "trained.onnx", folder / "training", last=last)
            found = _judged(loop, number, share, kept, plan, begin)
        remember(folder, found)
    loop.done.append(found)
    loop.say(
        f"iteration {number}: {100 * found.kept:.1f} % of MAC, {loop.before.metric} {found.metric:.6g}, {found.status}"
    )
    return found


def _judged(loop: _Loop, number: int, share: float, kept: float, plan: Plan, begin: float) -> Iteration:
    """Verify what training has left, and measure it; a network that no longer computes numbers is a bad step."""
    folder = _folder(loop, number)
    trained = folder / "trained.onnx"
    try:
        if _diverged(folder / "pruned.onnx", trained):
            return Iteration(number, share, kept, math.nan, "diverged", round(time.monotonic() - begin, 1))
        pipeline.verify(loop.original, trained, plan, replace(loop.options, targets={}, proof=False))
    except (ProofError, ModelError) as error:
        trained.unlink(missing_ok=True)  # or a trainer that has been mended would not be asked again
        message = f"iteration {number}: the trainer's result cannot be used: {error}; mend it and run iterate again"
        raise type(error)(message) from error
    try:
        after = loop.measure(trained)
    except ModelError as error:
        loop.say(f"iteration {number}: {error}")
        return Iteration(number, share, kept, math.nan, "diverged", round(time.monotonic() - begin, 1))
    bad = quality.guard((loop.before, after), loop.pace.max_drop, loop.pace.min_quality)
    return Iteration(number, share, kept, after.value, "too low" if bad else "good", round(time.monotonic() - begin, 1))


def _diverged(pruned: pathlib.Path, trained: pathlib.Path) -> bool:
    """Whether training has left NaN or infinity in a weight that was finite."""
    before = {tensor.name: tensor for tensor in named_tensors(onnx_io.load(pruned).graph)}
    return any(
        tensor.name in before and not _finite(tensor) and _finite(before[tensor.name])
        for tensor in named_tensors(onnx_io.load(trained).graph)
    )


def _finite(tensor: onnx.TensorProto) -> bool:
    value = external.array(tensor)
    floats = value.dtype.kind in "fV"  # V: bfloat16
    return not floats or bool(np.isfinite(value.astype(np.float64)).all())


def _pruned(loop: _Loop, folder: pathlib.Path, share: float, base: int | None, *, prune: bool) -> tuple[Plan, float]:
    """Write model, plan against the original and artifact of a step; returns the plan and the share of MAC it keeps."""
    earlier = None if base is None else _folder(loop, base)
    model = loop.original if earlier is None else earlier / "trained.onnx"
    first = _everything(loop) if earlier is None else pipeline.read_plan(earlier / "plan.json")
    if not (folder / "plan.json").exists():
        if prune:
            targets = {k: max(goal, share * loop.whole[k]) for k, goal in loop.goals.items()}
            result = pipeline.prune(model, replace(loop.options, targets=targets), loop.progress)
            plan = result.plan if earlier is None else compose(first, result.plan, loop.coupling)
            onnx_io.save(result.model, folder / "pruned.onnx")
        else:
            plan = first
            onnx_io.copy(model, folder / "pruned.onnx", force=True)
        onnx_io.write(folder / "plan.json", json.dumps(plan.to_json()).encode())
    plan = pipeline.read_plan(folder / "plan.json")
    if not (folder / "artifact" / "manifest.json").exists():
        free = replace(loop.options, targets={}, proof=False)
        export_artifact(loop.original, folder / "pruned.onnx", folder / "artifact", plan, options=free, force=True)
    cost = read_artifact(folder / "artifact").manifest["cost"]["after"]
    return plan, cost["mac"] / loop.whole["mac"]
