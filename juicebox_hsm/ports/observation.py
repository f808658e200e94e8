"""Where the realm's parts report to: counters and timings, and a structured log. Nothing here fails or waits."""

from __future__ import annotations

from typing import Protocol

Tag = str | int | bool | None


class Meter(Protocol):
    """Counters, gauges and timings by name and tags; a tag that is None is left out."""

    def count(self, name: str, n: int = 1, **tags: Tag) -> None:
        """Add to a counter."""
        ...

    def gauge(self, name: str, value: float, **tags: Tag) -> None:
        """Set a gauge."""
        ...

    def timing(self, name: str, ns: int, **tags: Tag) -> None:
        """Record a duration in nanoseconds."""
        ...


class EventMeter(Meter, Protocol):
    """A meter that also tells single events."""

    def event(self, title: str, text: str) -> None:
        """Tell an event that somebody wants to read about."""
        ...


class Log(Protocol):
    """A structured log; `event` is the line, `fields` are what it is about."""

    def debug(self, event: str, **fields: object) -> object:
        """Log what helps to find a fault."""
        ...

    def info(self, event: str, **fields: object) -> object:
        """Log what an operator wants to have seen."""
        ...

    def warning(self, event: str, **fields: object) -> object:
        """Log trouble that is being handled."""
        ...

    def error(self, event: str, **fields: object) -> object:
        """Log trouble that is not."""
        ...
