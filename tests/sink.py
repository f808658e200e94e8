"""A meter and log that keeps nothing, for what a test does not look at; tests that look at something override it."""

from __future__ import annotations

from juicebox_hsm.ports.observation import Tag


class Sink:
    """Swallows what is counted and logged."""

    def count(self, name: str, n: int = 1, **tags: Tag) -> None:
        """Drop."""

    def gauge(self, name: str, value: float, **tags: Tag) -> None:
        """Drop."""

    def timing(self, name: str, ns: int, **tags: Tag) -> None:
        """Drop."""

    def debug(self, event: str, **fields: object) -> None:
        """Drop."""

    def info(self, event: str, **fields: object) -> None:
        """Drop."""

    def warning(self, event: str, **fields: object) -> None:
        """Drop."""

    def error(self, event: str, **fields: object) -> None:
        """Drop."""
