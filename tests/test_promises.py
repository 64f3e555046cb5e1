"""What ``docs/security.md`` promises of hostile files, one test for each."""

from __future__ import annotations

import ast
import os
import re
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import hostile
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, helper
from test_safety import refused, small

from commands import ok, run
from onnxprune import arrays, runtime
from onnxprune.errors import ModelError
from onnxprune.prepare import inline

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("onnxprune", "passes")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "trainers.py"  # runs the command line that --trainer gives
]
QUICK = ("--target-mac", "0.5", "--no-latency")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Write a small network and return its path."""
    path = tmp_path / "in.onnx"
    onnx.save(small(), path)
    return path


def written(folder: Path, content: ModelProto | bytes) -> Path:
    """Write a model as it is."""
    path = folder / "hostile.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    return path


def test_every_promise_has_its_test() -> None:
    """Every row of the page's table names a test function that exists."""
    rows = re.findall(r"^\|.*\| `(\w+)::(\w+)` \|$", (ROOT / "docs" / "security.md").read_text(), re.MULTILINE)
    assert len(rows) > 15
    for file, name in rows:
        (path,) = (ROOT / "tests").rglob(f"{file}.py")
        assert re.search(rf"^def {name}\(", path.read_text(), re.MULTILINE), f"{file}::{name}"


# -- nothing is run ----------------------------------------------------------------------------------------------------


def dotted(node: ast.expr) -> str:
    """The text of a name with its attributes."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@cache
def calls() -> list[tuple[str, ast.Call]]:
    """Every call in the program, by the text of what is called."""
    return [
        (dotted(node.func), node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]


def test_no_code_is_made_of_data() -> None:
    """No module evaluates text, unpickles, starts a program or loads a library of operators."""
    forbidden = re.compile(
        r"(builtins\.)?(eval|exec|compile|__import__)|os\.(system|popen|exec\w+|spawn\w+)|subprocess\..*|.*ctypes.*|"
        r".*pickle\..*|marshal\..*|shelve\..*|.*register_custom_ops_library|.*ReferenceEvaluator"
    )
    found = {name for name, _ in calls() if forbidden.fullmatch(name)}
    assert not found
    imported = {
        name.name.partition(".")[0]
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert imported.isdisjoint({"pickle", "marshal", "shelve", "subprocess", "ctypes"})


def test_arrays_and_weights_are_read_as_plain_data() -> None:
    """``numpy.load`` is not used, or only without pickles; ``torch.load`` reads weights only."""
    n_torch = 0
    for name, call in calls():
        words = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name in ("np.load", "numpy.load"):
            assert words.get("allow_pickle") == "False"
        if name == "torch.load":
            n_torch += 1
            assert words.get("weights_only") == "True"
    assert n_torch


def test_operators_of_other_domains_load_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with operators nobody knows is inspected, but no library of operators is looked for."""

    def register(*_: object) -> None:
        raise AssertionError("a library was loaded")

    monkeypatch.setattr(onnxruntime.SessionOptions, "register_custom_ops_library", register)
    custom = hostile.build([hostile.node("Blur", "c", "y", domain="acme")], opsets=[helper.make_opsetid("acme", 1)])
    ok("inspect", written(tmp_path, custom))


def test_names_cannot_command_a_terminal(tmp_path: Path) -> None:
    """Control characters in a model's names are shown as question marks, in tables and messages."""
    named = hostile.build([helper.make_node("Relu", ["c"], ["y"], name="\x1b]0;owned\x07")])
    named.graph.node[0].name = "conv\x1b[2J"
    shown = ok("inspect", written(tmp_path, named), "-v").output
    assert "conv?[2J" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["/dev/zero", "fifo"])
def test_external_data_is_a_plain_file(tmp_path: Path, device: str) -> None:
    """A link to a device, or a pipe, is not opened as external data."""
    path = tmp_path / "in.onnx"
    onnx.save_model(small(), str(path), save_as_external_data=True, location="w.bin", size_threshold=128)
    (tmp_path / "w.bin").unlink()
    if device == "fifo":
        os.mkfifo(tmp_path / "w.bin")
    else:
        (tmp_path / "w.bin").symlink_to(device)
    assert "external data cannot be read" in refused(3, "inspect", path)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["inspect", "PIPE"], id="model"),
        pytest.param(["IN", "OUT", *QUICK, "--calib", "PIPE"], id="calib"),
        pytest.param(["evaluate", "IN", "--metric", "psnr", "--data", "PIPE"], id="data"),
        pytest.param(["apply", "IN", "OUT", "--plan", "PIPE"], id="plan"),
        pytest.param(["prune", "IN", "OUT", *QUICK, "--config", "PIPE"], id="config"),
        pytest.param(["IN", "OUT", "--target-latency", "0.9", "--latency-table", "PIPE"], id="latency-table"),
        pytest.param(["IN", "OUT", *QUICK, "--encodings", "PIPE", "--encodings-out", "OUT2"], id="encodings"),
        pytest.param(["IN", "OUT", *QUICK, "--profile", "PIPE.toml"], id="profile"),
        pytest.param(["report", "PIPE"], id="report"),
        pytest.param(["IN", "OUT", *QUICK, "--calib", "FOLDER"], id="calib-folder"),
    ],
)
def test_pipes_and_devices_are_not_read(model: Path, tmp_path: Path, words: list[str]) -> None:
    """Whatever file of a command is a pipe, it is refused with 7 instead of waited for."""
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "a.npy")
    names = {"IN": model, "OUT": tmp_path / "o", "OUT2": tmp_path / "e", "FOLDER": tmp_path / "folder"}
    given = [names.get(word, tmp_path / "pipe.toml" if "PIPE" in word else word) for word in words]
    assert "is a pipe, a device or a socket" in refused(7, *given)


def test_model_file_has_a_bound(tmp_path: Path) -> None:
    """A file of a terabyte is refused by its size; nothing of it is read."""
    path = tmp_path / "in.onnx"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert "2 GiB" in refused(3, "inspect", path)


# -- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in hostile.MODELS if name not in hostile.HARMLESS])
def test_hostile_model_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Giants, claims, circles and clashes are refused with 3 in a line or two; nothing is allocated for a claim."""
    monkeypatch.setattr(runtime, "RUN_SECONDS", 0.5)
    refused(3, "inspect", written(tmp_path, hostile.MODELS[name]()))


@pytest.mark.parametrize("name", sorted(hostile.HARMLESS))
def test_strange_model_is_handled(tmp_path: Path, name: str) -> None:
    """What is merely strange is inspected; pruning it works or is refused with a reason."""
    path = written(tmp_path, hostile.MODELS[name]())
    ok("inspect", path)
    result = run(path, tmp_path / "out.onnx", *QUICK)
    assert result.exit_code in (0, 3, 4, 5), result.output
    assert len(result.stderr.splitlines()) <= 3


def test_labels_have_a_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Channels that multiply, each tensor below the bound, are refused by their sum."""
    monkeypatch.setattr("onnxprune.labels.MAX_LABELS", 1000)
    assert "multiplies its channels" in refused(3, "inspect", written(tmp_path, hostile.doubled(8)))


def test_run_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop of 2**60 rounds is stopped after the time a run may take."""
    monkeypatch.setattr(runtime, "RUN_SECONDS", 0.5)
    assert "still ran after 0.5 s" in refused(3, "inspect", written(tmp_path, hostile.looped()))


def test_functions_that_multiply_are_counted_before_they_are_inlined() -> None:
    """Functions that call the next one tenfold, twelve deep, are refused by arithmetic."""
    with pytest.raises(ModelError, match="no end"):
        inline(hostile.laughs())
    assert len(inline(hostile.laughs(2, 10)).graph.node) == 101


def test_long_chain_takes_time_in_proportion(tmp_path: Path) -> None:
    """A chain of thousands of nodes has no limit of its own, neither in depth nor in time."""
    ok("inspect", written(tmp_path, hostile.chain(3000)), "-q")


def header(shape: tuple[int, ...]) -> bytes:
    """An .npy header of float32."""
    text = repr({"descr": "<f4", "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def test_archive_may_not_swell(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive that holds a thousand times its size is refused before a member is read."""
    monkeypatch.setattr(arrays, "FREE", 1 << 20)
    with zipfile.ZipFile(tmp_path / "c.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header((1 << 14, 2, 4, 6)) + bytes(3 << 20))
    assert "would swell" in refused(7, model, tmp_path / "o.onnx", *QUICK, "--calib", tmp_path / "c.npz")


def test_array_that_claims_too_much(model: Path, tmp_path: Path) -> None:
    """A header that claims more than 4 GiB is refused as it stands."""
    (tmp_path / "c.npy").write_bytes(header((1 << 40, 2, 4, 6)))
    assert "over the bound" in refused(7, model, tmp_path / "o.onnx", *QUICK, "--calib", tmp_path / "c.npy")


def test_giant_picture_is_refused(model: Path, tmp_path: Path) -> None:
    """A picture of 100,000 by 100,000 pixels is refused by its header."""
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "c").mkdir()
    image.new("1", (8, 8)).save(tmp_path / "c" / "a.pgm")
    (tmp_path / "c" / "a.pgm").write_bytes(b"P5 100000 100000 255\n" + bytes(64))
    message = refused(7, model, tmp_path / "o.onnx", *QUICK, "--calib", tmp_path / "c")
    assert "exceeds limit" in message or "cannot be read" in message


def test_picture_is_of_a_format_that_starts_no_program(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostScript is no picture here, whatever it is called: Pillow would give it to Ghostscript."""
    plugin = pytest.importorskip("PIL.EpsImagePlugin")
    monkeypatch.setattr(plugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    )
    assert "cannot be read" in refused(7, model, tmp_path / "o.onnx", *QUICK, "--calib", tmp_path / "c")


@pytest.mark.parametrize("words", [("report",), ("sweep", "--resume", "--json")], ids=lambda words: words[0])
def test_metric_in_a_table_is_not_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """A table of results names its metric, which may be ``module:function``; drawing it imports nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('it runs')")
    table, own = tmp_path / "t.json", ("--metric", "cosine", "--plot", tmp_path / "p.svg", "--target-mac", "0.75")
    np.savez(tmp_path / "c.npz", x=np.random.default_rng(0).standard_normal((4, 2, 4, 6)).astype(np.float32))
    ok("sweep", model, *own, "--data", tmp_path / "c.npz", "--json", table)
    table.write_text(table.read_text().replace('"cosine"', '"evil:score"'))
    if words[0] == "report":
        ok("report", table, "-o", tmp_path / "page.html")
        assert "evil:score" in (tmp_path / "page.html").read_text()
    else:
        run("sweep", model, *own, "--data", tmp_path / "c.npz", "--resume", "--json", table)
    assert "evil" not in sys.modules


DEEP, LONG = "[" * 100_000, "1" * 10_000
TEXTS: dict[str, tuple[int, str, Callable[[Path, Path], list[object]]]] = {
    "plan": (3, DEEP, lambda m, t: ["apply", m, m.with_name("o"), "--plan", t]),
    "plan-integer": (3, f'{{"schema": {LONG}}}', lambda m, t: ["apply", m, m.with_name("o"), "--plan", t]),
    "config": (2, f"a = {DEEP[:20_000]}", lambda m, t: ["prune", m, m.with_name("o"), *QUICK, "--config", t]),
    "config-long": (2, "a." * 50_000 + "b = 1", lambda m, t: ["prune", m, m.with_name("o"), *QUICK, "--config", t]),
    "config-integer": (2, f"align = {LONG}", lambda m, t: ["prune", m, m.with_name("o"), *QUICK, "--config", t]),
    "profile": (2, f"a = {DEEP[:20_000]}", lambda m, t: [m, m.with_name("o"), *QUICK, "--profile", t]),
    "encodings": (
        2, DEEP, lambda m, t: [m, m.with_name("o"), *QUICK, "--encodings", t, "--encodings-out", m.with_name("e")],
    ),
    "report": (2, DEEP, lambda m, t: ["report", t]),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_deep_and_long_text_is_refused(model: Path, tmp_path: Path, name: str) -> None:
    """JSON and TOML nested without end, and numbers of ten thousand digits, are refused in a line."""
    code, content, words = TEXTS[name]
    text = tmp_path / "text.toml"
    text.write_text(content)
    refused(code, *words(model, text))


def test_input_shape_has_a_bound(model: Path) -> None:
    """A shape of the user's, or of a plan's, beyond every bound is refused."""
    refused(2, "inspect", model, "--input-shape", f"x:{10**40},2,4,6")
