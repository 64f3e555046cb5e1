"""Simplifiers agree: what is simplified after pruning computes the same; what was simplified before is proved."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

import architectures
import onnxprune
from onnxprune.runtime import Session, random_feeds

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT.parent / "shared" / "zoo"
TRAINED = {name: ROOT / "fixtures" / name / f"{name}.onnx" for name in ("digits", "denoise")}
FEW = ("edsr_reshape", "resnet_a", "mobilenet_v2", "squeeze_excite_gemm", "c2f_detector", "layer_norm_mlp")
BUILT = [pytest.param(name, marks=[] if name in FEW else [pytest.mark.slow]) for name in architectures.ALL]
FROM_ZOO = ("gn_resnet", "shuffle_group", "hf_llama_gqa", "gru_seq")
needs_zoo = pytest.mark.skipif(not ZOO.is_dir(), reason=f"the architectures are not there: {ZOO}")

Simplifier = Callable[[onnx.ModelProto], onnx.ModelProto]


def module(path: Path) -> ModuleType:
    """Import a script by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(params=["onnxsim", "onnxslim"])
def simplify(request: pytest.FixtureRequest) -> Simplifier:
    """A simplifier, called as tools/pipeline.py calls it."""
    library = pytest.importorskip(request.param, reason=f"{request.param} is not installed: nothing was simplified")
    return lambda model: module(ROOT / "tools" / "pipeline.py").SIMPLIFIERS[request.param](library, model)


def check(model: onnx.ModelProto, simplify: Simplifier) -> None:
    """Prune and simplify in both orders."""
    result = onnxprune.prune(model, target_mac=0.7)
    simple = simplify(result.model)
    session = Session(result.model.SerializeToString())
    feed = random_feeds(session.inputs, result.report.input_shapes)
    both = zip(session.run(feed), Session(simple.SerializeToString()).run(feed), strict=True)
    for expected, found in both:
        assert found.shape == expected.shape
        spread = max(float(np.std(expected)), 1e-6)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * spread)
    again = onnxprune.prune(simplify(model), target_mac=0.7)
    assert again.report.proof is not None
    assert again.report.proof.ok
    assert again.report.after["mac"] <= 0.7 * again.report.before["mac"]


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_trained_networks(name: str, simplify: Simplifier) -> None:
    """Networks with weights that mean something."""
    check(onnx.load(TRAINED[name]), simplify)


@pytest.mark.parametrize("name", BUILT)
def test_architectures(name: str, simplify: Simplifier) -> None:
    """Networks of every family."""
    check(architectures.ALL[name](), simplify)


@needs_zoo
@pytest.mark.parametrize("name", FROM_ZOO)
def test_exported_networks(name: str, simplify: Simplifier, tmp_path: Path) -> None:
    """Networks as exporters leave them, with all their shape arithmetic."""
    command = [sys.executable, ZOO / "fill.py", name, tmp_path / "m.onnx"]
    subprocess.run(command, check=True, capture_output=True)
    check(onnx.load(tmp_path / "m.onnx"), simplify)
