"""Normalisations tie their parameters to the channels; over channels their statistics run over the kept ones."""

from functools import partial

import numpy as np
import pytest
from onnx import ModelProto

import oracle
from graphs import Tiny, perceptron, sandwich
from oracle import Case

PASSES = {"a.w/0": range(6), "a.b/0": range(6), "z.w/1": range(6)}
OPSETS = {"GroupNormalization": 21, "RMSNormalization": 23}


def batch_norm(**attributes) -> ModelProto:
    """Normalise by stored statistics."""
    return sandwich(lambda t, y: t.batch_norm(y, "op", 6, **attributes))


def batch_norm_of_rows() -> ModelProto:
    """Normalise the output of a linear layer."""
    return perceptron(lambda t, y: t.batch_norm(y, "op", 6))


def training_batch_norm() -> ModelProto:
    """Normalise by the batch's own statistics."""

    def middle(t: Tiny, y: str) -> str:
        vectors = [
            t.random(6, name=f"op.{role}", offset=1.0, scale=0.2) for role in ("scale", "shift", "mean", "variance")
        ]
        return t.node("BatchNormalization", y, *vectors, name="op", outputs=3, training_mode=1)[0]

    return sandwich(middle)


def affine(op: str, size: tuple[int, ...] = (4, 6), **attributes) -> ModelProto:
    """Normalise with a scale and a shift per channel."""

    def middle(t: Tiny, y: str) -> str:
        parameters = [t.random(6, name=f"op.{role}", offset=1.0, scale=0.2) for role in ("scale", "shift")]
        return t.node(op, y, *parameters, name="op", **attributes)

    return sandwich(middle, size=size, opset=OPSETS.get(op, 17))


def layer_norm(op: str = "LayerNormalization", *, parameters: int = 2, outputs: int = 1, axis: int = -1) -> ModelProto:
    """Normalise the last axis of (batch, tokens, channels) between two linear layers."""
    t = Tiny(opset=OPSETS.get(op, 17))
    y = t.node("Add", t.linear(t.input(2, 5, 4), "a", 4, 6), t.random(6, name="a.b"))
    names = ("scale", "shift")[:parameters]
    vectors = [t.random(6, name=f"op.{role}", offset=1.0, scale=0.2) for role in names]
    y = t.node(op, y, *vectors, name="op", axis=axis, outputs=outputs)
    if outputs > 1:
        y, mean, deviation = y
        y = t.node("Mul", t.node("Add", y, mean), deviation)
    return t.build(t.linear(y, "z", 6, 3))


def layer_norm_maps() -> ModelProto:
    """Normalise over channels, rows and columns at once, with a parameter per element."""

    def middle(t: Tiny, y: str) -> str:
        return t.node("LayerNormalization", y, t.random(6, 4, 6, name="op.scale", offset=1.0), name="op", axis=1)

    return sandwich(middle)


def layer_norm_nhwc() -> ModelProto:
    """Move channels last, normalise them, move them back (ConvNeXt)."""

    def middle(t: Tiny, y: str) -> str:
        vectors = [t.random(6, name=f"op.{role}", offset=1.0, scale=0.2) for role in ("scale", "shift")]
        y = t.node("LayerNormalization", t.node("Transpose", y, perm=[0, 2, 3, 1]), *vectors, name="op")
        return t.node("Transpose", y, perm=[0, 3, 1, 2])

    return sandwich(middle)


def layer_norm_pixels() -> ModelProto:
    """Normalise over the columns of every map: channels only pass."""

    def middle(t: Tiny, y: str) -> str:
        return t.node(
            "LayerNormalization", y, t.random(6, name="op.scale", offset=1.0), name="op"
        )  # by default the last

    return sandwich(middle)


def group_norm_by_reshape(groups: int) -> ModelProto:
    """Write GroupNorm as exporters below opset 18 do: Reshape, InstanceNormalization, Reshape, Mul, Add."""

    def middle(t: Tiny, y: str) -> str:
        ones, zeros = t.constant(np.ones(groups, np.float32), "ones"), t.constant(np.zeros(groups, np.float32), "zeros")
        grouped = t.node("Reshape", y, t.constant([0, groups, -1]))
        back = t.node(
            "Reshape", t.node("InstanceNormalization", grouped, ones, zeros, name="op"), t.constant([1, 6, 4, 6])
        )
        scaled = t.node("Mul", back, t.random(6, 1, 1, name="scale", offset=1.0))
        return t.node("Add", scaled, t.random(6, 1, 1, name="shift"))

    return sandwich(middle)


def plain(op: str, opset: int = 17, **attributes) -> ModelProto:
    """Apply an operator without parameters to feature maps."""
    return sandwich(lambda t, y: t.node(op, y, name="op", **attributes), opset=opset)


def cumulative_sum(axis: int) -> ModelProto:
    """Add up along an axis."""
    return sandwich(lambda t, y: t.node("CumSum", y, t.constant(axis), name="op"))


def one_scale_per_group() -> ModelProto:
    """Use GroupNormalization as opset 18 defined it."""

    def middle(t: Tiny, y: str) -> str:
        vectors = [t.random(2, name=f"op.{role}", offset=1.0, scale=0.2) for role in ("scale", "shift")]
        return t.node("GroupNormalization", y, *vectors, name="op", num_groups=2)

    return sandwich(middle, opset=18)


SCALED = PASSES | {"op.scale/0": range(6), "op.shift/0": range(6)}
SEQUENCE = {"a.w/1": range(6), "a.b/0": range(6), "z.w/0": range(6)}
NORMED = SEQUENCE | {"op.scale/0": range(6), "op.shift/0": range(6)}
BY_RESHAPE = dict.fromkeys(("a.w/0", "a.b/0", "z.w/1", "scale/0", "shift/0"), range(6))


def frozen(op: str, text: str, *names: str) -> dict[str, tuple[str, str, str]]:
    """Expect these axes (default: the channels before the operator) to be frozen by it."""
    return dict.fromkeys(names or ("a.w/0", "a.b/0"), ("op", op, text))


CASES = [
    Case("BatchNormalization", "inference", batch_norm, SCALED | {"op.mean/0": range(6), "op.variance/0": range(6)}, (6,)),
    Case("BatchNormalization", "of-rows", batch_norm_of_rows,
         {f"{name}/{axis}": range(6) for name, axis in (("a.w", 1), ("a.b", 0), ("z.w", 0))}
         | {f"op.{role}/0": range(6) for role in ("scale", "shift", "mean", "variance")}, (6,)),
    Case(
        "BatchNormalization", "training", training_batch_norm,
        frozen=frozen("BatchNormalization", "training mode mixes the batch"),
    ),
    *(
        Case("InstanceNormalization", f"{len(size)}d", partial(affine, "InstanceNormalization", size), SCALED, (6,))
        for size in ((9,), (4, 6), (3, 4, 5))
    ),
    Case("InstanceNormalization", "group-norm", partial(group_norm_by_reshape, 2), BY_RESHAPE, (3,), redefined=True),
    Case(
        "InstanceNormalization", "group-norm-one-group", partial(group_norm_by_reshape, 1),
        {name: range(6) for name in BY_RESHAPE}, (6,), redefined=True,
    ),
    Case("LayerNormalization", "sequence", layer_norm, NORMED, (6,), redefined=True),
    Case(
        "LayerNormalization", "no-bias", partial(layer_norm, parameters=1), SEQUENCE | {"op.scale/0": range(6)}, (6,),
        redefined=True,
    ),
    Case("LayerNormalization", "statistics-used", partial(layer_norm, outputs=3), NORMED, (6,), redefined=True),
    Case("LayerNormalization", "positive-axis", partial(layer_norm, axis=2), NORMED, (6,), redefined=True),
    Case("LayerNormalization", "whole-maps", layer_norm_maps, PASSES | {"op.scale/0": range(6)}, (6,), redefined=True),
    Case("LayerNormalization", "channels-last", layer_norm_nhwc, SCALED, (6,), redefined=True),
    Case("LayerNormalization", "columns", layer_norm_pixels, PASSES, (6,)),
    Case(
        "RMSNormalization", "sequence", partial(layer_norm, "RMSNormalization", parameters=1),
        SEQUENCE | {"op.scale/0": range(6)}, (6,), redefined=True,
    ),
    Case("GroupNormalization", "two-groups", partial(affine, "GroupNormalization", num_groups=2), SCALED, (3,),
         redefined=True),
    Case(
        "GroupNormalization", "one-group", partial(affine, "GroupNormalization", num_groups=1), SCALED, (6,), redefined=True,
    ),
    Case(
        "GroupNormalization", "group-per-channel", partial(affine, "GroupNormalization", num_groups=6),
        frozen=frozen("GroupNormalization", "number of normalisation groups"),
    ),
    Case("LpNormalization", "channels-l2", partial(plain, "LpNormalization", axis=1, p=2), PASSES, (6,),
         zero=("a.w/0", "a.b/0")),
    Case("LpNormalization", "channels-l1", partial(plain, "LpNormalization", axis=-3, p=1), PASSES, (6,),
         zero=("a.w/0", "a.b/0")),
    Case("LpNormalization", "columns", partial(plain, "LpNormalization"), PASSES, (6,)),
    Case("LpNormalization", "positions", partial(sandwich, lambda t, y: t.node("LpNormalization", y, name="op"), size=(5,)),
         PASSES, (6,)),
    Case("LRN", "channels", partial(plain, "LRN", size=3), frozen=frozen("LRN", "neighbouring channels")),
    *(
        case
        for op in ("Softmax", "LogSoftmax", "Hardmax")
        for case in (
            Case(op, "channels", partial(plain, op, axis=1), frozen=frozen(op, "mixes its indices")),
            Case(op, "channels-negative", partial(plain, op, axis=-3), frozen=frozen(op, "mixes its indices")),
            Case(op, "columns", partial(plain, op), PASSES, (6,)),
            Case(op, "rows", partial(plain, op, axis=2), PASSES, (6,)),
            Case(op, "default-from-thirteen-on", partial(plain, op, 13), PASSES, (6,)),
            Case(op, "old-default", partial(plain, op, 11), frozen=frozen(op, "mixes its indices")),
            Case(op, "old-rows-and-columns", partial(plain, op, 11, axis=2), PASSES, (6,)),
        )
    ),
    Case("CumSum", "channels", partial(cumulative_sum, 1), frozen=frozen("CumSum", "mixes its indices")),
    Case("CumSum", "rows", partial(cumulative_sum, 2), PASSES, (6,)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parameters_tie_to_channels(case):
    """Scale, shift and statistics go with their channel; what mixes channels freezes them and says so."""
    oracle.assert_coupling(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pruned_equals_masked(case):
    """Pruning a normalised tensor is proved; where statistics run over channels the proof lists the node as redefined."""
    oracle.assert_case_prunes(case)


def weights(model: ModelProto) -> dict[str, np.ndarray]:
    """Return the float64 initializers of a model."""
    return {name: array.astype(np.float64) for name, array in oracle.constants_of(model)}


def pruned_columns(model: ModelProto, name: str, axis: int) -> tuple[oracle.Pruned, np.ndarray, np.ndarray]:
    """Prune at random; return the result, the kept indices of one axis and the input that feeds it."""
    coupling = oracle.couple_proto(model)
    pruned = oracle.prune_to(model, coupling, oracle.random_keep(coupling, np.random.default_rng(5)))
    return pruned, np.array(pruned.plan.initializers[name][axis]), oracle.feeds_for(coupling)["x"]


@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization"])
def test_statistics_run_over_the_kept_channels(op):
    """Mean and variance are those of the kept channels alone, and their parameters are the kept ones (in numpy)."""
    model = layer_norm(op, parameters=2 if op == "LayerNormalization" else 1)
    pruned, kept, x = pruned_columns(model, "a.w", 1)
    w = weights(model)
    y = (x @ w["a.w"] + w["a.b"])[..., kept]
    if op == "LayerNormalization":
        y = y - y.mean(-1, keepdims=True)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * w["op.scale"][kept]
    y = y + (w["op.shift"][kept] if "op.shift" in w else 0)
    oracle.assert_close(oracle.run(pruned.model, {"x": x}), [(y @ w["z.w"][kept]).astype(np.float32)])


@pytest.mark.parametrize(
    "build", [partial(affine, "GroupNormalization", num_groups=2), partial(group_norm_by_reshape, 2)]
)
def test_groups_keep_equally_many_channels(build):
    """Each normalisation group keeps as many channels, any of its own, and uses their statistics (in numpy)."""
    model = build()
    pruned, kept, x = pruned_columns(model, "a.w", 0)
    first, second = kept[kept < 3], kept[kept >= 3] - 3
    assert len(first) == len(second) < 3
    assert not np.array_equal(first, second)
    w = weights(model)
    scale, shift = (w.get(f"op.{role}", w.get(role)).reshape(-1, 1, 1)[kept] for role in ("scale", "shift"))
    y = np.einsum("nchw,oc->nohw", x, w["a.w"][kept, :, 0, 0]) + w["a.b"][kept].reshape(-1, 1, 1)
    grouped = y.reshape(1, 2, -1)
    grouped = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + 1e-5)
    y = grouped.reshape(y.shape) * scale + shift
    z = np.einsum("nchw,oc->nohw", y, w["z.w"][:, kept, 0, 0]) + w["z.b"].reshape(-1, 1, 1)
    oracle.assert_close(oracle.run(pruned.model, {"x": x}), [z.astype(np.float32)])


def test_scales_of_groups_stay():
    """GroupNormalization as opset 18 defined it (deprecated since) has parameters per group, which all stay."""
    oracle.assert_coupling(Case("", "", one_scale_per_group, PASSES, (3,)))
    model = one_scale_per_group()
    coupling = oracle.couple_proto(model)
    pruned = oracle.prune_to(model, coupling, oracle.random_keep(coupling, np.random.default_rng(2)))
    assert pruned.proof.ok, pruned.proof.failures
    assert pruned.proof.redefined == ("op",)
    assert "op.scale" not in pruned.plan.initializers


def test_vector_has_one_channel() -> None:
    """A BatchNormalization of a vector: its only channel stays."""
    t = Tiny()
    model = t.build(t.batch_norm(t.input(5), "op", 1))
    assert not oracle.couple_proto(model).bundles
