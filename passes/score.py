"""Score: how important each channel is, from its weights alone (of quantised ones: the real numbers they stand for).

Per member tensor the norm of the channel's slice is divided by that tensor's mean norm, so that layers compare; over members
the maximum counts, because every member must agree to lose the channel ("magnitude < threshold" in the paper's words).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points

import numpy as np

from onnxprune.coupling import Coupling, Member
from onnxprune.errors import ModelError, UsageError
from onnxprune.model import Node, Shape
from onnxprune.ops.quantised import quantised


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
        A weight holds NaN or infinity, so that nothing can be ranked.
    """
    _refuse_nan(coupling)
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
                value[present] = np.maximum(value[present], np.where(open_classes[present], norms, value[present]))
                members[present] += open_classes[present]
    return Scores(np.maximum(value, 0.0), members)


def _refuse_nan(coupling: Coupling) -> None:
    """NaN weights cannot be ranked, nor proved equal to anything."""
    for name in dict.fromkeys(name for name, _ in coupling.ledger.constants):
        constant = coupling.model.constants[name]
        if constant.floating and constant.size and _holds_nan(constant.load()):
            raise ModelError(f"{name}: holds NaN; train or export the model again")


def _holds_nan(array: np.ndarray) -> bool:
    if array.dtype == np.float16:  # numpy's arithmetic in half precision is ten times slower than looking at the bits
        return bool(((array.view(np.uint16) & 0x7FFF) > 0x7C00).any())
    return bool(np.isnan(np.min(array)))  # a minimum passes NaN on


def _norms(
    member: Member, weight: np.ndarray, norm: Callable[[np.ndarray], np.ndarray], gain: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Classes on a member axis, and the norm of each class's slices over the tensor's mean norm."""
    if weight.dtype != np.float32:
        weight = weight.astype(np.float32)
    if not np.isfinite(weight.sum(dtype=np.float64)) and not np.isfinite(weight).all():
        raise ModelError(f"{member.tensor}: holds infinite weights; nothing can be ranked by them")
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
        gain = scale.load() / np.sqrt(variance.load() + node.attributes.get("epsilon", 1e-5))
        gains[weight.name] = _along_outputs(producer, weight.shape, gain.astype(np.float32))
    return gains


def _along_outputs(producer: Node, shape: Shape, gain: np.ndarray) -> np.ndarray:
    """Shape one factor per output channel so that it multiplies the weight."""
    if producer.op == "Conv":
        return gain.reshape(-1, *[1] * (len(shape) - 1))
    if producer.op == "ConvTranspose":  # (inputs, outputs per group, ..): each group's inputs have outputs of their own
        groups = producer.attributes.get("group", 1)
        return np.repeat(gain.reshape(groups, -1), shape[0] // groups, 0).reshape(shape[0], -1, *[1] * (len(shape) - 2))
    return gain[:, None] if producer.op == "Gemm" and producer.attributes.get("transB", 0) else gain
