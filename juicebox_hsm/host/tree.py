"""How the host asks for proofs."""

from __future__ import annotations

import enum


class TreeSide(enum.Enum):
    """Which edge of a tree to walk."""

    LEFT = "left"
    RIGHT = "right"
