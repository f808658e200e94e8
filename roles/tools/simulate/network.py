"""The network of a simulated realm: the RPC pool's and the RPC server's place, with everything that can go wrong.

A call has the outcomes of `adapters.rpc`: a reply, `RpcFailed`, or `RpcUnreachable`, and says `maybe_delivered` as the
real client does. Between two processes lies one stream per caller, as in the pool: what is sent on it arrives in order
or, once the stream is lost, perhaps not at all. Streams are lost when a process dies (at once, or for want of pongs
when its whole machine died), when it is paused or cut off for longer than pings allow, and by bad luck. Bodies run in
the served process by the real `RpcServer`; requests and replies cross in their encoded form.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import trio

from juicebox_hsm.adapters.edge.exchange import BodyTooLarge, Request, Response
from juicebox_hsm.adapters.rpc import RpcFailed, RpcServer, RpcUnreachable, frames
from juicebox_hsm.client.transport import Headers, TransportError
from juicebox_hsm.wire.methods import AGENT_METHODS, MANAGER_METHODS, AnyMethod
from juicebox_hsm.wire.rpc import PeerRole, Refused, RpcCode
from roles.lb.service import ClientService
from roles.tools.simulate.notes import Notes
from roles.tools.simulate.scheduling import Life, VirtualClock

CONNECT_S: Final = 2.0
"""When the real pool gives up connecting, and again waiting for the hello."""
SILENT_S: Final = (1.0, 1.25)
"""When a silent peer's stream is closed: pings go out after 250 ms, and 1 s without a frame is too long."""
BACKOFF_FIRST_S: Final = 0.02
BACKOFF_MAX_S: Final = 1.0
HELD_S: Final = 0.05
"""Pause before a message that is held up is tried again."""

_encode: Final = msgspec.msgpack.Encoder().encode
_FRAME: Final = msgspec.msgpack.Decoder(frames.Reply | frames.Failure).decode
_REPLIES: Final = {
    id(method): frames.BodyDecoder(method.reply)
    for table in (AGENT_METHODS, MANAGER_METHODS)
    for method in table.values()
}


@dataclass(slots=True)
class Weather:
    """How bad the network is now. Rates are per message, times in seconds."""

    delay_s: tuple[float, float] = (0.0002, 0.002)
    slow_rate: float = 0.0
    slow_s: float = 0.3
    break_rate: float = 0.0
    """Share of calls during which the stream is lost, before or after the request was delivered."""
    repeat_rate: float = 0.0
    """Share of calls after whose loss the request arrives a second time, as from a caller that asks again."""


@dataclass(eq=False, slots=True)
class Caller:
    """Who calls, as handlers see it (`adapters.rpc.server.Caller`)."""

    role: PeerRole | None
    name: str
    connection_id: int
    closed: trio.Event = field(default_factory=trio.Event)


@dataclass(eq=False, slots=True)
class Endpoint:
    """A process that serves: its life, and the server that runs bodies in its tasks."""

    url: str
    life: Life
    server: RpcServer | None = None
    service: ClientService | None = None
    nursery: trio.Nursery | None = None
    exchanges: dict[_Exchange, None] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Call:
    """One call in flight."""

    number: int
    method: AnyMethod
    raw: bytes
    source: str
    task: trio.lowlevel.Task | None = None
    """Who waits; None before and after."""
    delivered: bool = False
    is_over: bool = False
    reply: Any = None
    failure: RpcCode | None = None
    lost: str = ""

    async def wait(self) -> None:
        """Wait until `end` is called; a checkpoint."""
        self.task = trio.lowlevel.current_task()

        def abort(_raise_cancel: Callable[[], None]) -> trio.lowlevel.Abort:
            self.task, self.is_over = None, True
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def end(self) -> None:
        """Wake who waits, with whatever is known by now."""
        self.is_over = True
        task, self.task = self.task, None
        if task is not None:
            trio.lowlevel.reschedule(task)


@dataclass(eq=False, slots=True)
class Link:
    """A stream from a caller to an endpoint."""

    caller: Caller
    source: Life
    endpoint: Endpoint
    is_open: bool = True
    reason: str = ""
    request_at: float = 0.0
    reply_at: float = 0.0
    calls: dict[int, _Call] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Peer:
    """What a caller's pool knows about one address."""

    url: str
    link: Link | None = None
    connecting: trio.Event | None = None
    opened_at: float = 0.0
    failures: int = 0
    retry_at: float = 0.0
    reason: str = ""


@dataclass(eq=False, slots=True)
class _Exchange:
    """One HTTP request of a client at a balancer."""

    done: trio.Event = field(default_factory=trio.Event)
    response: Response | None = None


class _Body(Request):
    """A request whose body has arrived."""

    __slots__ = ("_content",)

    def __init__(self, headers: Headers, content: bytes) -> None:
        super().__init__("POST", b"/req", [(name.encode(), value.encode()) for name, value in headers])
        self._content = content

    async def body(self, limit: int) -> bytes:
        """Return the body."""
        if len(self._content) > limit:
            raise BodyTooLarge
        return self._content


class _Served:
    """What a body's answer is given to: the place of the real server's connection."""

    __slots__ = ("_call", "_link", "_network", "caller")

    def __init__(self, network: Network, link: Link, call: _Call) -> None:
        self._network, self._link, self._call = network, link, call
        self.caller = link.caller

    def finish(self, call_id: int, frame: bytes) -> None:  # noqa: ARG002 - the server's own signature
        """Send the answer of a body that has ended."""
        self._network.answer(self._link, self._call, frame)


class Network:
    """All streams of a run. Chance is `chance`; acts are told to `notes`."""

    def __init__(self, clock: VirtualClock, chance: random.Random, notes: Notes) -> None:
        self.clock = clock
        self.weather = Weather()
        self.blocked: set[tuple[str, str]] = set()
        """Directions (from, to) in which nothing gets through, by process name."""
        self.slow: dict[str, float] = {}
        """Processes whose every message takes this much longer, in seconds."""
        self._chance = chance
        self._notes = notes
        self._endpoints: dict[str, Endpoint] = {}
        self._links: dict[Link, None] = {}
        self._numbers = 0

    # --- processes come and go -----------------------------------------------------------------------

    def open(self, endpoint: Endpoint) -> None:
        """Serve at the endpoint's address from now on."""
        self._endpoints[endpoint.url] = endpoint

    def close(self, life: Life, *, silently: bool = False) -> None:
        """End all streams of a life: at once, or as peers notice when a machine dies `silently`."""
        for url, endpoint in list(self._endpoints.items()):
            if endpoint.life is life:
                del self._endpoints[url]
                for exchange in endpoint.exchanges:
                    self.clock.after(self._delay(), exchange.done.set)
        for link in [link for link in self._links if life in (link.source, link.endpoint.life)]:
            wait_s = self._chance.uniform(*SILENT_S) if silently else self._delay()
            self.clock.after(wait_s, self._lose, link, "peer is gone")

    def cut(self, source: str, target: str) -> None:
        """Let nothing through from `source` to `target`; streams between them end when pings were missed."""
        self.blocked.add((source, target))
        self.suspect()

    def heal(self) -> None:
        """Let everything through again."""
        self.blocked.clear()

    def suspect(self) -> None:
        """Look again, when pings have had their time, at streams that are cut or whose process is paused."""
        for link in self._links:
            if self._is_stuck(link):
                self.clock.after(self._chance.uniform(*SILENT_S), self._lose_if_stuck, link)

    def break_one(self) -> None:
        """Lose a stream by bad luck."""
        links = list(self._links)
        if links:
            link = self._chance.choice(links)
            self._lose(link, "reset")

    def _is_stuck(self, link: Link) -> bool:
        source, target = link.source, link.endpoint.life
        cut = (source.name, target.name) in self.blocked or (target.name, source.name) in self.blocked
        return cut or source.frozen or target.frozen

    def _lose_if_stuck(self, link: Link) -> None:
        if link.is_open and self._is_stuck(link):
            self._lose(link, "no pong")

    def _lose(self, link: Link, reason: str) -> None:
        """End a stream: its calls fail, and requests that were not delivered may still be."""
        if not link.is_open:
            return
        link.is_open = False
        link.reason = reason
        del self._links[link]
        self._notes.tell(f"net {link.source.name} -x- {link.endpoint.life.name}: {reason}")
        self._notes.count("network.lost")
        link.caller.closed.set()
        for call in link.calls.values():
            call.lost = reason
            call.end()
        link.calls.clear()

    # --- RPC ---------------------------------------------------------------------------------------

    async def call(self, pool: Pool, url: str, method: AnyMethod, body: object, timeout_s: float) -> Any:
        """Do what `RpcPool.call` does."""
        deadline = self.clock.now + timeout_s
        link = await self._link(pool, url, deadline)
        self._numbers += 1
        call = _Call(self._numbers, method, _encode(body), pool.life.name)
        link.calls[call.number] = call
        self._send(link, call)
        self.clock.at(deadline, call.end)
        try:
            await call.wait()
        finally:
            link.calls.pop(call.number, None)
        if call.lost:
            self._notes.count(f"rpc.{method.name}.lost")
            raise RpcUnreachable(f"{url}: {call.lost}", maybe_delivered=True)
        if call.failure is not None:
            raise RpcFailed(call.failure, f"from {url}")
        if call.reply is None:
            self._notes.count(f"rpc.{method.name}.late")
            raise RpcFailed(RpcCode.DEADLINE_EXCEEDED, f"no reply from {url}", maybe_delivered=True)
        return call.reply

    def _send(self, link: Link, call: _Call) -> None:
        weather = self.weather
        if weather.break_rate and self._chance.random() < weather.break_rate:
            self.clock.after(self._chance.uniform(0.0, 0.01), self._lose, link, "reset")
        link.request_at = max(link.request_at, self.clock.now + self._delay(link.source.name, link.endpoint.life.name))
        self.clock.at(link.request_at, self._deliver, link, call)

    def _deliver(self, link: Link, call: _Call) -> None:
        source, target = link.source.name, link.endpoint.life.name
        if (source, target) in self.blocked and link.is_open:
            self.clock.after(HELD_S, self._deliver, link, call)
            return
        endpoint = link.endpoint
        if self._endpoints.get(endpoint.url) is not endpoint:
            return
        if not link.is_open and ((source, target) in self.blocked or self._chance.random() < 0.5):
            self._notes.count("network.request_dropped")
            return
        if not call.delivered and self._chance.random() < self.weather.repeat_rate and _may_repeat(call.method):
            self._notes.count("network.repeated")
            self.clock.after(self._chance.uniform(0.0, 0.5), self._deliver, link, call)
        call.delivered = True
        server = endpoint.server
        if server is None:
            return
        route = server.routes.get(call.method.name)
        if route is None or server.draining:
            code = RpcCode.UNKNOWN_METHOD if route is None else RpcCode.SHUTTING_DOWN
            self.answer(link, call, frames.encode_failure(call.number, code))
            return
        body = route.decode(msgspec.Raw(call.raw))
        served: Any = _Served(self, link, call)
        try:
            server.start_body(served, route, call.number, body, None)
        except RuntimeError:
            return  # its nursery has ended, and it has not yet come round to saying so

    def answer(self, link: Link, call: _Call, frame: bytes) -> None:
        """Send a body's answer back."""
        target, source = link.endpoint.life.name, link.source.name
        link.reply_at = max(link.reply_at, self.clock.now + self._delay(target, source))
        self.clock.at(link.reply_at, self._answered, link, call, frame)

    def _answered(self, link: Link, call: _Call, frame: bytes) -> None:
        if (link.endpoint.life.name, link.source.name) in self.blocked and link.is_open:
            self.clock.after(HELD_S, self._answered, link, call, frame)
            return
        decoded = _FRAME(frame[frames.LENGTH_BYTES :])
        if isinstance(decoded, frames.Failure):
            failure, reply, outcome = decoded.code, None, decoded.code.value
        else:
            failure, reply = None, _REPLIES[id(call.method)](decoded.body)
            outcome = reply.outcome.value if isinstance(reply, Refused) else type(reply).__name__
        self._notes.count(f"rpc.{call.method.name}.{outcome}")
        self._notes.tell(
            f"rpc {link.source.name} > {link.endpoint.life.name} {call.method.name} #{call.number}: {outcome}"
        )
        if link.is_open and not call.is_over:
            call.failure, call.reply = failure, reply
            call.end()

    def _delay(self, source: str = "", target: str = "") -> float:
        weather = self.weather
        delay_s = self._chance.uniform(*weather.delay_s)
        if weather.slow_rate and self._chance.random() < weather.slow_rate:
            delay_s += self._chance.uniform(0.0, weather.slow_s)
        if self.slow:
            delay_s += self.slow.get(source, 0.0) + self.slow.get(target, 0.0)
        return delay_s

    # --- connecting ----------------------------------------------------------------------------------

    async def _link(self, pool: Pool, url: str, deadline: float) -> Link:
        """Return an open stream, as the pool would: the one there is, or a new one, unless we are in backoff."""
        peer = pool.peers.get(url)
        if peer is None:
            peer = pool.peers[url] = _Peer(url)
        if peer.link is not None:
            if peer.link.is_open:
                return peer.link
            self._lost(peer, peer.link.reason)
        if peer.connecting is None:
            if self.clock.now < peer.retry_at:
                raise RpcUnreachable(f"{url}: {peer.reason}", maybe_delivered=False)
            peer.connecting = trio.Event()
            give_up_at = self.clock.now + CONNECT_S
            self.clock.after(3 * self._delay(pool.life.name), self._connect, pool, peer, give_up_at)
        with trio.move_on_at(deadline):
            await peer.connecting.wait()
        if peer.link is None or not peer.link.is_open:
            raise RpcUnreachable(f"{url}: {peer.reason or 'no connection in time'}", maybe_delivered=False)
        return peer.link

    def _lost(self, peer: _Peer, reason: str) -> None:
        peer.link = None
        peer.reason = reason
        lived_s = self.clock.now - peer.opened_at if peer.failures == 0 else 0.0
        peer.failures = 0 if lived_s > BACKOFF_MAX_S else peer.failures + 1
        backoff_s = min(BACKOFF_FIRST_S * 2 ** min(peer.failures, 10), BACKOFF_MAX_S) if peer.failures else 0.0
        peer.retry_at = self.clock.now + backoff_s * self._chance.uniform(0.5, 1.0)

    def _connect(self, pool: Pool, peer: _Peer, give_up_at: float) -> None:
        if peer.connecting is None:
            return
        endpoint = self._endpoints.get(peer.url)
        name = "" if endpoint is None else endpoint.life.name
        source = pool.life.name
        stuck = (source, name) in self.blocked or (name, source) in self.blocked
        if endpoint is not None and (stuck or endpoint.life.frozen) and self.clock.now < give_up_at:
            self.clock.after(HELD_S, self._connect, pool, peer, give_up_at)
            return
        if endpoint is None or stuck or endpoint.life.frozen:
            self._lost(peer, "connection refused" if endpoint is None else "no connection in time")
            self._notes.count("network.refused" if endpoint is None else "network.unreachable")
        else:
            self._numbers += 1
            link = peer.link = Link(Caller(None, source, self._numbers), pool.life, endpoint)
            self._links[link] = None
            peer.failures, peer.reason, peer.opened_at = 0, "", self.clock.now
        peer.connecting.set()
        peer.connecting = None

    # --- HTTP --------------------------------------------------------------------------------------

    async def post(self, client: str, url: str, headers: Headers, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Bring a client's request to a balancer. Raises `TransportError`."""
        endpoint = self._endpoints.get(url)
        await self.clock.sleep(self._delay(client))
        if endpoint is None or self._endpoints.get(url) is not endpoint:
            raise TransportError("connection refused")
        exchange = _Exchange()
        endpoint.exchanges[exchange] = None
        try:
            self.clock.after(self._delay(client, endpoint.life.name), self._arrived, endpoint, exchange, headers, body)
            if self.weather.break_rate and self._chance.random() < self.weather.break_rate:
                self.clock.after(self._chance.uniform(0.0, 0.05), exchange.done.set)
            with trio.move_on_after(timeout_s):
                await exchange.done.wait()
        finally:
            endpoint.exchanges.pop(exchange, None)
        if exchange.response is None:
            raise TransportError("no complete answer")
        return exchange.response.status, exchange.response.body

    def _arrived(self, endpoint: Endpoint, exchange: _Exchange, headers: Headers, body: bytes) -> None:
        if self._endpoints.get(endpoint.url) is endpoint and endpoint.nursery is not None:
            with contextlib.suppress(RuntimeError):  # as above
                endpoint.nursery.start_soon(self._serve_http, endpoint, exchange, _Body(headers, body))

    async def _serve_http(self, endpoint: Endpoint, exchange: _Exchange, request: _Body) -> None:
        if endpoint.service is None:
            return
        response = await endpoint.service.answer(request)
        self._notes.count(f"http.{response.status}")
        self._notes.tell(f"http {endpoint.life.name} {response.status}")
        self.clock.after(self._delay(endpoint.life.name), self._responded, exchange, response)

    def _responded(self, exchange: _Exchange, response: Response) -> None:
        if not exchange.done.is_set():
            exchange.response = response
            exchange.done.set()


class Pool:
    """The network as one life of a process sees it: what `RpcPool` is to production code."""

    def __init__(self, network: Network, life: Life) -> None:
        self._network = network
        self.life = life
        self.peers: dict[str, _Peer] = {}

    async def call(
        self,
        url: str,
        method: AnyMethod,
        body: Any,
        *,
        timeout_s: float,
        server: PeerRole | None = None,  # noqa: ARG002 - there are no certificates to compare it with
        trace: str | None = None,  # noqa: ARG002
    ) -> Any:
        """Call `method` at `url` and return its reply. Raises `RpcFailed` and `RpcUnreachable`."""
        return await self._network.call(self, url, method, body, timeout_s)


def _may_repeat(method: AnyMethod) -> bool:
    """Tell whether a method must bear being asked twice; a client's request is only ever sent once."""
    return method.name not in {"app", "realm/new", "group/new"}
