"""Recurrent layers: value as onnxruntime computes it, slope as differences say, gradients of PyTorch's own layers."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from agreement import Case, agrees, normal, results, slopes
from onnxprune.errors import ModelError
from onnxprune.train import OnnxModule

STEPS, BATCH, WIDTH, SIZE = 5, 3, 4, 6
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
LENGTHS = np.array([5, 2, 4], np.int32)


def layer(op: str, *more: np.ndarray | None, bias: bool = True, **attributes) -> Case:
    """A layer with further inputs from lengths on."""
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    n, first = GATES[op] * SIZE, attributes.get("layout", 0)
    arrays = [
        normal(BATCH, STEPS, WIDTH) if first else normal(STEPS, BATCH, WIDTH),
        0.5 * normal(directions, n, WIDTH),
        0.5 * normal(directions, n, SIZE),
        0.5 * normal(directions, 2 * n) if bias else None,
        *more,
    ]
    return Case(
        op, arrays, {"hidden_size": SIZE, **attributes}, outputs=3 if op == "LSTM" else 2, reference=bool(first)
    )


def state(directions: int = 1) -> np.ndarray:
    """An initial state."""
    return normal(directions, BATCH, SIZE)


CASES = {
    **{op: layer(op) for op in GATES},
    **{f"{op}_both": layer(op, direction="bidirectional") for op in GATES},
    **{f"{op}_reverse": layer(op, direction="reverse") for op in GATES},
    **{f"{op}_no_bias": layer(op, bias=False) for op in GATES},
    **{f"{op}_state": layer(op, None, state(2), direction="bidirectional") for op in GATES},
    **{f"{op}_lengths": layer(op, LENGTHS, direction="bidirectional") for op in GATES},
    "GRU_linear": layer("GRU", linear_before_reset=1),
    "GRU_linear_both": layer("GRU", linear_before_reset=1, direction="bidirectional"),
    "GRU_linear_reverse": layer("GRU", linear_before_reset=1, direction="reverse"),
    "LSTM_cell": layer("LSTM", None, state(), state() + 1),
    "LSTM_peepholes": layer("LSTM", None, state(), state() + 1, normal(1, 3 * SIZE)),
    "LSTM_forget": layer("LSTM", input_forget=1),
    "LSTM_clip": layer("LSTM", clip=0.3),
    "LSTM_activations": layer("LSTM", activations=["HardSigmoid", "Tanh", "Relu"], activation_alpha=[0.3]),
    "RNN_relu": layer("RNN", activations=["Relu"]),
    "RNN_both_activations": layer(
        "RNN",
        activations=["Affine", "Tanh"],
        direction="bidirectional",
        activation_alpha=[0.5],
        activation_beta=[0.1],
    ),
}  # fmt: skip
SMOOTH = {name: case for name, case in CASES.items() if not name.endswith(("clip", "activations", "relu"))}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_agrees(case: Case) -> None:
    """What PyTorch computes is what onnxruntime does: every state, the last one, and the last cell."""
    agrees(case)


@pytest.mark.parametrize("case", SMOOTH.values(), ids=SMOOTH)
def test_slope_agrees(case: Case) -> None:
    """Gradients for input, weights, biases and states are what differences say."""
    slopes(case)


@pytest.mark.parametrize("op", ["GRU_linear_both", "LSTM_both"])
def test_batch_may_come_first(op: str) -> None:
    """With ``layout`` 1 all results have the batch before the rest; onnxruntime refuses that layout."""
    plain = CASES[op]
    x, *rest = plain.arrays
    first = Case(plain.op, [x.swapaxes(0, 1), *rest], {**plain.attributes, "layout": 1}, outputs=plain.outputs)
    y, *states = results(OnnxModule(plain.model(), [])(torch.from_numpy(x)))
    z, *others = results(OnnxModule(first.model(), [])(torch.from_numpy(np.ascontiguousarray(x.swapaxes(0, 1)))))
    torch.testing.assert_close(z, y.permute(2, 0, 1, 3))
    for mine, other in zip(states, others, strict=True):
        torch.testing.assert_close(other, mine.transpose(0, 1))


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_gradients_are_those_of_the_layer(op: str) -> None:
    """A bidirectional layer with the weights of PyTorch's own has its gradients."""
    order = {"LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2]}[op]  # ONNX's gates in PyTorch's order
    own = getattr(torch.nn, op)(WIDTH, SIZE, bidirectional=True)

    def stacked(name: str) -> np.ndarray:
        parts = [getattr(own, f"{name}_l0{suffix}").detach() for suffix in ("", "_reverse")]
        return np.stack([np.concatenate([part.chunk(len(order))[g] for g in order]) for part in parts])

    bias = np.concatenate([stacked("bias_ih"), stacked("bias_hh")], 1)
    arrays = [normal(STEPS, BATCH, WIDTH), stacked("weight_ih"), stacked("weight_hh"), bias]
    attributes = {
        "hidden_size": SIZE,
        "direction": "bidirectional",
        **({"linear_before_reset": 1} if op == "GRU" else {}),
    }
    case = Case(op, arrays, attributes)
    module = OnnxModule(case.model(), case.trained())
    x = torch.from_numpy(arrays[0])
    module(x).square().sum().backward()
    own(x)[0].square().sum().backward()
    expected = torch.cat([own.weight_ih_l0.grad.chunk(len(order))[g] for g in order])
    torch.testing.assert_close(module.get_parameter("in1").grad[0], expected, rtol=1e-4, atol=1e-5)


def test_unknown_activation_is_refused() -> None:
    """An activation that no kernel has is an error that names the node."""
    case = layer("RNN", activations=["ScaledTanh"])
    with pytest.raises(ModelError, match="out0: activation ScaledTanh"):
        OnnxModule(case.model(), [])(torch.from_numpy(case.arrays[0]))
