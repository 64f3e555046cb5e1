"""Files that make up a model or a data set: what they hold, and how they travel to a machine that does not have them."""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxprune import onnx_io
from onnxprune.errors import OnnxPruneError, UsageError
from onnxprune.files import temporary_folder
from onnxprune.options import Options

FIELDS = ("calib", "sensitivity", "latency_table", "profile")
"""Fields of Options that may name files."""


@dataclass(frozen=True)
class Parcel:
    """The files of one path, by their names relative to its folder."""

    path: str
    files: Mapping[str, bytes]


def members(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """All files that a model (with external data), a file or a folder consists of, by name relative to its folder."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return {file.relative_to(path.parent).as_posix(): file for file in files}
    return {name: path.parent / name for name in (path.name, *sorted(_external(path)))}


def _external(path: pathlib.Path) -> set[str]:
    if path.suffix.lower() != ".onnx":
        return set()
    try:
        return set(onnx_io.data_of(path))
    except OnnxPruneError:  # no model, or one that cannot be read: the run says so
        return set()


def digest(path: str | os.PathLike) -> str:
    """Hex digest of everything that a path holds, whatever it is called; nothing where it cannot be read."""
    total = hashlib.sha256()
    try:
        for file in members(pathlib.Path(path)).values():
            total.update(f"{os.path.relpath(file, path)}\0{onnx_io.sha256(file)}\n".encode())
    except OSError:
        return ""
    return total.hexdigest()


def contents(value: Any) -> Any:
    """What stands for a value in a digest or a comparison: files and folders by what they hold, arrays by their bytes.

    Text that names no file stands for itself, and so do numbers.
    """
    if isinstance(value, str | os.PathLike):
        return (digest(value) if str(value) else "") or str(value)
    if isinstance(value, np.ndarray):
        return hashlib.sha256(f"{value.dtype} {value.shape} ".encode() + value.tobytes()).hexdigest()
    if isinstance(value, Mapping):
        return {str(name): contents(each) for name, each in value.items()}
    return [contents(each) for each in value] if isinstance(value, Sequence) else value


def named_files(options: Mapping[str, Any]) -> dict[str, str]:
    """Paths that fields of Options hold; a profile that goes by its name holds none."""
    given = {name: os.fspath(options[name]) for name in FIELDS if isinstance(options.get(name), str | os.PathLike)}
    return {name: path for name, path in given.items() if path and (name != "profile" or path.endswith(".toml"))}


def settings(options: Options) -> dict[str, Any]:
    """Fields of Options, with what files and arrays hold in the place of their names."""
    chosen = vars(options)
    return {
        **chosen,
        **{name: contents(value) for name, value in (named_files(chosen) | {"calib": options.calib}).items()},
    }


def pack(path: str | pathlib.Path) -> Parcel:
    """Read everything that a path holds; what is missing is left out, so that the run finds it missing.

    Raises
    ------
    UsageError
        The model's external data lies outside the folder of the model.
    """
    given = pathlib.Path(path)
    for name in map(pathlib.PurePosixPath, onnx_io.locations(given) if given.suffix.lower() == ".onnx" else ()):
        if name.is_absolute() or ".." in name.parts:
            raise UsageError(f"{path}: its external data {name} lies outside its folder and cannot be sent along")
    return Parcel(str(path), {name: file.read_bytes() for name, file in members(given).items() if file.is_file()})


@contextmanager
def unpacked(parcels: Sequence[Parcel]) -> Iterator[dict[str, str]]:
    """Write parcels to a temporary folder; yields where each path lies now."""
    with temporary_folder() as folder:
        placed = {}
        for number, parcel in enumerate(parcels):
            root = pathlib.Path(folder) / str(number)
            root.mkdir()
            for name, content in parcel.files.items():
                file = root / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            placed[parcel.path] = str(root / pathlib.Path(parcel.path).name)
        yield placed
