"""Prove: on the user's own model, the pruned graph equals the masked original.

1. Labels are propagated through the pruned graph: every weight must meet exactly the kept labels of the original, in order.
2. Every surviving tensor is compared, segment by segment on fresh random input, with the original whose removed channels
   are masked immediately before each operator that ends them: floats by their spread, quantised values in their own
   integers (see :mod:`onnxprune.passes.closeness`), over the range of their type and near their zero point.
3. A negative control exchanges one kept slice for a removed one: a segment that does not notice proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxprune.coupling import Coupling
from onnxprune.errors import ModelError
from onnxprune.labels import length
from onnxprune.model import Model, Node
from onnxprune.passes.closeness import ROUNDED, Closeness, closeness
from onnxprune.passes.couple import Replayed, components, walk
from onnxprune.passes.segments import (
    DRAWS,
    FED,
    Segment,
    Span,
    crossing,
    halves,
    masked_nodes,
    plain_graph,
    random_entries,
    segments,
)
from onnxprune.plan import Plan, expected_slices, owner
from onnxprune.runtime import Session
from onnxprune.slices import take

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Proof:
    """What was shown.

    Attributes
    ----------
    tensors
        Number of tensors compared.
    redefined
        Nodes whose statistics run over the kept channels alone.
    insensitive
        Segments (named by their first node) whose negative control did not show.
    failures
        Where the proof fails; empty if it holds.
    """

    labels: bool
    max_rel_err: float
    tensors: int
    redefined: tuple[str, ...]
    insensitive: tuple[str, ...]
    failures: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the pruned graph equals the masked original."""
        return self.labels and not self.failures


def prove(
    original: onnx.ModelProto,
    pruned: onnx.ModelProto,
    pruned_model: Model,
    coupling: Coupling,
    plan: Plan,
    keep: np.ndarray,
    *,
    seed: int = 0,
    provider: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Proof:
    """Compare ``pruned`` with ``original`` masked by ``keep`` (bool per class of ``coupling``).

    Parameters
    ----------
    pruned_model
        ``pruned`` as read, at the same input shapes.
    provider
        Execution provider that both run on; None is the CPU.
    """
    computed = {name for proto in pruned.graph.node for name in proto.output}
    model = coupling.model
    needed = _needed(coupling)
    gone = [node.title for node in model.nodes if node.key in needed and node.key not in computed]
    if gone:
        return Proof(False, 0.0, 0, (), (), (f"{gone[0]}: gone from the pruned graph",))
    violations = check_labels(coupling, pruned_model, plan, keep)
    changed = check_weights(coupling, pruned_model, plan)
    redefined = tuple(
        dict.fromkeys(
            c.node.title
            for c in coupling.contractions
            if c.redefined and len(coupling.kept(_axis(coupling, c), keep)) < length(_axis(coupling, c))
        )
    )
    numeric = _Comparison(original, pruned, pruned_model, coupling, plan, keep, seed, provider)
    cuts = list(segments(model, needed))
    for number, segment in enumerate(cuts):
        progress(number, len(cuts))
        numeric.compare(segment)
    progress(len(cuts), len(cuts))
    if not numeric.tensors and not numeric.failures:
        numeric.failures.append(
            "no tensor could be compared, because all are constant or NaN (are weights zero, or far too small or large?)"
        )
    return Proof(
        labels=not violations,
        max_rel_err=numeric.max_rel_err,
        tensors=numeric.tensors,
        redefined=redefined,
        insensitive=tuple(numeric.insensitive),
        failures=(*violations, *changed, *numeric.failures),
    )


def check_labels(coupling: Coupling, pruned: Model, plan: Plan, keep: np.ndarray) -> list[str]:
    """Walk the pruned graph with the original's classes as labels; return every violation found, in words."""
    violations = [
        f"{name} axis {axis}: the plan keeps other indices than its group"
        for name, axis in _differing(plan, expected_slices(coupling, keep))
    ]
    uses = coupling.ledger.constants
    violations += [
        f"{member.tensor} axis {member.axis}: frozen channels are removed"
        for member in coupling.members
        if (~keep & coupling.frozen)[member.classes].any()
    ]

    def start(node: Node, index: int, axis: int) -> np.ndarray | None:
        if not node.inputs:  # outputs of the graph: what is frozen in the original is frozen already
            return None
        full = pruned.aliases.get(node.inputs[index], node.inputs[index])
        root, _ = owner(coupling, full)
        atom = (uses.get((root, node.key)) or uses.get((root, "")) or {}).get(axis)
        if atom is None:
            return None
        kept = plan.initializers.get(full, {}).get(axis)
        classes = coupling.classes[atom.labels]
        if kept is not None:
            rows = kept if isinstance(kept[0], list) else [kept]
            own = classes.reshape(-1, classes.shape[-1])
            if len(rows) not in (1, len(own)) or len({len(row) for row in rows}) > 1:
                violations.append(f"{full} axis {axis}: the plan keeps {len(rows)} rows, {len(own)} there")
                return None
            rows = rows if len(rows) == len(own) else rows * len(own)
            classes = np.array([all_[row] for all_, row in zip(own, rows, strict=True)]).reshape(
                *classes.shape[:-1], -1
            )
        size = pruned.constants[full].shape[axis]
        if classes.shape[-1] != size:
            violations.append(f"{full} axis {axis}: {size} indices, {classes.shape[-1]} kept")
            return None
        return classes

    ledger = walk(pruned, start, n_labels=coupling.n_classes, decisions=Replayed(coupling), original=coupling.model)
    violations += [
        f"{key}: {text} in the pruned graph only"
        for key, text in ledger.refusals.items()
        if key not in coupling.ledger.refusals
    ]
    root = components(ledger.n_labels, ledger.ties)
    alone = np.isin(root[: coupling.n_classes], root[np.flatnonzero(_alone(coupling, keep))])
    merged = np.flatnonzero((root[: coupling.n_classes] != np.arange(coupling.n_classes)) & ~alone)
    violations += [f"channels {root[channel]} and {channel} meet in the pruned graph" for channel in merged]
    return violations


def _needed(coupling: Coupling) -> set[str]:
    """Keys of the nodes that outputs are computed from; what only fed shape arithmetic may go once that is pinned."""
    model = coupling.model
    read, needed = set(model.outputs), set()
    for node in reversed(model.nodes):
        if node.key not in model.static and node.key not in model.aliases and not read.isdisjoint(node.outputs):
            needed.add(node.key)
            read.update((*node.inputs, *node.captured))
    return needed


def check_weights(coupling: Coupling, pruned: Model, plan: Plan) -> list[str]:
    """Compare every constant that holds values with its slice of the original, exactly; return what differs, in words."""
    violations = []
    labelled = {name for name, _ in coupling.ledger.constants}
    for name, constant in pruned.constants.items():
        root, _ = owner(coupling, name)
        if root not in coupling.model.constants or not (constant.floating or root in labelled):
            continue
        try:
            expected = take(coupling.model.constants[root].load(), plan.initializers.get(name, {}), name)
        except ModelError as error:
            violations.append(str(error))
            continue
        found = constant.load()  # NaN, where nothing computes with it, is to stay as it is
        same = np.array_equal(expected, found) or np.array_equal(expected, found, equal_nan=constant.floating)
        if not same:
            violations.append(f"{name}: is not the slice of the original that the plan names")
    return violations


def _alone(coupling: Coupling, keep: np.ndarray) -> np.ndarray:
    """Channels that are the only one left of a row, bool per class: which axis they stand on is then ambiguous.

    Where a grouped convolution keeps one channel per group, its input and output channels meet row by row. Where one copy
    of channels is left, all of them meet it.
    """
    found = np.zeros(coupling.n_classes, bool)
    for labels in coupling.ledger.atoms:
        grid = coupling.classes[labels].reshape(-1, labels.shape[-1])
        kept = keep[grid]
        lowest = np.where(kept, grid, coupling.n_classes).min(1)
        highest = np.where(kept, grid, -1).max(1)
        found[lowest[(lowest == highest) & ~kept.all(1)]] = True
    return found


def _differing(plan: Plan, expected: dict[str, dict[int, list[int]]]) -> list[tuple[str, int]]:
    """Tensor axes where a plan's indices are not the expected ones."""
    found = []
    for name in plan.initializers.keys() | expected.keys():
        have, want = plan.initializers.get(name, {}), expected.get(name, {})
        found += [(name, axis) for axis in have.keys() | want.keys() if have.get(axis) != want.get(axis)]
    return sorted(found)


def _axis(coupling: Coupling, contraction):
    return coupling.ledger.input(contraction.node, contraction.input, ()).axes[contraction.axis]


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """Values at a segment's entries, and what the masked original makes of them, kept channels only."""

    span: Span
    entries: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]


class _Comparison:
    """Runs segments of both graphs on the same random input and compares every tensor that survives."""

    def __init__(self, original, pruned, pruned_model, coupling, plan, keep, seed, provider) -> None:
        self.original, self.pruned, self.pruned_model = original, pruned, pruned_model
        self.coupling, self.plan, self.keep = coupling, plan, keep
        self.rng, self.provider = np.random.default_rng(seed), provider
        self.of_original = {name: proto for proto in original.graph.node for name in proto.output if name}
        self.of_pruned = {name: proto for proto in pruned.graph.node for name in proto.output if name}
        self.sliced = {owner(coupling, name)[0] for name in plan.initializers}
        self.max_rel_err, self.tensors = 0.0, 0
        self.insensitive: list[str] = []
        self.failures: list[str] = []

    def compare(self, segment: Segment) -> None:
        """Compare one segment and run its negative control."""
        if not segment.compared:
            return
        if any(name not in self.coupling.model.shapes for name in segment.entries):  # nothing can be fed
            self.insensitive.append(segment.nodes[0].title)
            return
        alone = len(segment.nodes) == 1
        trials = self._expected(segment, self._spans(segment))
        wrong, noticed = self._compare_pruned(segment, trials) if trials else (None, False)
        if (wrong or not trials) and not alone:
            # Rounding may grow along the way, or domains exclude each other: judge each half on fresh input.
            for half in halves(self.coupling.model, segment):
                self.compare(half)
        elif wrong:
            self.failures.append(wrong)
        elif not noticed:  # or the original itself computes NaN: nothing can be shown here
            self.insensitive.append(segment.nodes[0].title)

    def _spans(self, segment: Segment) -> list[Span]:
        """What to draw quantised entries from."""
        model, keys = self.coupling.model, {node.key for node in segment.nodes}
        if all(model.types.get(name) not in ROUNDED for name in segment.entries):
            return [Span()]
        zeros = {
            c.node.inputs[c.input]: model.constant(c.node.inputs[c.zero])
            for c in self.coupling.contractions
            if c.zero is not None and c.node.key in keys
        }
        near = {name: int(zero.load().ravel()[0]) for name, zero in zeros.items() if zero and name in segment.entries}
        spare = [Span(spare=1)] if len(keys) == 1 else []
        return [Span(), *spare, *([Span(near=near)] if near else [])]

    def _expected(self, segment: Segment, spans: list[Span]) -> list[Trial]:
        """Random entries, and what the masked original makes of them; none where it computes NaN on all draws."""
        reference, trials = self._reference(segment), []
        for span in spans:
            for draw in range(DRAWS):
                entries = random_entries(self.coupling.model, segment.entries, self.rng, draw, span)
                try:
                    expected = reference(entries)
                except ModelError:  # an index out of range: the next draw's are all zero
                    continue
                if not any(np.isnan(value).any() for value in expected.values()):
                    trials.append(Trial(span, entries, expected))
                    break
        return trials

    def _compare_pruned(self, segment: Segment, trials: list[Trial]) -> tuple[str | None, bool]:
        """Run the pruned segment and its negative control; say what is wrong, if anything is, and whether that noticed.

        Where values over the whole range of a type disagree and those with a bit to spare agree, sums of products saturate:
        then the latter alone count.
        """
        try:
            protos = [self.of_pruned[node.key] for node in segment.nodes]
            model, constants = plain_graph(
                self.pruned, self.pruned_model, protos, segment.compared, segment.entries, self.plan.initializers
            )
            session = Session(model, self.provider, optimize=False, threads=segment.threads)
            fed = [{**constants, **{n: self._kept(n, v) for n, v in trial.entries.items()}} for trial in trials]
            found = [
                self._closeness(trial.expected, _run(session, feeds, segment.compared))
                for trial, feeds in zip(trials, fed, strict=True)
            ]
        except ModelError as error:
            return str(error), False
        wrong = [_first_wrong(each) for each in found]
        spare = [place for place, trial in enumerate(trials) if trial.span.spare]
        others = [place for place in range(len(trials)) if place not in spare]
        saturates = wrong[0] and spare and not wrong[spare[0]]
        judged = spare if saturates or not others else others
        for place in judged:
            if wrong[place]:
                return wrong[place], False
        for each in found[judged[0]].values():
            self.max_rel_err = max(self.max_rel_err, each.error)
            self.tensors += each.varies
        return None, any(self._notices(session, constants, fed[place], trials[place].expected) for place in judged)

    def _reference(self, segment: Segment):
        coupling = self.coupling
        protos = [self.of_original[node.key] for node in segment.nodes]
        nodes, masks = masked_nodes(coupling, self.keep, protos, segment.nodes)
        model, constants = plain_graph(
            self.original, coupling.model, nodes, segment.compared, segment.entries, self.sliced
        )
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in masks.items())
        session = Session(model, self.provider, optimize=False, threads=segment.threads)

        def run(entries):
            values = _run(session, {**constants, **entries}, segment.compared)
            return {name: self._kept(name, value) for name, value in values.items()}

        return run

    def _kept(self, name: str, value: np.ndarray) -> np.ndarray:
        return self.coupling.extract(self.coupling.axes(name), self.keep, value)

    def _closeness(self, expected, actual) -> dict[str, Closeness]:
        types = self.coupling.model.types
        return {n: closeness(actual[n], want, types.get(n, TensorProto.FLOAT)) for n, want in expected.items()}

    def _notices(self, session, constants, feeds, expected) -> bool:
        """Exchange one kept slice of one weight for a removed one: whether the comparison notices (or none is there)."""
        candidates = [
            (name, axis, kept)
            for name in constants
            for axis, kept in self.plan.initializers.get(self.pruned_model.aliases.get(name, name), {}).items()
        ]
        if not candidates:
            return True
        order = self.rng.permutation(len(candidates))
        by_size = sorted(
            order, key=lambda place: constants[candidates[place][0]].ndim < 2
        )  # zero points may all be equal
        for choice in by_size[:4]:
            name, axis, kept = candidates[choice]
            full = self.pruned_model.aliases.get(name, name)
            root, _ = owner(self.coupling, full)
            whole = self.coupling.model.constants[root]
            rows = kept if isinstance(kept[0], list) else [kept]
            place = int(self.rng.integers(len(rows[0])))
            exchanged = []
            for row in rows:
                gone = np.setdiff1d(np.arange(whole.shape[axis]), row)
                exchanged.append([*row])
                exchanged[-1][place] = int(self.rng.choice(gone))
            slices = {**self.plan.initializers[full], axis: exchanged if rows is kept else exchanged[0]}
            tampered = take(whole.load(), slices, full)
            tampered = crossing(tampered, onnx.helper.np_dtype_to_tensor_dtype(tampered.dtype))
            if _first_wrong(self._closeness(expected, _run(session, {**feeds, name: tampered}, list(expected)))):
                return True
        return False


def _first_wrong(found: dict[str, Closeness]) -> str | None:
    """First tensor that differs, in words; None if all agree."""
    return next((f"{name}: {each.wrong}" for name, each in found.items() if each.wrong), None)


def _run(session: Session, feeds, outputs) -> dict[str, np.ndarray]:
    needed = {name: feeds[name.removesuffix(FED)] for name in session.inputs}
    return dict(zip(outputs, session.run(needed, session.outputs), strict=True))
