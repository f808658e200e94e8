"""Bounds of the client edge, in one place (load-balancer.md 3).

Every time is in seconds, every size in bytes. Limits hold per process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

BACKLOG: Final = 1024
"""Length of the kernel's accept queue (load-balancer.md 3)."""

EVICTABLE_AFTER_S: Final = 1.0
"""A connection idle this long may be closed to admit another (load-balancer.md 3)."""


@dataclass(frozen=True, slots=True)
class EdgeLimits:
    """What one client, and all clients together, may use of the edge.

    `write_timeout_s` bounds how long a client may take to accept an answer (own: the mirror of `body_timeout_s`).
    `discard_bytes_max` bounds what is read and thrown away so that an early answer reaches a client that still sends.
    """

    connections_max: int = 10_000
    handshake_timeout_s: float = 10.0
    header_timeout_s: float = 10.0
    body_timeout_s: float = 10.0
    write_timeout_s: float = 10.0
    idle_timeout_s: float = 60.0
    close_timeout_s: float = 1.0
    header_bytes_max: int = 8192
    body_bytes_max: int = 2048
    discard_bytes_max: int = 65_536
    h2_streams_max: int = 100
    h2_header_list_bytes_max: int = 4096
    h2_silent_bytes_max: int = 131_072
    h2_resets_max: int = 100
    h2_control_frames_max: int = 300
    h2_flood_window_s: float = 10.0
