"""onnxruntime sessions; nothing else imports it."""

from __future__ import annotations

import json
import math
import mmap
import pathlib
import platform
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper
from threadpoolctl import threadpool_limits

from onnxprune import external, files, storage
from onnxprune.errors import FileError, ModelError, TooLongError, UsageError
from onnxprune.protos import INTEGERS, bodies, every_node, is_float

onnxruntime.set_default_logger_severity(4)


def processor() -> str:
    """Model of this machine's processor and what it can do, as Linux tells it; elsewhere what Python knows."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.platform()
    return " ".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))


VERSION: str = onnxruntime.__version__
"""Of onnxruntime, whichever of its packages is installed."""

BLOCK: int = 16 if "avx512f" in processor().split() else 8
"""Channels in a block of onnxruntime's layout for convolutions on this machine (MlasNchwcGetBlockSize)."""

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

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

_EXACT = {CUDA: {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}}
"""Options of providers without which float32 is not float32, or two runs are not alike."""

_limit: ContextVar[int] = ContextVar("threads", default=0)


@contextmanager
def threads_limited(threads: int) -> Iterator[None]:
    """Let the sessions that this context starts use so many threads each, where they are not told otherwise.

    0 leaves them what the context around this one gives them.
    """
    token = _limit.set(threads or thread_limit())
    try:
        yield
    finally:
        _limit.reset(token)


def thread_limit() -> int:
    """Threads of each session that starts here; 0 where onnxruntime chooses."""
    return _limit.get()


RUN_SECONDS = 300.0
"""How long one run of a model with a Loop may take: it can go round for ever."""


class Session:
    """A model ready to run.

    Parameters
    ----------
    model
        A file's path (external data is found beside it), serialised bytes, or a model, wherever its data lies.
    provider
        Execution provider as :func:`provider_for` takes it; None is the CPU, where every figure is the same each time.
    optimize
        False runs the graph as written, so that intermediate values are what the file says.
    threads
        Threads within one operator; 0 leaves that to :func:`threads_limited`, and outside of it to onnxruntime.
    keep
        False gives memory back after every run.
    spin
        False lets threads sleep between operators, so that sessions side by side do not take each other's time.

    Attributes
    ----------
    promoted
        Whether the model runs in float32, because onnxruntime lacks kernels for the type it is in (bfloat16, double).

    Raises
    ------
    ModelError
        onnxruntime rejects the model.
    UsageError
        The provider is not available, or it does not work here.
    """

    def __init__(
        self, model: str | bytes | onnx.ModelProto, provider: str | None = None, *, optimize: bool = True,
        threads: int = 0, keep: bool = True, spin: bool = True,
    ) -> None:  # fmt: skip
        options = _settings(threads or thread_limit(), optimize=optimize, keep=keep, spin=spin)
        self.promoted = False
        chosen = CPU if provider is None else provider_for(provider)
        try:
            self._session = _started(model, options, chosen)
            if any("bfloat16" in value.type for value in (*self._session.get_inputs(), *self._session.get_outputs())):
                raise TypeError("numpy arrays cannot feed bfloat16")
        except (FileError, UsageError):
            raise
        except Exception as error:  # onnxruntime raises a dozen unrelated types, all of them about this model
            if chosen != CPU and not works(chosen):
                raise _broken(chosen, _first_line(error)) from error
            promoted, where = _promoted(model), "" if chosen == CPU else f" on {chosen}"
            refused = ModelError(f"onnxruntime cannot load the model{where}: {_first_line(error)}")
            if promoted is None:
                raise refused from error
            self.promoted = True
            try:
                self._session = _started(promoted, options, chosen)
            except FileError:
                raise
            except Exception:  # the first error is about what the user gave
                raise refused from error
        self.inputs: dict[str, tuple[tuple[int | str | None, ...], np.dtype]] = {
            i.name: (tuple(i.shape), np.dtype(_DTYPES.get(i.type, np.float32))) for i in self._session.get_inputs()
        }
        self.outputs: list[str] = [output.name for output in self._session.get_outputs()]
        self._may_loop = _may_loop(model)

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> list[Any]:
        """Run once.

        Raises
        ------
        ModelError
            The model cannot run on these feeds.
        TooLongError
            It holds a Loop, and was stopped after :data:`RUN_SECONDS`.
        """
        return self._timed(feeds, outputs)[0]

    def seconds(self, feeds: Mapping[str, np.ndarray]) -> float:
        """Run once; wall-clock seconds."""
        return self._timed(feeds, None)[1]

    def _timed(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None) -> tuple[list[Any], float]:
        if self.promoted:
            feeds = {
                n: _single(n, v) if n in self.inputs and self.inputs[n][1] == np.float32 else v
                for n, v in feeds.items()
            }
        with _watched() if self._may_loop else nullcontext() as options:
            begin = time.perf_counter()
            try:
                return self._session.run(outputs, dict(feeds), options), time.perf_counter() - begin
            except Exception as error:
                if options is not None and options.terminate:
                    raise TooLongError(
                        f"the model still ran after {RUN_SECONDS:g} s and was stopped: a Loop in it has no end, or needs a "
                        "smaller --input-shape"
                    ) from error
                raise ModelError(f"onnxruntime cannot run the model: {_first_line(error)}") from error


def _may_loop(model: str | bytes | onnx.ModelProto) -> bool:
    """Whether there is a Loop in a model: the size of its inputs bounds every other operator's time."""
    if isinstance(model, onnx.ModelProto):
        graphs = (model.graph, *model.functions)
        return any(node.op_type == "Loop" for graph in graphs for node in every_node(graph))
    if isinstance(model, bytes):
        return b"Loop" in model
    with pathlib.Path(model).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"Loop") >= 0


@contextmanager
def _watched() -> Iterator[onnxruntime.RunOptions]:
    """Options of a run that is stopped, before its next operator, once it has taken :data:`RUN_SECONDS`."""
    options = onnxruntime.RunOptions()
    watch = threading.Timer(RUN_SECONDS, setattr, (options, "terminate", True))
    watch.daemon = True
    watch.start()
    try:
        yield options
    finally:
        watch.cancel()


class KernelClock:
    """A model of one layer, and the time its operators take; what changes the layout of tensors around it is left out."""

    def __init__(self, model: bytes, provider: str | None = None) -> None:
        self._folder = files.temporary_folder()
        options = _settings(thread_limit(), spin=False)
        options.enable_profiling = True
        options.profile_file_prefix = f"{self._folder.name}/kernels"
        try:
            self._session = _started(model, options, CPU if provider is None else provider_for(provider))
            shapes = {i.name: tuple(i.shape) for i in self._session.get_inputs()}
            dtypes = {i.name: np.dtype(_DTYPES.get(i.type, np.float32)) for i in self._session.get_inputs()}
            self._feeds = random_feeds({name: (shapes[name], dtypes[name]) for name in shapes}, shapes)
        except Exception as error:  # as in Session
            raise ModelError(f"onnxruntime cannot load the layer: {_first_line(error)}") from error
        self._runs = 0

    def run(self) -> None:
        """Run once."""
        try:
            self._session.run(None, self._feeds)
        except Exception as error:
            raise ModelError(f"onnxruntime cannot run the layer: {_first_line(error)}") from error
        self._runs += 1

    def ms(self) -> np.ndarray:
        """Milliseconds of every run so far, float64 ``(n_runs,)``; the clock cannot run after that."""
        events = json.loads(pathlib.Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        self._folder.cleanup()
        kernels = [e for e in events if e.get("cat") == "Node" and str(e.get("name", "")).endswith("_kernel_time")]
        taken = [e["dur"] / 1e3 for e in kernels if not str(e["args"].get("op_name", "")).startswith("Reorder")]
        return np.array(taken, np.float64).reshape(self._runs, -1).sum(1)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let numpy's linear algebra use one thread: sums then do not depend on the number of cores."""
    with threadpool_limits(1, "blas"):
        yield


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
    except ModelError:
        raise
    except Exception:  # not a model at all: onnxruntime's own error says so
        return None


def _single(name: str, values: np.ndarray) -> np.ndarray:
    """Values in float32; :class:`ModelError` where that cannot hold them."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    if values.dtype == np.float64 and not np.array_equal(np.isinf(single), np.isinf(values)):
        raise ModelError(f"{name}: holds values beyond float32, in which onnxruntime would run it; rescale the model")
    return single


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
            proto.CopyFrom(numpy_helper.from_array(_single(proto.name, external.array(proto)), proto.name))

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


def _settings(
    threads: int, *, optimize: bool = True, keep: bool = True, spin: bool = True
) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if not optimize or not keep:
        options.enable_cpu_mem_arena = False
    if not (keep and spin):
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _started(
    model: str | bytes | onnx.ModelProto, options: onnxruntime.SessionOptions, provider: str
) -> onnxruntime.InferenceSession:
    """Start a session; one that left the provider out, as onnxruntime does where a driver is missing, is an error."""
    if isinstance(model, onnx.ModelProto):
        if storage.has_parts(model):
            with storage.temporary_file(model) as path:
                return _started(path, options, provider)
        model = model.SerializeToString()
    asked = [(provider, _EXACT[provider])] if provider in _EXACT else [provider]
    # By itself onnxruntime would print to stdout and go on with another provider.
    session = onnxruntime.InferenceSession(model, options, providers=asked, enable_fallback=0)
    if provider not in session.get_providers():
        raise _broken(provider, f"onnxruntime took {session.get_providers()[0]} instead")
    return session


def _broken(provider: str, why: str) -> UsageError:
    return UsageError(
        f"provider {provider} is installed but does not work here ({why}); check its driver and libraries against what "
        f"onnxruntime {VERSION} needs, or use --provider CPU"
    )


@lru_cache
def _schemas() -> dict[tuple[str, str], Any]:
    found = sorted(onnxruntime.capi.onnxruntime_pybind11_state.get_all_operator_schema(), key=lambda s: s.since_version)
    return {(schema.domain, schema.name): schema for schema in found}


def schema(op: str, domain: str) -> Any | None:
    """What onnxruntime knows of an operator of its own, as ``onnx.defs`` describes one; None where it has none."""
    return _schemas().get((domain, op))


def available() -> list[str]:
    """Full names of the execution providers that onnxruntime has."""
    return list(onnxruntime.get_available_providers())


def provider_for(name: str = "") -> str:
    """Full name of the execution provider that runs models where a user asks for ``name``.

    ``name`` may leave out "ExecutionProvider"; without a name that is CUDA where it works, else the CPU.

    Raises
    ------
    UsageError
        onnxruntime does not have it.
    """
    if not name:
        return CUDA if _has_cuda() and works(CUDA) else CPU
    here = available()
    full = next((p for p in here if p.lower() in (name.lower(), name.lower() + "executionprovider")), None)
    if full is None:
        raise UsageError(f"provider {name} is not available here; available: {', '.join(here)}")
    return full


@lru_cache
def works(provider: str) -> bool:
    """Whether a session with a provider that onnxruntime has runs: that it is installed says nothing about its driver."""
    x, y = (onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "probe", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    try:
        options = _settings(1, keep=False)
        _started(model.SerializeToString(), options, provider).run(None, {"x": np.ones(1, np.float32)})
    except Exception:  # each provider has errors of its own
        return False
    return True


def _has_cuda() -> bool:
    return CUDA in available()


def provider_notes(name: str) -> tuple[str, ...]:
    """What a user should know who did not name a provider."""
    if name or not _has_cuda():
        return ()
    if works(CUDA):
        return (f"models ran on {CUDA}; --provider CPU takes the CPU",)
    return (f"{CUDA} is installed but does not work here; models ran on the CPU",)


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
    line = str(error).strip().splitlines()[0]
    return re.sub(r"Load model from \S+ failed: ?", "", line)[:300]  # a temporary file, of which nobody knows
