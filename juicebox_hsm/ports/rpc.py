"""How one service calls another (agent.md 2); `adapters.rpc.RpcPool` does it over mutual TLS."""

from __future__ import annotations

from typing import Protocol

from juicebox_hsm.wire.methods import Method, Reply, Request
from juicebox_hsm.wire.rpc import PeerRole


class RpcCaller(Protocol):
    """Calls methods of agents and managers by address."""

    async def call(
        self,
        url: str,
        method: Method[Request, Reply],
        body: Request,
        *,
        timeout_s: float,
        server: PeerRole | None = None,
        trace: str | None = None,
    ) -> Reply:
        """Call `method` at `url` once, within `timeout_s`, and return its reply: one of the method's reply types.

        `server` demands that role of the peer; `trace` is the trace context to pass on. Raises `RpcFailed` when the
        peer's RPC layer refuses and `RpcUnreachable` when no reply comes, both `RealmError`s.
        """
        ...
