"""How the host asks for proofs."""

from __future__ import annotations

from juicebox_hsm.merkle.walk import Side as TreeSide

__all__ = ["TreeSide"]
