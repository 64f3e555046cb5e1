"""One Report value; ``text`` shows it on a terminal, ``to_json`` writes it down (``schema`` 1)."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnxprune import runtime
from onnxprune.cost import Cost
from onnxprune.coupling import Coupling
from onnxprune.labels import Axis, length
from onnxprune.model import Node
from onnxprune.ops.linear import CONVOLUTIONS
from onnxprune.passes.compensate import Compensation
from onnxprune.passes.prove import Proof
from onnxprune.passes.validate import Quality, drop
from onnxprune.report.names import names
from onnxprune.report.pictures import Picture
from onnxprune.report.reasons import FrozenRow, frozen_rows
from onnxprune.report.titles import Titles

__all__ = [
    "FrozenRow", "GroupRow", "Layer", "Probe", "Report", "Target", "error_json", "frozen_rows", "group_rows", "layers",
    "proof_json",
]  # fmt: skip

COST_KINDS = ("mac", "weights", "params", "activations", "bandwidth")
MORE_KINDS = ("effective_mac", "peak_memory")
"""Kinds of cost that only some reports have: those for a profile, those of ``prune`` and ``inspect``."""


def environment() -> dict[str, str]:
    """Versions that a result may depend on."""
    packages = {"onnx": onnx.__version__, "onnxruntime": runtime.VERSION, "numpy": np.__version__}
    return {"python": platform.python_version(), **packages, "system": platform.platform()}


@dataclass(frozen=True, slots=True)
class Target:
    """A budget: ``requested``, ``achieved`` and ``floor`` are shares of the original if ``share``, else absolute."""

    kind: str
    requested: float
    achieved: float
    floor: float
    share: bool


@dataclass(frozen=True, slots=True)
class Probe:
    """A budget that a search tried: MAC share asked for and reached, quality, how far it fell, and whether it passes.

    ``before`` is the original's quality on the same samples, which are not those of the figure that is quoted in the end.
    """

    target: float
    achieved: float
    quality: float
    drop: float
    ok: bool
    before: float


@dataclass(frozen=True, slots=True)
class Layer:
    """One operator with multiply-accumulates.

    Attributes
    ----------
    channels_before, channels_after, groups
        Channels of its output, and ids of the groups that they belong to.
    path
        The modules that it is in, and its own name.
    """

    node: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    channels_before: int
    channels_after: int
    mac_before: int
    mac_after: int
    weights_before: int
    weights_after: int
    groups: tuple[str, ...] = ()
    path: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Price:
    """What a budget would take away: share of MAC kept, and the share of all scores that goes with the rest."""

    mac: float
    score: float


@dataclass(frozen=True, slots=True)
class GroupRow:
    """One group: what it is, how many channels it has and keeps, where they are, and their scores.

    Attributes
    ----------
    mac
        Multiply-accumulates of all layers that the group takes part in, before pruning. Most layers take part in two
        groups, so the sum over groups exceeds the model's.
    threshold
        Lowest score of a channel that was kept where others were removed; None where none was, or nothing was scored.
    """

    id: str
    name: str
    mac: int
    size: int
    kept: int
    members: tuple[tuple[str, int], ...]
    frozen: str | None
    score: tuple[float, ...]
    threshold: float | None = None


@dataclass(frozen=True)
class Report:
    """Everything that is known about one run."""

    version: str
    options: Mapping[str, Any]
    input: Mapping[str, str | None]
    output: Mapping[str, str | None]
    input_shapes: Mapping[str, tuple[int, ...]]
    before: Mapping[str, int]
    after: Mapping[str, int]
    groups: tuple[GroupRow, ...]
    layers: tuple[Layer, ...]
    frozen: tuple[FrozenRow, ...]
    floor: Mapping[str, float] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()
    proof: Proof | None = None
    weights: str = "exact"
    quality: tuple[Quality, Quality] | None = None
    latency_ms: tuple[float, ...] | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    compensation: Compensation | None = None
    probes: tuple[Probe, ...] = ()
    curve: tuple[Price, ...] = ()
    pictures: tuple[Picture, ...] = ()
    command: str = ""
    environment: Mapping[str, str] = field(default_factory=environment)

    @property
    def target(self) -> Target | None:
        """The binding target: the one that the result comes closest to."""
        return self.targets[0] if self.targets else None

    def to_json(self) -> dict[str, Any]:
        """Return plain data in the documented schema."""
        kinds = (*COST_KINDS, *(kind for kind in MORE_KINDS if kind in self.before))
        ratio = {kind: self.after[kind] / self.before[kind] if self.before[kind] else 1.0 for kind in kinds}
        return {
            "schema": 1,
            "onnxprune": self.version,
            "input": dict(self.input),
            "output": dict(self.output),
            "options": dict(self.options),
            "cost": {
                "before": {kind: self.before[kind] for kind in kinds},
                "after": {kind: self.after[kind] for kind in kinds},
                "ratio": ratio,
            },
            "input_shapes": {name: list(shape) for name, shape in self.input_shapes.items()},
            "target": _fields(self.targets[0], leave_out=("share",)) if self.targets else None,
            "targets": [_fields(target, leave_out=("share",)) for target in self.targets],
            "floor": dict(self.floor),
            "groups": [
                {
                    "id": g.id,
                    "name": g.name,
                    "mac": g.mac,
                    "size": g.size,
                    "kept": g.kept,
                    "members": [{"tensor": tensor, "axis": axis} for tensor, axis in g.members],
                    "frozen": g.frozen,
                    "score": list(g.score),
                    "threshold": g.threshold,
                }
                for g in self.groups
            ],
            "layers": [_fields(layer) for layer in self.layers],
            "frozen": [_fields(row) for row in self.frozen],
            "proof": self.proof and proof_json(self.proof, self.weights),
            "quality": self.quality and _quality(*self.quality),
            "latency": self.latency_ms and {"before_ms": self.latency_ms[0], "after_ms": self.latency_ms[1]},
            "timings": {stage: round(seconds, 6) for stage, seconds in self.timings.items()},
            "notes": list(self.notes),
            "scoring": dict(self.facts),
            "compensation": self.compensation and compensation_json(self.compensation),
            "probes": [_fields(probe) for probe in self.probes],
            "curve": [_fields(price) for price in self.curve],
            "pictures": [picture.to_json() for picture in self.pictures],
            "command": self.command,
            "environment": dict(self.environment),
        }


def compensation_json(fitted: Compensation) -> dict[str, Any]:
    """Return what was fitted as plain data; figures that do not exist are null."""
    layers = []
    for solved in fitted.solved:
        row = _fields(solved)
        layers.append({name: None if isinstance(v, float) and not np.isfinite(v) else v for name, v in row.items()})
    return {"held_back": fitted.held_back, "layers": layers, "added": {n: b.to_json() for n, b in fitted.added.items()}}


def proof_json(proof: Proof, weights: str) -> dict[str, Any]:
    """Return a proof as plain data."""
    return {
        "ok": proof.ok,
        "labels": proof.labels,
        "max_rel_err": proof.max_rel_err,
        "tensors": proof.tensors,
        "redefined": list(proof.redefined),
        "insensitive": list(proof.insensitive),
        "failures": list(proof.failures),
        "weights": weights,
    }


def error_json(code: int, message: str) -> dict[str, Any]:
    """Return what a failed run reports."""
    return {"schema": 1, "error": {"code": code, "message": message}}


def layers(cost: Cost, keep: np.ndarray) -> tuple[Layer, ...]:
    """Describe every operator with multiply-accumulates under ``keep`` (bool per class)."""
    coupling = cost.coupling
    every = np.ones(coupling.n_classes, bool)
    counts = [cost.counts(mask) for mask in (every, keep)]
    macs = [cost.layers.values(c) for c in counts]
    weights = [cost.layer_weights.values(c) for c in counts]
    rows, owners, titles = [], owners_of(coupling), Titles(coupling.ledger)
    for index, work in enumerate(cost.works):
        node = work.node
        axis = _channel_axis(coupling, node)
        classes = np.concatenate([np.zeros(0, np.int64), *(atom.ravel() for atom in coupling.atoms(axis))])
        rows.append(
            Layer(
                node=node.title,
                op=node.op,
                inputs=node.inputs,
                outputs=node.outputs,
                channels_before=length(axis),
                channels_after=max(1, len(coupling.kept(axis, keep))),
                mac_before=round(macs[0][index]),
                mac_after=round(macs[1][index]),
                weights_before=round(weights[0][index]),
                weights_after=round(weights[1][index]),
                groups=tuple(dict.fromkeys(coupling.groups[owner].id for owner in owners[classes])),
                path=tuple(part.lstrip("./") for part in titles.path(node)),
            )
        )
    return tuple(rows)


def _channel_axis(coupling: Coupling, node: Node) -> Axis:
    axes = coupling.axes(node.key)
    second = node.op in CONVOLUTIONS and not node.attributes.get("channels_last", 0)
    return axes[1] if second else (axes[-1] if axes else ())


def owners_of(coupling: Coupling) -> np.ndarray:
    """Position in ``coupling.groups`` of each class's group, int64 of shape ``(n_classes,)``."""
    owners = np.zeros(coupling.n_classes, np.int64)
    for index, group in enumerate(coupling.groups):
        owners[group.classes] = index
    return owners


def group_rows(cost: Cost, keep: np.ndarray, score: np.ndarray) -> tuple[GroupRow, ...]:
    """Describe every group under ``keep``."""
    return tuple(
        GroupRow(
            id=group.id,
            name=named.name,
            mac=named.mac,
            size=group.size,
            kept=int(keep[group.classes].sum()),
            members=group.members,
            frozen=group.frozen.text if group.frozen else None,
            score=tuple(round(float(value), 6) for value in score[group.classes]),
            threshold=_threshold(keep[group.classes], score[group.classes]),
        )
        for group, named in zip(cost.coupling.groups, names(cost), strict=True)
    )


def _threshold(keep: np.ndarray, score: np.ndarray) -> float | None:
    return round(float(score[keep].min()), 6) if score.any() and keep.any() and not keep.all() else None


def _quality(before: Quality, after: Quality) -> dict[str, Any]:
    return {
        "metric": before.metric,
        "before": before.value,
        "after": after.value,
        "drop": drop(before, after),
        "samples": after.samples,
    }


def _fields(value: Any, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Fields of a flat dataclass, tuples as lists."""
    return {
        name: list(item) if isinstance(item := getattr(value, name), tuple) else item
        for name in value.__dataclass_fields__
        if name not in leave_out
    }
