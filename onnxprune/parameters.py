"""Kinds of values that command-line options take."""

from __future__ import annotations

import re
from typing import Any

import click

from onnxprune import latency
from onnxprune.errors import UsageError

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


class Amount(click.ParamType):
    """A share (at most 1) or an absolute amount with K, M, G or T."""

    name = "amount"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse ``0.6``, ``300M`` or ``4MB``."""
        if isinstance(value, int | float):
            value = str(value)
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?\d+)?)\s*([KMGT]?)B?\s*", str(value), re.IGNORECASE)
        if not found:
            self.fail(f"{value!r} is neither a share like 0.6 nor an amount like 300M", param, ctx)
        amount = float(found[1]) * _UNITS[found[2].upper()]
        if not 0 < amount < float("inf"):
            self.fail(f"{value!r} must be above 0", param, ctx)
        return amount


class Time(click.ParamType):
    """A share (at most 1), or a time: see :func:`onnxprune.latency.parse`."""

    name = "share|time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse ``0.7`` or ``12ms``."""
        try:
            return latency.parse(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


class InputShape(click.ParamType):
    """``NAME:1,3,224,224``."""

    name = "name:sizes"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[int, ...]]:
        """Parse a name and its sizes."""
        if isinstance(value, tuple):
            return value
        name, _, sizes = str(value).rpartition(":")
        try:
            shape = tuple(int(size) for size in re.split(r"[,x]", sizes))
        except ValueError:
            shape = ()
        if not name or not shape or min(shape) < 1:
            self.fail(f"{value!r} does not read NAME:1,3,224,224", param, ctx)
        return name, shape


class Numbers(click.ParamType):
    """One number, or one per channel: ``0.485,0.456,0.406``."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Parse numbers separated by commas."""
        try:
            return tuple(float(part) for part in str(value).strip("[]()").split(","))
        except ValueError:
            self.fail(f"{value!r} is not a number, or numbers separated by commas", param, ctx)
