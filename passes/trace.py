"""Trace: run a graph over samples piece by piece, holding what later pieces read, within a bound of memory.

The graph's nodes are run in their own order, up to a node at a time. Between two pieces only live tensors are held
(the frontier). Samples whose frontier would exceed the bound are held as their inputs alone, and run again from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune import external
from onnxprune.protos import captures, constant_tensor, is_float
from onnxprune.runtime import Session, in_float32


class Memory:
    """Bytes that several traces may hold together."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held, self.peak = limit, 0, 0

    def hold(self, n_bytes: int) -> bool:
        """Take up memory, unless that would exceed the limit."""
        if self.held + n_bytes > self.limit:
            return False
        self.held += n_bytes
        self.peak = max(self.peak, self.held)
        return True


class Trace:
    """A model on its way through a list of feeds.

    Parameters
    ----------
    model
        The graph to run; control flow and functions may be in it, they run as single nodes.
    feeds
        Inputs of each run.
    wanted
        Tensors that the caller will ask for, each of them before ``advance`` has passed all its askers.
    memory
        What may be held between pieces.
    """

    def __init__(
        self, model: onnx.ModelProto, feeds: Sequence[Mapping[str, np.ndarray]], wanted: Iterable[str], memory: Memory,
        provider: str = "",
    ) -> None:  # fmt: skip
        promoted = in_float32(model)
        self._model, self._promoted = promoted or model, promoted is not None
        self._provider = provider
        self._feeds, self._memory = feeds, memory
        graph = self._model.graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._nodes: list[onnx.NodeProto] = []
        self._derived: dict[str, onnx.NodeProto] = {}
        for node in graph.node:
            tensor = constant_tensor(node) if node.op_type == "Constant" else None
            if tensor is not None:
                named = onnx.TensorProto()
                named.CopyFrom(tensor)
                named.name = node.output[0]
                self._constants[named.name] = named
            elif any(_reads(node)) and all(not n or n in self._constants or n in self._derived for n in _reads(node)):
                self._derived.update(dict.fromkeys(node.output, node))
            else:
                self._nodes.append(node)
        self._made_at = {name: -1 for name in (value.name for value in graph.input) if name not in self._constants}
        self._last_read: dict[str, int] = {}
        for place, node in enumerate(self._nodes):
            self._made_at.update(dict.fromkeys(filter(None, node.output), place))
            self._last_read.update(dict.fromkeys(filter(None, _reads(node)), place))
        self._behind: dict[str, onnx.NodeProto] = {}
        self._pending = dict.fromkeys(wanted)
        self._held: list[dict[str, np.ndarray] | None] = [None] * len(feeds)
        self._reached = [0] * len(feeds)
        self._sessions: dict[tuple[int, int], tuple[Session | None, list[str], list[str]]] = {}

    def place_of(self, tensor: str) -> int:
        """Number of nodes that must have run for a tensor to be there."""
        return self._made_at[tensor] + 1

    def place_before(self, key: str) -> int:
        """Number of nodes that run before the one whose first output is ``key``."""
        return self._made_at[key]

    def replace(self, name: str, value: np.ndarray) -> None:
        """Give a constant another value; what has already run keeps the old one."""
        if name in self._constants:
            dtype = helper.tensor_dtype_to_np_dtype(self._constants[name].data_type)
        else:
            dtype = np.dtype(np.float32) if self._promoted and is_float(value.dtype) else value.dtype
        self._constants[name] = numpy_helper.from_array(np.asarray(value, dtype, order="C"), name)
        self._sessions.clear()

    def rewire(self, key: str, index: int, name: str, value: np.ndarray) -> None:
        """Let a node read a new constant at input ``index``."""
        copy = onnx.NodeProto()
        copy.CopyFrom(self._nodes[self._made_at[key]])
        while len(copy.input) <= index:
            copy.input.append("")
        copy.input[index] = name
        self._nodes[self._made_at[key]] = copy
        self.replace(name, value)

    def add_behind(self, key: str, name: str, value: np.ndarray) -> None:
        """Let a new constant be added to a node's output, which keeps its name."""
        place = self._made_at[key]
        copy = onnx.NodeProto()
        copy.CopyFrom(self._nodes[place])
        copy.output[0] = f"{key}/unbiased"
        self._nodes[place] = copy
        self._behind[key] = helper.make_node("Add", [copy.output[0], name], [key])
        self.replace(name, value)

    def release(self, tensor: str) -> None:
        """A wanted tensor will not be asked for again."""
        self._pending.pop(tensor, None)

    def values(self, index: int, place: int, names: Sequence[str], *, stay: bool = False) -> list[np.ndarray]:
        """Run feed ``index`` up to ``place`` nodes and return tensors that are live there.

        With ``stay``, what is held does not move: the nodes run again next time, with other constants perhaps.
        """
        held, begin = self._held[index], self._reached[index]
        if held is None:
            held, begin = dict(self._feeds[index]), 0
        live = {n for n in self._made_at if self._made_at[n] < place and self._last_read.get(n, -1) >= place}
        live |= {n for n in self._pending if self._made_at.get(n, place) < place}
        asked = (set(names) if stay else live | set(names)) - held.keys()
        if place > begin:
            session, entries, outputs = self._session(begin, place, sorted(asked), held)
            values = session.run({name: held[name] for name in entries}, outputs) if session is not None else []
            held = {**held, **dict(zip(outputs, values, strict=True))}
        result = [held[name] for name in names]
        if stay:
            return result
        self._drop(index)
        kept = {name: value for name, value in held.items() if name in live}
        n_bytes = sum(v.nbytes for n, v in kept.items() if not (n in self._feeds[index] and v is self._feeds[index][n]))
        if self._memory.hold(n_bytes):
            self._held[index], self._reached[index] = kept, place
        return result

    def close(self) -> None:
        """Give back all memory."""
        for index in range(len(self._feeds)):
            self._drop(index)
        self._sessions.clear()

    def _drop(self, index: int) -> None:
        held = self._held[index]
        if held is not None:
            feed = self._feeds[index]
            self._memory.held -= sum(v.nbytes for n, v in held.items() if not (n in feed and v is feed[n]))
        self._held[index] = None

    def _session(
        self, begin: int, end: int, outputs: list[str], held: Mapping[str, np.ndarray]
    ) -> tuple[Session | None, list[str], list[str]]:
        key = (begin, end)
        known = self._sessions.get(key)
        if known is None or not set(outputs) <= set(known[2]):
            # All feeds have left earlier pieces behind, and what constants those had.
            self._sessions = {k: v for k, v in self._sessions.items() if k[1] == end}
            known = self._sessions[key] = self._build(begin, end, outputs, held)
        return known

    def _added(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        return self._behind.get(node.output[0].removesuffix("/unbiased")) if self._behind and node.output else None

    def _build(
        self, begin: int, end: int, outputs: list[str], held: Mapping[str, np.ndarray]
    ) -> tuple[Session | None, list[str], list[str]]:
        if not outputs:
            return None, [], []
        needed: list[onnx.NodeProto] = []
        wanted = set(outputs)
        run = [part for node in self._nodes[begin:end] for part in (node, self._added(node)) if part is not None]
        for node in reversed(run):
            if not wanted.isdisjoint(node.output):
                needed.append(node)
                wanted.update(_reads(node))
        needed.reverse()
        made = {name for node in needed for name in node.output}
        derived: dict[int, onnx.NodeProto] = {}
        stack = [name for node in needed for name in _reads(node)] + [name for name in outputs if name not in made]
        constants: dict[str, onnx.TensorProto] = {}
        entries: dict[str, None] = {}
        while stack:
            name = stack.pop()
            if not name or name in made:
                continue
            if name in self._constants:
                constants[name] = self._constants[name]
            elif name in self._derived:
                if id(self._derived[name]) not in derived:
                    derived[id(self._derived[name])] = self._derived[name]
                    stack.extend(_reads(self._derived[name]))
            else:
                entries[name] = None
        order = {name: place for place, name in enumerate(self._derived)}
        first = sorted(derived.values(), key=lambda node: order[next(filter(None, node.output))])
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(held[name].dtype), None)
            for name in entries
        ]
        graph = helper.make_graph(
            [*first, *needed], "piece", inputs, [onnx.ValueInfoProto(name=name) for name in outputs],
            [external.held(tensor) for tensor in constants.values()],
        )  # fmt: skip
        model = helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=max(self._model.ir_version, 8)
        )
        model.functions.extend(self._model.functions)
        return Session(model, self._provider, keep=False), list(entries), outputs


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node and its bodies read from outside."""
    yield from node.input
    yield from captures(node)
