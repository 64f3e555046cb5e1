"""Readable names of layers: what of an exporter's node name (or of its weight's) tells a reader which layer it is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile

from onnxprune.labels import Ledger
from onnxprune.model import Node

Path = tuple[str, ...]
"""A name in tokens, each with the separator before it: ``("layer1", ".0", "/conv1")``."""

OPERATORS = "Conv|Gemm|MatMul"  # an exporter's or optimiser's last part: Conv2D, MatMulAddFusion
MOST = 60  # characters of one name
HEAD = 20  # of which so many at least from its beginning


class Titles:
    """Short names of the nodes with multiply-accumulates, no two alike."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._model = ledger, ledger.model
        works = {work.node.key: work for work in reversed(ledger.works)}
        choices = {key: self._choices(work.node, work.weight) for key, work in works.items()}
        self._paths: dict[str, Path] = {}
        for rank in range(3):
            met = Counter(own[rank] for key, own in choices.items() if key not in self._paths)
            for key, own in choices.items():
                if key not in self._paths and (met[own[rank]] == 1):
                    self._paths[key] = own[rank]
        self._root = common(list(self._paths.values())) if len(choices) > 1 else ()
        self._paths = {key: self._below_root(path) for key, path in self._paths.items()}

    def path(self, node: Node) -> Path:
        """The node's name in tokens; one without multiply-accumulates may be called like another."""
        return self._paths.get(node.key) or self._below_root(self._choices(node, None)[0])

    def _below_root(self, path: Path) -> Path:
        size = len(self._root)
        return _without_separator(path[size:] if path[:size] == self._root and len(path) > size else path)

    def name(self, node: Node) -> str:
        """The node's name; of a long one the end."""
        return text(self.path(node))

    def names(self, nodes: Sequence[Node]) -> tuple[list[str], Path]:
        """The nodes' names without the part that all of them begin with, and that part."""
        paths = [self.path(node) for node in nodes]
        place = common(paths) if len(paths) > 1 else ()
        return [text(_without_separator(path[len(place) :])) for path in paths], place

    def within(self, place: Path) -> set[str]:
        """Keys of the layers whose names begin like this."""
        return {key for key, path in self._paths.items() if path[: len(place)] == place}

    def _choices(self, node: Node, weight: int | None) -> tuple[Path, Path, Path]:
        """Candidates in order of preference; the last is unique."""
        parts = _parts(node.name or node.key.removesuffix("_output_0"))
        full = tokens("/".join(parts))
        if len(full) < 2:
            return self._parameter(node, weight) or full, full, (node.key,)
        plain = list(parts)
        while len(plain) > 1 and re.fullmatch(rf"({node.op}|{OPERATORS})\w*", plain[-1]):
            plain.pop()
        return tokens("/".join(plain)), full, (node.key,)

    def _parameter(self, node: Node, weight: int | None) -> Path | None:
        """Name of the module that a node's weight or bias belongs to, where that is a path."""
        if weight is None:
            return None
        readers = [reader for reader, _ in self._model.consumers.get(node.outputs[0], ())]
        added = [source for reader in readers if reader.op == "Add" for source in reader.inputs]
        for source in filter(None, (*node.inputs[weight:], *added)):
            name = self._origin(source)
            parts = tokens("/".join(_parts(name)))
            if len(parts) > 1 and "::" not in name and self._model.constant(name) is not None:
                return parts[:-1]
        return None

    def _origin(self, name: str) -> str:
        """The constant that a weight is computed from (Transpose, Cast, DequantizeLinear), or the tensor itself."""
        while name in self._ledger.derived:
            name = next((source for source in self._model.producer[name].inputs if source), "")
        return self._model.aliases.get(name, name)


def common(paths: Sequence[Path]) -> Path:
    """What all paths begin with; what follows begins with a word, not with the number of one."""
    if not paths:
        return ()
    columns = list(takewhile(lambda column: len(set(column)) == 1, zip(*paths, strict=False)))
    size = len(columns)
    while size and any(len(path) == size or path[size].lstrip("./")[0].isdigit() for path in paths):
        size -= 1
    return paths[0][:size]


def shared(paths: Sequence[Path]) -> Path:
    """What all paths begin with, numbers of modules included: where they are."""
    columns = list(takewhile(lambda column: len(set(column)) == 1, zip(*paths, strict=False)))
    return paths[0][: len(columns)] if paths else ()


def tokens(name: str) -> Path:
    """Cut a name at slashes and dots."""
    return tuple(re.findall(r"[./]?[^./]+", name))


def text(path: Path) -> str:
    """Write a path; of a long one the first and the last tokens."""
    whole = "".join(path)
    if len(whole) <= MOST or len(path) < 3:
        return whole
    head, tail = path[0], path[-1]
    for token in path[1:-1]:
        if len(head) >= HEAD:
            break
        head += token
    for token in path[-2:0:-1]:
        if len(head) + len(token) + len(tail) > MOST:
            break
        tail = token + tail
    return f"{head}...{tail}"


def _without_separator(path: Path) -> Path:
    return (path[0].lstrip("./"), *path[1:]) if path else ()


def _parts(name: str) -> list[str]:
    """Parts between slashes, without those that the next one repeats (``layer1/layer1.0``)."""
    parts = [part for part in name.split("/") if part.strip(".")]
    return [part for part, after in zip(parts, [*parts[1:], ""], strict=False) if not after.startswith(f"{part}.")]
