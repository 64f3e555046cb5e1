"""One Report value; ``text`` shows it on a terminal, ``to_json`` writes it down (``schema`` 1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxprune.cost import Cost
from onnxprune.coupling import Coupling
from onnxprune.labels import Axis, length
from onnxprune.passes.prove import Proof
from onnxprune.passes.validate import Quality, drop

COST_KINDS = ("mac", "weights", "params", "activations", "bandwidth")


@dataclass(frozen=True, slots=True)
class Target:
    """A budget: ``requested``, ``achieved`` and ``floor`` are shares of the original if ``share``, else absolute."""

    kind: str
    requested: float
    achieved: float
    floor: float
    share: bool


@dataclass(frozen=True, slots=True)
class Layer:
    """One operator with multiply-accumulates; channels are those of its output."""

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


@dataclass(frozen=True, slots=True)
class GroupRow:
    """One group: how many channels it has and keeps, where they are, and their scores."""

    id: str
    size: int
    kept: int
    members: tuple[tuple[str, int], ...]
    frozen: str | None
    score: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class FrozenRow:
    """Why channels cannot be removed, and the multiply-accumulates of the operators that this concerns."""

    node: str
    op: str
    tensor: str
    reason: str
    mac: int


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

    @property
    def target(self) -> Target | None:
        """The binding target: the one that the result comes closest to."""
        return self.targets[0] if self.targets else None

    def to_json(self) -> dict[str, Any]:
        """Return plain data in the documented schema."""
        ratio = {kind: self.after[kind] / self.before[kind] if self.before[kind] else 1.0 for kind in COST_KINDS}
        return {
            "schema": 1,
            "onnxprune": self.version,
            "input": dict(self.input),
            "output": dict(self.output),
            "options": dict(self.options),
            "cost": {
                "before": {kind: self.before[kind] for kind in COST_KINDS},
                "after": {kind: self.after[kind] for kind in COST_KINDS},
                "ratio": ratio,
            },
            "input_shapes": {name: list(shape) for name, shape in self.input_shapes.items()},
            "target": _fields(self.targets[0], leave_out=("share",)) if self.targets else None,
            "targets": [_fields(target, leave_out=("share",)) for target in self.targets],
            "floor": dict(self.floor),
            "groups": [
                {
                    "id": g.id,
                    "size": g.size,
                    "kept": g.kept,
                    "members": [{"tensor": tensor, "axis": axis} for tensor, axis in g.members],
                    "frozen": g.frozen,
                    "score": list(g.score),
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
        }


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
    rows = []
    for index, work in enumerate(cost.works):
        node = work.node
        axis = _channel_axis(coupling, node.op, node.outputs[0])
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
            )
        )
    return tuple(rows)


def _channel_axis(coupling: Coupling, op: str, output: str) -> Axis:
    axes = coupling.axes(output)
    return axes[1] if op in ("Conv", "ConvTranspose") else (axes[-1] if axes else ())


def group_rows(coupling: Coupling, keep: np.ndarray, score: np.ndarray) -> tuple[GroupRow, ...]:
    """Describe every group under ``keep``."""
    return tuple(
        GroupRow(
            id=group.id,
            size=group.size,
            kept=int(keep[group.classes].sum()),
            members=group.members,
            frozen=group.frozen.text if group.frozen else None,
            score=tuple(round(float(value), 6) for value in score[group.classes]),
        )
        for group in coupling.groups
    )


def frozen_rows(cost: Cost) -> tuple[FrozenRow, ...]:
    """List what is frozen and why, costliest first."""
    coupling = cost.coupling
    macs = cost.layers.values(cost.counts(np.ones(coupling.n_classes, bool)))
    touched: dict[int, set[int]] = {}
    for index, work in enumerate(cost.works):
        for reason in np.unique(np.concatenate([np.zeros(0, int), *_reasons(coupling, work.axes)])):
            if reason >= 0:
                touched.setdefault(int(reason), set()).add(index)
    rows: dict[tuple[str, str, str, str], int] = {}
    for reason, works in touched.items():
        why = coupling.reasons[reason]
        key = (why.node, why.op, why.tensor, why.text)
        rows[key] = max(rows.get(key, 0), round(sum(macs[index] for index in works)))
    listed = [FrozenRow(*key, mac) for key, mac in rows.items()]
    return tuple(sorted(listed, key=lambda row: -row.mac))


def _reasons(coupling: Coupling, axes: Iterable[Axis]) -> Iterable[np.ndarray]:
    return (coupling.reason[classes] for axis in axes for classes in coupling.atoms(axis))


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
