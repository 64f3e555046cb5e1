"""What a user may choose, and how a run tells its progress and its times."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import onnx

from onnxprune import profile as profiles
from onnxprune import runtime
from onnxprune.coupling import ATTENTION, Coupling
from onnxprune.errors import UsageError
from onnxprune.passes.align import permitted
from onnxprune.passes.allocate import ALLOCATIONS
from onnxprune.passes.score import check_criterion
from onnxprune.passes.select import PRESETS, Limits
from onnxprune.profile import Profile

ModelLike = str | os.PathLike | onnx.ModelProto
Progress = Callable[[str, int, int], None]
MEASURED = ("obs", "activation", "wanda")
"""Criteria that rank channels by calibration data."""

COMPENSATE = ("auto", "none", "bias", "least-squares")
MOST_CHANNELS, MOST_THREADS = 1 << 30, 4096
"""Largest ``align`` and ``min_channels``, and largest ``threads``."""

STAGES = ("load", "couple", "score", "select", "compensate", "apply", "prove", "save")


def silent(stage: str, done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Options:
    """What a user may choose; the command line's options of the same names.

    Attributes
    ----------
    targets
        Budget per kind (``mac``, ``params``, ``bandwidth``, ``size``, ``latency``): at most 1 is a share, more is absolute,
        latency in microseconds.
    criterion
        ``auto`` is ``obs`` where there is calibration data, else ``l2``.
    profile
        Hardware that channel counts are for: a name, or a TOML file (:mod:`onnxprune.profile`). Where latency is measured
        and nothing is chosen: blocks of this machine's onnxruntime.
    latency_table
        CSV file with latencies of layers on the target (:mod:`onnxprune.latency`), instead of measuring here.
    calib
        Calibration data: a path, arrays by input name with samples on axis 0, or a list of feeds.
    calib_memory
        Bytes that calibration and compensation may hold.
    compensate
        ``auto`` is ``least-squares`` where there is calibration data, else ``none``.
    sensitivity
        A table that the command ``sensitivity`` wrote, by which groups compare.
    provider
        Execution provider of onnxruntime that runs models; without one CUDA where that works, else the CPU. The proof
        runs on the CPU unless a provider is named.
    threads
        Threads of each onnxruntime session; 0 leaves that to onnxruntime.
    scale, mean, std
        How integers in calibration data become floats: see :func:`onnxprune.data.load`.
    """

    targets: Mapping[str, float] = field(default_factory=dict)
    preset: str = "d"
    criterion: str = "auto"
    profile: str = ""
    latency_table: str = ""
    align: int = 1
    min_channels: int = 1
    max_prune: float = 1.0
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    attention: str = "auto"
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    provider: str = ""
    threads: int = 0
    seed: int = 0
    proof: bool = True
    calib: Any = None
    calib_memory: int = 2_000_000_000
    compensate: str = "auto"
    allocation: str = ALLOCATIONS[0]
    new_nodes: bool = True
    sensitivity: str = ""
    scale: float | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UsageError(f"preset {self.preset!r}: unknown; choose from {', '.join(PRESETS)}")
        if self.attention not in ATTENTION:
            raise UsageError(f"attention {self.attention!r}: unknown; choose from {', '.join(ATTENTION)}")
        if not (
            1 <= self.align <= MOST_CHANNELS and 1 <= self.min_channels <= MOST_CHANNELS and 0 <= self.max_prune <= 1
        ):
            raise UsageError(
                f"align and min_channels lie between 1 and {MOST_CHANNELS}, max_prune between 0 and 1; got {self.align}, "
                f"{self.min_channels}, {self.max_prune}"
            )
        if self.seed < 0:
            raise UsageError(f"seed {self.seed}: must be 0 or more")
        if self.profile:
            profiles.load(self.profile)
        if not 0 <= self.threads <= MOST_THREADS:
            raise UsageError(
                f"threads {self.threads}: must be 0 (as onnxruntime chooses) or more, up to {MOST_THREADS}"
            )
        if self.provider:
            runtime.provider_for(self.provider)
        if self.criterion not in ("auto", *MEASURED):
            check_criterion(self.criterion)
        if self.allocation not in ALLOCATIONS:
            raise UsageError(f"allocation {self.allocation!r}: unknown; choose from {', '.join(ALLOCATIONS)}")
        if self.compensate not in COMPENSATE:
            raise UsageError(f"compensate {self.compensate!r}: unknown; choose from {', '.join(COMPENSATE)}")
        if self.calib is None and (self.compensate in ("bias", "least-squares") or self.criterion in MEASURED):
            which = f"--criterion {self.criterion}" if self.criterion in MEASURED else f"--compensate {self.compensate}"
            raise UsageError(f"{which} needs calibration data (--calib): a few dozen inputs without labels will do")
        if self.sensitivity and self.criterion_for(self.calib is not None) != "obs":
            raise UsageError(f"--sensitivity {self.sensitivity} goes with criterion obs, which needs --calib")
        if self.calib_memory < 1 << 20:
            raise UsageError(f"calib-memory {self.calib_memory}: give at least 1M")
        if self.latency_table and "latency" not in self.targets:
            raise UsageError("--latency-table goes with --target-latency")
        for kind, value in self.targets.items():
            if not value > 0 or value == float("inf"):
                raise UsageError(f"target {kind} {value}: must be a share in (0, 1] or an absolute number above 1")

    def criterion_for(self, calibrated: bool) -> str:
        """The criterion, ``auto`` resolved."""
        if self.criterion != "auto":
            return self.criterion
        return "obs" if calibrated else "l2"

    @property
    def compensation(self) -> str:
        """What to compensate by, ``auto`` resolved."""
        if self.compensate != "auto":
            return self.compensate
        return "none" if self.calib is None else "least-squares"

    @property
    def hardware(self) -> Profile | None:
        """The profile, read."""
        if self.profile or not self.in_blocks_here:
            return profiles.load(self.profile) if self.profile else None
        known = profiles.load("ort-cpu")
        return replace(known, multiples={"*": (runtime.BLOCK, runtime.BLOCK)}, array={})

    @property
    def in_blocks_here(self) -> bool:
        """Whether channels are kept in this machine's blocks, because its latency is measured and nobody said otherwise."""
        return "latency" in self.targets and not (self.profile or self.latency_table or self.align > 1)

    def limits(self, coupling: Coupling) -> Limits:
        """What the options and the profile allow."""
        hardware = self.hardware
        counts = permitted(coupling, hardware) if hardware else {}
        return Limits(self.align, self.min_channels, self.max_prune, counts)


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
