"""Search: the smallest model that a quality guard still passes, by bisection over the budget."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from onnxprune import quality, runtime
from onnxprune.errors import QualityError, UsageError
from onnxprune.metrics import Metric
from onnxprune.metrics import find as find_metric
from onnxprune.options import Clock, ModelLike, Options, Progress, silent
from onnxprune.passes.validate import Quality, drop
from onnxprune.pipeline import Ready, Result, finish, floor, ready
from onnxprune.quality import Reading
from onnxprune.report import Probe

RESOLUTION = 0.01
"""Share of the original's MAC to which the smallest model is found."""


@dataclass(frozen=True)
class Guard:
    """What a model must still be worth: ``metric`` on ``data`` falls by ``max_drop`` at most, or reaches ``min_quality``."""

    data: str | os.PathLike
    metric: Metric | Callable | str
    max_drop: float | None = None
    min_quality: float | None = None
    reading: Reading | None = None

    def broken(self, before: Quality, after: Quality) -> str | None:
        """Say in words which limit ``after`` breaks; None where it passes."""
        return quality.guard((before, after), self.max_drop, self.min_quality)


def prune_to_quality(
    model: ModelLike, guard: Guard, options: Options | None = None, progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> Result:  # fmt: skip
    """Find the smallest model that passes a guard, prove it and return it.

    Half of the data decides the search; the other half is looked at once, for the result: its figure is quoted, and it can
    only send the search back to a larger model. The original is read, calibrated and ranked once.

    Parameters
    ----------
    say
        Told the outcome of every probe.

    Raises
    ------
    QualityError
        The original itself does not reach what is asked.
    """
    options = options or Options()
    if options.targets:
        raise UsageError(
            "a search finds the budget by itself; leave the targets out, or check a result with --max-drop"
        )
    if guard.max_drop is None and guard.min_quality is None:
        raise UsageError("a search needs --max-drop or --min-quality")
    with runtime.threads_limited(options.threads):
        return _search(model, guard, options, progress, say)


def _search(model: ModelLike, guard: Guard, options: Options, progress: Progress, say: Callable[[str], None]) -> Result:
    clock = Clock()
    judge = _Judge(model, guard, options.provider)
    before = judge.original("search")
    if guard.broken(before, before):
        raise QualityError(
            f"{guard.broken(before, before)}: the original itself does not reach that; nothing was written"
        )
    run = ready(model, options, clock, progress)
    cost = run.loaded.cost
    whole = cost.total("mac", cost.counts(np.ones(run.loaded.coupling.n_classes, bool)))
    least = floor(run.loaded, options)["mac"] / max(whole, 1)
    probes: list[Probe] = []
    low, high = min(least, 1.0), 1.0
    while high - low > RESOLUTION:
        share = (low + high) / 2
        result = finish(run, replace(options, targets={"mac": share}, proof=False), clock, progress)
        after = judge.measure(result.model, "search")
        problem = guard.broken(before, after)
        target = result.report.target
        probes.append(
            Probe(
                share,
                target.achieved if target else 1.0,
                after.value,
                drop(before, after),
                problem is None,
                before.value,
            )
        )
        say(f"probe    mac {share:.3f}: {after.metric} {after.value:.5g}, {'passes' if problem is None else 'fails'}")
        low, high = (low, share) if problem is None else (share, high)
    return _checked(run, options, judge, probes, clock, progress, say)


def _checked(
    run: Ready, options: Options, judge: _Judge, probes: list[Probe], clock: Clock, progress: Progress,
    say: Callable[[str], None],
) -> Result:  # fmt: skip
    """The smallest result that also passes on the half of the data that the search did not see, proved."""
    before = judge.original("check")
    for share in [*sorted(probe.target for probe in probes if probe.ok), 1.0]:
        result = finish(run, replace(options, targets={"mac": share}), clock, progress)
        after = judge.measure(result.model, "check") if share < 1 else before
        if not judge.guard.broken(before, after):
            break
        say(f"check    mac {share:.3f}: {after.metric} {after.value:.5g} on the samples kept aside, fails")
    if judge.guard.broken(before, after):
        raise QualityError(f"{judge.guard.broken(before, after)} on the samples kept aside; nothing was written")
    notes = (*result.report.notes, f"searched on half of the samples; the figure is that of the other {after.samples}")
    if share == 1.0:
        notes = (*notes, "no smaller model passes the guard")
    return replace(result, report=replace(result.report, quality=(before, after), probes=tuple(probes), notes=notes))


class _Judge:
    """Measures models by a guard's metric on either half of its data."""

    def __init__(self, model: ModelLike, guard: Guard, provider: str) -> None:
        self.model, self.guard, self.provider = model, guard, provider

    def original(self, part: quality.Part) -> Quality:
        """Quality of the original."""
        return self.measure(self.model, part)

    def measure(self, model: ModelLike, part: quality.Part) -> Quality:
        """Quality of a model, compared with the original where the metric does."""
        compares = find_metric(self.guard.metric).needs in ("reference", "original")
        return quality.evaluate(
            model, self.guard.data, self.guard.metric, reference=self.model if compares else None,
            reading=self.guard.reading, part=part, provider=self.provider,
        )  # fmt: skip
