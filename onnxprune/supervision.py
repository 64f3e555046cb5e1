"""What training can go by: groups of channels with their weights, and features that student and teacher share."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np
import onnx

from onnxprune.cost import Cost
from onnxprune.coupling import Coupling, Group
from onnxprune.labels import Work

_MIXING = frozenset(
    "Conv ConvTranspose Gemm MatMul FusedConv NhwcConv NhwcFusedConv FusedGemm FusedMatMul TransposeMatMul".split()
)


def group_entries(cost: Cost, weights: Container[str]) -> list[dict[str, Any]]:
    """Prunable groups of a student, each with its weight and the slices of trainable tensors that carry its channels.

    The weight is the MAC that removing one channel saves, over the mean of that over all prunable channels. Where
    channels are removed in units (one of every row), it is the unit's share.
    """
    coupling = cost.coupling
    found = [(group, saved) for group, saved in _savings(cost) if group.frozen is None]
    n_channels = sum(group.size for group, _ in found)
    mean = sum(group.size * saved for group, saved in found) / n_channels if n_channels else 0.0
    order = {group.id: place for place, group in enumerate(coupling.groups)}
    entries = [
        {
            "id": group.id,
            "size": group.size,
            "weight": saved / mean if mean > 0 else 1.0,
            "members": list(_members(coupling, group, weights)),
        }
        for group, saved in sorted(found, key=lambda pair: order[pair[0].id])
    ]
    return [entry for entry in entries if entry["members"]]


def _savings(cost: Cost) -> Iterator[tuple[Group, float]]:
    """Every group that can be pruned, and the MAC that removing one of its channels saves."""
    counts = cost.counts(np.ones(cost.coupling.n_classes, bool))
    for bundle in cost.coupling.bundles:
        unit = bundle.units(np.zeros(cost.coupling.n_classes))[0]
        atoms, times = cost.increment(unit)
        saved = -cost.terms["mac"].change(counts, atoms, -times)
        for group in bundle.groups:
            yield group, saved / bundle.unit


def _members(coupling: Coupling, group: Group, weights: Container[str]) -> Iterator[dict[str, Any]]:
    """Axes of trainable tensors that carry channels of a group; a tensor that several nodes share alike counts once."""
    number = np.full(coupling.n_classes, -1)
    number[group.classes] = np.arange(group.size)
    known = set()
    for member in coupling.members:
        channels = number[member.classes]
        key = member.tensor, member.axis, channels.tobytes()
        if member.tensor in weights and (channels >= 0).any() and key not in known:
            known.add(key)
            rows = channels.reshape(-1, channels.shape[-1]) if channels.ndim > 1 else channels
            yield {"tensor": member.tensor, "axis": member.axis, "channels": rows.tolist()}


def feature_entries(
    coupling: Coupling, keep: np.ndarray, student: Mapping[str, tuple[int, ...]], graphs: tuple[onnx.GraphProto, ...]
) -> list[dict[str, Any]]:
    """Results of layers with weights that student and teacher both have, the student's at some channels of the teacher's.

    Parameters
    ----------
    coupling, keep
        The teacher's, and which of its classes stay.
    student
        Shape of every tensor of the student.
    graphs
        The two graphs: what is named must be computed by a node of each, and be no output.
    """
    names = set.intersection(*({name for node in graph.node for name in node.output} for graph in graphs))
    names -= {value.name for graph in graphs for value in graph.output}
    entries = []
    for work in coupling.ledger.works:
        name = work.node.outputs[0] if work.node.op in _MIXING and work.weight is not None else ""
        if name in names:
            found = _restriction(coupling, name, keep, _channel_axis(coupling, work))
            if found is not None and student.get(name) == coupling.shape(coupling.axes(name), keep):
                axis, kept = found
                entries.append({"tensor": name, "axis": axis, "kept": None if kept is None else kept.tolist()})
    return entries


def _channel_axis(coupling: Coupling, work: Work) -> int:
    rank = len(coupling.axes(work.node.outputs[0]))
    if work.node.op in ("Conv", "ConvTranspose", "FusedConv"):
        return 1
    if "MatMul" in work.node.op and work.weight == 0 and rank > 1:
        return rank - 2
    return rank - 1


def _restriction(coupling: Coupling, name: str, keep: np.ndarray, channel: int) -> tuple[int, np.ndarray | None] | None:
    """Axis on which a tensor shrinks, and what it keeps there; None where that is not the same all over the tensor."""
    axes = coupling.axes(name)
    masks = {position: coupling.mask(axes, position, keep) for position in range(len(axes))}
    shrinking = {position: mask for position, mask in masks.items() if not mask.all()}
    if not shrinking:
        return channel, None
    if len(shrinking) > 1:
        return None
    ((position, mask),) = shrinking.items()
    rows = np.moveaxis(mask, position, -1).reshape(-1, mask.shape[position])
    return (position, np.flatnonzero(rows[0])) if (rows == rows[0]).all() else None
