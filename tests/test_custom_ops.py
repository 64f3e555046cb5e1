"""Operators nobody knows, put into real networks at random places: channels around them stay, the rest is pruned rightly.

onnxruntime cannot run such a graph, so what was planned for it is checked with Identity in the operator's place.
"""

from functools import cache

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

import architectures
import oracle
from architectures import variants
from onnxprune import onnx_io
from onnxprune.coupling import Coupling
from onnxprune.passes.apply import apply
from onnxprune.passes.prove import prove
from onnxprune.plan import keep_of, make_plan

NAMES = ("resnet_b", "mobilenet_v2", "densenet", "c2f_detector", "edsr_reshape")
VARIANTS = (
    lambda model: model, variants.constants_as_nodes, variants.initializers_as_inputs, variants.fold_batch_norm,
    variants.with_dynamic_batch,
)  # fmt: skip
N_PLACES = 20


@cache
def network(name: str, variant: int) -> tuple[ModelProto, Coupling]:
    """A small network and its coupling."""
    model = VARIANTS[variant](architectures.ALL[name]())
    return model, oracle.couple_proto(model)


def insert(model: ModelProto, known: Coupling, rng: np.random.Generator) -> tuple[ModelProto, str]:
    """Put ``acme::Blur`` behind a random computed tensor, for all of its readers or one of them; return that tensor, too.

    Now and then the output's shape is not declared, and the operator reads one of the network's weights besides.
    """
    custom = onnx.ModelProto()
    custom.CopyFrom(model)
    graph, shapes, types = custom.graph, known.model.shapes, known.model.types
    floats = [n for node in known.model.nodes for n in node.outputs if types.get(n) == TensorProto.FLOAT]
    places = [n for n in floats if n in known.ledger.layouts and known.model.consumers.get(n)]
    tensor = str(rng.choice(places))
    index = next(number for number, node in enumerate(graph.node) if tensor in node.output)
    readers = [(node, i) for node in graph.node for i, name in enumerate(node.input) if name == tensor]
    for node, i in readers if rng.random() < 0.7 else readers[:1]:
        node.input[i] = "blurred"
    weights = [name for name in known.model.constants if known.model.constants[name].floating]
    kernel = [str(rng.choice(weights))] if rng.random() < 0.3 else []
    graph.node.insert(index + 1, helper.make_node("Blur", [tensor, *kernel], ["blurred"], name="blur", domain="acme"))
    custom.opset_import.append(helper.make_opsetid("acme", 1))
    if rng.random() < 0.8:
        graph.value_info.append(helper.make_tensor_value_info("blurred", TensorProto.FLOAT, shapes[tensor]))
    return custom, tensor


def with_identity(model: ModelProto) -> ModelProto:
    """Replace the custom operator by one that does nothing."""
    runnable = onnx.ModelProto()
    runnable.CopyFrom(model)
    node = next(node for node in runnable.graph.node if node.domain == "acme")
    node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output, name=node.name))
    return runnable


def around(coupling: Coupling, tensor: str) -> np.ndarray:
    """Classes of all channels of a tensor."""
    found = [classes.ravel() for axis in coupling.axes(tensor) for classes in coupling.atoms(axis)]
    return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(n, marks=pytest.mark.slow) for n in range(6, N_PLACES))])
@pytest.mark.parametrize("name", NAMES)
def test_unknown_operator_freezes_its_channels_and_no_others(name, seed):
    """What is planned around an unknown operator gives the masked original, whatever its place."""
    rng = np.random.default_rng((NAMES.index(name), seed))
    model, known = network(name, seed % len(VARIANTS))
    custom, tensor = insert(model, known, rng)
    node = next(node for node in custom.graph.node if node.domain == "acme")
    coupling = oracle.couple_proto(custom)

    touched = around(coupling, tensor)
    assert coupling.frozen[touched].all()
    if len(touched) and not known.frozen[around(known, tensor)].any():
        told = {coupling.reasons[coupling.reason[c]] for c in touched}
        assert {(reason.node, reason.op) for reason in told} == {("blur", "Blur")}
        assert all("no rule for operator acme::Blur" in reason.text for reason in told)
    if "blurred" in coupling.model.shapes:
        assert coupling.bundles

    keep = oracle.random_keep(coupling, rng)
    plan = make_plan(coupling, keep)
    pruned = apply(custom, coupling, plan, keep)
    constants = dict(oracle.constants_of(custom))
    assert next(n for n in pruned.graph.node if n.domain == "acme") == node
    left = dict(oracle.constants_of(pruned))
    assert all(np.array_equal(left[n], constants[n]) for n in node.input if n in constants)

    original, runnable = with_identity(custom), with_identity(pruned)
    oracle.check(runnable)
    feeds = oracle.feeds_for(coupling)
    oracle.assert_close(oracle.run(runnable, feeds), oracle.masked_reference(original, plan, feeds))
    if not any("@" in full for full in plan.initializers):  # copies that only the operator made necessary
        whole = oracle.couple_proto(original)
        pruned_model = onnx_io.read(runnable, coupling.model.input_shapes)
        proof = prove(original, runnable, pruned_model, whole, plan, keep_of(whole, plan))
        assert proof.ok, proof.failures
