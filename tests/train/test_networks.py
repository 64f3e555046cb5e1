"""Whole networks: their outputs are onnxruntime's, and every parameter gets a finite gradient."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

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

TOLERANCES = {"v_resnet18_fp16": 1e-2, "v_resnet18_qdq": 3e-2}
"""Half precision is computed in float32; a sum in another order may fall on the other side of a quantiser's step."""


def saturates() -> bool:
    """Whether onnxruntime's sums of bytes saturate here, as they do on processors without VNNI."""
    a, b = np.full((1, 4), 255, np.uint8), np.full((4, 1), 127, np.int8)
    values = [helper.make_tensor_value_info(n, k, None) for n, k in (("a", 2), ("y", 6))]
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    graph = helper.make_graph([node], "sum", values[:1], values[1:], [numpy_helper.from_array(b, "b")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return runtime.Session(model.SerializeToString()).run({"a": a})[0].item() != 4 * 255 * 127


def shapes(session: runtime.Session, batch: int) -> dict[str, list[int]]:
    """Fixed lengths as they are; a free first one is the batch, others 64 in images and 16 in sequences."""
    return {
        name: [
            d if isinstance(d, int) and d > 0 else batch if axis == 0 else 64 if len(dims) == 4 else 16
            for axis, d in enumerate(dims)
        ]
        for name, (dims, _) in session.inputs.items()
    }


def check(model: onnx.ModelProto, batch: int = 1, tolerance: float = 1e-4) -> None:
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
    assert [n for n, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


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


VARIANTS = {
    "constants_as_nodes": variants.constants_as_nodes,
    "initializers_as_inputs": variants.initializers_as_inputs,
    "fold_batch_norm": variants.fold_batch_norm,
    "opset18": partial(variants.to_opset, version=18),
    "opset21": partial(variants.to_opset, version=21),
}


@pytest.mark.parametrize("name", ["resnet_a", "unet_resize", "densenet", "edsr_reshape"])
@pytest.mark.parametrize("vary", VARIANTS.values(), ids=VARIANTS)
def test_variants_agree(name: str, vary: variants.Variant) -> None:
    """The same network written differently, or in another opset."""
    check(vary(architectures.ALL[name]()))


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
    if name == "v_hf_bert_int8dyn" and saturates():
        pytest.skip("onnxruntime's sums of bytes saturate on this processor: PyTorch's are right")
    check(filled(name))


@needs_zoo
@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_all_real_architectures_agree(name: str) -> None:
    """The whole zoo."""
    check(filled(name), tolerance=TOLERANCES.get(name, 1e-4))
