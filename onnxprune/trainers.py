"""Trainers: what turns the student of an artifact into a trained model, as a step of the iterative loop."""

from __future__ import annotations

import pathlib
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from onnxprune.errors import FileError, UsageError
from onnxprune.parcels import contents, members
from onnxprune.quality import Reading

PLACES = ("artifact", "data", "out")
STDERR = 2  # the process's own, whatever sys.stderr is


class Trainer(Protocol):
    """Trains the student in ``artifact`` and writes the trained model to ``out``.

    ``folder`` is for state that outlives a kill; ``last`` says that no pruning follows, so that nothing is gained by making
    channels weak.
    """

    def __call__(self, artifact: pathlib.Path, out: pathlib.Path, folder: pathlib.Path, *, last: bool) -> None:
        """Train."""

    def settings(self) -> dict[str, Any]:
        """What decides about the result, as plain data: a loop with other settings is another loop."""

    @property
    def sparse(self) -> bool:
        """Whether it makes weak channels weaker when asked to, so that training before the first step is worthwhile."""


@dataclass(frozen=True)
class Command:
    """A command of the user's own with places ``{artifact}``, ``{data}`` and ``{out}``; no shell is involved.

    Raises
    ------
    UsageError
        The command lacks a place or is not found; or, when it runs, it fails or writes nothing.
    """

    line: str
    data: str
    sparse: bool = False

    def __post_init__(self) -> None:
        try:
            words = shlex.split(self.line)
        except ValueError as error:
            raise UsageError(f"--trainer {self.line}: cannot be read as a command ({error})") from error
        if lacking := [place for place in ("artifact", "out") if f"{{{place}}}" not in self.line]:
            raise UsageError(
                f"--trainer {self.line}: has no {{{lacking[0]}}}; write 'CMD {{artifact}} {{data}} {{out}}'"
            )
        if not shutil.which(words[0]):
            raise UsageError(f"--trainer {self.line}: {words[0]} is no command that can be run")

    def settings(self) -> dict[str, Any]:
        """The command itself, and what the data holds."""
        return {"trainer": self.line, "data": contents(self.data), "sparse": self.sparse}

    def __call__(self, artifact: pathlib.Path, out: pathlib.Path, folder: pathlib.Path, *, last: bool) -> None:
        """Run the command; what it prints goes to stderr, for stdout is the report's.

        It writes into a folder of this run alone: one that a killed run has left behind still writes into its own.
        """
        with _attempt(out) as partial:
            values = {"artifact": str(artifact), "data": self.data, "out": str(partial)}
            words = [_filled(word, values) for word in shlex.split(self.line)]
            code = subprocess.run(words, check=False, stdout=STDERR).returncode
            if code:
                raise UsageError(
                    f"--trainer: {shlex.join(words)} ended with exit code {code}; mend it and run iterate again"
                )
            if not partial.is_file():
                raise UsageError(f"--trainer: {shlex.join(words)} did not write {partial}")
            files = members(partial)
            for name in sorted(files, key=lambda name: name == partial.name):  # the model last, after its external data
                files[name].replace(out.parent / name)


@contextmanager
def _attempt(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file of the name of ``out`` in a folder of its own beside it, which is removed in the end."""
    try:
        folder = tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise FileError(f"{out.parent}: cannot be written ({error.strerror})") from error
    try:
        yield pathlib.Path(folder) / out.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _filled(word: str, values: dict[str, str]) -> str:
    for place in PLACES:
        word = word.replace(f"{{{place}}}", values[place])
    return word


@dataclass(frozen=True)
class Reference:
    """The trainer that comes with onnxprune (extra ``train``).

    Parameters
    ----------
    recipe
        A :class:`onnxprune.train.Recipe`, its ``sparsity`` for all but the last training.
    final_epochs
        Epochs of the last training; 0 for as many as of the others.
    provider
        Execution provider of onnxruntime that judges epochs.
    """

    recipe: Any
    data: str
    reading: Reading
    final_epochs: int = 0
    moment: Callable[[Any], None] = lambda now: None
    provider: str = ""

    def __post_init__(self) -> None:
        if not pathlib.Path(self.data).exists():
            raise FileError(f"{self.data}: no such file or folder")

    @property
    def sparse(self) -> bool:
        """Whether the recipe has the regularizer."""
        return bool(self.recipe.sparsity)

    def settings(self) -> dict[str, Any]:
        """Recipe, reading, and what the data holds."""
        how = {"recipe": vars(self.recipe), "final_epochs": self.final_epochs, "reading": vars(self.reading)}
        return {**how, "data": contents(self.data)}

    def __call__(self, artifact: pathlib.Path, out: pathlib.Path, folder: pathlib.Path, *, last: bool) -> None:
        """Train in this process."""
        from onnxprune.train import finetune  # noqa: PLC0415 (needs torch)

        recipe = (
            replace(self.recipe, sparsity=0.0, epochs=self.final_epochs or self.recipe.epochs) if last else self.recipe
        )
        finetune(
            artifact, self.data, out, recipe, reading=self.reading, folder=folder, force=True, provider=self.provider,
            moment=self.moment,
        )  # fmt: skip
