#!/usr/bin/env python3
"""Print Table 1 of the paper for our own EDSR-baseline x2 and SID: the original, then presets a-d at the paper's shares.

The weights are random (He scale), so kept channels show how each preset spends the budget, not what training would keep.
Nothing of the size of an activation is ever allocated.

    python tools/table1.py [--channels]
"""

from __future__ import annotations

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "fixtures"))

import architectures
import onnxprune
from onnxprune.report import Report

# Shares of MAC that Table 1 reports for methods A, B, C and D.
PAPER = {"SID": (0.82, 0.63, 0.48, 0.42), "EDSR": (0.76, 0.76, 0.76, 0.63)}
BUILDS = {"SID": architectures.sid, "EDSR": architectures.edsr}


def row(network: str, solution: str, report: Report) -> str:
    """Write one row in the table's units."""
    after, before = report.after, report.before
    cells = [f"{network:5} {solution:9}"]
    for kind, unit, digits in (("mac", 1e9, 2), ("weights", 1e3, 1), ("activations", 1e6, 1), ("bandwidth", 1e6, 1)):
        cells.append(f"{after[kind] / unit:9.{digits}f} ({100 * after[kind] / before[kind]:3.0f} %)")
    return "  ".join(cells)


def main() -> None:
    """Print the table, and with ``--channels`` the kept channels of every layer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", action="store_true", help="print kept channels per layer")
    chosen = parser.parse_args()
    print("network solution       MAC 1e9            weights 1e3        activations 1e6     BW 1e6")
    for network, build in BUILDS.items():
        model = build()
        print(row(network, "original", onnxprune.inspect(model)))
        kept = {}
        for preset, share in zip("abcd", PAPER[network], strict=True):
            result = onnxprune.prune(model, target_mac=share, preset=preset, proof=False)
            print(row(network, f"preset {preset}", result.report))
            kept[preset] = [layer.channels_after for layer in result.report.layers]
        if chosen.channels:
            print(
                f"\n{network}: output channels per layer\n{'layer':28}{'original':>9}"
                + "".join(f"{p:>6}" for p in kept)
            )
            for index, layer in enumerate(result.report.layers):
                counts = "".join(f"{kept[preset][index]:6}" for preset in kept)
                print(f"{layer.node:28}{layer.channels_before:9}{counts}")
            print()


if __name__ == "__main__":
    main()
