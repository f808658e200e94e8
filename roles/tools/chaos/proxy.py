"""A network that can be cut: TCP forwarders in front of agents and managers, which advertise them as their addresses.

Between services everything is mutual TLS, so who is talking cannot be read from the stream. It is read from the kernel
instead: the process that owns the other end of an accepted connection is one of those that the harness started.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import trio

from juicebox_hsm.adapters.process.dialing import dial

CHUNK_BYTES: Final = 64 * 1024
CONNECT_S: Final = 5.0
_LOOPBACK_HEX: Final = "0100007F"


def pid_of_port(port: int, pids: Mapping[int, str]) -> str | None:
    """Return the name of the process whose socket on 127.0.0.1 has this local port; None if it is none of `pids`."""
    wanted = f"{_LOOPBACK_HEX}:{port:04X}"
    inodes = set()
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        columns = line.split()
        if columns[1] == wanted:
            inodes.add(f"socket:[{columns[9]}]")
    for pid, name in pids.items():
        try:
            for entry in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 -- names only, and quickly
                try:
                    if os.readlink(f"/proc/{pid}/fd/{entry}") in inodes:  # noqa: PTH115 -- same
                        return name
                except OSError:
                    pass  # closed while we looked
        except OSError:
            pass  # the process has ended
    return None


class _Link:
    """State of the network between two services: `passing` is set while bytes may pass."""

    def __init__(self) -> None:
        self.passing = trio.Event()
        self.passing.set()
        self.delay_s = 0.0
        self.resets = False
        self.scopes: set[trio.CancelScope] = set()


class Network:
    """All forwarders of a run. `pids` returns the names of the processes that run now."""

    def __init__(self, pids: Callable[[], Mapping[int, str]]) -> None:
        self._pids = pids
        self._links: dict[frozenset[str], _Link] = {}

    def _link(self, one: str, other: str) -> _Link:
        return self._links.setdefault(frozenset((one, other)), _Link())

    def cut(self, one: str, other: str, *, resets: bool) -> None:
        """Let nothing pass between two services: hold it back until `heal`, or reset connections, old and new."""
        link = self._link(one, other)
        link.resets = resets
        if resets:
            for scope in link.scopes:
                scope.cancel()
        elif link.passing.is_set():
            link.passing = trio.Event()

    def delay(self, one: str, other: str, delay_s: float) -> None:
        """Let everything between two services pass later."""
        self._link(one, other).delay_s = delay_s

    def heal(self, one: str, other: str) -> None:
        """Undo `cut` and `delay`."""
        link = self._link(one, other)
        link.delay_s = 0.0
        link.resets = False
        link.passing.set()

    def heal_all(self) -> None:
        """Undo everything."""
        for link in self._links.values():
            link.delay_s = 0.0
            link.resets = False
            link.passing.set()

    async def forward(
        self,
        name: str,
        listener: trio.SocketListener,
        port: int,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Forward connections from `listener` to the service `name` on 127.0.0.1:`port`, for ever."""

        async def handle(stream: trio.SocketStream) -> None:
            async with stream:
                await self._connection(name, stream, port)

        async with listener, trio.open_nursery() as nursery:
            task_status.started()
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:
                    if error.errno not in {errno.ECONNABORTED, errno.EMFILE}:
                        raise
                    await trio.sleep(0.01)
                    continue
                nursery.start_soon(handle, stream)

    async def _connection(self, name: str, stream: trio.SocketStream, port: int) -> None:
        try:
            source = pid_of_port(stream.socket.getpeername()[1], self._pids())
        except OSError:
            return  # gone already
        link = self._link(name, source or "the harness")
        if link.resets:
            return
        await link.passing.wait()
        with trio.CancelScope() as scope:
            link.scopes.add(scope)
            try:
                with trio.fail_after(CONNECT_S):
                    target = await dial("127.0.0.1", port)
                async with target, trio.open_nursery() as nursery:
                    nursery.start_soon(_pump, link, stream, target, nursery.cancel_scope)
                    nursery.start_soon(_pump, link, target, stream, nursery.cancel_scope)
            except (OSError, trio.TooSlowError):
                pass  # the service does not listen: the caller sees its connection end
            finally:
                link.scopes.discard(scope)


async def _pump(link: _Link, source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope) -> None:
    """Pass bytes in one direction until either end is gone; then the whole connection ends."""
    try:
        while True:
            data = await source.receive_some(CHUNK_BYTES)
            if link.delay_s:
                await trio.sleep(link.delay_s)
            await link.passing.wait()
            if not data:
                break
            await sink.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    scope.cancel()
