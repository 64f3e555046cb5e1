"""Make a trained network cheaper by removing channels from its ONNX graph, with proof that nothing broke."""

import pathlib as _pathlib

_root = _pathlib.Path(__file__).resolve().parents[1]
if (_root / "passes" / "prove.py").is_file() and (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))  # a clone: setuptools maps passes/ into the package only on installing

from onnxprune import ops
from onnxprune.artifact import export_artifact
from onnxprune.checkpoint import CheckpointSummary, SlicedParameter, apply_checkpoint
from onnxprune.encodings import SlicedEncodings, slice_encodings
from onnxprune.errors import (
    BudgetError,
    FileError,
    ModelError,
    OnnxPruneError,
    ProofError,
    QualityError,
    UsageError,
)
from onnxprune.manifest import Artifact, read_artifact
from onnxprune.onnx_io import save
from onnxprune.options import Options
from onnxprune.pipeline import Result, apply, inspect, prune, verify
from onnxprune.plan import Plan
from onnxprune.quality import evaluate
from onnxprune.report import Report
from onnxprune.report.rows import Row as SweepRow
from onnxprune.report.sensitivity import SensitivityRow, SensitivityTable
from onnxprune.search import Guard, prune_to_quality
from onnxprune.sensitivity import sensitivity
from onnxprune.sweep import sweep

__all__ = [
    "Artifact",
    "BudgetError",
    "CheckpointSummary",
    "FileError",
    "Guard",
    "ModelError",
    "OnnxPruneError",
    "Options",
    "Plan",
    "ProofError",
    "QualityError",
    "Report",
    "Result",
    "SensitivityRow",
    "SensitivityTable",
    "SlicedEncodings",
    "SlicedParameter",
    "SweepRow",
    "UsageError",
    "apply",
    "apply_checkpoint",
    "evaluate",
    "export_artifact",
    "inspect",
    "ops",
    "prune",
    "prune_to_quality",
    "read_artifact",
    "save",
    "sensitivity",
    "slice_encodings",
    "sweep",
    "verify",
]
