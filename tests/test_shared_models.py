"""Trained networks that lie beside the project, where they are there: every preset prunes and proves them."""

import pathlib

import onnx
import pytest

import onnxprune
from onnxprune import onnx_io, runtime

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "shared" / "models"
NAMES = (
    "dncnn_s25", "dncnn_s25_bn", "imdn_x2", "resnet20", "resnet20_bn", "resnet20_jpeg", "resnet20_jpeg_bn",
    "resnet20_jpeg_dynamo", "vdsr",
)  # fmt: skip
needs_models = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"trained networks are not there: {FOLDER}")


def check(name: str, preset: str, target: float) -> None:
    model = onnx_io.load(FOLDER / f"{name}.onnx")
    result = onnxprune.prune(model, target_mac=target, preset=preset)
    assert result.report.proof.ok
    assert target - 0.01 < result.report.after["mac"] / result.report.before["mac"] <= target
    assert list(result.model.graph.input) == list(model.graph.input)
    assert list(result.model.graph.output) == list(model.graph.output)
    onnx.checker.check_model(result.model)
    session = runtime.Session(result.model.SerializeToString())
    session.run(runtime.random_feeds(session.inputs, result.report.input_shapes))


@needs_models
@pytest.mark.parametrize("name", NAMES)
def test_default_preset_prunes_and_proves(name):
    """Every trained network prunes at 0.6 with the default preset: proved, within budget, runnable, same signature."""
    check(name, "d", 0.6)


@needs_models
@pytest.mark.slow
@pytest.mark.parametrize("target", [0.8, 0.6, 0.4])
@pytest.mark.parametrize("preset", "abcd")
@pytest.mark.parametrize("name", NAMES)
def test_every_preset_prunes_and_proves(name, preset, target):
    """The same for every preset and target."""
    check(name, preset, target)


@needs_models
@pytest.mark.parametrize("preset", ["a", "d"])
@pytest.mark.parametrize("name", ["resnet20", "resnet20_jpeg", "dncnn_s25"])
def test_folded_and_unfolded_norms_prune_alike(name, preset):
    """The same channels go whether BatchNormalization was folded on export or kept as nodes."""
    folded, kept = (
        onnxprune.prune(FOLDER / f"{name}{suffix}.onnx", target_mac=0.6, preset=preset, proof=False)
        for suffix in ("", "_bn")
    )
    masks = [[(size, keep) for _, size, keep in result.plan.groups] for result in (folded, kept)]
    assert masks[0] == masks[1]


@needs_models
@pytest.mark.parametrize("name", ["imdn_x2", "resnet20_jpeg"])
def test_shared_stream_gives_up_channels(name):
    """With preset d the group that most tensors share is really cut."""
    report = onnxprune.prune(FOLDER / f"{name}.onnx", target_mac=0.6, preset="d", proof=False).report
    widest = max((group for group in report.groups if group.frozen is None), key=lambda group: len(group.members))
    assert widest.kept < widest.size
