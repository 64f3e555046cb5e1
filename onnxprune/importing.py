"""Objects that a user names as ``module:function``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onnxprune.errors import UsageError


def named(name: str, role: str) -> Any:
    """Import what ``module:function`` names; a module may lie in the current folder.

    Parameters
    ----------
    role
        What it is to be, such as ``metric``; messages begin with it.

    Raises
    ------
    UsageError
        The name has another form, the module does not load, or has nothing of that name.
    """
    module, _, path = name.partition(":")
    if not module or not path:
        raise UsageError(f"{role} {name}: write it as module:function")
    try:
        with _current_folder_last():
            found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UsageError(f"{role} {name}: importing {module} fails: {error}") from error
        raise UsageError(
            f"{role} {name}: there is no module {module}; install it, set PYTHONPATH, or go to its folder"
        ) from error
    except (Exception, SystemExit) as error:  # whatever the module does on import
        raise UsageError(f"{role} {name}: importing {module} fails: {told(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{role} {name}: module {module} has no {path}")
        found = getattr(found, part)
    return found


def told(error: BaseException) -> str:
    """Tell in one line what another's code raised."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def _current_folder_last() -> Iterator[None]:
    """Let modules of the current folder be imported, where no installed one has their name."""
    folder = str(Path.cwd())
    added = folder not in sys.path
    if added:
        sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)
