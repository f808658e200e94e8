"""The balancer's public paths (load-balancer.md 5): `/req`, `/livez`, `/readyz` and, if enabled, `/rttest`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from juicebox_hsm import __version__
from juicebox_hsm.adapters.edge.drain import DrainController, LifePhase
from juicebox_hsm.adapters.edge.exchange import BodyTooLarge, Handler, Request, Response
from juicebox_hsm.adapters.observation import build_info
from juicebox_hsm.host.readiness import Readiness, code_headers
from juicebox_hsm.wire.client import BODY_BYTES_MAX
from roles.words import readiness_text

ROUND_TRIP_S: Final = 0.1
ROUND_TRIP_BODY: Final = b"\x41" * 167

_TEXT: Final = ((b"content-type", b"text/plain; charset=utf-8"),)
_CORS_POST: Final = ((b"access-control-allow-origin", b"*"),)

NOT_FOUND: Final = Response(404, b"Not Found", _TEXT)
NOT_ALLOWED: Final = Response(405, b"Not Allowed", (*_TEXT, (b"allow", b"GET, HEAD")))
NOT_ALLOWED_REQ: Final = Response(405, b"Not Allowed", (*_TEXT, (b"allow", b"POST, OPTIONS")))
PREFLIGHT: Final = Response(
    200,
    b"No Content",
    (
        *_TEXT,
        *_CORS_POST,
        (b"access-control-allow-headers", b"*"),
        (b"access-control-allow-methods", b"POST"),
        (b"access-control-max-age", b"600"),
    ),
)
ABSENT: Final = "(none)"  # operator-tools.md 9.4
SHUTTING_DOWN: Final = "Shutting down"


def livez_text(name: str) -> str:
    """Return the body of `/livez` while live. Ingress health checks look for how it begins."""
    return f"Juicebox load balancer: {__version__}\nname: {name}\n{build_info.block(absent=ABSENT, public=True)}\n"


class Routes:
    """Dispatches by path and method; `readiness` judges the balancer."""

    def __init__(
        self,
        answer_req: Handler,
        *,
        drain: DrainController,
        name: str,
        readiness: Callable[[], Readiness],
        enable_rttest: bool,
    ) -> None:
        self._answer_req = answer_req
        self._drain = drain
        self._livez = Response(200, livez_text(name).encode(), _TEXT)
        self._readiness = readiness
        self._others: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/livez": self._get_livez,
            "/readyz": self._get_readyz,
        }
        if enable_rttest:
            self._others["/rttest"] = self._round_trip

    async def answer(self, request: Request) -> Response:
        """Answer any request."""
        path = request.path
        if path == "/req":
            if request.method == "POST":
                return await self._answer_req(request)
            return PREFLIGHT if request.method == "OPTIONS" else NOT_ALLOWED_REQ
        other = self._others.get(path)
        return NOT_FOUND if other is None else await other(request)

    async def _get_livez(self, request: Request) -> Response:
        if request.method not in {"GET", "HEAD"}:
            return NOT_ALLOWED
        if self._drain.phase is not LifePhase.LIVE:
            return Response(200, SHUTTING_DOWN.encode(), _TEXT)
        return self._livez

    async def _get_readyz(self, request: Request) -> Response:
        if request.method not in {"GET", "HEAD"}:
            return NOT_ALLOWED
        found = self._readiness()
        codes = tuple((name.encode(), told.encode()) for name, told in code_headers(found).items())
        return Response(200 if found.is_ready else 503, readiness_text(found).encode(), (*_TEXT, *codes))

    async def _round_trip(self, request: Request) -> Response:
        if request.method != "POST":
            return NOT_FOUND
        try:
            await request.body(BODY_BYTES_MAX)
        except BodyTooLarge:
            return Response(413, b"Payload Too Large", _TEXT)
        await trio.sleep(ROUND_TRIP_S)
        return Response(200, ROUND_TRIP_BODY)
