#!/usr/bin/env python3
"""Change one expression of the program at a time and see whether the tests notice.

    python tools/mutation.py [--mutants 300] [--seed 0] [--jobs 1] [--only onnxprune/ops] [--out mutation.jsonl]

Mutants are drawn from the labels, the rules of operators and the selection: a comparison, sign, condition or constant
becomes another one, a call is left out. Each runs the tests of its file first, then those of the others of its kind, up
to the first failure. A line per mutant goes to ``--out``, from where a run that was broken off goes on. Prints a table and
what survived; exits with 1 where something did.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import pathlib
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.machinery import SourceFileLoader
from types import CodeType
from typing import Any

import numpy as np  # noqa: F401 (here once, not in every process)
import onnx  # noqa: F401
import onnx_graphsurgeon  # noqa: F401
import onnxruntime  # noqa: F401
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = ["onnxprune/labels.py", "onnxprune/ops/*.py", "passes/select.py", "passes/allocate.py"]
LIMIT = 600
"""Seconds of a processor after which a mutant counts as noticed: it does not end. It may wait ten times as long."""

MEMORY = 8 << 30
OUTCOMES = ("killed", "endless", "survived")

RULES = ["tests/ops", "tests/test_labels.py", "tests/passes/test_trace.py", "tests/passes/test_follow_pins.py"]
RULES += [
    "tests/passes/test_unusual_graphs.py",
    "tests/test_cost.py",
    "tests/test_dtypes.py",
    "tests/test_custom_ops.py",
]
SELECTION = ["tests/passes/test_select.py", "tests/passes/test_align.py", "tests/test_cost.py", "tests/test_latency.py"]
OWN = {
    "__init__": ["tests/test_custom_ops.py"],
    "attention": ["tests/ops/test_attention.py", "tests/test_attention_modes.py"],
    "elementwise": ["tests/ops/test_elementwise.py", "tests/ops/test_shared.py"],
    "integer": ["tests/ops/test_integer.py", "tests/test_sibling.py"],
    "quantised": ["tests/ops/test_quantize.py", "tests/ops/test_integer.py", "tests/test_sibling.py"],
    "regress": ["tests/ops/test_regress.py", "tests/passes/test_compensate.py"],
    "rescale": ["tests/passes/test_follow_pins.py"],
}
"""Tests of a file of rules where they are not ``tests/ops/test_NAME.py`` alone."""


@dataclass(frozen=True)
class Mutant:
    """One change: the ``number``-th that can be made in a file, where it is, and what stands there before and after."""

    file: str
    number: int
    line: int
    before: str
    after: str

    @property
    def key(self) -> str:
        """What tells it from others, also after edits elsewhere in its file."""
        return f"{self.file} {self.before} -> {self.after}"


# -- changes -----------------------------------------------------------------------------------------------------------

_OTHER = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum"}
_PASSED_BY = ("annotation", "returns", "decorator_list")


def changes(tree: ast.Module) -> Iterator[tuple[ast.AST, int, Callable[[], None]]]:
    """Every change of a tree: the statement to show, its line, and what makes the change in place."""

    def visit(node: ast.AST, replace: Callable[[Any], None], shown: ast.AST, line: int) -> Iterator:
        if isinstance(node, ast.JoinedStr | ast.Assert | ast.Raise):
            return  # texts, and what only tells a type checker something
        line = getattr(node, "lineno", line)
        shown = node if isinstance(node, ast.stmt) else shown
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield shown, line, lambda: replace(ast.Pass())
        for change in _own(node, replace):
            yield shown, line, change
        for name, value in ast.iter_fields(node):
            if name in _PASSED_BY:
                continue
            if isinstance(value, ast.AST):
                set_ = partial(setattr, node, name)
                if name == "test":
                    yield shown, line, partial(set_, ast.UnaryOp(ast.Not(), value))
                yield from visit(value, set_, shown, line)
            elif isinstance(value, list):
                for place, child in enumerate(value):
                    if isinstance(child, ast.AST):
                        yield from visit(child, partial(value.__setitem__, place), shown, line)

    return visit(tree, lambda _: None, tree, 0)


def _own(node: ast.AST, replace: Callable[[Any], None]) -> Iterator[Callable[[], None]]:
    """Changes of the node itself, none of its children."""
    match node:
        case ast.Compare():
            for place, operator in enumerate(node.ops):
                yield partial(node.ops.__setitem__, place, _OTHER[type(operator)]())
        case ast.BoolOp() | ast.BinOp() | ast.AugAssign() if type(node.op) in _OTHER:
            yield partial(setattr, node, "op", _OTHER[type(node.op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            yield partial(replace, node.operand)
        case ast.Constant(value=bool()):
            yield partial(setattr, node, "value", not node.value)
        case ast.Constant(value=int() | float()):
            yield partial(setattr, node, "value", node.value + 1)
        case ast.Name(id=name) if name in _NAMES:
            yield partial(setattr, node, "id", _NAMES[name])
        case ast.Attribute(attr=name) if name in _NAMES:
            yield partial(setattr, node, "attr", _NAMES[name])


def made(file: str, number: int) -> tuple[Mutant, ast.Module]:
    """The ``number``-th mutant of a file, and its tree."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    shown, line, change = next(itertools.islice(changes(tree), number, None))
    before = _texts(shown)
    change()
    after = _texts(shown)
    if after == before:  # the call is left out, from where it stood
        after = ["pass"]
    differing = [pair for pair in zip(before, after, strict=False) if pair[0] != pair[1]]
    return Mutant(file, number, line, *differing[0]), ast.fix_missing_locations(tree)


def _texts(node: ast.AST) -> list[str]:
    return [line.strip() for line in ast.unparse(node).splitlines()]


def drawn(count: int, seed: int, only: str) -> list[tuple[str, int]]:
    """Files and numbers of so many mutants, each change of each file being as likely as another."""
    files = sorted(str(path.relative_to(ROOT)) for pattern in FILES for path in ROOT.glob(pattern))
    every = [
        (file, number)
        for file in files
        if file.startswith(only)
        for number in range(sum(1 for _ in changes(ast.parse((ROOT / file).read_text(encoding="utf-8")))))
    ]
    return random.Random(seed).sample(every, min(count, len(every)))


# -- tests -------------------------------------------------------------------------------------------------------------


def tests_of(file: str) -> list[str]:
    """Test files to run, those most likely to fail first."""
    path = pathlib.Path(file)
    if path.parts[0] == "passes":
        return [
            *(["tests/passes/test_rank.py"] if path.stem == "allocate" else []),
            *SELECTION,
            "tests/test_calibrated.py",
        ]
    own = OWN.get(path.stem, [f"tests/ops/test_{path.stem}.py"])
    return [*own, *RULES] if path.stem != "labels" else RULES[1:] + RULES[:1]


def run(tests: list[str], file: str, tree: ast.Module | None) -> str:
    """Run tests in a process of its own that reads ``tree`` in the place of a file: killed, survived or endless."""
    begin = time.monotonic()
    child = os.fork()
    if not child:
        _test(tests, file, tree)
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        if time.monotonic() - begin > 10 * LIMIT:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "endless"
        time.sleep(0.05)
    ended = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    return "endless" if ended else "killed" if status else "survived"


def _test(tests: list[str], file: str, tree: ast.Module | None) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    if tree is not None:
        usual = SourceFileLoader.get_code

        def get_code(self: SourceFileLoader, name: str) -> CodeType | None:
            if pathlib.Path(self.path).resolve() == ROOT / file:
                return compile(tree, self.path, "exec")
            return usual(self, name)

        SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    code = 1
    try:
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])
    finally:
        os._exit(int(code))


def main() -> None:
    """Run what is not known yet; print the table and the survivors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", metavar="PREFIX", help="of file names")
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="FILE", help="JSON lines, one per mutant; known ones are kept"
    )
    chosen = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT)]
    places = drawn(chosen.mutants, chosen.seed, chosen.only)
    print(f"--seed {chosen.seed} --mutants {len(places)}", flush=True)
    known = {}
    if chosen.out and chosen.out.exists():
        known = {row["key"]: row["outcome"] for row in map(json.loads, chosen.out.read_text().splitlines())}
    with ThreadPoolExecutor(chosen.jobs) as pool:
        files = sorted({file for file, _ in places})
        if places and run(sorted({test for file in files for test in tests_of(file)}), "", None) != "survived":
            sys.exit("tests fail without any change")

        def one(place: tuple[str, int]) -> tuple[Mutant, str]:
            mutant, tree = made(*place)
            outcome = known.get(mutant.key) or run(tests_of(mutant.file), mutant.file, tree)
            if chosen.out and mutant.key not in known:
                with chosen.out.open("a") as file:
                    file.write(json.dumps({"key": mutant.key, **asdict(mutant), "outcome": outcome}) + "\n")
            return mutant, outcome

        results = [*pool.map(one, places)]
    table = Counter((mutant.file, outcome) for mutant, outcome in results)
    print(f"{'':34}{'killed':>9}{'endless':>9}{'survived':>9}")
    for file in [*files, ""]:
        numbers = [sum(n for (f, o), n in table.items() if o == outcome and f == (file or f)) for outcome in OUTCOMES]
        print(f"{file or 'all':34}" + "".join(f"{number:9}" for number in numbers))
    survivors = sorted((m for m, outcome in results if outcome == "survived"), key=lambda m: (m.file, m.line))
    for mutant in survivors:
        print(f"{mutant.file}:{mutant.line}  {mutant.before}  ->  {mutant.after}")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
