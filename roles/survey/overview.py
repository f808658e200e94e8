"""Ask all agents for their status at once; shared by the manager's loops and the command line (manager.md 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import trio

from juicebox_hsm.adapters.rpc import RpcFailed
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.clocks import Reading, read_clock
from juicebox_hsm.host.cluster.view import AgentView, ClusterView, build_view
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ports.rpc import RpcCaller
from juicebox_hsm.ports.store import Store
from juicebox_hsm.wire.methods import AGENT_STATUS
from juicebox_hsm.wire.rpc import Empty
from roles.words import RPC_FAILURES

STATUS_TIMEOUT_S: Final = 5.0
HINT_TIMEOUT_S: Final = 0.5
IDS_TIMEOUT_S: Final = 2.0
STEPDOWN_STATUS_TIMEOUT_S: Final = 1.0


async def ask_agent(rpc: RpcCaller, url: str, timeout_s: float) -> AgentView:
    """Ask one agent; trouble becomes the view's `error`."""
    asked = trio.current_time()
    try:
        reply = await rpc.call(url, AGENT_STATUS, Empty(), timeout_s=timeout_s)
    except RealmError as error:
        return AgentView(url, None, why_silent(error, url))
    return AgentView(url, reply, clock=clock_of(reply.now_ms, asked))


def why_silent(error: RealmError, url: str) -> str:
    """Return why the service at `url` did not answer, without its address: whoever shows this shows that."""
    if isinstance(error, RpcFailed):
        return RPC_FAILURES.get(error.code, error.code.value)
    return (str(error) or type(error).__name__).removeprefix(f"{url}: ")


def clock_of(told_ms: int | None, asked_s: float) -> Reading | None:
    """Read the clock of a service that has just answered, None if it is of a version that does not tell."""
    return None if told_ms is None else read_clock(told_ms, asked_s, trio.current_time())


async def ask_agents(rpc: RpcCaller, urls: Iterable[str], timeout_s: float) -> ClusterView:
    """Ask these agents in parallel; each has `timeout_s`, so the whole takes no longer."""
    answers: list[AgentView] = []

    async def ask(url: str) -> None:
        answers.append(await ask_agent(rpc, url, timeout_s))

    async with trio.open_nursery() as nursery:
        for url in sorted(set(urls)):
            nursery.start_soon(ask, url)
    return build_view(answers)


async def discovered_agents(store: Store) -> list[str]:
    """Return the URLs of the agents in discovery. Raises `StoreUnavailable`."""
    return [entry.url for entry in await store.discovery.list(ServiceKind.AGENT)]


async def read_overview(store: Store, rpc: RpcCaller, timeout_s: float = STATUS_TIMEOUT_S) -> ClusterView:
    """Ask every discovered agent. Raises `StoreUnavailable` when discovery cannot be read."""
    return await ask_agents(rpc, await discovered_agents(store), timeout_s)
