"""What the user asked for: shares and absolute amounts of several kinds of cost, and how far a result got."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnxprune.errors import BudgetError
from onnxprune.latency import MICROSECONDS
from onnxprune.report import Target


@dataclass(frozen=True)
class Budget:
    """Targets against a model's own cost.

    Attributes
    ----------
    targets
        Requested value per kind (``mac``, ``params``, ``bandwidth``, ``size``, ``latency``): at most 1 is a share, more
        is absolute, latency in microseconds.
    before
        Cost of the original per kind of :data:`onnxprune.cost.KINDS`. Where it has ``effective_mac``, a target of MAC holds
        for those, too: the same share of what the hardware computes.
    overhead
        Bytes of the file besides its constants, which no pruning removes.
    """

    targets: Mapping[str, float]
    before: Mapping[str, float]
    overhead: float

    def __post_init__(self) -> None:
        for kind, value in self.targets.items():
            if value < 1 and not self.whole(kind):
                raise BudgetError(f"target out of reach: the model has no {kind} that could be reduced", 0.0)

    def whole(self, kind: str) -> float:
        """Cost of the original, in the unit of an absolute target."""
        return self._of(kind, self.before)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every kind that is limited."""
        rounded = "mac" in self.targets and self.before.get("effective_mac") and "effective_mac" not in self.targets
        return (*self.targets, *(["effective_mac"] if rounded else []))

    def limit(self, kind: str) -> float:
        """Largest cost that meets a target."""
        if kind == "effective_mac" and kind not in self.targets:
            return self.limit("mac") / self.whole("mac") * self.whole(kind)
        value = self.targets[kind]
        if value <= 1:
            return value * self.whole(kind)
        return value / MICROSECONDS if kind == "latency" else value

    @property
    def met(self) -> bool:
        """Whether the original itself meets every target."""
        return all(self.whole(kind) <= self.limit(kind) for kind in self.targets)

    def limits(self, less: Mapping[str, float]) -> dict[str, float]:
        """Limits per kind of cost for selection; ``less`` is taken off per target (bytes of copies, say)."""
        return {
            "bytes" if kind == "size" else kind: self.limit(kind)
            - (self.overhead if kind == "size" else 0)
            - less.get(kind, 0)
            for kind in self.kinds
        }

    def rows(self, after: Mapping[str, float], floor: Mapping[str, float]) -> tuple[Target, ...]:
        """How far every target was reached, the binding one first; effective MAC, which nobody asked for by name, last."""
        rows = []
        for kind in self.kinds:
            share = self.targets[kind if kind in self.targets else "mac"] <= 1
            unit = self.whole(kind) if share and self.whole(kind) else 1.0  # of nothing, everything is kept
            requested, achieved, least = (
                value / unit for value in (self.limit(kind), self._of(kind, after), self._of(kind, floor))
            )
            rows.append(
                Target(
                    kind, self.targets[kind] if share and kind in self.targets else requested, achieved, least, share
                )
            )
        return tuple(sorted(rows, key=lambda row: (row.kind not in self.targets, -row.achieved / row.requested)))

    def out_of_reach(self, error: BudgetError, floor: Mapping[str, float]) -> BudgetError:
        """Say in the user's own units what was asked, what remains and what costs most there."""
        kind = next((k for k in self.kinds if self._of(k, floor) > self.limit(k)), next(iter(self.targets)))
        whole, least, name = self.whole(kind), self._of(kind, floor), kind.replace("_", " ")
        message = (
            f"target out of reach: {100 * self.limit(kind) / whole:.4g} % of the original's {name} requested, but "
            f"{100 * least / whole:.4g} % remains with everything removed that may be; most MAC then in "
            f'{", ".join(error.culprits) or "no layer"}. See "onnxprune inspect" for what is frozen and why; another '
            "--preset or --profile, or fewer limits may help"
        )
        return BudgetError(message, least, error.culprits)

    def _of(self, kind: str, cost: Mapping[str, float]) -> float:
        return cost["bytes"] + self.overhead if kind == "size" else cost[kind]
