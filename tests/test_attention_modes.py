"""What shrinks in attention: whole heads, or dimensions inside every head; the plan remembers which."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

import onnxprune
from commands import ok
from commands import run as run_command
from graphs import Tiny
from oracle import assert_close, couple_proto, feeds_for, masked_reference, run

TOKENS, FEATURES, HEADS, SIZE = 5, 8, 4, 6
WIDTH = HEADS * SIZE
MODES = ("heads", "dims", "auto")
FUSED = ("Gather", "Split", "Slice")
Build = Callable[[], ModelProto]


class Attention(Tiny):
    """A graph of attention under construction: tokens come in, x of shape (1, TOKENS, FEATURES)."""

    def __init__(self) -> None:
        super().__init__()
        self.input(1, TOKENS, FEATURES)

    def heads_of(self, y: str, heads: int) -> str:
        """See the last axis as heads: (1, heads, TOKENS, size)."""
        y = self.node("Reshape", y, self.constant([1, TOKENS, heads, -1]))
        return self.node("Transpose", y, perm=[0, 2, 1, 3])

    def project(self, name: str, width: int) -> str:
        """Project the tokens, with a bias."""
        return self.node("Add", self.linear("x", name, FEATURES, width), self.random(width, name=f"{name}.b"))

    def attend(self, q: str, k: str, v: str) -> ModelProto:
        """Attend, merge the heads, project by ``o``."""
        scores = self.node("MatMul", q, self.node("Transpose", k, perm=[0, 1, 3, 2]), name="scores")
        shares = self.node("Softmax", self.node("Mul", scores, self.constant(SIZE**-0.5)), axis=-1)
        y = self.node("Transpose", self.node("MatMul", shares, v, name="mix"), perm=[0, 2, 1, 3])
        return self.build(self.linear(self.node("Reshape", y, self.constant([1, TOKENS, WIDTH])), "o", WIDTH, 3))


def three_projections() -> ModelProto:
    """Project queries, keys and values by a matrix each."""
    t = Attention()
    return t.attend(*(t.heads_of(t.project(name, WIDTH), HEADS) for name in "qkv"))


def fused(how: str) -> ModelProto:
    """Project by one matrix, see the result as (three, heads, size), and take the three apart."""
    t = Attention()
    y = t.node("Reshape", t.project("qkv", 3 * WIDTH), t.constant([1, TOKENS, 3, HEADS, SIZE]))
    y = t.node("Transpose", y, perm=[2, 0, 3, 1, 4])
    if how == "Gather":
        parts = [t.node("Gather", y, t.constant(index), axis=0) for index in range(3)]
    elif how == "Split":
        parts = [t.node("Squeeze", part, t.constant([0])) for part in t.node("Split", y, outputs=3, axis=0)]
    else:
        ends = [t.constant([value]) for value in range(4)]
        slices = [t.node("Slice", y, *ends[index : index + 2], ends[0]) for index in range(3)]
        parts = [t.node("Squeeze", part, ends[0]) for part in slices]
    return t.attend(*parts)


def fused_then_heads() -> ModelProto:
    """Project by one matrix, cut it into three, and see each as heads (GPT)."""
    t = Attention()
    parts = t.node("Split", t.project("qkv", 3 * WIDTH), outputs=3, axis=2)
    return t.attend(*(t.heads_of(part, HEADS) for part in parts))


def grouped_queries() -> ModelProto:
    """Share each of two heads of keys and values between two heads of queries."""
    t = Attention()

    def repeated(name: str) -> str:
        y = t.node("Reshape", t.heads_of(t.project(name, WIDTH // 2), 2), t.constant([1, 2, 1, TOKENS, SIZE]))
        y = t.node("Expand", y, t.constant([1, 2, 2, TOKENS, SIZE]))
        return t.node("Reshape", y, t.constant([1, HEADS, TOKENS, -1]))

    return t.attend(t.heads_of(t.project("q", WIDTH), HEADS), repeated("k"), repeated("v"))


def rotary() -> ModelProto:
    """Rotate halves of every head by tables that all heads share."""
    t = Attention()
    cos, sin = (t.random(TOKENS, SIZE, name=name, offset=1.0, scale=0.3) for name in ("cos", "sin"))
    ends, last = [t.constant([value]) for value in (0, SIZE // 2, SIZE)], t.constant([-1])

    def rotated(name: str) -> str:
        y = t.heads_of(t.project(name, WIDTH), HEADS)
        left, right = (t.node("Slice", y, *ends[i : i + 2], last) for i in (0, 1))
        turned = t.node("Concat", t.node("Neg", right), left, axis=-1)
        return t.node("Add", t.node("Mul", y, cos), t.node("Mul", turned, sin))

    return t.attend(rotated("q"), rotated("k"), t.heads_of(t.project("v", WIDTH), HEADS))


def over_channels() -> ModelProto:
    """Attend over the dimensions of each head instead of over tokens, with a temperature per head (XCiT)."""
    t = Attention()
    q, k, v = (t.node("Transpose", t.heads_of(t.project(name, WIDTH), HEADS), perm=[0, 1, 3, 2]) for name in "qkv")

    def unit(y: str) -> str:
        return t.node("Div", y, t.node("Clip", t.node("ReduceL2", y, axes=[-1], keepdims=1), t.constant(1e-6)))

    scores = t.node("MatMul", unit(q), t.node("Transpose", unit(k), perm=[0, 1, 3, 2]), name="scores")
    scores = t.node("Mul", scores, t.random(HEADS, 1, 1, name="temperature", offset=1.0, scale=0.2))
    y = t.node("Transpose", t.node("MatMul", t.node("Softmax", scores, axis=-1), v, name="mix"), perm=[0, 3, 1, 2])
    return t.build(t.linear(t.node("Reshape", y, t.constant([1, TOKENS, WIDTH])), "o", WIDTH, 3))


def tables_of_heads() -> ModelProto:
    """Scale queries by a table of dimensions that comes in from outside, so that their number is given."""
    t = Attention()
    t.input(SIZE, name="given")
    q, k, v = (t.heads_of(t.project(name, WIDTH), HEADS) for name in "qkv")
    return t.attend(t.node("Mul", q, "given"), k, v)


def bias_of_scores() -> ModelProto:
    """Add a table to the scores of every head (relative positions)."""
    t = Attention()
    q, k, v = (t.heads_of(t.project(name, WIDTH), HEADS) for name in "qkv")
    table = t.random(1, HEADS, TOKENS, TOKENS, name="table")
    scores = t.node("MatMul", q, t.node("Transpose", k, perm=[0, 1, 3, 2]), name="scores")
    shares = t.node("Softmax", t.node("Add", scores, table), axis=-1)
    y = t.node("Transpose", t.node("MatMul", shares, v, name="mix"), perm=[0, 2, 1, 3])
    return t.build(t.linear(t.node("Reshape", y, t.constant([1, TOKENS, WIDTH])), "o", WIDTH, 3))


GRAPHS: dict[str, Build] = {
    "three_projections": three_projections,
    **{f"fused_{how}": partial(fused, how) for how in FUSED},
    "fused_then_heads": fused_then_heads,
    "grouped_queries": grouped_queries,
    "rotary": rotary,
    "over_channels": over_channels,
    "bias_of_scores": bias_of_scores,
}
ALL_HEADS = [name for name in GRAPHS if name != "grouped_queries"]
named = pytest.mark.parametrize("name", GRAPHS)


def assert_pruned(model: ModelProto, mode: str, target: float | None = None) -> onnxprune.Result:
    """The model prunes in a mode, to 0.6 or to just above its floor, and equals the masked original."""
    onnx.checker.check_model(model, full_check=True)
    floor = onnxprune.inspect(model, attention=mode, preset="a").floor["mac"]
    target = max(0.6, floor * 1.001) if target is None else target
    result = onnxprune.prune(model, target_mac=target, attention=mode, preset="a")
    onnx.checker.check_model(result.model, full_check=True)
    assert result.report.proof is not None
    assert result.report.proof.ok
    assert result.plan.initializers
    zero = ("qkv.w/1", "qkv.b/0") if "qkv.w" in sizes(model) else ("q.w/1", "q.b/0")
    feeds = feeds_for(couple_proto(model))
    assert_close(run(result.model, feeds), masked_reference(model, result.plan, feeds, zero))
    return result


def sizes(model: ModelProto) -> dict[str, tuple[int, ...]]:
    """Shape of every initializer."""
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def kept(model: ModelProto, result: onnxprune.Result, name: str, axis: int) -> list[list[int]]:
    """Dimensions kept in every head of a tensor axis (of a fused one: heads of queries, then of keys, then of values)."""
    size = sizes(model)[name][axis]
    indices = result.plan.initializers.get(name, {}).get(axis, range(size))
    return [[index - start for index in indices if start <= index < start + SIZE] for start in range(0, size, SIZE)]


def projections(model: ModelProto, result: onnxprune.Result) -> dict[str, list[list[int]]]:
    """Dimensions kept in every head of queries, keys, values, and of what the last projection reads."""
    if "qkv.w" in sizes(model):
        heads = kept(model, result, "qkv.w", 1)
        assert heads == kept(model, result, "qkv.b", 0)
        parts = {name: heads[start : start + HEADS] for name, start in zip("qkv", (0, HEADS, 2 * HEADS), strict=True)}
    else:
        parts = {name: kept(model, result, f"{name}.w", 1) for name in "qkv"}
        assert parts == {name: kept(model, result, f"{name}.b", 0) for name in "qkv"}
    return parts | {"o": kept(model, result, "o.w", 0)}


def whole(heads: list[list[int]]) -> list[int]:
    """Numbers of the heads that are left; every head is there altogether or not at all."""
    assert all(dimensions in ([], list(range(SIZE))) for dimensions in heads)
    return [number for number, dimensions in enumerate(heads) if dimensions]


@pytest.mark.parametrize("name", ALL_HEADS)
def test_heads_go_as_a_whole(name: str) -> None:
    """In heads mode the same heads leave queries, keys, values and the last projection, each with all its dimensions."""
    model = GRAPHS[name]()
    result = assert_pruned(model, "heads")
    left = {part: whole(heads) for part, heads in projections(model, result).items()}
    assert left["q"] == left["k"] == left["v"] == left["o"]
    assert 0 < len(left["q"]) < HEADS


def test_heads_of_grouped_queries() -> None:
    """Where heads of queries share keys and values, heads of queries go as a whole, from every group equally many."""
    model = grouped_queries()
    result = assert_pruned(model, "heads")
    parts = projections(model, result)
    left = whole(parts["q"])
    assert left == whole(parts["o"])
    assert len(left) < HEADS
    shared = whole(parts["k"])
    assert shared == whole(parts["v"])
    per_group = [sum(head // 2 == group for head in left) for group in shared]
    assert len(set(per_group)) == 1
    assert sum(per_group) == len(left)


@named
@pytest.mark.parametrize("mode", ["dims", "auto"])
def test_dimensions_leave_the_number_of_heads_alone(name: str, mode: str) -> None:
    """In dims mode (and where auto can) every head stays, and all heads are left equally wide."""
    model = GRAPHS[name]()
    result = assert_pruned(model, mode)
    parts = projections(model, result)
    for heads in parts.values():
        assert len({len(dimensions) for dimensions in heads}) == 1
        assert heads[0]
    assert any(len(heads[0]) < SIZE for heads in parts.values())
    if name != "over_channels":  # where all dimensions of a head's values attend
        assert len(parts["v"][0]) == len(parts["o"][0])
    assert len(parts["q"][0]) == len(parts["k"][0]) or name == "over_channels"


@named
@pytest.mark.parametrize("mode", MODES)
def test_modes_reach_their_floor(name: str, mode: str) -> None:
    """One head, or one dimension of every head (two where halves are rotated), is what may be left at the least."""
    model = GRAPHS[name]()
    floor = onnxprune.inspect(model, attention=mode, preset="a").floor["mac"]
    result = assert_pruned(model, mode, floor * 1.0001)
    parts = projections(model, result)
    if mode == "heads" and name != "grouped_queries":
        assert [len(whole(heads)) for heads in parts.values()] == [1] * 4
    elif mode != "heads":
        assert {len(dimensions) for dimensions in parts["o"]} == {1}


def test_tables_follow_heads_and_dimensions() -> None:
    """A table per head loses heads, a table per dimension loses dimensions, and neither the other's."""
    by_head = [assert_pruned(bias_of_scores(), mode) for mode in ("heads", "dims")]
    assert [sizes(result.model)["table"][1] for result in by_head] == [
        len(by_head[0].plan.initializers["table"][1]),
        HEADS,
    ]
    temperature = assert_pruned(over_channels(), "heads")
    assert sizes(temperature.model)["temperature"][0] < HEADS
    by_dimension = [assert_pruned(rotary(), mode) for mode in ("heads", "dims")]
    tables = [[sizes(result.model)[table][1] for table in ("cos", "sin")] for result in by_dimension]
    assert tables[0] == [SIZE, SIZE]
    assert tables[1][0] == tables[1][1] < SIZE


def test_auto_takes_heads_where_dimensions_cannot_shrink() -> None:
    """Queries whose dimensions are given from outside keep them; whole heads can go, and do in heads mode."""
    model = tables_of_heads()
    parts = projections(model, assert_pruned(model, "heads"))
    assert whole(parts["q"]) == whole(parts["k"]) == whole(parts["v"])
    for mode in ("dims", "auto"):
        parts = projections(model, assert_pruned(model, mode, 0.8))
        assert all(len(dimensions) in (0, SIZE) for name in "qk" for dimensions in parts[name])


@pytest.mark.parametrize("mode", MODES)
def test_modes_mean_nothing_without_attention(mode: str) -> None:
    """Grouped convolutions and shuffled channels are no heads: all modes keep the same channels."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input(1, 2, 4, 6), "a", 2, 8, 3))
    y = t.node("Reshape", t.conv(y, "b", 8, 8, 3, group=2), t.constant([1, 2, 4, 4, 6]))
    y = t.node("Reshape", t.node("Transpose", y, perm=[0, 2, 1, 3, 4]), t.constant([1, 8, 4, 6]))
    model = t.build(t.conv(t.conv(y, "c", 8, 8, 3, group=2), "z", 8, 3))
    plans = [onnxprune.prune(model, target_mac=0.6, attention=each).plan.initializers for each in (mode, "auto")]
    assert plans[0] == plans[1]


# -- the plan remembers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["three_projections", "fused_Gather", "rotary"])
def test_plan_remembers_the_mode(name: str, mode: str) -> None:
    """A plan's JSON says what shrank, and replays as it was made: on the model, on a sibling, and when verifying."""
    model = GRAPHS[name]()
    result = assert_pruned(model, mode)
    text = json.dumps(result.plan.to_json())
    assert json.loads(text)["attention"] == mode
    plan = onnxprune.Plan.from_json(text)
    assert plan.attention == mode
    assert onnxprune.apply(model, plan).model == result.model
    assert onnxprune.verify(model, result.model, plan).weights == "exact"
    sibling = GRAPHS[name]()
    for tensor in sibling.graph.initializer:
        if tensor.name.endswith(".w"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(-1.5), tensor.name))
    assert sizes(onnxprune.apply(sibling, plan).model) == sizes(result.model)


def test_plan_without_a_mode_is_an_old_one() -> None:
    """Plans from before there were modes are read as made in auto."""
    result = assert_pruned(three_projections(), "auto")
    data = result.plan.to_json()
    del data["attention"]
    plan = onnxprune.Plan.from_json(json.dumps(data))
    assert plan.attention == "auto"
    assert onnxprune.apply(three_projections(), plan).model == result.model


@pytest.mark.parametrize("other", ["dims", "auto"])
def test_plan_in_another_mode_is_refused_or_proved(other: str) -> None:
    """A plan that removes heads but claims another mode is refused in words."""
    data = assert_pruned(three_projections(), "heads").plan.to_json()
    plan = onnxprune.Plan.from_json(json.dumps(data | {"attention": other}))
    with pytest.raises(onnxprune.OnnxPruneError):
        onnxprune.apply(three_projections(), plan)


@pytest.mark.parametrize("value", ["tails", None, 3, ["heads"], {}])
def test_plan_with_a_mode_that_does_not_exist(value: object) -> None:
    """A hostile mode in a plan is refused as a model error, not passed on."""
    data = assert_pruned(three_projections(), "heads").plan.to_json()
    with pytest.raises(onnxprune.ModelError):
        onnxprune.apply(three_projections(), onnxprune.Plan.from_json(json.dumps(data | {"attention": value})))


# -- the command line ----------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Write a graph of attention."""
    onnx.save(three_projections(), tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


@pytest.mark.parametrize("mode", MODES)
def test_command_line(path: Path, mode: str) -> None:
    """--attention chooses for prune and inspect; apply and verify take it from the plan."""
    out, plan, again, report = (path.with_name(name) for name in ("out.onnx", "plan.json", "again.onnx", "report.json"))
    options = ("--attention", mode, "--preset", "a")
    ok(path, out, "--target-mac", 0.6, *options, "--plan-out", plan, "--no-latency")
    assert json.loads(plan.read_text())["attention"] == mode
    expected = onnxprune.prune(three_projections(), target_mac=0.6, attention=mode, preset="a").model
    assert sizes(onnx.load(out)) == sizes(expected)
    ok("apply", path, again, "--plan", plan)
    assert again.read_bytes() == out.read_bytes()
    ok("verify", path, out, "--plan", plan)
    ok("inspect", path, *options, "--json", report)
    floor = onnxprune.inspect(path, attention=mode, preset="a").floor
    assert json.loads(report.read_text())["floor"] == pytest.approx(floor)


def test_reports_say_what_froze(path: Path) -> None:
    """What a mode leaves alone is frozen for that reason."""
    for mode, other in (("heads", "dims"), ("dims", "heads")):
        told = {row.reason for row in onnxprune.inspect(path, attention=mode).frozen}
        assert not any(f"--attention {other}" in reason for reason in told)
    rows = [
        reason
        for reason in ok("inspect", path, "-v", "--attention", "heads").stdout.splitlines()
        if "attention" in reason
    ]
    assert rows


@pytest.mark.parametrize("command", ["prune", "inspect"])
@pytest.mark.parametrize("value", ["tails", "", "HEADS ", "heads,dims"])
def test_unknown_mode_is_a_usage_error(path: Path, command: str, value: str) -> None:
    """An unknown mode costs one line and exit code 2, and writes nothing."""
    out = path.with_name("out.onnx")
    files = (path, out, "--target-mac", 0.6) if command == "prune" else (path,)
    result = run_command(command, *files, "--attention", value)
    assert result.exit_code == 2
    assert "attention" in result.stderr
    assert not out.exists()
    with pytest.raises(onnxprune.UsageError, match="choose from auto, dims, heads") as caught:
        onnxprune.prune(path, target_mac=0.6, attention=value)
    assert caught.value.exit_code == 2
