"""External data: tensors whose bytes lie in files beside the model. This alone knows where, and how they are read.

In memory such a tensor keeps ``data_location`` EXTERNAL and names its file absolutely. What is sliced of it, and in which
type it is wanted, is written down beside that and carried out when the values are asked for: however large a model, only
what is looked at is in memory. A tensor that is marked EXTERNAL but holds ``raw_data`` has been given new values, which
will be written outside again.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import FileError, ModelError
from onnxprune.protos import BITS, bodies
from onnxprune.slices import Slices, sliced_shape, take

SMALL = 1024
"""Bytes of a tensor below which it belongs into the model's own file: shapes, bounds, scales."""

MAX_SHOWN = 200
"""Characters of a place that an error quotes."""

CHUNK = 16 << 20
_VIEW = "view"  # keys of external_data that are never written to a file: what is made of the bytes,
_STAMP = "stamp"  # and by what a change of the file shows
_TYPED = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def is_outside(tensor: TensorProto) -> bool:
    """Whether a tensor's bytes lie in another file."""
    return tensor.data_location == TensorProto.EXTERNAL and not tensor.HasField("raw_data")


def belongs_outside(tensor: TensorProto) -> bool:
    """Whether a tensor's bytes lie in another file, or did before it was given new values."""
    return tensor.data_location == TensorProto.EXTERNAL


def every_tensor(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """All tensors of a model, those in bodies, local functions, training graphs and parts of sparse ones included."""
    return (tensor for tensor, _ in _with_places(model))


def n_bytes(tensor: TensorProto) -> int:
    """Bytes that a tensor's values take when they are stored as ``raw_data``; strings count nothing."""
    return _n_bytes(tensor.data_type, tensor.dims)


def _n_bytes(kind: int, dims) -> int:
    if kind == TensorProto.STRING:
        return 0
    bits = BITS.get(kind) or 8 * np.dtype(helper.tensor_dtype_to_np_dtype(kind)).itemsize
    return (math.prod(dims) * bits + 7) // 8


def require_complete(model: onnx.ModelProto) -> None:
    """Raise :class:`ModelError` where a tensor holds other than its shape claims: nobody allocates for a claim."""
    for tensor in every_tensor(model):
        known = tensor.data_type in TensorProto.DataType.values() and tensor.data_type != TensorProto.UNDEFINED
        if not known or min(tensor.dims, default=0) < 0:
            raise ModelError(f"{tensor.name}: no tensor has type {tensor.data_type} and shape {list(tensor.dims)}")
        if tensor.HasField("segment"):
            raise ModelError(f"{tensor.name}: holds a segment of a tensor, which nothing here can read; store it whole")
        if is_outside(tensor):
            continue
        wanted, held = _n_claimed(tensor), _n_held(tensor)
        if wanted != held:
            raise ModelError(
                f"{tensor.name}: holds {held} values or bytes where its shape {list(tensor.dims)} claims {wanted}; "
                "the file is damaged, export it again"
            )


def _n_claimed(tensor: TensorProto) -> int:
    if tensor.HasField("raw_data"):
        return n_bytes(tensor)
    n = math.prod(tensor.dims)
    if tensor.data_type in BITS:
        return (n * BITS[tensor.data_type] + 7) // 8
    return 2 * n if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else n


def _n_held(tensor: TensorProto) -> int:
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data)
    return sum(len(getattr(tensor, name)) for name in _TYPED)


# -- where -------------------------------------------------------------------------------------------------------------


def attach(model: onnx.ModelProto, path: pathlib.Path) -> None:
    """Check where external tensors of a model that was read from ``path`` lie, and name their files absolutely, in place.

    What is small, and what stands in attributes and local functions, is read now.

    Raises
    ------
    ModelError
        A file is missing, too short, no plain file, or not within the folder of the model.
    """
    sizes: dict[str, tuple[pathlib.Path, int]] = {}
    for tensor, stays in _with_places(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        try:
            _attach(tensor, path.parent, sizes)
        except (ValueError, OSError, ModelError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ModelError(f"{path}: its external data cannot be read ({tensor.name}: {reason})") from error
        if n_bytes(tensor) < SMALL or not stays:
            tensor.CopyFrom(held(tensor))


def _with_places(model: onnx.ModelProto) -> Iterator[tuple[TensorProto, bool]]:
    """Every tensor, and whether it is a constant of a graph, which may stay outside until it is asked for."""

    def of_nodes(nodes, inner: bool) -> Iterator[tuple[TensorProto, bool]]:
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t, inner and node.op_type == "Constant"
                sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
                others = (*attribute.tensors, *_of_sparse((*sparse, *attribute.sparse_tensors)))
                yield from ((tensor, False) for tensor in others)
            for body in bodies(node):
                yield from of_graph(body, inner)

    def of_graph(graph: onnx.GraphProto, inner: bool) -> Iterator[tuple[TensorProto, bool]]:
        yield from ((tensor, inner) for tensor in graph.initializer)
        yield from ((tensor, False) for tensor in _of_sparse(graph.sparse_initializer))
        yield from of_nodes(graph.node, inner)

    yield from of_graph(model.graph, True)
    for function in model.functions:
        yield from of_nodes(function.node, False)
    for training in model.training_info:
        for graph in (training.initialization, training.algorithm):
            yield from of_graph(graph, False)


def _of_sparse(tensors: Iterable[onnx.SparseTensorProto]) -> Iterator[TensorProto]:
    for sparse in tensors:
        yield from (sparse.values, sparse.indices)


def _attach(tensor: TensorProto, folder: pathlib.Path, sizes: dict[str, tuple[pathlib.Path, int]]) -> None:
    facts = _facts(tensor)
    location = facts.get("location", "")
    if location not in sizes:
        file = inside(folder, location)
        sizes[location] = file, file.stat().st_size
    file, size = sizes[location]
    offset, needed = int(facts.get("offset", 0)), n_bytes(tensor)
    if tensor.data_type == TensorProto.STRING:
        raise ValueError("strings cannot lie outside")
    if int(facts.get("length", needed)) != needed:
        raise ValueError(f"{facts['length']} bytes, {needed} expected for shape {list(tensor.dims)}")
    if not 0 <= offset <= size - needed:
        raise ValueError(f"{location} has {size} bytes, {needed} at offset {offset} are wanted")
    tensor.ClearField("raw_data")
    _point(tensor, {"location": str(file), "offset": str(offset), "length": str(needed), _STAMP: _stamp(file)})


def locations(model: onnx.ModelProto) -> set[str]:
    """What a model names as its external data."""
    outside = (tensor for tensor in every_tensor(model) if tensor.data_location == TensorProto.EXTERNAL)
    return {_facts(tensor).get("location", "") for tensor in outside}


def inside(folder: pathlib.Path, location: str) -> pathlib.Path:
    """The file that a location names, if it is a plain file within ``folder``; :class:`ModelError` where it is none."""
    named = pathlib.PurePosixPath(location.replace("\\", "/"))
    shown = repr(location if len(location) < MAX_SHOWN else f"{location[:MAX_SHOWN]} ...")
    whole = folder.resolve()
    try:
        file = (whole / location).resolve(strict=True)
    except FileNotFoundError as error:
        raise ModelError(f"{location}: no such file beside the model") from error
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, names that are too long or hold a NUL
        raise ModelError(f"{shown} is not a file within the folder of the model") from error
    if not location or named.is_absolute() or ".." in named.parts or not file.is_relative_to(whole):
        raise ModelError(f"{shown} is not a file within the folder of the model")
    if not file.is_file():
        raise ModelError(f"{location} is not a plain file")
    return file


def file_of(tensor: TensorProto) -> pathlib.Path:
    """The file in which an external tensor's bytes lie.

    Raises
    ------
    ModelError
        The model was read by others without its data, so that nobody knows its folder.
    """
    file = pathlib.Path(_facts(tensor).get("location", ""))
    if not file.is_absolute():
        raise ModelError(
            f"{tensor.name}: its data lies in {file.name or 'another file'} beside a model whose folder is not known here; "
            "give the model's path, or load its external data first"
        )
    return file


def _stamp(file: pathlib.Path) -> str:
    state = file.stat()
    return f"{state.st_size} {state.st_mtime_ns}"


def _unchanged(tensor: TensorProto) -> pathlib.Path:
    """The file of a tensor, as it was when the model was opened.

    Raises
    ------
    FileError
        It is gone, or somebody has written to it: what was proved would not be what is written.
    """
    file = file_of(tensor)
    try:
        same = _facts(tensor).get(_STAMP) in (None, _stamp(file))
    except OSError as error:
        raise FileError(f"{file}: cannot be read any more ({error.strerror})") from error
    if not same:
        raise FileError(f"{file}: has changed since the model was opened; run again")
    return file


def _facts(tensor: TensorProto) -> dict[str, str]:
    facts = {entry.key: entry.value for entry in tensor.external_data}
    if len(facts) < len(tensor.external_data):
        raise ModelError(f"{tensor.name}: says twice where its data lies")
    return facts


def _point(tensor: TensorProto, facts: dict[str, str]) -> None:
    del tensor.external_data[:]
    for key, value in facts.items():
        tensor.external_data.add(key=key, value=value)


# -- values ------------------------------------------------------------------------------------------------------------


def array(tensor: TensorProto) -> np.ndarray:
    """Values of a tensor wherever they lie; of an external one a read-only map of its file, unless it is sliced."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    if tensor.HasField("raw_data"):
        return _parsed(tensor.data_type, tensor.dims, tensor.raw_data)
    facts = _facts(tensor)
    view = json.loads(facts.get(_VIEW, "{}"))
    kind, dims = view.get("type", tensor.data_type), view.get("dims", tuple(tensor.dims))
    values = _mapped(_unchanged(tensor), int(facts["offset"]), kind, dims)
    for slices in view.get("takes", ()):
        values = take(values, {int(axis): kept for axis, kept in slices.items()}, tensor.name)
    return values if kind == tensor.data_type else values.astype(helper.tensor_dtype_to_np_dtype(tensor.data_type))


def _mapped(file: pathlib.Path, offset: int, kind: int, dims) -> np.ndarray:
    try:
        stored = np.memmap(file, np.uint8, "r", offset, (_n_bytes(kind, dims),))
    except (OSError, ValueError) as error:
        raise FileError(f"{file}: cannot be read ({error})") from error
    if kind in BITS or sys.byteorder == "big":
        return _parsed(kind, dims, stored.tobytes())
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    values = np.asarray(stored).view(dtype).reshape(dims)
    return values.copy() if offset % dtype.itemsize else values  # onnxruntime wants aligned numbers


def _parsed(kind: int, dims, raw: bytes) -> np.ndarray:
    return numpy_helper.to_array(TensorProto(data_type=kind, dims=dims, raw_data=raw))


def held(tensor: TensorProto) -> TensorProto:
    """The tensor with its values inside."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return tensor
    inside = TensorProto()
    inside.CopyFrom(tensor)
    inside.ClearField("data_location")
    inside.ClearField("external_data")
    inside.raw_data = b"".join(contents(tensor))
    return inside


def sliced(tensor: TensorProto, slices: Slices, name: str) -> TensorProto:
    """An external tensor of which only the given indices are kept; nothing is read."""
    facts, view = _described(tensor)
    cut = TensorProto()
    cut.CopyFrom(tensor)
    cut.name = name
    view["takes"] = [*view.get("takes", ()), {str(axis): kept for axis, kept in slices.items()}]
    del cut.dims[:]
    cut.dims.extend(sliced_shape(tuple(tensor.dims), slices, name))
    _point(cut, {**facts, _VIEW: json.dumps(view)})
    return cut


def cast(tensor: TensorProto, kind: int) -> None:
    """Let an external tensor be read as another type from now on, in place; nothing is read."""
    facts, view = _described(tensor)
    tensor.data_type = kind
    _point(tensor, {**facts, _VIEW: json.dumps(view)})


def _described(tensor: TensorProto) -> tuple[dict[str, str], dict]:
    facts = _facts(tensor)
    view = json.loads(facts[_VIEW]) if _VIEW in facts else {"type": tensor.data_type, "dims": list(tensor.dims)}
    return facts, view


def contents(tensor: TensorProto) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor as ``raw_data`` has them, piece by piece."""
    if tensor.HasField("raw_data"):
        yield tensor.raw_data
        return
    if not is_outside(tensor) or _VIEW in _facts(tensor):
        values = array(tensor)
        if tensor.data_type in BITS or sys.byteorder == "big":
            yield numpy_helper.from_array(values).raw_data
        else:
            yield np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        return
    left, file = n_bytes(tensor), _unchanged(tensor)
    try:
        with file.open("rb") as stream:
            stream.seek(int(_facts(tensor)["offset"]))
            while left:
                piece = stream.read(min(left, CHUNK))
                if not piece:
                    raise FileError(f"{file}: ends early; it was longer when the model was opened")
                left -= len(piece)
                yield piece
    except OSError as error:
        raise FileError(f"{file}: cannot be read ({error.strerror})") from error
