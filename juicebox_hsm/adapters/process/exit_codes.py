"""How processes of this project end: one number for one meaning, in services and tools (operator-tools.md 1, 10)."""

from __future__ import annotations

import enum
from typing import Final


class ExitCode(enum.IntEnum):
    """Exit codes. A supervisor restarts a service after all but OK, USAGE and CONFIG; 1 and 3 to 5 are of tools."""

    OK = 0
    """Done, or stopped in order."""
    FAILED = 1
    """A tool failed or was refused."""
    USAGE = 2
    """Used wrongly."""
    ID = 3
    """A tool did not find an id, or the store."""
    UNREACHABLE = 4
    """A tool could not reach the cluster or the store."""
    FINDINGS = 5
    """A check found problems."""
    UNAVAILABLE = 69
    """A service misses at its start what waiting may bring: the store, a port, a lock."""
    INTERNAL = 70
    """A broken invariant or an unexpected error; the last line on stderr is a JSON report."""
    HSM = 75
    """The HSM is lost or its NVRAM could not be written."""
    CONFIG = 78
    """A service is configured wrongly: somebody has to change that."""


OF_TOOLS: Final = frozenset({ExitCode.FAILED, ExitCode.ID, ExitCode.UNREACHABLE, ExitCode.FINDINGS})
"""No service ends with these."""
