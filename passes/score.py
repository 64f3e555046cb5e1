"""Score: how important each channel is, from its weights alone (of quantised ones: the real numbers they stand for).

Per member tensor the norm of the channel's slice is divided by that tensor's mean norm, so that layers compare; over members
the maximum counts, because every member must agree to lose the channel ("magnitude < threshold" in the paper's words).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points

import numpy as np

from onnxprune.coupling import Coupling, Member
from onnxprune.errors import UsageError
from onnxprune.model import Node, Shape
from onnxprune.ops.quantised import quantised
from onnxprune.passes.values import check_values


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Importance per class.

    Attributes
    ----------
    value
        Float64 of shape ``(n_classes,)``; higher stays.
    members
        How many tensors produce the channel.
    order
        Where given, the order in which classes go across all groups, which presets leave alone but for their floor.
    """

    value: np.ndarray
    members: np.ndarray
    order: np.ndarray | None = None


def _l1(w: np.ndarray) -> np.ndarray:
    return np.abs(w).sum((0, 2))


def _l2(w: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("anb,anb->n", w, w, dtype=np.float32, optimize=False))


def _max(w: np.ndarray) -> np.ndarray:
    return np.abs(w).max((0, 2))


def _geometric_median(w: np.ndarray) -> np.ndarray:
    """Sum of distances to all other slices: small for a slice that others can replace (He et al. 2019, FPGM)."""
    rows = np.moveaxis(w, 1, 0).reshape(w.shape[1], -1).astype(np.float64)
    square = np.einsum("ij,ij->i", rows, rows)
    return np.sqrt(np.maximum(square[:, None] + square - 2 * rows @ rows.T, 0)).sum(1)


CRITERIA: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "l1": _l1,
    "l2": _l2,
    "max": _max,
    "geometric-median": _geometric_median,
}
NAMES = (*CRITERIA, "bn-scale", "random")


_MIXING = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def criterion(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Find a norm by name: built in, or a Python entry point of group ``onnxprune.criteria``.

    A norm takes a weight of shape ``(a, n, b)`` whose middle axis holds the channels and returns ``n`` values.
    """
    if name in CRITERIA:
        return CRITERIA[name]
    for entry in entry_points(group="onnxprune.criteria", name=name):
        return entry.load()
    raise UsageError(f"--criterion {name}: unknown; choose from {', '.join(NAMES)}")


def check_criterion(name: str) -> None:
    """Raise :class:`UsageError` for a name that is neither built in nor installed."""
    if name not in NAMES:
        criterion(name)


def score(coupling: Coupling, criterion_name: str = "l2", seed: int = 0) -> Scores:
    """Score every channel.

    Raises
    ------
    ModelError
        A weight is one that :func:`onnxprune.passes.values.check_values` refuses.
    UsageError
        A norm of the user's own is NaN or infinite somewhere.
    """
    check_values(coupling)
    n = coupling.n_classes
    value, members = np.full(n, -1.0), np.zeros(n, np.int64)
    if criterion_name == "random":
        return Scores(np.random.default_rng(seed).random(n), np.ones(n, np.int64))
    norm = CRITERIA["l2"] if criterion_name == "bn-scale" else criterion(criterion_name)
    scales = _batch_norm_scales(coupling) if criterion_name == "bn-scale" else frozenset()
    prunable = ~coupling.frozen
    weights = quantised(coupling.model)
    gains = _batch_norm_gains(coupling)
    valued = {name for name, c in coupling.model.constants.items() if c.floating} | weights.keys()
    valued -= {each.scale.name for each in weights.values() if each.scale is not None}
    ranked = [m for m in coupling.members if m.tensor in valued and prunable[m.classes].any()]
    for choice in (_is_scale(scales), _produces(coupling), _consumes(coupling), lambda member: True):
        open_classes = value < 0
        for member in ranked:
            if choice(member) and open_classes[member.classes].any():
                source = weights.get(member.tensor) or coupling.model.constants[member.tensor]
                present, norms = _norms(member, source.load(), norm, gains.get(member.tensor))
                if not np.isfinite(norms).all():
                    raise UsageError(
                        f"--criterion {criterion_name}: is not finite for {member.tensor}; it must return numbers to rank by"
                    )
                value[present] = np.maximum(value[present], np.where(open_classes[present], norms, value[present]))
                members[present] += open_classes[present]
    return Scores(np.maximum(value, 0.0), members)


def _norms(
    member: Member, weight: np.ndarray, norm: Callable[[np.ndarray], np.ndarray], gain: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Classes on a member axis, and the norm of each class's slices over the tensor's mean norm."""
    weight = _moderate(weight)
    if gain is not None:
        weight = weight * gain
    before = int(np.prod(weight.shape[: member.axis], dtype=np.int64))
    slices = weight.reshape(before, weight.shape[member.axis], -1)
    if member.classes.ndim > 1:  # each block of axis 0 has channels of its own
        rows, size = member.classes.shape
        slices = (
            slices.reshape(rows, -1, size, slices.shape[-1]).swapaxes(0, 1).reshape(before // rows, rows * size, -1)
        )
    values = np.asarray(norm(slices), np.float64)
    present, inverse = np.unique(member.classes.ravel(), return_inverse=True)
    total = np.bincount(inverse, values)
    mean = total.mean()
    return present, total / mean if mean > 0 else total


MODERATE = 24
"""Binary orders of magnitude around 1 within which sums of squares in float32 neither overflow nor vanish."""


def _moderate(values: np.ndarray) -> np.ndarray:
    """Values in float32; by a power of two larger or smaller where they are far from 1, since norms are relative."""
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float32)
    largest = max(float(values.max(initial=0)), -float(values.min(initial=0)))
    exponent = math.frexp(largest)[1]
    if largest and abs(exponent) > MODERATE:
        values = np.ldexp(values, -exponent)
    return values.astype(np.float32, copy=False)


def _is_scale(scales: frozenset[str]) -> Callable[[Member], bool]:
    return lambda member: member.tensor in scales


def _produces(coupling: Coupling) -> Callable[[Member], bool]:
    return lambda member: not member.ends and not coupling.model.constants[member.tensor].is_vector


def _consumes(coupling: Coupling) -> Callable[[Member], bool]:
    return lambda member: not coupling.model.constants[member.tensor].is_vector


def _batch_norm_scales(coupling: Coupling) -> frozenset[str]:
    model = coupling.model
    found = (node.inputs[1] for node in model.nodes if node.op == "BatchNormalization")
    return frozenset(model.aliases.get(name, name) for name in found)


def _batch_norm_gains(coupling: Coupling) -> dict[str, np.ndarray]:
    """Per weight, the factor of the BatchNormalization right behind it: a folded model then ranks alike."""
    model, gains, refused = coupling.model, {}, coupling.ledger.refusals.keys()
    for node in model.nodes:
        producer = model.producer.get(node.inputs[0]) if node.op == "BatchNormalization" else None
        if producer is None or not refused.isdisjoint((node.key, producer.key)):
            continue
        if producer.op not in _MIXING or len(model.consumers[node.inputs[0]]) > 1:
            continue
        source = producer.inputs[1]
        weight = model.constant(source)
        if weight is None and (real := model.producer.get(source)) is not None and real.op == "DequantizeLinear":
            weight = model.constant(real.inputs[0])
        scale, variance = model.constant(node.inputs[1]), model.constant(node.inputs[4])
        if weight is None or scale is None or variance is None or len(model.consumers[source]) > 1:
            continue
        epsilon = node.attributes.get("epsilon", 1e-5)
        gain = scale.load().astype(np.float64) / np.sqrt(variance.load().astype(np.float64) + epsilon)
        gains[weight.name] = _along_outputs(producer, weight.shape, _moderate(gain))
    return gains


def _along_outputs(producer: Node, shape: Shape, gain: np.ndarray) -> np.ndarray:
    """Shape one factor per output channel so that it multiplies the weight."""
    if producer.op == "Conv":
        return gain.reshape(-1, *[1] * (len(shape) - 1))
    if producer.op == "ConvTranspose":  # (inputs, outputs per group, ..): each group's inputs have outputs of their own
        groups = producer.attributes.get("group", 1)
        return np.repeat(gain.reshape(groups, -1), shape[0] // groups, 0).reshape(shape[0], -1, *[1] * (len(shape) - 2))
    return gain[:, None] if producer.op == "Gemm" and producer.attributes.get("transB", 0) else gain
