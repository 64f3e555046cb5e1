"""Labels as a whole: they partition, every operator has a case, nothing free breaks, nothing frozen is free."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from onnx import ModelProto

import architectures
import oracle
from graphs import Tiny, sandwich
from onnxprune import ops
from onnxprune.errors import OnnxPruneError
from onnxprune.labels import Atom, Ledger, Refusal, fixed, length
from onnxprune.passes.couple import components


def load(name: str) -> ModuleType:
    """Import a neighbouring test module from its file."""
    spec = spec_from_file_location(f"cases_{name}", Path(__file__).parent / "ops" / f"test_{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FAMILIES = {name: load(name) for name in ("linear", "elementwise", "norm", "pool", "reduce", "movement", "regions")}


# -- completeness ----------------------------------------------------------------------------------------------------


def test_every_operator_with_a_rule_has_a_case():
    """No operator is registered without a golden coupling in the tables of tests/ops, and no case is without a rule."""
    covered = {("", case.op) for family in FAMILIES.values() for case in family.CASES}
    assert ops.supported() - covered == set()
    assert covered - ops.supported() == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_contains_its_operator(family):
    """A case's graph has a node of the operator that it is listed under."""
    for case in FAMILIES[family].CASES:
        assert case.op in {node.op_type for node in case.build().graph.node}, str(case)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_refuses_something(family):
    """Each family has at least one case that freezes the channels before the operator."""
    assert any(not case.free for case in FAMILIES[family].CASES if case.free is not None)


# -- the ledger ------------------------------------------------------------------------------------------------------


def ledger() -> Ledger:
    """Return a ledger without a graph."""
    return Ledger(model=None)


def test_fresh_labels_are_never_reused():
    """Two atoms never share a label by accident."""
    book = ledger()
    assert np.array_equal(np.concatenate([book.fresh(3), book.fresh(2)]), np.arange(5))


def test_single_index_meets_anything():
    """An axis of one index broadcasts: nothing is tied or frozen."""
    book = ledger()
    axis = (book.atom(4),)
    assert book.unify(axis, (), []) is axis
    assert book.unify((), axis, []) is axis
    assert not book.ties
    assert not book.frozen


def test_label_that_meets_no_label_freezes():
    """Channels that meet an axis of equal length without labels are frozen, and the result cannot shrink."""
    book = ledger()
    axis = (book.atom(4),)
    out = book.unify(axis, fixed(4), [])
    assert length(out) == 4
    assert out[0].labels is None
    assert np.array_equal(book.frozen[0][0], axis[0].labels)


def test_axes_of_other_lengths_refuse():
    """Axes of different lengths never meet in a valid graph: a rule that lets them must not guess."""
    book = ledger()
    with pytest.raises(Refusal, match="axes of 4 and 6 indices meet"):
        book.unify((book.atom(4),), (book.atom(6),), [])


def test_finer_axis_splits_the_coarser():
    """Twelve indices that meet four times three become a grid, and the parts meet one by one."""
    book = ledger()
    coarse, rows, columns = book.atom(12), book.atom(4), book.atom(3)
    joints = []
    out = book.unify((coarse,), (rows, columns), joints)
    assert [atom.size for atom in out] == [4, 3]
    assert np.array_equal(book.splits[0].whole, coarse.labels.reshape(4, 3))
    assert len(book.ties) == 2
    assert joints


def test_regroup_reunites_what_it_split():
    """A Reshape and its inverse give back the very same atom."""
    book = ledger()
    atom = book.atom(6)
    layout = book.arrange([(), (atom,), fixed(4)])
    there = book.regroup(layout, (2, 3, 4))
    back = book.regroup(there, (1, 6, 4))
    assert back.axes[1] == (atom,)


def test_regroup_across_boundaries_freezes():
    """Six labels cannot be seen as rows of four."""
    book = ledger()
    out = book.regroup(book.arrange([(book.atom(9),), fixed(4)]), (4, 9))
    assert out.shape == (4, 9)
    assert all(atom.labels is None for axis in out.axes for atom in axis)
    assert len(np.unique(np.concatenate([labels for labels, _ in book.frozen]))) == 9


@pytest.mark.parametrize("indices", [[0, 2, 4], [4, 4, 1], [5, 4, 3, 2, 1, 0]])
def test_take_moves_labels(indices):
    """Picked indices carry the labels of their sources, in picked order, repeated where picked twice."""
    book = ledger()
    atom = book.atom(6)
    (taken,) = book.take((atom,), np.array(indices))
    assert np.array_equal(taken.labels, atom.labels[indices])


def test_one_index_taken_alone_freezes():
    """A single index has no axis to carry its label: it can never be removed."""
    book = ledger()
    atom = book.atom(6)
    assert book.take((atom,), np.array([3])) == ()
    assert np.array_equal(book.frozen[0][0], atom.labels[[3]])


def test_one_tensor_never_holds_an_atom_twice():
    """X times X transposed has two axes with equal labels but atoms of their own."""
    book = ledger()
    atom = book.atom(4)
    layout = book.arrange([(atom,), (atom,)])
    first, second = (axis[0] for axis in layout.axes)
    assert first is not second
    assert first.labels is second.labels


def test_unlabelled_neighbours_merge():
    """Fixed factors side by side are one fixed axis."""
    (axis,) = ledger().arrange([(Atom(2), Atom(3))]).axes
    assert [atom.size for atom in axis] == [6]


def test_components_equal_a_union_find():
    """The vectorised solver finds the same components as the textbook algorithm, on random ties."""
    rng = np.random.default_rng(0)
    for n in (1, 5, 40):
        pairs = [(rng.integers(0, n, 6), rng.integers(0, n, 6)) for _ in range(3)]
        parent = list(range(n))

        def find(i, parent=parent):
            while parent[i] != i:
                i = parent[i]
            return i

        for a, b in pairs:
            for i, j in zip(a, b, strict=True):
                low, high = sorted((find(i), find(j)))
                parent[high] = low
        assert components(n, pairs).tolist() == [find(i) for i in range(n)]


# -- architectures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", architectures.ALL)
def test_groups_partition_classes(name):
    """Every channel is in at most one group, every prunable one in exactly one; every label has a class."""
    coupling = oracle.couple_proto(architectures.ALL[name]())
    counted = np.zeros(coupling.n_classes, int)
    for group in coupling.groups:
        counted[group.classes] += 1
        assert (coupling.frozen[group.classes] == (group.frozen is not None)).all()
    assert counted.max() == 1
    in_constants = np.zeros(coupling.n_classes, bool)
    for member in coupling.members:
        in_constants[member.classes] = True
    assert (counted[~coupling.frozen & in_constants] == 1).all()
    assert len(coupling.classes) == coupling.ledger.n_labels
    assert set(np.unique(coupling.classes)) == set(range(coupling.n_classes))


# -- brute force: what is free, and what is not ----------------------------------------------------------------------


def small(family: str, name: str) -> Callable[[], ModelProto]:
    """Find a graph of the tables by its id."""
    return next(case.build for case in FAMILIES[family].CASES if str(case) == name)


def bottleneck() -> ModelProto:
    """Build an inverted residual: expand, depthwise, project, add."""

    def middle(t: Tiny, y: str) -> str:
        z = t.node("Clip", t.batch_norm(t.conv(y, "e", 4, 6), "en", 6), t.constant(-0.5), t.constant(2.0))
        return t.node("Add", y, t.conv(t.conv(z, "d", 6, 6, 3, group=6), "p", 6, 4))

    return sandwich(middle, 4)


BRUTE = {
    "conv": small("linear", "Conv-2d"),
    "grouped": small("linear", "Conv-grouped"),
    "transposed": small("linear", "ConvTranspose-grouped"),
    "bottleneck": bottleneck,
    "gate": small("elementwise", "Mul-attention-gate"),
    "dense-block": small("regions", "Concat-dense-block"),
    "split-and-join": small("regions", "Split-split-and-join"),
    "slice": small("regions", "Slice-middle"),
    "option-a": small("regions", "Pad-option-a"),
    "gather": small("regions", "Gather-duplicates"),
    "pixel-shuffle": small("movement", "DepthToSpace-dcr"),
    "channel-shuffle": small("movement", "Reshape-shuffle-between-groups"),
    "head": small("movement", "Reshape-head"),
    "attention": small("linear", "MatMul-attention-two-heads"),
}
REFUSING = {
    "lrn": small("norm", "LRN-channels"),
    "softmax": small("norm", "Softmax-channels"),
    "training": small("norm", "BatchNormalization-training"),
    "reflect": small("regions", "Pad-channels-reflect"),
    "crop": small("regions", "Pad-channels-crop"),
    "stride": small("regions", "Slice-every-fourth"),
    "one-index": small("regions", "Gather-scalar"),
    "indices": small("pool", "MaxPool-indices"),
    "across": small("movement", "Reshape-across-channels"),
    "meets-input": small("elementwise", "Add-meets-input"),
    "search": small("reduce", "ArgMax-channels"),
    "length-as-data": small("movement", "Shape-read-as-data"),
}


@pytest.mark.parametrize("name", BRUTE)
def test_every_free_channel_can_go_alone(name):
    """Removing any single unfrozen channel, and nothing else, is proved."""
    model = BRUTE[name]()
    coupling = oracle.couple_proto(model)
    sizes = {int(c): group.size for group in coupling.groups if group.frozen is None for c in group.classes}
    assert sizes
    for channel, size in sizes.items():
        if size > 1:
            keep = np.ones(coupling.n_classes, bool)
            keep[channel] = False
            assert oracle.prune_to(model, coupling, keep).proof.ok


def removable(model: ModelProto, channel: int) -> bool:
    """Whether a frozen channel can be removed after all: the result is valid, proved and equals the masked original."""
    coupling = oracle.couple_proto(model)
    reason = coupling.reason.copy()
    reason[channel] = -1
    coupling = replace(coupling, reason=reason)
    keep = np.ones(coupling.n_classes, bool)
    keep[channel] = False
    try:
        pruned = oracle.prune_to(model, coupling, keep)
        oracle.check(pruned.model)
        feeds = oracle.feeds_for(coupling)
        oracle.assert_close(oracle.run(pruned.model, feeds), oracle.masked_reference(model, pruned.plan, feeds))
    except (OnnxPruneError, AssertionError, IndexError, ValueError, RuntimeError, *oracle.BROKEN):
        return False
    return pruned.proof.ok and oracle.signature(pruned.model) == oracle.signature(model)


@pytest.mark.parametrize("name", [*BRUTE, *REFUSING])
def test_no_frozen_channel_could_go(name):
    """Removing a frozen channel breaks the graph, its signature or its values; only dead channels stay by choice."""
    model = (BRUTE | REFUSING)[name]()
    coupling = oracle.couple_proto(model)
    wrong = []
    for group in coupling.groups:
        if group.frozen is not None and group.size > 1 and "no operator consumes" not in group.frozen.text:
            wrong += [f"{group.members} ({group.frozen.text})" for c in group.classes[:2] if removable(model, c)]
    assert not wrong


def test_free_channels_pass_the_same_check():
    """The check for frozen channels says yes to one that is free, so it can tell."""
    coupling = oracle.couple_proto(BRUTE["conv"]())
    group = next(group for group in coupling.groups if group.frozen is None)
    assert removable(BRUTE["conv"](), group.classes[0])


@pytest.mark.parametrize(
    ("text", "build"), [("no rule for operator Einsum", partial(load("shared").unknown)), ("LRN", REFUSING["lrn"])]
)
def test_reasons_read_as_sentences(text, build):
    """A reason names the node, the operator and the cause."""
    coupling = oracle.couple_proto(build())
    reasons = [group.frozen for group in coupling.groups if group.frozen is not None]
    found = [reason for reason in reasons if text in reason.text]
    assert found
    assert all(reason.node == "op" and reason.op in text for reason in found)
