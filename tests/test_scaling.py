"""Time grows with the number of nodes, not with its square."""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

import onnxprune
from onnxprune import onnx_io, pipeline

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(params=["residual_chain", "transformer"])
def of_nodes(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """A model of about so many nodes, as the benchmark builds it."""
    monkeypatch.syspath_prepend(TOOLS)
    if request.param == "residual_chain":
        return lambda count: importlib.import_module("bench").synthetic(count, 8)

    def transformer(count: int) -> onnx.ModelProto:
        path = tmp_path / f"{count}.onnx"
        n_bytes = count // 23 * 2 * 12 * 32 * 32 + 4 * 100 * 32
        importlib.import_module("big_model").build(path, n_bytes / 1e9, hidden=32, vocabulary=100, head=8)
        return onnx_io.load(path)

    return transformer


def seconds(work: Callable[[], object]) -> float:
    """Processor time of the fastest of three runs: what other programs do at the time counts little."""
    taken = []
    for _ in range(3):
        gc.collect()
        begin = time.process_time()
        work()
        taken.append(time.process_time() - begin)
    return min(taken)


def test_coupling_is_linear(of_nodes: Callable) -> None:
    """Reading and coupling four times as many nodes takes less than eight times as long (sixteen, were it the square)."""
    small, large = of_nodes(500), of_nodes(2000)
    assert 3.6 < len(large.graph.node) / len(small.graph.node) < 4.4
    times = [seconds(lambda m=m: pipeline.load(m, onnxprune.Options(), pipeline.Clock())) for m in (small, large)]
    assert times[1] / times[0] < 8


def test_pruning_is_not_quadratic(of_nodes: Callable) -> None:
    """Selecting and applying, too, takes less than nine times as long on four times as many nodes."""
    models = [of_nodes(count) for count in (300, 1200)]
    times = [seconds(lambda m=m: onnxprune.prune(m, target_mac=0.7, proof=False)) for m in models]
    assert times[1] / times[0] < 9
