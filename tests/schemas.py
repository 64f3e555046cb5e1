"""The JSON Schema files of reports and plans, as they are and with unknown keys forbidden."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from jsonschema import Draft202012Validator


def shipped(name: str) -> dict[str, Any]:
    """Return a schema as it lies in the installed package."""
    return json.loads(resources.files("onnxprune").joinpath("schemas", f"{name}.json").read_text(encoding="utf-8"))


def closed(schema: Any) -> Any:
    """Return the schema with unknown keys forbidden wherever it names keys."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: closed(each) for name, each in schema.items()}
    return {"additionalProperties": False, **strict} if isinstance(schema.get("properties"), dict) else strict


def kind_of_report(kind: str) -> Draft202012Validator:
    """Return the strict schema of one kind of report."""
    return Draft202012Validator(
        {**closed(shipped("report")["$defs"][kind]), "$defs": closed(shipped("report")["$defs"])}
    )


OPEN = {name: Draft202012Validator(shipped(name)) for name in ("report", "plan")}
PLAN = Draft202012Validator(closed(shipped("plan")))


def assert_plan(content: Any) -> None:
    """A plan is what the schema says, in the strict sense and in the open one."""
    PLAN.validate(content)
    OPEN["plan"].validate(content)


def assert_report(kind: str, content: Any) -> None:
    """A report is what the schema says of its kind, and one of the kinds that the open schema knows."""
    kind_of_report(kind).validate(content)
    OPEN["report"].validate(content)
