"""What a user may choose, and how a run tells its progress and its times."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import onnx

from onnxprune import runtime
from onnxprune.errors import UsageError
from onnxprune.passes.couple import ATTENTION
from onnxprune.passes.score import check_criterion
from onnxprune.passes.select import PRESETS, Limits

ModelLike = str | os.PathLike | onnx.ModelProto
Progress = Callable[[str, int, int], None]
STAGES = ("load", "couple", "score", "select", "compensate", "apply", "prove", "save")


def silent(stage: str, done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Options:
    """What a user may choose; the command line's options of the same names.

    Attributes
    ----------
    targets
        Budget per kind (``mac``, ``params``, ``bandwidth``, ``size``): at most 1 is a share, more is absolute.
    """

    targets: Mapping[str, float] = field(default_factory=dict)
    preset: str = "d"
    criterion: str = "l2"
    align: int = 1
    min_channels: int = 1
    max_prune: float = 1.0
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    attention: str = "auto"
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    provider: str = ""
    seed: int = 0
    proof: bool = True

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UsageError(f"preset {self.preset!r}: unknown; choose from {', '.join(PRESETS)}")
        if self.attention not in ATTENTION:
            raise UsageError(f"attention {self.attention!r}: unknown; choose from {', '.join(ATTENTION)}")
        if self.align < 1 or self.min_channels < 1 or not 0 <= self.max_prune <= 1:
            raise UsageError("align and min_channels are at least 1, max_prune lies between 0 and 1")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed}: must be 0 or more")
        runtime.check_provider(self.provider)
        check_criterion(self.criterion)
        for kind, value in self.targets.items():
            if not value > 0 or value == float("inf"):
                raise UsageError(f"target {kind} {value}: must be a share in (0, 1] or an absolute number above 1")

    @property
    def limits(self) -> Limits:
        """The options that limit every group."""
        return Limits(self.align, self.min_channels, self.max_prune)


class Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure one stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def timings(self) -> dict[str, float]:
        """All stages (zero for those that did not run) and their total."""
        return {**dict.fromkeys(STAGES, 0.0), **self.seconds, "total": time.perf_counter() - self._begin}
