"""Single operators as models, and whether what PyTorch computes from them is right: value and slope."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

pytest.importorskip("torch")

import torch

from onnxprune import runtime
from onnxprune.train import OnnxModule
from onnxprune.train.kernels import find

torch.set_num_threads(1)


def normal(*shape: int) -> np.ndarray:
    """Seeded standard normal numbers in float32."""
    return np.random.default_rng(sum(shape) + 31 * len(shape)).standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    """Seeded numbers between 0.5 and 1.5."""
    return np.random.default_rng(sum(shape) + 1).uniform(0.5, 1.5, shape).astype(np.float32)


def integers(*values: int, dtype: type = np.int64) -> np.ndarray:
    """A vector of integers."""
    return np.array(values, dtype)


@dataclass(frozen=True)
class Case:
    """One operator on given inputs: the first is the graph's, the others are its constants.

    Attributes
    ----------
    smooth
        Whether slopes exist where it is evaluated.
    reference
        Compare with ``onnx.reference``, because onnxruntime has no kernel.
    """

    op: str
    arrays: Sequence[np.ndarray | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 21
    outputs: int = 1
    domain: str = ""
    smooth: bool = True
    reference: bool = False

    def model(self, wide: bool = False) -> onnx.ModelProto:
        """Build it; with ``wide`` in double."""
        arrays = [_widened(a) if wide else a for a in self.arrays]
        names = [f"in{i}" if a is not None else "" for i, a in enumerate(arrays)]
        outputs = [f"out{i}" for i in range(self.outputs)]
        node = helper.make_node(self.op, names, outputs, domain=self.domain, **self.attributes)
        graph = helper.make_graph(
            [node],
            "case",
            [helper.make_tensor_value_info("in0", helper.np_dtype_to_tensor_dtype(arrays[0].dtype), arrays[0].shape)],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [numpy_helper.from_array(a, name) for a, name in zip(arrays[1:], names[1:], strict=True) if a is not None],
        )
        imports = [helper.make_opsetid("", self.opset)]
        imports += [helper.make_opsetid(self.domain, 1)] if self.domain else []
        return helper.make_model(graph, opset_imports=imports, ir_version=10)

    def trained(self) -> list[str]:
        """Names of the constants that are floats, but for those that the kernel reads as numbers."""
        entry = find(self.domain, self.op)
        numbers = {0} if entry is None else {0, *entry.host}
        return [
            f"in{i}" for i, a in enumerate(self.arrays) if i not in numbers and a is not None and a.dtype.kind == "f"
        ]


def _widened(array: np.ndarray | None) -> np.ndarray | None:
    return array.astype(np.float64) if array is not None and array.dtype == np.float32 else array


def results(value: Any) -> tuple[Any, ...]:
    """Outputs of a module as a tuple."""
    return value if isinstance(value, tuple) else (value,)


def spread(expected: np.ndarray, given: np.ndarray) -> float:
    """Largest difference relative to the largest magnitude."""
    expected, given = expected.astype(np.float64), given.astype(np.float64)
    assert expected.shape == given.shape
    return float(np.abs(expected - given).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-6))


def agrees(case: Case, tolerance: float = 1e-5) -> None:
    """PyTorch computes what onnxruntime does; types agree but for integers that are kept as floats."""
    model = case.model()
    if case.reference:
        expected = ReferenceEvaluator(model).run(None, {"in0": case.arrays[0]})
    else:
        expected = runtime.Session(model.SerializeToString(), optimize=False, threads=1).run({"in0": case.arrays[0]})
    for trained in ([], case.trained()):
        with torch.no_grad():
            module = OnnxModule(model, trained)
            given = [y.numpy() for y in results(module(torch.from_numpy(case.arrays[0])))]
        for want, have in zip(expected, given, strict=True):
            assert spread(want, have) <= tolerance
            assert have.dtype in (want.dtype, np.float32)


def slopes(case: Case) -> None:
    """Gradients for the input and every floating constant are what differences in double say."""
    module = OnnxModule(case.model(wide=True), case.trained())
    x = torch.from_numpy(_widened(case.arrays[0]))
    if x.is_floating_point():
        x.requires_grad_()

    def function(x: Any, *parameters: Any) -> Any:
        given = dict(zip(case.trained(), parameters, strict=True))
        ys = results(torch.func.functional_call(module, given, (x,)))
        return tuple(y for y in ys if y.is_floating_point() and y.requires_grad)

    parameters = [module.get_parameter(name) for name in case.trained()]
    assert torch.autograd.gradcheck(function, (x, *parameters), atol=1e-6, rtol=1e-4, fast_mode=True)
