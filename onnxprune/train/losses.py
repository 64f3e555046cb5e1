"""Losses: distance to targets or labels, to the teacher's outputs and to its features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from onnxprune.errors import UsageError
from onnxprune.train.recipe import Recipe


def charbonnier(a: Tensor, b: Tensor) -> Tensor:
    """``sqrt(d^2 + 1e-6)``: l1 that is smooth at zero (Charbonnier et al., 1994)."""
    return (a - b).square().add(1e-6).sqrt().mean()


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": functional.l1_loss,
    "l2": functional.mse_loss,
    "charbonnier": charbonnier,
}


@dataclass(frozen=True)
class Losses:
    """What a recipe's losses are for given data.

    Attributes
    ----------
    task
        Name of the loss against targets or labels, or ``none``.
    distill
        Weight of the teacher's outputs.
    classes
        Whether outputs are compared with the teacher's as classes.
    output
        ``residual`` where the network predicts its input minus the target.
    """

    task: str
    distill: float
    classes: bool
    output: Literal["direct", "residual"]
    temperature: float
    features: float

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher has to run at all."""
        return bool(self.distill or self.features)

    def terms(
        self, outputs: Sequence[Tensor], entered: Tensor, target: Tensor | None, label: Tensor | None,
        taught: Sequence[Tensor] = (),
    ) -> dict[str, Tensor]:  # fmt: skip
        """Weighted terms of the loss by name; ``taught`` are the teacher's outputs."""
        terms = {}
        if self.task == "cross-entropy":
            assert label is not None
            _require_classes(label, outputs[0])
            terms["task"] = functional.cross_entropy(outputs[0], label)
        elif self.task != "none":
            assert target is not None
            wanted = entered - target if self.output == "residual" else target
            if wanted.shape != outputs[0].shape:
                raise UsageError(f"targets have shape {tuple(wanted.shape)}, outputs {tuple(outputs[0].shape)}")
            terms["task"] = _DISTANCES[self.task](outputs[0], wanted)
        if self.distill:
            terms["distill"] = self.distill * sum(map(self._taught, outputs, taught), torch.zeros(()))
        return terms

    def _taught(self, mine: Tensor, teachers: Tensor) -> Tensor:
        if self.classes:
            t = self.temperature
            log = functional.log_softmax(mine / t, 1)
            return functional.kl_div(log, functional.softmax(teachers / t, 1), reduction="batchmean") * t * t
        if self.task in _DISTANCES:
            return _DISTANCES[self.task](mine, teachers)
        return functional.mse_loss(mine, teachers) / teachers.detach().var().clamp(min=1e-12)

    def feature_term(self, mine: Mapping[str, Tensor], teachers: Mapping[str, Tensor]) -> Tensor:
        """Mean over tensors of the squared distance relative to the variance of what the teacher has there."""
        distances = [
            functional.mse_loss(mine[name], teachers[name]) / teachers[name].var().clamp(min=1e-12) for name in mine
        ]
        return self.features * torch.stack(distances).mean()


def _require_classes(label: Tensor, scores: Tensor) -> None:
    """Raise :class:`UsageError` where labels are not a class number per row (or pixel) of scores, classes on axis 1."""
    if scores.ndim < 2 or label.shape != (len(scores), *scores.shape[2:]):
        raise UsageError(f"labels have shape {tuple(label.shape)}, outputs {tuple(scores.shape)}")
    if strangers := label[(label < 0) | (label >= scores.shape[1])].tolist():
        raise UsageError(f"label {strangers[0]} is none of the {scores.shape[1]} classes, which are numbered from 0")


def losses_for(
    recipe: Recipe, *, labels: bool, targets: bool, output: Literal["direct", "residual"], classes: bool
) -> Losses:
    """Resolve a recipe against what the data has.

    Parameters
    ----------
    classes
        Whether outputs are known to be scores of classes, as they are wherever there are labels.

    Raises
    ------
    UsageError
        The loss needs what the data does not have.
    """
    task = recipe.loss
    if task == "auto":
        task = "cross-entropy" if labels else "l1" if targets else "none"
    if task == "cross-entropy" and not labels:
        raise UsageError("loss cross-entropy needs labels, which the training data does not have")
    if task in _DISTANCES and not targets:
        raise UsageError(f"loss {task} needs targets, which the training data does not have")
    if recipe.mixup and task != "none":
        raise UsageError(
            f"mixup blends inputs, whose {task} loss would compare them with what only one was; use --loss none"
        )
    classes = classes or labels
    distill = recipe.distill
    if distill is None:
        distill = 1.0 if task in ("none", "cross-entropy") else 0.0
    if task == "none" and not distill and not recipe.features:
        raise UsageError("nothing to learn from: no labels, no targets, and distill and features are 0")
    return Losses(task, distill, classes, output, recipe.temperature, recipe.features)
