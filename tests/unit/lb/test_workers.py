"""Workers that share a port: what their parent does (load-balancer.md 1)."""

from __future__ import annotations

import sys

import pytest
import trio

from roles.lb import workers


async def test_stop_while_a_worker_is_being_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose start overlaps the stop signal is stopped too, so the parent ends."""
    stopping = trio.Event()
    start = trio.lowlevel.open_process

    async def open_process(*_: object, **__: object) -> trio.Process:
        process = await start([sys.executable, "-c", "import time; time.sleep(60)"])
        stopping.set()
        return process

    monkeypatch.setattr(trio.lowlevel, "open_process", open_process)
    processes: dict[int, trio.Process] = {}
    codes: list[int] = []
    with trio.fail_after(20):
        await workers._keep(0, "@nobody", processes, stopping, codes)
    assert codes == [15]
    assert not processes
