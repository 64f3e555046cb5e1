"""Everything that is frozen carries a reason of a known kind, and no layer stays at the floor without one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

import architectures
from graphs import Tiny, sandwich
from onnxprune import onnx_io, ops
from onnxprune.cost import Cost
from onnxprune.passes.couple import couple
from onnxprune.report.reasons import KINDS, SINGLE, TEXTS, UNLABELLED, FrozenRow, frozen_rows, kind

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("onnxprune", "passes")
    for path in (ROOT / folder).rglob("*.py")
    if path.parent.name != "report"  # which only repeats what others said
)


# -- every text in the sources -----------------------------------------------------------------------------------------


@cache
def tree(path: Path) -> ast.Module:
    """Parse a file; nodes know their ``parent``."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(module):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
    return module


def function_around(node: ast.AST) -> ast.FunctionDef | None:
    """The function that a node of a syntax tree stands in."""
    while node is not None and not isinstance(node, ast.FunctionDef):
        node = getattr(node, "parent", None)
    return node


@cache
def takers() -> dict[str, int]:
    """What takes the text of a reason, with its place among the arguments: also functions that only hand it on."""
    found = {"Refusal": 0, "Reason": 3, "freeze": 1}
    size = 0
    while size < len(found):
        size = len(found)
        for function in (
            node for path in SOURCES for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)
        ):
            names = [argument.arg for argument in function.args.args if argument.arg != "self"]
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and called(node) in found]
            handed = {argument.id for call in calls for argument in call.args if isinstance(argument, ast.Name)}
            if "text" in names and "text" in handed and function.name not in found:
                found[function.name] = names.index("text")
    return found


def called(call: ast.Call) -> str:
    """The last name of what is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def texts(value: ast.expr, around: ast.FunctionDef | None) -> Iterator[str]:
    """All texts that an expression can be, with 7 for what is filled in."""
    if isinstance(value, ast.Constant):
        yield from [value.value] if isinstance(value.value, str) else []
    elif isinstance(value, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "7" for part in value.values)
    elif isinstance(value, ast.IfExp):
        yield from (*texts(value.body, around), *texts(value.orelse, around))
    elif isinstance(value, ast.Dict):
        for item in value.values:
            yield from texts(item, around)
    elif isinstance(value, ast.Subscript):
        yield from texts(value.value, around)
    elif isinstance(value, ast.Name):
        if around is None or value.id not in {argument.arg for argument in around.args.args}:
            bound = list(bindings(value.id, around))
            assert bound, f"line {value.lineno}: where does {value.id} come from?"
            for item in bound:
                yield from texts(item, around)
    else:
        assert ast.unparse(value) == "str(refusal)", ast.unparse(value)


def bindings(name: str, around: ast.FunctionDef | None) -> Iterator[ast.expr]:
    """What a name is set to in a function (also by unpacking what was appended to a list), else in any module."""
    for scope in [*([ast.walk(around)] if around else []), *(tree(path).body for path in SOURCES)]:
        found = False
        for node in scope:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
                found = True
                yield node.value
            elif (
                isinstance(node, ast.For)
                and isinstance(node.target, ast.Tuple)
                and isinstance(node.iter, ast.Attribute)
            ):
                place = [ast.unparse(part) for part in node.target.elts]
                if name in place:
                    found = True
                    yield from appended(node.iter.attr, place.index(name))
        if found:
            return


def appended(name: str, place: int) -> Iterator[ast.expr]:
    """Items of the tuples that are appended to an attribute."""
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(f".{name}.append"):
                item = node.args[0]
                yield from [item.elts[place]] if isinstance(item, ast.Tuple) else []


@cache
def written() -> tuple[tuple[str, str, str], ...]:
    """Every text of a reason: where it is, what it is handed to, and the text."""
    found = []
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and (name := called(node)) in takers():
                given = dict(enumerate(node.args)) | {keyword.arg: keyword.value for keyword in node.keywords}
                starred = any(isinstance(argument, ast.Starred) for argument in node.args)
                value = node.args[-1] if starred else given.get("text", given.get(takers()[name]))
                assert value is not None, f"{path.name}:{node.lineno}: no text"
                around = function_around(node)
                found += [(f"{path.name}:{node.lineno}", name, text) for text in texts(value, around)]
    return tuple(found)


def test_texts_are_found() -> None:
    """The search finds texts given directly, through a constant, a table, a variable, a formatted string and a list."""
    found = {text for _, _, text in written()}
    assert {
        "it is an output of the graph",
        "its length enters the computation on values",
        "Unique compares all elements",
        "--only names other layers",
        "7 mixes its indices",
        "its 7 operand is computed by arithmetic that would not follow",
        "a convolution slides over it",
    } <= found


def kinds_of(text: str) -> list[str]:
    """Kinds under which a text is listed."""
    return [own for own, listed in TEXTS.items() if any(fnmatchcase(text, pattern) for pattern in listed)]


def test_every_text_has_one_kind() -> None:
    """Whatever freezes says one of the texts that are listed by kind; what a rule refuses may say anything."""
    wrong = [
        (where, text, kinds_of(text))
        for where, taker, text in written()
        if len(kinds_of(text)) != 1 and not (taker == "Refusal" and not kinds_of(text))
    ]
    assert wrong == [], "list these under one kind of TEXTS in onnxprune/report/reasons.py"
    assert all(kind(text) == (*kinds_of(text), "refused-case")[0] for _, _, text in written())


def test_no_text_is_listed_in_vain() -> None:
    """Every listed text is said somewhere."""
    said = {text for _, _, text in written()} | {SINGLE, UNLABELLED}
    listed = [pattern for own in TEXTS.values() for pattern in own]
    assert [pattern for pattern in listed if not any(fnmatchcase(text, pattern) for text in said)] == []


def test_kinds_are_closed() -> None:
    """Texts are listed under documented kinds only; a rule from outside may refuse in its own words."""
    assert set(TEXTS) <= set(KINDS)
    assert set(KINDS) - set(TEXTS) == {"refused-case"}
    assert kind("the moon is full") == "refused-case"


def test_kinds_are_documented() -> None:
    """The table of docs/report.md is the closed list."""
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    assert [line for line in page.splitlines() if line.startswith("| `")] == [
        f"| `{k}` | {v} |" for k, v in KINDS.items()
    ]


# -- every layer at the floor ------------------------------------------------------------------------------------------


def rows_of(model: ModelProto) -> tuple[Cost, tuple[FrozenRow, ...]]:
    """Couple a model and list what is frozen."""
    cost = Cost(couple(onnx_io.read(model, None)))
    return cost, frozen_rows(cost)


def unexplained(cost: Cost, rows: tuple[FrozenRow, ...]) -> list[str]:
    """Layers without a removable channel that no row concerns."""
    frozen = cost.coupling.frozen
    told = {layer for row in rows for layer in row.layers}
    stuck = [
        work.node.title
        for work in cost.works
        if all(frozen[classes].all() for axis in work.axes for classes in cost.coupling.atoms(axis))
    ]
    return [name for name in stuck if name not in told]


@pytest.mark.parametrize("key", architectures.ALL)
def test_floor_is_explained(key: str) -> None:
    """Every layer of which nothing can be removed is in some row, and every row has a kind and some layer."""
    cost, rows = rows_of(architectures.ALL[key]())
    assert unexplained(cost, rows) == []
    assert all(row.kind in KINDS and row.layers for row in rows)


@pytest.fixture
def elu_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the rule of Elu."""
    monkeypatch.delitem(ops._COUPLE, ("", "Elu"))


@pytest.mark.usefixtures("elu_is_unknown")
def test_unknown_operator_is_the_reason_on_both_sides() -> None:
    """Layers before and behind an unknown operator name it, and its kind."""
    cost, rows = rows_of(sandwich(lambda t, x: t.node("Elu", x)))
    told = {(layer, row.kind) for row in rows for layer in row.layers if "Elu" in row.reason}
    assert told == {("a", "unknown-operator"), ("z", "unknown-operator")}
    assert unexplained(cost, rows) == []


@pytest.mark.usefixtures("elu_is_unknown")
def test_layer_without_labels_is_explained() -> None:
    """A product of two tensors that an unknown operator computed names that operator, although it has no labels."""
    t = Tiny()
    y = t.node("Elu", t.input(1, 6, 4, 6))
    product = t.node("MatMul", y, t.node("Transpose", y, perm=(0, 1, 3, 2)), name="product")
    cost, rows = rows_of(t.build(product))
    assert [(row.node, row.kind, row.mac) for row in rows] == [("product", "unknown-operator", 6 * 4 * 4 * 6)]
    assert unexplained(cost, rows) == []


def test_positions_alone_are_unlabelled() -> None:
    """A product of two inputs has no labels and says so."""
    t = Tiny()
    x = t.input(1, 4, 6)
    product = t.node("MatMul", x, t.node("Transpose", x, perm=(0, 2, 1)), name="product")
    _, rows = rows_of(t.build(product))
    assert [(row.node, row.kind, row.reason) for row in rows] == [("product", "unlabelled", UNLABELLED)]


def test_single_channel() -> None:
    """A layer with one channel in and out has nothing to give."""
    t = Tiny()
    _, rows = rows_of(t.build(t.conv(t.input(1, 1, 4, 6), "a", 1, 1)))
    assert [(row.node, row.kind) for row in rows] == [("a", "single")]


def test_one_row_counts_each_layer_once() -> None:
    """Layers that one reason freezes twice, as both sides of a product, count once."""
    cost, rows = rows_of(sandwich(lambda t, x: t.node("Softmax", x, axis=1)))
    macs = cost.layers.values(cost.counts(np.ones(cost.coupling.n_classes, bool)))
    by_layer = {work.node.title: mac for work, mac in zip(cost.works, macs, strict=True)}
    assert {row.kind for row in rows} == {"input", "mixed", "output"}
    for row in rows:
        assert row.mac == sum(by_layer[layer] for layer in row.layers)


def test_refused_weights_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that a rule refused has no known cost, but its row."""
    monkeypatch.delitem(ops._COUPLE, ("", "ConvTranspose"))
    _, rows = rows_of(sandwich(lambda t, x: t.conv(x, "b", 6, 6, transpose=True)))
    assert ("b", "unknown-operator") in {(row.node, row.kind) for row in rows}
    t = Tiny()
    x = t.node("ConvTranspose", t.input(1, 2, 4, 6), t.random(2, 3, 1, 1, name="b.w"), name="b")
    _, rows = rows_of(t.build(x))
    assert [(row.node, row.kind, row.mac) for row in rows] == [("b", "unknown-operator", 0)]
