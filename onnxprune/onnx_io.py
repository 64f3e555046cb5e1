"""Load, copy, compare and save ONNX files."""

from __future__ import annotations

import hashlib
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import onnx
from onnx import helper

from onnxprune.comparison import compare  # noqa: F401 (of files, too)
from onnxprune.errors import FileError, ModelError, UsageError
from onnxprune.protos import named_tensors, tensors
from onnxprune.reader import read  # noqa: F401 (reading belongs to input and output)

MAX_PROTOBUF = 2**31 - 1  # bytes that protobuf serialises at most


# -- files -----------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike) -> onnx.ModelProto:
    """Read a model file with its external data.

    Raises
    ------
    FileError
        The file is missing or cannot be read.
    ModelError
        It is not an ONNX model, or its external data is missing.
    """
    path = pathlib.Path(path)
    require_file(path)
    data = path.read_bytes()
    if not data:
        raise ModelError(f"{path}: the file is empty")
    try:
        model = onnx.ModelProto.FromString(data)
    except Exception as error:  # protobuf's DecodeError differs between its implementations
        raise ModelError(f"{path}: not an ONNX model, or cut short; export it again") from error
    del data
    if not model.graph.node and not model.graph.output:
        raise ModelError(f"{path}: not an ONNX model (no graph in it)")
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:
        raise ModelError(f"{path}: its external data cannot be read ({str(error).splitlines()[0]})") from error
    return model


def require_file(path: pathlib.Path) -> None:
    """Raise :class:`FileError` where ``path`` is not a file that can be read."""
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
    """Write a model through a temporary file beside it: the file is whole or absent.

    Raises
    ------
    FileError
        The folder or the file cannot be written, or the disk is full.
    """
    require_one_file(model)
    write(path, model.SerializeToString(deterministic=True))


@contextmanager
def temporary_file(model: onnx.ModelProto) -> Iterator[str]:
    """Write a model to a file that lasts as long as the context.

    Raises
    ------
    FileError
        The folder for temporary files cannot hold it.
    """
    require_one_file(model)
    with tempfile.TemporaryDirectory(prefix="onnxprune.") as folder:
        path = pathlib.Path(folder) / "model.onnx"
        try:
            path.write_bytes(model.SerializeToString())
        except OSError as error:
            raise FileError(
                f"{folder}: cannot hold the model ({error.strerror}); set TMPDIR to a larger folder"
            ) from error
        yield str(path)


def require_one_file(model: onnx.ModelProto) -> None:
    """Raise :class:`ModelError` where a model's tensors are more than one file can hold."""
    size = sum(math.prod(t.dims) * helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in tensors(model.graph))
    if size >= MAX_PROTOBUF:
        raise ModelError("the pruned model is larger than 2 GB, which a single file cannot hold; prune further")


def write(path: str | os.PathLike, data: bytes) -> None:
    """Write bytes to ``path`` through a temporary file and a rename; a link's target, and a device as it is."""
    path = pathlib.Path(path).resolve()
    temporary = None
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as device:
                device.write(data)
            return
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.{os.getpid()}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        mask = os.umask(0)
        os.umask(mask)
        pathlib.Path(temporary).chmod(0o666 & ~mask)
        pathlib.Path(temporary).replace(path)
        temporary = None
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror}); nothing was kept") from error
    finally:
        if temporary is not None:
            pathlib.Path(temporary).unlink(missing_ok=True)


def copy(source: pathlib.Path, out: pathlib.Path, *, force: bool = False) -> None:
    """Copy a model file byte for byte, with its external data where that lies in another folder than ``out``."""
    locations = external_files(onnx.load(source, load_external_data=False))
    for location in sorted(locations):
        data, twin = source.parent / location, out.parent / location
        if twin.exists() and twin.samefile(data):
            continue
        if twin.exists() and not force:
            raise UsageError(f"{twin}: exists; the model's external data would overwrite it (--force allows it)")
        twin.parent.mkdir(parents=True, exist_ok=True)
        write(twin, data.read_bytes())
    write(out, source.read_bytes())


def external_files(model: onnx.ModelProto) -> set[str]:
    """Locations of external data, as the model names them, in initializers and attributes alike."""
    return {
        entry.value
        for tensor in tensors(model.graph)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }


def n_params(model: onnx.ModelProto) -> int:
    """Number of elements of all initializers and Constant nodes."""
    return sum(math.prod(tensor.dims) for tensor in named_tensors(model.graph))
