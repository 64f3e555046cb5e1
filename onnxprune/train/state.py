"""State of a run on disk: written whole or not at all, and only gone on with by the run that it belongs to."""

from __future__ import annotations

import csv
import io
import pathlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from onnxprune import onnx_io
from onnxprune.errors import FileError, UsageError

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.csv"


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch: its mean loss by term, and the metric where there is validation data."""

    epoch: int
    rate: float
    loss: float
    task: float | None
    distill: float | None
    features: float | None
    sparsity: float | None
    metric: float | None
    seconds: float


def save(folder: pathlib.Path, content: dict[str, Any]) -> None:
    """Write a checkpoint in one go: a run that is killed while writing leaves the one before."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    onnx_io.write(folder / CHECKPOINT, buffer.getvalue())


def load(folder: pathlib.Path, key: str) -> dict[str, Any] | None:
    """Read the checkpoint of a run; None where there is none.

    Raises
    ------
    UsageError
        It belongs to a run of another model, other data or other settings.
    FileError
        It cannot be read.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        own = content["key"]
    except Exception as error:
        raise FileError(f"{path}: is no checkpoint of this program ({error}); remove it to begin anew") from error
    if own != key:
        raise UsageError(f"{path}: is from a run with other settings, model or data; use --restart to begin anew")
    return content


def write_metrics(folder: pathlib.Path, history: Sequence[Epoch]) -> None:
    """Write ``metrics.csv``, a row an epoch."""
    text = io.StringIO()
    rows = csv.DictWriter(text, [field.name for field in fields(Epoch)], lineterminator="\n")
    rows.writeheader()
    rows.writerows({k: "" if v is None else v for k, v in asdict(epoch).items()} for epoch in history)
    onnx_io.write(folder / METRICS, text.getvalue().encode())


def clear(folder: pathlib.Path) -> None:
    """Remove the checkpoint; what has been measured stays."""
    (folder / CHECKPOINT).unlink(missing_ok=True)


def sweep(folder: pathlib.Path) -> None:
    """Remove checkpoints that a killed run was about to write."""
    for left in folder.glob(f".{CHECKPOINT}.*"):
        left.unlink()
