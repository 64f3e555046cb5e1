#!/usr/bin/env python3
"""Change one expression of the program at a time and see whether the tests notice.

    python tools/mutation.py [--mutants 300] [--seed 0] [--jobs 1] [--only onnxprune/ops] [--out mutation.jsonl]

Mutants are drawn from the labels, the rules of operators and the selection: a comparison, sign, condition or constant
becomes another one, a call is left out. A first run without any change learns which tests run which lines. A mutant then
runs the tests that run its line, those of its file first, the quick ones of the others until ``BUDGET`` seconds are filled,
up to the first failure. A line per mutant goes to ``--out``, from where a run that was broken off goes on. Prints a table
and what survived; exits with 1 where something did. Needs coverage (extra "dev").
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
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.machinery import SourceFileLoader
from types import CodeType
from typing import Any

import coverage
import numpy as np  # noqa: F401 (here once, not in every process)
import onnx  # noqa: F401
import onnx_graphsurgeon  # noqa: F401
import onnxruntime  # noqa: F401
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = ["onnxprune/labels.py", "onnxprune/ops/*.py", "passes/select.py", "passes/allocate.py"]
LIMIT = 300
"""Seconds of a processor after which a mutant counts as noticed: it does not end. It may wait ten times as long."""

BUDGET = 120
"""Seconds that the tests of other files may take, by the first run."""

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
    "rescale": ["tests/ops/test_rescale.py", "tests/passes/test_compensate.py"],
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
        if isinstance(node, ast.JoinedStr | ast.Assert | ast.Raise) or getattr(node, "arg", "") == "strict":
            return  # texts, and what only asserts something
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


def tests_of(file: str) -> tuple[list[str], list[str]]:
    """Files of tests to run: its own, and the others."""
    path = pathlib.Path(file)
    if path.parts[0] == "passes":
        own = ["tests/passes/test_rank.py"] if path.stem == "allocate" else []
        return [*own, *SELECTION[:2]], [*SELECTION[2:], "tests/test_calibrated.py"]
    own = OWN.get(path.stem, [f"tests/ops/test_{path.stem}.py"]) if path.stem != "labels" else RULES[1:2]
    return own, [test for test in RULES if test not in own]


@dataclass(frozen=True)
class Known:
    """What the run without any change has shown: seconds of every test, and the tests that run a line of a file."""

    seconds: dict[str, float]
    lines: dict[str, dict[str, list[str]]]

    def chosen(self, places: Sequence[str], file: str, line: int, budget: float = float("inf")) -> list[str]:
        """Tests of files or folders ``places`` that run a line, the quickest first; all of them where none runs it.

        Without a budget the others follow: what a test computes once may serve those after it.
        """
        found = self.lines.get(file, {}).get(str(line)) or self.seconds
        tests = sorted((test for test in found if test.startswith(tuple(places))), key=self.seconds.__getitem__)
        if budget == float("inf"):
            tests += sorted(set(self.seconds).difference(tests), key=self.seconds.__getitem__)
            tests = [test for test in tests if test.startswith(tuple(places))]
        sums = itertools.accumulate(map(self.seconds.__getitem__, tests))
        return [test for test, total in zip(tests, sums, strict=True) if total <= budget]


class Only:
    """Plugin that runs chosen tests, those of a file together, the quickest first."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._places = {test: place for place, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave the others out."""
        items[:] = [item for item in items if item.nodeid in self._places]
        items.sort(key=lambda item: self._places[item.nodeid])
        first = {item.fspath: place for place, item in reversed([*enumerate(items)])}
        items.sort(key=lambda item: first[item.fspath])


class Recorder:
    """Plugin that writes what :class:`Known` holds to a file."""

    def __init__(self, measured: coverage.Coverage, out: str) -> None:
        self._measured, self._out = measured, out
        self._seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Measure one test."""
        self._measured.switch_context(item.nodeid)
        begin = time.process_time()
        done = yield
        self._seconds[item.nodeid] = time.process_time() - begin
        return done

    def pytest_sessionfinish(self) -> None:
        """Write everything."""
        self._measured.stop()
        data = self._measured.get_data()
        lines = {
            str(pathlib.Path(file).relative_to(ROOT)): {
                line: [*filter(None, tests)] for line, tests in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }
        pathlib.Path(self._out).write_text(json.dumps({"seconds": self._seconds, "lines": lines}))


def learn(files: Sequence[str], kept: pathlib.Path | None) -> Known:
    """Run the tests without any change, or read what an earlier run has kept."""
    if kept is None or not kept.exists():
        places = sorted({test for file in files for tests in tests_of(file) for test in tests})
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/known.json"
            if run(partial(_measure, places, out), 10 * LIMIT) != "survived":
                sys.exit("tests fail without any change")
            text = pathlib.Path(out).read_text()
        if kept is None:
            return Known(**json.loads(text))
        kept.write_text(text)
    return Known(**json.loads(kept.read_text()))


def _measure(places: Sequence[str], out: str) -> int:
    measured = coverage.Coverage(data_file=None, include=FILES, config_file=False)
    measured.start()
    return _pytest(places, Recorder(measured, out))


def _pytest(places: Sequence[str], plugin: object) -> int:
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *places], [plugin]))


def judge(mutant: Mutant, tree: ast.Module, known: Known) -> str:
    """Run the tests of a mutant's own file, then others: killed, survived or endless."""
    own, others = tests_of(mutant.file)
    for places, budget in ((own, float("inf")), (others, BUDGET)):
        tests = known.chosen(places, mutant.file, mutant.line, budget)
        files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
        if files and (outcome := run(partial(_mutated, files, tests, mutant.file, tree))) != "survived":
            return outcome
    return "survived"


def _mutated(files: Sequence[str], tests: Sequence[str], file: str, tree: ast.Module) -> int:
    usual = SourceFileLoader.get_code

    def get_code(self: SourceFileLoader, name: str) -> CodeType | None:
        if pathlib.Path(self.path).resolve() == ROOT / file:
            return compile(tree, self.path, "exec")
        return usual(self, name)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    return _pytest(files, Only(tests))


def run(tests: Callable[[], int], limit: int = LIMIT) -> str:
    """Run tests in a process of its own that may take ``limit`` seconds of a processor: killed, survived or endless."""
    begin = time.monotonic()
    child = os.fork()
    if not child:
        _alone(tests, limit)
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        if time.monotonic() - begin > 10 * limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "endless"
        time.sleep(0.05)
    ended = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    return "endless" if ended else "killed" if status else "survived"


def _alone(tests: Callable[[], int], limit: int) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    code = 1
    try:
        code = tests()
    finally:
        os._exit(code)


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
        learned = learn(files, chosen.out and chosen.out.with_suffix(".known.json"))

        def one(place: tuple[str, int]) -> tuple[Mutant, str]:
            mutant, tree = made(*place)
            outcome = known.get(mutant.key) or judge(mutant, tree, learned)
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
