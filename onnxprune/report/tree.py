"""A model as the tree of its modules, with what every branch costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from onnxprune.report import Layer

NARROWEST = 24


@dataclass
class Branch:
    """A module, or a layer at the tree's end; ``name`` may be several modules where each holds nothing but the next."""

    name: str
    layer: Layer | None = None
    inner: dict[str, Branch] = field(default_factory=dict)

    @property
    def layers(self) -> Iterator[Layer]:
        """All layers below, in their order."""
        if self.layer is not None:
            yield self.layer
        for branch in self.inner.values():
            yield from branch.layers


def grown(layers: Sequence[Layer]) -> Branch:
    """Grow the tree of the layers' paths."""
    root = Branch("")
    for layer in layers:
        at = root
        for name in layer.path:
            at = at.inner.setdefault(name, Branch(name))
        if at.layer is not None:  # two layers of one name stand side by side
            at.inner[f"#{len(at.inner) + 2}"] = Branch(layer.op, layer)
        else:
            at.layer = layer
    return _joined(root)


def _joined(branch: Branch) -> Branch:
    inner = {name: _joined(each) for name, each in branch.inner.items()}
    if branch.name and branch.layer is None and len(inner) == 1:
        (only,) = inner.values()
        return Branch(f"{branch.name}.{only.name}", only.layer, only.inner)
    return Branch(branch.name, branch.layer, inner)


def lines(layers: Sequence[Layer], total: int, width: int, number: Callable[[float], str]) -> list[str]:
    """Write the tree: a line per module and layer with its share of the MAC, its MAC, and channels and groups of layers.

    Parameters
    ----------
    total
        MAC of the model.
    width
        Columns that there are; what does not fit is cut in the middle.
    number
        Writes a count.
    """
    rows = list(_rows(grown(layers), ""))
    cells: list[tuple[str, ...]] = []
    for stem, branch in rows:
        mac = sum(layer.mac_before for layer in branch.layers)
        layer = branch.layer
        about = (str(layer.channels_before), " ".join(layer.groups)) if layer is not None else ("", "")
        cells.append((stem, f"{100 * mac / total:5.1f} %" if total else "-", number(mac), *about))
    head = ("", "MAC", "", "channels", "groups")
    sizes = [max(len(row[k]) for row in (head, *cells)) for k in range(5)]
    sizes[0] = max(NARROWEST, min(sizes[0], width - sum(sizes[1:]) - 8))
    written = []
    for row in (head, *cells):
        first = (
            row[0]
            if len(row[0]) <= sizes[0]
            else f"{row[0][: sizes[0] // 3]}..{row[0][sizes[0] // 3 + 2 - sizes[0] :]}"
        )
        middle = "  ".join(f"{cell:>{size}}" for cell, size in zip(row[1:4], sizes[1:4], strict=True))
        written.append(f"{first:{sizes[0]}}  {middle}  {row[4]}".rstrip())
    return written


def _rows(branch: Branch, stem: str) -> Iterator[tuple[str, Branch]]:
    last = len(branch.inner) - 1
    for index, each in enumerate(branch.inner.values()):
        yield f"{stem}{'└─ ' if index == last else '├─ '}{each.name}", each
        yield from _rows(each, stem + ("   " if index == last else "│  "))
