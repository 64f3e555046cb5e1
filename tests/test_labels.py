"""Labels as a whole: they partition, every operator has a case, nothing free breaks, nothing frozen is free."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

import architectures
import oracle
from graphs import Tiny, sandwich
from onnxprune import ops
from onnxprune.coupling import Coupling
from onnxprune.errors import OnnxPruneError
from onnxprune.labels import Atom, Ledger, Reason, Refusal, fixed, length
from onnxprune.passes.couple import components, solve
from onnxprune.plan import Plan, make_plan
from oracle import Case


def load(name: str) -> ModuleType:
    """Import a neighbouring test module from its file."""
    spec = spec_from_file_location(f"cases_{name}", Path(__file__).parent / "ops" / f"test_{name}.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


FILES = sorted(path.stem.removeprefix("test_") for path in (Path(__file__).parent / "ops").glob("test_*.py"))
FAMILIES = {name: module for name, module in zip(FILES, map(load, FILES), strict=True) if hasattr(module, "CASES")}


# -- completeness ----------------------------------------------------------------------------------------------------


def test_every_operator_with_a_rule_has_a_case():
    """No operator is registered without a golden coupling in the tables of tests/ops, and no case is without a rule."""
    covered = set()
    for case in (case for family in FAMILIES.values() for case in family.CASES):
        if not any("no rule for operator" in text for _, _, text in case.frozen.values()):
            covered.update((node.domain, node.op_type) for node in case.build().graph.node if node.op_type == case.op)
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
    assert book.unify(axis, ()) is axis
    assert book.unify((), axis) is axis
    assert not book.ties
    assert not book.frozen


def test_label_that_meets_no_label_freezes():
    """Channels that meet an axis of equal length without labels are frozen, and the result cannot shrink."""
    book = ledger()
    axis = (book.atom(4),)
    out = book.unify(axis, fixed(4))
    assert length(out) == 4
    assert out[0].labels is None
    assert np.array_equal(book.frozen[0][0], axis[0].labels)


def test_axes_of_other_lengths_refuse():
    """Axes of different lengths never meet in a valid graph: a rule that lets them must not guess."""
    book = ledger()
    with pytest.raises(Refusal, match="axes of 4 and 6 indices meet"):
        book.unify((book.atom(4),), (book.atom(6),))


def test_finer_axis_splits_the_coarser():
    """Twelve indices that meet four times three become a grid, and the parts meet one by one."""
    book = ledger()
    coarse, rows, columns = book.atom(12), book.atom(4), book.atom(3)
    out = book.unify((coarse,), (rows, columns))
    assert [atom.size for atom in out] == [4, 3]
    (split,) = book.splits
    assert np.array_equal(split.whole, coarse.labels.reshape(4, 3))
    assert [(a.tolist(), b.tolist()) for a, b in book.ties] == [
        (split.outer.tolist(), rows.labels.tolist()),
        (split.inner.tolist(), columns.labels.tolist()),
    ]


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


class InnerShrinks:
    """Decisions of an earlier walk by which the inner factor of every split shrinks."""

    def shrinking(self, grid: np.ndarray) -> str:
        """Decide for the inner dimension."""
        return "inner"

    def can_shrink(self, labels: np.ndarray) -> bool:
        """Say that labels may go."""
        return True

    def reason(self, labels: np.ndarray) -> Reason:
        """Never asked."""
        raise AssertionError("no split of this ledger is frozen")


def second_walk() -> Ledger:
    """Return a ledger without a graph that knows how axes are split."""
    return Ledger(model=None, decisions=InnerShrinks())


def tied(book: Ledger) -> list[tuple[int, ...]]:
    """Labels that live or die together, as classes of more than one."""
    root = components(book.n_labels, book.ties)
    return [tuple(np.flatnonzero(root == label)) for label in np.unique(root) if (root == label).sum() > 1]


def test_second_walk_gives_every_row_labels_of_its_own():
    """Six channels seen as two rows of three keep their six labels; rows have to keep equally many."""
    book = second_walk()
    atom = book.atom(6)
    rows, columns = (axis[0] for axis in book.regroup(book.arrange([(atom,)]), (2, 3)).axes)
    assert rows.labels is None
    assert columns.rows == (rows,)
    assert columns.labels.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert [grid.tolist() for grid in book.balances] == [[[0, 1, 2], [3, 4, 5]]]
    assert not book.ties
    assert not book.splits


def test_second_walk_reunites_what_it_split():
    """Rows and what stands in them become the very same atom again, and nothing is tied."""
    book = second_walk()
    atom = book.atom(6)
    there = book.regroup(book.arrange([(), (atom,), fixed(4)]), (2, 3, 4))
    assert book.regroup(there, (1, 6, 4)).axes[1] == (atom,)
    assert not book.ties


def test_rows_that_are_gone_tie_what_they_told_apart():
    """A tensor that has the columns but not the rows has one set of labels."""
    book = second_walk()
    columns = book.regroup(book.arrange([(book.atom(6),)]), (2, 3)).axes[1]
    (axis,) = book.arrange([columns]).axes
    assert axis[0].labels.shape == (3,)
    assert tied(book) == [(0, 3), (1, 4), (2, 5)]


def test_merge_across_rows_ties_by_index():
    """Columns that come before their rows on one axis must be the same in every row, or their order would depend on it."""
    book = second_walk()
    rows, columns = book.regroup(book.arrange([(book.atom(6),)]), (2, 3)).axes
    (axis,) = book.regroup(book.arrange([columns, rows]), (6,)).axes
    root = components(book.n_labels, book.ties)
    assert root[axis[0].labels].tolist() == [0, 0, 1, 1, 2, 2]


def test_rows_that_meet_are_tied_row_by_row():
    """Two tensors of two rows tie column by column within each row, not across rows."""
    book = second_walk()
    left, right = (book.regroup(book.arrange([(book.atom(6),)]), (2, 3)) for _ in range(2))
    axes = [book.unify(a, b) for a, b in zip(left.axes, right.axes, strict=True)]
    book.settle()
    assert book.arrange(axes).shape == (2, 3)
    assert tied(book) == [(label, label + 6) for label in range(6)]


def test_rows_that_meet_a_table_are_tied_by_index():
    """One label vector that all rows meet ties them."""
    book = second_walk()
    rows, columns = book.regroup(book.arrange([(book.atom(6),)]), (2, 3)).axes
    axis = book.unify(columns, (book.atom(3),))
    book.settle()
    assert tied(book) == [(0, 3, 6), (1, 4, 7), (2, 5, 8)]
    assert axis[0].labels.shape == (3,)
    assert book.arrange([rows, axis]).shape == (2, 3)


@pytest.mark.parametrize("picked", [range(2), range(1, 3), range(1, 4)], ids=str)
def test_run_taken_from_rows_keeps_them_free(picked):
    """A contiguous run of every row carries the rows' own labels; it begins at one position in all of them."""
    book = second_walk()
    rows, columns = book.regroup(book.arrange([(book.atom(8),)]), (2, 4)).axes
    (run,) = book.take(columns, np.array(picked))
    assert run.labels.tolist() == [[row + column for column in picked] for row in (0, 4)]
    assert run.rows == rows
    assert not book.ties
    before = [[row + column for column in range(picked[0])] for row in (0, 4)]
    assert picked[0] == 0 or before in [grid.tolist() for grid in book.balances]


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
    bundled = [cell for bundle in coupling.bundles for cell in bundle.cells]
    free = [group.classes for group in coupling.groups if group.frozen is None]
    assert sorted(np.concatenate([*bundled, []])) == sorted(np.concatenate([*free, []]))
    assert len(coupling.classes) == coupling.ledger.n_labels
    assert set(np.unique(coupling.classes)) == set(range(coupling.n_classes))


# -- brute force: what is free, and what is not ----------------------------------------------------------------------


def small(family: str, name: str) -> Case:
    """Find a case of the tables by its id."""
    return next(case for case in FAMILIES[family].CASES if str(case) == name)


def bottleneck() -> ModelProto:
    """Build an inverted residual: expand, depthwise, project, add."""

    def middle(t: Tiny, y: str) -> str:
        z = t.node("Clip", t.batch_norm(t.conv(y, "e", 4, 6), "en", 6), t.constant(-0.5), t.constant(2.0))
        return t.node("Add", y, t.conv(t.conv(z, "d", 6, 6, 3, group=6), "p", 6, 4))

    return sandwich(middle, 4)


BRUTE = {
    "conv": small("linear", "Conv-2d"),
    "grouped": small("linear", "Conv-grouped"),
    "one-output-each": small("linear", "Conv-grouped-one-output-each"),
    "transposed": small("linear", "ConvTranspose-grouped"),
    "bottleneck": Case("Conv", "bottleneck", bottleneck),
    "gate": small("elementwise", "Mul-attention-gate"),
    "dense-block": small("regions", "Concat-dense-block"),
    "split-and-join": small("regions", "Split-split-and-join"),
    "slice": small("regions", "Slice-middle"),
    "option-a": small("regions", "Pad-option-a"),
    "gather": small("regions", "Gather-duplicates"),
    "pixel-shuffle": small("movement", "DepthToSpace-dcr"),
    "channel-shuffle": small("movement", "Reshape-shuffle-between-groups"),
    "merge": small("movement", "Reshape-split-and-merge-channels"),
    "merge-across": small("movement", "Reshape-channel-shuffle"),
    "groups-to-batch": small("movement", "Reshape-groups-to-batch"),
    "head": small("movement", "Reshape-head"),
    "attention": small("linear", "MatMul-attention-two-heads"),
    "table": small("rows", "Mul-table-of-positions"),
    "repeated-keys": small("rows", "Expand-repeated-keys"),
    "shuffle": small("rows", "Reshape-shuffle-between-groups-of-four"),
    "fused": small("rows", "Gather-fused-queries-keys-values"),
    "two-and-three": small("rows", "Add-groups-of-two-and-three"),
    "beside-the-input": small("rows", "Conv-row-with-frozen-channels"),
    "halves-of-heads": small("rows", "Slice-halves-of-heads"),
    "middle-of-heads": small("rows", "Slice-middle-of-heads"),
    "reordered-in-heads": small("rows", "Gather-reordered-in-heads"),
    "interleaved-in-heads": small("rows", "Slice-interleaved-in-heads"),
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
    "length-as-data": small("movement", "Size-read-as-data-dynamic-batch"),
}


@pytest.mark.parametrize("name", BRUTE)
def test_every_free_channel_can_go_alone(name):
    """Removing any single unfrozen channel, with as many of the other rows as must go with it, is proved: any of those."""
    model = BRUTE[name].build()
    coupling = oracle.couple_proto(model)
    rng = np.random.default_rng(0)
    assert coupling.bundles
    for bundle in coupling.bundles:
        for channel in np.concatenate(bundle.cells):
            order = rng.random(coupling.n_classes)
            order[channel] = -1
            for unit in oracle.spare_units(bundle, order)[:1]:
                assert channel in unit
                keep = np.ones(coupling.n_classes, bool)
                keep[unit] = False
                assert oracle.prune_to(model, coupling, keep).proof.failures == ()


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
    model = (BRUTE | REFUSING)[name].build()
    coupling = oracle.couple_proto(model)
    wrong = []
    for group in coupling.groups:
        if group.frozen is not None and group.size > 1 and "no operator consumes" not in group.frozen.text:
            wrong += [f"{group.members} ({group.frozen.text})" for c in group.classes[:2] if removable(model, c)]
    assert not wrong


def test_free_channels_pass_the_same_check():
    """The check for frozen channels says yes to one that is free, so it can tell."""
    model = BRUTE["conv"].build()
    group = next(group for group in oracle.couple_proto(model).groups if group.frozen is None)
    assert removable(model, group.classes[0])


# -- brute force: what is tied, and had to be --------------------------------------------------------------------------

Exchange = tuple[str, int, int, int, int]
"""Where either of two indices may be removed: tensor, axis, row (block of axis 0; -1: all of them), the two indices."""


def rows_of(model: ModelProto, name: str, axis: int, kept: list) -> list[list[int]]:
    """Kept indices by block of axis 0, also where the plan has one list for all groups of a grouped convolution."""
    if isinstance(kept[0], list):
        return kept
    groups = [a.i for node in model.graph.node if name in node.input[1:2] for a in node.attribute if a.name == "group"]
    return [kept] * max(groups, default=1) if axis == 1 else [kept]


def exchanges(model: ModelProto, plans: Sequence[Plan]) -> list[Exchange]:
    """Where two plans that remove equally many remove different indices."""
    found = []
    sizes = {name: array.shape for name, array in oracle.constants_of(model)}
    for name, axes in plans[0].initializers.items():
        for axis in axes:
            rows = [rows_of(model, name, axis, plan.initializers[name][axis]) for plan in plans]
            for row, (one, other) in enumerate(zip(*rows, strict=True)):
                gone = [np.setdiff1d(range(sizes[name.partition("@")[0]][axis]), kept) for kept in (one, other)]
                pairs = zip(np.setdiff1d(*gone), np.setdiff1d(*gone[::-1]), strict=True)
                found += [(name, axis, row if len(rows[0]) > 1 else -1, int(a), int(b)) for a, b in pairs]
    return found


def mixed(model: ModelProto, plan: Plan, places: Sequence[Exchange], other: Sequence[bool]) -> Plan:
    """Follow the plan, but remove the other index of the two where ``other`` says so."""
    slices = {
        name: {axis: [list(row) for row in rows_of(model, name, axis, kept)] for axis, kept in axes.items()}
        for name, axes in plan.initializers.items()
    }
    for (name, axis, row, gone, kept), exchanged in zip(places, other, strict=True):
        if exchanged:
            keeps = slices[name][axis][max(row, 0)]
            keeps[keeps.index(kept)] = gone
    for axes in slices.values():
        for axis, rows in axes.items():
            ordered = [sorted(row) for row in rows]
            axes[axis] = ordered if len(rows) > 1 else ordered[0]
    return replace(plan, initializers=slices)


def matters(model: ModelProto, coupling: Coupling, place: Exchange) -> bool:
    """Whether the outputs depend on the values at a place at all: Softmax cancels the bias of keys."""
    name, axis, _, *indices = place
    other = ModelProto()
    other.CopyFrom(model)
    tensor = next(tensor for tensor in other.graph.initializer if tensor.name == name.partition("@")[0])
    values = numpy_helper.to_array(tensor).copy()
    values.swapaxes(0, axis)[indices] += 1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    feeds = oracle.feeds_for(coupling)
    outputs = (oracle.run(either, feeds) for either in (model, other))
    return not all(np.allclose(*pair, atol=1e-5) for pair in zip(*outputs, strict=True))


def works(case: Case, model: ModelProto, coupling: Coupling, plan: Plan, keep: np.ndarray) -> bool:
    """Whether a plan made by hand gives a valid model that equals the masked original."""
    try:
        pruned = oracle.apply(model, coupling, plan, keep)
        oracle.check(pruned)
        feeds = oracle.feeds_for(coupling)
        oracle.assert_close(oracle.run(pruned, feeds), oracle.masked_reference(model, plan, feeds, case.zero))
    except (OnnxPruneError, AssertionError, IndexError, ValueError, RuntimeError, *oracle.BROKEN):
        return False
    return True


def untied(case: Case, model: ModelProto, coupling: Coupling, limit: int = 10) -> tuple[list[str], int]:
    """Ties that nothing needs, and how many were tried.

    Instead of one channel another one of its group is removed in some of the weights, or in some groups of a grouped
    convolution, but not in all. If both that and its opposite (the other one removed elsewhere) work, then what holds these
    places together is not needed. One of the two may work by accident: merged rows come in the right order for some indices
    and in the wrong one for others.
    """
    found, tried, rng = [], 0, np.random.default_rng(0)
    for bundle in coupling.bundles:
        for cell, share in zip(bundle.cells, bundle.shares, strict=True):
            if len(cell) <= share:
                continue
            order = np.arange(coupling.n_classes)
            keeps = [np.ones(coupling.n_classes, bool) for _ in range(2)]
            for keep, first in zip(keeps, (cell[0], cell[share]), strict=True):
                order[cell] = np.where(cell == first, -1, cell)
                keep[bundle.units(order)[0]] = False
            plans = [make_plan(coupling, keep) for keep in keeps]
            places = [place for place in exchanges(model, plans) if matters(model, coupling, place)]
            assert all(works(case, model, coupling, plan, keep) for plan, keep in zip(plans, keeps, strict=True))
            half = 2 ** (len(places) - 1)  # the others are opposites of these
            numbers = range(1, half) if len(places) <= limit else rng.integers(1, half, 2 ** (limit - 1)).tolist()
            for number in numbers:
                some = [bool(number >> bit & 1) for bit in range(len(places))]
                both = (mixed(model, plans[0], places, other) for other in (some, [not swapped for swapped in some]))
                tried += 1
                if all(works(case, model, coupling, plan, keeps[0]) for plan in both):
                    found.append(f"{[p for p, swapped in zip(places, some, strict=True) if swapped]} alone")
    return found, tried


@pytest.mark.parametrize("name", BRUTE)
def test_no_tie_is_needless(name):
    """Whatever must go together must: no two channels can be exchanged in one place and not in the others."""
    case = BRUTE[name]
    model = case.build()
    found, tried = untied(case, model, oracle.couple_proto(model))
    assert found == []
    assert tried


@pytest.mark.parametrize("name", ["grouped", "attention", "merge"])
def test_needless_ties_are_found(name):
    """Where rows choose freely, tying them by index is noticed: the check above can tell."""
    case = BRUTE[name]
    model = case.build()
    coupling = oracle.couple_proto(model)
    ledger = coupling.ledger
    ledger.ties += [(grid, grid[:1]) for grid in ledger.balances]
    tied = solve(ledger)
    assert not tied.balances
    assert untied(case, model, tied)[0]


@pytest.mark.parametrize(
    ("text", "build"),
    [("no rule for operator Det", partial(load("shared").unknown)), ("LRN", REFUSING["lrn"].build)],
)
def test_reasons_read_as_sentences(text, build):
    """A reason names the node, the operator and the cause."""
    coupling = oracle.couple_proto(build())
    reasons = [group.frozen for group in coupling.groups if group.frozen is not None]
    found = [reason for reason in reasons if text in reason.text]
    assert found
    assert all(reason.node == "op" and reason.op in text for reason in found)
