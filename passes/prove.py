"""Prove: on the user's own model, the pruned graph equals the masked original.

1. Labels are propagated through the pruned graph: every weight must meet exactly the kept labels of the original, in order.
2. Every surviving tensor is compared, segment by segment on fresh random input, with the original whose removed channels
   are masked immediately before each operator that ends them.
3. A negative control exchanges one kept slice for a removed one: a segment that does not notice proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from onnxprune.coupling import Coupling
from onnxprune.errors import ModelError
from onnxprune.labels import length
from onnxprune.model import Model, Node
from onnxprune.passes.couple import Replayed, components, walk
from onnxprune.passes.segments import DRAWS, Segment, halves, masked_nodes, plain_graph, random_entries, segments
from onnxprune.plan import Plan, expected_slices, owner
from onnxprune.runtime import Session
from onnxprune.slices import take

TOLERANCE = {np.dtype(np.float32): 1e-4, np.dtype(np.float64): 1e-4, np.dtype(np.float16): 3e-2}
"""Largest difference over the spread of a tensor (standard deviation after its per-channel mean is removed)."""

FEW = 16
"""Elements of a tensor below which its spread is taken as at least a tenth of its largest value."""

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
    progress: Progress = lambda done, total: None,
) -> Proof:
    """Compare ``pruned`` with ``original`` masked by ``keep`` (bool per class of ``coupling``).

    Parameters
    ----------
    pruned_model
        ``pruned`` as read, at the same input shapes.
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
    numeric = _Comparison(original, pruned, pruned_model, coupling, plan, keep, seed)
    cuts = list(segments(model, needed))
    for number, segment in enumerate(cuts):
        progress(number, len(cuts))
        numeric.compare(segment)
    progress(len(cuts), len(cuts))
    if not numeric.tensors and not numeric.failures:
        numeric.failures.append("no tensor of the graph could be compared")
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
    alone = _alone(coupling, keep)
    merged = np.flatnonzero((root[: coupling.n_classes] != np.arange(coupling.n_classes)) & ~alone)
    violations += [
        f"channels {root[channel]} and {channel} meet in the pruned graph"
        for channel in merged
        if not alone[root[channel]]
    ]
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
        if not np.array_equal(expected, constant.load()):
            violations.append(f"{name}: is not the slice of the original that the plan names")
    return violations


def _alone(coupling: Coupling, keep: np.ndarray) -> np.ndarray:
    """Channels that are the only one left of a row, bool per class: which axis they stand on is then ambiguous.

    Where a grouped convolution keeps one channel per group, its input and output channels meet row by row.
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


class _Comparison:
    """Runs segments of both graphs on the same random input and compares every tensor that survives."""

    def __init__(self, original, pruned, pruned_model, coupling, plan, keep, seed) -> None:
        self.original, self.pruned, self.pruned_model = original, pruned, pruned_model
        self.coupling, self.plan, self.keep = coupling, plan, keep
        self.rng = np.random.default_rng(seed)
        self.of_original = {name: proto for proto in original.graph.node for name in proto.output if name}
        self.of_pruned = {name: proto for proto in pruned.graph.node for name in proto.output if name}
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
        reference = self._reference(segment)
        for draw in range(DRAWS):
            entries = random_entries(self.coupling.model, segment.entries, self.rng, draw)
            try:
                expected = reference(entries)
            except ModelError:  # an index out of range: the next draw's are all zero
                undefined = True
                continue
            undefined = any(np.isnan(value).any() for value in expected.values())
            if not undefined:
                break
        del reference  # and its weights, before the pruned segment loads its own
        if undefined and len(segment.nodes) == 1:  # the original itself computes NaN: nothing can be shown here
            self.insensitive.append(segment.nodes[0].title)
            return
        wrong = None if undefined else self._compare_pruned(segment, entries, expected)
        if (undefined or wrong) and len(segment.nodes) > 1:
            # Rounding may grow along the way, or domains exclude each other: judge each half on fresh input.
            for half in halves(self.coupling.model, segment):
                self.compare(half)
        elif wrong:
            self.failures.append(wrong)

    def _compare_pruned(self, segment: Segment, entries, expected) -> str | None:
        """Run the pruned segment, compare it, and run its negative control; say what is wrong, if anything is."""
        kept = {name: self._kept(name, value) for name, value in entries.items()}
        try:
            protos = [self.of_pruned[node.key] for node in segment.nodes]
            model, constants = plain_graph(self.pruned, self.pruned_model, protos, segment.compared, segment.entries)
            session = Session(model, optimize=False, threads=segment.threads)
            actual = _run(session, {**constants, **kept}, segment.compared)
        except ModelError as error:
            return str(error)
        wrong = self._differences(expected, actual, count=True)
        if not wrong:
            self._control(segment, session, constants, kept, expected)
        return wrong

    def _reference(self, segment: Segment):
        coupling = self.coupling
        protos = [self.of_original[node.key] for node in segment.nodes]
        nodes, masks = masked_nodes(coupling, self.keep, protos, segment.nodes)
        model, constants = plain_graph(self.original, coupling.model, nodes, segment.compared, segment.entries)
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in masks.items())
        session = Session(model, optimize=False, threads=segment.threads)

        def run(entries):
            values = _run(session, {**constants, **entries}, segment.compared)
            return {name: self._kept(name, value) for name, value in values.items()}

        return run

    def _kept(self, name: str, value: np.ndarray) -> np.ndarray:
        return self.coupling.extract(self.coupling.axes(name), self.keep, value)

    def _differences(self, expected, actual, *, count: bool = False) -> str | None:
        """First tensor that differs, in words; None if all agree."""
        for name, want in expected.items():
            have = actual[name]
            if have.shape != want.shape:
                return f"{name}: shape {list(have.shape)}, expected {list(want.shape)}"
            if want.size == 0:
                continue
            error, spread = _relative_error(have.astype(np.float64), want.astype(np.float64))
            if not error <= TOLERANCE.get(want.dtype, 1e-4):
                return f"{name}: differs by {error:.2g} of its spread"
            if count:
                self.max_rel_err = max(self.max_rel_err, float(error))
                self.tensors += spread > 0
        return None

    def _control(self, segment, session, constants, entries, expected) -> None:
        """Exchange one kept slice of one weight for a removed one; the comparison must notice."""
        candidates = [
            (name, axis, kept)
            for name in constants
            for axis, kept in self.plan.initializers.get(self.pruned_model.aliases.get(name, name), {}).items()
        ]
        if not candidates:
            return
        for choice in self.rng.permutation(len(candidates))[:4]:
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
            actual = _run(session, {**constants, **entries, name: tampered}, segment.compared)
            if self._differences(expected, actual):
                return
        self.insensitive.append(segment.nodes[0].title)


def _relative_error(have: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    """Largest difference over the spread of ``want``, and that spread. NaN anywhere gives NaN, which is below nothing."""
    endless = np.isinf(want)  # attention masks hold -inf: equal where both do, and no measure of spread
    if not np.array_equal(have[endless], want[endless]):
        return np.inf, 0.0
    want[endless] = have[endless] = 0
    spread = _spread(want)
    difference = float(np.abs(have - want).max())
    if np.isnan(difference):
        return difference, spread
    largest = float(np.abs(want).max())
    if want.size < FEW:  # a few numbers may lie close together by chance
        spread = max(spread, 0.1 * largest)
    if spread <= 1e-6 * largest:  # constant but for rounding: it must agree, and proves nothing
        return (0.0 if difference <= 1e-5 * largest else np.inf), 0.0
    return (difference / spread if spread else 0.0 if difference == 0 else np.inf), spread


def _spread(value: np.ndarray) -> float:
    """Standard deviation of a tensor after its per-channel (axis 1) mean is removed."""
    if value.ndim > 2 and value.size > value.shape[1]:
        value = value - value.mean(tuple(a for a in range(value.ndim) if a != 1), keepdims=True)
    elif value.size > 1:
        value = value - value.mean()
    return float(np.sqrt(np.mean(value**2))) if value.size > 1 else float(np.abs(value).max())


def _run(session: Session, feeds, outputs) -> dict[str, np.ndarray]:
    needed = {name: feeds[name] for name in session.inputs}
    return dict(zip(outputs, session.run(needed, list(outputs)), strict=True))
