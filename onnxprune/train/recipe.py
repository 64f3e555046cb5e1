"""Recipe: everything that decides how a network is trained, and hence what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnxprune.errors import UsageError

LOSSES = ("auto", "l1", "l2", "charbonnier", "cross-entropy", "none")
FLIPS = ("none", "horizontal", "all")
OPTIMIZERS = ("adam", "soap", "sgd")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes
    ----------
    epochs, batch
        Passes over the data, and samples of a step over all processes.
    optimizer, learning_rate, weight_decay
        Adam; SOAP, which is Adam in a basis that fits each layer (:mod:`onnxprune.train.soap`); or SGD with momentum 0.9.
    warmup, final_rate
        Share of the steps in which the rate rises from 0; share of it that the cosine ends at.
    clip
        Largest norm of the gradient; 0 for none.
    ema
        Decay of the moving average of the weights, which is what is judged and written; 0 for none.
    loss
        What the output is compared with the target by. ``auto``: cross-entropy for labels, l1 for targets, else none.
    distill
        Weight of the distance to the teacher's outputs. None: 1 where the data has neither labels nor targets, and with
        labels; else 0.
    temperature
        Softens the classes that teacher and student give, where they are compared as classes (Hinton et al., 2015).
    features
        Weight of the distance to the teacher's features, at the tensors that the artifact lists.
    sparsity
        Weight of the group lasso over channels (the paper's regularizer).
    crop, pad, flip, noise
        Size of random crops (of the inputs); zeros around pictures before they are cropped back to their size; mirror
        images (``all``: the eight symmetries of the square); deviation of Gaussian noise added to the inputs.
    mixup
        Blend every input with another of its batch, by a share drawn from Beta(mixup, mixup); 0 for none. Only for learning
        from the teacher alone, who says what a blend is (Zhang et al., 2018; Beyer et al., 2022).
    precision
        Type of convolutions and products; parameters and their updates stay float32.
    """

    epochs: int = 20
    batch: int = 32
    optimizer: str = "adam"
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    warmup: float = 0.05
    final_rate: float = 0.01
    clip: float = 1.0
    ema: float = 0.0
    loss: str = "auto"
    distill: float | None = None
    temperature: float = 4.0
    features: float = 0.0
    sparsity: float = 0.0
    crop: int = 0
    pad: int = 0
    flip: str = "none"
    noise: float = 0.0
    mixup: float = 0.0
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {"loss": LOSSES, "flip": FLIPS, "optimizer": OPTIMIZERS, "precision": PRECISIONS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name} {getattr(self, name)!r} is unknown; choose from {', '.join(known)}")
        for name in (
            "weight_decay",
            "clip",
            "sparsity",
            "features",
            "noise",
            "mixup",
            "distill",
            "crop",
            "pad",
            "final_rate",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"{name} {value}: must be a number from 0 up")
        for name in ("epochs", "batch", "learning_rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} {getattr(self, name)}: must be above 0")
        if not (0 <= self.warmup < 1 and 0 <= self.ema < 1):
            raise UsageError("warmup and ema are shares: from 0 up, below 1")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine (Loshchilov and Hutter, 2017)."""
        rising = max(1, round(self.warmup * steps)) if self.warmup else 0
        if step < rising:
            return self.learning_rate * (step + 1) / (rising + 1)
        done = (step - rising) / max(1, steps - rising)
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * (1 + math.cos(math.pi * done)) / 2)
