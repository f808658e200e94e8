"""How a process reads tree nodes: what it remembers, and how hard it may press a store that is far away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

CACHE_NODES: Final = 25_000
LARGE_READ_PERMITS: Final = 10
LARGE_READ_RANGES: Final = 246
"""A read of so many ranges comes from a cache with fewer than about 12 levels of the tree (storage.md 4.4)."""


@dataclass(frozen=True, slots=True)
class NodeTuning:
    """`cache_nodes` are remembered; at most `large_read_permits` reads of `large_read_ranges` or more run at once.

    The embedded store reads pages of one local file and has no large reads.
    """

    cache_nodes: int = CACHE_NODES
    large_read_permits: int = LARGE_READ_PERMITS
    large_read_ranges: int = LARGE_READ_RANGES


DEFAULT_NODE_TUNING: Final = NodeTuning()
