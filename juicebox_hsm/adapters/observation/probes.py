"""The small HTTP port of every role: /livez, /readyz, /metrics and what a role adds (agent.md 2, operator-tools.md 9).

For people, probes and scrapers, on loopback unless an operator says otherwise; no authentication, no secrets. Quart
on hypercorn costs about 13 MB of memory.
"""

from __future__ import annotations

import logging as stdlib
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import trio
from hypercorn.trio import serve
from hypercorn.typing import ASGISendCallable
from quart import Request, Response
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection

from juicebox_hsm.adapters.observation.containment import (
    CONNECTIONS_MAX,
    ContainedConfig,
    GoodTargets,
    contain_connections,
)
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.observation.process_metrics import process_text
from juicebox_hsm.adapters.process.file_limit import PROBES_SHARE, fit_connections
from juicebox_hsm.adapters.process.passing_trouble import local_error
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.readiness import NoAnswer, Readiness, code_headers

PROBE_S: Final = 2.0  # own: a live answer from the HSM has 1 s (agent.md 4)
IDLE_S: Final = 10  # own
GRACE_S: Final = 0.1  # own: nobody needs the rest of a probe's answer
BODY_BYTES_MAX: Final = 1 << 16  # own: no page takes a body
BACKLOG: Final = 64
SEND_MS: Final = 2000  # own: a reader that takes nothing for this long is cut off, even while we shut down
RESPONSE_S: Final = 5.0  # own: for pages of a role; probes and metrics need milliseconds
TEXT_TYPE: Final = "text/plain; charset=utf-8"
METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

contain_connections()


class Exchange(TrioASGIHTTPConnection):
    """One request. Ends a response before it is cancelled.

    Hypercorn tells the application of the end of an exchange before it closes the connection, and Quart-Trio takes
    that as a reason to cancel whoever is still sending: the close. With `Connection: close`, clients then wait for it.
    """

    async def handle_request(  # type: ignore[override]  # Quart-Trio passes its nursery too
        self, nursery: trio.Nursery, request: Request, send: ASGISendCallable
    ) -> None:
        """Answer the request."""
        response = await self.app.handle_request(request)
        with trio.move_on_after(RESPONSE_S, shield=True):
            await self._send_response(send, response)
        nursery.cancel_scope.cancel()


Probe = Callable[[], Awaitable[tuple[bool, str]]]
Judge = Callable[[], Awaitable[Readiness]]


async def serve_probes(
    bind: tuple[str, int],
    *,
    name: str,
    livez: Probe,
    readyz: Judge,
    show: Callable[[Readiness], str],
    metrics: Metrics,
    app_hook: Callable[[QuartTrio], None] | None = None,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the HTTP port on `bind` (host, port; port 0 picks one) until cancelled; reports the port.

    `livez` returns whether all is well and a text (status 200 or 503), `readyz` what `show` makes the text of; they run
    one at a time, and taking more than 2 s, or for `livez` raising a `RealmError`, counts as not well. `app_hook` may
    add routes. Raises `LocalError` when it cannot listen.
    """
    app = make_app(name, livez=livez, readyz=readyz, show=show, metrics=metrics)
    if app_hook is not None:
        app_hook(app)
    config = ContainedConfig(fit_connections(CONNECTIONS_MAX, PROBES_SHARE))
    config.accesslog = None
    config.errorlog = stdlib.getLogger("hypercorn.error")
    config.include_server_header = False
    config.keep_alive_timeout = IDLE_S
    config.read_timeout = IDLE_S
    config.graceful_timeout = GRACE_S
    listener = listen(*bind)
    port = int(listener.getsockname()[1])
    config.bind = [f"fd://{listener.detach()}"]
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, GoodTargets(app), config)
        task_status.started(port)


def make_app(
    name: str, *, livez: Probe, readyz: Judge, show: Callable[[Readiness], str], metrics: Metrics
) -> QuartTrio:
    """Return the application without a server, for tests and for roles that serve it elsewhere."""
    app = QuartTrio(__name__, static_folder=None)
    app.asgi_http_class = Exchange
    app.config["MAX_CONTENT_LENGTH"] = BODY_BYTES_MAX
    live_turn, ready_turn = trio.Lock(), trio.Lock()

    async def get_livez() -> Response:
        ok, text = False, f"no answer within {PROBE_S} s"
        with trio.move_on_after(PROBE_S):
            try:
                async with live_turn:
                    ok, text = await livez()
            except RealmError as error:
                text = str(error)
        return Response(f"{text.rstrip()}\n", status=200 if ok else 503, content_type=TEXT_TYPE)

    async def judge_in_turn() -> Readiness:
        async with ready_turn:
            return await readyz()

    async def get_readyz() -> Response:
        found = await judge_in_time(judge_in_turn)
        status = 200 if found.is_ready else 503
        return Response(show(found), status=status, headers=code_headers(found), content_type=TEXT_TYPE)

    async def get_metrics() -> Response:
        return Response(metrics.render() + process_text(), content_type=METRICS_TYPE)

    async def get_index() -> Response:
        return Response(f"{name}\n/livez\n/readyz\n/metrics\n", content_type=TEXT_TYPE)

    app.add_url_rule("/livez", view_func=get_livez)
    app.add_url_rule("/readyz", view_func=get_readyz)
    app.add_url_rule("/metrics", view_func=get_metrics)
    app.add_url_rule("/", endpoint="index", view_func=get_index)
    return app


async def judge_in_time(readyz: Judge) -> Readiness:
    """Return what a service says of its readiness; that it does not say is a reason, too."""
    with trio.move_on_after(PROBE_S):
        return await readyz()
    return Readiness((NoAnswer(PROBE_S),))


def listen(host: str, port: int, flag: str = "--http-listen") -> socket.socket:
    """Return a listening socket for hypercorn; raises `LocalError` naming `flag`."""
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(info[0], socket.SOCK_STREAM)
    except OSError as error:
        raise local_error(f"{flag} {host}:{port}: {error.strerror}", error) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit it. Hypercorn shields its writes from cancellation, so only the system can end one.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SEND_MS)
        listener.setblocking(False)
        listener.bind(info[4])
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise local_error(
            f"{flag}: cannot listen on {host}:{port}: {error.strerror}; give a free address", error
        ) from None
    return listener
