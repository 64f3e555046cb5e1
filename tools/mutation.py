#!/usr/bin/env python3
"""Change the program in small ways, one at a time, and see whether a test notices.

    python tools/mutation.py [--count 300] [--seed 0] [--only GLOB]

A sample of all small changes of labels.py, ops/ and the selection (another comparison, another operator, a number one
larger, a condition turned round, a call left out) is made in a copy of the tree, one by one, and the tests of that part
run until one fails. Prints the changes that no test noticed, as file:line before -> after, and a table. Exits with 1 where
there are any.
"""

from __future__ import annotations

import argparse
import ast
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase

ROOT = pathlib.Path(__file__).resolve().parents[1]
PARTS = ("onnxprune/labels.py", "onnxprune/ops/*.py", "passes/select.py", "passes/allocate.py")
TESTS = {
    "onnxprune/labels.py": ("tests/test_labels.py", "tests/ops"),
    "passes/select.py": ("tests/passes/test_select.py", "tests/passes/test_align.py", "tests/test_properties.py"),
    "passes/allocate.py": ("tests/passes/test_rank.py", "tests/test_calibrated.py", "tests/test_sensitivity.py"),
}
"""Tests of a file, the likeliest to notice first; those of an operator's file are its own, then all of operators."""

OPERATORS = ("tests/ops", "tests/test_cost.py", "tests/test_labels.py", "tests/test_onnx_io.py", "tests/test_shapes.py")
ANOTHER: dict[type[ast.AST], type[ast.AST]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult, ast.Mod: ast.Add,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A small change: the text at an offset of a file, and what takes its place."""

    file: str
    line: int
    start: int
    before: str
    after: str

    def __str__(self) -> str:
        """Return how it is listed."""
        return f"{self.file}:{self.line} {' '.join(self.before.split())}  ->  {' '.join(self.after.split())}"


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in a node's place."""
    other = deepcopy(node)
    if isinstance(other, ast.Compare) and type(other.ops[0]) in ANOTHER:
        other.ops[0] = ANOTHER[type(other.ops[0])]()  # type: ignore[assignment]
        yield other
    elif isinstance(other, ast.BinOp | ast.BoolOp) and type(other.op) in ANOTHER:
        other.op = ANOTHER[type(other.op)]()  # type: ignore[assignment]
        yield other
    elif isinstance(other, ast.UnaryOp) and isinstance(other.op, ast.Not | ast.USub | ast.Invert):
        yield other.operand
    elif isinstance(other, ast.Constant) and isinstance(other.value, bool):
        yield ast.Constant(not other.value)
    elif isinstance(other, ast.Constant) and isinstance(other.value, int):
        yield ast.Constant(other.value + 1)
    elif isinstance(other, ast.IfExp):
        yield ast.IfExp(ast.UnaryOp(ast.Not(), other.test), other.body, other.orelse)
    elif isinstance(other, ast.Expr) and isinstance(other.value, ast.Call):
        yield ast.Pass()
    elif isinstance(other, ast.Continue):
        yield ast.Break()


def mutants(file: str) -> Iterator[Mutant]:
    """Yield all small changes of a file; types, decorators and texts stay."""
    source = (ROOT / file).read_text(encoding="utf-8")
    lines = source.encode().splitlines(keepends=True)
    begins = [sum(map(len, lines[:number])) for number in range(len(lines))]

    def walk(node: ast.AST) -> Iterator[Mutant]:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "format_spec") or isinstance(node, ast.JoinedStr):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from walk(child)
        if not isinstance(node, ast.expr | ast.stmt):
            return
        start, stop = begins[node.lineno - 1] + node.col_offset, begins[node.end_lineno - 1] + node.end_col_offset  # type: ignore
        before = source.encode()[start:stop].decode()
        for other in changed(node):
            text = ast.unparse(ast.fix_missing_locations(other))
            yield Mutant(file, node.lineno, start, before, text if isinstance(node, ast.stmt) else f"({text})")

    yield from walk(ast.parse(source))


def tests_of(file: str) -> tuple[str, ...]:
    """Tests of a file."""
    if file in TESTS:
        return TESTS[file]
    own = f"tests/ops/test_{pathlib.Path(file).stem}.py"
    return (own, *OPERATORS) if (ROOT / own).exists() else OPERATORS


def notices(tree: pathlib.Path, tests: Iterable[str], limit: float | None = None) -> str:
    """Run tests in a tree; how a change ended: killed, survived or timeout."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        *tests,
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(tree),
    }
    try:
        done = subprocess.run(
            command, check=False, cwd=tree, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return "timeout"
    return "killed" if done.returncode else "survived"


def apply(tree: pathlib.Path, mutant: Mutant) -> bytes:
    """Make a change; return what the file was."""
    path = tree / mutant.file
    whole = path.read_bytes()
    stop = mutant.start + len(mutant.before.encode())
    path.write_bytes(whole[: mutant.start] + mutant.after.encode() + whole[stop:])
    return whole


def main() -> int:
    """Sample, try, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="how many changes to try")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", default="*", metavar="GLOB", help="files to change")
    parser.add_argument(
        "--limit", type=float, default=600, metavar="SECONDS", help="longest run of the tests of one change"
    )
    given = parser.parse_args()
    files = [str(path.relative_to(ROOT)) for part in PARTS for path in sorted(ROOT.glob(part))]
    found = [mutant for file in files if fnmatchcase(file, given.only) for mutant in mutants(file)]
    chosen = random.Random(given.seed).sample(found, min(given.count, len(found)))
    results: dict[str, Counter[str]] = {}
    survivors = []
    with tempfile.TemporaryDirectory(prefix="onnxprune.") as folder:
        tree = pathlib.Path(folder) / "tree"
        tree.mkdir()
        for name in ("onnxprune", "passes", "fixtures", "tests", "pyproject.toml", "README.md"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tree / name)
        if notices(tree, sorted({test for mutant in chosen for test in tests_of(mutant.file)})) != "survived":
            print("the tests fail on the program as it is", file=sys.stderr)
            return 2
        for number, mutant in enumerate(chosen, 1):
            begin, whole = time.perf_counter(), apply(tree, mutant)
            ended = notices(tree, tests_of(mutant.file), given.limit)
            (tree / mutant.file).write_bytes(whole)
            results.setdefault(mutant.file, Counter())[ended] += 1
            survivors += [mutant] if ended == "survived" else []
            print(
                f"{number}/{len(chosen)} {ended} {time.perf_counter() - begin:.0f} s {mutant}",
                file=sys.stderr,
                flush=True,
            )
    print(*survivors, sep="\n")
    print(f"\n{len(found)} changes are possible, {len(chosen)} were tried (seed {given.seed})\n")
    print("| file | killed | timeout | survived |\n|---|---|---|---|")
    for file, counts in sorted(results.items()):
        print(f"| {file} | {counts['killed']} | {counts['timeout']} | {counts['survived']} |")
    total = sum(results.values(), Counter())
    print(f"| all | {total['killed']} | {total['timeout']} | {total['survived']} |")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
