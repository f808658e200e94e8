"""Durations on the command line: a decimal number, at most one space, a unit (operator-tools.md 1)."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any, Final

import click

_UNITS_S: Final = {
    "ns": Decimal("1e-9"),
    "us": Decimal("1e-6"),
    "µs": Decimal("1e-6"),
    "ms": Decimal("1e-3"),
    "s": Decimal(1),
    "m": Decimal(60),
    "min": Decimal(60),
    "h": Decimal(3600),
    "hr": Decimal(3600),
    "d": Decimal(86400),
    "day": Decimal(86400),
    "days": Decimal(86400),
}
_FORM: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([a-zµ]+)")


def parse_duration(text: str) -> float:
    """Return seconds. Raises ValueError for a missing or unknown unit, a sign, an exponent or inner blanks."""
    match = _FORM.fullmatch(text)
    unit = _UNITS_S.get(match[2]) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a duration; write a number and a unit, like 500ms, 2s, 5m, 12h, 1d")
    return float(Decimal(match[1]) * unit)


def format_duration(seconds: float) -> str:
    """Return whole seconds as `1d 2h 3m 4s`, without leading zero parts."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count}{unit}")
    return " ".join([*parts, f"{left}s"])


def format_seconds(seconds: float) -> str:
    """Return a duration as a flag takes it: `2s`, `500ms`, `1.5s`."""
    if seconds < 1 and seconds * 1000 == int(seconds * 1000) and seconds:
        return f"{int(seconds * 1000)}ms"
    return f"{int(seconds)}s" if seconds == int(seconds) else f"{seconds:g}s"


class DurationType(click.ParamType[float]):
    """A duration flag; the value is seconds."""

    name = "DUR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse, or fail as a usage error."""
        if isinstance(value, float):
            return value
        try:
            return parse_duration(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class DurationRange(DurationType):
    """A duration flag with bounds; `said` tells them."""

    def __init__(self, least_s: float, most_s: float, said: str) -> None:
        self.least_s = least_s
        self.most_s = most_s
        self._said = said

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse, or fail as a usage error."""
        seconds = super().convert(value, param, ctx)
        if not self.least_s <= seconds <= self.most_s:
            self.fail(self._said, param, ctx)
        return seconds
