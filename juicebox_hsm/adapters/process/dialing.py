"""Connections to others."""

from __future__ import annotations

import errno

import trio

from juicebox_hsm.adapters.process.threads import NoThread, thread_needed


async def dial(host: str, port: int) -> trio.SocketStream:
    """Open a connection; `host` has passed `juicebox_hsm.host.addresses`. The caller bounds the wait.

    Raises `OSError`, also when the system has no room for the thread that asks the name server.
    """
    try:
        with thread_needed():
            return await trio.open_tcp_stream(host, port)
    except NoThread as error:
        raise OSError(errno.EAGAIN, str(error)) from None
