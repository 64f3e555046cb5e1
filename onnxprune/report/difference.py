"""What differs between two models, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnxprune.report import Layer


@dataclass(frozen=True)
class LayerPair:
    """A layer in both models; None in the one that lacks it."""

    name: str
    op: str
    a: Layer | None
    b: Layer | None

    @property
    def changed(self) -> bool:
        """Whether its size differs."""
        if self.a is None or self.b is None:
            return True
        figures = ("op", "channels_before", "mac_before", "weights_before")
        return any(getattr(self.a, name) != getattr(self.b, name) for name in figures)


@dataclass(frozen=True)
class ConstantChange:
    """How one constant changed.

    Attributes
    ----------
    change
        ``added``, ``removed``, ``shape``, ``type`` or ``values``.
    shape_a, shape_b
        None where the model lacks it.
    distance
        Norm of the difference over the norm of A's values, where shapes and types are the same.
    """

    name: str
    change: str
    shape_a: tuple[int, ...] | None
    shape_b: tuple[int, ...] | None
    distance: float | None = None


@dataclass(frozen=True)
class Difference:
    """All that differs between two models.

    Attributes
    ----------
    cost
        Of A and of B, by kind.
    graph
        Which of ``inputs``, ``outputs``, ``opset_import`` and ``functions`` differ.
    nodes
        Names by ``added``, ``removed`` and ``changed``.
    constants, n_constants
        Those that differ, and how many there are in either model.
    """

    a: Mapping[str, str | None]
    b: Mapping[str, str | None]
    cost: Mapping[str, tuple[int, int]]
    layers: tuple[LayerPair, ...]
    graph: tuple[str, ...]
    nodes: Mapping[str, tuple[str, ...]]
    constants: tuple[ConstantChange, ...]
    n_constants: int

    @property
    def same(self) -> bool:
        """Whether the graphs and all values are equal."""
        return not (self.graph or self.constants or any(self.nodes.values()))

    def to_json(self) -> dict[str, Any]:
        """Return plain data (``schema`` 1)."""
        sizes = ("channels", "mac", "weights")
        return {
            "schema": 1,
            "a": dict(self.a),
            "b": dict(self.b),
            "same": self.same,
            "cost": {kind: {"a": first, "b": second} for kind, (first, second) in self.cost.items()},
            "layers": [
                {
                    "node": pair.name,
                    "op": pair.op,
                    "changed": pair.changed,
                    **{
                        side: layer and {size: getattr(layer, f"{size}_before") for size in sizes}
                        for side, layer in (("a", pair.a), ("b", pair.b))
                    },
                }
                for pair in self.layers
            ],
            "graph": list(self.graph),
            "nodes": {kind: list(names) for kind, names in self.nodes.items()},
            "constants": [
                {
                    "name": one.name,
                    "change": one.change,
                    "a": None if one.shape_a is None else list(one.shape_a),
                    "b": None if one.shape_b is None else list(one.shape_b),
                    "distance": one.distance,
                }
                for one in self.constants
            ],
        }
