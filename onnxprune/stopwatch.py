"""Measure in onnxruntime: layers alone at several channel counts, and models side by side."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxprune import onnx_io, runtime
from onnxprune.cost import Cost
from onnxprune.coupling import Coupling
from onnxprune.errors import BudgetError, FileError, ModelError
from onnxprune.labels import Work, length
from onnxprune.latency import Table
from onnxprune.profile import kind_of

SHARES = (0.25, 0.5, 1.0)
"""Shares of a layer's channels at which it is measured, rounded to whole blocks."""

ROUNDS = 7

SECONDS = 45.0
LEAST = 7
PRECISION = 0.004
"""A race ends when the standard error of the ratio is that small, or after so many seconds, but not before LEAST pairs."""

ATTEMPTS = 8
"""Candidates that are measured."""

SELECTIONS = 32
"""Predictions that are tried; several may lead to the same candidate."""

CLOSE = 0.015
"""A share of latency this far below what was asked for is close enough."""

AGAIN = 0.03
"""A share of latency further below than this deserves a note."""

NARROW = 1e-3
"""Predictions this close to each other lead to the same candidates."""

Progress = Callable[[int, int], None]


def cache_folder() -> pathlib.Path:
    """Where tables are kept: ``ONNXPRUNE_CACHE``, else ``onnxprune`` in the user's cache folder."""
    given = os.environ.get("ONNXPRUNE_CACHE")
    if given:
        return pathlib.Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path("~/.cache").expanduser()
    return pathlib.Path(base) / "onnxprune"


def measure_tables(
    model: onnx.ModelProto, cost: Cost, sha256: str, block: Callable[[str], tuple[int, int]], *, provider: str = "",
    progress: Progress = lambda done, total: None,
) -> list[Table | None]:  # fmt: skip
    """Measure a table for every layer, or read it from the cache of this model, provider and machine.

    Parameters
    ----------
    block
        Multiples of input and output channels for a kind of operator.
    """
    cache = _Cache(sha256 or hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest(), provider)
    protos = {name: proto for proto in model.graph.node for name in proto.output if name}
    tables: list[Table | None] = []
    for number, work in enumerate(cost.works):
        progress(number, len(cost.works))
        proto = protos.get(work.node.key)
        layer = None if proto is None else _layer(cost.coupling, work, proto, block(kind_of(work)), model)
        tables.append(None if layer is None else cache.get(layer.key, partial(_measured, layer, provider)))
    progress(len(cost.works), len(cost.works))
    cache.save()
    return tables


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer that can be built with other channel counts: ``build(inputs, outputs)`` is a model of it alone."""

    key: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    build: Callable[[int, int], bytes]


def _layer(
    coupling: Coupling, work: Work, proto: onnx.NodeProto, block: tuple[int, int], model: onnx.ModelProto
) -> _Layer | None:
    """What can be measured of a layer: all its counts where its weight is a plain constant, else as it is."""
    shapes, types = coupling.model.shapes, coupling.model.types
    read = [name for name in work.node.inputs if name]
    if any(name not in shapes for name in read) or proto.domain not in ("", "ai.onnx") or list(work.node.captured):
        return None
    kind, channels = kind_of(work), work.channels
    counts: tuple[tuple[int, ...], tuple[int, ...]] = ((1,), (1,))
    resizable = kind in ("Conv", "FirstConv", "DepthwiseConv", "ConvTranspose", "MatMul") and proto.op_type in SIDES
    if channels is not None and resizable and work.weight == 1:
        sizes = (length(channels.inputs), length(channels.outputs))
        fixed = (coupling.frozen_axis(channels.inputs), coupling.frozen_axis(channels.outputs))
        counts = tuple(_counts(n, b, still) for n, b, still in zip(sizes, block, fixed, strict=True))  # type: ignore
        if kind == "DepthwiseConv":
            counts = ((1,), counts[1])
    changing = len(counts[0]) > 1 or len(counts[1]) > 1
    build = _Builder(coupling, work, proto, model, depthwise=kind == "DepthwiseConv")
    facts = [proto.op_type, sorted(a.SerializeToString(deterministic=True).hex() for a in proto.attribute)]
    facts += [[shapes[name], types.get(name, TensorProto.FLOAT)] for name in read] + [counts]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    whole = build if changing else lambda inputs, outputs: build(0, 0)
    return _Layer(key, *counts, whole)


def _counts(size: int, block: int, still: bool) -> tuple[int, ...]:
    if still:
        return (size,)
    step = block if size % block == 0 else 1
    return tuple(sorted({size, *(max(step, round(share * size / step) * step) for share in SHARES)}))


SIDES: Mapping[str, Callable[[onnx.NodeProto], tuple[int, int]]] = {
    "Conv": lambda node: (1, 0),
    "ConvTranspose": lambda node: (0, 1),
    "Gemm": lambda node: (1, 0) if any(a.name == "transB" and a.i for a in node.attribute) else (0, 1),
    "MatMul": lambda node: (-2, -1),
}
"""Per operator, the axes of its weight that hold input and output channels."""


class _Builder:
    """Builds a model of one node at any channel counts, its weights random."""

    def __init__(
        self, coupling: Coupling, work: Work, proto: onnx.NodeProto, model: onnx.ModelProto, *, depthwise: bool
    ) -> None:
        self.coupling, self.work, self.proto, self.model, self.depthwise = coupling, work, proto, model, depthwise

    def __call__(self, inputs: int, outputs: int) -> bytes:
        """Serialise the node with so many channels; 0, 0 leaves it as it is."""
        node, reading = self.work.node, self.coupling.model
        shapes = {index: list(reading.shapes[name]) for index, name in enumerate(node.inputs) if name}
        proto = onnx.NodeProto()
        proto.CopyFrom(self.proto)
        if outputs:
            inputs = outputs if self.depthwise else inputs
            shapes = self._resized(shapes, inputs, outputs)
            for attribute in proto.attribute:
                if attribute.name == "group" and self.depthwise:
                    attribute.i = outputs
        rng = np.random.default_rng(0)
        fed, held = [], []
        for index, name in enumerate(node.inputs):
            if not name:
                continue
            proto.input[index] = label = f"in{index}"
            kind = reading.types.get(name, TensorProto.FLOAT)
            known = reading.value(name)
            computed = reading.constant(name) is None and name not in reading.static
            if computed and name not in self.coupling.ledger.derived:
                fed.append(helper.make_tensor_value_info(label, kind, shapes[index]))
            elif known is not None and known.dtype.kind != "f":
                held.append(numpy_helper.from_array(known, label))
            else:
                dtype = helper.tensor_dtype_to_np_dtype(kind)
                held.append(
                    numpy_helper.from_array(rng.standard_normal(shapes[index], np.float32).astype(dtype), label)
                )
        results = [onnx.ValueInfoProto(name=name) for name in proto.output if name]
        graph = helper.make_graph([proto], "layer", fed, results, held)
        made = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=max(self.model.ir_version, 8))
        return made.SerializeToString()

    def _resized(self, shapes: dict[int, list[int]], inputs: int, outputs: int) -> dict[int, list[int]]:
        of_inputs, of_outputs = SIDES[self.proto.op_type](self.proto)
        shapes[1][of_inputs], shapes[1][of_outputs] = inputs, outputs
        if self.depthwise:
            shapes[1][:2] = [outputs, 1]
        transposed = any(a.name == "transA" and a.i for a in self.proto.attribute)
        convolution = self.proto.op_type in ("Conv", "ConvTranspose")
        shapes[0][1 if convolution else 0 if transposed else -1] = inputs
        if shapes.get(2):
            shapes[2][-1] = outputs if shapes[2][-1] > 1 else 1
        return shapes


def _measured(layer: _Layer, provider: str) -> Table | None:
    """Measure a layer at all its counts, each in turn with the layer as it is; None where it does not run alone."""
    places = [(i, o) for i in range(len(layer.inputs)) for o in range(len(layer.outputs))][:-1]
    try:
        reference = runtime.KernelClock(layer.build(layer.inputs[-1], layer.outputs[-1]), provider)
        found = []
        for i, o in places:
            clock = runtime.KernelClock(layer.build(layer.inputs[i], layer.outputs[o]), provider)
            for _ in range(ROUNDS):
                reference.run()
                clock.run()
            found.append(clock.ms())
        if not places:
            for _ in range(ROUNDS):
                reference.run()
        beside = reference.ms().reshape(-1, ROUNDS)[:, 1:]  # the first round of each is a warm-up
    except ModelError:
        return None
    ms = np.full((len(layer.inputs), len(layer.outputs)), float(np.median(beside)))
    for number, place in enumerate(places):
        ms[place] *= np.median(found[number][1:]) / max(float(np.median(beside[number])), 1e-9)
    for axis in (0, 1):  # noise apart, whole blocks fewer never take longer
        ms = np.maximum.accumulate(ms, axis)
    return Table(layer.inputs, layer.outputs, ms)


class _Cache:
    """Tables of one model, provider, number of threads and machine, by a layer's key; a file that others may share."""

    def __init__(self, model: str, provider: str) -> None:
        machine = (
            f"{platform.processor() or platform.machine()} {runtime.processor()} {os.cpu_count()} {runtime.VERSION}"
        )
        name = hashlib.sha256(
            f"{model} {runtime.provider_for(provider)} {runtime.thread_limit()} {machine}".encode()
        ).hexdigest()[:32]
        self.fresh = False
        self.path: pathlib.Path | None = None
        try:
            self.path = cache_folder() / "latency" / f"{name}.json"
            data = json.loads(self.path.read_text(encoding="utf-8"))
            self.tables = {key: Table.from_json(value) for key, value in data.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            self.tables = {}  # absent, written by something else, or no home: measured again

    def get(self, key: str, measure: Callable[[], Table | None]) -> Table | None:
        """A table that is known, else measured."""
        if key in self.tables:
            return self.tables[key]
        found = measure()
        if found is not None:
            self.tables[key] = found
            self.fresh = True
        return found

    def save(self) -> None:
        """Write what is new; where nothing can be written it is measured again next time."""
        if not self.fresh or self.path is None:
            return
        content = {key: table.to_json() for key, table in self.tables.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            onnx_io.write(self.path, json.dumps(content).encode())
        except (OSError, FileError):
            return


class Race:
    """Measures candidates against the original, in turn, with inputs, threads and provider alike.

    Parameters
    ----------
    original
        What candidates are compared with.
    shapes
        Input shapes.
    """

    def __init__(
        self, original: onnx.ModelProto | str, shapes: Mapping[str, Sequence[int]], provider: str = ""
    ) -> None:
        self.shapes, self.provider = shapes, provider
        self.session = runtime.Session(original, provider, spin=False)
        self.feeds = runtime.random_feeds(self.session.inputs, shapes)

    def alone(self) -> float:
        """Median milliseconds of the original."""
        return 1e3 * float(np.median([self.session.seconds(self.feeds) for _ in range(LEAST)][1:]))

    def run(self, candidate: onnx.ModelProto | str, seconds: float = SECONDS, least: int = LEAST) -> Result:
        """Run original and candidate in turn until the ratio is known well enough, or for ``seconds``."""
        session = runtime.Session(candidate, self.provider, spin=False)
        pairs: list[tuple[float, float]] = []
        begin = time.perf_counter()
        while len(pairs) < least or time.perf_counter() - begin < seconds:
            pairs.append((self.session.seconds(self.feeds), session.seconds(self.feeds)))
            if len(pairs) >= least and len(pairs) % 8 == 0 and _spread(pairs[1:]) < PRECISION:
                break
        before, after = np.array(pairs[1:]).T * 1e3
        ratio = float(np.median(after / before))
        return Result(float(np.median(before)), ratio * float(np.median(before)), ratio)


def _spread(pairs: Sequence[tuple[float, float]]) -> float:
    """Standard error of the median of paired ratios (1.25 times that of a mean, for a normal distribution)."""
    before, after = np.array(pairs).T
    ratios = after / before
    return float(1.25 * 1.4826 * np.median(np.abs(ratios - np.median(ratios))) / np.sqrt(len(ratios)))


@dataclass(frozen=True)
class Result:
    """Median milliseconds of the original, the median ratio of pairs that ran one after another, and what that makes."""

    before: float
    after: float
    ratio: float


def fit(
    select: Callable[[float], np.ndarray], race: Callable[[np.ndarray], Result], wanted: float
) -> tuple[np.ndarray, Result]:
    """Find what to keep so that the measured latency is ``wanted`` of the original's, or a little less.

    Parameters
    ----------
    select
        What to keep for a predicted share of the latency; the least that may be kept for one below all that is possible.
    race
        Measures it.

    Raises
    ------
    BudgetError
        Nothing that was tried is as fast, the least that may be kept among it.
    """
    known: dict[bytes, Result] = {}
    slow, fast = (1.0, 1.0), (0.0, 0.0)  # predicted and measured: the nearest on either side
    best: tuple[np.ndarray, Result] | None = None
    aim = predicted = wanted - min(CLOSE, wanted) / 2
    for _ in range(SELECTIONS):
        keep = select(predicted)
        fresh = keep.tobytes() not in known
        if fresh and len(known) == ATTEMPTS - (best is None):
            break
        found = known.setdefault(keep.tobytes(), race(keep)) if fresh else known[keep.tobytes()]
        if fresh and wanted - CLOSE <= found.ratio <= wanted:  # chance picks what measures well: once more
            found = known[keep.tobytes()] = _mean(found, race(keep))
        if found.ratio <= wanted:
            fast = max(fast, (predicted, found.ratio))
            best = (keep, found) if best is None or found.ratio > best[1].ratio else best
        else:
            slow = min(slow, (predicted, found.ratio))
        if wanted - CLOSE <= found.ratio <= wanted or slow[0] - fast[0] < NARROW:
            break
        share = (aim - fast[1]) / max(slow[1] - fast[1], 1e-9) if fresh else 0.5
        predicted = fast[0] + float(np.clip(share, 0.1, 0.9)) * (slow[0] - fast[0])
    if best is None:
        keep = select(0.0)
        found = known.get(keep.tobytes()) or race(keep)
        best = (keep, found)
    if best[1].ratio > wanted:
        least = min(result.ratio for result in (*known.values(), best[1]))
        raise BudgetError(out_of_time(wanted, least), least)
    return best


def out_of_time(wanted: float, least: float) -> str:
    """Say what was asked for and what was measured."""
    return (
        f"target out of reach: {100 * wanted:.4g} % of the original's latency requested, {100 * least:.4g} % measured at "
        "best; another --profile or fewer limits may help"
    )


def _mean(first: Result, second: Result) -> Result:
    pairs = ((getattr(first, name) + getattr(second, name)) / 2 for name in ("before", "after", "ratio"))
    return Result(*pairs)
