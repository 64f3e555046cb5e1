"""Steps of the iterative loop on disk: a folder for each, which a run that was killed goes on from."""

from __future__ import annotations

import json
import math
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from onnxprune import onnx_io
from onnxprune.errors import FileError, UsageError

STATE = "state.json"
RESULT = "result.json"
FILES = (RESULT, "plan.json", "pruned.onnx", "trained.onnx", "artifact", "training")
"""What a step writes."""

OUT_OF_REACH = "out of reach"
"""Status of a step for which too few channels are left."""


@dataclass(frozen=True)
class Iteration:
    """One step of the loop; ``share`` of the cost was asked for, ``kept`` is the MAC that is left of the original's."""

    number: int
    share: float
    kept: float
    metric: float
    status: str
    seconds: float


def open_folder(folder: pathlib.Path, settings: Mapping[str, Any], *, restart: bool) -> None:
    """Begin a folder, or go on with one of the same run; one that holds anything else is left as it is."""
    told = json.loads(json.dumps(settings, default=str, sort_keys=True))
    state = folder / STATE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".{STATE}.*"):  # of a run that was killed while it wrote
            left.unlink()
        known = json.loads(state.read_text()).get("settings", {}) if state.exists() else None
        strange = known is None and any(folder.iterdir())
    except (OSError, ValueError, AttributeError) as error:
        raise FileError(f"{folder}: cannot be used ({error}); remove it, or name another with --state") from error
    if strange:
        raise UsageError(f"{folder}: holds other files; name another folder with --state")
    if known is not None and known != told and not restart:
        other = [name for name in sorted({*known, *told}) if known.get(name) != told.get(name)]
        raise UsageError(
            f"{folder}: is of a run with other settings ({', '.join(other)}); use --restart to drop it, or name another "
            "with --state"
        )
    steps = [path for path in sorted(folder.iterdir()) if re.fullmatch(r"iteration-\d{3,}", path.name)]
    if known != told or restart:
        for step in steps:  # results are what a run goes on from
            (step / RESULT).unlink(missing_ok=True)
        for step in steps:
            _forget(step, FILES)
        onnx_io.write(state, json.dumps({"schema": 1, "settings": told}, indent=1).encode())
    for step in steps:
        _forget(step, [left.name for name in FILES for left in step.glob(f".{name}.*")])


def _forget(folder: pathlib.Path, names: Sequence[str]) -> None:
    """Remove what an earlier run's step wrote (or was writing when it was killed), and nothing else."""
    for path in (folder / name for name in names):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remember(folder: pathlib.Path, found: Iteration) -> None:
    """Write down a step's result: from then on it is done."""
    known = {**asdict(found), "metric": found.metric if math.isfinite(found.metric) else None}
    onnx_io.write(folder / RESULT, json.dumps(known).encode())


def recall(folder: pathlib.Path) -> Iteration | None:
    """Read a step's result; None where it is not done."""
    path = folder / RESULT
    try:
        if not path.exists():
            return None
        known = json.loads(path.read_text())
        return Iteration(**{**known, "metric": math.nan if known["metric"] is None else known["metric"]})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FileError(f"{path}: cannot be read ({error}); remove it to repeat the iteration") from error
