"""What the balancer's parts need of their surroundings, as small protocols (house rule: fakes, not mocks)."""

from __future__ import annotations

from typing import Any, Protocol


class Log(Protocol):
    """Where things are told (a part of a structlog logger)."""

    def debug(self, event: str, **values: Any) -> None:
        """Log what helps to find a fault."""
        ...

    def info(self, event: str, **values: Any) -> None:
        """Log what an operator wants to have seen."""
        ...

    def warning(self, event: str, **values: Any) -> None:
        """Log trouble that is being handled."""
        ...

    def error(self, event: str, **values: Any) -> None:
        """Log trouble that is not."""
        ...


class Meter(Protocol):
    """Where things are counted (a part of `adapters.metrics.Metrics`)."""

    def count(self, name: str, n: int = 1, **tags: str | int | bool | None) -> None:
        """Add to a counter."""
        ...

    def gauge(self, name: str, value: float, **tags: str | int | bool | None) -> None:
        """Set a gauge."""
        ...

    def timing(self, name: str, ns: int, **tags: str | int | bool | None) -> None:
        """Observe a duration in nanoseconds."""
        ...
