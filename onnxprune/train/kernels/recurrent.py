"""Recurrent layers. PyTorch's own kernels do the work where they compute the same; else one step after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from onnxprune.errors import ModelError
from onnxprune.train.kernels import Call, computes
from onnxprune.train.kernels.indexing import reversed_rows

_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_DEFAULT = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
_ORDER = {"RNN": [0], "GRU": [1, 0, 2], "LSTM": [0, 2, 3, 1]}
"""PyTorch's order of the gates, in ONNX's."""

Activation = Callable[[Tensor], Tensor]


def _activation(call: Call, name: str, alpha: float | None, beta: float | None) -> Activation:
    table: dict[str, Activation] = {
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "relu": torch.relu,
        "softsign": functional.softsign,
        "softplus": functional.softplus,
        "affine": lambda x: (1.0 if alpha is None else alpha) * x + (0.0 if beta is None else beta),
        "leakyrelu": lambda x: functional.leaky_relu(x, 0.01 if alpha is None else alpha),
        "elu": lambda x: functional.elu(x, 1.0 if alpha is None else alpha),
        "hardsigmoid": lambda x: torch.clamp(
            (0.2 if alpha is None else alpha) * x + (0.5 if beta is None else beta), 0, 1
        ),
    }
    if name.lower() not in table:
        raise ModelError(f"{call.title}: activation {name}")
    return table[name.lower()]


def _activations(call: Call, directions: int) -> list[list[Activation]]:
    """One list per direction; numbers are taken in turn by the functions that have any."""
    names = call.get("activations") or _DEFAULT[call.op] * directions
    names = [name.decode() if isinstance(name, bytes) else name for name in names]
    alphas, betas = iter(call.get("activation_alpha", [])), iter(call.get("activation_beta", []))
    made = []
    for name in names:
        alpha = next(alphas, None) if name.lower() in ("affine", "leakyrelu", "elu", "hardsigmoid") else None
        beta = next(betas, None) if name.lower() in ("affine", "hardsigmoid") else None
        made.append(_activation(call, name, alpha, beta))
    each = len(_DEFAULT[call.op])
    return [made[i * each : (i + 1) * each] for i in range(directions)]


@computes("LSTM", "GRU", "RNN")
def recurrent(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
    cell: Tensor | None = None,
    peepholes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Outputs: every hidden state with directions on axis 1, the last one, and the last cell of an LSTM."""
    first = call.get("layout", 0) == 1
    if first:
        x = x.transpose(0, 1)
        hidden, cell = (None if t is None else t.transpose(0, 1) for t in (hidden, cell))
    directions, size = w.shape[0], r.shape[-1]
    bias = x.new_zeros(directions, 2 * _GATES[call.op] * size) if bias is None else bias
    hidden, cell = (x.new_zeros(directions, x.shape[1], size) if s is None else s for s in (hidden, cell))
    plain = lengths is None and peepholes is None and not call.get("clip") and not call.get("input_forget", 0)
    if plain and _default(call, directions):
        y, *states = _by_torch(call, x, w, r, bias, hidden, cell)
    else:
        y, *states = _by_steps(call, x, (w, r, bias, peepholes), lengths, hidden, cell)
    if first:
        return y.permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in states)
    return y, *states


def _default(call: Call, directions: int) -> bool:
    """Whether activations, direction and formula are those of PyTorch's kernels."""
    names = [str(n.decode() if isinstance(n, bytes) else n).title() for n in call.get("activations", [])]
    same = not names or names == _DEFAULT[call.op] * directions
    linear = call.op != "GRU" or call.get("linear_before_reset", 0)
    return same and bool(linear) and call.get("direction", "forward") != "reverse"


def _by_torch(
    call: Call, x: Tensor, w: Tensor, r: Tensor, bias: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, ...]:
    gates, size = _ORDER[call.op], r.shape[-1]

    def reordered(part: Tensor) -> Tensor:
        return torch.cat([part[g * size : (g + 1) * size] for g in gates])

    weights = []
    for d in range(w.shape[0]):
        input_bias, hidden_bias = bias[d].chunk(2)
        weights += [reordered(part) for part in (w[d], r[d], input_bias, hidden_bias)]
    options = (weights, True, 1, 0.0, torch.is_grad_enabled(), w.shape[0] == 2, False)
    if call.op == "LSTM":
        y, last, last_cell = torch.lstm(x, [hidden, cell], *options)
        states = [last, last_cell]
    else:
        y, last = (torch.gru if call.op == "GRU" else torch.rnn_tanh)(x, hidden, *options)
        states = [last]
    return y.reshape(*y.shape[:2], w.shape[0], size).transpose(1, 2), *states


def _by_steps(
    call: Call,
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor | None],
    lengths: Tensor | None,
    hidden: Tensor,
    cell: Tensor,
) -> tuple[Tensor, ...]:
    """Direction after direction; what lies behind a sample's length is zero, and changes no state."""
    w, r, bias, peepholes = weights
    outputs, lasts, cells = [], [], []
    n = torch.full((x.shape[1],), x.shape[0], device=x.device) if lengths is None else lengths.to(x.device)
    for d, functions in enumerate(_activations(call, w.shape[0])):
        backwards = d == 1 or call.get("direction", "forward") == "reverse"
        steps = reversed_rows(x, n, 0, 1) if backwards else x
        h, c, made = hidden[d], cell[d], []
        peephole = None if peepholes is None else peepholes[d]
        for t, step in enumerate(steps.unbind(0)):
            alive = (t < n)[:, None]
            new, new_cell = _STEPS[call.op](call, step, h, c, (w[d], r[d], bias[d], peephole), functions)
            h, c = torch.where(alive, new, h), torch.where(alive, new_cell, c)
            made.append(torch.where(alive, new, torch.zeros_like(new)))
        y = torch.stack(made)
        outputs.append(reversed_rows(y, n, 0, 1) if backwards else y)
        lasts.append(h)
        cells.append(c)
    states = [torch.stack(lasts), torch.stack(cells)]
    return torch.stack(outputs, 1), *states[: 2 if call.op == "LSTM" else 1]


Weights = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _clipped(call: Call, x: Tensor) -> Tensor:
    bound = call.get("clip")
    return x.clamp(-bound, bound) if bound else x


def _rnn(
    call: Call, x: Tensor, h: Tensor, c: Tensor, weights: Weights, functions: Sequence[Activation]
) -> tuple[Tensor, Tensor]:
    w, r, bias, _ = weights
    return functions[0](_clipped(call, x @ w.T + h @ r.T + sum(bias.chunk(2)))), c


def _gru(
    call: Call, x: Tensor, h: Tensor, c: Tensor, weights: Weights, functions: Sequence[Activation]
) -> tuple[Tensor, Tensor]:
    w, r, bias, _ = weights
    f, g = functions
    input_bias, hidden_bias = bias.chunk(2)
    size = h.shape[-1]
    xz, xr, xh = (x @ w.T + input_bias).chunk(3, -1)
    hz, hr = (h @ r[: 2 * size].T + hidden_bias[: 2 * size]).chunk(2, -1)
    update, reset = f(_clipped(call, xz + hz)), f(_clipped(call, xr + hr))
    if call.get("linear_before_reset", 0):
        inner = reset * (h @ r[2 * size :].T + hidden_bias[2 * size :])
    else:
        inner = (reset * h) @ r[2 * size :].T + hidden_bias[2 * size :]
    return (1 - update) * g(_clipped(call, xh + inner)) + update * h, c


def _lstm(
    call: Call, x: Tensor, h: Tensor, c: Tensor, weights: Weights, functions: Sequence[Activation]
) -> tuple[Tensor, Tensor]:
    w, r, bias, peephole = weights
    f, g, squash = functions
    i, o, forget, new = (x @ w.T + h @ r.T + sum(bias.chunk(2))).chunk(4, -1)
    pi, po, pf = (0.0, 0.0, 0.0) if peephole is None else peephole.chunk(3)
    i = f(_clipped(call, i + pi * c))
    forget = 1 - i if call.get("input_forget", 0) else f(_clipped(call, forget + pf * c))
    c = forget * c + i * g(_clipped(call, new))
    return f(_clipped(call, o + po * c)) * squash(c), c


_STEPS = {"RNN": _rnn, "GRU": _gru, "LSTM": _lstm}
