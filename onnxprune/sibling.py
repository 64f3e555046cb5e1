"""Sibling: a plan in the names of another form of its model: quantised where that was not, or the other way round.

Quantisers keep the names of what flows and rename what they quantise: NAME becomes NAME_quantized, with NAME_scale and
NAME_zero_point beside it, and comes out of a DequantizeLinear whose output is named after it. Channels of what is found tie
all others, so that not every tensor of the plan must be found; but no channel may go that the plan does not remove, and none
may stay that it does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from onnxprune.coupling import Coupling
from onnxprune.errors import ModelError
from onnxprune.ops.quantised import quantised
from onnxprune.plan import Plan, Slices, expected_slices, keep_of, make_plan, owner

_ENDING = re.compile(r"[^0-9A-Za-z]((de)?q|u?int\d)", re.IGNORECASE)
"""What a quantiser puts behind a name: _quantized, _DequantizeLinear_Output, .q, _Q4, /dq, _int8."""

_FUSED = re.compile(r"^([A-Za-z]+Fusion_(BN_)?[A-Za-z]_)+")
"""What onnxruntime's optimiser puts before the name of a weight into which it folds a normalisation: ConvBnFusion_W_."""

_BESIDE = ("_scale", "_zero_point", "_scales", "_zero_points")


def replayed(coupling: Coupling, plan: Plan) -> tuple[np.ndarray, Plan, tuple[str, ...]]:
    """Keep mask per class that a plan means for a model, the plan in the model's own names, and notes on what was found.

    Raises
    ------
    ModelError
        The model is no sibling: it lacks tensors that decide what stays, or couples channels that the plan tells apart.
    """
    missing = [full for full in plan.initializers if owner(coupling, full)[0] not in coupling.model.constants]
    if not missing:
        return keep_of(coupling, plan), plan, ()
    names = dict(_found(coupling, plan))
    if all(full == name or full.startswith(f"{name}@") for full, name in names.items()):
        return keep_of(coupling, plan), plan, ()  # raises: nothing of it is here under another name
    renamed: dict[str, Slices] = {}
    for full, name in names.items():
        renamed.setdefault(name, plan.initializers[full])
    keep = keep_of(coupling, replace(plan, initializers=renamed))
    _refuse_others(coupling, plan, renamed, keep, [full for full in missing if full not in names])
    own = replace(make_plan(coupling, keep, plan.sha256), attention=plan.attention)
    found = len(names.keys() & set(missing))
    note = f"{found} of the plan's {len(plan.initializers)} tensors were found under the names that quantising gives"
    return keep, own, (f"{note}; the others follow",)


def _found(coupling: Coupling, plan: Plan) -> Iterator[tuple[str, str]]:
    """Names of the plan, and what this model calls the same tensors."""
    model = coupling.model
    weights = quantised(model)
    aliases = {name: [_FUSED.sub("", name)] for name in model.constants if name in weights or _FUSED.match(name)}
    for node in model.nodes:
        if node.op == "DequantizeLinear" and (root := model.aliases.get(node.inputs[0], node.inputs[0])) in weights:
            aliases[root].append(node.outputs[0])
    for full in plan.initializers:
        if owner(coupling, full)[0] in model.constants:
            yield full, full
            continue
        pieces = full.split("@")
        for name in ("@".join(pieces[:end]) for end in range(len(pieces), 0, -1)):
            bare = _FUSED.sub("", name.removesuffix("_quantized"))
            if bare in model.constants and not bare.endswith(_BESIDE):
                yield full, bare
                break
            given = [root for root, known in aliases.items() if any(_named_after(each, name) for each in known)]
            exact = [root for root in given if aliases[root][0] in (name, f"{name}_quantized")]
            only = exact or given
            if len(only) == 1 and (only[0] not in weights or not weights[only[0]].bits):
                yield full, only[0]
                break


def _named_after(name: str, given: str) -> bool:
    return name.startswith(given) and (name == given or _ENDING.match(name, len(given)) is not None)


def _refuse_others(
    coupling: Coupling, plan: Plan, renamed: dict[str, Slices], keep: np.ndarray, lost: list[str]
) -> None:
    """Raise where the mask says anything else than the plan."""
    given = expected_slices(coupling, keep)
    for name, slices in renamed.items():
        for axis, kept in slices.items():
            if given.get(name, {}).get(axis) not in (kept, None):
                raise ModelError(
                    f"the plan tells channels of {name} axis {axis} apart that this model removes together; prune it itself"
                )
    removed = sum(len(kept) - sum(kept) for _, _, kept in plan.groups)
    own = sum(int((~keep[group.classes]).sum()) for group in coupling.groups)
    if not plan.groups and lost:
        raise ModelError(
            f"the plan slices {lost[0]}, which this model does not have under any name known of quantisers"
        )
    if plan.groups and own != removed:
        raise ModelError(
            f"the plan removes {removed} channels, of which this model names {own}: it is no sibling"
            + (f" (it has nothing called {lost[0]})" if lost else "")
        )
