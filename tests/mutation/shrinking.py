"""Make a failing file smaller as long as it fails alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from onnx import ModelProto

from .common import copy

Files = dict[str, bytes]
_ROUNDS = 200
_SECONDS = 60


def shrink(found: Files, model: ModelProto | None, fails: Callable[[Files], bool]) -> Files:
    """Drop nodes, initializers and declarations while ``fails`` holds; bytes that are no model stay as they are."""
    if model is None or len(found) > 1 or not fails(written(model)):
        return found
    rounds, again, end = 0, True, time.monotonic() + _SECONDS
    while again and rounds < _ROUNDS and time.monotonic() < end:
        again = False
        for smaller in _smaller(model):
            rounds += 1
            if rounds >= _ROUNDS or time.monotonic() > end:
                break
            if fails(written(smaller)):
                model, again = smaller, True
                break
    return written(model)


def written(model: ModelProto) -> Files:
    """A folder with nothing but a model."""
    return {"in.onnx": model.SerializeToString(deterministic=True)}


def _smaller(model: ModelProto) -> Iterator[ModelProto]:
    """Candidates: half of the nodes bypassed, single nodes bypassed or dropped, what nobody reads dropped."""
    n = len(model.graph.node)
    size = n // 2
    while size:
        for begin in range(0, n, size):
            yield _bypassed(model, range(begin, min(n, begin + size)))
        size //= 2
    for part in ("output", "initializer", "value_info", "input"):
        for place in range(len(getattr(model.graph, part))):
            fewer = copy(model)
            del getattr(fewer.graph, part)[place]
            yield fewer


def _bypassed(model: ModelProto, places: range) -> ModelProto:
    fewer = copy(model)
    new: dict[str, str] = {}
    for place in places:
        node = fewer.graph.node[place]
        if node.input:
            new.update({name: new.get(node.input[0], node.input[0]) for name in node.output})
    del fewer.graph.node[places.start : places.stop]
    for node in fewer.graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
    for output in fewer.graph.output:
        output.name = new.get(output.name, output.name)
    read = {name for node in fewer.graph.node for name in node.input} | {o.name for o in fewer.graph.output}
    has_bodies = any(a.HasField("g") for node in fewer.graph.node for a in node.attribute)
    if not has_bodies:
        kept = [tensor for tensor in fewer.graph.initializer if tensor.name in read]
        if len(kept) < len(fewer.graph.initializer):
            copies = [copy(tensor) for tensor in kept]
            del fewer.graph.initializer[:]
            fewer.graph.initializer.extend(copies)
    return fewer
