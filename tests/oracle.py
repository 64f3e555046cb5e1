"""What pruning must do, computed without the tool's own masking: golden couplings and the masked reference.

The masked reference zeroes, in the ORIGINAL model, the slices of the consumers' weights that belong to removed channels, and
runs onnxruntime: a channel that nobody reads might as well not be there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, helper, numpy_helper

import onnxprune
from onnxprune import onnx_io, pipeline
from onnxprune.coupling import Bundle, Coupling
from onnxprune.options import Clock, Options
from onnxprune.passes.apply import apply
from onnxprune.passes.couple import couple
from onnxprune.passes.prove import Proof, prove
from onnxprune.pipeline import Loaded
from onnxprune.plan import Plan, make_plan
from onnxprune.protos import every_node


def _is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


TOLERANCE = 1e-5
"""Largest difference between pruned and masked outputs, over the standard deviation of the masked one."""

BROKEN = (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    *(value for value in vars(onnxruntime.capi.onnxruntime_pybind11_state).values() if _is_error(value)),
)
"""What onnx and onnxruntime raise on a broken graph."""

Cause = tuple[str, str, str]


@dataclass(frozen=True, eq=False)
class Case:
    """A tiny graph around one operator and what coupling must say of it.

    Attributes
    ----------
    free
        Per constant axis that may shrink (``tensor/axis``) a number per index: equal numbers live or die together, -1 is
        frozen. Every axis that is not listed must be frozen altogether.
    groups
        Per prunable group (or bundle of groups) how many units can be removed: channels, or one of every row.
    frozen
        Per frozen axis the (node, operator, part of the text) of its reason.
    redefined
        Statistics run over channels, so that masking is no reference.
    zero
        Axes of producers that stand for a masked operand where two computed tensors meet,
            or where a reduction ends channels.
    """

    op: str
    name: str
    build: Callable[[], ModelProto]
    free: Mapping[str, Sequence[int]] = field(default_factory=dict)
    groups: Sequence[int] = ()
    frozen: Mapping[str, Cause] = field(default_factory=dict)
    redefined: bool = False
    zero: Sequence[str] = ()

    def __str__(self) -> str:
        """Return the test id."""
        return f"{self.op}-{self.name}"


@dataclass(frozen=True, eq=False)
class Pruned:
    """A model pruned by hand: no scores, no budget."""

    model: ModelProto
    plan: Plan
    keep: np.ndarray
    proof: Proof


def couple_proto(model: ModelProto) -> Coupling:
    """Read and couple a model."""
    return couple(onnx_io.read(model))


def constant_axes(coupling: Coupling) -> dict[str, np.ndarray]:
    """Class of every index of every labelled constant axis, by ``tensor/axis`` (shared vectors: ``tensor@reader/axis``).

    An axis whose blocks have channels of their own (weights of a grouped convolution) lists them block by block.
    """
    constants = coupling.ledger.constants
    names = [name for name, _ in constants]
    return {
        f"{name}@{key}/{axis}" if names.count(name) > 1 else f"{name}/{axis}": coupling.classes[atom.labels].ravel()
        for (name, key), axes in constants.items()
        for axis, atom in axes.items()
    }


def canonical(labels: Sequence[int]) -> list[int]:
    """Renumber labels in order of appearance; -1 stays."""
    known: dict[int, int] = {-1: -1}
    return [known.setdefault(int(label), len(known) - 1) for label in labels]


def assert_coupling(case: Case) -> None:
    """The constants' axes fall into exactly the expected classes and groups; the rest is frozen for the expected reason."""
    coupling = couple_proto(case.build())
    axes = constant_axes(coupling)
    labels = {name: np.where(coupling.frozen[classes], -1, classes) for name, classes in axes.items()}
    loose = {name: found.tolist() for name, found in labels.items() if name not in case.free and (found >= 0).any()}
    assert not loose, "these axes should be frozen"
    assert case.free.keys() <= labels.keys(), "these axes carry no labels"
    expected = {name: list(numbers) for name, numbers in case.free.items()}
    assert {n: len(labels[n]) for n in expected} == {n: len(numbers) for n, numbers in expected.items()}
    actual = canonical([label for name in expected for label in labels[name]])
    wanted = canonical([label for numbers in expected.values() for label in numbers])
    assert cut(actual, expected) == cut(wanted, expected)
    assert sorted(bundle.n_units for bundle in coupling.bundles) == sorted(case.groups)
    for name, (node, op, text) in case.frozen.items():
        reasons = {coupling.reasons[coupling.reason[c]] for c in axes[name] if coupling.frozen[c]}
        assert reasons, f"{name} should be frozen"
        told = [(reason.node, reason.op, reason.text) for reason in reasons]
        assert any(r[0] == node and r[1] == op and text in r[2] for r in told), f"{name}: {told}"


def cut(flat: Sequence[int], parts: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Cut a sequence into the lengths of ``parts``."""
    rest = iter(flat)
    return {name: [next(rest) for _ in part] for name, part in parts.items()}


def spare_units(bundle: Bundle, order: np.ndarray) -> np.ndarray:
    """Units of a bundle in ``order``, as many as leave a channel to each of its groups."""
    units = bundle.units(order)
    while any(np.isin(group.classes, units).all() for group in bundle.groups):
        units = units[:-1]
    return units


def random_keep(coupling: Coupling, rng: np.random.Generator, share: float = 0.5, spare: float = 0.0) -> np.ndarray:
    """Remove about ``share`` of every prunable group, at least one unit and never the last; ``spare`` some groups."""
    keep = np.ones(coupling.n_classes, bool)
    for bundle in coupling.bundles:
        units = spare_units(bundle, rng.random(coupling.n_classes))
        if len(units) and rng.random() >= spare:
            keep[units[: int(np.clip(rng.binomial(len(units) + 1, share), 1, len(units)))]] = False
    return keep


def any_keep(coupling: Coupling, rng: np.random.Generator) -> np.ndarray:
    """Remove any number of units of every bundle, from none to all but the last."""
    keep = np.ones(coupling.n_classes, bool)
    for bundle in coupling.bundles:
        units = spare_units(bundle, rng.random(coupling.n_classes))
        keep[units[: rng.integers(0, len(units) + 1)]] = False
    return keep


def one_left(coupling: Coupling, rng: np.random.Generator, only: Bundle | None = None) -> np.ndarray:
    """Keep a single unit of every bundle, or of one of them."""
    keep = np.ones(coupling.n_classes, bool)
    for bundle in coupling.bundles if only is None else (only,):
        keep[spare_units(bundle, rng.random(coupling.n_classes))] = False
    return keep


def prune_to(model: ModelProto, coupling: Coupling, keep: np.ndarray) -> Pruned:
    """Plan, apply and prove."""
    plan = make_plan(coupling, keep)
    pruned = apply(model, coupling, plan, keep)
    proof = prove(model, pruned, onnx_io.read(pruned, coupling.model.input_shapes), coupling, plan, keep)
    return Pruned(pruned, plan, keep, proof)


def load(model: ModelProto, input_shapes: Mapping[str, Sequence[int]] | None = None) -> Loaded:
    """Read and couple a model of any scopes and functions as pruning does."""
    options = Options(input_shapes={name: tuple(shape) for name, shape in (input_shapes or {}).items()})
    return pipeline.load(model, options, Clock())


def prune_loaded(loaded: Loaded, keep: np.ndarray, coupling: Coupling | None = None) -> Pruned:
    """Plan, apply and prove, whatever the budget; ``coupling`` may differ from the model's own in what it freezes."""
    coupling = coupling or loaded.coupling
    loaded = dataclasses.replace(loaded, coupling=coupling)
    plan = make_plan(coupling, keep)
    pruned = pipeline._apply(loaded, plan, keep)
    flat, graph = pipeline._read_pruned(loaded, pruned)
    return Pruned(pruned, plan, keep, prove(loaded.flat, flat, graph, coupling, plan, keep))


def run(model: ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run a model with onnxruntime, on one thread and as it is written."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def feeds_for(coupling: Coupling, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal random input, float32 or small integers."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for name, shape in coupling.model.input_shapes.items():
        dtype = helper.tensor_dtype_to_np_dtype(coupling.model.types[name])
        values = rng.standard_normal(shape) if np.issubdtype(dtype, np.floating) else rng.integers(0, 2, shape)
        feeds[name] = values.astype(dtype)
    return feeds


def masked_reference(
    model: ModelProto, plan: Plan, feeds: Mapping[str, np.ndarray], zero: Sequence[str] = ()
) -> list[np.ndarray]:
    """Run the original with the consumers' weight slices of removed channels set to zero.

    Parameters
    ----------
    zero
        Further ``tensor/axis`` to zero where the plan removes indices, for operands that no weight consumes.
    """
    masked = onnx.ModelProto()
    masked.CopyFrom(model)
    values = dict(constants_of(model))
    for full in zero:
        name, _, axis = full.rpartition("/")
        values[name] = _zeroed(values[name], int(axis), plan.initializers.get(name, {}).get(int(axis)))
        tensor = next(tensor for tensor in masked.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(values[name], name))
    makers = {name: node for node in every_node(model.graph) for name in node.output}
    for number, node in enumerate(every_node(masked.graph)):
        for index, summed in _ends(node):
            root, perm = _root(node.input[index], makers, values)
            if root is None:
                continue
            array = values[root].transpose(perm)
            axis = max(summed + array.ndim, 0) if summed < 0 else summed
            slices = plan.initializers.get(f"{root}@{node.output[0]}", plan.initializers.get(root, {}))
            node.input[index] = f"masked{number}.{index}"
            zeroed = _zeroed(array, axis, slices.get(perm[axis]))
            masked.graph.initializer.append(numpy_helper.from_array(zeroed, node.input[index]))
    return run(masked, feeds)


def constants_of(model: ModelProto) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every initializer and Constant node by name, those of bodies included; names are unique over all of them."""
    nodes = list(every_node(model.graph))
    for graph in (model.graph, *(attribute.g for node in nodes for attribute in node.attribute)):
        for tensor in graph.initializer:
            yield tensor.name, numpy_helper.to_array(tensor)
    for node in nodes:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            yield node.output[0], numpy_helper.to_array(node.attribute[0].t)


def _ends(node: onnx.NodeProto) -> list[tuple[int, int]]:
    """Input and axis of every operand along which the node sums."""
    flags = {attribute.name: attribute.i for attribute in node.attribute}
    return {
        "Conv": [(1, 1)],
        "ConvTranspose": [(1, 0)],
        "Gemm": [(0, 1 - flags.get("transA", 0)), (1, flags.get("transB", 0))],
        "MatMul": [(0, -1), (1, -2)],
    }.get(node.op_type, [])


def _root(name: str, makers: Mapping, values: Mapping) -> tuple[str | None, tuple[int, ...]]:
    """Constant behind a tensor, through Identity and Transpose, and the permutation on the way."""
    if name in values:
        return name, tuple(range(values[name].ndim))
    node = makers.get(name)
    if node is None or node.op_type not in ("Identity", "Transpose"):
        return None, ()
    root, perm = _root(node.input[0], makers, values)
    if root is None or node.op_type == "Identity":
        return root, perm
    order = next((a.ints for a in node.attribute if a.name == "perm"), range(len(perm))[::-1])
    return root, tuple(perm[axis] for axis in order)


def _zeroed(array: np.ndarray, axis: int, kept: Sequence[int] | None) -> np.ndarray:
    if kept is None:
        return array
    if isinstance(kept[0], list):  # blocks of axis 0 keep indices of their own
        blocks = zip(np.split(array, len(kept)), kept, strict=True)
        return np.concatenate([_zeroed(block, axis, row) for block, row in blocks])
    mask = np.zeros(array.shape[axis], array.dtype)
    mask[list(kept)] = 1
    return np.ascontiguousarray(array * mask.reshape([-1 if a == axis else 1 for a in range(array.ndim)]))


def sliced(array: np.ndarray, slices: Mapping) -> np.ndarray:
    """Slice a tensor as a plan's JSON says, in numpy alone; lists in a list are one for each block of axis 0."""
    for axis, kept in sorted(slices.items(), key=lambda item: -int(item[0])):
        if isinstance(kept[0], list):
            blocks = np.split(array, len(kept))
            array = np.concatenate([block.take(row, int(axis)) for block, row in zip(blocks, kept, strict=True)])
        else:
            array = array.take(kept, int(axis))
    return array


def assert_close(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float = TOLERANCE) -> None:
    """Outputs agree relative to their spread, and the expectation is not trivial."""
    for have, want in zip(actual, expected, strict=True):
        assert have.shape == want.shape
        assert have.dtype == want.dtype
        if np.issubdtype(want.dtype, np.floating):
            assert np.isfinite(want).all()
            assert want.size == 1 or want.std() > 0
            assert np.abs(have - want).max(initial=0) <= tolerance * (want.std() or 1)
        else:
            assert np.array_equal(have, want)


def signature(model: ModelProto) -> list[bytes]:
    """Return graph inputs (initializers left out) and outputs as bytes."""
    constants = {tensor.name for tensor in model.graph.initializer}
    values = [*(v for v in model.graph.input if v.name not in constants), *model.graph.output]
    return [value.SerializeToString(deterministic=True) for value in values]


def check(model: ModelProto) -> None:
    """Check a model with onnx; operators of other domains have no schema to infer with."""
    onnx.checker.check_model(model, full_check=all(not opset.domain for opset in model.opset_import))


def assert_prunes(
    model: ModelProto, coupling: Coupling, keep: np.ndarray, *, redefined: bool = False, zero: Sequence[str] = ()
) -> Pruned:
    """Pruning gives a valid model with the same signature that is proved and equals the masked reference."""
    pruned = prune_to(model, coupling, keep)
    check(pruned.model)
    assert signature(pruned.model) == signature(model)
    assert pruned.proof.ok, pruned.proof.failures
    assert bool(pruned.proof.redefined) == redefined
    if not redefined:
        feeds = feeds_for(coupling)
        assert_close(run(pruned.model, feeds), masked_reference(model, pruned.plan, feeds, zero))
    return pruned


def assert_identity(model: ModelProto, coupling: Coupling) -> None:
    """Pruning nothing gives the same bytes of every initializer and the same nodes."""
    keep = np.ones(coupling.n_classes, bool)
    plan = make_plan(coupling, keep)
    same = apply(model, coupling, plan, keep)
    assert not plan.initializers
    assert list(same.graph.initializer) == list(model.graph.initializer)
    assert list(same.graph.node) == list(model.graph.node)


def assert_case_prunes(case: Case, *, thorough: bool = True) -> None:
    """A case survives no pruning, random pruning, and pruning down to one channel per group."""
    model = case.build()
    check(model)
    coupling = couple_proto(model)
    assert_identity(model, coupling)
    rng = np.random.default_rng(1)
    keeps = [random_keep(coupling, rng)]
    if thorough:
        keeps += [random_keep(coupling, rng, spare=0.5), one_left(coupling, rng)]
        alone = coupling.bundles if len(coupling.bundles) > 1 and not case.redefined else ()
        keeps += [one_left(coupling, rng, bundle) for bundle in alone]
    for keep in keeps:
        if not keep.all():
            assert_prunes(model, coupling, keep, redefined=case.redefined, zero=case.zero)


def assert_pruned(model: ModelProto, target: float = 0.7, **options: object) -> onnxprune.Result:
    """The model prunes to its target and is proved, replayed from the plan's text and verified; the result is valid."""
    result = onnxprune.prune(model, target_mac=target, **options)
    onnx.checker.check_model(result.model, full_check=True)
    assert result.report.proof is not None
    assert result.report.proof.ok
    assert result.report.target is not None
    assert result.report.target.achieved <= target
    plan = onnxprune.Plan.from_json(json.dumps(result.plan.to_json()))
    assert onnxprune.apply(model, plan).model == result.model
    assert onnxprune.verify(model, result.model, plan).weights == "exact"
    return result
