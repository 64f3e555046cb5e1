"""Read and write what training code keeps weights in: safetensors files and torch state dicts.

Elements are moved as raw bytes, so that no data type (bfloat16, float8) has to be understood and no value can change.
"""

from __future__ import annotations

import copy
import io
import json
import math
import os
import pathlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxprune import onnx_io
from onnxprune.errors import ModelError, UsageError

TORCH = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *TORCH)
NESTED = ("state_dict", "model_state_dict", "model")
"""Entries of a training checkpoint that hold the state dict, the first that there is."""
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu", "C64": "complex64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""What safetensors files call data types, and what torch and the library's writer do."""


@dataclass(frozen=True, slots=True, eq=False)
class Parameter:
    """A tensor of a checkpoint: the name of its data type, and its elements as an array of opaque items."""

    dtype: str
    elements: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """What a file holds.

    Attributes
    ----------
    parameters
        By name, in the file's order.
    twins
        Names of the other parameters that are the same memory (tied weights of a torch file).
    metadata
        Texts in the header of a safetensors file.
    content, nested
        All that a torch file holds, and its entry with the state dict (empty: all of it).
    """

    parameters: Mapping[str, Parameter]
    twins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    metadata: dict[str, str] | None = None
    content: Any = None
    nested: str = ""

    @property
    def state(self) -> Mapping[str, Any]:
        """The state dict of a torch file."""
        return self.content[self.nested] if self.nested else self.content


def check_suffixes(source: pathlib.Path, out: pathlib.Path) -> None:
    """Raise :class:`UsageError` where a name does not say a format, or a library is missing."""
    for path in (source, out):
        if path.suffix not in SUFFIXES:
            raise UsageError(f"{path}: is no checkpoint by its name; it must end in {', '.join(SUFFIXES)}")
        try:
            if path.suffix in TORCH:
                import torch  # noqa: F401, PLC0415 (an extra)
            else:
                import safetensors  # noqa: F401, PLC0415 (an extra)
        except ImportError as error:
            library, extra = ("torch", "train") if path.suffix in TORCH else ("safetensors", "checkpoint")
            raise UsageError(f"{path}: needs {library}: pip install 'onnxprune[{extra}]'") from error


def read(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint in the format that its suffix names.

    Raises
    ------
    FileError
        The file is missing or cannot be read.
    ModelError
        It is no checkpoint, or holds more than plain data.
    """
    path = pathlib.Path(path)
    onnx_io.require_file(path)
    return _read_torch(path) if path.suffix in TORCH else _read_safetensors(path)


def write(checkpoint: Checkpoint, changed: Mapping[str, Parameter], out: pathlib.Path) -> None:
    """Write a checkpoint with other elements for some parameters, whole or not at all.

    Raises
    ------
    UsageError
        OUT's format cannot hold what else is in the checkpoint.
    FileError
        OUT cannot be written.
    """
    onnx_io.write(out, (_torch_bytes if out.suffix in TORCH else _safetensors_bytes)(checkpoint, changed))


def _read_safetensors(path: pathlib.Path) -> Checkpoint:
    import safetensors  # noqa: PLC0415 (an extra)

    try:
        data = path.read_bytes()
        entries = dict(safetensors.deserialize(data))
        header, _ = _header(data)
    except Exception as error:  # SafetensorError, or what Rust made of it
        raise ModelError(f"{path}: not a safetensors file, or cut short ({error})") from error
    strangers = sorted({entry["dtype"] for entry in entries.values()} - DTYPES.keys())
    if strangers:
        raise ModelError(f"{path}: data type {strangers[0]} cannot be handled")
    metadata = header.pop("__metadata__", None)
    found = {n: _parameter(DTYPES[entries[n]["dtype"]], entries[n]["data"], entries[n]["shape"]) for n in header}
    return Checkpoint(found, metadata=metadata)


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file, in the file's order (the library's is random), and where the elements begin."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), end


def _parameter(dtype: str, data: bytearray, shape: list[int]) -> Parameter:
    width = len(data) // max(math.prod(shape), 1) or 1
    return Parameter(dtype, np.frombuffer(data, f"V{width}").reshape(shape))


def _safetensors_bytes(checkpoint: Checkpoint, changed: Mapping[str, Parameter]) -> bytes:
    import safetensors  # noqa: PLC0415 (an extra)

    if checkpoint.content is not None:
        _refuse_more_than_tensors(checkpoint)
    specs: dict[str, Any] = {}
    alive = []
    for name, old in checkpoint.parameters.items():
        parameter = changed.get(name, old)
        array, shape = np.ascontiguousarray(parameter.elements), parameter.elements.shape
        if hasattr(safetensors, "TensorSpec"):  # since 0.8
            alive.append(array)
            specs[name] = safetensors.TensorSpec(
                dtype=parameter.dtype, shape=shape, data_ptr=array.ctypes.data, data_len=array.nbytes
            )
        else:
            specs[name] = {"dtype": parameter.dtype, "shape": shape, "data": array.tobytes()}
    data = bytes(safetensors.serialize(specs, metadata=checkpoint.metadata))
    if not checkpoint.metadata:
        return data
    header, end = _header(data)  # the library writes the texts in a random order; the same input gives the same bytes
    text = json.dumps({**header, "__metadata__": checkpoint.metadata}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def _refuse_more_than_tensors(checkpoint: Checkpoint) -> None:
    others = [name for name in checkpoint.state if name not in checkpoint.parameters]
    if checkpoint.nested or others:
        what = "a nested state dict" if checkpoint.nested else f"{others[0]}, which is no plain tensor"
        raise UsageError(f"a safetensors file cannot hold all of the checkpoint ({what}); write a {TORCH[0]} file")
    strange = sorted({parameter.dtype for parameter in checkpoint.parameters.values()} - set(DTYPES.values()))
    if strange:
        raise UsageError(f"a safetensors file cannot hold {strange[0]}; write a {TORCH[0]} file")


def _read_torch(path: pathlib.Path) -> Checkpoint:
    import torch  # noqa: PLC0415 (an extra)

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError and more, by what is wrong
        raise ModelError(
            f"{path}: torch cannot load it as plain data; save model.state_dict(), not a module or objects of own classes"
        ) from error
    nested = "" if _tensors(content) else next((key for key in NESTED if _tensors(_entry(content, key))), "")
    state = content[nested] if nested else content
    if not _tensors(state):
        raise ModelError(f"{path}: holds no state dict, neither by itself nor as {', '.join(NESTED)}")
    found, places = {}, defaultdict(list)
    for name, tensor in _tensors(state):
        if not _is_plain(tensor):
            continue  # stays as it is; slicing it is refused, for it is no parameter
        flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        items = flat.view(torch.uint8).numpy().view(f"V{tensor.element_size()}")
        found[name] = Parameter(str(tensor.dtype).removeprefix("torch."), items.reshape(tuple(tensor.shape)))
        if tensor.numel():
            places[tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype].append(name)
    twins = {name: tuple(n for n in names if n != name) for names in places.values() for name in names}
    return Checkpoint(found, twins, content=content, nested=nested)


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor holds every one of its elements, which sparse, quantized, nested, meta and expanded ones do not."""
    import torch  # noqa: PLC0415 (an extra)

    dense = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta)
    return dense and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _entry(content: Any, key: str) -> Any:
    return content.get(key) if isinstance(content, Mapping) else None


def _tensors(state: Any) -> list[tuple[str, Any]]:
    """Named tensors directly in a mapping."""
    import torch  # noqa: PLC0415 (an extra)

    if not isinstance(state, Mapping):
        return []
    return [(name, value) for name, value in state.items() if isinstance(name, str) and torch.is_tensor(value)]


def _torch_bytes(checkpoint: Checkpoint, changed: Mapping[str, Parameter]) -> bytes:
    import torch  # noqa: PLC0415 (an extra)

    made: dict[tuple[str, ...], Any] = {}

    def tensor(name: str, parameter: Parameter) -> Any:
        tied = tuple(sorted((name, *checkpoint.twins.get(name, ()))))
        if tied not in made:
            flat = np.array(parameter.elements, order="C").reshape(-1).view(np.uint8)
            dtype = getattr(torch, parameter.dtype)
            made[tied] = torch.from_numpy(flat).view(dtype).reshape(parameter.elements.shape)
        old = checkpoint.state.get(name) if checkpoint.content is not None else None
        if isinstance(old, torch.nn.Parameter):
            return torch.nn.Parameter(made[tied], requires_grad=old.requires_grad)
        return made[tied]

    if checkpoint.content is None:
        content: Any = OrderedDict((n, tensor(n, changed.get(n, p))) for n, p in checkpoint.parameters.items())
    else:
        state = copy.copy(checkpoint.state)  # keeps its class, order and the versions that torch notes on it
        for name, parameter in changed.items():
            state[name] = tensor(name, parameter)  # type: ignore[index]
        content = state
        if checkpoint.nested:
            content = copy.copy(checkpoint.content)
            content[checkpoint.nested] = state
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def tensors_beside(checkpoint: Checkpoint) -> Iterator[str]:
    """Entries of a torch file beside the state dict that belong to an optimizer or hold tensors."""
    if checkpoint.nested:
        for key, value in checkpoint.content.items():
            if key != checkpoint.nested and ("optim" in str(key).lower() or _holds_tensors(value)):
                yield str(key)


def _holds_tensors(value: Any) -> bool:
    import torch  # noqa: PLC0415 (an extra)

    waiting, seen = [value], set[int]()  # what is pickled may hold itself, or the same a million times
    while waiting:
        one = waiting.pop()
        if torch.is_tensor(one) and one.dim() > 0:
            return True
        if isinstance(one, Mapping | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            waiting += one.values() if isinstance(one, Mapping) else one
    return False
