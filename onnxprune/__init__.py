"""Make a trained network cheaper by removing channels from its ONNX graph, with proof that nothing broke."""

from onnxprune import ops
from onnxprune.errors import (
    BudgetError,
    FileError,
    ModelError,
    OnnxPruneError,
    ProofError,
    QualityError,
    UsageError,
)
from onnxprune.pipeline import Options, Result, apply, evaluate, inspect, prune, verify
from onnxprune.plan import Plan
from onnxprune.report import Report

__all__ = [
    "BudgetError",
    "FileError",
    "ModelError",
    "OnnxPruneError",
    "Options",
    "Plan",
    "ProofError",
    "QualityError",
    "Report",
    "Result",
    "UsageError",
    "apply",
    "evaluate",
    "inspect",
    "ops",
    "prune",
    "verify",
]
