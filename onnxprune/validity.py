"""What a file must be before anything is concluded from it: every name means one thing, every node fits its operator."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import onnx
from onnx import AttributeProto, defs

from onnxprune import runtime
from onnxprune.errors import ModelError
from onnxprune.protos import bodies, every_node

STANDARD = ("", "ai.onnx")
MANY_AXES = 1 << 16
"""Axes that no tensor has."""


def require_valid(model: onnx.ModelProto) -> None:
    """Raise :class:`ModelError` where a graph gives a name twice, or a node does not fit its operator's schema.

    Rules may then take what a schema promises: how many inputs there are, and of which type an attribute is. What the
    schemas leave to inference, be it ranks or sizes, and operators that nobody here knows, are not looked at.
    """
    _require_opset(model)
    _require_text(model.graph)
    versions = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in model.opset_import}
    _require_names(model.graph)
    _require_written(model.graph, frozenset())
    for node in every_node(model.graph):
        try:
            _require_fit(node, versions)
        except ValueError as error:
            raise ModelError(f"the graph is invalid: {_title(node)} {error}") from error


def _require_opset(model: onnx.ModelProto) -> None:
    versions = [opset.version for opset in model.opset_import if opset.domain in STANDARD]
    if not versions:
        raise ModelError("the model imports no standard operator set")
    if versions[0] < 7:
        raise ModelError(
            f"opset {versions[0]} is too old; convert the model to opset 7 or newer (onnx.version_converter)"
        )


def _require_text(graph: onnx.GraphProto) -> None:
    """Raise :class:`ModelError` where a name is not text: protobuf then gives bytes."""
    values = (*graph.input, *graph.output, *graph.value_info)
    names = [graph.name, *(value.name for value in (*values, *graph.initializer))]
    names += [dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim]
    for node in graph.node:
        names += (node.name, node.op_type, node.domain, *node.input, *node.output, *(a.name for a in node.attribute))
    for name in names:
        if not isinstance(name, str):
            raise ModelError(f"the graph is invalid: the name {name!r} is no UTF-8 text; the file is damaged")
    for node in graph.node:
        for body in bodies(node):
            _require_text(body)


def _require_names(graph: onnx.GraphProto) -> None:
    for what, values in (("input", graph.input), ("initializer", graph.initializer), ("output", graph.output)):
        names = [value.name for value in values]
        if "" in names:
            raise ModelError(f"the graph is invalid: an {what} has no name")
        twice = _first_repeated(names)
        if twice is not None:
            raise ModelError(f"the graph is invalid: it has two {what}s called {twice}")


def _require_written(graph: onnx.GraphProto, outside: frozenset[str]) -> None:
    """Raise :class:`ModelError` where a node or an output reads what nothing writes."""
    own = {value.name for value in (*graph.input, *graph.initializer)}
    own.update(tensor.values.name for tensor in graph.sparse_initializer)
    own.update(name for node in graph.node for name in node.output)
    known = outside | own
    for node in graph.node:
        for name in filter(None, node.input):
            if name not in known:
                raise ModelError(f"the graph is invalid: {_title(node)} reads {name}, which nothing writes")
        for body in bodies(node):
            _require_written(body, known)
    for output in graph.output:
        if output.name not in known:
            raise ModelError(f"the graph is invalid: nothing writes its output {output.name}")


def _title(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name or '/'.join(node.output)}"


def _first_repeated(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _require_fit(node: onnx.NodeProto, versions: dict[str, int]) -> None:
    """Raise ValueError where a node has other inputs, outputs or attributes than its operator."""
    names = [attribute.name for attribute in node.attribute]
    if (twice := _first_repeated(names)) is not None:
        raise ValueError(f"has two attributes called {twice}")
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            raise ValueError(f"refers to {attribute.ref_attr_name!r} of a function, and is in none")
    domain = "" if node.domain in STANDARD else node.domain
    _require_bodies(node)
    schema = _schema(node.op_type, domain, versions.get(domain, 0))
    if schema is None:
        return
    for what, n, least, most in (
        ("inputs", len(node.input), schema.min_input, schema.max_input),
        ("outputs", len(node.output), schema.min_output, schema.max_output),
    ):
        if not least <= n <= most:
            raise ValueError(f"has {n} {what}, where {least} to {most} are allowed")
    for place, formal in enumerate(schema.inputs[: schema.min_input]):
        if formal.option.name == "Single" and not node.input[place]:
            raise ValueError(f"lacks its input {formal.name}")
    if schema.inputs and schema.inputs[-1].option.name == "Variadic" and "" in node.input[len(schema.inputs) - 1 :]:
        raise ValueError(f"lacks one of its inputs {schema.inputs[-1].name}")
    _require_no_crash(node)
    for name, wanted in schema.attributes.items():
        if wanted.required and name not in names:
            raise ValueError(f"lacks its attribute {name}")
    for attribute in node.attribute:
        wanted = schema.attributes.get(attribute.name)
        if wanted is None and not domain and not attribute.name.startswith("__"):
            raise ValueError(f"has an attribute {attribute.name}, which it does not know in this opset")
        if wanted is not None and attribute.type != int(wanted.type):
            kinds = AttributeProto.AttributeType
            raise ValueError(
                f"has an attribute {attribute.name} of type {attribute.type}, not {kinds.Name(int(wanted.type))}"
            )


def _require_no_crash(node: onnx.NodeProto) -> None:
    """Raise ValueError for numbers which no operator has, and by which onnx's shape inference would end the process."""
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "Split" and numbers.get("num_outputs", len(node.output)) != len(node.output):
        raise ValueError(f"has {len(node.output)} outputs, and its num_outputs is {numbers['num_outputs']}")
    if node.op_type == "GatherND" and numbers.get("batch_dims", 0) < 0:
        raise ValueError(f"has a batch_dims of {numbers['batch_dims']}")
    if not -MANY_AXES < numbers.get("axis", 0) < MANY_AXES:
        raise ValueError(f"has an axis of {numbers['axis']}")


def _require_bodies(node: onnx.NodeProto) -> None:
    """Raise ValueError where the bodies of control flow give or take other tensors than the node does."""
    given = {attribute.name: attribute.g for attribute in node.attribute if attribute.HasField("g")}
    n = len(node.output)
    for name in ("then_branch", "else_branch"):
        if node.op_type == "If" and name in given and len(given[name].output) != n:
            raise ValueError(f"has {n} outputs, and its {name} has {len(given[name].output)}")
    if node.op_type == "Loop" and "body" in given:
        body, states = given["body"], max(len(node.input) - 2, 0)
        if len(body.input) != 2 + states or len(body.output) != 1 + n or n < states:
            sizes = f"{len(body.input)} inputs and {len(body.output)} outputs"
            raise ValueError(f"carries {states} tensors and has {n} outputs, and its body has {sizes}")


@lru_cache(maxsize=4096)
def _schema(op: str, domain: str, version: int) -> Any:
    """Schema of an operator; None where nobody here knows it."""
    if domain:
        return runtime.schema(op, domain)
    try:
        return defs.get_schema(op, version, domain)
    except (defs.SchemaError, TypeError):
        return None
