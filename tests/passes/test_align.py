"""Channel counts suit the hardware: every operator of a pruned model obeys the profile, and as little score goes as can."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from functools import cache, partial
from itertools import pairwise, product
from math import prod
from typing import NamedTuple

import numpy as np
import pytest
from onnx import ModelProto

import architectures
import onnxprune
from graphs import Tiny
from onnxprune import onnx_io
from onnxprune import profile as profiles
from onnxprune.cost import Cost
from onnxprune.coupling import Coupling
from onnxprune.passes.align import locked, permitted, violations
from onnxprune.passes.couple import couple
from onnxprune.passes.score import Scores, score
from onnxprune.passes.select import PRESETS, Limits, lowest, select
from onnxprune.profile import Profile

EIGHTS = Profile("eights", {"*": (8, 8)}, array={"*": (8, 8)})
FOURS = Profile("fours", {"*": (4, 4)}, array={"*": (4, 4)})
MODELS = (
    "edsr", "sid", "resnet_a", "resnet_bottleneck", "resnext", "mobilenet_v2", "densenet", "c2f_detector", "layer_norm_mlp",
    "squeeze_excite_conv", "unet_transposed", "fpn", "grouped_2", "grouped_3", "grouped_4", "grouped_up_2", "grouped_up_3",
    "grouped_up_4",
)  # fmt: skip


PROVED = ("edsr", "resnext", "densenet", "squeeze_excite_conv")
"""Kinds of coupling that a proof is made for; what a profile changes is the counts alone."""


class Sizes(NamedTuple):
    """Channels of one operator, read from the shape of its weight."""

    kind: str
    inputs: int
    outputs: int
    per_group: int
    groups: int = 1


def walk(model: ModelProto) -> Iterator[tuple[str, Sizes]]:
    """Every convolution and product with a constant weight, its channels read from the file alone."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    fed = {value.type.tensor_type.shape.dim[1].dim_value for value in model.graph.input}
    for node in model.graph.node:
        if len(node.input) < 2 or node.input[1] not in shapes:
            continue
        shape, attributes = shapes[node.input[1]], {a.name: a for a in node.attribute}
        groups = attributes["group"].i if "group" in attributes else 1
        if node.op_type == "Conv":
            first = shape[1] in fed
            kind = "Conv" if groups == 1 else "DepthwiseConv" if shape[1] == 1 else "GroupedConv"
            kind = "FirstConv" if first and kind == "Conv" else kind
            yield node.output[0], Sizes(kind, shape[1] * groups, shape[0], shape[1], groups)
        elif node.op_type == "ConvTranspose":
            kind = "ConvTranspose" if groups == 1 else "DepthwiseConv" if shape[0] == groups else "GroupedConv"
            yield node.output[0], Sizes(kind, shape[0], shape[1] * groups, shape[0] // groups, groups)
        elif node.op_type == "Gemm":
            shape = shape[::-1] if "transB" in attributes and attributes["transB"].i else shape
            yield node.output[0], Sizes("MatMul", *shape, shape[0])
        elif node.op_type == "MatMul" and len(shape) == 2:
            yield node.output[0], Sizes("MatMul", *shape, shape[0])


def disobedient(before: ModelProto, after: ModelProto, hardware: Profile) -> list[str]:
    """Operators whose channels pruning changed into counts that the profile does not allow."""
    found, old = [], dict(walk(before))
    for name, now in walk(after):
        was, multiple, least = old[name], hardware.multiple(now.kind), hardware.least(now.kind)
        sides = [("inputs", was.inputs, now.inputs, 0), ("outputs", was.outputs, now.outputs, 1)]
        if was.kind == "GroupedConv":
            sides.append(("inputs of a group", was.per_group, now.per_group, 0))
            sides.append(("outputs of a group", was.outputs // was.groups, now.outputs // now.groups, 1))
        found += [
            f"{name}: {b} -> {a} {side}"
            for side, b, a, index in sides
            if a != b and (a % multiple[index] or a < least[index])
        ]
    return found


def grouped(groups: int, *, transpose: bool = False) -> ModelProto:
    """Two grouped convolutions, or transposed ones, in a row: 16 channels in every group, then 40."""
    t, wide = Tiny(), 16 * groups
    y = t.conv(t.input(1, 3, 6, 6), "a", 3, wide)
    kernel = {"kernel": 2, "strides": [2, 2], "pads": [0] * 4} if transpose else {"kernel": 3}
    y = t.node("Relu", t.conv(y, "g", wide, wide, group=groups, transpose=transpose, **kernel))
    y = t.node("Relu", t.conv(y, "h", wide, 40 * groups, group=groups, transpose=transpose, **kernel))
    return t.build(t.conv(y, "z", 40 * groups, 5))


@cache
def model(name: str) -> ModelProto:
    """A fixture, four times as wide where it can be: hardware's blocks are larger than small fixtures."""
    wide = {
        "edsr": lambda: architectures.edsr(blocks=3, channels=64, height=16, width=16),
        "sid": lambda: architectures.sid(height=32, width=32),
        "resnet_bottleneck": lambda: architectures.resnet_bottleneck(stages=(1, 1, 1, 1), size=32, classes=10),
        "mobilenet_v2": lambda: architectures.mobilenet_v2(size=32, classes=10),
        **{f"grouped_{n}": partial(grouped, n) for n in (2, 3, 4)},
        **{f"grouped_up_{n}": partial(grouped, n, transpose=True) for n in (2, 3, 4)},
    }
    return wide.get(name, architectures.ALL.get(name))()


HARDWARE = (*profiles.names(), "fours", "eights")


def halves() -> Iterator:
    """Every model under every profile; every other pair where there is time for it, so that none is left out."""
    for (row, name), (column, hardware) in product(enumerate(MODELS), enumerate(HARDWARE)):
        yield pytest.param(name, hardware, marks=[pytest.mark.slow] if (row + column) % 2 else [])


@pytest.mark.parametrize(("name", "hardware"), [*halves()])
def test_every_operator_obeys_the_profile(name: str, hardware: str) -> None:
    """Halfway to the floor, no convolution or product has a changed count that the profile forbids."""
    own = {"fours": FOURS, "eights": EIGHTS}.get(hardware) or profiles.load(hardware)
    given = model(name)
    coupling = couple(onnx_io.read(given))
    cost, counts = Cost(coupling, own), permitted(coupling, own)
    limits = Limits(permitted=counts)
    full = {kind: cost.total(kind, cost.counts(np.ones(coupling.n_classes, bool))) for kind in ("mac", "effective_mac")}
    floor = lowest(coupling, cost, PRESETS["d"], limits)
    share = max((1 + floor[kind] / full[kind]) / 2 for kind in full)
    if share == 1:
        pytest.skip("no channel of this fixture may go under this profile")
    budget = {kind: share * full[kind] for kind in full}
    keep = select(coupling, cost, score(coupling), budget, PRESETS["d"], limits).keep
    assert not keep.all()
    assert violations(coupling, own, keep) == []
    assert restorable(coupling, cost, keep, counts, budget) == []
    proof = name in PROVED
    shipped = own.name in profiles.names()
    result = onnxprune.prune(given, target_mac=share, profile=hardware, proof=proof) if shipped else None
    if result is not None:
        assert disobedient(given, result.model, own) == []
        assert not proof or (result.report.proof and result.report.proof.ok)
        assert {t.kind: t.achieved <= share for t in result.report.targets} == {"mac": True, "effective_mac": True}


def restorable(
    coupling: Coupling, cost: Cost, keep: np.ndarray, counts: Mapping[str, np.ndarray], budget: Mapping[str, float]
) -> list[str]:
    """Bundles of which the next block would still fit within the budget, tried one by one."""
    found = []
    for bundle in coupling.bundles:
        gone = [cell[~keep[cell]].reshape(-1, share) for cell, share in zip(bundle.cells, bundle.shares, strict=True)]
        removed = np.concatenate(gone, 1)
        fewer = [n for n in np.flatnonzero(counts[bundle.groups[0].id]).tolist() if n < len(removed)]
        if not fewer:
            continue
        more = keep.copy()
        more[removed[: len(removed) - fewer[-1]]] = True
        if all(cost.total(kind, cost.counts(more)) <= limit for kind, limit in budget.items()):
            found.append(bundle.groups[0].id)
    return found


def recounted(given: ModelProto, hardware: Profile) -> int:
    """Effective MAC of convolutions and products, from a file's shapes alone."""
    read = onnx_io.read(given)
    total = 0
    for name, sizes in walk(given):
        shape = read.shapes[name]
        array = hardware.padding(sizes.kind)
        groups = sizes.inputs // sizes.per_group
        inner = -(-sizes.per_group // array[0]) * array[0]
        outer = -(-(sizes.outputs // groups) // array[1]) * array[1] * groups
        if sizes.kind == "DepthwiseConv":
            inner, outer = 1 if array[0] == 1 else array[0], -(-sizes.outputs // array[1]) * array[1]
        node = next(n for n in given.graph.node if name in n.output)
        kernel = next(tuple(t.dims) for t in given.graph.initializer if t.name == node.input[1])[2:]
        if node.op_type == "ConvTranspose":
            places = prod(read.shapes[node.input[0]][2:])
        elif node.op_type == "Conv":
            places = prod(shape[2:])
        else:
            places = prod(shape[:-1])
        total += inner * outer * prod(kernel) * places
    return total


@pytest.mark.parametrize("hardware", ["ort-cpu", "qualcomm-htp", "tensorrt-fp16", "ti-c2000"])
@pytest.mark.parametrize("name", ["edsr", "sid", "resnet_bottleneck", "resnext", "mobilenet_v2", "unet_transposed"])
def test_effective_mac_are_what_the_array_computes(name: str, hardware: str) -> None:
    """Effective MAC of the report, before and after, equal those counted from both files with every channel rounded up."""
    own = profiles.load(hardware)
    try:
        result = onnxprune.prune(model(name), target_mac=0.8, profile=hardware, proof=False)
    except onnxprune.BudgetError:
        assert onnxprune.inspect(model(name), profile=hardware).before["effective_mac"] == recounted(model(name), own)
        return
    assert result.report.before["effective_mac"] == recounted(model(name), own)
    assert result.report.after["effective_mac"] == recounted(result.model, own)


def sequence(*widths: int, seed: int = 0) -> ModelProto:
    """A chain of 1x1 convolutions of these widths, the first from 3 channels and the last to 10."""
    t = Tiny(seed=seed)
    y = t.input(1, 3, 4, 4)
    for number, (inputs, outputs) in enumerate(pairwise((3, *widths, 10))):
        y = t.conv(y, f"c{number}", inputs, outputs)
    return t.build(y)


def test_least_score_is_lost() -> None:
    """Against all aligned plans that fit, tried one by one, little more score goes; rounding afterwards loses far more."""
    lost: dict[str, list[float]] = {"select": [], "best": [], "rounded": []}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        coupling = couple(onnx_io.read(sequence(32, 24, 40, 16, seed=seed)))
        cost = Cost(coupling, EIGHTS)
        groups = [group for group in coupling.groups if group.frozen is None]
        value = np.zeros(coupling.n_classes)
        for group in groups:
            value[group.classes] = rng.gamma(2.0, rng.uniform(0.5, 2.0), group.size)
        scores = Scores(value, np.ones(coupling.n_classes, int))
        limit = rng.uniform(0.4, 0.8) * cost.total("mac", cost.counts(np.ones(coupling.n_classes, bool)))

        def kept(*sizes: int, groups=groups, value=value) -> np.ndarray:
            keep = np.ones(len(value), bool)
            for group, size in zip(groups, sizes, strict=True):
                keep[group.classes[np.argsort(value[group.classes])[: group.size - size]]] = False
            return keep

        def fits(keep: np.ndarray, cost=cost, limit=limit) -> bool:
            return cost.total("mac", cost.counts(keep)) <= limit

        plans = [kept(*sizes) for sizes in product(*(range(8, group.size + 1, 8) for group in groups))]
        lost["best"].append(min(value[~keep].sum() for keep in plans if fits(keep)))
        allowed = Limits(permitted=permitted(coupling, EIGHTS))
        chosen = select(coupling, cost, scores, {"mac": limit}, PRESETS["a"], allowed).keep
        assert fits(chosen)
        lost["select"].append(value[~chosen].sum())
        free = select(coupling, cost, scores, {"mac": limit}, PRESETS["a"], Limits()).keep
        rounded = kept(*(max(8, int(free[group.classes].sum()) // 8 * 8) for group in groups))
        lost["rounded"].append(value[~rounded].sum())
    total = {name: sum(values) for name, values in lost.items()}
    assert total["best"] <= total["select"] <= 1.1 * total["best"]
    assert total["rounded"] > 1.2 * total["select"]


@pytest.mark.parametrize("hardware", ["ti-c2000", "tensorrt-fp16"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("groups", [2, 3, 4])
def test_every_group_has_outputs_that_the_profile_takes(groups: int, transpose: bool, hardware: str) -> None:
    """Whatever the budget, the outputs of each group are multiples as well, not only those of all groups together."""
    given, own, changed = grouped(groups, transpose=transpose), profiles.load(hardware), 0
    for share in (0.8, 0.6, 0.4):
        after = onnxprune.prune(given, target_mac=share, profile=hardware, proof=False).model
        assert disobedient(given, after, own) == []
        changed += sum(dict(walk(after))[name].outputs < dict(walk(given))[name].outputs for name in "gh")
    assert changed > 2


def kept_of(result: onnxprune.Result) -> list[int]:
    """Output channels of every operator."""
    return [layer.channels_after for layer in result.report.layers]


def profile_file(folder: pathlib.Path, text: str) -> str:
    """Write a profile."""
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_unaligned_counts_may_stay(tmp_path: pathlib.Path) -> None:
    """Three inputs and ten classes stay; a layer of 20 keeps all of them, or a multiple of 8."""
    mine = profile_file(tmp_path, "[multiples]\n'*' = 8")
    for share in (0.9, 0.7, 0.5, 0.3):
        first, second, last = kept_of(onnxprune.prune(sequence(20, 32), target_mac=share, profile=mine, preset="a"))
        assert first in (8, 16, 20)
        assert second in (8, 16, 24, 32)
        assert last == 10


def concatenated(*widths: int) -> ModelProto:
    """Convolutions side by side, joined and read by one convolution."""
    t = Tiny()
    x = t.input(1, 3, 4, 4)
    parts = [t.conv(x, f"p{number}", 3, width) for number, width in enumerate(widths)]
    y = t.node("Concat", *parts, axis=1) if len(parts) > 1 else parts[0]
    return t.build(t.conv(y, "z", sum(widths), 10))


def test_parts_of_a_concatenation_suit_its_reader() -> None:
    """Parts that are whole blocks shrink by blocks; where the whole is no multiple, or a part is not, its parts stay."""
    after = dict(walk(onnxprune.prune(concatenated(16, 24), target_mac=0.6, profile="tensorrt-fp16").model))
    assert after["z"].inputs % 8 == 0
    assert after["z"].inputs < 40
    for widths in ((12, 16), (12, 12, 16)):
        coupling = couple(onnx_io.read(concatenated(*widths)))
        masks = permitted(coupling, EIGHTS)
        for bundle in coupling.bundles:
            fits = [n for n in range(1, bundle.removable + 1) if masks[bundle.groups[0].id][n]]
            assert bool(fits) == (sum(widths) % 8 == 0 and bundle.size % 8 == 0)


SIXTEENS = Profile("sixteens", {"*": (16, 16)})


@pytest.mark.parametrize(
    ("widths", "shut"),
    [
        ((24, 40), {"p0", "p1"}),
        ((32, 32, 3), {"p0", "p1", "p2"}),
        ((32, 16), {"p1"}),
        ((64, 32), set()),
        ((24,), set()),
    ],
)
def test_locked_bundles_are_those_without_a_count(widths: tuple[int, ...], shut: set[str]) -> None:
    """Named are the bundles none of whose channels may go on their own; no other keeps all of them for want of a count."""
    coupling = couple(onnx_io.read(concatenated(*widths)))
    masks = permitted(coupling, SIXTEENS)
    weights = {bundle.groups[0].id: {name for name, _ in bundle.groups[0].members} for bundle in coupling.bundles}
    assert {p for p in ("p0", "p1", "p2") for name in locked(coupling, masks) if f"{p}.w" in weights[name]} == shut
    assert locked(coupling, permitted(coupling, Profile("any"))) == []


def test_heads_count_with_their_dimensions() -> None:
    """Where channels are heads times dimensions, their product is the count: 4 heads of 6 may lose heads, not dimensions."""
    t = Tiny()
    x = t.input(1, 5, 24)
    q, k, v = (t.linear(x, name, 24, 24) for name in "qkv")
    split, merged = t.constant(np.array([0, 0, 4, 6])), t.constant(np.array([0, 0, 24]))
    q, k, v = (t.node("Transpose", t.node("Reshape", y, split), perm=[0, 2, 1, 3]) for y in (q, k, v))
    scores = t.node("Softmax", t.node("MatMul", q, t.node("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    y = t.node("Transpose", t.node("MatMul", scores, v), perm=[0, 2, 1, 3])
    given = t.build(t.linear(t.node("Reshape", y, merged), "o", 24, 24))
    twelve = Profile("twelve", {"*": (12, 12)})
    for attention, counts in (("heads", {12}), ("dims", set())):
        coupling = couple(onnx_io.read(given), attention=attention)
        masks = permitted(coupling, twelve)
        found = {
            24 - 24 * n * bundle.unit // bundle.size
            for bundle in coupling.bundles
            for n in np.flatnonzero(masks[bundle.groups[0].id]).tolist()
            if n
        }
        assert found == counts


def test_least_and_forbidden_counts(tmp_path: pathlib.Path) -> None:
    """No changed count lies below the least or among the forbidden ones, whichever budget is asked for."""
    text = "[min_channels]\nConv = [6, 1]\n[forbidden.Conv]\ninputs = ['17-20', 24]\noutputs = [7]"
    mine = profile_file(tmp_path, text)
    seen = set()
    for share in np.linspace(0.2, 0.95, 16):
        first, second, _ = kept_of(onnxprune.prune(sequence(32, 16), target_mac=share, profile=mine, preset="a"))
        seen |= {first, second}
        assert first >= 6
        assert first not in {17, 18, 19, 20, 24}
        assert second >= 6
        assert second != 7
    assert len(seen) > 5


def test_hard_profiles_name_what_they_do_not_take() -> None:
    """A model whose own counts the hardware refuses is pruned all the same, and the report says which they are."""
    report = onnxprune.prune(sequence(18, 16), target_mac=0.8, profile="ti-c2000").report
    assert any(note.startswith("ti-c2000 does not take the channels of c0 (18 outputs)") for note in report.notes)
    assert not any("ti-c2000" in note for note in onnxprune.inspect(sequence(20, 16), profile="tensorrt-fp16").notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[multiples", "is not valid TOML", id="toml"),
        pytest.param("[multiple]\nConv = 8", "unknown entry multiple", id="entry"),
        pytest.param("[multiples]\nConvolution = 8", "no such kind of operator", id="kind"),
        pytest.param("[multiples]\nConv = 0", "neither a number above 0 nor two", id="zero"),
        pytest.param("[array]\nConv = [8, 8, 8]", "neither a number above 0 nor two", id="three"),
        pytest.param("multiples = 8", "is not a table", id="table"),
        pytest.param("hard = 'yes'", "hard is true or false", id="hard"),
        pytest.param("sources = 'here'", "sources is a list", id="sources"),
        pytest.param("[forbidden]\nConv = [8]", "give inputs and outputs", id="forbidden"),
        pytest.param("[multiples]\nConv = 99999999999999999999", "1048576 at most", id="giant-multiple"),
        pytest.param("[array]\nConv = 9223372036854775807", "1048576 at most", id="giant-array"),
        pytest.param(f"[forbidden.Conv]\ninputs = '{'1' * 5000}'", "neither a count nor a range", id="giant-count"),
        pytest.param("[forbidden.Conv]\ninputs = ['0-70000']", "more than 65536 counts", id="giant-range"),
        pytest.param(f"[forbidden.Conv]\ninputs = {['0-999'] * 1500}", "more than 65536 counts", id="many-ranges"),
        pytest.param("[forbidden.Conv]\ninputs = ['8-x']", "neither a count nor a range", id="range"),
    ],
)
def test_wrong_profiles_are_refused(text: str, message: str, tmp_path: pathlib.Path) -> None:
    """A file that is no profile is a usage error that says what is wrong where."""
    with pytest.raises(onnxprune.UsageError, match=message):
        onnxprune.prune(sequence(16), target_mac=0.8, profile=profile_file(tmp_path, text))


def test_unknown_profiles_are_refused(tmp_path: pathlib.Path) -> None:
    """A name that nobody knows lists those that are known; a file that is not there cannot be read."""
    with pytest.raises(onnxprune.UsageError, match="choose from ascend, generic, ort-cpu"):
        onnxprune.prune(sequence(16), target_mac=0.8, profile="tpu")
    with pytest.raises(onnxprune.FileError, match="cannot be read"):
        onnxprune.prune(sequence(16), target_mac=0.8, profile=str(tmp_path / "none.toml"))


@pytest.mark.parametrize("name", profiles.names())
def test_shipped_profiles_cite_their_sources(name: str) -> None:
    """Every profile says what it is for, and where its numbers come from."""
    known = profiles.load(name)
    assert known.about
    assert known.sources or name == "generic"
    assert all(source.startswith("https://") for source in known.sources)
