"""How long tests wait: for what hangs, never for a slow machine."""

from __future__ import annotations

from typing import Final

HANGS_S: Final = 120.0
"""A test that waits for an event gives up after this; everything here takes a hundredth of it on a quiet machine."""
PROGRAM_S: Final = 240.0
"""The same for a whole program, below the time limit of a test."""
