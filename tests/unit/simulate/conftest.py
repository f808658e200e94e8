"""Worlds for the judge's tests."""

from __future__ import annotations

from tests.unit.simulate.judged import world

__all__ = ["world"]
