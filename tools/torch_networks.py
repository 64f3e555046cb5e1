"""Four trained networks as PyTorch modules, with the weights of their ONNX files.

A pruner that works on modules needs modules, and these networks exist only as ONNX. Layers are registered in the order they
run, so that weights load by position: the graph's Conv, BatchNormalization and Gemm nodes, one after the other. Where a
forward pass needs a channel count it reads it from a neighbouring layer, so that a pruner may change it.
"""

from __future__ import annotations

import abc
import itertools
import pathlib
from collections.abc import Callable

import onnx
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional


class Network(nn.Module, abc.ABC):
    """A network that says which of its layers a pruner must treat with care."""

    def streams(self) -> list[nn.Module]:
        """Layers that write into a residual stream."""
        return []

    @abc.abstractmethod
    def last(self) -> nn.Module:
        """Layer whose outputs are the network's."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut that subsamples and pads with zero channels (option A)."""

    def __init__(self, planes_in: int, planes: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.stride = 1 if planes_in == planes else 2
        bias = norm is nn.Identity
        self.conv1 = nn.Conv2d(planes_in, planes, 3, self.stride, 1, bias=bias)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=bias)
        self.bn2 = norm(planes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, planes_in, h, w)`` to ``(n, planes, h / stride, w / stride)``."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride == 2:
            missing = self.conv2.out_channels - x.shape[1]
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, missing // 2, missing - missing // 2))
        return functional.relu(y + x)


class ResNet20(Network):
    """ResNet-20 for CIFAR-10: 16, 32 and 64 channels, three blocks each."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=norm is nn.Identity)
        self.bn1 = norm(16)
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        self.blocks = nn.Sequential(*(BasicBlock(a, b, norm) for a, b in itertools.pairwise(widths)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images ``(n, 3, 32, 32)`` to logits ``(n, 10)``."""
        x = self.blocks(functional.relu(self.bn1(self.conv1(x))))
        return self.linear(functional.avg_pool2d(x, 8).flatten(1))

    def streams(self) -> list[nn.Module]:
        """Layers that write into a residual stream."""
        return [self.conv1, *(block.get_submodule("conv2") for block in self.blocks)]

    def last(self) -> nn.Module:
        """Layer whose outputs are the network's."""
        return self.linear


def chain(inner: int, norm: type[nn.Module], bias: bool) -> nn.Sequential:
    """One channel to 64, ``inner`` convolutions of 64, and back to one channel."""
    layers: list[nn.Module] = [nn.Conv2d(1, 64, 3, 1, 1, bias=False), nn.ReLU()]
    for _ in range(inner):
        layers += [nn.Conv2d(64, 64, 3, 1, 1, bias=bias), norm(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(64, 1, 3, 1, 1, bias=False))


class DnCNN(Network):
    """DnCNN-S: a plain chain of 17 convolutions that predicts the noise."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.chain = chain(15, norm, bias=norm is nn.Identity)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map grey images ``(n, 1, h, w)`` to their noise."""
        return self.chain(x)

    def last(self) -> nn.Module:
        """Layer whose outputs are the network's."""
        return self.chain[-1]


class VDSR(Network):
    """VDSR: a chain of 20 convolutions without bias, added to the network's input."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.chain = chain(18, norm, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map interpolated luma ``(n, 1, h, w)`` to sharpened luma."""
        return self.chain(x) + x

    def last(self) -> nn.Module:
        """Layer whose outputs are the network's."""
        return self.chain[-1]


class ContrastAttention(nn.Module):
    """Channel attention from standard deviation plus mean (IMDN's CCA layer)."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(64, 4, 1)
        self.excite = nn.Conv2d(4, 64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale every channel of ``(n, 64, h, w)``."""
        mean = x.mean((2, 3), keepdim=True)
        contrast = ((x - mean) ** 2).mean((2, 3), keepdim=True).sqrt()
        return x * torch.sigmoid(self.excite(functional.relu(self.squeeze(contrast + mean))))


class Distillation(nn.Module):
    """IMDN's block: three times split off 16 channels, refine the rest, join the four parts."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(64, 64, 3, 1, 1)
        self.c2 = nn.Conv2d(48, 64, 3, 1, 1)
        self.c3 = nn.Conv2d(48, 64, 3, 1, 1)
        self.c4 = nn.Conv2d(48, 16, 3, 1, 1)
        self.attention = ContrastAttention()
        self.c5 = nn.Conv2d(64, 64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, 64, h, w)`` to the same shape."""
        parts, rest = [], self.c1(x)
        for following in (self.c2, self.c3, self.c4):
            rest = functional.leaky_relu(rest, 0.05)
            taken = following.in_channels
            part, rest = torch.split(rest, [rest.shape[1] - taken, taken], dim=1)
            parts.append(part)
            rest = following(rest)
        return self.c5(self.attention(torch.cat([*parts, rest], dim=1))) + x


class IMDN(Network):
    """IMDN x2: six distillation blocks, all their outputs joined, a pixel shuffle at the end."""

    def __init__(self, norm: type[nn.Module]) -> None:
        del norm  # IMDN has none
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, 1, 1)
        self.blocks = nn.ModuleList(Distillation() for _ in range(6))
        self.join = nn.Conv2d(6 * 64, 64, 1)
        self.refine = nn.Conv2d(64, 64, 3, 1, 1)
        self.upsample = nn.Conv2d(64, 12, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map RGB ``(n, 3, h, w)`` to ``(n, 3, 2h, 2w)``."""
        x = self.first(x)
        outputs = [x]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        y = functional.leaky_relu(self.join(torch.cat(outputs[1:], dim=1)), 0.05)
        return functional.pixel_shuffle(self.upsample(self.refine(y) + x), 2)

    def streams(self) -> list[nn.Module]:
        """Layers that write into a residual stream."""
        return [self.first, *(block.get_submodule("c5") for block in self.blocks), self.refine]

    def last(self) -> nn.Module:
        """Layer whose outputs are the network's."""
        return self.upsample


def load(network: Callable[[type[nn.Module]], Network], path: pathlib.Path) -> Network:
    """Build ``network`` with the weights of the ONNX file, in evaluation mode.

    Raises
    ------
    ValueError
        The graph's layers are not the module's, in number, kind or shape.
    """
    graph = onnx.load(path).graph
    values = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in {"Conv", "BatchNormalization", "Gemm"}]
    normalized = any(node.op_type == "BatchNormalization" for node in nodes)
    module = network(nn.BatchNorm2d if normalized else nn.Identity).eval()
    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
    for layer, node in zip(layers, nodes, strict=True):
        names = ["weight", "bias", "running_mean", "running_var"]
        places = [name for name in names if getattr(layer, name, None) is not None]
        for place, source in zip(places, node.input[1:], strict=True):
            target, value = getattr(layer, place), values[source]
            if target.shape != value.shape:
                raise ValueError(f"{path.name}: {source} is {tuple(value.shape)}, expected {tuple(target.shape)}")
            target.data = value
    return module
