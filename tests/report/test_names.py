"""Groups are called what they are; what is no residual stream, gate or attention is not called one."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto

import architectures
from graphs import Tiny, sandwich
from onnxprune import onnx_io
from onnxprune.cost import Cost
from onnxprune.model import Node
from onnxprune.passes.couple import couple
from onnxprune.report.names import names
from onnxprune.report.titles import MOST, Titles, common, text, tokens


def cost_of(model: ModelProto, attention: str = "auto") -> Cost:
    """Couple a model."""
    return Cost(couple(onnx_io.read(model, None), attention=attention))


def named(model: ModelProto, attention: str = "auto") -> dict[str, str]:
    """Name of the group of every labelled axis of a constant, as ``{"a.w 0": name}``."""
    cost = cost_of(model, attention)
    return {
        f"{tensor} {axis}": row.name
        for group, row in zip(cost.coupling.groups, names(cost), strict=True)
        for tensor, axis in group.members
    }


# -- the kinds ---------------------------------------------------------------------------------------------------------


def block(t: Tiny, x: str, op: str = "Add") -> str:
    """A residual block of two convolutions, ``b`` and ``c``."""
    return t.node(op, t.conv(t.node("Relu", t.conv(x, "b", 6, 8)), "c", 8, 6), x)


def projected(t: Tiny, x: str) -> str:
    """Two branches from the same channels, added."""
    return t.node("Add", t.conv(x, "b", 6, 8), t.conv(x, "c", 6, 8))


def tanh_gelu(t: Tiny, x: str) -> str:
    """The approximation adds x and its cube, and multiplies x by what it computes from x."""
    cube = t.node("Mul", t.node("Pow", x, t.constant(3.0)), t.constant(0.044715))
    inner = t.node("Tanh", t.node("Mul", t.node("Add", x, cube), t.constant(0.797884)))
    return t.node("Mul", x, t.node("Add", inner, t.constant(1.0)))


def swish(t: Tiny, x: str) -> str:
    """X times its sigmoid."""
    return t.node("Mul", x, t.node("Sigmoid", x))


def gated(t: Tiny, x: str) -> str:
    """One layer's output gates another's."""
    return t.node("Mul", t.node("Sigmoid", t.conv(x, "b", 6, 8)), t.conv(x, "c", 6, 8))


def gated_halves(t: Tiny, x: str) -> str:
    """One half of a layer's output gates the other."""
    left, right = t.node("Split", t.conv(x, "b", 6, 16), outputs=2, axis=1)
    return t.node("Mul", left, right)


def excited(t: Tiny, x: str) -> str:
    """Squeeze and excitation: a gate per channel, computed from all of them."""
    squeezed = t.conv(t.node("GlobalAveragePool", x), "b", 6, 4)
    return t.node("Mul", x, t.node("Sigmoid", t.conv(t.node("Relu", squeezed), "c", 4, 6)))


def skipped(t: Tiny, x: str) -> str:
    """Channels are laid beside what layers computed from them."""
    return t.node("Concat", x, t.conv(x, "b", 6, 8), axis=1)


def branched(t: Tiny, x: str) -> str:
    """Channels are laid beside others, computed from the same."""
    return t.node("Concat", t.conv(x, "b", 6, 8), t.conv(x, "c", 6, 4), axis=1)


def swapped(t: Tiny, x: str) -> str:
    """The channels of two layers are shuffled and meet at a depthwise convolution; each other half is left."""
    both = t.node("Concat", t.conv(x, "b", 6, 4), t.conv(x, "c", 6, 4), axis=1)
    left, right = t.node("Split", both, outputs=2, axis=1)
    return t.node("Max", left, right)


CASES = {
    "residual": (block, 6, {"a.w 0": "residual stream of 4 convs", "b.w 0": "hidden layer between b and c"}),
    "residual difference": (lambda t, x: block(t, x, "Sub"), 6, {"a.w 0": "residual stream of 4 convs"}),
    "branches": (projected, 8, {"b.w 0": "sum of b and c", "a.w 0": "channels of a, read by 2 convs"}),
    "gelu": (tanh_gelu, 6, {"a.w 0": "hidden layer between a and z"}),
    "swish": (swish, 6, {"a.w 0": "hidden layer between a and z"}),
    "gate": (gated, 8, {"b.w 0": "gated hidden layer between b, c and z"}),
    "gate of halves": (gated_halves, 8, {"b.w 0": "gated hidden layer between b and z"}),
    "squeeze and excitation": (
        excited, 6,
        {"a.w 0": "hidden layer between a and z with channel attention", "b.w 0": "hidden layer between b and c"},
    ),
    "depthwise": (
        lambda t, x: t.conv(x, "b", 6, 6, group=6, kernel=3), 6, {"a.w 0": "depthwise hidden layer between a and z"},
    ),
    "skip": (skipped, 14, {"a.w 0": "skip connection from a, read by 2 convs", "b.w 0": "hidden layer between b and z"}),
    "branches side by side": (branched, 12, {"a.w 0": "channels of a, read by 2 convs"}),
    "shared": (swapped, 4, {"b.w 0": "channels shared by b and c"}),
    "ends": (lambda t, x: x, 6, {"a.w 1": "input channels of a", "z.w 0": "output channels of z"}),
}  # fmt: skip


@pytest.mark.parametrize(("middle", "after", "expected"), CASES.values(), ids=CASES.keys())
def test_kinds(middle: Callable[[Tiny, str], str], after: int, expected: dict[str, str]) -> None:
    """Every kind of group has its name, and an activation that adds or multiplies is none of them."""
    found = named(sandwich(middle, after=after))
    assert {where: found.get(where) for where in expected} == expected


def attention(*, softmax: bool = True, heads: int = 2, size: int = 4) -> ModelProto:
    """Self-attention over 5 tokens: ``q``, ``k``, ``v`` from ``e``, then ``o``."""
    t = Tiny()
    x = t.linear(t.input(1, 5, 3), "e", 3, 6)
    q, k, v = (t.linear(x, name, 6, heads * size) for name in "qkv")
    split = t.constant(np.array([1, 5, heads, size]))
    q, v = (t.node("Transpose", t.node("Reshape", part, split), perm=(0, 2, 1, 3)) for part in (q, v))
    k = t.node("Transpose", t.node("Reshape", k, split), perm=(0, 2, 3, 1))
    scores = t.node("MatMul", q, k, name="scores")
    weights = t.node("Softmax", scores, axis=-1) if softmax else t.node("Relu", scores)
    mixed = t.node("Transpose", t.node("MatMul", weights, v, name="mixed"), perm=(0, 2, 1, 3))
    flat = t.node("Reshape", mixed, t.constant(np.array([1, 5, heads * size])))
    return t.build(t.linear(flat, "o", heads * size, 3))


def test_attention_dimensions() -> None:
    """What the scores sum over are query and key dimensions; what they weigh are value dimensions."""
    found = named(attention())
    assert found["q.w 1"] == found["k.w 1"] == "query and key dimensions of attention scores"
    assert found["v.w 1"] == found["o.w 0"] == "value dimensions of attention scores"


def test_attention_heads() -> None:
    """Heads are called so where they are what shrinks."""
    found = named(attention(), attention="heads")
    assert {found[f"{name}.w 1"] for name in "qkv"} == {"attention heads of scores"}


def test_no_attention_without_softmax() -> None:
    """A product of computed tensors alone is no attention."""
    assert not any("attention" in name for name in named(attention(softmax=False)).values())


def test_recurrent() -> None:
    """The units of a recurrent layer are its hidden state."""
    t = Tiny()
    weights = [t.random(1, 16, 3, name="l.w"), t.random(1, 16, 4, name="l.r")]
    t.node("LSTM", t.input(5, 1, 3), *weights, name="l", outputs=1, hidden_size=4)
    flat = t.node("Reshape", "l", t.constant(np.array([5, 4])))
    found = named(t.build(t.gemm(flat, "z", 4, 3)))
    assert found["z.w 0"] == "hidden state of l"


def test_embedding() -> None:
    """A table that indices look up gives embedding dimensions."""
    t = Tiny()
    indices = t.input(1, 5, name="i", kind=7)
    found = named(t.build(t.linear(t.node("Gather", t.random(9, 6, name="e.w"), indices, name="e"), "z", 6, 3)))
    assert found["e.w 1"] == "embedding dimensions of e"


def test_shared_weights_count_once() -> None:
    """Layers that share their weights are one layer, applied several times."""
    t = Tiny()
    x, y = t.conv(t.input(1, 2, 4, 6), "a", 2, 2), t.input(1, 2, 4, 6, name="y")
    weights = [t.random(6, 2, 1, 1, name="b.w"), t.random(3, 6, 1, 1, name="c.w")]
    ends = [t.node("Conv", t.node("Conv", source, weights[0]), weights[1]) for source in (x, y)]
    assert named(t.build(*ends))["b.w 0"].endswith(", applied 2 times")


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        pytest.param(architectures.edsr, ("residual stream of", "convs"), id="edsr"),
        pytest.param(architectures.ALL["resnet_bottleneck"], ("residual stream of stage1", "(6 convs)"), id="resnet"),
        pytest.param(architectures.ALL["unet_transposed"], ("skip connection from down0", "2 convs"), id="unet"),
        pytest.param(
            architectures.ALL["mobilenet_v2"], ("depthwise hidden layer of stage1/block0", ""), id="mobilenet"
        ),
        pytest.param(architectures.ALL["fpn"], ("sum of 3 convs of lateral", "read by 3 convs"), id="fpn"),
    ],
)
def test_architectures(build: architectures.Architecture, expected: tuple[str, str]) -> None:
    """Well-known networks have the groups that they are known for."""
    found = {row.name for row in names(cost_of(build()))}
    assert any(name.startswith(expected[0]) and name.endswith(expected[1]) for name in found), found


@pytest.mark.parametrize("key", architectures.ALL)
def test_names_differ_and_macs_agree(key: str) -> None:
    """No two groups have one name; each counts the layers whose cost falls when its channels go."""
    cost = cost_of(architectures.ALL[key]())
    rows = names(cost)
    assert len({row.name for row in rows}) == len(rows)
    full = cost.layers.values(cost.counts(np.ones(cost.coupling.n_classes, bool)))
    for group, row in zip(cost.coupling.groups, rows, strict=True):
        keep = np.ones(cost.coupling.n_classes, bool)
        keep[group.classes] = False
        concerned = cost.layers.values(cost.counts(keep)) < full
        assert row.mac == pytest.approx(full[concerned].sum())


def test_naming_is_quick() -> None:
    """A hundred blocks are named in a fraction of a second."""
    t = Tiny()
    x = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    for number in range(100):
        hidden = tanh_gelu(t, t.conv(x, f"b{number}", 6, 8))
        x = t.node("Add", t.conv(hidden, f"c{number}", 8, 6), x)
    cost = cost_of(t.build(t.conv(x, "z", 6, 3)))
    begin = time.perf_counter()
    rows = names(cost)
    assert time.perf_counter() - begin < 1
    assert rows[0].name == "residual stream of 202 convs"


# -- names of layers ---------------------------------------------------------------------------------------------------


def titles(*layers: tuple[str, str]) -> list[str]:
    """Names of a chain of convolutions, given as (node, weight)."""
    t = Tiny()
    x = t.input(1, 2, 4, 6)
    for number, (_, weight) in enumerate(layers):
        x = t.node("Conv", x, t.random(2, 2, 1, 1, name=weight), name=f"t{number}")
    model = t.build(x)
    for node, (name, _) in zip(model.graph.node, layers, strict=True):
        node.name = name
    ledger = cost_of(model).coupling.ledger
    found = Titles(ledger)
    return [found.name(work.node) for work in ledger.works]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        pytest.param(
            (("/layer1/layer1.0/conv1/Conv", "onnx::Conv_1"), ("/fc/Conv", "w")), ["layer1.0/conv1", "fc"], id="torch"
        ),
        pytest.param(
            (("node_conv_1", "layer1.0.conv1.weight"), ("node_conv_2", "val_3")),
            ["layer1.0.conv1", "node_conv_2"],
            id="parameter",
        ),
        pytest.param((("/m/a/Conv", "v"), ("/m/b/Conv", "w")), ["a", "b"], id="root"),
        pytest.param((("/m/a/Conv", "v"), ("/m/a/Conv_1", "w")), ["Conv", "Conv_1"], id="alike"),
        pytest.param((("", "a.weight.x"), ("", "w")), ["a.weight", "t1"], id="no-names"),
        pytest.param((("x/conv2d_3/Conv2D", "v"), ("x/conv2d_4/Conv2D", "w")), ["conv2d_3", "conv2d_4"], id="tf"),
    ],
)
def test_titles(layers: tuple[tuple[str, str], ...], expected: list[str]) -> None:
    """Of an exporter's names that is kept which tells layers apart; no two are called alike."""
    assert titles(*layers) == expected


def test_what_names_begin_with() -> None:
    """What several names begin with ends before a word, never before the number of a module."""
    paths = [tokens("features.3/conv.0"), tokens("features.3/conv.2")]
    assert text(common(paths)) == "features.3"
    assert common([tokens("features.0"), tokens("features.3")]) == ()
    assert common([tokens("a/b"), tokens("a/b")]) == ("a",)


def test_long_names_lose_their_middle() -> None:
    """A long name keeps where it begins and where it ends."""
    shown = text(tokens("/".join(["encoder", *(f"block{number}" for number in range(20)), "dense"])))
    assert len(shown) <= MOST + 3
    assert shown.startswith("encoder/block0") and shown.endswith("block19/dense")
    assert text(tokens("x" * 100)) == "x" * 100


def test_names_of_a_node_without_layers() -> None:
    """A node without multiply-accumulates has a name of the same kind."""
    ledger = cost_of(sandwich(lambda t, x: x)).coupling.ledger
    assert Titles(ledger).name(Node("/emb/Gather", "Gather", "", ("a",), ("b",), {})) == "emb"
