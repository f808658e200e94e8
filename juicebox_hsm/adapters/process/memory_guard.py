"""Keep the memory of a process that holds keys out of core files and debuggers (hardware.md 2.1).

Agents hold a realm's keys, balancers the key of record ids and tenants' keys, the tenant log tenants' keys.
This narrows accidents, not root: whoever is root reads the memory of any process.
"""

from __future__ import annotations

import ctypes
import os
import resource
from typing import Final

_PR_SET_DUMPABLE: Final = 4
"""From linux/prctl.h; the value is part of the kernel's stable interface."""


def forbid_dumps() -> bool:
    """Write no core file, and let no other process of the same user attach or read our memory; tell whether both hold.

    Linux only; elsewhere, or where the kernel refuses, the core limit alone applies.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.uname().sysname != "Linux":
        return False
    return int(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)) == 0
