"""Trainer: the loop over batches and epochs, which any kill leaves able to go on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from onnxprune.errors import ModelError
from onnxprune.manifest import Artifact, Feature
from onnxprune.train import state
from onnxprune.train.batches import Batch, Batches
from onnxprune.train.losses import Losses
from onnxprune.train.module import OnnxModule
from onnxprune.train.recipe import Recipe
from onnxprune.train.soap import Soap
from onnxprune.train.sparsity import GroupLasso
from onnxprune.train.state import Epoch
from onnxprune.train.world import World

SAVE_SECONDS = 60.0
"""Time after which a run that is killed would lose too much."""

_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Moment:
    """Where a run is: shown as progress."""

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    metric: float | None


@dataclass(frozen=True)
class Judge:
    """How an epoch's weights are judged: ``measure`` takes a state of the student."""

    measure: Callable[[Mapping[str, Tensor]], float]
    higher_is_better: bool


@dataclass
class Progress:
    """What changes while training: everything that a checkpoint holds besides weights and optimizer."""

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    history: list[Epoch] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    best_metric: float | None = None
    before: float | None = None


class Trainer:
    """Train the student of an artifact.

    Parameters
    ----------
    folder
        Where checkpoints and ``metrics.csv`` go.
    key
        What the run is: a checkpoint with another key is refused.
    judge
        Judges the weights after each epoch, and before the first; the best are kept. Without it the last are.
    """

    def __init__(
        self, artifact: Artifact, batches: Batches, losses: Losses, recipe: Recipe, world: World, folder: Path, key: str,
        judge: Judge | None = None, moment: Callable[[Moment], None] = lambda now: None,
    ) -> None:  # fmt: skip
        self.batches, self.losses, self.recipe, self.world = batches, losses, recipe, world
        self.folder, self.key, self.judge, self.moment = folder, key, judge, moment
        self.student = _placed(OnnxModule(artifact.student, artifact.trainable), world)
        self.teacher = _placed(OnnxModule(artifact.teacher, ()), world) if losses.needs_teacher else None
        self.features: tuple[Feature, ...] = artifact.features if losses.features else ()
        self.lasso = GroupLasso(artifact.groups).to(world.device) if recipe.sparsity else None
        branches = any(step.entry is None for step in self.student.program.steps)
        self.network: nn.Module = (
            DistributedDataParallel(self.student, find_unused_parameters=branches) if world.size > 1 else self.student
        )
        self.optimizer = _optimizer(recipe, self.student)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.precision == "float16")
        self.average = {k: v.detach().clone() for k, v in self.student.named_parameters()} if recipe.ema else None
        self.progress = Progress()
        self._resume()

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Tensor]:
        """Train to the end; returns the weights to keep, by initializer name."""
        now, steps = self.progress, self.batches.steps * self.recipe.epochs
        if not now.history and now.step == 0 and self.judge is not None and now.best is None:
            now.before = self._judged()
        saved = time.monotonic()
        while now.epoch < self.recipe.epochs:
            for batch in self.batches.epoch(now.epoch, now.step):
                begin = time.monotonic()
                rate = self.recipe.rate(now.epoch * self.batches.steps + now.step, steps)
                loss = self._step(batch, rate)
                now.step += 1
                now.seconds += time.monotonic() - begin
                done = now.epoch * self.batches.steps + now.step
                self.moment(Moment(done, steps, now.epoch + 1, self.recipe.epochs, loss, now.best_metric))
                if time.monotonic() - saved > SAVE_SECONDS and now.step < self.batches.steps:
                    self._save()
                    saved = time.monotonic()
            self._end_epoch(rate)
            saved = time.monotonic()
        return now.best if now.best is not None else self._weights()

    def _step(self, batch: Batch, rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        terms = self._terms(batch)
        loss = torch.stack([term.reshape(()) for term in terms.values()]).sum()
        if not torch.isfinite(loss):
            raise ModelError(self._diverged("loss", loss))
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.recipe.clip or math.inf)
        if not torch.isfinite(norm) and not self.scaler.is_enabled():  # the scaler skips such steps by itself
            raise ModelError(self._diverged("gradient", norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            with torch.no_grad():
                for name, weight in self.student.named_parameters():
                    self.average[name].lerp_(weight, 1 - self.recipe.ema)
        sums = self.progress.sums
        for name, value in {**terms, "loss": loss}.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        return loss.item()

    def _diverged(self, what: str, value: Tensor) -> str:
        return f"the {what} is {value.item()} in epoch {self.progress.epoch + 1}; give a lower learning rate"

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        device, losses = self.world.device, self.losses
        inputs = [_on(torch.from_numpy(batch.inputs[name]), device) for name in self.student.inputs]
        target = None if batch.target is None else _on(torch.from_numpy(batch.target), device)
        label = None if batch.label is None else torch.from_numpy(batch.label).long().to(device)
        names = [feature.tensor for feature in self.features]
        wanted = [*self.student.outputs, *names]
        half = _TYPES.get(self.recipe.precision)
        with torch.autocast(device.type, half, enabled=half is not None):
            taught: dict[str, Tensor] = {}
            if self.teacher is not None:
                with torch.no_grad():
                    taught = self.teacher(*inputs, wanted=wanted)
            mine = self.network(*inputs, wanted=wanted)
        outputs = [mine[name].float() for name in self.student.outputs if mine[name].is_floating_point()]
        teachers = [
            taught[name].float() for name in self.student.outputs if taught and taught[name].is_floating_point()
        ]
        terms = losses.terms(outputs, inputs[0], target, label, teachers)
        if self.features:
            kept = {f.tensor: _kept(taught[f.tensor].float(), f) for f in self.features}
            terms["features"] = losses.feature_term({n: mine[n].float() for n in names}, kept)
        if self.lasso is not None:
            terms["sparsity"] = self.recipe.sparsity * self.lasso(dict(self.student.named_parameters()))
        return terms

    def _end_epoch(self, rate: float) -> None:
        now = self.progress
        means = {name: self.world.mean(total / self.batches.steps) for name, total in now.sums.items()}
        now.epoch, now.step, now.sums = now.epoch + 1, 0, {}
        metric = self._judged() if self.judge is not None else None
        terms = {name: means.get(name) for name in ("task", "distill", "features", "sparsity")}
        now.history.append(
            Epoch(now.epoch, rate, means["loss"], **terms, metric=metric, seconds=round(now.seconds, 3))  # type: ignore[arg-type]
        )
        self._save()

    def _judged(self) -> float:
        """Measure the weights as they are, and keep them where they are the best so far."""
        assert self.judge is not None
        now, weights = self.progress, self._weights()
        metric = self.world.agree(self.judge.measure(weights) if self.world.first else None)
        sign = 1 if self.judge.higher_is_better else -1
        if now.best is None or now.best_metric is None or sign * metric > sign * now.best_metric:
            now.best, now.best_metric = {k: v.detach().cpu().clone() for k, v in weights.items()}, metric
        return metric

    def _weights(self) -> dict[str, Tensor]:
        return dict(self.student.named_parameters()) if self.average is None else self.average

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        now = self.progress
        if not self.world.first:
            return
        content = {
            "key": self.key,
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average,
            "progress": {**vars(now), "history": [asdict(epoch) for epoch in now.history]},
        }
        state.save(self.folder, content)
        state.write_metrics(self.folder, now.history)

    def _resume(self) -> None:
        content: dict[str, Any] | None = state.load(self.folder, self.key)
        if content is None:
            return
        self.student.load_state_dict(content["student"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        if self.average is not None:
            self.average = {name: value.to(self.world.device) for name, value in content["average"].items()}
        fields = content["progress"]
        self.progress = Progress(**{**fields, "history": [Epoch(**row) for row in fields["history"]]})


def _placed(module: OnnxModule, world: World) -> OnnxModule:
    """Move a module to its device, with pictures channels last: convolutions are several times faster so."""
    return module.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _on(x: Tensor, device: torch.device) -> Tensor:
    return x.to(device, memory_format=torch.channels_last) if x.ndim == 4 else x.to(device)


def _kept(x: Tensor, feature: Feature) -> Tensor:
    """What the student has of a teacher's feature."""
    return x if feature.kept is None else x.index_select(feature.axis, torch.from_numpy(feature.kept).to(x.device))


def _optimizer(recipe: Recipe, student: nn.Module) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            student.parameters(), recipe.learning_rate, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
        )
    kind = Soap if recipe.optimizer == "soap" else torch.optim.AdamW
    return kind(student.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
