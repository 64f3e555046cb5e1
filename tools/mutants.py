#!/usr/bin/env python3
"""Prune mutants of valid models (tests/mutation), and check that each is pruned, proved and valid, or refused in a line.

    python tools/mutants.py [--mutants 20000] [--seed 0] [--start N] [--only KIND] [--family F] [--save FOLDER]
                            [--zoo FOLDER] [--no-zoo]
    python tools/mutants.py --judge FOLDER...

Seeds are the models of the operators' tests, random graphs, architectures, fixtures and, where it is there, the small models
of the zoo beside the project, pruned to few channels; ``--zoo`` keeps those for the next run. A mutant goes through one to
three changes; the same seed makes the same mutants. They run in a process of their own, which is started anew where a mutant
kills it or takes more than ``--timeout`` seconds. Half of them go through the command line, half through Python.

FAILED is an exception that is no error of onnxprune's, exit code 1, a message of more than three lines, an input that was
changed, a result that onnx.checker or onnxruntime rejects although they accept the mutant, that does not verify or misses
its target, a timeout, or a process that died. ``--save`` keeps failing mutants as folders, shrunk; ``--judge`` runs such.
The table counts, per kind of change, how the mutants that went through it ended; exit code 1 where any failed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import pathlib
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "fixtures")]

from mutation import KINDS, Mutant, mutant, readable  # noqa: E402 (the tests' folder must be found first)
from mutation.judge import FAILED, Verdict, judge  # noqa: E402
from mutation.seeds import Seeds, strip  # noqa: E402
from mutation.shrinking import shrink  # noqa: E402

from onnxprune import runtime  # noqa: E402

RENEW = 2000  # mutants after which a process is replaced: onnxruntime's caches grow
LENIENT = 4  # number of a mutant that keeps 0.7 of its MAC
SAVED = 3  # mutants that are kept of one failure
UNPROVED = 5  # exit code of a proof that failed: nothing was written, and yet a label may be wrong


# -- in the process that runs mutants --------------------------------------------------------------------------------


def work(seeds: Seeds, seed: int) -> None:
    """Answer every line of standard input: a number of a mutant, or a folder."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints does not disturb the answers
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, int):
            files, number = mutant(seeds, seed, asked).files, asked
        else:
            files, number = read(pathlib.Path(asked[0])), asked[1]
        print(judge(files, number).to_json(), file=answers, flush=True)


def read(folder: pathlib.Path) -> dict[str, bytes]:
    """Files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".txt"}


# -- in the process of them all --------------------------------------------------------------------------------------


class Worker:
    """A process that judges mutants one after another, and is started anew where one ends it."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self._chosen, self._process, self._age = chosen, None, 0
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as this)

    def ask(self, question: object) -> Verdict:
        """Judge a mutant by its number, or what lies in a folder."""
        if self._age >= RENEW:
            self.close()
        if self._process is None:
            self._start()
        process, self._age = self._process, self._age + 1
        self._errors.truncate(0)
        process.stdin.write(json.dumps(question).encode() + b"\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            ready = selector.select(self._chosen.timeout + (60 if self._age == 1 else 0))
        line = process.stdout.readline() if ready else b""
        if line:
            return Verdict(**json.loads(line))
        if not ready:
            process.send_signal(signal.SIGUSR1)  # faulthandler tells where it hangs
            time.sleep(0.5)
        self.close()
        ended = f"ended by signal {-process.returncode}" if process.returncode else "ended"
        why = ended if ready else f"no answer within {self._chosen.timeout:g} s"
        return Verdict(FAILED, 1, f"{self._trace()}\n{self._where()}: {why}")

    def _start(self) -> None:
        c = self._chosen
        words = [
            "--work",
            "--seed",
            c.seed,
            "--memory",
            c.memory,
            *(["--zoo", c.zoo] if c.zoo else []),
            *(["--family", c.family] if c.family else []),
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", __file__, *map(str, words)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
        self._age = 0

    def _trace(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip("\0")[-4000:]

    def _where(self) -> str:
        own = [line.strip() for line in self._trace().splitlines() if "/onnxprune/" in line or "/passes/" in line]
        return " < ".join(line.rpartition("/")[2] for line in own[:3])

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None


def save(found: Mutant, number: int, verdict: Verdict, worker: Worker, folder: pathlib.Path) -> pathlib.Path:
    """Shrink a failing mutant as long as it fails alike, and keep it."""
    with tempfile.TemporaryDirectory() as name:

        def fails(files: dict[str, bytes]) -> bool:
            place = pathlib.Path(name)
            for file, data in files.items():
                (place / file).write_bytes(data)
            return worker.ask([name, number]).key == verdict.key

        files = shrink(found.files, readable(found.files), fails) if "no answer" not in verdict.key else found.files
    place = folder / f"{number}"
    place.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        (place / file).write_bytes(data)
    (place / "why.txt").write_text(
        f"{number}\n{found.seed}\n{', '.join(found.kinds)}\n{verdict.text}\n", encoding="utf-8"
    )
    return place


def title(verdict: Verdict) -> str:
    """Heading of the column that counts a verdict."""
    return f"{verdict.outcome} {verdict.code}" if verdict.code and verdict.outcome != FAILED else verdict.outcome


def table(outcomes: dict[str, Counter[str]]) -> Iterator[str]:
    """Lines of the result table, a kind of change each."""
    columns = sorted({outcome for row in outcomes.values() for outcome in row}, key=lambda name: (name == FAILED, name))
    yield f"{'kind of change':36}" + "".join(f"{name:>12}" for name in columns)
    for kind, row in outcomes.items():
        yield f"{kind:36}" + "".join(f"{row[name] or '':>12}" for name in columns)


def fuzz(chosen: argparse.Namespace) -> int:
    """Run the mutants, print failures as they come and the table at the end; return how many failed."""
    seeds, worker = _seeds(chosen), Worker(chosen)
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS} | {"all mutants": Counter()}
    failures: dict[str, list[int]] = defaultdict(list)
    unproved: list[str] = []
    begin, slowest = time.perf_counter(), (0.0, 0)
    numbers = range(chosen.start, chosen.start + chosen.mutants)
    if chosen.only:
        places = [place for place, kind in enumerate(KINDS) if chosen.only in kind]
        numbers = [
            number
            for number in range(chosen.start, chosen.start + 200 * chosen.mutants)
            if number % len(KINDS) in places
        ]
        numbers = numbers[: chosen.mutants]
    ran = 0
    with contextlib.closing(worker), contextlib.suppress(KeyboardInterrupt):
        for number in numbers:
            at = time.perf_counter()
            verdict = worker.ask(number)
            ran += 1
            slowest = max(slowest, (time.perf_counter() - at, number))
            found = mutant(seeds, chosen.seed, number)
            for kind in (*dict.fromkeys(found.kinds), "all mutants"):
                outcomes[kind][title(verdict)] += 1
            if verdict.code == UNPROVED and verdict.outcome != FAILED:
                unproved.append(f"{number} {found.seed}: {', '.join(found.kinds)}\n    {verdict.text.splitlines()[-1]}")
            if verdict.outcome == FAILED:
                failures[verdict.key].append(number)
                print(
                    f"{number} {found.seed}: {', '.join(found.kinds)}\n    {verdict.text.splitlines()[-1]}", flush=True
                )
                if chosen.save and len(failures[verdict.key]) <= SAVED:
                    print(f"    saved {save(found, number, verdict, worker, chosen.save)}", flush=True)
    seconds = time.perf_counter() - begin
    print(*table(outcomes), sep="\n")
    for key, failed in sorted(failures.items(), key=lambda item: -len(item[1])):
        print(f"{len(failed)} times (first {failed[0]}): {key}")
    if unproved:
        print("refused by the proof alone:", *unproved, sep="\n")
    print(f"{ran} mutants in {seconds:.0f} s, the slowest {slowest[0]:.1f} s ({slowest[1]})")
    return sum(map(len, failures.values()))


def _seeds(chosen: argparse.Namespace) -> Seeds:
    return Seeds(chosen.zoo.glob("*.onnx") if chosen.zoo else (), chosen.family)


def main() -> None:
    """Run mutants, or folders that were saved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--only", default="", metavar="KIND", help="changes whose name has this in it")
    parser.add_argument("--timeout", type=float, default=30)
    parser.add_argument("--save", type=pathlib.Path, metavar="FOLDER", help="for failing mutants")
    parser.add_argument("--zoo", type=pathlib.Path, metavar="FOLDER", help="for the stripped models of the zoo")
    parser.add_argument("--no-zoo", action="store_true")
    parser.add_argument("--family", default="", choices=["case", "random", "architecture", "fixture", "zoo"])
    parser.add_argument("--judge", type=pathlib.Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--memory", type=int, default=4, metavar="GIB", help="of address space that a process may take")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        faulthandler.register(signal.SIGUSR1)
        runtime.RUN_SECONDS = 5
        resource.setrlimit(resource.RLIMIT_AS, (chosen.memory << 30, chosen.memory << 30))
        work(_seeds(chosen), chosen.seed)
        return
    with tempfile.TemporaryDirectory(prefix="onnxprune.zoo.") as name:
        if not chosen.no_zoo and chosen.family in ("", "zoo"):
            chosen.zoo = chosen.zoo or pathlib.Path(name)
            chosen.zoo.mkdir(parents=True, exist_ok=True)
            strip(chosen.zoo)
        if chosen.judge:
            with contextlib.closing(Worker(chosen)) as worker:
                verdicts = [(folder, worker.ask([str(folder), _number(folder)])) for folder in chosen.judge]
            for folder, verdict in verdicts:
                print(
                    folder, verdict.outcome, verdict.code or "", verdict.text.splitlines()[-1] if verdict.text else ""
                )
            sys.exit(any(verdict.outcome == FAILED for _, verdict in verdicts))
        sys.exit(1 if fuzz(chosen) else 0)


def _number(folder: pathlib.Path) -> int:
    why = folder / "why.txt"
    return int(why.read_text(encoding="utf-8").splitlines()[0]) if why.is_file() else 0


if __name__ == "__main__":
    main()
