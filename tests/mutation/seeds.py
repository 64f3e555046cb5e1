"""Valid models to start from: of the operators' tests, random ones, architectures, fixtures, and stripped real ones."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pathlib
import random
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import Any

import onnx
from onnx import ModelProto

import onnxprune
from architectures import ALL
from oracle import Case
from random_graphs import seeded_net, valid

from .common import copy

ROOT = pathlib.Path(__file__).resolve().parents[2]
ZOO = ROOT.parent / "shared" / "zoo"
SMALL = (
    "cbam cnn3d crnn_kws drrn_shared fsrcnn gn_resnet gru_seq hf_bert hf_gpt2 hf_llama_gqa hf_llama_gqa-dynamo "
    "hf_t5_encoder hf_wav2vec2 lstm_bi lstm_bi-dynamo pointnet siamese style_instnorm tcn_wavenet unet_bn "
    "v_functions_dynamo v_hf_bert_int8dyn v_hf_bert_ortopt v_hf_llama_dynseq v_resnet18_constnodes v_resnet18_fp16 "
    "v_resnet18_qdq v_script_if v_tied_embedding "
).split()
"""Models of the zoo that cost little once they are stripped."""
_ARCHITECTURES = [name for name in ALL if name != "c2f_detector"]  # 1.5 s a run
_RANDOM = 400
_WEIGHTS = {"case": 55, "random": 28, "architecture": 6, "fixture": 2, "zoo": 9}


class Seeds:
    """Named models, made when they are first asked for; the zoo's are read from a folder that :func:`strip` filled.

    With a ``family``, only its members are drawn.
    """

    def __init__(self, zoo: Iterable[pathlib.Path] = (), family: str = "") -> None:
        self._family = family
        self._zoo = {f"zoo {path.stem}": partial(onnx.load, path) for path in sorted(zoo)}
        self._made: dict[str, ModelProto] = {}

    @cached_property
    def makers(self) -> dict[str, Callable[[], Any]]:
        """What makes every seed, by name; the first word is its family."""
        fixtures = sorted((ROOT / "fixtures").rglob("*.onnx"))
        return {
            **{f"case {number} {case}": case.build for number, case in enumerate(_cases())},
            **{f"random {number}": partial(_random, number) for number in range(_RANDOM)},
            **{f"architecture {name}": ALL[name] for name in _ARCHITECTURES},
            **{f"fixture {path.stem}": partial(onnx.load, path) for path in fixtures},
            **self._zoo,
        }

    @cached_property
    def _families(self) -> dict[str, list[str]]:
        return {family: [n for n in self.makers if n.split()[0] == family] for family in _WEIGHTS}

    def draw(self, rng: random.Random) -> str:
        """Draw a name: first a family, then one of it."""
        present = [family for family, members in self._families.items() if members]
        family = self._family or rng.choices(present, [_WEIGHTS[each] for each in present])[0]
        return rng.choice(self._families[family])

    def model(self, name: str) -> ModelProto:
        """Return a copy of a seed."""
        if name not in self._made:
            self._made[name] = self.makers[name]()
        return copy(self._made[name])


def _cases() -> list[Case]:
    modules = [
        importlib.import_module(f"ops.{path.stem}") for path in sorted((ROOT / "tests" / "ops").glob("test_*.py"))
    ]
    return [case for module in modules for case in getattr(module, "CASES", ()) if isinstance(case, Case)]


def _random(number: int) -> ModelProto:
    """The first valid graph from a number on."""
    while True:
        net = seeded_net(number)
        model = net.build(*net.pool)
        if not valid(model):
            return model
        number += _RANDOM


def strip(folder: pathlib.Path) -> None:
    """Fill the small models of the zoo, where it is there, and prune them to few channels: the structure is what counts."""
    if not ZOO.is_dir():
        return
    spec = importlib.util.spec_from_file_location("fill", ZOO / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    for name in SMALL:
        path = folder / f"{name}.onnx"
        if path.is_file():
            continue
        model = fill.load(name)
        for share in (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8):
            with contextlib.suppress(onnxprune.BudgetError):
                model = onnxprune.prune(model, target_mac=share, min_channels=4, proof=False).model
                break
        onnx.save(model, path)
