"""A graph as a list of kernel calls: what is constant, what follows from shapes alone, and what is computed from data."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper

from onnxprune import external
from onnxprune.errors import ModelError
from onnxprune.protos import bodies, constant_tensor, reads
from onnxprune.train.kernels import Call, Entry, find

Values = MutableMapping[str, torch.Tensor]
_NARROW = ("float16", "bfloat16")
_RANDOM = frozenset(
    ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")
)
_LOOSE = frozenset(("NonZero", "Compress", "If"))
"""Operators whose results have shapes that depend on values."""


@dataclass(frozen=True, eq=False)
class Step:
    """A call, its kernel, and the values that nobody reads after it."""

    call: Call
    entry: Entry | None
    last: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """A graph, or a body of control flow.

    Attributes
    ----------
    inputs, outputs
        Names of what it takes and returns.
    constants
        Values that depend on no input, no parameter and no shape.
    measured
        Names of what follows from the shapes of tensors alone.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, torch.Tensor]
    steps: tuple[Step, ...]
    measured: frozenset[str]

    def run(self, values: Values, device: torch.device, wanted: Collection[str] = (), skip: bool = False) -> None:
        """Compute every step into ``values``, which holds inputs, constants and parameters.

        Without gradients, what nobody reads any more is let go of, unless it is ``wanted``. With ``skip``, what follows
        from shapes is already there.
        """
        free = not torch.is_grad_enabled()
        for step in self.steps:
            call = step.call
            measured = call.outputs[0] in self.measured
            if not measured:
                _compute(step, values, device)
            elif not skip:
                with torch.inference_mode(False), torch.no_grad():  # it is remembered, and may be trained with later
                    _compute(step, values, torch.device("cpu"))
            if free:
                for name in step.last:
                    if name not in wanted:
                        values.pop(name, None)


def build(
    graph: onnx.GraphProto, opsets: Mapping[str, int], parameters: Collection[str], outer: Collection[str] = ()
) -> Program:
    """Translate a graph whose functions are inlined.

    Parameters
    ----------
    parameters
        Constants that are trained, by name: nothing that depends on them is folded.
    outer
        Names that the surrounding graph computes.

    Raises
    ------
    ModelError
        Operators that have no kernel, all of them at once.
    """
    if missing := sorted(unsupported(graph)):
        raise ModelError(f"training supports no {', '.join(missing)}; register a kernel (docs/training.md)")
    constants = {t.name: tensor_value(t) for t in graph.initializer if t.name not in parameters}
    listed = {t.name for t in graph.initializer}
    inputs = tuple(value.name for value in graph.input if value.name not in listed)
    measured, loose = set[str](), set[str]()
    calls: list[tuple[Call, Entry | None]] = []
    computed = {*inputs, *parameters, *outer}
    for node in graph.node:
        if node.op_type == "Constant" and node.output[0] in parameters:
            continue
        known = computed | constants.keys()
        call, entry = translate(node, opsets, known), find(_domain(node), node.op_type)
        sources = set(filter(None, reads(node)))
        fixed = sources <= constants.keys() and call.op not in _RANDOM
        if fixed and entry is not None:
            with torch.no_grad():
                _compute(Step(call, entry, ()), constants, torch.device("cpu"))
            continue
        still = constants.keys() | measured
        numbers = () if entry is None else (name for p, name in enumerate(call.inputs) if p in entry.host and name)
        if call.op in ("Shape", "Size"):
            shaped = loose.isdisjoint(sources)
        else:
            shaped = sources <= still and entry is not None
            if call.op in _LOOSE or not loose.isdisjoint(sources) or not still.issuperset(numbers):
                loose.update(filter(None, call.outputs))
        if shaped and call.op not in _RANDOM:
            measured.update(filter(None, call.outputs))
        computed.update(filter(None, call.outputs))
        calls.append((call, entry))
    outputs = tuple(value.name for value in graph.output)
    return Program(inputs, outputs, constants, tuple(_with_last(calls, outputs)), frozenset(measured))


def _with_last(calls: list[tuple[Call, Entry | None]], outputs: tuple[str, ...]) -> Iterator[Step]:
    produced = {name for call, _ in calls for name in call.outputs if name}
    seen, steps = set(outputs), []
    for call, entry in reversed(calls):
        used = {*call.inputs, *call.outputs, *_captured(call)} - seen
        seen |= used
        steps.append(Step(call, entry, tuple(sorted(used & produced))))
    return reversed(steps)


def _captured(call: Call) -> set[str]:
    inner = [value for value in call.attributes.values() if isinstance(value, Program)]
    return {name for body in inner for step in body.steps for name in (*step.call.inputs, *_captured(step.call))} | {
        name for body in inner for name in body.outputs
    }


def _domain(node: onnx.NodeProto) -> str:
    return "" if node.domain == "ai.onnx" else node.domain


def unsupported(graph: onnx.GraphProto) -> set[str]:
    """Operators of a graph and its bodies that no kernel computes."""
    found = set()
    for node in graph.node:
        if node.op_type != "If" and find(_domain(node), node.op_type) is None:
            found.add(f"{node.domain}:{node.op_type}" if _domain(node) else node.op_type)
        for body in bodies(node):
            found |= unsupported(body)
    return found


def translate(node: onnx.NodeProto, opsets: Mapping[str, int], known: Collection[str]) -> Call:
    """Read a node's attributes."""
    domain = _domain(node)
    attributes: dict[str, Any] = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, onnx.GraphProto):
            value = build(value, opsets, (), known)
        elif isinstance(value, onnx.TensorProto):
            value = tensor_value(value)
        elif isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        attributes[attribute.name] = list(value) if isinstance(value, tuple) else value
    title = node.name or next(filter(None, node.output), node.op_type)
    return Call(node.op_type, domain, title, tuple(node.input), tuple(node.output), attributes, opsets.get(domain, 1))


def tensor_value(tensor: onnx.TensorProto) -> torch.Tensor:
    """Value of a constant; half precision is widened to float32."""
    array = external.array(tensor)
    if array.dtype.name in _NARROW or array.dtype.name.startswith("float8"):
        array = array.astype(np.float32)
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except TypeError as error:
        raise ModelError(f"{tensor.name}: values of type {array.dtype} cannot be trained with") from error


def parameter_values(model: onnx.ModelProto, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Values of the constants to train, in the order of the graph."""
    found = {tensor.name: tensor_value(tensor) for tensor in model.graph.initializer if tensor.name in names}
    for node in model.graph.node:
        tensor = constant_tensor(node) if node.op_type == "Constant" and node.output[0] in names else None
        if tensor is not None:
            found[node.output[0]] = tensor_value(tensor)
    return found


def _compute(step: Step, values: Values, device: torch.device) -> None:
    """Compute one call into ``values``."""
    call, entry = step.call, step.entry
    if entry is None:
        _branch(call, values, device)
        return
    inputs = [values[name] if name else None for name in call.inputs]
    inputs = [
        x if x is None or x.device == device or place in entry.host else x.to(device) for place, x in enumerate(inputs)
    ]
    result = entry.kernel(call, *inputs)
    results = result if isinstance(result, tuple) else (result,)
    values.update((name, value) for name, value in zip(call.outputs, results, strict=False) if name)


def _branch(call: Call, values: Values, device: torch.device) -> None:
    """If: run the body that the condition chooses."""
    body: Program = call.get("then_branch" if bool(values[call.inputs[0]]) else "else_branch")
    inner = {**values, **body.constants}
    body.run(inner, device, body.outputs)
    values.update(zip(call.outputs, (inner[name] for name in body.outputs), strict=True))
