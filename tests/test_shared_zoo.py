"""Real architectures beside the project, where they are there: verdict, floor and free channels are golden figures."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
ZOO = ROOT.parent / "shared" / "zoo"
GOLDEN = ROOT / "tests" / "golden" / "zoo.json"
FEW = ("shuffle_group", "gn_resnet", "gru_seq", "hf_llama_gqa", "v_script_if", "v_hf_bert_int8dyn")
needs_zoo = pytest.mark.skipif(not ZOO.is_dir(), reason=f"the architectures are not there: {ZOO}")


def run(*arguments: str) -> None:
    """Run the tool; it must agree with the golden file."""
    command = [sys.executable, ROOT / "tools" / "zoo.py", "--fill", ZOO, "--golden", GOLDEN, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_zoo
def test_few_architectures_agree_with_the_golden_file():
    """Small models of several kinds prune, prove, and have the floor and the number of free channels that were reviewed."""
    run(*(word for name in FEW for word in ("--only", name)))


@needs_zoo
@pytest.mark.slow
def test_all_architectures_agree_with_the_golden_file():
    """The whole zoo does: none fails, and what is refused is refused for its reason."""
    run("--jobs", "2")
