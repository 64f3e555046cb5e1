"""SOAP: Adam where nothing is turned, and faster than Adam where the curvature mixes weights."""

from __future__ import annotations

import io

import pytest

torch = pytest.importorskip("torch")

from onnxprune.train import soap
from onnxprune.train.soap import Soap


def gradients(shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    """Random gradients."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def follow(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, steps: list[torch.Tensor]) -> torch.Tensor:
    """Weight after these gradients."""
    for gradient in steps:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach().clone()


@pytest.mark.parametrize("shape", [(7,), (3, 4)])
def test_without_a_basis_it_is_adam(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors, and matrices whose sides are too large to turn, get AdamW's steps (one later: the first begins bases)."""
    monkeypatch.setattr(soap, "LARGEST", 2)
    steps = gradients(shape, 25)
    mine, adam = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-12}
    expected = follow(torch.optim.AdamW([adam], **settings), adam, steps[1:])
    torch.testing.assert_close(follow(Soap([mine], **settings), mine, steps), expected)


def test_a_basis_does_not_depend_on_how_the_weight_is_turned() -> None:
    """With both sides turned by rotations, gradients included, the path is the rotated path: Adam's is not."""
    left, right = (torch.linalg.qr(x)[0] for x in (gradients((6, 6), 1)[0], gradients((5, 5), 1)[0]))
    steps = [g * torch.logspace(0, -2, 5) for g in gradients((6, 5), 20)]
    ends = []
    for kind in (Soap, torch.optim.AdamW):
        straight, turned = (torch.nn.Parameter(torch.zeros(6, 5)) for _ in range(2))
        first = follow(kind([straight], lr=0.1, weight_decay=0.0), straight, steps)
        second = follow(kind([turned], lr=0.1, weight_decay=0.0), turned, [left @ g @ right for g in steps])
        ends.append((left @ first @ right - second).abs().max().item())
    assert ends[0] < 1e-3
    assert ends[1] > 1e-2


def test_it_gets_further_than_adam_where_curvature_mixes_weights() -> None:
    """On a least-squares problem with mixed, badly scaled inputs and outputs it ends far below Adam."""
    mix = {n: torch.linalg.qr(gradients((n, n), 1)[0])[0] * torch.logspace(0, -2, n) for n in (8, 12)}
    wanted = gradients((8, 12), 1)[0]
    ends = {}
    for kind in (Soap, torch.optim.AdamW):
        weight = torch.nn.Parameter(torch.zeros(8, 12))
        optimizer = kind([weight], lr=0.03, weight_decay=0.0)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (mix[8].T @ (weight - wanted) @ mix[12]).square().mean()
            loss.backward()
            optimizer.step()
        ends[kind] = loss.item()
    assert ends[Soap] < 0.1 * ends[torch.optim.AdamW]


def test_its_state_can_be_saved_and_gone_on_with() -> None:
    """Saved, loaded and gone on, it ends exactly where it would have."""
    steps = gradients((4, 3, 3, 3), 30)
    whole = torch.nn.Parameter(torch.ones(4, 3, 3, 3))
    expected = follow(Soap([whole], lr=0.01), whole, steps)
    part = torch.nn.Parameter(torch.ones(4, 3, 3, 3))
    first = Soap([part], lr=0.01)
    follow(first, part, steps[:13])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    again = torch.nn.Parameter(part.detach().clone())
    second = Soap([again], lr=0.01)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(follow(second, again, steps[13:]), expected)
