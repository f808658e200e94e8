"""What the system knows of this process, and what was built, for the scrape; monitoring by agents has its own ways.

Names and meanings are those that Prometheus' own client libraries have, so that dashboards of processes just work.
"""

from __future__ import annotations

import functools
import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from juicebox_hsm import __version__
from juicebox_hsm.adapters.observation import build_info
from juicebox_hsm.adapters.observation.exposition import numbers
from juicebox_hsm.adapters.observation.families import Tags
from juicebox_hsm.adapters.observation.metric_names import PROCESS

_PROC: Final = Path("/proc/self")
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_UTIME, _STIME, _START = 11, 12, 19
"""Places in proc(5) `stat` behind the command's name, which may hold anything."""


def process_text() -> str:
    """Return the families as Prometheus text; on a system without /proc only those that need none."""
    values = dict(_values())
    return "\n".join(numbers((family, *values[family.name]) for family in PROCESS if family.name in values)) + "\n"


def _values() -> Iterator[tuple[str, tuple[Tags, float]]]:
    commit = build_info.commit().get("hash", "")
    build = (("commit", commit), ("python", platform.python_version()), ("version", __version__))
    yield "juicebox_hsm_build_info", (build, 1)
    yield "process_max_fds", ((), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    try:
        stat = (_PROC / "stat").read_text().rpartition(")")[2].split()
        pages = (_PROC / "statm").read_text().split()
        files = sum(1 for _ in os.scandir(_PROC / "fd")) - 1  # one of them is the directory's own
        began = _boot_s() + int(stat[_START]) / _TICKS
    except OSError:
        return
    yield "process_cpu_seconds", ((), (int(stat[_UTIME]) + int(stat[_STIME])) / _TICKS)
    yield "process_virtual_memory_bytes", ((), int(pages[0]) * _PAGE_BYTES)
    yield "process_resident_memory_bytes", ((), int(pages[1]) * _PAGE_BYTES)
    yield "process_open_fds", ((), files)
    yield "process_start_time_seconds", ((), began)


@functools.cache
def _boot_s() -> float:
    """Return the Unix time at which the system started, as seen first: a clock that is set must not look like one."""
    lines = Path("/proc/stat").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("btime"))
