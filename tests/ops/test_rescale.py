"""Normalisations that are refitted become exactly ``a * output + b``, as onnxruntime computes them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

import oracle
from graphs import Tiny
from onnxprune import onnx_io
from onnxprune.ops.rescale import Rescale, rescale

CHANNELS = 6


def normalised(
    op: str, shape: tuple[int, ...], *, size: int = CHANNELS, offset: bool = True, **attributes: object
) -> ModelProto:
    """One normalisation of the input."""
    t = Tiny(opset={"GroupNormalization": 21, "RMSNormalization": 23}.get(op, 17))
    x = t.input(*shape)
    if op == "BatchNormalization":
        return t.build(t.batch_norm(x, "op", size, **attributes))
    roles = ("scale", "shift")[: 1 + offset]
    vectors = [t.random(size, name=f"op.{role}", offset=1.0, scale=0.3) for role in roles]
    return t.build(t.node(op, x, *vectors, name="op", **attributes))


MAPS, ROWS = (2, CHANNELS, 3, 4), (2, 5, CHANNELS)


def in_training() -> ModelProto:
    """A BatchNormalization by the statistics of its batch."""
    t = Tiny()
    vectors = [t.random(CHANNELS, name=f"p{k}", offset=1.0, scale=0.2) for k in range(4)]
    return t.build(t.node("BatchNormalization", t.input(*MAPS), *vectors, name="op", outputs=3, training_mode=1)[0])


FORMS: dict[str, tuple[Callable[[], ModelProto], int]] = {
    "batch": (lambda: normalised("BatchNormalization", MAPS), 1),
    "batch-epsilon": (lambda: normalised("BatchNormalization", MAPS, epsilon=0.3), 1),
    "instance": (lambda: normalised("InstanceNormalization", MAPS), 1),
    "group": (lambda: normalised("GroupNormalization", MAPS, num_groups=2), 1),
    "layer": (lambda: normalised("LayerNormalization", ROWS), -1),
    "layer-without-offset": (lambda: normalised("LayerNormalization", ROWS, offset=False), -1),
    "rms": (lambda: normalised("RMSNormalization", ROWS, offset=False), -1),
}


def view(model: ModelProto) -> Rescale | None:
    """The model's node, as something that can be refitted."""
    read = onnx_io.read(model)
    return rescale(read.nodes[-1], read)


@pytest.mark.parametrize("name", FORMS)
def test_refitted_output_is_scaled_and_shifted(name: str) -> None:
    """New parameters give ``a`` times the old output plus ``b``, channel by channel."""
    build, channel = FORMS[name]
    model, rng = build(), np.random.default_rng(3)
    found = view(model)
    assert found is not None
    assert found.channel == channel
    a, b = rng.uniform(0.4, 1.0 if name == "batch-epsilon" else 2.5, CHANNELS), rng.normal(size=CHANNELS)
    b = b if found.has_offset else np.zeros(CHANNELS)
    names = [model.graph.node[-1].input[index] for index in found.parameters]
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    fitted = found.refit([numpy_helper.to_array(stored[name]).astype(np.float64) for name in names], a, b)
    assert fitted is not None
    feeds = {"x": rng.normal(1, 2, [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim])}
    feeds = {key: value.astype(np.float32) for key, value in feeds.items()}
    (before,) = oracle.run(model, feeds)
    for key, value in zip(names, fitted, strict=True):
        stored[key].CopyFrom(numpy_helper.from_array(value.astype(np.float32), key))
    (after,) = oracle.run(model, feeds)
    turn = (-1,) + (1,) * (before.ndim - 1 - channel % before.ndim)
    np.testing.assert_allclose(after, a.reshape(turn) * before + b.reshape(turn), rtol=2e-5, atol=2e-5)


def test_positions_are_all_axes_but_the_channels() -> None:
    """Rows hold a channel each, over samples and places."""
    found = view(FORMS["batch"][0]())
    assert found is not None
    y = np.arange(np.prod(MAPS), dtype=np.float32).reshape(MAPS)
    assert found.positions(MAPS) == 2 * 3 * 4
    picked = np.array([0, 5, 13])
    np.testing.assert_array_equal(
        found.rows(y, picked)[..., 0], y.transpose(1, 0, 2, 3).reshape(CHANNELS, -1)[:, picked]
    )


def test_a_variance_that_would_not_be_positive_stays() -> None:
    """Where dividing by ``a`` squared leaves less than epsilon, the variance is kept; the mean makes up for the offset."""
    found = view(FORMS["batch-epsilon"][0]())
    assert found is not None
    one = np.ones(CHANNELS)
    scale, offset, mean, variance = found.refit([one, one, one, one], 10 * one, one)
    np.testing.assert_array_equal((scale, offset, variance), (one, one, one))
    np.testing.assert_allclose(mean, -10 * (1 - 1 / np.sqrt(1.3)) * np.sqrt(1.3))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: normalised("LayerNormalization", (2, 5, 4, CHANNELS), size=1), id="one-number"),
        pytest.param(in_training, id="training"),
    ],
)
def test_other_forms_are_left_alone(model: Callable[[], ModelProto]) -> None:
    """One number for all channels, or statistics of the batch, cannot be refitted."""
    assert view(model()) is None
