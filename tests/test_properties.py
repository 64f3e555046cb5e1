"""Properties of any network: random small graphs either prune and prove, or refuse with a reason."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto

import oracle
from graphs import Tiny
from onnxprune import BudgetError, prune
from onnxprune.cost import Cost
from onnxprune.coupling import Coupling

EXAMPLES = settings(
    max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
SIZE = (4, 6)


class Net:
    """A graph that grows step by step; ``y`` is the last tensor, with ``channels`` on axis 1."""

    def __init__(self, draw: Callable) -> None:
        self.t, self.draw = Tiny(), draw
        self.y, self.channels, self.size = self.t.input(1, 2, *SIZE), 2, list(SIZE)
        self.older: list[tuple[str, int, list[int]]] = []
        self.n_layers = 0

    def name(self) -> str:
        """Return a name for the next layer."""
        self.n_layers += 1
        return f"l{self.n_layers}"

    def pick(self, *options):
        """Draw one of some options."""
        return self.draw(st.sampled_from(options))

    def layer(self, channels: int, kernel: int = 1, group: int = 1, **attributes) -> str:
        """Convolve the last tensor."""
        return self.t.conv(self.y, self.name(), self.channels, channels, kernel, group=group, **attributes)

    def conv(self) -> None:
        """Change the number of channels."""
        wanted = self.pick(4, 6, 8)
        self.y, self.channels = self.layer(wanted, self.pick(1, 3), bias=self.pick(True, False)), wanted

    def norm(self) -> None:
        """Batch normalisation and an activation that maps zero to something else."""
        self.y = self.t.batch_norm(self.y, self.name(), self.channels)
        self.y = self.t.node(self.pick("Sigmoid", "LeakyRelu", "Softplus"), self.y)

    def residual(self) -> None:
        """Add a branch of two layers."""
        start, channels = self.y, self.channels
        self.conv()
        self.y = self.t.node("LeakyRelu", self.y)
        self.y, self.channels = self.t.node("Add", start, self.layer(channels)), channels

    def concat(self) -> None:
        """Put new channels behind or in front of the old ones."""
        more = self.pick(1, 2, 4)
        parts = [self.y, self.layer(more)]
        self.y = self.t.node("Concat", *parts[:: self.pick(1, -1)], axis=1)
        self.channels += more

    def skip(self) -> None:
        """Concatenate a tensor from long before, if the size still fits."""
        fitting = [(y, channels) for y, channels, size in self.older if size == self.size]
        if fitting:
            y, channels = self.pick(*fitting)
            self.y, self.channels = self.t.node("Concat", self.y, y, axis=1), self.channels + channels

    def split(self) -> None:
        """Transform one part of a split, and join or multiply."""
        if self.channels % 2:
            return
        half = self.channels // 2
        self.y, other = self.t.node("Split", self.y, outputs=2, axis=1)
        self.channels = half
        self.y = self.layer(half, 3)
        if self.pick(True, False):
            self.y, self.channels = self.t.node("Concat", self.y, other, axis=1), 2 * half
        else:
            self.y = self.t.node("Mul", self.y, self.t.node("Sigmoid", other))

    def cut(self) -> None:
        """Take a slice of the channels, or every second one."""
        step = self.pick(1, 2, -1)
        picked = np.arange(self.channels)[::step] if step != 1 else np.arange(1, self.channels)
        if len(picked) > 1:
            begin, end = (int(picked[0]), 2**62 if step > 0 else -(2**62))
            operands = [self.t.constant([value]) for value in (begin, end, 1, step)]
            self.y, self.channels = self.t.node("Slice", self.y, *operands), len(picked)

    def gather(self) -> None:
        """Pick channels by indices, some of them twice."""
        indices = self.draw(st.lists(st.integers(-self.channels, self.channels - 1), min_size=2, max_size=6))
        self.y, self.channels = self.t.node("Gather", self.y, self.t.constant(indices), axis=1), len(indices)

    def pad(self) -> None:
        """Put zero channels around."""
        front, back = self.pick((0, 2), (1, 1), (2, 0))
        self.y = self.t.node("Pad", self.y, self.t.constant([0, front, 0, 0, 0, back, 0, 0]))
        self.channels += front + back

    def depthwise(self) -> None:
        """Filter every channel by itself, with a multiplier or without."""
        wanted = self.channels * self.pick(1, 1, 2)
        self.y, self.channels = self.layer(wanted, 3, self.channels), wanted

    def grouped(self) -> None:
        """Convolve within groups of channels."""
        groups = self.pick(2, 3, 4)
        if self.channels % groups == 0:
            wanted = groups * self.pick(1, 2, 3)
            self.y, self.channels = self.layer(wanted, 1, groups), wanted

    def shuffle(self) -> None:
        """Shuffle channels by Reshape, Transpose, Reshape."""
        groups = self.pick(2, 3)
        if self.channels % groups == 0:
            folded = self.t.constant([1, groups, self.channels // groups, *self.size])
            y = self.t.node("Transpose", self.t.node("Reshape", self.y, folded), perm=[0, 2, 1, 3, 4])
            self.y = self.t.node("Reshape", y, self.t.constant([1, -1, *self.size]))

    def tokens(self) -> None:
        """Apply a linear layer to the sequence of pixels."""
        wanted = self.pick(4, 6)
        y = self.t.node("Reshape", self.y, self.t.constant([1, self.channels, -1]))
        y = self.t.linear(self.t.node("Transpose", y, perm=[0, 2, 1]), self.name(), self.channels, wanted)
        y = self.t.node("Transpose", self.t.node("Add", y, self.t.random(wanted, name=self.name())), perm=[0, 2, 1])
        self.y, self.channels = self.t.node("Reshape", y, self.t.constant([1, wanted, *self.size])), wanted

    def fold(self) -> None:
        """See channels as rows, treat a part of every row apart or scale all rows by one table, and unfold them."""
        rows = self.pick(2, 3)
        each = self.channels // rows
        if self.channels % rows or each < 2:
            return
        y = self.t.node("Reshape", self.y, self.t.constant([1, rows, each, *self.size]))
        if self.pick(True, False):
            y = self.t.node("Mul", y, self.t.random(each, 1, 1, name=self.name(), offset=1.0))
        else:
            first = self.draw(st.integers(1, each - 1))
            left, right = self.t.node("Split", y, self.t.constant([first, each - first]), outputs=2, axis=2)
            y = self.t.node("Concat", *(self.t.node("Sigmoid", left), right)[:: self.pick(1, -1)], axis=2)
        self.y = self.t.node("Reshape", y, self.t.constant([1, -1, *self.size]))

    def attention(self) -> None:
        """Add what pixels see when they attend to each other, in heads."""
        heads, each, n_pixels = self.pick(2, 3), self.pick(2, 3), math.prod(self.size)
        y = self.t.node("Reshape", self.y, self.t.constant([1, self.channels, n_pixels]))
        tokens, name = self.t.node("Transpose", y, perm=[0, 2, 1]), self.name()

        def project(role: str) -> str:
            y = self.t.linear(tokens, f"{name}{role}", self.channels, heads * each)
            y = self.t.node("Add", y, self.t.random(heads * each, name=f"{name}{role}.b"))
            y = self.t.node("Reshape", y, self.t.constant([1, n_pixels, heads, -1]))
            return self.t.node("Transpose", y, perm=[0, 2, 1, 3])

        q, k, v = (project(role) for role in "qkv")
        scores = self.t.node("MatMul", q, self.t.node("Transpose", k, perm=[0, 1, 3, 2]))
        y = self.t.node("MatMul", self.t.node("Softmax", scores, axis=-1), v)
        y = self.t.node("Reshape", self.t.node("Transpose", y, perm=[0, 2, 1, 3]), self.t.constant([1, n_pixels, -1]))
        y = self.t.node("Transpose", self.t.linear(y, f"{name}o", heads * each, self.channels), perm=[0, 2, 1])
        self.y = self.t.node("Add", self.y, self.t.node("Reshape", y, self.t.constant([1, -1, *self.size])))

    def pool(self) -> None:
        """Halve the rows."""
        if self.size[0] > 1:
            window = {"kernel_shape": [2, 1], "strides": [2, 1]}
            self.y = self.t.node(self.pick("MaxPool", "AveragePool"), self.y, **window)
            self.size = [self.size[0] // 2, self.size[1]]

    def gate(self) -> None:
        """Scale channels by numbers computed from all of them."""
        gate = self.t.conv(self.t.node("GlobalAveragePool", self.y), self.name(), self.channels, 3)
        gate = self.t.conv(self.t.node("LeakyRelu", gate), self.name(), 3, self.channels)
        self.y = self.t.node("Mul", self.y, self.t.node("Sigmoid", gate))

    def pixels(self) -> None:
        """Trade channels for pixels and back."""
        if self.channels % 4 == 0:
            y = self.t.node("DepthToSpace", self.y, blocksize=2, mode=self.pick("DCR", "CRD"))
            self.y = self.t.node("SpaceToDepth", y, blocksize=2)

    def head(self) -> str:
        """Classify, or return maps."""
        kind = self.pick("pooled", "flat", "maps")
        if kind == "maps":
            return self.layer(3)
        y = self.t.node("Flatten", self.t.node("GlobalAveragePool", self.y) if kind == "pooled" else self.y)
        features = self.channels * (1 if kind == "pooled" else math.prod(self.size))
        return self.t.gemm(y, self.name(), features, 3)


STEPS = [
    Net.conv, Net.conv, Net.norm, Net.residual, Net.concat, Net.skip, Net.split, Net.cut, Net.gather, Net.pad, Net.depthwise,
    Net.grouped, Net.shuffle, Net.fold, Net.tokens, Net.attention, Net.pool, Net.gate, Net.pixels,
]  # fmt: skip


@st.composite
def networks(draw: Callable, steps: Sequence[Callable] = STEPS) -> ModelProto:
    """Draw a network of two to seven steps behind a first convolution."""
    net = Net(draw)
    net.conv()
    for step in draw(st.lists(st.sampled_from(steps), min_size=2, max_size=7)):
        net.older.append((net.y, net.channels, net.size))
        step(net)
    return net.t.build(net.head())


def queries(model: ModelProto) -> list[str]:
    """Axes of weights that stand for a masked operand where queries meet keys."""
    axes = {"q.w": 1, "q.b": 0}
    return [f"{t.name}/{axis}" for t in model.graph.initializer for end, axis in axes.items() if t.name.endswith(end)]


def macs_of(model: ModelProto) -> int:
    """Count multiply-accumulates from shapes alone: weight elements times positions, rows times columns times length."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    macs = {
        "Conv": lambda n: math.prod(shapes[n.input[1]]) * math.prod(shapes[n.output[0]][2:]),
        "Gemm": lambda n: math.prod(shapes[n.input[1]]),
        "MatMul": lambda n: math.prod(shapes[n.input[0]]) * shapes[n.input[1]][-1],
    }
    return sum(macs[node.op_type](node) for node in inferred.node if node.op_type in macs)


def nested_keeps(coupling: Coupling, seed: int) -> list[np.ndarray]:
    """Remove more and more units, never the last of a bundle."""
    order = np.random.default_rng(seed).random(coupling.n_classes)
    runs = [oracle.spare_units(bundle, order) for bundle in coupling.bundles]
    keeps = [np.ones(coupling.n_classes, bool)]
    for share in (0.3, 0.65, 1.0):
        keep = keeps[-1].copy()
        for units in runs:
            keep[units[: int(share * len(units))]] = False
        keeps.append(keep)
    return keeps


@EXAMPLES
@given(networks(), st.integers(0, 3))
def test_random_pruning_equals_masking(model, seed):
    """Whatever is free can be pruned by any amount: the result is valid, proved and equals the masked original."""
    coupling = oracle.couple_proto(model)
    keep = oracle.random_keep(coupling, np.random.default_rng(seed), (0.3, 0.5, 0.7, 1.0)[seed], spare=0.2)
    if not keep.all():
        oracle.assert_prunes(model, coupling, keep, zero=queries(model))


@EXAMPLES
@given(networks(), st.integers(0, 9))
def test_macs_never_rise_as_more_is_removed(model, seed):
    """Multiply-accumulates, weights and activations only fall, and are those counted from the pruned graph's shapes."""
    coupling = oracle.couple_proto(model)
    cost = Cost(coupling)
    keeps = nested_keeps(coupling, seed)
    costs = [cost.of(keep) for keep in keeps]
    for more, less in pairwise(costs):
        assert all(less[kind] <= more[kind] for kind in more)
    assert costs[0]["mac"] == macs_of(model)
    plan = oracle.make_plan(coupling, keeps[-1])
    assert costs[-1]["mac"] == macs_of(oracle.apply(model, coupling, plan, keeps[-1]))


@EXAMPLES
@given(networks())
def test_labels_partition_weights_and_pruning_nothing_is_identity(model):
    """Every index of every weight axis is in exactly one class, every free class in exactly one group."""
    coupling = oracle.couple_proto(model)
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for member in coupling.members:
        assert member.classes.shape[-1] == sizes[member.tensor][member.axis]
        if member.classes.ndim > 1:
            assert sizes[member.tensor][0] % len(member.classes) == 0
    counted = np.bincount(
        np.concatenate([np.zeros(0, int), *(g.classes for g in coupling.groups)]), minlength=coupling.n_classes
    )
    assert counted.max(initial=0) <= 1
    in_weights = np.zeros(coupling.n_classes, bool)
    for member in coupling.members:
        in_weights[member.classes] = True
    assert (counted[in_weights & ~coupling.frozen] == 1).all()
    assert all(coupling.reasons[index].text for index in coupling.reason if index >= 0)
    oracle.assert_identity(model, coupling)


@EXAMPLES
@given(networks(), st.floats(0.2, 1.0), st.sampled_from("abcd"))
def test_prune_proves_or_says_why_not(model, target, preset):
    """A random target is met by a proved model with the same signature, or is out of reach."""
    before = model.SerializeToString()
    try:
        result = prune(model, target_mac=target, preset=preset)
    except BudgetError as error:
        assert error.floor > target * macs_of(model)
        return
    finally:
        assert model.SerializeToString() == before
    assert result.report.proof is None or result.report.proof.ok
    assert macs_of(result.model) <= target * macs_of(model) * (1 + 1e-9)
    oracle.check(result.model)
    assert oracle.signature(result.model) == oracle.signature(model)


@pytest.mark.slow
@settings(EXAMPLES, max_examples=1000)
@given(networks(), st.integers(0, 3))
def test_many_random_prunings_equal_masking(model, seed):
    """The same over many more graphs."""
    coupling = oracle.couple_proto(model)
    keep = oracle.random_keep(coupling, np.random.default_rng(seed), (0.3, 0.5, 0.7, 1.0)[seed], spare=0.2)
    if not keep.all():
        oracle.assert_prunes(model, coupling, keep, zero=queries(model))
