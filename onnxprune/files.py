"""Files and folders of a run: plain ones are read, temporary ones carry their owner's name, results are written alone."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import re
import shutil
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from onnxprune.errors import FileError, UsageError

try:
    import fcntl
except ImportError:  # Windows has no locks on folders
    fcntl = None  # type: ignore[assignment]

TOML_BYTES = 1 << 15
STALE_SECONDS = 24 * 3600
"""Age at which what another machine left is taken for abandoned: of processes there nobody here can know."""


def require_plain(path: str | os.PathLike) -> None:
    """Raise :class:`FileError` where a path is neither a plain file nor a folder; one that is missing passes.

    A device never ends, and a pipe may never begin.
    """
    file = pathlib.Path(path)
    try:
        strange = file.exists() and not file.is_file() and not file.is_dir()
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from error
    if strange:
        raise FileError(f"{path}: is a pipe, a device or a socket; give a plain file")


def read_toml(path: str | os.PathLike) -> dict[str, Any]:
    """Read a TOML file of at most :data:`TOML_BYTES`: Python takes time with the square of a key's length."""
    require_plain(path)
    file = pathlib.Path(path)
    try:
        if file.stat().st_size > TOML_BYTES:
            raise UsageError(f"{path}: has more than {TOML_BYTES} bytes, too many for a file of options")
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not valid TOML ({error})") from error


def owned() -> str:
    """What the names of this process's temporary files hold: who it is, and where its number means anything."""
    return f"onnxprune-{_place()}-{os.getpid()}-"


_OWNED = re.compile(r"(\..*\.)?onnxprune-([0-9a-f]{12})-([0-9]+)-\w+")


@cache
def _place() -> str:
    """Hash of machine, boot and namespace: within one of it a process number belongs to one process."""
    facts = [platform.node()]
    with suppress(OSError):
        facts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        facts.append(str(pathlib.Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:12]


def sweep(folder: pathlib.Path) -> None:
    """Remove temporary files and folders whose owner is dead; those of living ones, and of unknown ones, stay."""
    place = _place()
    with suppress(OSError):
        for path in folder.iterdir():
            found = _OWNED.fullmatch(path.name)
            if found and _abandoned(path, found[2] == place, int(found[3])):
                with suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _abandoned(path: pathlib.Path, here: bool, process: int) -> bool:
    if not here:
        return time.time() - path.lstat().st_mtime > STALE_SECONDS
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # somebody else's, and alive
        return False
    return False


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Make a folder for temporary files; those that killed runs left go first.

    Raises
    ------
    FileError
        There is no place for one.
    """
    try:
        sweep(pathlib.Path(tempfile.gettempdir()))
        return tempfile.TemporaryDirectory(prefix=owned())
    except OSError as error:
        raise FileError(
            f"no folder for temporary files can be made ({error.strerror}); set TMPDIR to one that can be written"
        ) from error


@contextmanager
def alone_in(folder: pathlib.Path) -> Iterator[None]:
    """Let no other run write its results into a folder: model, plan and report are those of one run.

    File systems without locks let every run write.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # writing will tell
        yield
        return
    try:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
