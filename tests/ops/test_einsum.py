"""Einsum: one letter is one axis, wherever it stands; letters that the output lacks end."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
from onnx import ModelProto

import oracle
from graphs import Tiny
from oracle import Case

SIZES = {"b": 2, "t": 5, "s": 5, "d": 4, "e": 6, "h": 3, "k": 4, "m": 5, "z": 3}


def weight(t: Tiny, name: str, letters: str) -> str:
    """Add a weight with an axis per letter."""
    return t.random(*[SIZES[letter] for letter in letters], name=name, scale=0.4)


def between(equation: str, weights: Sequence[str], *, after: int, rank: int = 3) -> ModelProto:
    """Put an Einsum of channels (``y``: batch, tokens, 6 channels) and weights between two linear layers.

    An operand of ``weights`` that is no weight's letters is "y".
    """
    t = Tiny()
    x = t.input(2, 5, 4) if rank == 3 else t.input(5, 4)
    y = t.node("Add", t.linear(x, "a", 4, 6), t.random(6, name="a.b", scale=0.3))
    operands = [y if letters == "y" else weight(t, f"op.w{i}", letters) for i, letters in enumerate(weights)]
    return t.build(
        t.linear(t.node("LeakyRelu", t.node("Einsum", *operands, name="op", equation=equation)), "z", after, 3)
    )


def project(t: Tiny, x: str, name: str, how: str) -> str:
    """Project (b, t, d) to heads: (b, t, h, k); a matrix needs a Reshape."""
    if how == "matrix":
        y = t.node("Add", t.linear(x, name, 4, 12), t.random(12, name=f"{name}.b", scale=0.3))
        return t.node("Reshape", y, t.constant([2, 5, 3, 4]))
    return t.node("Einsum", x, weight(t, f"{name}.w", "dhk"), equation="btd,dhk->bthk", name=name)


def attention(projected: str = "tensor", output: str = "tensor") -> ModelProto:
    """Attend as Keras and Flax export it: every product is an Einsum, heads are an axis of the weights."""
    t = Tiny()
    x = t.input(2, 5, 4)
    q, k, v = (project(t, x, name, projected) for name in "qkv")
    scores = t.node("Einsum", q, k, equation="bthk,bshk->bhts", name="scores")
    y = t.node("Einsum", t.node("Softmax", scores, axis=-1), v, equation="bhts,bshk->bthk", name="mix")
    if output == "tensor":
        y = t.node("Einsum", y, weight(t, "op.w", "hke"), equation="bthk,hke->bte", name="op")
    else:
        y = t.linear(t.node("Reshape", y, t.constant([2, 5, 12])), "op", 12, 6)
    return t.build(t.linear(t.node("LeakyRelu", y), "z", 6, 3))


def maps(equation: str, *, after: int, twice: bool = False) -> ModelProto:
    """Rearrange or reduce a convolution's maps, and apply a linear layer."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 6)
    y = t.node("Einsum", *[y] * (1 + twice), name="op", equation=equation)
    y = t.linear(t.node("LeakyRelu", y), "z", after, 3)
    return t.build(t.node("ReduceSum", y, t.constant([1])) if equation.endswith("bcd") else y)


def computed(equation: str, after: int) -> ModelProto:
    """Multiply two computed tensors."""
    t = Tiny()
    x = t.input(2, 5, 4)
    y = t.node("Einsum", t.linear(x, "a", 4, 6), t.linear(x, "b", 4, 6), name="op", equation=equation)
    return t.build(t.linear(t.node("LeakyRelu", y), "z", after, 3))


def rows_meet_themselves(equation: str) -> ModelProto:
    """Multiply a grid of channels by itself across its rows: all rows then keep the same columns."""
    t = Tiny()
    y = t.gemm(t.input(1, 2), "a", 2, 12)
    y = t.node("Reshape", y, t.constant([3, 4]))
    y = t.node("Reshape", t.node("Einsum", y, y, name="op", equation=equation), t.constant([1, -1]))
    return t.build(t.gemm(y, "z", 9, 3))


def diagonal() -> ModelProto:
    """Take a diagonal."""
    t = Tiny()
    y = t.linear(t.input(2, 5, 4), "a", 4, 5)
    return t.build(t.linear(t.node("Einsum", y, name="op", equation="bii->bi"), "z", 5, 3))


A = {"a.w/1": range(6), "a.b/0": range(6)}
LINEAR = A | {"op.w1/0": range(6), "op.w1/1": range(6, 11), "z.w/0": range(6, 11)}
HEADS = {name: [0, 1, 2] for name in ("q.w/1", "k.w/1", "v.w/1", "op.w/0")} | {
    "q.w/2": range(3, 7), "k.w/2": range(3, 7), "v.w/2": range(7, 11), "op.w/1": range(7, 11), "op.w/2": range(11, 17),
    "z.w/0": range(11, 17),
}  # fmt: skip
GRID = range(12)
IN_ROWS = {
    "q.w/1": GRID, "q.b/0": GRID, "k.w/1": GRID, "k.b/0": GRID, "v.w/1": range(12, 24), "v.b/0": range(12, 24),
}  # fmt: skip
BOTH = {"a.w/1": range(6), "b.w/1": range(6)}
LAST = {"z.w/0": range(6)}
MAPS = {"a.w/0": range(6), "a.b/0": range(6)}

CASES = [
    *(
        Case("Einsum", name, partial(between, equation, ("y", "em"), after=5), LINEAR, (5, 6), zero=("op.w1/0",))
        for name, equation in {
            "linear": "bte,em->btm", "spaces": " b t e , e m -> b t m ", "ellipsis": "...e,em->...m",
            "ellipsis-implicit": "...e,em", "capitals": "BTE,EM->BTM",
        }.items()
    ),
    Case("Einsum", "weight-first", partial(between, "me,bte->btm", ("me", "y"), after=5),
         A | {"op.w0/1": range(6), "op.w0/0": range(6, 11), "z.w/0": range(6, 11)}, (5, 6), zero=("op.w0/1",)),
    Case("Einsum", "implicit", partial(between, "te,ez", ("y", "em"), after=5, rank=2), LINEAR, (5, 6), zero=("op.w1/0",)),
    Case("Einsum", "three-operands", partial(between, "bte,em,mk->btk", ("y", "em", "mk"), after=4),
         A | {"op.w1/0": range(6), "op.w2/1": range(6, 10), "z.w/0": range(6, 10)}, (4, 6),
         {"op.w1/1": ("op", "Einsum", "a weight is computed from all of it")}, zero=("op.w1/0",)),
    Case("Einsum", "scale-per-channel", partial(between, "bte,e->bte", ("y", "e"), after=6),
         A | {"op.w1/0": range(6), "z.w/0": range(6)}, (6,)),
    Case("Einsum", "vector", partial(between, "bte,e,m->btm", ("y", "e", "m"), after=5),
         A | {"op.w1/0": range(6), "op.w2/0": range(6, 11), "z.w/0": range(6, 11)}, (5, 6), zero=("op.w1/0",)),
    Case("Einsum", "heads-are-an-axis", attention, HEADS, (3, 4, 4, 6),
         zero=("q.w/1", "q.w/2", "v.w/1", "v.w/2")),
    Case("Einsum", "heads-of-a-matrix", partial(attention, "matrix", "matrix"),
         IN_ROWS | {"op.w/0": range(12, 24), "op.w/1": range(24, 30), "z.w/0": range(24, 30)}, (4, 4, 6),
         zero=("q.w/1", "q.b/0")),
    Case("Einsum", "heads-of-a-matrix-meet-a-tensor", partial(attention, "matrix"),
         IN_ROWS | {"v.w/1": [*range(12, 16)] * 3, "v.b/0": [*range(12, 16)] * 3, "op.w/1": range(12, 16),
                    "op.w/2": range(24, 30), "z.w/0": range(24, 30)}, (4, 4, 6),
         zero=("q.w/1", "q.b/0", "v.w/1", "v.b/0")),
    Case("Einsum", "transposition", partial(maps, "bchw->bhwc", after=6), MAPS | {"z.w/0": range(6)}, (6,)),
    Case("Einsum", "mean-of-maps", partial(maps, "bchw->bc", after=6), MAPS | {"z.w/0": range(6)}, (6,)),
    Case("Einsum", "sum-of-channels", partial(maps, "bchw->bhw", after=6), MAPS, (6,), zero=("a.w/0", "a.b/0")),
    Case("Einsum", "gram", partial(maps, "bchw,bdhw->bcd", after=6, twice=True), MAPS | {"z.w/0": range(6)}, (6,),
         zero=("a.w/0", "a.b/0")),
    Case("Einsum", "energy", partial(maps, "bchw,bchw->bhw", after=6, twice=True), MAPS, (6,), zero=("a.w/0", "a.b/0")),
    Case("Einsum", "elementwise", partial(computed, "bte,bte->bte", 6), BOTH | LAST, (6,)),
    Case("Einsum", "similarity", partial(computed, "bte,bse->bts", 5), BOTH, (6,), zero=("a.w/1", "b.w/1")),
    Case("Einsum", "rows-meet-themselves", partial(rows_meet_themselves, "ij,kj->ik"),
         {"a.w/1": [*range(4)] * 3, "a.b/0": [*range(4)] * 3}, (4,), zero=("a.w/1", "a.b/0")),
    Case("Einsum", "diagonal", diagonal, frozen={"a.w/1": ("op", "Einsum", "takes a diagonal")}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_letters_tie_and_end(case):
    """Operands agree on every letter; heads and dimensions shrink wherever the weights have them."""
    oracle.assert_coupling(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pruned_equals_masked(case):
    """No operand needs more than its own slice."""
    oracle.assert_case_prunes(case)


def macs(model: ModelProto) -> float:
    """Multiply-accumulates of the node called ``op``."""
    coupling = oracle.couple_proto(model)
    (work,) = [work for work in coupling.ledger.works if work.node.title == "op"]
    return work.factor * np.prod([coupling.shape([axis], np.ones(coupling.n_classes, bool)) for axis in work.axes])


def test_work_is_the_product_of_all_letters():
    """An Einsum costs what the matrix product it stands for costs, wherever its weight stands."""
    assert macs(between("bte,em->btm", ("y", "em"), after=5)) == 2 * 5 * 6 * 5
    assert macs(between("me,bte->btm", ("me", "y"), after=5)) == 2 * 5 * 6 * 5
    assert macs(attention()) == 2 * 5 * 3 * 4 * 6


def test_moving_and_adding_up_cost_nothing():
    """An Einsum of one operand multiplies nothing."""
    works = oracle.couple_proto(maps("bchw->bhwc", after=6)).ledger.works
    assert [work.node.title for work in works] == ["a", "z"]


def test_batch_letters_of_computed_tensors_are_heads():
    """Letters that both computed operands and the output have are heads; a weight has none."""
    ledger = oracle.couple_proto(attention()).ledger
    heads = {atom.labels.tobytes() for atom in oracle.couple_proto(attention()).ledger.layout("scores").axes[1]}
    assert heads
    assert heads <= {labels.tobytes() for labels in ledger.heads}
    assert not oracle.couple_proto(between("bte,em->btm", ("y", "em"), after=5)).ledger.heads
