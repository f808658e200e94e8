"""Show on a terminal how far a transfer is while a manager runs it (operator-tools.md 2)."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.progress import is_same
from juicebox_hsm.host.cluster.ranges import show_range
from juicebox_hsm.host.cluster.view import owned_range
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.wire.methods import MANAGER_STATUS
from juicebox_hsm.wire.rpc import Empty, TransferPrepare
from roles.tools.session import Session
from roles.words import how_far

POLL_S: Final = 0.25
ASK_S: Final = 1.0
"""How long a manager may take to tell; it is only for show (own)."""


@asynccontextmanager
async def progress_shown(session: Session, url: str | None, wanted: TransferPrepare) -> AsyncIterator[None]:
    """Keep one line about a transfer on stderr while the body runs, and remove it; nothing if that is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    with Live(
        console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as live:

        def show(line: str) -> None:
            live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, session, url, wanted, show)
            yield
            nursery.cancel_scope.cancel()


async def watch(session: Session, url: str | None, wanted: TransferPrepare, show: Callable[[str], None]) -> None:
    """Show how far a transfer is until cancelled; trouble with asking is no trouble of the transfer."""
    owned = owned_range(wanted.range)
    moved = "" if owned is None else show_range(owned)
    title = f"{moved} from {wanted.source.hex()[:8]} to {wanted.destination.hex()[:8]}"
    show(f"{title}: asking a manager")
    urls = [] if url is None else [url]
    while True:
        try:
            if url is None:
                found = await session.store.discovery.list(ServiceKind.MANAGER)
                known = {entry.url for entry in found}
                urls = [kept for kept in urls if kept in known] + sorted(known - set(urls))
        except RealmError:
            pass  # the managers known from before are asked
        for position, candidate in enumerate(urls):
            told = await _ask(session, candidate, wanted)
            if told:
                show(f"{title}: {told}")
                urls.insert(0, urls.pop(position))  # the one that runs it is asked first from now on
                break
        await trio.sleep(POLL_S)


async def _ask(session: Session, url: str, wanted: TransferPrepare) -> str:
    """Return what a manager says of a transfer; "" if it runs none like it or cannot be understood."""
    try:
        status = await session.rpc.call(url, MANAGER_STATUS, Empty(), timeout_s=ASK_S)
    except RealmError:
        return ""
    return next((how_far(running) for running in status.transfers if is_same(running, wanted)), "")
