"""Hostile neighbours of valid models: one to three changes of structure, values or bytes, all from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import onnx
from onnx import ModelProto

from . import bodies, files, interface, nodes, quantised, tensors
from .common import Unfit
from .seeds import Seeds

Files = dict[str, bytes]
"""What a folder holds, the model under the name ``in.onnx``."""

GRAPH: dict[str, Callable[[ModelProto, random.Random], None]] = {
    **nodes.CHANGES, **tensors.CHANGES, **interface.CHANGES, **bodies.CHANGES, **quantised.CHANGES,
}  # fmt: skip
KINDS = (*GRAPH, *files.CHANGES)
_MOST = 3
_TRIES = 20


@dataclass(frozen=True)
class Mutant:
    """A seed's name, the kinds of changes it went through, in order, and the files that came out."""

    seed: str
    kinds: tuple[str, ...]
    files: Files


def mutant(seeds: Seeds, seed: int, number: int) -> Mutant:
    """Make one mutant; the same numbers make the same bytes."""
    rng = random.Random(f"{seed} {number}")
    for _ in range(_TRIES):
        name = seeds.draw(rng)
        wanted = rng.choices((1, 2, _MOST), (70, 20, 10))[0]
        chosen = [KINDS[number % len(KINDS)], *(rng.choice(KINDS) for _ in range(wanted - 1))]
        try:
            return Mutant(name, tuple(chosen), changed(seeds.model(name), chosen, rng))
        except Unfit:
            continue
    name = seeds.draw(rng)
    return Mutant(name, ("file: flip a bit",), changed(seeds.model(name), ["file: flip a bit"], rng))


def changed(model: ModelProto, kinds: list[str], rng: random.Random) -> Files:
    """Apply changes of the graph, write it, and apply changes of the file; :class:`Unfit` where one finds nothing to do."""
    for kind in kinds:
        if kind in GRAPH:
            GRAPH[kind](model, rng)
    found: Files = {"in.onnx": model.SerializeToString(deterministic=True)}
    for kind in kinds:
        if kind in files.CHANGES:
            found = files.CHANGES[kind](found, rng)
    return found


def readable(found: Files) -> ModelProto | None:
    """The model of a folder, where its bytes are one."""
    try:
        return onnx.ModelProto.FromString(found["in.onnx"])
    except Exception:  # protobuf's DecodeError differs between its implementations
        return None
