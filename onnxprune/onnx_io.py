"""Load, copy, compare and save ONNX files."""

from __future__ import annotations

import hashlib
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO

import onnx

from onnxprune import external, storage
from onnxprune.comparison import compare  # noqa: F401 (of files, too)
from onnxprune.errors import FileError, ModelError, UsageError
from onnxprune.files import owned, require_plain, sweep
from onnxprune.protos import named_tensors
from onnxprune.reader import read  # noqa: F401 (reading belongs to input and output)
from onnxprune.storage import temporary_file  # noqa: F401

LARGEST = 1 << 31
"""Bytes of the largest file that protobuf reads."""

# -- files -----------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike) -> onnx.ModelProto:
    """Read a model file; what lies in other files stays there until it is asked for (:mod:`onnxprune.external`).

    Raises
    ------
    FileError
        The file is missing or cannot be read.
    ModelError
        It is not an ONNX model, or its external data is missing, cut short or not within its folder.
    """
    return _whole(load_graph(path := pathlib.Path(path)), path)


def load_with_digest(path: pathlib.Path) -> tuple[onnx.ModelProto, str]:
    """Read a model file once, and the hex digest of the bytes that were read."""
    data = _bytes(path)
    return _whole(_graph(data, path), path), hashlib.sha256(data).hexdigest()


def load_graph(path: pathlib.Path) -> onnx.ModelProto:
    """Read a model file as it is, with the locations of its external data as the file names them."""
    return _graph(_bytes(path), path)


def _whole(model: onnx.ModelProto, path: pathlib.Path) -> onnx.ModelProto:
    try:
        external.require_complete(model)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    external.attach(model, path)
    return model


def _bytes(path: pathlib.Path) -> bytes:
    require_file(path)
    try:
        if path.stat().st_size > LARGEST:
            raise ModelError(f"{path}: not an ONNX model: none has more than 2 GiB in its own file")
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from error


def _graph(data: bytes, path: pathlib.Path) -> onnx.ModelProto:
    if not data:
        raise ModelError(f"{path}: the file is empty")
    try:
        model = onnx.ModelProto.FromString(data)
    except Exception as error:  # protobuf's DecodeError differs between its implementations
        raise ModelError(f"{path}: not an ONNX model, or cut short; export it again") from error
    if not model.graph.node and not model.graph.output:
        raise ModelError(f"{path}: not an ONNX model (no graph in it)")
    return model


def require_file(path: pathlib.Path) -> None:
    """Raise :class:`FileError` where ``path`` is not a file that can be read."""
    require_plain(path)
    try:
        with path.open("rb"):
            pass
    except FileNotFoundError as error:
        raise FileError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise FileError(f"{path}: is a folder, not a model file") from error
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from error


def sha256(path: str | os.PathLike) -> str:
    """Hex digest of a file's bytes."""
    with pathlib.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(model: onnx.ModelProto, path: str | os.PathLike) -> None:
    """Write a model: its file is whole or absent, and never stands beside data of another.

    Where tensors lay in other files when the model was read, or are more than one file can hold, the larger ones go into one
    file beside it, ``NAME.DIGEST.data``. The digest is that of its bytes, so that neither a crash nor an older file can
    pair a model with other weights; that of the model that ``path`` held goes when the new one is in place.

    Raises
    ------
    FileError
        The folder or the file cannot be written, or the disk is full.
    """
    path = pathlib.Path(path)
    old = older_data(path)
    stored = storage.split(model) if storage.has_parts(model) else None
    if stored is None or not stored.outside:
        write(path, (stored.graph if stored else model).SerializeToString(deterministic=True))
        _remove(old, ())
        return
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise FileError(f"{path}: is no plain file, and this model's data needs a file beside it; choose another name")
    data, fresh = path, False
    try:
        with _temporary(path) as (file, done):
            data = path.with_name(f"{path.name}.{stored.write_data(file)[:16]}.data")
            fresh = not data.exists()
            done(data)
        stored.name(data.name)
        write(path, stored.graph.SerializeToString(deterministic=True))
    except BaseException:
        if fresh and data.name not in locations(path):  # an interrupt may come when all is done
            data.unlink(missing_ok=True)
        raise
    _remove(old, (data.name,))


def place(files: Mapping[str, bytes], path: pathlib.Path) -> None:
    """Write the files that :func:`save` made of a model of the same name elsewhere, the model last."""
    others, old = files.keys() - {path.name}, older_data(path)
    for name in sorted(others):
        write(path.with_name(name), files[name])
    write(path, files[path.name])
    _remove(old, others)


def locations(path: pathlib.Path) -> set[str]:
    """What a file names as its external data; nothing where it is no model."""
    try:
        return external.locations(load_graph(path)) if path.is_file() else set()
    except (FileError, ModelError):
        return set()


def older_data(path: pathlib.Path) -> list[pathlib.Path]:
    """Data of the model that ``path`` holds now, where :func:`save` wrote it for that model.

    Files that merely have such a name may belong to a model that has been renamed.
    """
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}\.data")
    return [path.with_name(name) for name in sorted(locations(path)) if pattern.fullmatch(name)]


def _remove(old: Iterable[pathlib.Path], kept: Collection[str]) -> None:
    """Remove the data of the model that was overwritten, but for what the new one reads."""
    for file in old:
        if file.name not in kept:
            file.unlink(missing_ok=True)


def write(path: str | os.PathLike, data: bytes) -> None:
    """Write bytes to ``path`` through a temporary file and a rename; a link's target, and a device as it is."""
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        try:
            with path.open("wb") as device:
                device.write(data)
        except OSError as error:
            raise FileError(f"{path}: cannot be written ({error.strerror}); nothing was kept") from error
        return
    path = path.resolve()
    with _temporary(path) as (file, done):
        file.write(data)
        done(path)


@contextmanager
def _temporary(path: pathlib.Path) -> Iterator[tuple[IO[bytes], Callable[[pathlib.Path], None]]]:
    """A temporary file beside ``path``, and what gives it a name of its own; without one it goes.

    What killed runs left in the folder goes, too.
    """
    temporary: pathlib.Path | None = None
    sweep(path.parent)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.{owned()}", dir=path.parent)
        temporary = pathlib.Path(name)

        def done(final: pathlib.Path) -> None:
            nonlocal temporary
            file.close()
            mask = os.umask(0)
            os.umask(mask)
            pathlib.Path(name).chmod(0o666 & ~mask)
            pathlib.Path(name).replace(final)
            temporary = None

        with os.fdopen(handle, "wb") as file:
            yield file, done
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror}); nothing was kept") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def copy(source: pathlib.Path, out: pathlib.Path, *, force: bool = False) -> None:
    """Copy a model file byte for byte, with its external data where that lies in another folder than ``out``.

    Where data of another model must be overwritten, an older ``out`` goes first: it might read it.
    """
    pairs, files, old = [], data_of(source), older_data(out)
    for name, data in files.items():
        twin = out.parent / name
        if twin.resolve() == out.resolve():
            raise UsageError(f"{out}: is where the model's external data {name} belongs; choose another name")
        if not twin.resolve().is_relative_to(out.parent.resolve()):
            raise UsageError(f"{twin}: the model's external data would be written through a link to another folder")
        if twin.exists() and twin.samefile(data):
            continue
        if twin.exists() and not force:
            raise UsageError(f"{twin}: exists; the model's external data would overwrite it (--force allows it)")
        pairs.append((data, twin))
    if any(twin.exists() for _, twin in pairs) and out.is_file():
        out.unlink()
    for data, twin in pairs:
        twin.parent.mkdir(parents=True, exist_ok=True)
        with data.open("rb") as stream, _temporary(twin.resolve()) as (file, done):
            shutil.copyfileobj(stream, file, external.CHUNK)
            done(twin.resolve())
    write(out, source.read_bytes())
    _remove(old, files)


def copy_apart(source: pathlib.Path, out: pathlib.Path) -> None:
    """Copy a model over an older one; data that lies outside goes into a file named like :func:`save` does.

    Models of several folders may all keep their data under one name.
    """
    if external.locations(load_graph(source)):
        save(load(source), out)
    else:
        copy(source, out, force=True)


def data_of(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Files of a model's external data by the names that it gives them; :class:`ModelError` where one is not beside it."""
    try:
        return {name: external.inside(path.parent, name) for name in sorted(external.locations(load_graph(path)))}
    except ModelError as error:
        raise ModelError(f"{path}: its external data cannot be read ({error})") from error


def n_params(model: onnx.ModelProto) -> int:
    """Number of elements of all initializers and Constant nodes."""
    return sum(math.prod(tensor.dims) for tensor in named_tensors(model.graph))
