"""Fused attention and rotary embeddings: queries meet keys within every head, values pass to the output.

Tensors are seen as (batch, heads, tokens, columns), however an operator packs them. Softmax runs over the keys' tokens.
Where heads have fewer columns left, the operator's default scale, taken from their number, is written down as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from onnxprune.labels import Axis, Channels, Ledger, Refusal, fixed, length
from onnxprune.model import Node
from onnxprune.ops import Change, Edit, couples, rewrites

MICROSOFT = "com.microsoft"

Heads = tuple[Axis, Axis, Axis, Axis]
"""Axes of queries, keys or values: batch, heads, tokens, columns."""


# -- the standard's own ----------------------------------------------------------------------------------------------


@couples("Attention")
def attention(node: Node, ledger: Ledger) -> None:
    """Keys and values may have fewer heads than queries; with three axes the last packs heads and columns."""
    packed = len(ledger.shape(node.inputs[0])) == 3
    counts = [node.attributes.get(name, 1) for name in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
    q, k, v = (_unpacked(ledger, ledger.input(node, index).axes, count) for index, count in enumerate(counts))
    for index in (0, 1):
        ledger.contract(node, index, 2 if packed else 3)
    if node.attributes.get("is_causal", 0) or node.has(6):
        _stay(ledger, q[0], q[2])
    k, v = _with_past(node, ledger, k, 4), _with_past(node, ledger, v, 5)
    k, v, out = _attend(node, ledger, q, k, v)
    _bias(node, ledger, 3, out)
    ledger.output(node, _packed(out) if packed else out)
    _present(node, ledger, 1, k)
    _present(node, ledger, 2, v)
    _scores(node, ledger, 3, out)


@rewrites("Attention")
def attention_heads(node: Node, change: Change) -> list[Edit]:
    """The numbers of heads follow; the scale does not."""
    query, keys = node.inputs[:2]
    if len(change.before(query)) == 4:
        return _pinned(node, change.before(query)[3], change.after(query)[3])
    count = node.attributes["q_num_heads"]
    left = _heads_left(change, query, count)
    counts = {"q_num_heads": left, "kv_num_heads": _heads_left(change, keys, node.attributes["kv_num_heads"])}
    return [*_counted(node, counts), *_pinned(node, change.before(query)[2] // count, change.after(query)[2] // left)]


@couples("RotaryEmbedding")
@couples("RotaryEmbedding", domain=MICROSOFT)
def rotary_embedding(node: Node, ledger: Ledger) -> None:
    """Two columns are rotated together, by an angle of the tables that all heads share."""
    x = ledger.input(node, 0)
    cos, sin = (2, 3) if node.domain else (1, 2)
    tables = [ledger.input(node, index, (len(ledger.shape(node.inputs[index])) - 1,)) for index in (cos, sin)]
    count = node.attributes.get("num_heads", 0)
    if len(x.axes) == 3 and (not count or (node.domain and not node.attributes.get("rotary_embedding_dim", 0))):
        count = length(x.axes[2]) // (2 * length(tables[0].axes[-1]))
    batch, _, tokens, columns = _unpacked(ledger, x.axes, count)
    if len(tables[0].axes) == 3:
        for table in tables:
            ledger.unify(batch, table.axes[0])
            ledger.unify(tokens, table.axes[1])
    else:
        _stay(ledger, batch, tokens, *(table.axes[0] for table in tables))
    interleaved = node.attributes.get("interleaved", 0)
    if interleaved not in (0, 1):
        raise Refusal(f"interleaved is {interleaved}, which is neither 0 nor 1")
    _rotate(ledger, columns, [table.axes[-1] for table in tables], interleaved)
    ledger.output(node, x)


@rewrites("RotaryEmbedding")
@rewrites("RotaryEmbedding", domain=MICROSOFT)
def rotary_width(node: Node, change: Change) -> list[Edit]:
    """Attributes that count heads and rotated columns follow."""
    counts = {}
    if node.attributes.get("num_heads", 0) and len(change.before(node.inputs[0])) == 3:
        counts["num_heads"] = _heads_left(change, node.inputs[0], node.attributes["num_heads"])
    if node.attributes.get("rotary_embedding_dim", 0):
        counts["rotary_embedding_dim"] = 2 * change.after(node.inputs[2])[-1]
    return _counted(node, counts)


# -- onnxruntime's ---------------------------------------------------------------------------------------------------


@couples("Attention", "PackedAttention", "QAttention", domain=MICROSOFT)
def projected_attention(node: Node, ledger: Ledger) -> None:
    """One weight, stacked from those of queries, keys and values, ends the input's channels and starts all three.

    QAttention takes integers, with scales and zero points that may be those of columns of the weight; all three of its
    parts are equally wide.
    """
    x, w = ledger.input(node, 0), ledger.input(node, 1)
    flat, integer = node.op == "PackedAttention", node.op == "QAttention"
    past_index, zero_x, zero_w = (8, 6, 7) if integer else (4, None, None)
    *leading, channels = x.axes
    inner = ledger.unify(channels, w.axes[0])
    ledger.contract(node, 0, len(x.axes) - 1, zero=zero_x if integer and node.has(6) else None)
    ledger.contract(node, 1, 0)
    ledger.contract(node, 1, 1, state=True, zero=zero_w if integer and node.has(7) else None)
    stacked = w.axes[1]
    for index in (i for i in (4, 7) if integer and node.has(i)):
        stacked = ledger.unify(stacked, (*ledger.input(node, index).axes, ())[0])
    if node.has(2):
        stacked = ledger.unify(stacked, ledger.input(node, 2).axes[0])
        ledger.contract(node, 2, 0, state=True)
    _stay(ledger, *leading)
    ledger.work(node, (*leading, inner, stacked), weight=1, channels=Channels("MatMul", inner, stacked, inner))
    batch, tokens = ((), leading[0]) if flat else leading
    count = node.attributes["num_heads"]
    q, k, v = (
        (batch, rows, tokens, columns)
        for rows, columns in (ledger.grid(run, count) for run in _runs(ledger, stacked, _sizes(node, length(stacked))))
    )
    if node.attributes.get("do_rotary", 0):
        _stay(ledger, q[3], k[3])  # the operator itself knows by which angles they turn
    if integer:
        _equally_many(ledger, k[3], v[3])
    cached = not flat and (node.has(past_index) or len(node.outputs) > 1)
    if cached:  # one tensor holds keys and values
        k = v = (batch, ledger.unify(k[1], v[1]), tokens, ledger.unify(k[3], v[3]))
    if cached and node.has(past_index):
        stack, *past = ledger.input(node, past_index).axes
        _stay(ledger, stack)
        k = v = _joined(ledger, k, past)
    k, _, out = _attend(node, ledger, q, k, v)
    if not integer:
        _bias(node, ledger, 5, out)
    ledger.output(node, (tokens, _packed(out)[2]) if flat else _packed(out))
    if cached and len(node.outputs) > 1:
        present = ledger.shape(node.outputs[1])
        ledger.output(node, (fixed(2), k[0], k[1], fixed(present[3]), k[3]), 1)


@rewrites("Attention", "PackedAttention", "QAttention", domain=MICROSOFT)
def projected_heads(node: Node, change: Change) -> list[Edit]:
    """The number of heads follows, and so do the sizes of queries, keys and values (equal thirds need not be named)."""
    before = _sizes(node, change.before(node.inputs[1])[1])
    kept = change.kept(node.inputs[1], 1)
    ends = np.cumsum([0, *before])
    sizes = [int(((kept >= begin) & (kept < end)).sum()) for begin, end in pairwise(ends)]
    count = node.attributes["num_heads"]
    left = len(np.unique(kept[kept < before[0]] // (before[0] // count)))
    edits = _counted(node, {"num_heads": left})
    if sizes != before and ("qkv_hidden_sizes" in node.attributes or len(set(sizes)) > 1):
        edits.append(Edit("qkv_hidden_sizes", sizes))
    return [*edits, *_pinned(node, before[0] // count, sizes[0] // left)]


@couples("MultiHeadAttention", "PackedMultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(node: Node, ledger: Ledger) -> None:
    """Queries, keys and values come separately, or stacked within every head; a bias is added to all three."""
    count, flat = node.attributes["num_heads"], node.op != "MultiHeadAttention"

    def part(index: int) -> Heads:
        axes = ledger.input(node, index).axes
        return _unpacked(ledger, ((), *axes) if flat else axes, count)

    q = part(0)
    k = part(1) if node.has(1) else q
    v = part(2) if node.has(2) else k
    for index in (0, 1):
        if node.has(index):
            ledger.contract(node, index, len(ledger.shape(node.inputs[index])) - 1)
    if node.has(3):
        sizes = [length(x[1]) * length(x[3]) for x in (q, k, v)]
        biases = [ledger.grid(run, count) for run in _runs(ledger, ledger.input(node, 3).axes[0], sizes)]
        q, k, v = (
            (x[0], ledger.unify(x[1], rows), x[2], ledger.unify(x[3], columns))
            for x, (rows, columns) in zip((q, k, v), biases, strict=True)
        )
        ledger.contract(node, 3, 0, state=True)
    extra = [index for index in ((4, 5) if flat else (4, 6, 7, 8, 9)) if node.has(index)]
    if extra or node.attributes.get("unidirectional", 0):
        _stay(ledger, q[0], q[2])
    if not flat:
        if node.has(6) or (node.has(2) and len(ledger.shape(node.inputs[2])) == 4):
            _equally_many(ledger, k[3], v[3])
        k, v = _with_past(node, ledger, k, 6), _with_past(node, ledger, v, 7)
    k, v, out = _attend(node, ledger, q, k, v)
    _bias(node, ledger, 6 if flat else 5, out)
    ledger.output(node, _packed(out)[1:] if flat else _packed(out))
    _present(node, ledger, 1, k)
    _present(node, ledger, 2, v)
    _scores(node, ledger, 3, out)


@rewrites("MultiHeadAttention", "PackedMultiHeadAttention", domain=MICROSOFT)
def multi_head_count(node: Node, change: Change) -> list[Edit]:
    """The number of heads follows; the scale does not."""
    query, count = node.inputs[0], node.attributes["num_heads"]
    before, after = change.before(query), change.after(query)
    if len(before) > 3:  # stacked: (.., tokens, heads, 3, columns)
        return [*_counted(node, {"num_heads": after[-3]}), *_pinned(node, before[-1], after[-1])]
    left = _heads_left(change, query, count)
    return [*_counted(node, {"num_heads": left}), *_pinned(node, before[-1] // count, after[-1] // left)]


@couples("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(node: Node, ledger: Ledger) -> None:
    """Keys and values are as long as queries, in multiples of eight columns, and have fewer heads."""
    if any(node.has(index) for index in range(12, 16)):
        raise Refusal("GroupQueryAttention with a quantised cache or with norms inside")
    counts = _group_counts(node)
    axes = ledger.input(node, 0).axes
    ledger.contract(node, 0, 2)
    if node.has(1):
        parts = [axes[2], ledger.input(node, 1).axes[2], ledger.input(node, 2).axes[2]]
        ledger.contract(node, 1, 2)
    else:
        each = length(axes[2]) // sum(counts)
        parts = _runs(ledger, axes[2], [each * count for count in counts])
    q, k, v = (_unpacked(ledger, (axes[0], axes[1], run), count) for run, count in zip(parts, counts, strict=True))
    _stay(ledger, *axes[:2])
    if node.attributes.get("do_rotary", 0):
        tables = [ledger.input(node, index, (1,)).axes[1] for index in (7, 8)]
        for x in (q, k):
            _rotate(ledger, x[3], tables, node.attributes.get("rotary_interleaved", 0))
        rotated, size = 2 * length(tables[0]), length(k[3])
        _in_multiples(ledger, tables[0], 8)
        if rotated < size:
            _in_multiples(ledger, ledger.take(k[3], np.arange(rotated, size)), 16)
    elif node.has(7):  # tables that are not used, to which the columns are compared all the same
        _stay(ledger, q[3], k[3], v[3])
    else:
        _in_multiples(ledger, k[3], 8)
    _equally_many(ledger, k[3], v[3])
    k, v = _with_past(node, ledger, k, 3), _with_past(node, ledger, v, 4)
    k, v, out = _attend(node, ledger, q, k, v)
    _bias(node, ledger, 10, out)
    if node.has(11):
        ledger.unify(out[1], ledger.input(node, 11).axes[0])
    ledger.output(node, _packed(out))
    _present(node, ledger, 1, k)
    _present(node, ledger, 2, v)
    _scores(node, ledger, 3, out)


@rewrites("GroupQueryAttention", domain=MICROSOFT)
def group_query_heads(node: Node, change: Change) -> list[Edit]:
    """Both numbers of heads follow; the scale does not."""
    queries, keys, _ = counts = _group_counts(node)
    query = node.inputs[0]
    if node.has(1):
        left = (_heads_left(change, query, queries), _heads_left(change, node.inputs[1], keys))
        packed, packed_left = queries, left[0]
    else:
        packed = sum(counts)
        heads = np.unique(change.kept(query, 2) // (change.before(query)[2] // packed))
        left = (int((heads < queries).sum()), int(((heads >= queries) & (heads < queries + keys)).sum()))
        packed_left = left[0] + 2 * left[1]
    counted = _counted(node, {"num_heads": left[0], "kv_num_heads": left[1]})
    return [*counted, *_pinned(node, change.before(query)[2] // packed, change.after(query)[2] // packed_left)]


# -- what they have in common ----------------------------------------------------------------------------------------


def _attend(node: Node, ledger: Ledger, q: Heads, k: Heads, v: Heads) -> tuple[Heads, Heads, Heads]:
    """Queries times keys, softmax over the keys' tokens, times values; return keys, values and output.

    Query head h reads key head h // repeats.
    """
    ledger.freeze([k[2], v[2]], f"{node.op} mixes its indices")
    k, v = (_by_token(ledger, heads) for heads in (k, v))
    batch = ledger.unify(ledger.unify(v[0], k[0]), q[0])
    shared = ledger.unify(v[1], k[1])
    rows, repeats = ledger.grid(q[1], length(shared))
    shared = ledger.unify(shared, rows)
    columns = ledger.unify(k[3], q[3])
    heads = (*shared, *repeats)
    ledger.attend([heads], [columns, v[3]])
    for contracted in (columns, v[3]):
        ledger.work(node, (batch, heads, q[2], k[2], contracted))
    return (batch, shared, k[2], columns), (batch, shared, v[2], v[3]), (batch, heads, q[2], v[3])


def _by_token(ledger: Ledger, heads: Heads) -> Heads:
    """All tokens are added up: what is on the other axes must not depend on them."""
    batch, rows, tokens, columns = ledger.mix(ledger.arrange(heads), [2]).axes
    return batch, rows, tokens, columns


def _unpacked(ledger: Ledger, axes: Sequence[Axis], count: int) -> Heads:
    """See axes as (batch, heads, tokens, columns).

    They are just that, or (batch, tokens, heads * columns), or (batch, tokens, heads, 2 or 3, columns) where keys and values
    or all three are stacked: then they keep the same columns.
    """
    if len(axes) == 3:
        rows, columns = ledger.grid(axes[2], count)
        return axes[0], rows, axes[1], columns
    if len(axes) == 5:
        _stay(ledger, axes[3])
        batch, tokens, rows, _, columns = ledger.mix(ledger.arrange(axes), [3]).axes
        return batch, rows, tokens, columns
    batch, rows, tokens, columns = axes
    return batch, rows, tokens, columns


def _packed(heads: Heads) -> tuple[Axis, Axis, Axis]:
    batch, rows, tokens, columns = heads
    return batch, tokens, (*rows, *columns)


def _runs(ledger: Ledger, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Cut an axis into runs."""
    atom = ledger.flat(axis)
    whole = (atom,) if atom is not None else ()
    ends = np.cumsum([0, *sizes])
    if ends[-1] != length(axis):
        raise Refusal(f"{length(axis)} channels are not queries, keys and values of {', '.join(map(str, sizes))}")
    return [ledger.take(whole, np.arange(begin, end)) for begin, end in pairwise(ends)]


def _joined(ledger: Ledger, heads: Heads, past: Sequence[Axis]) -> Heads:
    """Put earlier tokens in front: all other axes align."""
    _stay(ledger, heads[2], past[2])
    batch, rows, columns = (ledger.unify(heads[place], past[place]) for place in (0, 1, 3))
    return batch, rows, heads[2], columns


def _with_past(node: Node, ledger: Ledger, heads: Heads, index: int) -> Heads:
    return _joined(ledger, heads, ledger.input(node, index).axes) if node.has(index) else heads


def _present(node: Node, ledger: Ledger, index: int, heads: Heads) -> None:
    """Keys or values as an output, earlier tokens included."""
    if index < len(node.outputs) and node.outputs[index]:
        tokens = fixed(ledger.shape(node.outputs[index])[2])
        ledger.output(node, (heads[0], heads[1], tokens, heads[3]), index)


def _scores(node: Node, ledger: Ledger, index: int, out: Heads) -> None:
    """Products of queries and keys as an output."""
    if index < len(node.outputs) and node.outputs[index]:
        ledger.output(node, (*out[:3], fixed(ledger.shape(node.outputs[index])[3])), index)


def _bias(node: Node, ledger: Ledger, index: int, out: Heads) -> None:
    """What is added to the products of queries and keys: it broadcasts to (batch, heads, tokens, keys' tokens)."""
    if not node.has(index):
        return
    *leading, keys = ledger.input(node, index).axes
    ledger.freeze([keys], f"{node.op} mixes its indices", node.inputs[index])
    for mine, axis in zip(out[2::-1], leading[::-1], strict=False):
        ledger.unify(mine, axis)


def _rotate(ledger: Ledger, columns: Axis, tables: Iterable[Axis], interleaved: int) -> None:
    """Tie the columns that are rotated into each other to the angle's place in the tables; those behind are not rotated."""
    tables = list(tables)
    half = length(tables[0])
    turning = ledger.take(columns, np.arange(2 * half))
    pairs = [
        ledger.take(turning, 2 * np.arange(half) + side if interleaved else np.arange(half) + side * half)
        for side in (0, 1)
    ]
    for other in (pairs[1], *tables):
        pairs[0] = ledger.unify(pairs[0], other)


def _stay(ledger: Ledger, *axes: Axis) -> None:
    """Positions, or what the operator itself counts, meet these axes."""
    for axis in axes:
        ledger.unify(axis, fixed(length(axis)))


def _equally_many(ledger: Ledger, *axes: Axis) -> None:
    """The operator knows one length for all these axes."""
    atoms = [ledger.flat(axis) for axis in axes]
    labels = [atom.labels.reshape(-1, atom.size) for atom in atoms if atom is not None and atom.labels is not None]
    if len(labels) < len(axes):
        _stay(ledger, *axes)
    else:
        ledger.balances.append(np.concatenate(labels))


def _in_multiples(ledger: Ledger, axis: Axis, unit: int) -> None:
    """Only multiples of ``unit`` indices stay: as many of those with one remainder as of those with any other."""
    atom = ledger.flat(axis)
    if atom is not None and atom.labels is not None:
        ledger.balances.append(
            atom.labels.reshape(-1, atom.size // unit, unit).swapaxes(1, 2).reshape(-1, atom.size // unit)
        )


def _sizes(node: Node, total: int) -> list[int]:
    """Lengths of queries, keys and values in the stacked weight of onnxruntime's Attention."""
    return list(node.attributes.get("qkv_hidden_sizes") or [total // 3] * 3)


def _group_counts(node: Node) -> tuple[int, int, int]:
    keys = node.attributes["kv_num_heads"]
    return node.attributes["num_heads"], keys, keys


def _heads_left(change: Change, name: str, count: int) -> int:
    """How many of ``count`` heads have columns left on the last axis of a tensor."""
    before = change.before(name)
    return len(np.unique(change.kept(name, len(before) - 1) // (before[-1] // count)))


def _counted(node: Node, counts: dict[str, int]) -> list[Edit]:
    return [Edit(name, count) for name, count in counts.items() if count != node.attributes[name]]


def _pinned(node: Node, before: int, after: int) -> list[Edit]:
    """The default scale belongs to the original number of columns (in onnxruntime's domain 0 means the default)."""
    given = node.attributes.get("scale", 0.0)
    return [Edit("scale", before**-0.5)] if not given and before != after else []
