"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., 2024, arXiv 2409.11321).

Adam scales each weight by itself and cannot see directions that mix the channels of a layer; here each weight, taken as a
matrix (outputs, rest), is turned into the eigenvectors of its gradients' second moments first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

LARGEST = 2048
"""Sides above this are not turned: their basis would cost more than it gives."""


class Soap(torch.optim.Optimizer):
    """SOAP with decoupled weight decay.

    Parameters
    ----------
    parameters
        Weights; those of one dimension get plain Adam.
    lr, weight_decay
        As for AdamW.
    betas
        Decays of the first and second moments of the gradient.
    basis_decay, every
        Decay of the preconditioners, and steps between updates of their eigenvectors.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99), basis_decay: float = 0.95, every: int = 10, eps: float = 1e-12,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(parameters, {**defaults, "basis_decay": basis_decay, "every": every})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every weight that has a gradient; the first call only begins the bases."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for options in self.param_groups:
            for weight in options["params"]:
                if weight.grad is not None:
                    _update(weight, self.state[weight], options)
        return loss


def _update(weight: Tensor, state: dict[str, Any], options: dict[str, Any]) -> None:
    gradient = weight.grad.reshape(len(weight), -1) if weight.ndim > 1 else weight.grad.reshape(1, -1)  # type: ignore[union-attr]
    turned = [side for side in (0, 1) if weight.ndim > 1 and gradient.shape[side] <= LARGEST]
    if not state:
        state.update(step=0, mean=torch.zeros_like(gradient), square=torch.zeros_like(gradient))
        for side in turned:
            state[f"moments{side}"] = _moments(gradient, side)
            state[f"basis{side}"] = torch.linalg.eigh(state[f"moments{side}"])[1]
        return
    state["step"] += 1
    (decay, decay_square), step = options["betas"], state["step"]
    bases = [state[f"basis{side}"] if side in turned else None for side in (0, 1)]
    state["mean"].lerp_(gradient, 1 - decay)
    state["square"].lerp_(_into(gradient, bases).square(), 1 - decay_square)
    mean, square = state["mean"] / (1 - decay**step), state["square"] / (1 - decay_square**step)
    change = _out_of(_into(mean, bases) / (square.sqrt() + options["eps"]), bases)
    weight.mul_(1 - options["lr"] * options["weight_decay"]).sub_(change.reshape(weight.shape), alpha=options["lr"])
    for side in turned:
        state[f"moments{side}"].lerp_(_moments(gradient, side), 1 - options["basis_decay"])
        if step % options["every"] == 0:
            _improve(state, side)


def _moments(gradient: Tensor, side: int) -> Tensor:
    return gradient @ gradient.T if side == 0 else gradient.T @ gradient


def _into(x: Tensor, bases: list[Tensor | None]) -> Tensor:
    """Coordinates of ``x`` in the bases of its two sides."""
    x = x if bases[0] is None else bases[0].T @ x
    return x if bases[1] is None else x @ bases[1]


def _out_of(x: Tensor, bases: list[Tensor | None]) -> Tensor:
    x = x if bases[0] is None else bases[0] @ x
    return x if bases[1] is None else x @ bases[1].T


def _improve(state: dict[str, Any], side: int) -> None:
    """One step of the orthogonal iteration brings the eigenvectors after their moments, the largest first."""
    moments, basis = state[f"moments{side}"], state[f"basis{side}"]
    order = (basis * (moments @ basis)).sum(0).argsort(descending=True, stable=True)
    state["square"] = state["square"].index_select(side, order)
    state[f"basis{side}"] = torch.linalg.qr(moments @ basis[:, order])[0]
