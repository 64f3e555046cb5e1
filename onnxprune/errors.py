"""Every error a user can meet, as one tree.

OnnxPruneError               exit code 1
├── UsageError               2   options that contradict, OUT exists
├── ModelError               3   the model is unreadable, invalid or cannot run
├── TooLongError             3   one run of the model took longer than any should
├── BudgetError              4   the target is out of reach
├── ProofError               5   the pruned graph is not the masked original
├── QualityError             6   the quality guard is not met
└── FileError                7   reading or writing a file failed
"""

from __future__ import annotations


class OnnxPruneError(Exception):
    """Base of all errors; ``exit_code`` is what the command line ends with."""

    exit_code = 1


class UsageError(OnnxPruneError):
    """Options contradict each other, or OUT exists and may not be replaced."""

    exit_code = 2


class ModelError(OnnxPruneError):
    """The model cannot be read, is invalid, or cannot run."""

    exit_code = 3


class TooLongError(OnnxPruneError):
    """The model was still running after longer than any run should take: no other input shape is tried."""

    exit_code = 3


class BudgetError(OnnxPruneError):
    """The target is out of reach.

    Parameters
    ----------
    message
        What was asked, what is possible, what to do.
    floor
        Smallest reachable cost, absolute.
    culprits
        Names of the layers that cost most at the floor.
    """

    exit_code = 4

    def __init__(self, message: str, floor: float = float("nan"), culprits: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.floor = floor
        self.culprits = culprits


class ProofError(OnnxPruneError):
    """The pruned graph does not equal the masked original; ``failures`` says where."""

    exit_code = 5

    def __init__(self, message: str, failures: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.failures = failures


class QualityError(OnnxPruneError):
    """The pruned model's quality is below what the guard allows."""

    exit_code = 6


class FileError(OnnxPruneError):
    """A file could not be read or written (permissions, disk full)."""

    exit_code = 7
