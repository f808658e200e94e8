"""How many connections fit into the files that this process may have open.

A server that runs out of descriptors locks everybody out: what waits at its door cannot even be closed. So each bounds
its connections below that and closes the one that is idle longest to let in another.
"""

from __future__ import annotations

import resource
from typing import Final

FILES_RESERVED: Final = 256
"""Open files that no connection gets: store, peers, logs (own); of a small limit a quarter."""

PROBES_SHARE: Final = 1 / 8
"""Of the rest, for probes, metrics and pages: people, probes and scrapers are few (own)."""

SERVICE_SHARE: Final = 1 - PROBES_SHARE
"""For what the process is there for."""


def raise_file_limit() -> None:
    """Raise this process's soft limit of open files to the hard one, where a sandbox does not forbid it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            pass  # the soft limit counts then


def fit_connections(wanted: int, share: float) -> int:
    """Return how many connections of `wanted` fit into a listener's `share` of the open files, at least 1."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, int((soft - min(FILES_RESERVED, soft // 4)) * share)))
