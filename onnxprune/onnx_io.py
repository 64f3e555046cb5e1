"""Load, copy, compare and save ONNX files."""

from __future__ import annotations

import hashlib
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune.errors import FileError, ModelError, UsageError
from onnxprune.protos import INTEGERS, bodies, constant_tensor, tensors
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


def compare(expected: onnx.ModelProto, given: onnx.ModelProto) -> tuple[tuple[str, ...], bool]:
    """Compare two models in everything but the values of floating-point initializers.

    Returns the differences in words, and whether those values are equal too.
    """
    differences: list[str] = []
    exact = True
    want = {tensor.name: tensor for tensor in all_tensors(expected.graph)}
    have = {tensor.name: tensor for tensor in all_tensors(given.graph)}
    differences += [f"initializer {name} is missing" for name in want.keys() - have.keys()]
    differences += [f"initializer {name} was added" for name in have.keys() - want.keys()]
    for name in want.keys() & have.keys():
        a, b = want[name], have[name]
        if tuple(a.dims) != tuple(b.dims) or a.data_type != b.data_type:
            differences.append(f"{name} has shape {list(b.dims)}, expected {list(a.dims)}")
        elif not np.array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b)):
            exact = False
            if a.data_type in INTEGERS:
                differences.append(f"{name} holds other integers")
            elif not np.isfinite(numpy_helper.to_array(b).astype(np.float64)).all():
                differences.append(f"{name} holds NaN or infinity")
    nodes = [[_without_values(node) for node in model.graph.node] for model in (expected, given)]
    if nodes[0] != nodes[1]:
        pairs = zip(nodes[0], nodes[1], strict=False)
        first = next((a.name or a.output[0] for a, b in pairs if a != b), "their number")
        differences.append(f"nodes differ ({first})")
    for part in ("input", "output"):
        if list(getattr(expected.graph, part)) != list(getattr(given.graph, part)):
            differences.append(f"the graph's {part}s differ")
    for part in ("opset_import", "functions"):
        if list(getattr(expected, part)) != list(getattr(given, part)):
            differences.append(f"{part} differ")
    if list(expected.graph.sparse_initializer) != list(given.graph.sparse_initializer):
        differences.append("sparse initializers differ")
    return tuple(differences), exact and not differences


def n_params(model: onnx.ModelProto) -> int:
    """Number of elements of all initializers and Constant nodes."""
    return sum(math.prod(tensor.dims) for tensor in all_tensors(model.graph))


def all_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initializers, and Constant nodes' tensors under their output's name."""
    yield from graph.initializer
    for node in graph.node:
        tensor = constant_tensor(node) if node.op_type == "Constant" else None
        if tensor is not None:
            named = onnx.TensorProto()
            named.CopyFrom(tensor)
            named.name = node.output[0]
            yield named
        for body in bodies(node):
            yield from all_tensors(body)


def _without_values(node: onnx.NodeProto) -> onnx.NodeProto:
    """A node without the tensors that are compared by name: what a Constant holds, and initializers of bodies."""
    holds = node.op_type == "Constant" and constant_tensor(node) is not None
    if not holds and not any(True for _ in bodies(node)):
        return node
    bare = onnx.NodeProto()
    bare.CopyFrom(node)
    if holds:
        del bare.attribute[:]
    for body in bodies(bare):
        del body.initializer[:]
        inner = [_without_values(each) for each in body.node]
        del body.node[:]
        body.node.extend(inner)
    return bare
