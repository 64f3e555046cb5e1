"""An ONNX graph as a ``torch.nn.Module`` whose parameters are the graph's own initializers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from onnxprune import onnx_io
from onnxprune.amend import amend
from onnxprune.errors import ModelError, UsageError
from onnxprune.prepare import inline
from onnxprune.train.program import build, parameter_values
from onnxprune.trainable import trainable as trainable_constants

MAX_SHAPES = 64
"""Input shapes whose shape arithmetic is remembered."""


class OnnxModule(nn.Module):
    """Executes an ONNX graph differentiably.

    Parameters are keyed by initializer name, dots included; what several nodes share is one parameter. Constants are folded
    once, shape arithmetic once per input shape, and dynamic axes stay dynamic. Half precision is computed in float32.

    Parameters
    ----------
    model
        A file or a model; it is not changed.
    trainable
        Names of the constants that become parameters; by default what :func:`onnxprune.trainable.trainable` finds.

    Raises
    ------
    ModelError
        Operators without a kernel, all of them at once, or names that are no floating constants of the graph.
    """

    def __init__(self, model: onnx.ModelProto | str | os.PathLike, trainable: Iterable[str] | None = None) -> None:
        super().__init__()
        self._source = model if isinstance(model, onnx.ModelProto) else onnx_io.load(model)
        flat = inline(self._source)
        chosen = (
            [k for k, why in trainable_constants(flat).items() if not why] if trainable is None else list(trainable)
        )
        values = parameter_values(flat, chosen)
        if lost := [name for name in chosen if name not in values or not values[name].is_floating_point()]:
            raise ModelError(f"{lost[0]}: no floating-point constant of the graph; nothing can be trained there")
        if not values.keys() <= parameter_values(self._source, chosen).keys():
            self._source = flat  # a local function holds it, which other calls may share
        for name, value in values.items():
            self._parameters[name] = nn.Parameter(value)  # register_parameter forbids dots
        opsets = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in flat.opset_import}
        self.program = build(flat.graph, opsets, values.keys())
        self._on_host: dict[str, Tensor] = {}
        read = {
            name
            for step in self.program.steps
            for place, name in enumerate(step.call.inputs)
            if step.entry is None
            or (place not in step.entry.host and step.call.outputs[0] not in self.program.measured)
        } | set(self.program.outputs)
        bodies = any(step.entry is None for step in self.program.steps)
        for name, value in self.program.constants.items():
            if name in read or bodies:
                self._buffers[name] = value
                self._non_persistent_buffers_set.add(name)
            else:
                self._on_host[name] = value
        self._shapes: dict[tuple, dict[str, Tensor]] = {}

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in the order of ``forward``."""
        return self.program.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return self.program.outputs

    def forward(self, *inputs: Tensor, wanted: Sequence[str] = (), **named: Tensor) -> Any:
        """Run the graph.

        Parameters
        ----------
        inputs, named
            The graph's inputs in order, or by name.
        wanted
            Names of any tensors of the graph; returns them by name instead of the outputs.

        Returns
        -------
        The output; a tuple where there are several; with ``wanted`` a dict.
        """
        feeds = {**dict(zip(self.inputs, inputs, strict=False)), **named}
        if len(inputs) > len(self.inputs) or feeds.keys() != set(self.inputs):
            raise UsageError(f"the graph takes {', '.join(self.inputs)}; given were {len(inputs)} and {list(named)}")
        feeds = {name: x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for name, x in feeds.items()}
        device = next(iter(feeds.values())).device if feeds else torch.device("cpu")
        values: dict[str, Tensor] = {**self._on_host, **self._buffers, **self._parameters, **feeds}  # type: ignore[dict-item]
        key = tuple(tuple(x.shape) for x in feeds.values())
        known = self._shapes.get(key)
        values.update(known or {})
        keep = {*wanted, *self.program.measured} if known is None else set(wanted)
        self.program.run(values, device, keep, skip=known is not None)
        if known is None:
            if len(self._shapes) >= MAX_SHAPES:
                self._shapes.clear()
            self._shapes[key] = {name: values[name] for name in self.program.measured if name in values}
        if wanted:
            return {name: values[name] for name in wanted}
        results = tuple(values[name] for name in self.outputs)
        return results[0] if len(results) == 1 else results

    def to_onnx(self, state: Mapping[str, Tensor] | None = None) -> onnx.ModelProto:
        """Return the graph with the parameters' values (or those of a ``state_dict``): nothing but their bytes differs.

        Local functions are inlined where one holds a constant that is trained.
        """
        chosen = dict(self.named_parameters()) if state is None else state
        if strange := [name for name in chosen if name not in self._parameters]:
            raise UsageError(f"{strange[0]}: no parameter of this graph")
        return amend(
            self._source,
            {
                k: v.detach().cpu().float().numpy() if v.dtype == torch.bfloat16 else v.detach().cpu().numpy()
                for k, v in chosen.items()
            },
            {},
        )

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Names with dots are parameters of this module, not of modules inside it."""
        found: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, found, error_msgs)
        unexpected_keys.extend(key for key in found if key.removeprefix(prefix) not in self._parameters)
