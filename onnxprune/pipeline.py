"""The stages in order, each a line: read, couple, score, select, apply, prove, write."""

from __future__ import annotations

import gc
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx

from onnxprune import external, onnx_io, report, runtime, storage
from onnxprune.amend import amend, strip
from onnxprune.branches import flatten, merges
from onnxprune.budget import Budget
from onnxprune.calibration import all_quantised, load_feeds, quantised_layers, score_channels
from onnxprune.cost import Cost
from onnxprune.coupling import Coupling
from onnxprune.errors import BudgetError, FileError, ModelError, OnnxPruneError, ProofError, UsageError
from onnxprune.labels import length
from onnxprune.latency import parse as parse_latency
from onnxprune.latency import read_tables, with_latency
from onnxprune.memory import peak_memory
from onnxprune.model import Model
from onnxprune.options import Clock, ModelLike, Options, Progress, silent
from onnxprune.passes.align import foreign, locked, permitted
from onnxprune.passes.apply import apply as apply_plan
from onnxprune.passes.calibrate import Feeds
from onnxprune.passes.compensate import Compensation, Mode, compensate
from onnxprune.passes.couple import couple
from onnxprune.passes.prove import Proof, prove
from onnxprune.passes.score import Scores, score
from onnxprune.passes.select import PRESETS, least_kept, lowest, prices, select
from onnxprune.passes.values import check_values
from onnxprune.plan import Plan, keep_of, keep_of_groups, make_plan, owner
from onnxprune.prepare import inline, prepare
from onnxprune.protos import every_node
from onnxprune.report import Report
from onnxprune.runtime import BLOCK
from onnxprune.sibling import replayed
from onnxprune.stopwatch import AGAIN, Race, fit, measure_tables, out_of_time
from onnxprune.stopwatch import Result as Timing
from onnxprune.validity import require_valid


@dataclass(frozen=True)
class Result:
    """What ``prune`` and ``apply`` return; ``model`` is the pruned model."""

    model: onnx.ModelProto
    plan: Plan
    report: Report


@dataclass(frozen=True)
class Loaded:
    """A model in memory, where it came from, and what coupling found out about it.

    ``source`` is what the file holds, ``proto`` what gets pruned; ``flat`` is what is reasoned about, the same but for
    control flow; ``called`` is the file's own graph, where that calls local functions which ``proto`` has inlined.
    """

    source: onnx.ModelProto
    proto: onnx.ModelProto
    flat: onnx.ModelProto
    called: onnx.ModelProto | None
    path: pathlib.Path | None
    sha256: str
    coupling: Coupling
    cost: Cost
    race: Race | None = None
    prepared: tuple[str, ...] = ()

    def notes(self, pruned: onnx.ModelProto) -> tuple[str, ...]:
        """What the user should know about how the model was read, and about what else than pruning changed it."""
        if pruned is self.source:
            return self.coupling.model.notes
        inlined = self.called is not None and not pruned.functions
        inlining = ("local functions were inlined, because what they compute shrinks",) if inlined else ()
        wide = not {onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}.isdisjoint(self.coupling.model.types.values())
        single = ("bfloat16 and double are run in float32 where onnxruntime has no kernels for them",) if wide else ()
        return (*self.prepared, *inlining, *single, *size_notes(pruned), *self.coupling.model.notes)


def size_notes(pruned: onnx.ModelProto) -> tuple[str, ...]:
    """What is left out because a model is large."""
    if runtime.fits(pruned):
        return ()
    size = f"{runtime.float32_bytes(pruned) / 1e9:.1f} GB in float32"
    return (f"the pruned model is too large to run in one piece here ({size}); its segments are proved one by one",)


def load(model: ModelLike, options: Options, clock: Clock, plan: Plan | None = None) -> Loaded:
    """Read and couple a model, at the input shapes of ``plan`` where the options give none."""
    with clock.stage("load"):
        if isinstance(model, onnx.ModelProto):
            path, proto, digest = None, model, ""
            external.require_complete(proto)
        else:
            path = pathlib.Path(model)
            proto, digest = onnx_io.load_with_digest(path)
    with clock.stage("couple"), _collector_paused(), _blamed_if_broken(proto, options):
        shapes = options.input_shapes
        if plan is not None and not shapes:
            names = {value.name for value in proto.graph.input}
            shapes = {name: shape for name, shape in plan.inputs.items() if name in names}
        source, inlined = proto, inline(proto)
        require_valid(inlined)
        proto, prepared = prepare(inlined)
        try:
            flat, graph = _read_flat(proto, shapes)
        except UsageError as error:
            if shapes == options.input_shapes:
                raise
            why = str(error).removeprefix("--input-shape ")
            raise ModelError(
                f"the plan is of a model with other inputs: {why}; --input-shape says what to take"
            ) from error
        attention = options.attention if plan is None else plan.attention
        coupling = couple(graph, options.ignore, options.only, attention)
        cost = Cost(coupling, options.hardware)
    called = source if inlined is not source and proto is inlined else None
    return Loaded(source, proto, flat, called, path, digest, coupling, cost, None, prepared)


def _read_flat(proto: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> tuple[onnx.ModelProto, Model]:
    """Read a model with the branches of its control flow laid out, where both branches give tensors of one shape."""
    flat = flatten(proto)
    if flat is not proto:
        try:
            graph = onnx_io.read(flat, shapes)
        except ModelError:
            return proto, onnx_io.read(proto, shapes)
        merged = [graph.producer[name] for name in merges(proto) if name in graph.producer]
        if all(len({graph.shapes.get(name) for name in (*node.inputs[1:], node.key)}) == 1 for node in merged):
            return flat, graph
    return proto, onnx_io.read(proto, shapes)


@contextmanager
def _blamed_if_broken(model: ModelLike, options: Options) -> Iterator[None]:
    """Where a stage fails in a way that nobody foresaw, see whether the model runs at all; if not, that is what is wrong."""
    try:
        yield
    except (OnnxPruneError, MemoryError):
        raise
    except Exception as error:
        try:
            proto = model if isinstance(model, onnx.ModelProto) else onnx_io.load(model)
            if runtime.fits(proto):
                _run_source(proto, onnx_io.read(inline(proto), options.input_shapes).input_shapes, options.provider)
        except ModelError as cause:
            raise ModelError(f"{cause} (pruning it ended with {type(error).__name__}: {error})") from error
        raise


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep the cyclic garbage collector from scanning the growing graph: a third of the time of coupling."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def prune(model: ModelLike, options: Options | None = None, progress: Progress = silent, **chosen: Any) -> Result:
    """Remove channels until the model meets its budget, and prove the result.

    Parameters
    ----------
    model
        A path or a ModelProto; neither is changed.
    chosen
        Fields of :class:`Options`, and ``target_mac``, ``target_params``, ``target_bandwidth``, ``target_size``,
        ``target_latency``.

    Raises
    ------
    BudgetError
        The target is out of reach.
    ProofError
        The pruned graph does not equal the masked original.
    """
    options = options or options_from(chosen)
    clock = Clock()
    with runtime.threads_limited(options.threads), _blamed_if_broken(model, options):
        return finish(ready(model, options, clock, progress), options, clock, progress)


@dataclass(frozen=True)
class Ready:
    """A model whose channels are ranked: what every budget starts from."""

    loaded: Loaded
    scores: Scores
    feeds: Feeds
    facts: Mapping[str, Any]
    notes: tuple[str, ...]


def ready(model: ModelLike, options: Options, clock: Clock, progress: Progress = silent) -> Ready:
    """Read, couple, calibrate and score."""
    loaded, timing = load(model, options, clock), tuple[str, ...]()
    if "latency" in options.targets:
        with clock.stage("measure"):
            loaded, timing = timed(loaded, options, progress)
    kinds = ["bytes" if kind == "size" else kind for kind in options.targets if kind != "effective_mac"] or ["mac"]
    quantised = _quantised_notes(loaded, options)
    with clock.stage("score"):
        if Budget(options.targets, _before(loaded), 0).met and options.targets and "size" not in options.targets:
            return Ready(loaded, score(loaded.coupling, "l2", options.seed), (), {}, timing)  # nothing will be removed
        feeds, notes = load_feeds(loaded.coupling, options)
        scores, facts, found = score_channels(
            loaded.flat, loaded.coupling, loaded.cost, options, feeds, kinds, progress, loaded.sha256
        )
    return Ready(loaded, scores, feeds, facts, (*notes, *found, *timing, *quantised))


def _before(loaded: Loaded) -> dict[str, float]:
    """Cost of the original of every kind that can be budgeted."""
    every = np.ones(loaded.coupling.n_classes, bool)
    return {**loaded.cost.of(every), **_latency(loaded, every)}


def _latency(loaded: Loaded, keep: np.ndarray) -> dict[str, float]:
    """Milliseconds as the tables predict them, where there are any."""
    cost = loaded.cost
    return {"latency": cost.total("latency", cost.counts(keep))} if "latency" in cost.kinds else {}


def timed(loaded: Loaded, options: Options, progress: Progress) -> tuple[Loaded, tuple[str, ...]]:
    """Make latency a cost of a model, from the user's table or by measuring; also say what was decided."""
    cost = loaded.cost
    if options.latency_table:
        tables, lacking = read_tables(options.latency_table, cost)
        note = f"latency is what {options.latency_table} predicts; nothing was measured"
        more = f"; it lacks {len(lacking)} layers, {lacking[0]} among them" if lacking else ""
        return replace(loaded, cost=with_latency(cost, tables, None)), (note + more,)
    race = Race(loaded.source, loaded.coupling.model.input_shapes, options.provider)
    hardware = options.hardware

    def block(kind: str) -> tuple[int, int]:
        sides = hardware.multiple(kind) if hardware else (1, 1)
        return (max(sides[0], BLOCK), max(sides[1], BLOCK))

    found = measure_tables(
        loaded.flat, cost, loaded.sha256, block, provider=options.provider,
        progress=lambda done, total: progress("measure", done, total),
    )  # fmt: skip
    notes = (f"channels are kept in {BLOCK}s, as onnxruntime computes them here (--profile chooses)",)
    timed_cost = with_latency(cost, found, race.alone())
    return replace(loaded, cost=timed_cost, race=race), notes if options.in_blocks_here else ()


def _quantised_notes(loaded: Loaded, options: Options) -> tuple[str, ...]:
    """What calibration data cannot do for quantised weights; an error where that was asked for and is all there is."""
    n_quantised, n_layers = quantised_layers(loaded.coupling)
    if not n_quantised or options.calib is None:
        return ()
    if all_quantised(loaded.coupling) and options.compensate in ("bias", "least-squares"):
        raise UsageError(
            f"--compensate {options.compensate}: all weights of the model are quantised, and those are not fitted; "
            "prune and compensate the float model, then quantise that, or leave the option out"
        )
    return (
        f"{n_quantised} of {n_layers} layers have quantised weights: these are ranked by their dequantised values, not by "
        "calibration data, and are not fitted",
    )


def finish(run: Ready, options: Options, clock: Clock, progress: Progress = silent) -> Result:
    """Select, apply, prove and compensate: what differs from one budget to the next."""
    loaded, coupling = run.loaded, run.loaded.coupling
    every = np.ones(coupling.n_classes, bool)
    before = _before(loaded)
    # Asking a protobuf for its size serialises it, so only a size target pays for that.
    overhead = storage.size_of(loaded.proto) - before["bytes"] if "size" in options.targets else 0
    budget = Budget(options.targets, before, overhead)
    if budget.met:
        plan = replace(make_plan(coupling, every, loaded.sha256), attention=options.attention)
        made = _Made(every, plan, loaded.source)
    elif loaded.race is None:
        with clock.stage("select"):
            keep = _select_to_fit(loaded, run.scores, budget, options)
        made = _make(run, keep, options, clock, progress)
    else:
        made = _make_in_time(run, loaded.race, budget, options, clock, progress)
    keep, plan, pruned, fitted, raced = made.keep, made.plan, made.pruned, made.fitted, made.raced
    described = describe(loaded, options, keep, run.scores.value, clock)
    after = dict(described.after)
    if not budget.met:
        after["params"] = onnx_io.n_params(pruned)
    if "size" in options.targets:
        after["bytes"] = round(storage.size_of(pruned) - overhead)
    timed_after = _latency(loaded, keep)
    notes = (
        *loaded.notes(pruned),
        *run.notes,
        *_hardware_notes(loaded, options),
        *runtime.provider_notes(options.provider),
    )
    if raced is not None:
        share = options.targets["latency"] <= 1
        timed_after = {"latency": raced.ratio * before["latency"] if share else raced.after}
        if raced.ratio < budget.limit("latency") / budget.whole("latency") - AGAIN:
            notes = (
                *notes,
                "the latency lies further below the target than measuring needs: blocks, or another target",
            )
    targets = budget.rows({**after, **timed_after}, floor(loaded, options))
    if budget.met:
        notes = (*notes, "the model already meets the target; nothing was removed")
    elif options.calib is None and not all_quantised(loaded.coupling):
        notes = (*notes, HINT)
    done = replace(
        described, after=after, targets=targets, proof=made.proof, notes=notes, facts=run.facts,
        latency_ms=None if raced is None else (raced.before, raced.after),
        compensation=fitted if fitted.solved else None, weights="changed" if fitted.values or fitted.added else "exact",
    )  # fmt: skip
    return Result(pruned, plan, done)


@dataclass(frozen=True)
class _Made:
    """What was made of a model, and how it ran beside the original where its latency is budgeted."""

    keep: np.ndarray
    plan: Plan
    pruned: onnx.ModelProto
    proof: Proof | None = None
    fitted: Compensation = field(default_factory=Compensation)
    raced: Timing | None = None


def _make(run: Ready, keep: np.ndarray, options: Options, clock: Clock, progress: Progress) -> _Made:
    """Apply, prove and compensate."""
    loaded = run.loaded
    plan = replace(make_plan(loaded.coupling, keep, loaded.sha256), attention=options.attention)
    pruned, proof = _apply_and_prove(loaded, plan, keep, options, progress, clock)
    fitted = Compensation()
    if options.compensation != "none":
        pruned, fitted = _compensate(loaded, pruned, keep, run.feeds, options, progress, clock)
        plan = replace(plan, added={name: bias.to_json() for name, bias in fitted.added.items()})
    return _Made(keep, plan, pruned, proof, fitted)


def _make_in_time(
    run: Ready, race: Race, budget: Budget, options: Options, clock: Clock, progress: Progress
) -> _Made:  # fmt: skip
    """Select so that what is measured end to end meets the target; the tables only say where to look.

    Nodes that compensation adds take their time, too: where they cost the target, it is tried again that much closer.
    """
    loaded = run.loaded
    wanted = budget.limit("latency") / budget.whole("latency")
    aim = wanted
    for _ in range(3):
        with clock.stage("select"):
            keep, raced = _select_in_time(loaded, race, run.scores, budget, options, aim)
        made = _make(run, keep, options, clock, progress)
        if not made.fitted.added:
            return replace(made, raced=raced)
        with clock.stage("select"):
            raced = race.run(made.pruned)
        if raced.ratio <= wanted:
            return replace(made, raced=raced)
        aim *= wanted / raced.ratio
    raise BudgetError(
        f"{out_of_time(wanted, raced.ratio)} (with the biases that compensation adds: --no-new-nodes)", 0.0
    )


def _hardware_notes(loaded: Loaded, options: Options) -> tuple[str, ...]:
    """Say what the profile keeps whole, and what a hard one does not take of the model as it is."""
    hardware = options.hardware
    if hardware is None:
        return ()
    name = options.profile or f"blocks of {BLOCK}"
    whole = locked(loaded.coupling, permitted(loaded.coupling, hardware))
    few = ", ".join(whole[:5]) + (f" and {len(whole) - 5} more" if len(whole) > 5 else "")
    stay = (f"{name} leaves {few} whole: no other count suits every operator",) if whole else ()
    found = foreign(loaded.coupling, hardware) if hardware.hard else []
    if not found:
        return stay
    shown = [f"{d.work.node.title} ({length(d.axis)} {'outputs' if d.side else 'inputs'})" for d in found[:3]]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return (*stay, f"{name} does not take the channels of {', '.join(shown)}{more} as they are in the model")


HINT = "64 real inputs without labels (--calib) would keep far more quality than weights alone can tell"


def cut(run: Ready, keep: np.ndarray, options: Options) -> tuple[onnx.ModelProto, onnx.ModelProto | None]:
    """Apply ``keep`` (bool per class) without a proof; also compensated, where the options say so."""
    pruned = _apply(run.loaded, make_plan(run.loaded.coupling, keep, run.loaded.sha256), keep)
    if options.compensation == "none":
        return pruned, None
    return pruned, _compensate(run.loaded, pruned, keep, run.feeds, options, silent, Clock())[0]


@runtime.one_blas_thread()
def _compensate(
    loaded: Loaded, pruned: onnx.ModelProto, keep: np.ndarray, feeds: Feeds, options: Options, progress: Progress,
    clock: Clock,
) -> tuple[onnx.ModelProto, Compensation]:  # fmt: skip
    if all_quantised(loaded.coupling):
        return pruned, Compensation()
    with clock.stage("compensate"):
        flat, graph = _read_pruned(loaded, pruned, options.provider)
        mode: Mode = "bias" if options.compensation == "bias" else "least-squares"
        fitted = compensate(
            loaded.flat, loaded.coupling, flat, graph, pruned, keep, feeds, mode=mode, memory=options.calib_memory,
            new_nodes=options.new_nodes, seed=options.seed, provider=options.provider,
            progress=lambda done, total: progress("compensate", done, total),
        )  # fmt: skip
        amended = amend(pruned, fitted.values, fitted.added)
        _run_whole(loaded, amended, options.provider)
    return amended, fitted


def _read_pruned(loaded: Loaded, pruned: onnx.ModelProto, provider: str = "") -> tuple[onnx.ModelProto, Model]:
    """The pruned graph as it is reasoned about, like ``loaded.flat``."""
    try:
        flat = inline(pruned) if loaded.flat is loaded.proto else flatten(inline(pruned))
        return flat, onnx_io.read(flat, loaded.coupling.model.input_shapes)
    except ModelError as error:
        _run_original(loaded, provider)
        raise ProofError(f"the pruned graph is invalid: {error}; nothing was written", (str(error),)) from error


def _select_to_fit(loaded: Loaded, scores: Scores, budget: Budget, options: Options) -> np.ndarray:
    """Select; where copies of shared vectors make the file larger than its terms say, select again with that much less."""
    less: dict[str, float] = {}
    coupling, cost = loaded.coupling, loaded.cost
    allowed = options.limits(coupling)
    while True:
        try:
            limits = budget.limits(less)
            keep = select(coupling, cost, scores, limits, PRESETS[options.preset], allowed).keep
        except BudgetError as error:
            raise budget.out_of_reach(error, floor(loaded, options)) from error
        if budget.targets.keys() <= {"mac", "bandwidth", "latency"}:
            return keep
        written = apply_plan(loaded.proto, coupling, make_plan(coupling, keep), keep)
        actual = {"params": onnx_io.n_params(written)}
        if "size" in budget.targets:
            actual["size"] = storage.size_of(written)
        over = {kind: actual[kind] - budget.limit(kind) for kind in budget.targets.keys() & actual.keys()}
        if all(excess <= 0 for excess in over.values()):
            return keep
        less = {kind: less.get(kind, 0) + max(0, excess) for kind, excess in over.items()}


def _select_in_time(
    loaded: Loaded, race: Race, scores: Scores, budget: Budget, options: Options, wanted: float
) -> tuple[np.ndarray, Timing]:
    """What to keep so that the measured share of latency is ``wanted``, or a little less."""
    order = scores.value if scores.order is None else scores.order
    smallest = least_kept(loaded.coupling, PRESETS[options.preset], options.limits(loaded.coupling), order)

    def choose(predicted: float) -> np.ndarray:
        closer = replace(budget, targets={**budget.targets, "latency": predicted})
        try:
            return _select_to_fit(loaded, scores, closer, options)
        except BudgetError:
            if budget.targets.keys() - {"latency"}:
                _select_to_fit(loaded, scores, replace(budget, targets=_without(budget.targets, "latency")), options)
            return smallest

    def measure(keep: np.ndarray) -> Timing:
        return race.run(_apply(loaded, make_plan(loaded.coupling, keep), keep))

    return fit(choose, measure, wanted)


def _without(targets: Mapping[str, float], kind: str) -> dict[str, float]:
    return {name: value for name, value in targets.items() if name != kind}


def inspect(model: ModelLike, options: Options | None = None, **chosen: Any) -> Report:
    """Describe a model: cost per layer, groups, what is frozen and why, the reachable floor."""
    options = options or options_from(chosen)
    clock = Clock()
    with runtime.threads_limited(options.threads):
        loaded = load(model, options, clock)
    with clock.stage("score"):
        scores = score(loaded.coupling, options.criterion_for(False), options.seed)
    every = np.ones(loaded.coupling.n_classes, bool)
    described = describe(loaded, options, every, scores.value, clock)
    found = prices(loaded.coupling, loaded.cost, scores, PRESETS[options.preset], options.limits(loaded.coupling))
    curve = tuple(report.Price(mac, lost) for mac, lost in found)
    notes = (*loaded.prepared, *loaded.coupling.model.notes, *_hardware_notes(loaded, options))
    return replace(described, curve=curve, notes=notes)


def apply(
    model: ModelLike,
    plan: Plan | str | os.PathLike,
    options: Options | None = None,
    progress: Progress = silent,
    **chosen: Any,
) -> Result:
    """Replay a plan on the model it was made for, or on a sibling, and prove the result.

    A sibling has the same tensor names, or those that quantising gave them (see :mod:`onnxprune.sibling`); the result's plan
    then has the sibling's names.
    """
    options = options or options_from(chosen)
    plan = read_plan(plan)
    clock = Clock()
    with runtime.threads_limited(options.threads), _blamed_if_broken(model, options):
        loaded = load(model, options, clock, plan)
        check_values(loaded.coupling)
        keep, plan, found = replayed(loaded.coupling, plan)
        pruned, proof = _apply_and_prove(loaded, plan, keep, options, progress, clock)
    described = describe(loaded, options, keep, np.zeros(len(keep)), clock)
    notes = (*loaded.notes(pruned), *found, *runtime.provider_notes(options.provider))
    described = replace(described, proof=proof, notes=notes)
    return Result(pruned, plan, described)


def verify(
    original: ModelLike, pruned: ModelLike, plan: Plan | str | os.PathLike, options: Options | None = None,
    progress: Progress = silent, **chosen: Any,
) -> Report:  # fmt: skip
    """Prove a pruned model from files alone; weight values may differ (compensated, trained), the structure may not.

    The original is sliced by the plan, that slice is proved, and ``pruned`` must equal it in everything but the values of
    floating-point initializers.

    Raises
    ------
    ProofError
        The plan is wrong for the original, or the pruned model is not what the plan makes of it.
    """
    options = options or options_from(chosen)
    plan = read_plan(plan)
    clock = Clock()
    with runtime.threads_limited(options.threads), _blamed_if_broken(original, options):
        return verify_loaded(load(original, options, clock, plan), pruned, plan, options, clock, progress)


def verify_loaded(
    loaded: Loaded, pruned: ModelLike, plan: Plan, options: Options, clock: Clock, progress: Progress = silent
) -> Report:
    """Verify against an original that is in memory."""
    read = pruned if isinstance(pruned, onnx.ModelProto) else onnx_io.load(pruned)
    given, _ = prepare(inline(strip(read, plan.added)))
    check_values(loaded.coupling)
    keep, plan = _plan_under(loaded, plan)
    sliced, proof = _apply_and_prove(loaded, plan, keep, options, progress, clock)
    with clock.stage("compare"):
        # Prepared as ``given`` is: pruning may have stored the shape that a weight is made of.
        expected, _ = prepare(inline(sliced))
        differences, exact = onnx_io.compare(expected, given)
    if not differences:
        _run_whole(loaded, given, options.provider)
    if differences:
        raise ProofError(f"the pruned model is not what the plan makes of the original: {differences[0]}", differences)
    described = describe(loaded, options, keep, np.zeros(len(keep)), clock)
    notes = (*size_notes(given), *runtime.provider_notes(options.provider))
    described = replace(described, proof=proof, weights="exact" if exact else "changed", notes=notes)
    if not isinstance(pruned, onnx.ModelProto):
        described = replace(described, output={"path": str(pruned), "sha256": onnx_io.sha256(pruned)})
    return described


def _plan_under(loaded: Loaded, plan: Plan) -> tuple[np.ndarray, Plan]:
    """What a plan means for a model, in its names: by its groups, unless it was made for a sibling with other names."""
    constants = loaded.coupling.model.constants
    if all(owner(loaded.coupling, full)[0] in constants for full in plan.initializers):
        return keep_under(loaded, plan), plan
    keep, own, _ = replayed(loaded.coupling, plan)
    return keep, own


def keep_under(loaded: Loaded, plan: Plan) -> np.ndarray:
    """Keep mask per class that a plan means, bool: by its groups, or by its slices where somebody wrote it without any."""
    return keep_of_groups(loaded.coupling, plan) if plan.groups else keep_of(loaded.coupling, plan)


def describe(loaded: Loaded, options: Options, keep: np.ndarray, scores: np.ndarray, clock: Clock) -> Report:
    """Put down everything that is known about a model under ``keep`` (bool per class)."""
    cost, every = loaded.cost, np.ones(len(keep), bool)
    least = floor(loaded, options)
    before = cost.of(every) | {"peak_memory": peak_memory(loaded.coupling, every)}
    return Report(
        version=version("onnxprune"),
        options=_told(options),
        input={"path": str(loaded.path) if loaded.path else None, "sha256": loaded.sha256 or None},
        output={"path": None, "sha256": None},
        input_shapes=loaded.coupling.model.input_shapes,
        before=before,
        after=cost.of(keep) | {"peak_memory": peak_memory(loaded.coupling, keep)},
        groups=report.group_rows(cost, keep, scores),
        layers=report.layers(cost, keep),
        frozen=report.frozen_rows(cost),
        floor={kind: least[kind] / value if value else 1.0 for kind, value in before.items() if kind in least},
        timings=clock.timings(),
    )


def _told(options: Options) -> dict[str, Any]:
    """Options as plain data, without those that say nothing."""
    told = {name: value for name, value in vars(options).items() if name != "calib" and value not in ((), {}, "", None)}
    told["provider"] = runtime.provider_for(options.provider)
    if options.calib is not None:
        told["calib"] = str(options.calib) if isinstance(options.calib, str | os.PathLike) else "arrays"
    return told


def floor(loaded: Loaded, options: Options) -> dict[str, float]:
    """Lowest reachable cost of every kind under the options' preset and limits."""
    return lowest(loaded.coupling, loaded.cost, PRESETS[options.preset], options.limits(loaded.coupling))


def write(result: Result, model: ModelLike, out: str | os.PathLike, *, force: bool = False) -> Report:
    """Write a result: a copy of the file where nothing was removed, else the pruned model. Returns the updated report."""
    out = pathlib.Path(out)
    check_output(model, out, force=force)
    begin = time.perf_counter()
    if result.model is model or not result.plan.initializers:
        if isinstance(model, onnx.ModelProto):
            onnx_io.save(model, out)
        else:
            if onnx_io.sha256(model) != result.report.input["sha256"]:
                raise FileError(f"{model}: has changed since it was read; run again")
            onnx_io.copy(pathlib.Path(model), out, force=force)
    else:
        onnx_io.save(result.model, out)
    seconds = time.perf_counter() - begin
    timings = {**result.report.timings, "save": seconds, "total": result.report.timings["total"] + seconds}
    return replace(result.report, output={"path": str(out), "sha256": onnx_io.sha256(out)}, timings=timings)


def check_output(model: ModelLike, out: pathlib.Path, *, force: bool) -> None:
    """Refuse to write over the input or its data, over an existing file without ``force``, or into nowhere."""
    given = None if isinstance(model, onnx.ModelProto) else pathlib.Path(model)
    check_place(given, out, force=force)
    if given is not None and given.exists() and (out.exists() or out.is_symlink() or onnx_io.older_data(out)):
        _spare_data(given, out)


def check_place(given: pathlib.Path | None, out: pathlib.Path, *, force: bool) -> None:
    """Refuse to write over the file ``given``, over an existing file without ``force``, or into nowhere."""
    if given is not None and given.exists() and out.exists() and out.samefile(given):
        raise UsageError(f"{out}: is the input; choose another file for the output")
    if out.is_dir():
        raise UsageError(f"{out}: is a folder; name a file in it")
    if out.exists() and not force:
        raise UsageError(f"{out}: exists; choose another name or use --force to overwrite it")
    if not out.parent.is_dir():
        raise FileError(f"{out}: the folder {out.parent} does not exist")
    if not os.access(out.parent, os.W_OK):
        raise FileError(f"{out}: the folder {out.parent} cannot be written")


def _spare_data(given: pathlib.Path, out: pathlib.Path) -> None:
    """Refuse an output whose writing would take the input's external data away, or that cannot have data beside it."""
    files = onnx_io.data_of(given)
    for file in (out, *onnx_io.older_data(out)):
        if any(file.exists() and data.samefile(file) for data in files.values()):
            raise UsageError(
                f"{out}: writing it would remove {file}, which holds the input's data; choose another file"
            )
    if files and out.is_symlink():
        raise UsageError(f"{out}: is a link, and this model's data needs a file beside it; choose another name")


def read_plan(plan: Plan | str | os.PathLike) -> Plan:
    """Read a plan file; a Plan passes."""
    if isinstance(plan, Plan):
        return plan
    try:
        return Plan.from_json(pathlib.Path(plan).read_text(encoding="utf-8"))
    except ModelError as error:
        raise ModelError(f"{plan}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{plan}: the plan cannot be read ({error})") from error


def _apply_and_prove(
    loaded: Loaded, plan: Plan, keep: np.ndarray, options: Options, progress: Progress, clock: Clock
) -> tuple[onnx.ModelProto, Proof | None]:
    with clock.stage("apply"):
        pruned = _apply(loaded, plan, keep)
    if not options.proof:
        return pruned, None
    with clock.stage("prove"):
        flat, graph = _read_pruned(loaded, pruned, options.provider)
        proof = prove(
            loaded.flat, flat, graph, loaded.coupling, plan, keep,
            seed=options.seed, provider=options.provider or None,
            progress=lambda done, total: progress("prove", done, total),
        )  # fmt: skip
    if not proof.ok:
        raise ProofError(
            f"the pruned graph is not proved to be the masked original: {proof.failures[0]}; nothing was written",
            proof.failures,
        )
    with clock.stage("prove"):
        _run_whole(loaded, pruned, options.provider)
    return pruned, proof


def _apply(loaded: Loaded, plan: Plan, keep: np.ndarray) -> onnx.ModelProto:
    """Apply a plan to the file's own graph where no body of a function must change, else with the functions inlined."""
    pruned = apply_plan(loaded.proto, loaded.coupling, plan, keep)
    if loaded.called is None:
        return pruned
    called = apply_plan(loaded.called, loaded.coupling, plan, keep)
    local = {(function.domain, function.name) for function in loaded.called.functions}
    given, sliced = list(every_node(loaded.called.graph)), list(every_node(called.graph))
    outside = {name for node in sliced if (node.domain, node.op_type) not in local for name in node.output}
    inner = [[n for n in every_node(m.graph) if outside.isdisjoint(n.output)] for m in (loaded.proto, pruned)]
    calls = [[n for n in nodes if (n.domain, n.op_type) in local] for nodes in (given, sliced)]
    return called if inner[0] == inner[1] and calls[0] == calls[1] else pruned


def _run_whole(loaded: Loaded, pruned: onnx.ModelProto, provider: str) -> None:
    """Run the pruned model as users will: in one piece, optimised, with its declared shapes, and at another batch size.

    One that is too large for that is not run; :func:`size_notes` says so.
    """
    if not runtime.fits(pruned):
        return
    model = loaded.coupling.model
    dynamic = {name for name, dims in model.declared.items() if dims and not isinstance(dims[0], int)}
    larger = {name: (2, *shape[1:]) if name in dynamic else shape for name, shape in model.input_shapes.items()}
    # From a file, because a session made from bytes keeps them beside its own copy.
    with onnx_io.temporary_file(pruned) as path:
        try:
            session = runtime.Session(path, provider)
            session.run(runtime.random_feeds(session.inputs, model.input_shapes))
        except ModelError as error:
            _run_original(loaded, provider)
            raise ProofError(f"the pruned model does not run: {error}; nothing was written", (str(error),)) from error
        if not dynamic:
            return
        feeds = runtime.random_feeds(session.inputs, larger)
        try:
            session.run(feeds)
        except ModelError as error:
            problem = str(error)
        else:
            return
    with onnx_io.temporary_file(loaded.source) as path:
        try:
            runtime.Session(path, provider).run(feeds)
        except ModelError:
            return  # the original does not run there either
    raise ProofError(f"the pruned model does not run at batch 2: {problem}; nothing was written", (problem,))


def _run_original(loaded: Loaded, provider: str) -> None:
    """Blame the original where that does not run in one piece, either."""
    _run_source(loaded.source, loaded.coupling.model.input_shapes, provider)


def _run_source(source: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]], provider: str) -> None:
    with onnx_io.temporary_file(source) as path:
        session = runtime.Session(path, provider)
        session.run(runtime.random_feeds(session.inputs, shapes))


def options_from(chosen: Mapping[str, Any]) -> Options:
    targets = {
        key[7:]: parse_latency(value) if key == "target_latency" else float(value)
        for key, value in chosen.items()
        if key.startswith("target_") and value is not None
    }
    rest = {key: value for key, value in chosen.items() if not key.startswith("target_")}
    try:
        return Options(targets=targets, **rest)
    except TypeError as error:
        raise UsageError(str(error)) from error
