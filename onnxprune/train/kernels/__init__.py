"""What ONNX operators compute, in PyTorch: one registry, one block per operator, one file per family.

A kernel takes the :class:`Call` and the operator's inputs (None where an optional one is missing) and returns its output, or
a tuple of them. What autograd can differentiate stays differentiable.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Kernel = Callable[..., Any]


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One node, with its attributes as plain values (tensors as ``torch.Tensor``) and the opset its operator is from."""

    op: str
    domain: str
    title: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 0

    def get(self, name: str, default: Any = None) -> Any:
        """Value of an attribute, or ``default`` where the node does not have it."""
        return self.attributes.get(name, default)


@dataclass(frozen=True, slots=True)
class Entry:
    """A kernel, and which of its inputs it reads as numbers (shapes, axes) and hence wants on the host."""

    kernel: Kernel
    host: frozenset[int]


_KERNELS: dict[tuple[str, str], Entry] = {}


def computes(*ops: str, domain: str = "", host: tuple[int, ...] = ()) -> Callable[[Kernel], Kernel]:
    """Register a kernel for operators of one domain; ``host`` lists the inputs it reads as numbers."""

    def decorate(kernel: Kernel) -> Kernel:
        for op in ops:
            _KERNELS[domain, op] = Entry(kernel, frozenset(host))
        return kernel

    return decorate


def find(domain: str, op: str) -> Entry | None:
    """Kernel of an operator; None where there is none."""
    return _KERNELS.get((domain, op))


_FAMILIES = (
    "elementwise activations linear movement indexing norm pool reduce sampling attention fused quantize recurrent "
    "fourier"
)
for _family in _FAMILIES.split():
    importlib.import_module(f"{__name__}.{_family}")
