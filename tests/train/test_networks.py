"""Whole networks: their outputs are onnxruntime's, and every parameter gets a finite gradient."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")

import torch

import architectures
from agreement import results, spread
from architectures import variants
from onnxprune import onnx_io, runtime
from onnxprune.train import OnnxModule

ROOT = Path(__file__).parents[2]
MODELS, ZOO = ROOT.parent / "shared" / "models", ROOT.parent / "shared" / "zoo"
NETWORKS = ("dncnn_s25_bn", "imdn_x2", "resnet20", "resnet20_bn", "resnet20_jpeg_dynamo", "vdsr")
FEW = ("shuffle_group", "gn_resnet", "lstm_bi", "hf_llama_gqa", "v_script_if", "v_hf_bert_int8dyn", "v_hf_bert_ortopt")
ALL = sorted(path.name.removesuffix(".onnx.gz") for path in ZOO.glob("*.gz"))
needs_models = pytest.mark.skipif(not MODELS.is_dir(), reason=f"trained networks are not there: {MODELS}")
needs_zoo = pytest.mark.skipif(not ZOO.is_dir(), reason=f"the architectures are not there: {ZOO}")

UNTRAINED: Mapping[str, tuple[str, ...]] = {}
"""Parameters that no output depends on, by network."""


def shapes(session: runtime.Session, batch: int) -> dict[str, list[int]]:
    """Fixed lengths as they are; a free first one is the batch, others 64 in images and 16 in sequences."""
    return {
        name: [
            d if isinstance(d, int) and d > 0 else batch if axis == 0 else 64 if len(dims) == 4 else 16
            for axis, d in enumerate(dims)
        ]
        for name, (dims, _) in session.inputs.items()
    }


def check(model: onnx.ModelProto, batch: int = 1, tolerance: float = 1e-4, untrained: tuple[str, ...] = ()) -> None:
    """Compare outputs with onnxruntime's, and look at every gradient."""
    module = OnnxModule(model)
    session = runtime.Session(model.SerializeToString(), optimize=False, threads=1)
    feeds = runtime.random_feeds(session.inputs, shapes(session, batch))
    given = results(module(*(torch.from_numpy(np.asarray(feeds[name])) for name in module.inputs)))
    for want, have in zip(session.run(feeds), given, strict=True):
        assert spread(want, have.detach().numpy()) <= tolerance
    if not list(module.parameters()):
        return
    sum(y.float().square().mean() for y in given if y.requires_grad).backward()
    without = [name for name, p in module.named_parameters() if p.grad is None]
    assert without == list(untrained)
    assert [n for n, p in module.named_parameters() if n not in without and not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", ["digits", "denoise"])
@pytest.mark.parametrize("batch", [1, 3])
def test_trained_fixtures_agree(name: str, batch: int) -> None:
    """The trained fixtures, at two sizes of the batch."""
    check(variants.with_dynamic_batch(onnx.load(ROOT / "fixtures" / name / f"{name}.onnx")), batch)


@pytest.mark.parametrize("name", architectures.ALL)
def test_architectures_agree(name: str) -> None:
    """Every architecture as it is."""
    check(architectures.ALL[name]())


@pytest.mark.parametrize("name", architectures.ALL)
def test_architectures_agree_at_another_batch(name: str) -> None:
    """Every architecture with a dynamic batch of three."""
    check(variants.with_dynamic_batch(architectures.ALL[name]()), 3)


@needs_models
@pytest.mark.parametrize("name", NETWORKS)
def test_trained_networks_agree(name: str) -> None:
    """Trained networks beside the project."""
    check(onnx_io.load(MODELS / f"{name}.onnx"))


def filled(name: str) -> onnx.ModelProto:
    """An architecture of the zoo with seeded weights."""
    sys.path.insert(0, str(ZOO))
    try:
        import fill  # noqa: PLC0415  # it lies beside the project
    finally:
        sys.path.remove(str(ZOO))
    return fill.load(name)


@needs_zoo
@pytest.mark.parametrize("name", FEW)
def test_few_real_architectures_agree(name: str) -> None:
    """Small exported networks of several kinds."""
    check(filled(name))


@needs_zoo
@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_all_real_architectures_agree(name: str) -> None:
    """The whole zoo; half precision is computed in float32 and differs by what it rounds."""
    check(filled(name), tolerance=1e-2 if name.endswith("fp16") else 1e-4, untrained=UNTRAINED.get(name, ()))
