"""Reductions: space drops out, channels end, searches freeze."""

from functools import partial

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

import oracle
from graphs import Tiny, sandwich
from oracle import Case

PASSES = {"a.w/0": range(6), "a.b/0": range(6), "z.w/1": range(6)}
ENDS = {"a.w/0": range(6), "a.b/0": range(6)}
SUMS = ["ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum"]
STATISTICS = ["ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp"]
NUMPY = {
    "ReduceMean": np.mean, "ReduceMax": np.max, "ReduceMin": np.min, "ReduceProd": np.prod,
    "ReduceLogSumExp": lambda y, axis, keepdims: np.log(np.sum(np.exp(y), axis=axis, keepdims=keepdims)),
}  # fmt: skip


def reduction(
    op: str, axes: list[int] | None, opset: int = 18, after: int = 6, *, keepdims: int = 1, **extra
) -> ModelProto:
    """Reduce between two convolutions; axes are an input from opset 18 on (ReduceSum: 13), an attribute before."""
    as_input = opset >= (13 if op == "ReduceSum" else 18)

    def middle(t: Tiny, y: str) -> str:
        y = t.node("Sigmoid", y) if op == "ReduceLogSum" else y
        operands = [t.constant(np.array(axes, np.int64))] if as_input and axes is not None else []
        attributes = {} if as_input or axes is None else {"axes": axes}
        y = t.node(op, y, *operands, name="op", keepdims=keepdims, **attributes, **extra)
        if not keepdims:
            y = t.node("Reshape", y, t.constant([1, after, -1, 1]))
        return y

    return sandwich(middle, after=after, opset=opset)


def reduce_everything() -> ModelProto:
    """Reduce all axes at once, as no axes mean."""
    t = Tiny()
    return t.build(t.node("ReduceSum", t.conv(t.input(1, 2, 4, 6), "a", 2, 6), name="op", keepdims=0))


def search(op: str, axis: int) -> ModelProto:
    """Search along an axis and use the indices as values."""

    def middle(t: Tiny, y: str) -> str:
        return t.node("Cast", t.node(op, y, name="op", axis=axis), to=TensorProto.FLOAT)

    return sandwich(middle, after=1 if axis in (1, -3) else 6)


def top_k(axis: int) -> ModelProto:
    """Take the two largest along an axis, and where they are."""

    def middle(t: Tiny, y: str) -> str:
        values, indices = t.node("TopK", y, t.constant([2]), name="op", outputs=2, axis=axis)
        return t.node("Add", values, t.node("Cast", indices, to=TensorProto.FLOAT))

    return sandwich(middle, after=2 if axis == 1 else 6)


def attention_over_channels() -> ModelProto:
    """Gate space by the mean and the maximum over channels (CBAM)."""

    def middle(t: Tiny, y: str) -> str:
        mean, largest = (t.node(op, y, name=op, axes=[1]) for op in ("ReduceMean", "ReduceMax"))
        gate = t.conv(t.node("Concat", mean, largest, axis=1), "g", 2, 1, 3)
        return t.node("Mul", y, t.node("Sigmoid", gate))

    return sandwich(middle)


def frozen(op: str, text: str) -> dict[str, tuple[str, str, str]]:
    """Expect the channels before the operator to be frozen by it."""
    return dict.fromkeys(("a.w/0", "a.b/0"), ("op", op, text))


CASES = [
    *(Case(op, "space", partial(reduction, op, [2, 3]), PASSES, (6,)) for op in (*SUMS, *STATISTICS)),
    *(Case(op, "space-attribute-negative", partial(reduction, op, [-1], 11), PASSES, (6,)) for op in (*SUMS, *STATISTICS)),
    *(Case(op, "space-dropped", partial(reduction, op, [2], keepdims=0), PASSES, (6,)) for op in (*SUMS, *STATISTICS)),
    *(
        Case(op, "channels", partial(reduction, op, [1], after=1), ENDS, (6,),
             zero=() if op == "ReduceLogSum" else tuple(ENDS))
        for op in SUMS if op != "ReduceLogSum"
    ),
    *(Case(op, "channels", partial(reduction, op, [1], after=1), ENDS, (6,), redefined=True) for op in STATISTICS),
    *(Case(op, "channels-attribute", partial(reduction, op, [-3], 13, 1), ENDS, (6,), redefined=True) for op in STATISTICS),
    Case("ReduceMean", "channels-and-space", partial(reduction, "ReduceMean", [1, 2, 3], after=1), ENDS, (6,),
         redefined=True),
    Case("ReduceSum", "everything", reduce_everything, ENDS, (6,), zero=tuple(ENDS)),
    Case("ReduceSum", "no-axes-is-identity", partial(reduction, "ReduceSum", [], noop_with_empty_axes=1), PASSES, (6,)),
    Case("ReduceMean", "attention-over-channels", attention_over_channels, PASSES, (6,), redefined=True),
    *(Case(op, "channels", partial(search, op, 1), frozen=frozen(op, "returns its indices")) for op in ("ArgMax", "ArgMin")),
    *(Case(op, "channels-negative", partial(search, op, -3),
        frozen=frozen(op, "returns its indices")) for op in ("ArgMax", "ArgMin")),
    *(Case(op, "rows", partial(search, op, 2), PASSES, (6,)) for op in ("ArgMax", "ArgMin")),
    Case("TopK", "channels", partial(top_k, 1), frozen=frozen("TopK", "returns its indices")),
    Case("TopK", "rows", partial(top_k, 2), PASSES, (6,)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_channels_pass_or_end(case):
    """Reduced channels end there; other axes leave them alone; a search over channels freezes them."""
    oracle.assert_coupling(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pruned_equals_masked(case):
    """A removed channel counts as zero in a sum, and not at all in a mean or maximum."""
    oracle.assert_case_prunes(case)


@pytest.mark.parametrize("op", STATISTICS)
def test_statistics_run_over_the_kept_channels(op):
    """A mean, maximum or product over channels is that of the kept ones (in numpy)."""
    model = reduction(op, [1], after=1)
    coupling = oracle.couple_proto(model)
    pruned = oracle.prune_to(model, coupling, oracle.random_keep(coupling, np.random.default_rng(5)))
    kept = pruned.plan.initializers["a.w"][0]
    w = {name: array.astype(np.float64) for name, array in oracle.constants_of(model)}
    x = oracle.feeds_for(coupling)["x"]
    y = np.einsum("nchw,oc->nohw", x, w["a.w"][kept, :, 0, 0]) + w["a.b"][kept].reshape(-1, 1, 1)
    y = NUMPY[op](y, axis=1, keepdims=True)
    z = y * w["z.w"].reshape(-1, 1, 1) + w["z.b"].reshape(-1, 1, 1)
    oracle.assert_close(oracle.run(pruned.model, {"x": x}), [z.astype(np.float32)])


def test_logarithm_of_a_sum_ignores_removed_channels():
    """ReduceLogSum over channels is the logarithm of the sum of the kept ones (in numpy)."""
    model = reduction("ReduceLogSum", [1], after=1)
    coupling = oracle.couple_proto(model)
    pruned = oracle.prune_to(model, coupling, oracle.random_keep(coupling, np.random.default_rng(5)))
    assert pruned.proof.ok, pruned.proof.failures
    kept = pruned.plan.initializers["a.w"][0]
    w = {name: array.astype(np.float64) for name, array in oracle.constants_of(model)}
    x = oracle.feeds_for(coupling)["x"]
    y = np.einsum("nchw,oc->nohw", x, w["a.w"][kept, :, 0, 0]) + w["a.b"][kept].reshape(-1, 1, 1)
    y = np.log((1 / (1 + np.exp(-y))).sum(1, keepdims=True))
    z = y * w["z.w"].reshape(-1, 1, 1) + w["z.b"].reshape(-1, 1, 1)
    oracle.assert_close(oracle.run(pruned.model, {"x": x}), [z.astype(np.float32)])


def test_computed_axes_freeze():
    """Axes that are only known at run time freeze what they might reduce."""
    t = Tiny(opset=18)
    axes = t.node("Cast", t.input(1, name="axes"), to=TensorProto.INT64, name="kind")
    y = t.node("ReduceSum", t.conv(t.input(1, 2, 4, 6), "a", 2, 6), axes, name="op")
    coupling = oracle.couple_proto(t.build(y))
    reasons = {coupling.reasons[coupling.reason[c]].text for c in oracle.constant_axes(coupling)["a.w/0"]}
    assert reasons == {"reduction over computed axes"}
