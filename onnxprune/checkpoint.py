"""Slice the parameters of a training checkpoint as a plan says, for teams that go on with their own training code."""

from __future__ import annotations

import os
import pathlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from onnxprune import checkpoint_files, pipeline
from onnxprune.checkpoint_files import Checkpoint
from onnxprune.checkpoint_map import Cut, cuts, read_map
from onnxprune.errors import ModelError, UsageError
from onnxprune.plan import Plan

NORM = ("weight", "bias", "running_mean", "running_var")
"""Vectors of a batch normalization, by the last part of their names."""


@dataclass(frozen=True, slots=True)
class SlicedParameter:
    """What was cut of a parameter: its shape before and after, and the plan's tensors that say so."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """What was done to a checkpoint.

    Attributes
    ----------
    sliced, copied
        Parameters that were cut, and names of those that were not.
    mapped
        Names of sliced parameters that the map led to.
    notes
        What to know before training with it.
    """

    sliced: tuple[SlicedParameter, ...]
    copied: tuple[str, ...]
    mapped: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain data."""
        sliced = {
            p.name: {"before": list(p.before), "after": list(p.after), "tensors": list(p.tensors)} for p in self.sliced
        }
        return {
            "sliced": sliced,
            "copied": list(self.copied),
            "mapped": list(self.mapped),
            "notes": list(self.notes),
        }


def apply_checkpoint(
    plan: Plan | str | os.PathLike,
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    mapping: Mapping[str, Any] | str | os.PathLike | None = None,
    force: bool = False,
) -> CheckpointSummary:
    """Slice the parameters of a checkpoint as a plan says, and write the result to ``out``.

    Parameters
    ----------
    plan
        A plan, or the file that ``prune --plan-out`` wrote.
    checkpoint, out
        ``.safetensors``, or a torch state dict (``.pt``, ``.pth``, ``.bin``), possibly inside a training checkpoint.
    mapping
        Tensor names of the plan to parameter names, for tensors whose names are no parameters': a name, a list of names,
        ``{"name": ..., "axes": [...]}`` (``axes``: which axis of the tensor each axis of the parameter is), or None for a
        tensor that is not in the checkpoint. A JSON file of that form, too.
    force
        Overwrite ``out``.

    Raises
    ------
    ModelError
        Tensors of the plan are no parameters and are not mapped, or the checkpoint does not fit the plan.
    UsageError
        ``out`` exists, a library is missing, or the map is wrong. Nothing is written in either case.
    """
    source, out = pathlib.Path(checkpoint), pathlib.Path(out)
    checkpoint_files.check_suffixes(source, out)
    files = [path for path in (plan, checkpoint, mapping) if isinstance(path, str | os.PathLike)]
    for path in map(pathlib.Path, files):
        if path.exists() and out.exists() and out.samefile(path):
            raise UsageError(f"{out}: is {path}, which is read; choose another file for the output")
    pipeline.check_place(source, out, force=force)
    plan, mapped = pipeline.read_plan(plan), read_map(mapping)
    given = checkpoint_files.read(source)
    wanted = cuts(plan, given, mapped)
    _require_whole_norms(given, wanted)
    changed = _slice(given, wanted)
    checkpoint_files.write(given, changed, out)
    sliced = tuple(
        SlicedParameter(name, given.parameters[name].elements.shape, after.elements.shape, wanted[name].tensors)
        for name, after in changed.items()
    )
    led = {target.name for tensor in plan.initializers for target in mapped.get(tensor, ())}
    return CheckpointSummary(
        sliced,
        tuple(name for name in given.parameters if name not in changed),
        tuple(name for name in changed if led & {name, *given.twins.get(name, ())}),
        tuple(_notes(plan, given, wanted, out)),
    )


def _slice(given: Checkpoint, wanted: Mapping[str, Cut]) -> dict[str, checkpoint_files.Parameter]:
    """Cut every parameter, or refuse with all that do not fit."""
    changed, wrong = {}, []
    for name, cut in wanted.items():
        old = given.parameters[name]
        try:
            changed[name] = replace(old, elements=cut.of(old.elements))
        except ModelError as error:
            shape = list(old.elements.shape)
            wrong.append(f"{name} of shape {shape} (the plan's {cut.tensors[0]} keeps {error})")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(f"the plan does not fit the checkpoint: {', '.join(wrong[:3])}{more}")
    return changed


def _modules(given: Checkpoint) -> dict[str, dict[str, str]]:
    """Full names of the parameters of each module, by the last part of the name."""
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    for name in given.parameters:
        prefix, _, last = name.rpartition(".")
        modules[prefix][last] = name
    return modules


def _norms(given: Checkpoint) -> Iterator[tuple[str, list[str]]]:
    """Batch normalizations, with the names of their vectors."""
    for prefix, names in _modules(given).items():
        if "running_mean" in names and "running_var" in names:
            yield prefix, [names[last] for last in NORM if last in names]


def _require_whole_norms(given: Checkpoint, wanted: Mapping[str, Cut]) -> None:
    """Refuse to slice some vectors of a batch normalization and leave others whole."""
    for prefix, names in _norms(given):
        first = wanted.get(names[0])
        differing = [name for name in names if wanted.get(name) != first]
        if differing:
            raise ModelError(
                f"the vectors of {prefix} would not stay equally long ({differing[0]} is sliced unlike {names[0]}); "
                f"map a tensor of the plan to each of {', '.join(names)}"
            )


def _notes(plan: Plan, given: Checkpoint, wanted: Mapping[str, Cut], out: pathlib.Path) -> Iterator[str]:
    beside = list(checkpoint_files.tensors_beside(given))
    if beside:
        yield f"left as they are, and no longer fit what was sliced: {', '.join(beside)}; make them anew"
    lengths = {given.parameters[name].elements.shape[axis] for name, cut in wanted.items() for axis in cut.slices}
    whole = [
        prefix
        for prefix, names in _norms(given)
        if names[0] not in wanted and given.parameters[names[0]].elements.shape[0] in lengths
    ]
    if whole:
        yield (
            f"batch normalizations that stay whole: {', '.join(whole)}; where the exporter folded them into convolutions, "
            "map the convolutions' biases to their vectors"
        )
    uneven = list(_uneven(given, wanted))
    if uneven:
        yield f"sliced unlike the weights beside them, check them: {', '.join(uneven)}"
    if plan.added:
        yield (
            "the plan is of a compensated model: its fitted weights and added biases are not in the checkpoint, "
            "which keeps its own values"
        )
    if given.metadata and out.suffix in checkpoint_files.TORCH:
        yield "the safetensors file's metadata was left out"


def _uneven(given: Checkpoint, wanted: Mapping[str, Cut]) -> Iterator[str]:
    """Biases that would not stay as long as any axis of the weight beside them that was as long as they are."""
    for names in _modules(given).values():
        if "weight" not in names or "bias" not in names:
            continue
        weight, bias = names["weight"], names["bias"]
        shapes = [given.parameters[name].elements.shape for name in (weight, bias)]
        if len(shapes[1]) != 1:
            continue
        cut = wanted[bias].slices.get(0) if bias in wanted else None
        own = wanted[weight].slices if weight in wanted else {}
        beside = [own.get(axis) for axis, size in enumerate(shapes[0][:2]) if size == shapes[1][0]]
        if beside and cut not in beside:
            yield bias
