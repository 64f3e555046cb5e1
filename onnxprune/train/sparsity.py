"""Group lasso over channels: pulls the slices that a channel has in all its tensors towards zero together.

``sum over channels of w * sqrt(sum over member tensors of |slice|^2)``, w the MAC that removing the channel saves over the
mean (Yuan and Lin, 2006; the paper's sparsity regularizer). A channel that the loss does not need goes to zero in every
member at once, so that scores part into those that stay and those that can go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from onnxprune.manifest import WeightedGroup


class GroupLasso(nn.Module):
    """The regularizer of an artifact's manifest.

    Parameters
    ----------
    groups
        Their sizes and weights, and per member tensor the channel at every index of an axis.
    """

    def __init__(self, groups: Sequence[WeightedGroup]) -> None:
        super().__init__()
        self.weight: Tensor
        self.members: list[tuple[str, int]] = []
        weights, total = list[float](), 0
        for group in groups:
            for member in group.members:
                channels = np.atleast_2d(member.channels)
                index = torch.from_numpy(np.where(channels < 0, -1, channels + total))
                self.register_buffer(f"index{len(self.members)}", index, persistent=False)
                self.members.append((member.tensor, member.axis))
            weights += [group.weight] * group.size
            total += group.size
        self.n_channels = total
        self.register_buffer("weight", torch.tensor(weights, dtype=torch.float32), persistent=False)

    def norms(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Norm of each channel over all members, shape ``(n_channels,)``, groups one after the other."""
        squares = torch.zeros(self.n_channels + 1, device=self.weight.device)
        for number, (name, axis) in enumerate(self.members):
            index = getattr(self, f"index{number}")
            w = parameters[name].float().square().movedim(axis, 0)
            w = w.reshape(w.shape[0], len(index), -1).sum(2).T  # every block of axis 0 may have channels of its own
            squares = squares.index_add(0, torch.where(index < 0, self.n_channels, index).reshape(-1), w.reshape(-1))
        return (squares[:-1] + 1e-12).sqrt()

    def forward(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the penalty, over the number of channels."""
        return (self.weight * self.norms(parameters)).sum() / max(1, self.n_channels)
