"""onnxruntime sessions; nothing else imports it."""

from __future__ import annotations

import math
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper
from threadpoolctl import threadpool_limits

from onnxprune import external, storage
from onnxprune.errors import FileError, ModelError, UsageError
from onnxprune.protos import INTEGERS, bodies, is_float

onnxruntime.set_default_logger_severity(4)

VERSION: str = onnxruntime.__version__
"""Of onnxruntime, whichever of its packages is installed."""

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}

_limit: ContextVar[int] = ContextVar("threads", default=0)


@contextmanager
def threads_limited(threads: int) -> Iterator[None]:
    """Let the sessions that this context starts use so many threads each, where they are not told otherwise."""
    token = _limit.set(threads)
    try:
        yield
    finally:
        _limit.reset(token)


class Session:
    """A model ready to run.

    Parameters
    ----------
    model
        A file's path (external data is found beside it), serialised bytes, or a model, wherever its data lies.
    provider
        onnxruntime execution provider, ``CPUExecutionProvider`` by default.
    optimize
        False runs the graph as written, so that intermediate values are what the file says.
    threads
        Threads within one operator; 0 leaves that to :func:`threads_limited`, and outside of it to onnxruntime.

    Attributes
    ----------
    promoted
        Whether the model runs in float32, because onnxruntime lacks kernels for the type it is in (bfloat16, double).

    Raises
    ------
    ModelError
        onnxruntime rejects the model.
    """

    def __init__(
        self, model: str | bytes | onnx.ModelProto, provider: str = "", *, optimize: bool = True, threads: int = 0,
        keep: bool = True,
    ) -> None:  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads or _limit.get()
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
        if not optimize or not keep:
            options.enable_cpu_mem_arena = False
        if not keep:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.promoted = False
        try:
            self._session = _session(model, options, provider)
            if any("bfloat16" in value.type for value in (*self._session.get_inputs(), *self._session.get_outputs())):
                raise TypeError("numpy arrays cannot feed bfloat16")
        except FileError:
            raise
        except Exception as error:  # onnxruntime raises a dozen unrelated types, all of them about this model
            promoted = _promoted(model)
            if promoted is None:
                raise ModelError(f"onnxruntime cannot load the model: {_first_line(error)}") from error
            self.promoted = True
            try:
                self._session = _session(promoted, options, provider)
            except FileError:
                raise
            except Exception:  # the first error is about what the user gave
                raise ModelError(f"onnxruntime cannot load the model: {_first_line(error)}") from error
        self.inputs: dict[str, tuple[tuple[int | str | None, ...], np.dtype]] = {
            i.name: (tuple(i.shape), np.dtype(_DTYPES.get(i.type, np.float32))) for i in self._session.get_inputs()
        }
        self.outputs: list[str] = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> list[Any]:
        """Run once; :class:`ModelError` where the model cannot run on these feeds."""
        if self.promoted:
            feeds = {
                n: v.astype(np.float32) if n in self.inputs and self.inputs[n][1] == np.float32 else v
                for n, v in feeds.items()
            }
        try:
            return self._session.run(outputs, dict(feeds))
        except Exception as error:
            raise ModelError(f"onnxruntime cannot run the model: {_first_line(error)}") from error


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let numpy's linear algebra use one thread: sums then do not depend on the number of cores."""
    with threadpool_limits(1, "blas"):
        yield


def _session(
    model: str | bytes | onnx.ModelProto, options: onnxruntime.SessionOptions, provider: str
) -> onnxruntime.InferenceSession:
    chosen = providers(provider)
    if not isinstance(model, onnx.ModelProto):
        return onnxruntime.InferenceSession(model, options, providers=chosen)
    if not storage.has_parts(model):
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=chosen)
    with storage.temporary_file(model) as path:
        return onnxruntime.InferenceSession(path, options, providers=chosen)


WHOLE_BYTES = 2 << 30
"""Bytes of constants, floats in float32, beyond which a model is not run in one piece.

onnxruntime holds a model about twice while it loads it, and half precision, for which its CPU kernels are few, in float32.
A fixed bound says the same of a model on every machine.
"""


def fits(model: onnx.ModelProto) -> bool:
    """Whether a model is small enough to be run in one piece where nobody asked for that."""
    return float32_bytes(model) <= WHOLE_BYTES


def float32_bytes(model: onnx.ModelProto) -> int:
    """Bytes that a model's constants take once floats of every width are in float32."""
    return sum(
        external.n_bytes(tensor) if tensor.data_type in INTEGERS else 4 * math.prod(tensor.dims)
        for tensor in external.every_tensor(model)
    )


def _promoted(model: str | bytes | onnx.ModelProto) -> onnx.ModelProto | None:
    try:
        if isinstance(model, str):
            proto = onnx.load(model, load_external_data=False)
            external.attach(proto, pathlib.Path(model))
            return in_float32(proto)
        return in_float32(onnx.ModelProto.FromString(model) if isinstance(model, bytes) else model)
    except Exception:  # not a model at all: onnxruntime's own error says so
        return None


UNSUPPORTED = (TensorProto.BFLOAT16, TensorProto.DOUBLE)
"""Types for which onnxruntime lacks kernels."""


def in_float32(model: onnx.ModelProto, kinds: Sequence[int] = UNSUPPORTED) -> onnx.ModelProto | None:
    """Return the model with float32 in the place of other floats; None where it has none of these."""
    found = False

    def tensor(proto: onnx.TensorProto) -> None:
        nonlocal found
        if proto.data_type in kinds:
            found = True
            if external.is_outside(proto):
                external.cast(proto, TensorProto.FLOAT)
                return
            proto.CopyFrom(numpy_helper.from_array(external.array(proto).astype(np.float32), proto.name))

    def graph(proto: onnx.GraphProto) -> None:
        nonlocal found
        for value in (*proto.input, *proto.output, *proto.value_info):
            if value.type.tensor_type.elem_type in kinds:
                found = True
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        for each in proto.initializer:
            tensor(each)
        for node in proto.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    tensor(attribute.t)
                if attribute.name in ("to", "dtype") and attribute.i in kinds:
                    found = True
                    attribute.i = TensorProto.FLOAT
            for body in bodies(node):
                graph(body)

    promoted = onnx.ModelProto()
    promoted.CopyFrom(model)
    graph(promoted.graph)
    return promoted if found else None


def providers(name: str = "") -> list[str]:
    """Providers to ask for, checked against what is installed; ``name`` may leave out "ExecutionProvider"."""
    if not name:
        return ["CPUExecutionProvider"]
    available = onnxruntime.get_available_providers()
    full = next((p for p in available if p.lower() in (name.lower(), name.lower() + "executionprovider")), None)
    if full is None:
        raise ModelError(f"provider {name} is not available here; available: {', '.join(available)}")
    return [full]


def check_provider(name: str) -> None:
    """Raise :class:`UsageError` where a provider is not available."""
    try:
        providers(name)
    except ModelError as error:
        raise UsageError(str(error)) from error


def random_feeds(
    inputs: Mapping[str, tuple[Sequence[int | str | None], np.dtype]],
    shapes: Mapping[str, Sequence[int]],
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Standard normal floats, small non-negative integers and True for inputs of the given shapes."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for name, (_, dtype) in inputs.items():
        shape = tuple(shapes[name])
        if is_float(dtype):
            feeds[name] = rng.standard_normal(shape).astype(dtype)
        elif dtype == np.bool_:
            feeds[name] = np.ones(shape, dtype)
        else:
            feeds[name] = rng.integers(0, 2, shape).astype(dtype)
    return feeds


def measure(
    model: bytes | onnx.ModelProto, wanted: Iterable[str], shapes: Mapping[str, Sequence[int]]
) -> dict[str, tuple[tuple[int, ...], int]]:
    """Run a model once on random input; return shape and element type of each ``wanted`` tensor (an output)."""
    session = Session(model, optimize=False)
    names = list(wanted)
    values = session.run(random_feeds(session.inputs, shapes), names)
    return {
        name: (value.shape, onnx.helper.np_dtype_to_tensor_dtype(value.dtype))
        for name, value in zip(names, values, strict=True)
        if hasattr(value, "shape")
    }


def compare_latency(
    models: Sequence[str], shapes: Mapping[str, Sequence[int]], provider: str = "", seconds: float = 1.0
) -> tuple[float, ...]:
    """Median milliseconds of each model file on random input, measured in turn (A, B, A, B, ..) after a warm-up."""
    sessions = [Session(model, provider) for model in models]
    feeds = [random_feeds(session.inputs, shapes) for session in sessions]
    times: list[list[float]] = [[] for _ in models]
    end = time.perf_counter() + seconds * len(models)
    while not times[-1] or len(times[-1]) < 4 or (time.perf_counter() < end and len(times[-1]) < 200):
        for taken, session, feed in zip(times, sessions, feeds, strict=True):
            begin = time.perf_counter()
            session.run(feed)
            taken.append(1000 * (time.perf_counter() - begin))
    return tuple(float(np.median(taken[1:])) for taken in times)


class Arithmetic:
    """Shape arithmetic of a graph: tensors that follow from shapes and integer constants alone.

    Parameters
    ----------
    nodes
        Static nodes in topological order; ``Shape`` and ``Size`` nodes among them become inputs.
    constants
        Constants that the nodes read.
    opset
        Opset imports of the model.
    """

    def __init__(
        self,
        nodes: Sequence[onnx.NodeProto],
        constants: Sequence[onnx.TensorProto],
        opset: Iterable[onnx.OperatorSetIdProto],
    ) -> None:
        self._leaves = [node for node in nodes if node.op_type in ("Shape", "Size")]
        inner = [node for node in nodes if node.op_type not in ("Shape", "Size")]
        self._names = list(dict.fromkeys(name for node in inner for name in node.output if name))
        self._session = None
        if inner:
            inputs = [
                onnx.helper.make_tensor_value_info(
                    leaf.output[0], onnx.TensorProto.INT64, (None,) if leaf.op_type == "Shape" else ()
                )
                for leaf in self._leaves
            ]
            outputs = [onnx.ValueInfoProto(name=name) for name in self._names]
            graph = onnx.helper.make_graph(inner, "shapes", inputs, outputs, list(constants))
            model = onnx.helper.make_model(graph, opset_imports=list(opset), ir_version=10)
            self._session = Session(model, optimize=False, threads=1)

    def __call__(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
        """Evaluate every static tensor for the given tensor shapes."""
        feeds = {leaf.output[0]: _leaf_value(leaf, shapes[leaf.input[0]]) for leaf in self._leaves}
        values = dict(feeds)
        if self._session is not None:
            needed = {name: feeds[name] for name in self._session.inputs}
            values.update(zip(self._names, self._session.run(needed, self._names), strict=True))
        return values


def _leaf_value(leaf: onnx.NodeProto, shape: Sequence[int]) -> np.ndarray:
    if leaf.op_type == "Size":
        return np.array(np.prod(shape, dtype=np.int64), np.int64)
    bounds = {attribute.name: attribute.i for attribute in leaf.attribute}
    return np.array(tuple(shape)[bounds.get("start", 0) : bounds.get("end")], np.int64)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
