"""Encodings: slice the JSON file of quantization encodings that travels beside a float model (AIMET, Qualcomm AI Runtime).

Formats: https://github.com/quic/aimet, "Encoding Format Specification". Up to 0.6.1 a tensor has a list of encodings, one
per channel; 1.0.0 has one with flattened vectors; 2.0.0 has nested lists and says the axis, as ONNX's QuantizeLinear does.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import onnx

from onnxprune import onnx_io
from onnxprune.encoding_entries import Tensor, slice_entry
from onnxprune.errors import FileError, UsageError
from onnxprune.options import Clock, ModelLike, Options
from onnxprune.pipeline import load, options_from, read_plan
from onnxprune.plan import Plan, keep_of
from onnxprune.prepare import inline
from onnxprune.protos import bodies, named_tensors
from onnxprune.slices import take

PARTS = ("activation_encodings", "param_encodings", "encodings")


@dataclass(frozen=True)
class SlicedEncodings:
    """What ``slice_encodings`` returns: the encodings of the pruned model, in the order and format given, and notes."""

    encodings: dict[str, Any]
    notes: tuple[str, ...] = ()


def slice_encodings(
    encodings: Mapping[str, Any] | str | os.PathLike, plan: Plan | str | os.PathLike, original: ModelLike,
    pruned: ModelLike, options: Options | None = None, **chosen: Any,
) -> SlicedEncodings:  # fmt: skip
    """Slice quantization encodings as a plan slices the model.

    Encodings per channel keep the entries of the channels that stay, those of blocks the blocks; encodings of whole tensors
    stay as they are. Tensors that the pruned model no longer has are dropped, names that are not the model's stay.

    Parameters
    ----------
    encodings
        A file, or what it holds: version 0.4.0 to 0.6.1, 1.0.0 or 2.0.0.
    chosen
        Fields of :class:`Options`: how the original is read.

    Raises
    ------
    ModelError
        It cannot be told which entries of a tensor stay, or blocks would be torn; the message names the tensor.
    UsageError, FileError
        The encodings are not of a known format, or cannot be read.
    """
    where, content = _read(encodings)
    options = options or options_from(chosen)
    graph = _Graph(original, pruned, read_plan(plan), options)
    sliced, strangers = dict(content), list[str]()
    for part in PARTS:
        if part in content:
            sliced[part] = _part(content[part], graph, f"{where}: {part}", strangers)
    notes = []
    if strangers:
        shown = ", ".join(strangers[:3]) + (f" and {len(strangers) - 3} more" if len(strangers) > 3 else "")
        notes.append(f"encodings of {shown} stay as they are: the model has no such tensors")
    return SlicedEncodings(sliced, tuple(notes))


def _read(given: Mapping[str, Any] | str | os.PathLike) -> tuple[str, Mapping[str, Any]]:
    where = str(given) if isinstance(given, str | os.PathLike) else "the encodings"
    if isinstance(given, str | os.PathLike):
        try:
            given = json.loads(pathlib.Path(given).read_text(encoding="utf-8"))
        except OSError as error:
            raise FileError(f"{where}: the encodings cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}: is not valid JSON ({error})") from error
    if not isinstance(given, Mapping) or not any(part in given for part in PARTS):
        raise UsageError(f"{where}: are no quantization encodings; expected one of {', '.join(PARTS)}")
    return where, given


def _part(given: Any, graph: _Graph, where: str, strangers: list[str]) -> Any:
    """Slice a table or a list of encodings; puts names that are not the model's into ``strangers``."""
    listed = isinstance(given, list)
    if not listed and not isinstance(given, Mapping):
        raise UsageError(f"{where}: must be an object or a list")
    if listed and not all(isinstance(entry, Mapping) and isinstance(entry.get("name"), str) for entry in given):
        raise UsageError(f"{where}: an entry has no name")
    pairs = [(entry["name"], entry) for entry in given] if listed else list(given.items())
    if broken := [name for name, _ in pairs if name != name.encode(errors="ignore").decode()]:
        raise UsageError(f"{where}: {broken[0]!a:.80} is no name of a tensor: half a character is no Unicode")
    done = []
    for name, entry in pairs:
        if not graph.has(name):
            strangers.append(name)
            done.append((name, entry))
            continue
        done += [(tensor.name, slice_entry(entry, tensor)) for tensor in graph.left_of(name)]
    return [{**entry, "name": name} for name, entry in done] if listed else dict(done)


class _Graph:
    """The original and what was made of it."""

    def __init__(self, original: ModelLike, pruned: ModelLike, plan: Plan, options: Options) -> None:
        self._model, self._plan, self._options = original, plan, options
        before = original if isinstance(original, onnx.ModelProto) else onnx_io.load(original)
        after = pruned if isinstance(pruned, onnx.ModelProto) else onnx_io.load(pruned)
        graph = inline(before).graph
        self._before = {*_names(before.graph), *_names(graph)}
        self._after = {*_names(after.graph), *_names(inline(after).graph)}
        self._constants = {tensor.name: tuple(tensor.dims) for tensor in named_tensors(graph)}
        found = set(_channel_axes(graph, self._constants))
        names = Counter(name for name, _ in found)
        self._channels = {name: axes for name, axes in found if names[name] == 1}  # readers that disagree tell nothing

    def has(self, name: str) -> bool:
        """Whether the original has a tensor."""
        return name in self._before

    def left_of(self, name: str) -> Iterator[Tensor]:
        """What a tensor of the original has become: itself, nothing, or copies where its readers slice it differently."""
        if name not in self._constants:
            if name in self._after:
                yield Tensor(name, self._shape(name), partial(self._left, name))
            return
        shape, (channels, groups) = self._constants[name], self._channels.get(name, (None, 1))
        for full in (name, *(full for full in self._plan.initializers if self._is_copy(full, name))):
            if full in self._after:
                left = partial(take, slices=self._plan.initializers.get(full, {}), name=full)
                yield Tensor(full, shape, left, channels, groups)

    def _is_copy(self, full: str, name: str) -> bool:
        """Whether a name in the plan is that of a copy for one reader, which its first output names."""
        reader = full.removeprefix(f"{name}@")
        return full not in self._constants and reader != full and reader in self._before

    def _shape(self, name: str) -> Callable[[], tuple[int, ...] | None]:
        return lambda: self._loaded[0].model.shapes.get(name)

    @cached_property
    def _loaded(self) -> tuple[Any, np.ndarray]:
        coupling = load(self._model, self._options, Clock(), self._plan).coupling
        return coupling, keep_of(coupling, self._plan)

    def _left(self, name: str, array: np.ndarray) -> np.ndarray:
        coupling, keep = self._loaded
        return coupling.extract(coupling.axes(name), keep, array)


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """Names of all tensors, those of bodies included."""
    yield from (value.name for value in (*graph.input, *graph.initializer))
    for node in graph.node:
        yield from node.output
        for body in bodies(node):
            yield from _names(body)


def _channel_axes(
    graph: onnx.GraphProto, constants: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[tuple[int, int], int]]]:
    """Axes of output and input channels of weights, and in how many groups the former hold the outputs of one alone.

    The axes are (0, 1) in a Conv, (1, 0) in a ConvTranspose, as it is in a product.
    """
    for node in graph.node:
        for body in bodies(node):
            yield from _channel_axes(body, constants)
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        for place, name in enumerate(node.input):
            if name not in constants:
                continue
            rank = len(constants[name])
            if place == 1 and node.op_type in ("Conv", "ConvTranspose"):
                groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
                yield name, ((0, 1), 1) if node.op_type == "Conv" else ((1, 0), groups)
            elif place == 1 and node.op_type == "Gemm":
                yield name, ((0, 1) if transposed else (1, 0), 1)
            elif place < 2 and node.op_type == "MatMul" and rank > 1:
                yield name, ((rank - 1, rank - 2) if place else (rank - 2, rank - 1), 1)
