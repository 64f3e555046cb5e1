"""The group lasso sees a channel in all tensors that carry it."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from onnxprune.manifest import GroupMember, WeightedGroup
from onnxprune.train.sparsity import GroupLasso


def test_norms_gather_a_channel_from_all_members() -> None:
    """A channel's norm is that of its slices of every member, wherever its axis is."""
    w, v = torch.randn(4, 3, 2), torch.randn(5, 4)
    group = WeightedGroup("g1", 4, 1.0, (GroupMember("w", 0, np.arange(4)), GroupMember("v", 1, np.arange(4))))
    norms = GroupLasso([group]).norms({"w": w, "v": v})
    want = (w.square().sum((1, 2)) + v.square().sum(0)).sqrt()
    torch.testing.assert_close(norms, want)


def test_positions_of_no_channel_do_not_count() -> None:
    """Where an axis carries other groups' channels too, only the group's own are gathered; several positions add."""
    w = torch.randn(6, 2)
    group = WeightedGroup("g1", 2, 1.0, (GroupMember("w", 0, np.array([-1, 0, 1, 0, 1, -1])),))
    norms = GroupLasso([group]).norms({"w": w})
    square = w.square().sum(1)
    torch.testing.assert_close(norms, torch.stack([square[1] + square[3], square[2] + square[4]]).sqrt())


def test_blocks_of_a_grouped_convolution_have_channels_of_their_own() -> None:
    """Every block of axis 0 counts for the channels of its own row."""
    w = torch.randn(4, 2, 3)
    group = WeightedGroup("g1", 4, 1.0, (GroupMember("w", 1, np.array([[0, 1], [2, 3]])),))
    norms = GroupLasso([group]).norms({"w": w})
    want = torch.cat([w[:2].square().sum((0, 2)), w[2:].square().sum((0, 2))]).sqrt()
    torch.testing.assert_close(norms, want)


def test_the_penalty_weighs_groups_by_what_they_save() -> None:
    """A group's weight scales its part; the penalty is a mean over channels."""
    w = torch.ones(2, 4)
    member = GroupMember("w", 0, np.arange(2))
    light, heavy = (GroupLasso([WeightedGroup("g1", 2, weight, (member,))]) for weight in (1.0, 3.0))
    assert light({"w": w}).item() == pytest.approx(2.0)
    assert heavy({"w": w}).item() == pytest.approx(6.0)


def test_channels_that_nothing_needs_go_to_zero_together() -> None:
    """Under the penalty a channel that the loss does not read shrinks in all members; the one that is read stays."""
    a, b = torch.nn.Parameter(torch.tensor([[1.0, 0, 0], [0, 1.0, 1.0]])), torch.nn.Parameter(torch.ones(1, 2))
    members = (GroupMember("a", 0, np.arange(2)), GroupMember("b", 1, np.arange(2)))
    lasso = GroupLasso([WeightedGroup("g1", 2, 1.0, members)])
    optimizer = torch.optim.SGD([a, b], 0.05)
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(600):
        optimizer.zero_grad()
        loss = ((b @ (a @ x.T)).squeeze() - x[:, 0]).square().mean() + 0.2 * lasso({"a": a, "b": b})
        loss.backward()
        optimizer.step()
    norms = lasso.norms({"a": a, "b": b}).detach()
    assert norms[0] > 1.0
    assert norms[1] < 0.05
