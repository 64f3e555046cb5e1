"""Graphs with onnxruntime's own operators; those without a CPU kernel are written as functions.

onnxruntime does not look at a function for an operator that it knows, so stand-ins live in a domain of their own, which has
the operator's rules for as long as a test runs.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, helper, parser

from graphs import Tiny, need
from onnxprune import ops
from oracle import Case

MICROSOFT = "com.microsoft"
STAND_IN = "stand.in"
OPSET = 23

_BODIES = {
    "BiasAdd": """(X, bias, skip) => (Y) {
        sum = Add(X, bias)
        Y = Add(sum, skip)
    }""",
    "BiasSplitGelu": """(X, bias) => (Y) {
        sum = Add(X, bias)
        left, right = Split<axis = -1, num_outputs = 2>(sum)
        active = Gelu(right)
        Y = Mul(left, active)
    }""",
    "NhwcConv": """<group>(X, W, B) => (Y) {
        x = Transpose<perm = [0, 3, 1, 2]>(X)
        y = Conv<group: int = @group>(x, W, B)
        Y = Transpose<perm = [0, 2, 3, 1]>(y)
    }""",
    "NhwcFusedConv": """<group>(X, W, B, Z) => (Y) {
        x = Transpose<perm = [0, 3, 1, 2]>(X)
        y = Conv<group: int = @group>(x, W, B)
        back = Transpose<perm = [0, 2, 3, 1]>(y)
        sum = Add(back, Z)
        Y = Sigmoid(sum)
    }""",
    "GroupNorm": """<groups, activation>(X, gamma, beta) => (Y) {
        x = Transpose<perm = [0, 3, 1, 2]>(X)
        y = GroupNormalization<num_groups: int = @groups>(x, gamma, beta)
        Y = Transpose<perm = [0, 2, 3, 1]>(y)
    }""",
    "SkipGroupNorm": """<groups, activation, channels_last>(X, gamma, beta, skip, bias) => (Y, S) {
        axes = Constant<value_ints = [2, 3]>()
        wide = Unsqueeze(skip, axes)
        column = Constant<value_ints = [-1, 1, 1]>()
        tall = Reshape(bias, column)
        first = Add(X, wide)
        S = Add(first, tall)
        y = GroupNormalization<num_groups: int = @groups>(S, gamma, beta)
        active = Sigmoid(y)
        Y = Mul(y, active)
    }""",
    # (batch, tokens, heads, 3, columns)
    "MultiHeadAttention": """<num_heads, scale>(query) => (Y) {
        order = Transpose<perm = [3, 0, 2, 1, 4]>(query)
        parts_q, parts_k, parts_v = Split<axis = 0, num_outputs = 3>(order)
        first = Constant<value_ints = [0]>()
        q = Squeeze(parts_q, first)
        k = Squeeze(parts_k, first)
        v = Squeeze(parts_v, first)
        y = Attention<scale: float = @scale>(q, k, v)
        back = Transpose<perm = [0, 2, 1, 3]>(y)
        flat = Constant<value_ints = [0, 0, -1]>()
        Y = Reshape(back, flat)
    }""",
    # without the rotation that do_rotary means
    "Attention": """<num_heads, scale, do_rotary, qkv_hidden_sizes>(x, weights, bias) => (Y) {
        product = MatMul(x, weights)
        sum = Add(product, bias)
        sizes = Constant<value_ints: ints = @qkv_hidden_sizes>()
        q, k, v = Split<axis = -1>(sum, sizes)
        Y = Attention<q_num_heads: int = @num_heads, kv_num_heads: int = @num_heads, scale: float = @scale>(q, k, v)
    }""",
    # of one sequence: (tokens, heads * columns)
    "PackedAttention": """<num_heads, scale, qkv_hidden_sizes>(x, weights, bias, offsets, ends) => (Y) {
        one = Constant<value_ints = [0]>()
        batched = Unsqueeze(x, one)
        product = MatMul(batched, weights)
        sum = Add(product, bias)
        sizes = Constant<value_ints: ints = @qkv_hidden_sizes>()
        q, k, v = Split<axis = -1>(sum, sizes)
        y = Attention<q_num_heads: int = @num_heads, kv_num_heads: int = @num_heads, scale: float = @scale>(q, k, v)
        Y = Squeeze(y, one)
    }""",
    "PackedMultiHeadAttention": """<num_heads, scale>(query, key, value, bias, offsets, ends) => (Y) {
        one = Constant<value_ints = [0]>()
        q = Unsqueeze(query, one)
        k = Unsqueeze(key, one)
        v = Unsqueeze(value, one)
        y = Attention<q_num_heads: int = @num_heads, kv_num_heads: int = @num_heads, scale: float = @scale>(q, k, v)
        Y = Squeeze(y, one)
    }""",
}


class Fused(Tiny):
    """A graph with onnxruntime's operators; with it come functions that say what some of them do."""

    def __init__(self, *, opset: int = OPSET, functions: tuple[str, ...] = ()) -> None:
        super().__init__(opset=opset, domains=(MICROSOFT,))
        self.functions = functions

    def fused(self, op: str, *inputs: str, **attributes):
        """Add a node of onnxruntime's domain, called ``op``."""
        return self.node(op, *inputs, name="op", domain=MICROSOFT, **attributes)

    def build(self, *outputs: str) -> ModelProto:
        """Make the model; outputs get the shapes that onnxruntime computes."""
        need(self.opset)
        unknown = [onnx.ValueInfoProto(name=name) for name in outputs]
        graph = helper.make_graph(self.nodes, "tiny", self.inputs, unknown, self.initializers)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        functions = [function(name) for name in self.functions]
        model = helper.make_model(graph, ir_version=10, opset_imports=opsets, functions=functions)
        runs = standing_in(model) if functions else model
        session = onnxruntime.InferenceSession(runs.SerializeToString(), providers=["CPUExecutionProvider"])
        feeds = {}
        for value in self.inputs:
            kind = value.type.tensor_type
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            feeds[value.name] = np.ones([dim.dim_value for dim in kind.shape.dim], dtype)
        for output, computed in zip(model.graph.output, session.run(None, feeds), strict=True):
            kind = helper.np_dtype_to_tensor_dtype(computed.dtype)
            output.CopyFrom(helper.make_tensor_value_info(output.name, kind, computed.shape))
        return model


def function(op: str) -> onnx.FunctionProto:
    """Write an operator as a function."""
    head = f'<domain: "{MICROSOFT}", opset_import: ["": {OPSET}]> {op} '
    return parser.parse_function(head + _BODIES[op])


def standing_in(model: ModelProto) -> ModelProto:
    """Return the model with the operators that it has functions for in a domain of their own."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for item in (*copy.graph.node, *copy.functions, *copy.opset_import):
        if item.domain == MICROSOFT:
            item.domain = STAND_IN
    return copy


def runnable(case: Case, monkeypatch) -> Case:
    """Return a case that runs here: stand-ins have the operator's rules until the test is over."""
    if not case.build().functions:
        return case
    for table in (ops._COUPLE, ops._REWRITE):
        if (MICROSOFT, case.op) in table:
            monkeypatch.setitem(table, (STAND_IN, case.op), table[MICROSOFT, case.op])
    return replace(case, build=lambda: standing_in(case.build()))


def ten_times(number: int) -> int:
    """Work, but for number 2, which ends its process."""
    if number == 2:
        os._exit(9)
    return 10 * number
